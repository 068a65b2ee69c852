// Package disktest gives the tests of packages that store on disk a disk of their own, which they can fill.
package disktest

import (
	"testing"

	"golang.org/x/sys/unix"
)

// Mount returns a directory with a disk of its own, of a size like "96m", or skips the test.
func Mount(t *testing.T, size string) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("disktest", dir, "tmpfs", 0, "size="+size); err != nil {
		t.Skipf("a disk of its own needs root: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
	return dir
}
