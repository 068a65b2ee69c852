package podlogs

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Limits of a scan. A machine has a few hundred pods.
const (
	maxPods       = 2000
	maxContainers = 64
	maxFiles      = 64 // of one container
	maxOpen       = 4000
	maxNames      = 4 * maxPods // read from one folder
)

// pod is a folder <namespace>_<name>_<uid>.
type pod struct {
	dir                  string
	namespace, name, uid string
	seen                 dirSeen
	since                time.Time
	containers           map[string]*container
	limit                limit
	gone                 bool
}

// container is a folder in a pod's.
type container struct {
	name     string
	seen     dirSeen
	files    []*file // in the order in which they were written
	backlog  limit
	workload string
	guessed  bool
	dropped  int64
	reported time.Time
	recall   *recall
}

// dirSeen holds when a folder was last changed, so that it is only listed after a change.
type dirSeen struct {
	mtime, read time.Time
	any         bool
}

// settle is longer than the resolution of a file system's clock: changes within it may not change a folder's time.
const settle = 2 * time.Second

// changed reports whether the folder has to be listed.
func (d *dirSeen) changed(mtime, now time.Time) bool {
	if d.any && mtime.Equal(d.mtime) && d.read.Sub(mtime) > settle {
		return false
	}
	d.mtime, d.read, d.any = mtime, now, true
	return true
}

var (
	dnsLabel     = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`)
	dnsSubdomain = regexp.MustCompile(`^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$`)
	uidForm      = regexp.MustCompile(`^[0-9a-fA-F-]{1,64}$`)
	// A log, a rotated one, and a compressed one.
	fileForm = regexp.MustCompile(`^([0-9]{1,9})\.log(?:\.([0-9]{8}-[0-9]{6})(\.gz)?)?$`)
)

// parsePodDir parses a folder's name.
func parsePodDir(dir string) (namespace, name, uid string, ok bool) {
	parts := strings.Split(dir, "_")
	if len(parts) != 3 || !dnsLabel.MatchString(parts[0]) || !dnsSubdomain.MatchString(parts[1]) || !uidForm.MatchString(parts[2]) {
		return "", "", "", false
	}
	return parts[0], parts[1], parts[2], true
}

// openBelow opens a path below a directory. It follows no symbolic links, does not leave the directory, and does not wait for the other end of a pipe.
func openBelow(dir int, name string, flags uint64) (int, error) {
	fd, err := unix.Openat2(dir, name, &unix.OpenHow{
		Flags:   flags | unix.O_RDONLY | unix.O_CLOEXEC | unix.O_NONBLOCK | unix.O_NOCTTY | unix.O_NOFOLLOW,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS,
	})
	if err != nil {
		return -1, &fs.PathError{Op: "open", Path: name, Err: err}
	}
	return fd, nil
}

// openFile opens a log, if it is a regular file with a single name.
func openFile(dir int, name string) (*os.File, unix.Stat_t, error) {
	var st unix.Stat_t
	fd, err := openBelow(dir, name, 0)
	if err != nil {
		return nil, st, err
	}
	if err := unix.Fstat(fd, &st); err != nil {
		_ = unix.Close(fd)
		return nil, st, &fs.PathError{Op: "stat", Path: name, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG || st.Nlink != 1 {
		_ = unix.Close(fd)
		return nil, st, &fs.PathError{Op: "open", Path: name, Err: errNotALog}
	}
	return os.NewFile(uintptr(fd), name), st, nil
}

var errNotALog = errors.New("it is not a regular file with one name")

// list opens a folder and, if it has changed, returns the names in it.
func list(dir int, name string, seen *dirSeen, now time.Time) (names []string, changed bool, err error) {
	fd, err := openBelow(dir, name, unix.O_DIRECTORY)
	if err != nil {
		return nil, false, err
	}
	d := os.NewFile(uintptr(fd), name)
	defer d.Close()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, false, &fs.PathError{Op: "stat", Path: name, Err: err}
	}
	if !seen.changed(time.Unix(st.Mtim.Unix()), now) {
		return nil, false, nil
	}
	names, err = d.Readdirnames(maxNames)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, true, err
	}
	return names, true, nil
}

// scan looks for pods, containers and files that are new, renamed or removed.
func (t *Tailer) scan(now time.Time) error {
	if err := t.openRoot(); err != nil {
		return err
	}
	var (
		problems []error
		names    []string
		changed  = true
		err      error
	)
	if t.root >= 0 {
		if names, changed, err = list(t.root, ".", &t.rootSeen, now); err != nil {
			return fmt.Errorf("listing %s: %w", t.opts.Root, err)
		}
	}
	if changed {
		problems = append(problems, t.scanRoot(names, now))
	}
	open, held := 0, 0
	for dir, p := range t.pods {
		problems = append(problems, t.scanPod(p, now))
		if p.gone && p.idle() {
			p.close()
			delete(t.pods, dir)
			t.dirty = true
			continue
		}
		for _, c := range p.containers {
			for _, f := range c.files {
				held += f.held()
				if f.file != nil {
					open++
				}
			}
		}
	}
	t.first = t.first && t.root < 0
	t.openFiles, t.held = open, held
	t.count(func(n *numbers) { n.pods, n.files = int64(len(t.pods)), int64(open) })
	if open >= maxOpen {
		problems = append(problems, fmt.Errorf("%d logs are open, which is the limit: others wait", open))
	}
	return summary(problems)
}

// summary lists the first few of many problems.
func summary(problems []error) error {
	const most = 3
	problems = slices.DeleteFunc(problems, func(err error) bool { return err == nil })
	if more := len(problems) - most; more > 0 {
		problems = append(problems[:most], fmt.Errorf("and %d more", more))
	}
	return errors.Join(problems...)
}

// openRoot opens the folder of all logs, which the kubelet creates with the first pod.
func (t *Tailer) openRoot() error {
	if t.root >= 0 {
		var st unix.Stat_t
		if err := unix.Fstat(t.root, &st); err != nil {
			return fmt.Errorf("looking at %s: %w", t.opts.Root, err)
		}
		if st.Nlink > 0 {
			return nil
		}
		_ = unix.Close(t.root) // it was removed
		t.root = -1
	}
	fd, err := unix.Open(t.opts.Root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("opening %s: %w", t.opts.Root, err)
	}
	t.root, t.rootSeen = fd, dirSeen{}
	return nil
}

func (t *Tailer) scanPod(p *pod, now time.Time) error {
	var problems []error
	if t.root >= 0 {
		names, changed, err := list(t.root, p.dir, &p.seen, now)
		switch {
		case notAFolder(err):
			p.gone = true
		case err != nil:
			return fmt.Errorf("listing a pod's logs: %w", err)
		case changed:
			problems = append(problems, p.scan(names))
		}
	}
	for _, c := range p.containers {
		problems = append(problems, t.scanContainer(p, c, now))
	}
	return summary(problems)
}

// notAFolder reports whether the name does not exist, or is a link or a file.
func notAFolder(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP)
}

func (t *Tailer) scanRoot(names []string, now time.Time) error {
	var ignored int64
	found := map[string]bool{}
	tooMany := false
	for _, dir := range names {
		namespace, name, uid, ok := parsePodDir(dir)
		if !ok {
			ignored++
			continue
		}
		found[dir] = true
		if p := t.pods[dir]; p != nil {
			p.gone = false
			continue
		}
		if len(t.pods) >= maxPods {
			tooMany = true
			continue
		}
		t.pods[dir] = &pod{dir: dir, namespace: namespace, name: name, uid: uid, since: now, containers: map[string]*container{}}
	}
	for dir, p := range t.pods {
		if !found[dir] {
			p.gone = true
		}
	}
	t.count(func(n *numbers) { n.ignored = ignored })
	if tooMany || len(names) >= maxNames {
		return fmt.Errorf("there are more than %d pods in %s: the others' logs are not read", maxPods, t.opts.Root)
	}
	return nil
}

func (p *pod) scan(names []string) error {
	for _, name := range names {
		if p.containers[name] != nil || !dnsLabel.MatchString(name) {
			continue
		}
		if len(p.containers) >= maxContainers {
			return fmt.Errorf("the pod %s/%s has more than %d containers: the others' logs are not read", p.namespace, p.name, maxContainers)
		}
		p.containers[name] = &container{name: name}
	}
	return nil
}

// scanContainer looks for a container's files: new, rotated, compressed and removed ones.
func (t *Tailer) scanContainer(p *pod, c *container, now time.Time) error {
	var (
		names   []string
		changed = true
		err     error
	)
	if t.root >= 0 {
		names, changed, err = list(t.root, path.Join(p.dir, c.name), &c.seen, now)
		if notAFolder(err) {
			names, changed, err = nil, true, nil
		}
	}
	if err != nil {
		return fmt.Errorf("listing a container's logs: %w", err)
	}
	if !changed {
		return nil
	}
	var problems []error
	fresh := len(c.files) == 0
	present := map[*file]bool{}
	for _, name := range names {
		m := fileForm.FindStringSubmatch(name)
		if m == nil {
			continue
		}
		restart, err := strconv.Atoi(m[1])
		if err != nil {
			continue
		}
		f, err := t.meet(p, c, name, restart, m[2], m[3] != "")
		if errors.Is(err, fs.ErrNotExist) { // it was renamed meanwhile
			c.seen = dirSeen{}
			continue
		}
		if err != nil {
			problems = append(problems, err)
			continue
		}
		present[f] = true
	}
	slices.SortStableFunc(c.files, compareFiles)
	if t.first && fresh {
		t.boundHistory(c)
	}
	for i, f := range c.files {
		f.removed = !present[f]
		f.superseded = i < len(c.files)-1
	}
	c.files = slices.DeleteFunc(c.files, func(f *file) bool {
		gone := f.removed && f.file == nil
		t.dirty = t.dirty || gone
		return gone
	})
	return summary(problems)
}

// compareFiles orders a container's files as they were written: each run's rotated ones by time, then the current one.
func compareFiles(a, b *file) int {
	if a.moved != b.moved && (a.moved == "" || b.moved == "") && a.restart == b.restart {
		if a.moved == "" {
			return 1
		}
		return -1
	}
	return cmp.Or(cmp.Compare(a.restart, b.restart), cmp.Compare(a.moved, b.moved))
}

// meet returns the known or new file with this name.
func (t *Tailer) meet(p *pod, c *container, name string, restart int, moved string, compressed bool) (*file, error) {
	opened, st, err := openFile(t.root, path.Join(p.dir, c.name, name))
	if err != nil {
		return nil, fmt.Errorf("opening a log of %s/%s: %w", p.namespace, p.name, err)
	}
	head, err := readHead(opened, compressed)
	if err != nil {
		_ = opened.Close()
		return nil, fmt.Errorf("reading a log of %s/%s: %w", p.namespace, p.name, err)
	}
	id := idOf(&st)
	for _, f := range c.files {
		if f.restart != restart || !f.is(id, head) {
			continue
		}
		switch {
		case !compressed:
			t.dirty = t.dirty || f.moved != moved
			f.moved, f.id, f.compressed = moved, id, false
			f.done = f.done && st.Size <= f.place.Offset
		case f.file == nil:
			f.moved, f.id, f.compressed = moved, id, true
		default: // it was opened before it was compressed, and is read to its end
		}
		return f, opened.Close()
	}
	if len(c.files) >= maxFiles {
		_ = opened.Close()
		return nil, fmt.Errorf("the container %s/%s/%s has more than %d logs: the others are not read", p.namespace, p.name, c.name, maxFiles)
	}
	f := &file{id: id, restart: restart, moved: moved, compressed: compressed, size: st.Size, head: head}
	if s, ok := t.state.find(p.dir, c.name, f); ok {
		f.place = s.Place
		f.done = s.Done && (compressed || st.Size <= s.Place.Offset)
	}
	f.rewind()
	c.files = append(c.files, f)
	t.dirty = true
	if f.done || t.openFiles >= maxOpen {
		return f, opened.Close()
	}
	// It stays open, so that its lines can be read after the pod is deleted.
	f.file = opened
	t.openFiles++
	return f, nil
}

// boundHistory skips the part of older logs that exceeds the limit, at the very first start.
func (t *Tailer) boundHistory(c *container) {
	left := t.opts.History
	for i := len(c.files) - 1; i >= 0; i-- {
		f := c.files[i]
		switch {
		case f.compressed || left <= 0:
			f.finish()
		case f.size > left:
			f.startAt(f.size - left)
		}
		left -= f.size
	}
}

// reading returns the files with something to read, now or later.
func (c *container) reading() []*file {
	out := make([]*file, 0, len(c.files))
	for _, f := range c.files {
		if !f.done {
			out = append(out, f)
		}
	}
	return out
}

func (p *pod) idle() bool {
	for _, c := range p.containers {
		if len(c.files) > 0 {
			return false
		}
	}
	return true
}

func (p *pod) close() {
	for _, c := range p.containers {
		for _, f := range c.files {
			f.close()
		}
	}
}
