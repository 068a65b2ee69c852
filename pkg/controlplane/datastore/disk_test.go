package datastore

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// smallDisk mounts a file system of this size, in MiB.
func smallDisk(t *testing.T, size int) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	dir := t.TempDir()
	if out, err := exec.Command("mount", "-t", "tmpfs", "-o", fmt.Sprintf("size=%dm", size), "polymesh-test", dir).CombinedOutput(); err != nil {
		t.Skipf("mounting is not possible on this machine: %v: %s", err, out)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func fill(t *testing.T, path string, bytes int) {
	t.Helper()
	err := os.WriteFile(path, make([]byte, bytes), 0o600)
	if err != nil && !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
}

// A disk is healthy, then nearly full, then full, then healthy again; each change is detected at once.
func TestDiskFillsUp(t *testing.T) {
	dir := smallDisk(t, 32)
	d := &disk{dir: dir}
	now := time.Now()
	if err := d.check(now); err != nil || d.warning() != "" {
		t.Fatalf("an empty disk: %v, %q", err, d.warning())
	}
	ballast := filepath.Join(dir, "ballast")
	fill(t, ballast, 28<<20-4096*8)
	// tmpfs counts the page of the folder: slightly more than 4 MiB are free, slightly less than 13 % of the disk.
	if err := d.check(now); err != nil {
		t.Fatalf("a disk with room: %v", err)
	}
	fill(t, ballast, 30<<20)
	if err := d.check(now); err == nil || !strings.Contains(err.Error(), "is full") {
		t.Errorf("a disk with 2 MiB of room: %v", err)
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	if err := d.check(now); err != nil {
		t.Errorf("a disk that has room again: %v", err)
	}
}

// At 90 % there is a warning, but no failure.
func TestDiskWarns(t *testing.T) {
	dir := smallDisk(t, 128)
	d := &disk{dir: dir}
	fill(t, filepath.Join(dir, "ballast"), 120<<20)
	if err := d.check(time.Now()); err != nil {
		t.Fatalf("a disk with 8 MiB of room: %v", err)
	}
	if w := d.warning(); !strings.Contains(w, "93 % full (8 MB free)") {
		t.Errorf("the warning is %q", w)
	}
}

// A disk that does not accept writes is detected, however much space it has. It is then tested each time until it recovers; a healthy
// disk is tested only from time to time.
func TestDiskThatTakesNoWrites(t *testing.T) {
	dir := smallDisk(t, 32)
	d := &disk{dir: dir}
	now := time.Now()
	if err := d.check(now); err != nil {
		t.Fatal(err)
	}
	remount := func(how string) {
		t.Helper()
		if out, err := exec.Command("mount", "-o", "remount,"+how, dir).CombinedOutput(); err != nil {
			t.Fatalf("remount: %v: %s", err, out)
		}
	}
	remount("ro")
	if err := d.check(now.Add(time.Second)); err != nil {
		t.Errorf("the disk was written to again after a second: %v", err)
	}
	now = now.Add(probeInterval)
	if err := d.check(now); !errors.Is(err, syscall.EROFS) {
		t.Errorf("a read-only disk: %v", err)
	}
	remount("rw")
	if err := d.check(now.Add(time.Second)); err != nil {
		t.Errorf("a disk that takes writes again: %v", err)
	}
	if _, err := os.Stat(filepath.Join(dir, "probe")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the probe is left: %v", err)
	}
}
