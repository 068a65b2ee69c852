// Package datadir owns the folder of the store: who uses it, what is in it, and how much of the disk each part may take.
//
// Open locks it for this process; OpenReadOnly does not. The lock file contains a Holder, with which a supervisor finds the process (pkg/observe in the main
// module): it opens the process by pidfd and compares its start and its program before it signals it.
package datadir

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"polymesh.dev/polymesh/observe/atomicfile"
	"polymesh.dev/polymesh/observe/config"
)

// LockName is the file that a running store keeps locked.
const LockName = "lock"

// formatName is the file with the version of the folder's format, and format the version that this program writes.
const (
	formatName = "format"
	format     = 1
)

// Holder describes the process that took the lock. It stays in the file after the process has ended.
type Holder struct {
	PID int `json:"pid"`
	// Started is the process's start in clock ticks after boot (proc_pid_stat(5), field 22): process ids are reused.
	Started uint64 `json:"started"`
	// Socket is the path of its socket.
	Socket string `json:"socket"`
}

// HeldError means that another process uses the folder.
type HeldError struct {
	Dir    string
	Holder Holder
}

func (e *HeldError) Error() string {
	if e.Holder.PID == 0 {
		return e.Dir + " is used by another process: `fuser " + filepath.Join(e.Dir, LockName) + "` shows it"
	}
	return fmt.Sprintf("%s is used by process %d, which serves on %s", e.Dir, e.Holder.PID, e.Holder.Socket)
}

// Dir is the folder of a store, locked by this process or opened for reading only.
type Dir struct {
	path string
	lock *os.File // nil if it is only read
}

// lookLimit is longer than a process holds the lock just to check whether it is held.
const lookLimit = time.Second

// Open creates the folders and locks them until Close, or until this process ends. The error is a HeldError if another process uses them.
func Open(path, socket string) (*Dir, error) {
	return open(path, socket, (*Dir).Metrics, (*Dir).Logs, (*Dir).Traces)
}

// OpenCollector is Open for the folder of a process that buffers what it reads for the store of another machine.
func OpenCollector(path, socket string) (*Dir, error) { return open(path, socket, (*Dir).Buffer) }

func open(path, socket string, folders ...func(*Dir) string) (*Dir, error) {
	if err := os.MkdirAll(path, 0o700); err != nil {
		return nil, fmt.Errorf("create the data dir: %w", err)
	}
	// Also restrict a folder that already existed: it contains logs and requests of all users.
	if err := os.Chmod(path, 0o700); err != nil {
		return nil, fmt.Errorf("close the data dir to other users: %w", err)
	}
	f, err := os.OpenFile(filepath.Join(path, LockName), os.O_CREATE|os.O_RDWR|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open the lock: %w", err)
	}
	d := &Dir{path: path, lock: f}
	if err := d.take(socket); err != nil {
		f.Close()
		return nil, err
	}
	if err := d.prepare(folders); err != nil {
		f.Close()
		return nil, err
	}
	return d, nil
}

// OpenReadOnly returns the folder of a store and changes nothing in it. It is not locked: a store may start meanwhile.
func OpenReadOnly(path string) (*Dir, error) {
	d := &Dir{path: path}
	known, err := d.known()
	if err != nil {
		return nil, err
	}
	if !known {
		return nil, fmt.Errorf("%s is not the folder of a store: there is no %s in it", path, filepath.Join("meta", formatName))
	}
	return d, nil
}

func (d *Dir) take(socket string) error {
	for deadline := time.Now().Add(lookLimit); ; time.Sleep(lookLimit / 50) {
		err := unix.Flock(int(d.lock.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			break
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("lock %s: %w", d.lock.Name(), err)
		}
		if time.Now().After(deadline) {
			return &HeldError{d.path, read(d.lock)}
		}
	}
	text, err := json.Marshal(Holder{PID: os.Getpid(), Started: started(), Socket: socket})
	if err != nil {
		return err
	}
	if _, err := d.lock.WriteAt(append(text, '\n'), 0); err != nil {
		return fmt.Errorf("write %s: %w", d.lock.Name(), err)
	}
	if err := d.lock.Truncate(int64(len(text)) + 1); err != nil {
		return fmt.Errorf("write %s: %w", d.lock.Name(), err)
	}
	return nil
}

// known reports whether a store has marked the folder as its own. It is an error if that was a later version.
func (d *Dir) known() (bool, error) {
	path := filepath.Join(d.Meta(), formatName)
	text, err := os.ReadFile(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return false, nil
	case err != nil:
		return false, fmt.Errorf("read the version of the data dir: %w", err)
	case len(text) == 0:
		// A power failure soon after the first start of an earlier version left it like this: its format was 1.
		text = []byte("1")
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil || n < 1 {
		return false, fmt.Errorf("%s contains no version of a store: is --data-dir right?", path)
	}
	if n > format {
		return false, fmt.Errorf("%s was written by a later version of Polymesh (format %d, this one writes %d): start that version, or remove the folder, which loses what was recorded", d.path, n, format)
	}
	return true, nil
}

// prepare creates the folders and refuses those of a later version.
func (d *Dir) prepare(folders []func(*Dir) string) error {
	known, err := d.known()
	if err != nil {
		return err
	}
	if !known {
		if err := d.mark(); err != nil {
			return err
		}
	}
	for _, folder := range folders {
		if err := os.MkdirAll(folder(d), 0o700); err != nil {
			return fmt.Errorf("create the data dir: %w", err)
		}
	}
	return nil
}

// mark marks a folder as a store's. A folder with files of another program is refused: the store removes old files, and
// `polymesh reset` removes all of them.
func (d *Dir) mark() error {
	path := filepath.Join(d.Meta(), formatName)
	entries, err := os.ReadDir(d.path)
	if err != nil {
		return fmt.Errorf("list the data dir: %w", err)
	}
	for _, e := range entries {
		if !slices.Contains([]string{LockName, "meta", "observe.log", "observe.log.1", "observe.sock", "lost+found"}, e.Name()) {
			return fmt.Errorf("%s contains %q, and no %s: it is not a store's, choose another folder", d.path, e.Name(), filepath.Join("meta", formatName))
		}
	}
	if err := os.MkdirAll(d.Meta(), 0o700); err != nil {
		return fmt.Errorf("create the data dir: %w", err)
	}
	if err := atomicfile.Write(path, []byte(strconv.Itoa(format)+"\n")); err != nil {
		return fmt.Errorf("write the version of the data dir: %w", err)
	}
	return nil
}

// Close releases the lock.
func (d *Dir) Close() {
	if d.lock != nil {
		d.lock.Close()
	}
}

// Path returns the folder.
func (d *Dir) Path() string { return d.path }

// Metrics returns the folder of Prometheus' blocks.
func (d *Dir) Metrics() string { return filepath.Join(d.path, "metrics") }

// Logs returns the folder of the rows of logs.
func (d *Dir) Logs() string { return filepath.Join(d.path, "logs") }

// Traces returns the folder of the rows of spans.
func (d *Dir) Traces() string { return filepath.Join(d.path, "traces") }

// Buffer returns the folder of the buffer for the store of another machine.
func (d *Dir) Buffer() string { return filepath.Join(d.path, "buffer") }

// Meta returns the folder of everything else: offsets, and the version of the format.
func (d *Dir) Meta() string { return filepath.Join(d.path, "meta") }

// Budget is how many bytes each part may take.
type Budget struct {
	Total, Metrics, Logs, Traces config.Size
	// MinFree is how much of the disk stays free, whatever the parts may take.
	MinFree config.Size
}

// Budget divides the store's disk space, which is limit, or the default if that is 0.
func (d *Dir) Budget(limit config.Size) (Budget, error) {
	var fs unix.Statfs_t
	if err := unix.Statfs(d.path, &fs); err != nil {
		return Budget{}, fmt.Errorf("find the size of the disk of %s: %w", d.path, err)
	}
	return budget(limit, config.Size(int64(fs.Blocks)*fs.Bsize)), nil
}

func budget(limit, disk config.Size) Budget {
	if limit == 0 {
		limit = max(min(config.DefaultDisk, disk/config.DefaultShare), config.MinDisk)
	}
	// Less than a tenth, at which the kubelet evicts pods (nodefs.available in its defaults): the eviction should still be
	// recorded. Total bounds this store's own contribution.
	free := min(disk/config.DefaultShare, 1<<30)
	return Budget{Total: limit, Metrics: limit * 2 / 5, Logs: limit * 2 / 5, Traces: limit / 5, MinFree: free}
}

// maxHolder is how much of a lock file is read, in bytes.
const maxHolder = 64 << 10

// read returns an empty Holder while the lock file is being written.
func read(f *os.File) (h Holder) {
	text, err := io.ReadAll(io.NewSectionReader(f, 0, maxHolder))
	if err != nil || json.Unmarshal(text, &h) != nil {
		return Holder{}
	}
	return h
}

// started returns when this process started; 0 if that is unknown.
func started() uint64 {
	text, err := os.ReadFile("/proc/self/stat")
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
