package node

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Disks creates the disks of nodes, as files of a file system that can copy one instantly. The copy is what a power failure leaves of
// a disk: what its file system has written to it until then, and nothing that is only in memory.
type Disks struct{ dir string }

// poolSize is the size of all disks, and diskSize that of one, in bytes. Only what is used of them takes space.
const (
	poolSize = 40 << 30
	diskSize = 12 << 30
)

// DisksForTest creates a place for disks that is removed with the test. Nodes on these disks must be closed before: create them
// later.
func DisksForTest(t testing.TB) *Disks {
	t.Helper()
	id := make([]byte, 3)
	if _, err := rand.Read(id); err != nil {
		t.Fatal(err)
	}
	name := prefix + hex.EncodeToString(id)
	d := &Disks{filepath.Join(os.TempDir(), name)}
	if err := os.Mkdir(d.dir, 0o711); err != nil {
		t.Fatal(err)
	}
	// A later run removes what this one leaves, as for a node.
	r := record{Dir: d.dir, Owner: ownerOf(os.Getpid())}
	if err := r.write(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if os.Getenv(keepEnv) != "" {
			return
		}
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := r.remove(ctx); err != nil {
			t.Error(err)
		}
	})
	image, pool := filepath.Join(d.dir, "pool.img"), d.pool()
	err := errors.Join(sparse(image, poolSize), os.Mkdir(pool, 0o711))
	if err == nil {
		// XFS shares blocks between files by default; the other one that does is Btrfs.
		err = tool("mkfs.xfs", "-q", image)
	}
	if err == nil {
		err = tool("mount", "-o", "loop", image, pool)
	}
	if err != nil {
		t.Fatalf("make a file system for disks: %v", err)
	}
	return d
}

func (d *Disks) pool() string { return filepath.Join(d.dir, "pool") }

// Disk is a block device's content, in a file.
type Disk struct{ path string }

// New creates a disk with a file system with its defaults: "ext4" or "xfs".
func (d *Disks) New(t testing.TB, filesystem string) *Disk {
	t.Helper()
	disk := &Disk{filepath.Join(d.pool(), rand.Text()+"."+filesystem)}
	if err := errors.Join(sparse(disk.path, diskSize), tool("mkfs."+filesystem, "-q", disk.path)); err != nil {
		t.Fatal(err)
	}
	return disk
}

// Cut copies the disk as it is now.
func (d *Disk) Cut(t testing.TB) *Disk {
	t.Helper()
	from, err := os.Open(d.path)
	if err != nil {
		t.Fatal(err)
	}
	defer from.Close()
	copied := &Disk{filepath.Join(filepath.Dir(d.path), rand.Text()+filepath.Ext(d.path))}
	to, err := os.OpenFile(copied.path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(unix.IoctlFileClone(int(to.Fd()), int(from.Fd())), to.Close()); err != nil {
		t.Fatalf("copy %s: %v", d.path, err)
	}
	return copied
}

// Remove releases the disk's space.
func (d *Disk) Remove(t testing.TB) {
	t.Helper()
	if err := os.Remove(d.path); err != nil {
		t.Error(err)
	}
}

// mount mounts the disk. The loop device is removed when it is unmounted.
func (d *Disk) mount(dir string) error {
	options := "loop"
	if filepath.Ext(d.path) == ".xfs" {
		options += ",nouuid" // a copy has that of the original
	}
	return errors.Join(os.Mkdir(dir, 0o711), tool("mount", "-o", options, d.path, dir))
}

func sparse(path string, size int64) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	return errors.Join(f.Truncate(size), f.Close())
}

func tool(name string, args ...string) error {
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return nil
}

// SlowDisk limits how many writes per second the server's process, without its pods, makes to the disk of its data dir; 0 ends the limit.
func (n *Node) SlowDisk(perSecond int) error {
	if unifiedCgroups() {
		return errors.New("slow a node's disk: this is for the blkio controller of cgroup v1")
	}
	var stat unix.Stat_t
	if err := unix.Stat(n.DataDir(), &stat); err != nil {
		return err
	}
	dir := filepath.Join(n.limited("blkio"), "server-disk")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	limit := fmt.Sprintf("%d:%d %d", unix.Major(stat.Dev), unix.Minor(stat.Dev), perSecond)
	if err := os.WriteFile(filepath.Join(dir, "blkio.throttle.write_iops_device"), []byte(limit), 0o644); err != nil {
		return fmt.Errorf("slow the disk of %s: %w", n.Name, err)
	}
	if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(n.PID())), 0o644); err != nil {
		return fmt.Errorf("slow the disk of %s: %w", n.Name, err)
	}
	return nil
}
