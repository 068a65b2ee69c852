package node

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// outage is the state to restore when a node without power comes back.
type outage struct {
	served bool
	delay  time.Duration
}

// PowerOff turns a node's power off. First its wire is cut, so that the other ends of its connections get no FIN, RST or ICMP message,
// and wait. Then all its processes are killed, including pods and commands of tests, and everything is removed that a machine loses
// without power: mounts, cgroups, the network namespace with interfaces and packet filter rules, the run directory. Files stay as they
// are, with all that was written to them. (Disk.Cut is for writes that a power failure loses.)
func (c *Cluster) PowerOff(n *Node) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case n.cluster != c:
		return fmt.Errorf("%s is not a node of the cluster %s", n.Name, c.Name)
	case n.off != nil:
		return fmt.Errorf("the node %s is already without power", n.Name)
	}
	if err := ip("-n " + string(c.wires) + " link set " + port(n.number) + " down"); err != nil {
		return err
	}
	off := &outage{served: n.server.running()}
	if n.delay != nil {
		off.delay = time.Duration(n.delay.wait.Load())
	}
	n.off = off
	if err := n.stopDelay(); err != nil {
		return err
	}
	if err := n.killAll(); err != nil {
		return err
	}
	if err := n.forget(); err != nil {
		return err
	}
	// A connection of the tests themselves, from Dial or Listen, keeps the namespace alive, without an interface, and no one can enter it.
	return ip("-n "+string(c.wires)+" link delete "+port(n.number), "netns delete "+string(n.inside))
}

// PowerOn turns the power on again: the node is on the network, and its server starts if it ran before. WaitReady waits for it.
func (c *Cluster) PowerOn(ctx context.Context, n *Node) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case n.cluster != c:
		return fmt.Errorf("%s is not a node of the cluster %s", n.Name, c.Name)
	case n.off == nil:
		return fmt.Errorf("the node %s has power", n.Name)
	}
	if err := n.plug(); err != nil {
		return err
	}
	off := n.off
	n.off = nil
	if err := n.setDelay(off.delay); err != nil || !off.served {
		return err
	}
	return n.Start(ctx)
}

// killAll kills all processes of the node: those in its network namespace, the server first, and those in its pods.
func (n *Node) killAll() error {
	if n.server.running() {
		_ = syscall.Kill(n.server.pid, syscall.SIGKILL)
	}
	err := killAll(func() ([]int, error) {
		pids, err := n.inside.pids()
		return append(pids, n.podPIDs()...), err
	})
	if err != nil {
		return fmt.Errorf("end the processes of node %s: %w", n.Name, err)
	}
	if n.server != nil {
		<-n.server.done
	}
	return nil
}

// cgroups returns the node's cgroups in all hierarchies, a parent before its children.
func (n *Node) cgroups() (dirs []string) {
	root := n.Layout().CgroupRoot()
	tops, _ := filepath.Glob(cgroupMount + "/*" + root)
	for _, top := range append(tops, cgroupMount+root) {
		_ = filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				dirs = append(dirs, path)
			}
			return nil // it was just removed
		})
	}
	return dirs
}

func (n *Node) podPIDs() (pids []int) {
	for _, dir := range n.cgroups() {
		text, _ := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
		for _, f := range strings.Fields(string(text)) {
			if pid, err := strconv.Atoi(f); err == nil && pid != os.Getpid() {
				pids = append(pids, pid)
			}
		}
	}
	return pids
}

// forget removes what is only in the machine's memory.
func (n *Node) forget() error {
	runDir := n.Layout().Run()
	for _, dir := range []string{n.DataDir(), runDir} {
		mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
		if err != nil {
			return fmt.Errorf("list mounts: %w", err)
		}
		for _, m := range slices.Backward(mounts) {
			if m.Mountpoint == n.DataDir() {
				continue // a disk
			}
			if err := unix.Unmount(m.Mountpoint, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && !errors.Is(err, unix.EINVAL) {
				return fmt.Errorf("unmount %s: %w", m.Mountpoint, err)
			}
		}
	}
	for _, dir := range slices.Backward(n.cgroups()) {
		// The kernel needs a moment to notice that the last process is gone.
		err := unix.Rmdir(dir)
		for deadline := time.Now().Add(10 * time.Second); errors.Is(err, unix.EBUSY) && time.Now().Before(deadline); err = unix.Rmdir(dir) {
			time.Sleep(poll)
		}
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("remove the cgroup %s: %w", dir, err)
		}
	}
	// What is still mounted may be a user's volume.
	if mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(runDir)); err != nil || len(mounts) > 0 {
		return errors.Join(err, fmt.Errorf("%s still holds mounted file systems", runDir))
	}
	return os.RemoveAll(runDir)
}
