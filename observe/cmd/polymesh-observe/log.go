package main

import (
	"fmt"
	"io"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// maxLog is how large the log may grow, in bytes. One older file of the same size is kept.
const maxLog = 8 << 20

// rotated is the program's log file, which is also its standard error, so that it includes what the runtime prints in a crash.
type rotated struct {
	path string
	mu   sync.Mutex
}

// openLog makes the file standard error.
func openLog(path string) (*rotated, error) {
	r := &rotated{path: path}
	if err := r.open(); err != nil {
		return nil, err
	}
	return r, nil
}

func (r *rotated) open() error {
	f, err := os.OpenFile(r.path, os.O_CREATE|os.O_APPEND|os.O_WRONLY|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return fmt.Errorf("open the log: %w", err)
	}
	defer f.Close()
	if err := unix.Dup3(int(f.Fd()), unix.Stderr, 0); err != nil {
		return fmt.Errorf("write the log to %s: %w", r.path, err)
	}
	return nil
}

// Write implements io.Writer. Libraries write to standard error too, so the size is the file's.
func (r *rotated) Write(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	var info unix.Stat_t
	if err := unix.Fstat(unix.Stderr, &info); err == nil && info.Size+int64(len(p)) > maxLog {
		// If the disk is full, the log continues in the old file.
		if os.Rename(r.path, r.path+".1") == nil {
			_ = r.open()
		}
	}
	// Not os.Stderr, which a test binary may have replaced.
	n, err := unix.Write(unix.Stderr, p)
	if err == nil && n < len(p) {
		err = io.ErrShortWrite
	}
	return max(n, 0), err
}
