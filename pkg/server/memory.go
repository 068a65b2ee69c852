package server

import (
	"bufio"
	"fmt"
	"os"
	"runtime/debug"
	"strings"

	"golang.org/x/sys/unix"
)

// giveBack returns memory that only startup needed: free spans of the heap, and pages of the program file. The latter
// stay in the page cache, where the kernel can drop them, and are mapped again on use.
func giveBack() error {
	debug.FreeOSMemory()
	maps, err := os.Open("/proc/self/maps")
	if err != nil {
		return err
	}
	defer maps.Close()
	program, err := os.Executable()
	if err != nil {
		return err
	}
	for lines := bufio.NewScanner(maps); lines.Scan(); {
		// address perms offset dev inode pathname (proc_pid_maps(5)). Only code is safe: parts of the read-only data were
		// modified by the C startup code before they became read-only, and must stay.
		f := strings.Fields(lines.Text())
		if len(f) < 6 || f[5] != program || !strings.Contains(f[1], "x") {
			continue
		}
		var from, to uintptr
		if _, err := fmt.Sscanf(f[0], "%x-%x", &from, &to); err != nil {
			return fmt.Errorf("read /proc/self/maps: %w", err)
		}
		if _, _, errno := unix.Syscall(unix.SYS_MADVISE, from, to-from, unix.MADV_DONTNEED); errno != 0 {
			return fmt.Errorf("unmap the program: %w", errno)
		}
	}
	return nil
}
