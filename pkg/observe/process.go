package observe

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"polymesh.dev/polymesh/pkg/layout"
)

const (
	// endGrace is how long a store may take to write what it has in memory.
	endGrace = 30 * time.Second
	killWait = 10 * time.Second
	// poll is how often a process that is not our child is checked: the kernel reports only the end of children.
	poll = time.Second
	// endPoll is how often a process that is ending is checked.
	endPoll = 20 * time.Millisecond
)

// place describes where a process of the program keeps its files.
type place struct {
	dataDir layout.DataDir
	// what it is, for people.
	what string
	// folder is its own, and socket is where it serves its status.
	folder, socket string
	cgroup         group
}

// storeOf returns the place of a data dir's store.
func storeOf(d layout.DataDir) place {
	return place{d, "the store", d.Observe(), d.ObserveSocket(), group{name: d.CgroupRoot() + "-observe"}}
}

// collectorOf returns the place of the collector, which sends to the store of another machine.
func collectorOf(d layout.DataDir) place {
	return place{d, "the collector", d.ObserveCollector(), d.ObserveCollectorSocket(), group{d.CgroupRoot() + "-observe-collector", collectorMemory}}
}

func (p place) file(name string) string { return filepath.Join(p.folder, name) }

// process is a running process.
type process struct {
	pid int
	// started is in clock ticks after boot: process ids are reused.
	started uint64
	program string
	args    []string
	// child is set if this server has started it; it is closed, with the error, when it has ended.
	child <-chan error
}

// holder is what the store writes into its lock (observe/datadir).
type holder struct {
	PID     int    `json:"pid"`
	Started uint64 `json:"started"`
}

const (
	lockName = "lock"
	maxLock  = 64 << 10
)

// find returns the process that holds the lock of a place, nil if there is none. A foreign process is an error: it is
// never signalled.
func (at place) find() (*process, error) {
	for limit := time.Now().Add(killWait); ; time.Sleep(endPoll) {
		// An ending process loses its program before the kernel releases its locks.
		p, err := at.holder()
		if !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ESRCH) || time.Now().After(limit) {
			return p, err
		}
	}
}

func (at place) holder() (*process, error) {
	f, err := os.OpenFile(at.file(lockName), os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the lock of %s: %w", at.what, err)
	}
	defer f.Close()
	switch err := unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB); {
	case err == nil:
		return nil, nil // its process has ended
	case !errors.Is(err, unix.EWOULDBLOCK):
		return nil, fmt.Errorf("check %s: %w", f.Name(), err)
	}
	text, err := io.ReadAll(io.LimitReader(f, maxLock))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", f.Name(), err)
	}
	var h holder
	if json.Unmarshal(text, &h) != nil || h.PID <= 0 || h.Started == 0 {
		return nil, fmt.Errorf("%s is locked, but does not say by which process: `fuser %s` shows it", f.Name(), f.Name())
	}
	p := &process{pid: h.PID, started: h.Started}
	if err := p.inspect(); err != nil {
		return nil, fmt.Errorf("check process %d, which holds %s: %w", h.PID, f.Name(), err)
	}
	if !p.alive() {
		return nil, fmt.Errorf("%s is locked by another process than %d, which it names: `fuser %s` shows it", f.Name(), h.PID, f.Name())
	}
	if !isStore(at.dataDir, p.program) {
		return nil, fmt.Errorf("process %d (%q), which holds %s, is not a store of %s: stop it", p.pid, p.program, f.Name(), at.dataDir)
	}
	return p, nil
}

// isStore reports whether a program, without links, is a store's among the unpacked ones of a data dir, also of an earlier version.
func isStore(dataDir layout.DataDir, program string) bool {
	dir, err := filepath.EvalSymlinks(dataDir.Path("data"))
	if err != nil {
		dir = dataDir.Path("data")
	}
	return strings.HasPrefix(program, dir+"/") && filepath.Base(program) == Program
}

// inspect reads the process's program and arguments.
func (p *process) inspect() error {
	exe, err := os.Readlink(p.file("exe"))
	if err != nil {
		return err
	}
	// The kernel's mark of a removed file: an upgrade removes old programs.
	p.program = strings.TrimSuffix(exe, " (deleted)")
	line, err := os.ReadFile(p.file("cmdline"))
	if err != nil {
		return err
	}
	p.args = strings.Split(strings.TrimSuffix(string(line), "\x00"), "\x00")[1:]
	return nil
}

func (p *process) file(name string) string { return filepath.Join("/proc", strconv.Itoa(p.pid), name) }

// alive reports whether the process runs. Another process with its id, or a zombie, does not count.
func (p *process) alive() bool {
	state, started := stat(p.pid)
	return started == p.started && state != "Z" && state != "X"
}

// stat returns a process's state and start (proc_pid_stat(5)).
func stat(pid int) (state string, started uint64) {
	text, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	if err != nil {
		return "", 0
	}
	// The program's name, in parentheses, may contain any characters.
	fields := strings.Fields(string(text)[strings.LastIndexByte(string(text), ')')+1:])
	if len(fields) < 20 {
		return "", 0
	}
	started, _ = strconv.ParseUint(fields[19], 10, 64)
	return fields[0], started
}

// signal signals exactly this process.
func (p *process) signal(s syscall.Signal) error {
	fd, err := unix.PidfdOpen(p.pid, 0)
	switch {
	case errors.Is(err, unix.ESRCH):
		return nil
	case err == nil:
		defer unix.Close(fd)
	case !errors.Is(err, unix.ENOSYS): // before Linux 5.3
		return fmt.Errorf("open process %d: %w", p.pid, err)
	}
	// Opened first: the process that is checked is the one that is signalled.
	if !p.alive() {
		return nil
	}
	if err == nil {
		err = unix.PidfdSendSignal(fd, s, nil, 0)
	} else {
		err = unix.Kill(p.pid, s)
	}
	if err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("signal process %d: %w", p.pid, err)
	}
	return nil
}

// wait returns when the process has ended, or ctx.
func (p *process) wait(ctx context.Context) error {
	if p.child != nil {
		select {
		case err := <-p.child:
			return err
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	for p.alive() {
		select {
		case <-time.After(poll):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// end lets the process write what it has in memory, and kills it if that takes too long.
func (p *process) end(ctx context.Context) error {
	for _, step := range []struct {
		signal syscall.Signal
		wait   time.Duration
	}{{syscall.SIGTERM, endGrace}, {syscall.SIGKILL, killWait}} {
		if err := p.signal(step.signal); err != nil {
			return err
		}
		for limit := time.Now().Add(step.wait); time.Now().Before(limit); {
			if !p.alive() {
				return nil
			}
			select {
			case <-time.After(endPoll):
			case <-ctx.Done():
				return fmt.Errorf("wait for the end of process %d: %w", p.pid, ctx.Err())
			}
		}
	}
	return fmt.Errorf("process %d does not end", p.pid)
}

// Running returns the id of the process of a data dir's store or collector; 0 if none runs.
func Running(dataDir layout.DataDir) (pid int, err error) {
	for _, at := range []place{storeOf(dataDir), collectorOf(dataDir)} {
		if p, err := at.find(); err != nil || p != nil {
			if err != nil {
				return 0, err
			}
			return p.pid, nil
		}
	}
	return 0, nil
}

// Owns reports whether the folder of the store in a data dir was created by a store, or by a server for one that has not started yet.
func Owns(dataDir layout.DataDir) bool {
	if _, err := os.Lstat(dataDir.Observe("meta", "format")); err == nil {
		return true
	}
	entries, err := os.ReadDir(dataDir.Observe())
	for _, e := range entries {
		if e.Name() != lockName && e.Name() != logName && e.Name() != "lost+found" {
			return false
		}
	}
	return err == nil
}

// End ends the store and the collector of a data dir, if they run, and waits for them. The server must not run, because it would
// start them again. Nothing that was stored is lost.
func End(ctx context.Context, dataDir layout.DataDir) error {
	return errors.Join(EndStore(ctx, dataDir), EndCollector(ctx, dataDir))
}

// EndStore is End for the store only.
func EndStore(ctx context.Context, dataDir layout.DataDir) error { return storeOf(dataDir).end(ctx) }

// EndCollector is End for the collector only.
func EndCollector(ctx context.Context, dataDir layout.DataDir) error {
	return collectorOf(dataDir).end(ctx)
}

func (at place) end(ctx context.Context) error {
	p, err := at.find()
	if err != nil {
		return err
	}
	if p != nil {
		if err := p.end(ctx); err != nil {
			return err
		}
	}
	return at.cgroup.remove(ctx)
}

// run starts the process.
func (c *Component) run() (*process, error) {
	program, err := filepath.EvalSymlinks(c.o.Program)
	if err != nil {
		return nil, fmt.Errorf("find the program of %s: %w", c.at.what, err)
	}
	if err := os.MkdirAll(c.at.folder, 0o700); err != nil {
		return nil, fmt.Errorf("create the folder of %s: %w", c.at.what, err)
	}
	// For what the program prints before it has opened its log itself.
	log, err := os.OpenFile(c.logFile(), os.O_CREATE|os.O_APPEND|os.O_WRONLY|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open the log of %s: %w", c.at.what, err)
	}
	defer log.Close()
	line, unlimited := c.at.cgroup.wrap(append([]string{program}, c.args()...))
	cmd := exec.Command(line[0], line[1:]...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = "/", log, log
	// The server's settings for memory and proxies do not apply to the program, which limits its heap itself, by its flags.
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "TZ=" + os.Getenv("TZ")}
	// Its own session: signals to the server's terminal or process group do not reach it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", c.at.what, err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	p := &process{pid: cmd.Process.Pid, child: ended}
	_, p.started = stat(p.pid)
	if unlimited == nil {
		unlimited = c.at.cgroup.add(p.pid)
	}
	// The kubelet has protected the server from the kernel's OOM killer, and children inherit that.
	if err := os.WriteFile(p.file("oom_score_adj"), []byte("0"), 0o644); err != nil && !errors.Is(err, fs.ErrNotExist) {
		c.log.Warn(c.at.what+" may be the last that is killed when memory is short", "err", err)
	}
	note := ""
	if unlimited != nil {
		note = "it has no memory limit: " + unlimited.Error()
	}
	c.set(&c.unlimited, note)
	return p, nil
}
