package datadir

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"polymesh.dev/polymesh/pkg/layout"
)

// LockName is the file in the run directory that a running server keeps locked. Other users cannot open it, so they cannot
// lock it.
const LockName = "lock"

// Holder describes the process that took a lock. It stays in the file after the process has ended.
type Holder struct {
	PID int `json:"pid"`
	// Started is the process's start in clock ticks after boot (proc_pid_stat(5), field 22): process ids are reused.
	Started uint64 `json:"started,omitempty"`
	DataDir string `json:"dataDir,omitempty"`
	// Network is the inode of the network namespace; interfaces and packet filter rules belong to one.
	Network uint64 `json:"network,omitempty"`
	// Bridge is set if the namespace had no pod bridge when the server started, so the current one is the server's.
	Bridge bool `json:"bridge,omitempty"`
}

// Lock is a held lock.
type Lock struct {
	file   *os.File
	holder Holder
}

// Acquire takes the lock of a data dir until the process exits, or until Release.
func Acquire(dataDir layout.DataDir) (*Lock, error) {
	runDir := dataDir.Run()
	// Other users' containers are below it, so they must be able to enter it.
	if err := os.MkdirAll(runDir, 0o711); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(runDir, LockName), os.O_CREATE|os.O_RDWR|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	// An earlier version's file can be opened, and thus locked, by every user.
	if err := f.Chmod(0o600); err != nil {
		f.Close()
		return nil, err
	}
	if err := lock(f); err != nil {
		f.Close()
		return nil, fmt.Errorf("another server holds %s: %w", f.Name(), err)
	}
	network, err := Network()
	if err != nil {
		f.Close()
		return nil, err
	}
	l := &Lock{f, Holder{PID: os.Getpid(), Started: started(os.Getpid()), DataDir: string(dataDir), Network: network}}
	if before := read(f); before.Network == network {
		l.holder.Bridge = before.Bridge
	}
	if err := l.write(); err != nil {
		f.Close()
		return nil, err
	}
	return l, nil
}

// lookLimit is much longer than look holds the lock while checking it.
const lookLimit = time.Second

// lock does not wait for another server, but for processes that only check the lock.
func lock(f *os.File) error {
	for deadline := time.Now().Add(lookLimit); ; time.Sleep(lookLimit / 50) {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil || !errors.Is(err, unix.EWOULDBLOCK) || time.Now().After(deadline) {
			return err
		}
	}
}

// Release releases the lock.
func (l *Lock) Release() { l.file.Close() }

// BridgeExpected returns the last value of ExpectBridge, possibly from an earlier run.
func (l *Lock) BridgeExpected() bool { return l.holder.Bridge }

// ExpectBridge records whether a pod bridge created from now on is this server's.
func (l *Lock) ExpectBridge(ours bool) error {
	l.holder.Bridge = ours
	return l.write()
}

func (l *Lock) write() error {
	text, err := json.Marshal(l.holder)
	if err != nil {
		return err
	}
	if _, err := l.file.WriteAt(append(text, '\n'), 0); err != nil {
		return fmt.Errorf("write %s: %w", l.file.Name(), err)
	}
	return l.file.Truncate(int64(len(text)) + 1)
}

// State is the state of the lock of a data dir.
type State struct {
	Holder
	// Held is true while the process runs.
	Held bool
}

// Look reads the lock of a data dir. The error wraps fs.ErrNotExist if it was never taken since the last boot.
func Look(dataDir layout.DataDir) (State, error) { return look(dataDir.Run()) }

func look(runDir string) (State, error) {
	f, err := os.OpenFile(filepath.Join(runDir, LockName), os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return State{}, err
	}
	defer f.Close()
	var s State
	err = unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB)
	if err != nil && !errors.Is(err, unix.EWOULDBLOCK) {
		return State{}, fmt.Errorf("check %s: %w", f.Name(), err)
	}
	s.Held = err != nil
	s.Holder = read(f)
	return s, nil
}

// read returns an empty Holder while the lock is being written.
func read(f *os.File) (h Holder) {
	text, err := io.ReadAll(io.NewSectionReader(f, 0, maxMarker))
	if err != nil {
		return Holder{}
	}
	// An earlier version's contains only the process id.
	if h.PID, err = strconv.Atoi(strings.TrimSpace(string(text))); err == nil {
		return h
	}
	if json.Unmarshal(text, &h) != nil {
		return Holder{}
	}
	return h
}

// Others returns the data dirs, or else the run directories, of other servers that run in this network namespace, or
// whose containers still do.
func Others(dataDir layout.DataDir) ([]string, error) {
	network, err := Network()
	if err != nil {
		return nil, err
	}
	locks, err := filepath.Glob(filepath.Join(filepath.Dir(layout.DefaultDataDir.Run()), "polymesh*", LockName))
	if err != nil {
		return nil, err
	}
	var others []string
	for _, path := range locks {
		runDir := filepath.Dir(path)
		if runDir == dataDir.Run() {
			continue
		}
		s, err := look(runDir)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if tasks, _ := filepath.Glob(filepath.Join(runDir, "containerd", "io.containerd.runtime.v2.task", "*", "*")); !s.Held && len(tasks) == 0 {
			continue
		}
		// For an earlier version's server, use the process's network namespace.
		if s.Network == 0 && s.Held {
			s.Network = networkOf(strconv.Itoa(s.PID))
		}
		if s.Network != 0 && s.Network != network {
			continue
		}
		if s.DataDir == "" {
			s.DataDir = runDir
		}
		others = append(others, s.DataDir)
	}
	return others, nil
}

// Network returns the inode of the calling thread's network namespace.
func Network() (uint64, error) {
	n := networkOf("thread-self")
	if n == 0 {
		return 0, errors.New("cannot determine the network namespace of this process: is /proc mounted?")
	}
	return n, nil
}

func networkOf(process string) uint64 {
	info, err := os.Stat(filepath.Join("/proc", process, "ns", "net"))
	if err != nil {
		return 0
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return 0
	}
	return st.Ino
}

// started returns 0 if the process does not exist.
func started(pid int) uint64 {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0
	}
	// The program's name, in parentheses, may contain any characters.
	fields := strings.Fields(string(text)[strings.LastIndexByte(string(text), ')')+1:])
	if len(fields) < 20 {
		return 0
	}
	ticks, _ := strconv.ParseUint(fields[19], 10, 64)
	return ticks
}

// Process is a running server, opened by pidfd: a signal reaches exactly this process.
type Process struct {
	PID int
	fd  int
}

// Open opens the process that holds the lock, and verifies that it is a server of this data dir: its program is there, and
// it is not a later process with the same id.
func (s State) Open(dataDir layout.DataDir) (*Process, error) {
	if s.PID <= 0 {
		return nil, errors.New("a server is running, but its lock contains no process id")
	}
	fd, err := unix.PidfdOpen(s.PID, 0)
	if err != nil {
		return nil, fmt.Errorf("open process %d, the lock's holder: %w", s.PID, err)
	}
	p := &Process{s.PID, fd}
	exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", s.PID))
	if err != nil {
		p.Close()
		return nil, fmt.Errorf("check process %d, the lock's holder: %w", s.PID, err)
	}
	dir, err := filepath.EvalSymlinks(string(dataDir))
	if err != nil {
		dir = string(dataDir)
	}
	programs := filepath.Join(dir, "data") + "/"
	if !strings.HasPrefix(exe, programs) || s.Started != 0 && started(s.PID) != s.Started {
		p.Close()
		return nil, fmt.Errorf("process %d (%q), the lock's holder, is not a server of %s: stop the process that holds the lock manually", s.PID, exe, dataDir)
	}
	return p, nil
}

// Signal sends a signal. A process that has exited is not an error.
func (p *Process) Signal(signal syscall.Signal) error {
	if err := unix.PidfdSendSignal(p.fd, signal, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("signal process %d: %w", p.PID, err)
	}
	return nil
}

// Close closes the pidfd.
func (p *Process) Close() { unix.Close(p.fd) }
