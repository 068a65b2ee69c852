package observe

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"polymesh.dev/polymesh/pkg/cgroup"
)

// group is the process's own cgroup, which limits its memory. It is neither below the pods' cgroup, which a kubelet may change, nor below
// the server's, which a service manager may end.
type group struct {
	name string
	// limit is that of its memory, in bytes; 0 where no process is started.
	limit int64
}

// wrap returns the command that runs a command in the cgroup, where systemd has to create it.
func (g group) wrap(line []string) ([]string, error) {
	if !cgroup.BySystemd() {
		return line, nil
	}
	run, err := exec.LookPath("systemd-run")
	if err != nil {
		return line, fmt.Errorf("systemd owns this machine's cgroups: %w", err)
	}
	// systemd-run becomes the program in a unit of its own, which does not end with the server's.
	unit := strings.TrimPrefix(g.name, "/") + "-" + strconv.FormatInt(time.Now().UnixNano(), 36)
	return append([]string{run, "--quiet", "--collect", "--scope", "--unit=" + unit, "--property=MemoryMax=" + strconv.FormatInt(g.limit, 10), "--"}, line...), nil
}

// dir returns the cgroup's folder: with cgroup v1, in the memory hierarchy.
func (g group) dir() string {
	if cgroup.Unified() {
		return filepath.Join(cgroup.Mount, g.name)
	}
	return filepath.Join(cgroup.Mount, "memory", g.name)
}

// add moves a process into the cgroup. It creates the cgroup if systemd does not.
func (g group) add(pid int) error {
	if cgroup.BySystemd() {
		return nil
	}
	dir, limit := g.dir(), "memory.limit_in_bytes"
	if cgroup.Unified() {
		limit = "memory.max"
		// This fails if memory cannot be delegated, or already is; setting the limit below shows whether it worked.
		_ = os.WriteFile(filepath.Join(cgroup.Mount, "cgroup.subtree_control"), []byte("+memory"), 0o644)
	}
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("create its cgroup: %w", err)
	}
	if err := write(filepath.Join(dir, limit), g.limit); err != nil {
		return fmt.Errorf("limit the memory of its cgroup: %w", err)
	}
	if err := write(filepath.Join(dir, "cgroup.procs"), int64(pid)); err != nil {
		return fmt.Errorf("put it into its cgroup: %w", err)
	}
	return nil
}

// write writes to a file of the kernel's, which must exist.
func write(path string, value int64) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(strconv.FormatInt(value, 10))
	return errors.Join(err, f.Close())
}

// remove removes the cgroup, once it is empty.
func (g group) remove(ctx context.Context) error {
	if cgroup.BySystemd() {
		return nil // systemd does
	}
	// The kernel needs a moment to notice that its process has exited.
	for limit := time.Now().Add(killWait); ; {
		err := os.Remove(g.dir())
		switch {
		case err == nil || errors.Is(err, fs.ErrNotExist):
			return nil
		case !errors.Is(err, unix.EBUSY) || time.Now().After(limit):
			return fmt.Errorf("remove the store's cgroup: %w", err)
		}
		select {
		case <-time.After(endPoll):
		case <-ctx.Done():
			return fmt.Errorf("remove the store's cgroup: %w", ctx.Err())
		}
	}
}
