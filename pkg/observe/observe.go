// Package observe runs the store of metrics, logs and traces: the program polymesh-observe (observe/ in the source tree, a module of its
// own), as a process that continues when the server ends.
//
// It owns the process, from its first start until End: its command line, its cgroup, its log. The next server finds it by the lock in
// its folder and adopts it, or starts it again if its program or its flags have changed. The stored data is the program's own
// concern. On a node without the store, the same program sends the machine's logs and numbers to the cluster's store, if there is one. pkg/server and
// pkg/agent add the component; pkg/reset and `polymesh uninstall` end the process.
package observe

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"polymesh.dev/polymesh/pkg/component"
	"polymesh.dev/polymesh/pkg/layout"
	"polymesh.dev/polymesh/pkg/observe/route"
)

// Program is the name of the program among the shipped ones.
const Program = "polymesh-observe"

const (
	// collectorMemory is the limit of the memory of a process that only sends, in bytes, including cached files. The program limits its heap to a part
	// of it (observe/config).
	collectorMemory = 60_000_000

	restartMin = time.Second
	restartMax = time.Minute
	// restartReset is how long the process must have run for the restart delay to be reset.
	restartReset = 2 * time.Minute
	// startDelay is the longest time for which the store waits for the node. The store works without a cluster, so a node that does not become ready is
	// observed too.
	startDelay = 20 * time.Second
)

// Options are those of the component.
type Options struct {
	DataDir layout.DataDir
	// Program is the file of the program; it may be a link.
	Program string
	Node    string
	// Disk is how many bytes the store may take; 0 for its default. Retention is how long it keeps something.
	Disk      int64
	Retention time.Duration
	// Memory is how many bytes the store may use, including cached files.
	Memory int64
	// RemoteWrite lets pods write metrics.
	RemoteWrite bool
	// Collect is set on a node without a store: the process only reads this machine's logs and numbers, and sends them to the cluster's store, if there is one.
	// Disk, Retention, Memory, Kubeconfig, Kubelets and Ports are not used then.
	Collect *route.Node
	// Kubeconfig has the store's own identity. It need not exist yet.
	Kubeconfig string
	// Kubelets are the authority of the kubelets' certificates, and the store's own certificate and key.
	Kubelets struct{ CA, Cert, Key string }
	// Ports are the platform's TCP ports on this machine, to which jobs of users must not connect.
	Ports   []int
	PodLogs string
	// LogFiles are logs of the platform, by name.
	LogFiles map[string]string
	// Debug lets the process log debugging messages, among them each query.
	Debug bool
	// Up is closed when the node is ready, and the store is started then, or a little later if that takes long.
	Up  <-chan struct{}
	Log *slog.Logger
}

// Component is the component "observe".
type Component struct {
	component.Background
	o   Options
	at  place
	log *slog.Logger

	pid     atomic.Int64
	version atomic.Pointer[string]
	summary atomic.Pointer[string]
	// problem is why the process does not run, and unlimited why it has no memory limit.
	problem   atomic.Pointer[string]
	unlimited atomic.Pointer[string]
	notes     atomic.Pointer[[]string]
	// idle is set on a node of a cluster without a store, and server is the name of the server with the store.
	idle   atomic.Bool
	server atomic.Pointer[string]
	// asks is askInterval, except in tests.
	asks time.Duration
}

// New returns the component, not yet started.
func New(o Options) *Component {
	c := &Component{o: o, at: storeOf(o.DataDir), asks: askInterval}
	c.at.cgroup.limit = o.Memory
	if o.Collect != nil {
		c.at = collectorOf(o.DataDir)
	}
	c.log = o.Log.With("component", c.Name())
	return c
}

// Name implements component.Component.
func (c *Component) Name() string { return "observe" }

// PID implements component.Process.
func (c *Component) PID() int { return int(c.pid.Load()) }

// Version is the version that the process reports.
func (c *Component) Version() string { return text(&c.version) }

// Summary implements component.Summarized.
func (c *Component) Summary() string { return text(&c.summary) }

// Notes implements component.Noted.
func (c *Component) Notes(context.Context) []string {
	notes := component.Present(c.unlimited.Load())
	if parts := c.notes.Load(); parts != nil {
		notes = append(notes, *parts...)
	}
	return notes
}

// Init does nothing: pkg/config has checked the settings.
func (c *Component) Init(context.Context) error { return nil }

// Start looks after the process in the background.
func (c *Component) Start(ctx context.Context) error {
	c.set(&c.problem, "waiting for the node")
	c.Go(ctx, c.supervise)
	return nil
}

// Ready requests the process's status.
func (c *Component) Ready(ctx context.Context) error {
	if c.idle.Load() {
		return nil
	}
	if problem := text(&c.problem); problem != "" {
		return errors.New(problem)
	}
	s, err := ask(ctx, c.at.socket)
	if err != nil {
		return err
	}
	c.version.Store(&s.Version)
	if c.o.Collect != nil {
		c.set(&c.summary, s.sent(text(&c.server), time.Now()))
	} else {
		c.set(&c.summary, s.summary())
	}
	notes := s.notes()
	c.notes.Store(&notes)
	return s.failure()
}

func (c *Component) set(p *atomic.Pointer[string], value string) { p.Store(&value) }

func text(p *atomic.Pointer[string]) string {
	if s := p.Load(); s != nil {
		return *s
	}
	return ""
}

// supervise keeps the process running until ctx ends. The process continues then.
func (c *Component) supervise(ctx context.Context) {
	// A running store is not touched before the node is up, either, so that it records the start.
	select {
	case <-c.o.Up:
	case <-time.After(startDelay):
	case <-ctx.Done():
		return
	}
	if c.o.Collect != nil {
		c.follow(ctx)
		return
	}
	c.keep(ctx)
}

// keep starts the process, and again each time that it ends.
func (c *Component) keep(ctx context.Context) {
	pause := restartMin
	for ctx.Err() == nil {
		begin := time.Now()
		err := c.once(ctx)
		if ctx.Err() != nil {
			return
		}
		if time.Since(begin) > restartReset {
			pause = restartMin
		}
		c.set(&c.problem, err.Error())
		c.log.Error(c.at.what+" does not run, starting it again", "err", err, "pause", pause.String())
		select {
		case <-time.After(pause):
		case <-ctx.Done():
		}
		pause = min(2*pause, restartMax)
	}
}

// once finds or starts the process, and returns when it has ended, or ctx.
func (c *Component) once(ctx context.Context) error {
	p, err := c.adopt(ctx)
	if err != nil {
		return err
	}
	if p == nil {
		if p, err = c.run(); err != nil {
			return err
		}
		c.log.Info("started "+c.at.what, "pid", p.pid)
	}
	c.pid.Store(int64(p.pid))
	defer c.pid.Store(0)
	c.set(&c.problem, "")
	if err := p.wait(ctx); ctx.Err() != nil {
		return err
	} else if err != nil {
		return fmt.Errorf("process %d ended: %w%s", p.pid, err, c.lastWords())
	}
	return fmt.Errorf("process %d ended%s", p.pid, c.lastWords())
}

// adopt returns the running process, nil if there is none. One with another program, or other flags, is ended.
func (c *Component) adopt(ctx context.Context) (*process, error) {
	p, err := c.at.find()
	if err != nil || p == nil {
		return nil, err
	}
	program, err := filepath.EvalSymlinks(c.o.Program)
	if err != nil {
		return nil, fmt.Errorf("find the program of %s: %w", c.at.what, err)
	}
	if p.program == program && slices.Equal(p.args, c.args()) {
		c.log.Info(c.at.what+" of the last server runs", "pid", p.pid)
		return p, nil
	}
	c.log.Info(c.at.what+" has another program or other flags, and is started again", "pid", p.pid)
	return nil, p.end(ctx)
}

// args is the command line after the program's name.
func (c *Component) args() []string {
	dir := c.o.DataDir
	args := []string{
		"--data-dir=" + c.at.folder, "--socket=" + c.at.socket, "--node-name=" + c.o.Node, "--pod-log-dir=" + c.o.PodLogs, "--log=" + c.logFile(),
	}
	if n := c.o.Collect; n != nil {
		args = append(args, "--push-to="+n.Server+layout.ObserveIngestPath, "--push-ca="+n.CA, "--push-cert="+n.Cert, "--push-key="+n.Key)
	} else {
		args = append(args,
			"--cluster-sockets="+dir.ObserveSockets(), "--memory="+strconv.FormatInt(c.o.Memory, 10), "--retention="+c.o.Retention.Truncate(time.Second).String(), "--kubeconfig="+c.o.Kubeconfig, "--server-socket="+dir.StatusSocket(),
			"--kubelet-ca="+c.o.Kubelets.CA, "--kubelet-cert="+c.o.Kubelets.Cert, "--kubelet-key="+c.o.Kubelets.Key)
		if len(c.o.Ports) > 0 {
			args = append(args, "--reserved-ports="+strings.Trim(strings.ReplaceAll(fmt.Sprint(c.o.Ports), " ", ","), "[]"))
		}
		if c.o.RemoteWrite {
			args = append(args, "--remote-write")
		}
		if c.o.Disk != 0 {
			args = append(args, "--disk="+strconv.FormatInt(c.o.Disk, 10))
		}
	}
	if c.o.Debug {
		args = append(args, "--debug")
	}
	for name, path := range c.o.LogFiles {
		args = append(args, "--log-file="+name+"="+path)
	}
	slices.Sort(args)
	return args
}

// LogFiles returns the logs of the platform on a node, by name: containerd's, and its own, if that is a file (see `make up`).
func LogFiles(dir layout.DataDir, own string) map[string]string {
	logs := map[string]string{"containerd": dir.Agent("containerd", "containerd.log")}
	if info, err := os.Stderr.Stat(); err == nil && info.Mode().IsRegular() {
		if path, err := os.Readlink("/proc/self/fd/2"); err == nil {
			logs[own] = path
		}
	}
	return logs
}

// logName is the file of the store's log, which the store itself rotates.
const logName = "observe.log"

func (c *Component) logFile() string { return c.at.file(logName) }

// lastWords returns the last line of the process's log, which says why a program could not start.
func (c *Component) lastWords() string {
	f, err := os.Open(c.logFile())
	if err != nil {
		return ""
	}
	defer f.Close()
	const most = 600
	if info, err := f.Stat(); err == nil && info.Size() > most {
		_, _ = f.Seek(-most, 2)
	}
	end := make([]byte, most)
	n, _ := f.Read(end)
	lines := strings.Split(strings.TrimSpace(string(end[:n])), "\n")
	if last := strings.TrimSpace(lines[len(lines)-1]); last != "" {
		return ": " + last
	}
	return ""
}
