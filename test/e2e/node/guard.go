package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// record is what a later process needs to remove a node, the network of a cluster, or disks. It is in their folder.
type record struct {
	Dir string `json:"dir"`
	// Namespaces are those of the network. A node with a DataDir has the first one.
	Namespaces []namespace `json:"namespaces,omitempty"`
	DataDir    string      `json:"dataDir,omitempty"`
	Kubeconfig string      `json:"kubeconfig,omitempty"`
	Program    string      `json:"program,omitempty"`
	Owner      owner       `json:"owner"`
}

// owner is a process; its start time distinguishes it from a later one with the same id.
type owner struct {
	PID   int    `json:"pid"`
	Start string `json:"start"`
}

const recordName = "node.json"

func (n *Node) record() record {
	return record{
		Dir: n.Dir, Namespaces: []namespace{n.inside}, DataDir: n.DataDir(), Kubeconfig: n.Kubeconfig(), Program: n.tested,
		Owner: ownerOf(os.Getpid()),
	}
}

func (c *Cluster) record() record {
	return record{Dir: c.Dir, Namespaces: []namespace{c.outside, c.wires}, Owner: ownerOf(os.Getpid())}
}

func ownerOf(pid int) owner {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return owner{PID: pid}
	}
	// proc(5): field 22 is the start time, the third one the state; the second one, in brackets, may hold anything.
	after := string(text[strings.LastIndexByte(string(text), ')')+1:])
	if f := strings.Fields(after); len(f) > 19 && f[0] != "Z" {
		return owner{PID: pid, Start: f[19]}
	}
	return owner{PID: pid}
}

func (o owner) alive() bool { return o.Start != "" && ownerOf(o.PID) == o }

func (r record) write() error {
	text, err := json.Marshal(r)
	if err != nil {
		return err
	}
	// Another run that reads it at the same time finds all of it or nothing.
	path := filepath.Join(r.Dir, recordName)
	if err := os.WriteFile(path+".new", text, 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// remove removes a node, a network or disks, whatever state they are in. It can be called again.
func (r record) remove(ctx context.Context) error {
	var failures []error
	if r.DataDir != "" {
		failures = append(failures, r.reset(ctx))
	}
	for _, s := range r.Namespaces {
		if !s.exists() {
			continue
		}
		failures = append(failures, killAll(s.pids), ip("netns delete "+string(s)))
	}
	failures = append(failures, removeFolder(r.Dir))
	return errors.Join(failures...)
}

// reset runs `polymesh reset` on the node.
func (r record) reset(ctx context.Context) error {
	if _, err := os.Stat(r.DataDir); err != nil {
		return nil // no server has run on it
	}
	inside := r.Namespaces[0]
	if !inside.exists() {
		// The power is off. If that was interrupted, other parts of a server may still exist.
		if err := ip("netns add " + string(inside)); err != nil {
			return err
		}
	}
	// With --force: the servers of its cluster may be gone already.
	cmd := exec.CommandContext(ctx, "nsenter", "--net="+inside.path(), "--",
		r.Program, "reset", "--yes", "--force", "--data-dir", r.DataDir, "--kubeconfig", r.Kubeconfig)
	// Nothing is written to the user's own cache, even if the data dir lacks the program.
	cmd.Env = append(environment(), "POLYMESH_DATA_DIR="+r.DataDir, "XDG_CACHE_HOME="+filepath.Join(r.Dir, "cache"))
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("polymesh reset of %s: %w: %s", r.DataDir, err, out)
	}
	return nil
}

// killAll kills the processes of a list until there are none.
func killAll(list func() ([]int, error)) error {
	const limit = 20 * time.Second
	for deadline := time.Now().Add(limit); ; time.Sleep(poll) {
		pids, err := list()
		if err != nil || len(pids) == 0 {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("processes %v do not end", pids)
		}
		for _, pid := range pids {
			_ = syscall.Kill(pid, syscall.SIGKILL) // it may have ended in the meantime
		}
	}
}

// pids lists the processes in the namespace.
func (s namespace) pids() (pids []int, err error) {
	out, err := exec.Command("ip", "netns", "pids", string(s)).Output()
	if err != nil {
		return nil, fmt.Errorf("list the processes in network namespace %s: %w", s, err)
	}
	for _, f := range strings.Fields(string(out)) {
		if pid, err := strconv.Atoi(f); err == nil && pid != os.Getpid() {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// removeFolder deletes the folder of a record, but nothing that is mounted in it.
func removeFolder(dir string) error {
	if !strings.HasPrefix(filepath.Base(dir), prefix) {
		return fmt.Errorf("%s is not a folder of the tests' nodes", dir)
	}
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	if err != nil {
		return fmt.Errorf("list mounts: %w", err)
	}
	for _, m := range slices.Backward(mounts) {
		if err := unix.Unmount(m.Mountpoint, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
			return fmt.Errorf("unmount %s: %w", m.Mountpoint, err)
		}
	}
	return os.RemoveAll(dir)
}

// records returns what tests with the same folder for temporary files have created and not removed, nodes before their networks.
func records() ([]record, error) {
	files, err := filepath.Glob(filepath.Join(os.TempDir(), prefix+"*", recordName))
	if err != nil {
		return nil, err
	}
	var nodes, others []record
	for _, file := range files {
		text, err := os.ReadFile(file)
		if errors.Is(err, fs.ErrNotExist) {
			continue // its owner has just removed it
		}
		var r record
		if err == nil {
			err = json.Unmarshal(text, &r)
		}
		if err != nil {
			return nil, fmt.Errorf("read %s: %w", file, err)
		}
		if r.DataDir != "" {
			nodes = append(nodes, r)
		} else {
			others = append(others, r)
		}
	}
	return append(nodes, others...), nil
}

// reap removes what belongs to an owner that is gone.
func reap(ctx context.Context) error {
	found, err := records()
	if err != nil {
		return err
	}
	var failures []error
	for _, r := range found {
		if !r.Owner.alive() {
			failures = append(failures, r.reap(ctx))
		}
	}
	return errors.Join(failures...)
}

// reap removes it. If another run or watchdog already does so, it waits for that.
func (r record) reap(ctx context.Context) error {
	dir, err := os.Open(r.Dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX); err != nil {
		return fmt.Errorf("lock %s: %w", r.Dir, err)
	}
	if _, err := os.Stat(filepath.Join(r.Dir, recordName)); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return r.remove(ctx)
}

// watchdogEnv makes a process the watchdog of another one.
const watchdogEnv = "POLYMESH_E2E_WATCHDOG"

// Guard removes what earlier runs left, and starts a watchdog that removes what this process leaves when it is killed.
// The watchdog is another process of this program, in which Guard does not return.
func Guard() error {
	if parent := os.Getenv(watchdogEnv); parent != "" {
		watch(parent)
	}
	if os.Geteuid() != 0 {
		return errors.New("nodes need root, because they create containers and network namespaces: run it with sudo")
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	if err := reap(ctx); err != nil {
		return fmt.Errorf("remove what an earlier run left: %w", err)
	}
	if os.Getenv(keepEnv) != "" {
		return nil
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	// A plain descriptor, which garbage collection does not close: the kernel closes it when this process ends, for whatever reason.
	var ends [2]int
	if err := unix.Pipe2(ends[:], unix.O_CLOEXEC); err != nil {
		return fmt.Errorf("create the watchdog's pipe: %w", err)
	}
	watched := os.NewFile(uintptr(ends[0]), "pipe")
	defer watched.Close()
	own, err := json.Marshal(ownerOf(os.Getpid()))
	if err != nil {
		return err
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), watchdogEnv+"="+string(own))
	cmd.ExtraFiles = []*os.File{watched}
	// A separate session: what kills the tests by their group or terminal does not kill it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start the watchdog: %w", err)
	}
	return nil
}

// watch waits until the process that started this one has ended, and removes its nodes and networks.
func watch(parent string) {
	_, _ = io.Copy(io.Discard, os.NewFile(3, "pipe"))
	var o owner
	err := json.Unmarshal([]byte(parent), &o)
	// Its files are closed shortly before it is gone.
	for err == nil && o.alive() {
		time.Sleep(poll)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	if err := errors.Join(err, reap(ctx)); err != nil {
		os.Exit(1) // no one reads this; the next run retries and reports why
	}
	os.Exit(0)
}
