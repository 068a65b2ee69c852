package server

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"polymesh.dev/polymesh/observe/config"
	"polymesh.dev/polymesh/observe/datadir"
	"polymesh.dev/polymesh/observe/ingest"
	"polymesh.dev/polymesh/observe/journal"
	"polymesh.dev/polymesh/observe/nodemetrics"
	"polymesh.dev/polymesh/observe/podlogs"
	"polymesh.dev/polymesh/observe/push"
)

// The names of the components that only a collector has.
const (
	buffer    = "buffer"
	sender    = "push"
	ownNumber = "node-metrics"
)

// gatherInterval is how often a machine's own numbers are read: as often as the store reads those of its machine.
const gatherInterval = 15 * time.Second

// collector has the parts of a process that reads this machine's logs and numbers for the store of another machine.
type collector struct {
	o      *config.Options
	dir    *datadir.Dir
	log    *slog.Logger
	buffer *push.Buffer
}

// Collect runs a collector until ctx ends, and returns when everything that it has read is on disk. The error is a datadir.HeldError if another
// process uses the data dir.
func Collect(ctx context.Context, o *config.Options, version string, log *slog.Logger) error {
	since := time.Now()
	dir, err := datadir.OpenCollector(o.DataDir, o.Socket)
	if err != nil {
		return err
	}
	defer dir.Close()
	log.Info("starting", "version", version, "dir", dir.Path(), "push_to", o.PushTo, "buffer", o.Buffer.String(), "socket", o.Socket)
	// The folder also has the server's sockets, which other users' containers must be able to reach.
	if err := os.MkdirAll(filepath.Dir(o.Socket), 0o711); err != nil {
		return fmt.Errorf("create the folder of the socket: %w", err)
	}
	c := &collector{o: o, dir: dir, log: log}
	life, err := newLifecycle(log, c.components())
	if err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.Handle(StatusPath, statusHandler(Status{Version: version, Since: since, DataDir: dir.Path(), Disk: int64(o.Buffer)}, life, func() []ingest.NodeStatus { return nil }))
	return operate(ctx, o.Socket, mux, life, nil, log)
}

// components returns the parts in the order in which they start.
func (c *collector) components() []Component {
	all := []Component{
		{Name: buffer, Start: c.openBuffer},
		{Name: sender, After: []string{buffer}, Start: c.send},
		{Name: ownNumber, After: []string{buffer}, Start: c.measure},
		{Name: platform, After: []string{buffer}, Start: c.tailPlatform},
	}
	if c.o.PodLogDir != "" {
		all = append(all, Component{Name: podTailer, After: []string{buffer}, Start: c.tailPods})
	}
	return all
}

func (c *collector) openBuffer(context.Context) (Running, error) {
	b, err := push.Open(push.Options{Dir: c.dir.Buffer(), MaxBytes: int64(c.o.Buffer), Log: c.log.With("component", buffer)})
	if err != nil {
		return Running{}, err
	}
	c.buffer = b
	return Running{Problem: b.Problem, Numbers: b.Numbers, Stop: func(context.Context) error { return b.Close() }}, nil
}

func (c *collector) send(context.Context) (Running, error) {
	s := push.NewSender(push.SenderOptions{
		URL: c.o.PushTo, CA: c.o.PushCA, Cert: c.o.PushCert, Key: c.o.PushKey, Buffer: c.buffer, Log: c.log.With("component", sender),
	})
	return Running{Run: s.Run, Problem: s.Problem, Numbers: s.Numbers}, nil
}

func (c *collector) measure(context.Context) (Running, error) {
	host, err := nodemetrics.New(c.log)
	if err != nil {
		return Running{}, fmt.Errorf("read the machine's numbers: %w", err)
	}
	numbers := prometheus.NewRegistry()
	if err := numbers.Register(host); err != nil {
		return Running{}, fmt.Errorf("read the machine's numbers: %w", err)
	}
	return Running{Run: func(ctx context.Context) error {
		ticker := time.NewTicker(gatherInterval)
		defer ticker.Stop()
		for {
			if err := c.buffer.Gather(numbers); err != nil {
				c.log.Warn("a reading of the machine's numbers is lost", "err", err)
			}
			select {
			case <-ctx.Done():
				return nil
			case <-ticker.C:
			}
		}
	}}, nil
}

func (c *collector) tailPlatform(context.Context) (Running, error) {
	return platformLogs(c.o, c.dir, c.buffer, c.log)
}

func (c *collector) tailPods(context.Context) (Running, error) {
	// The store knows the workload of a pod, and sets it.
	return podLogs(c.o, c.dir, c.buffer, nil, c.log)
}

// podLogs reads the logs of the containers of this machine.
func podLogs(o *config.Options, dir *datadir.Dir, to podlogs.Store, workload func(namespace, pod, uid string) (string, bool), log *slog.Logger) (Running, error) {
	t := podlogs.New(podlogs.Options{
		Root: o.PodLogDir, Node: o.NodeName, Store: to, State: filepath.Join(dir.Meta(), "pod-logs.json"), Workload: workload,
		LinesPerSecond: o.LinesPerSecond, Log: log,
	})
	return Running{Run: t.Run, Problem: t.Problem, Numbers: t.Numbers}, nil
}

// platformLogs reads the logs of the platform on this machine.
func platformLogs(o *config.Options, dir *datadir.Dir, to journal.Store, log *slog.Logger) (Running, error) {
	files := make([]journal.File, 0, len(o.LogFiles))
	for _, f := range o.LogFiles {
		files = append(files, journal.File{Name: f.Name, Path: f.Path})
	}
	j := journal.New(journal.Options{
		Node: o.NodeName, Store: to, State: filepath.Join(dir.Meta(), "platform-logs.json"), Files: files, LinesPerSecond: o.LinesPerSecond, Log: log,
	})
	return Running{Run: j.Run, Problem: j.Problem, Numbers: j.Numbers}, nil
}
