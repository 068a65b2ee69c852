package process

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"
)

// cgroupFiles are where a version of cgroups shows what a group may use and uses, and how much of that is page cache, which
// the kernel can drop.
type cgroupFiles struct {
	mount, limit, usage string
	cache               []string // in memory.stat
}

var (
	cgroup1 = cgroupFiles{"/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", []string{"total_inactive_file", "total_active_file"}}
	cgroup2 = cgroupFiles{"/sys/fs/cgroup", "memory.max", "memory.current", []string{"inactive_file", "active_file"}}
)

// availableMemory is how many bytes this process can still use without swapping: MemAvailable of the machine, or what a cgroup
// around the process leaves, if that is less. Root is where /proc and /sys are; it is empty but in tests.
func availableMemory(root string) (uint64, error) {
	machine, err := fields(root+"/proc/meminfo", "MemAvailable:")
	if err != nil {
		return 0, err
	}
	if len(machine) == 0 {
		return 0, errors.New("/proc/meminfo has no MemAvailable")
	}
	left := machine[0] * 1024
	groups, err := os.ReadFile(root + "/proc/self/cgroup")
	if errors.Is(err, fs.ErrNotExist) {
		return left, nil // a kernel without cgroups
	}
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(groups)) {
		// id:controllers:path (cgroups(7)); version 2 has no controllers there.
		f := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(f) != 3 {
			continue
		}
		files := cgroup1
		if f[1] == "" {
			files = cgroup2
		} else if f[1] != "memory" {
			continue
		}
		// The limit of each group above holds too. In a container, the root that is seen here is not the machine's.
		for group := path.Clean("/" + f[2]); ; group = path.Dir(group) {
			inside, err := files.left(filepath.Join(root+files.mount, group))
			if err != nil {
				return 0, err
			}
			left = min(left, inside)
			if group == "/" {
				break
			}
		}
	}
	return left, nil
}

// left is what a cgroup leaves to its processes, in bytes. A group that is not there, because version 2 does not manage memory
// or the process sees another mount, limits nothing.
func (c cgroupFiles) left(dir string) (uint64, error) {
	read := func(name string) (uint64, error) {
		text, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			return 0, err
		}
		if strings.TrimSpace(string(text)) == "max" {
			return math.MaxUint64, nil
		}
		return strconv.ParseUint(strings.TrimSpace(string(text)), 10, 64)
	}
	limit, err := read(c.limit)
	// Version 1 reports "no limit" with the largest multiple of the page size.
	if errors.Is(err, fs.ErrNotExist) || err == nil && limit >= math.MaxInt64>>12<<12 {
		return math.MaxUint64, nil
	}
	if err != nil {
		return 0, fmt.Errorf("read the memory limit of %s: %w", dir, err)
	}
	used, err := read(c.usage)
	if err != nil {
		return 0, fmt.Errorf("read the memory use of %s: %w", dir, err)
	}
	cache, err := fields(filepath.Join(dir, "memory.stat"), c.cache...)
	if err != nil {
		return 0, err
	}
	for _, bytes := range cache {
		used -= min(used, bytes)
	}
	return limit - min(limit, used), nil
}

// fields reads the numbers behind names in a file of lines "name number". Names that are not there are left out.
func fields(name string, names ...string) ([]uint64, error) {
	file, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	var found []uint64
	lines := bufio.NewScanner(file)
	for lines.Scan() {
		f := strings.Fields(lines.Text())
		for _, want := range names {
			if len(f) < 2 || f[0] != want {
				continue
			}
			number, err := strconv.ParseUint(f[1], 10, 64)
			if err != nil {
				return nil, fmt.Errorf("read %s in %s: %w", want, name, err)
			}
			found = append(found, number)
		}
	}
	return found, lines.Err()
}
