package nodemetrics

import (
	"cmp"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/prometheus/procfs"
	"golang.org/x/sys/unix"
)

const (
	// maxMounts bounds the filesystems that are reported.
	maxMounts = 32
	// mountsKept is for how long the list of mounts is used: a node with a thousand pods has thousands of mounts.
	mountsKept = time.Minute
	// statTimeout is how long a collection waits for all filesystems together. A network filesystem never answers if its server is away.
	statTimeout = time.Second
)

// mount is a filesystem of the machine, at the shortest of its mount points.
type mount struct {
	device, point, kind string
	readOnly            bool
}

// mounts knows the machine's filesystems, and reads the sizes of each in a separate goroutine.
type mounts struct {
	fs procfs.FS

	collecting sync.Mutex // one collection at a time: otherwise a filesystem that another collection reads would seem to hang
	mu         sync.Mutex
	read       time.Time
	list       []mount
	asked      map[string]bool // by mount point: filesystems that have not answered yet
}

func newMounts(fs procfs.FS) *mounts { return &mounts{fs: fs, asked: map[string]bool{}} }

// sizes is a filesystem's answer.
type sizes struct {
	buf unix.Statfs_t
	err error
}

// filesystems reports the sizes of the machine's own filesystems. One that does not answer only has node_filesystem_device_error, and is
// not asked again until it has answered: a goroutine waits for each of them, at most maxMounts together.
func (c *Collector) filesystems(e emitter) error {
	c.mounts.collecting.Lock()
	defer c.mounts.collecting.Unlock()
	list, err := c.mounts.current(time.Now())
	if err != nil {
		return err
	}
	timeout := time.NewTimer(statTimeout)
	defer timeout.Stop()
	late := false
	answers := make([]<-chan sizes, len(list))
	for i, m := range list {
		answers[i] = c.mounts.ask(m.point)
	}
	for i, m := range list {
		s, ok := sizes{}, false
		switch {
		case answers[i] == nil:
		case late:
			select {
			case s = <-answers[i]:
				ok = true
			default:
			}
		default:
			select {
			case s = <-answers[i]:
				ok = true
			case <-timeout.C:
				late = true
			}
		}
		problem := ""
		switch {
		case !ok:
			problem = "mountpoint timeout"
		case s.err != nil:
			problem = label(s.err.Error())
		}
		labels := []string{label(m.device), label(m.point), label(m.kind), problem}
		e.gauge("node_filesystem_device_error", boolean(problem != ""), labels...)
		e.gauge("node_filesystem_readonly", boolean(m.readOnly), labels...)
		if problem != "" {
			continue
		}
		block := float64(s.buf.Bsize)
		e.gauge("node_filesystem_size_bytes", float64(s.buf.Blocks)*block, labels...)
		e.gauge("node_filesystem_free_bytes", float64(s.buf.Bfree)*block, labels...)
		e.gauge("node_filesystem_avail_bytes", float64(s.buf.Bavail)*block, labels...)
		e.gauge("node_filesystem_files", float64(s.buf.Files), labels...)
		e.gauge("node_filesystem_files_free", float64(s.buf.Ffree), labels...)
	}
	return nil
}

// ask reads the sizes of a filesystem. It returns nil if a previous read still waits, which means that it hangs.
func (m *mounts) ask(point string) <-chan sizes {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.asked[point] {
		return nil
	}
	m.asked[point] = true
	answer := make(chan sizes, 1)
	go func() {
		var s sizes
		s.err = unix.Statfs(point, &s.buf)
		m.mu.Lock()
		delete(m.asked, point)
		m.mu.Unlock()
		answer <- s
	}()
	return answer
}

// current returns the filesystems, from a list that is read once a minute.
func (m *mounts) current(now time.Time) ([]mount, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.list != nil && now.Sub(m.read) < mountsKept {
		return m.list, nil
	}
	infos, err := m.fs.GetMounts()
	if err != nil {
		return nil, err
	}
	m.read, m.list = now, choose(infos)
	return m.list, nil
}

// pseudo are the kinds of filesystems that store nothing, or that belong to containers.
func pseudo() []string {
	return []string{
		"autofs", "binfmt_misc", "bpf", "cgroup", "cgroup2", "configfs", "debugfs", "devpts", "devtmpfs", "efivarfs", "erofs", "fusectl", "hugetlbfs", "iso9660",
		"mqueue", "nsfs", "proc", "procfs", "pstore", "ramfs", "rpc_pipefs", "securityfs", "selinuxfs", "squashfs", "sysfs", "tracefs",
	}
}

// choose returns the filesystems to report: for each device the mount point with the shortest path. Bind mounts of volumes into pods are the
// same devices.
func choose(infos []*procfs.MountInfo) []mount {
	ignored := pseudo()
	// A later mount hides an earlier one at the same point.
	top := map[string]*procfs.MountInfo{}
	for _, i := range infos {
		top[i.MountPoint] = i
	}
	byDevice := map[string]*procfs.MountInfo{}
	for point, i := range top {
		switch {
		case slices.Contains(ignored, i.FSType):
			continue
		// A container's root. The machine's own may be one, too.
		case i.FSType == "overlay" && point != "/":
			continue
		// The kubelet mounts one for each pod with a service account.
		case i.FSType == "tmpfs" && point != "/run" && point != "/tmp" && point != "/":
			continue
		case strings.HasPrefix(point, "/dev/"), strings.HasPrefix(point, "/proc/"), strings.HasPrefix(point, "/sys/"), strings.HasPrefix(point, "/run/credentials/"):
			continue
		// A path that cannot be a label is left out, because a shortened one could be ambiguous.
		case len(point) > maxLabel || !utf8.ValidString(point):
			continue
		}
		seen := byDevice[i.MajorMinorVer]
		if seen == nil || cmp.Or(cmp.Compare(len(point), len(seen.MountPoint)), strings.Compare(point, seen.MountPoint)) < 0 {
			byDevice[i.MajorMinorVer] = i
		}
	}
	list := make([]mount, 0, len(byDevice))
	for _, i := range byDevice {
		list = append(list, mount{
			device: i.Source, point: unescape(i.MountPoint), kind: i.FSType,
			readOnly: has(i.Options, "ro") || has(i.SuperOptions, "ro") || has(i.SuperOptions, "emergency_ro"),
		})
	}
	// Shortest paths first: these are kept if there are too many.
	slices.SortFunc(list, func(a, b mount) int {
		return cmp.Or(cmp.Compare(depth(a.point), depth(b.point)), strings.Compare(a.point, b.point))
	})
	return list[:min(len(list), maxMounts)]
}

func depth(path string) int {
	if path == "/" {
		return 0
	}
	return strings.Count(filepath.Clean(path), "/")
}

func has(options map[string]string, name string) bool {
	_, ok := options[name]
	return ok
}

// unescape reverses the kernel's escapes in mountinfo: octal, for space, tab, newline and backslash.
func unescape(path string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(path)
}
