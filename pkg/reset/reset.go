// Package reset removes everything that a server made on a machine. It looks for what is there and does not rely on what a
// server remembers, so that it also cleans up after one that was killed.
package reset

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/moby/sys/mountinfo"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/node"
	"polymesh.dev/polymesh/pkg/payload"
	"polymesh.dev/polymesh/pkg/preflight"
)

// Options say what to remove.
type Options struct {
	DataDir    string
	Kubeconfig string
	Out        io.Writer
}

const (
	stopWait = 40 * time.Second
	killWait = 10 * time.Second
	poll     = 50 * time.Millisecond
)

// Run removes it all, step by step; a step that fails does not keep the others from being done.
func Run(ctx context.Context, o Options) error {
	dataDir, err := filepath.Abs(o.DataDir)
	if err != nil {
		return err
	}
	if err := plausible(dataDir); err != nil {
		return err
	}
	o.DataDir = dataDir
	steps := []struct {
		name string
		do   func(context.Context, Options) error
	}{
		{"server stopped", stopServer},
		{"containers stopped", stopContainers},
		{"file systems unmounted", unmount},
		{"network interfaces removed", removeInterfaces},
		{"packet filter rules removed", removeRules},
		{"cgroups removed", removeCgroups},
		{"data removed", removeData},
	}
	var failures []error
	for _, step := range steps {
		if err := step.do(ctx, o); err != nil {
			failures = append(failures, err)
			fmt.Fprintf(o.Out, "✗ %s: %v\n", step.name, err)
			continue
		}
		fmt.Fprintf(o.Out, "✓ %s\n", step.name)
	}
	if len(failures) > 0 {
		return errors.New("not everything could be removed: see above, then run `polymesh reset` again")
	}
	return nil
}

// plausible refuses a folder that no server can have made: what follows deletes it whole.
func plausible(dataDir string) error {
	entries, err := os.ReadDir(dataDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look at %s: %w", dataDir, err)
	}
	for _, e := range entries {
		if !slices.Contains([]string{"data", "server", "agent", "storage", "lost+found", "made-by-make-up"}, e.Name()) {
			return fmt.Errorf("%s holds %q, which no server makes: is --data-dir right? Nothing was changed", dataDir, e.Name())
		}
	}
	return nil
}

// stopServer ends the server as its service manager would, or else by the process id in its lock.
func stopServer(ctx context.Context, o Options) error {
	// Also a unit that is starting or waits to be restarted must be stopped by systemd, or it starts the server again. The
	// exit code is 0 for "active" only.
	state, _ := exec.CommandContext(ctx, "systemctl", "is-active", "polymesh").Output()
	running := []string{"active", "activating", "reloading", "refreshing", "deactivating"}
	if o.DataDir == config.DefaultDataDir && slices.Contains(running, strings.TrimSpace(string(state))) {
		if out, err := exec.CommandContext(ctx, "systemctl", "stop", "polymesh").CombinedOutput(); err != nil {
			return fmt.Errorf("systemctl stop polymesh: %w: %s", err, strings.TrimSpace(string(out)))
		}
	}
	lock, err := os.Open(filepath.Join(config.RunDir(o.DataDir), preflight.LockName))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer lock.Close()
	held := func() bool { return unix.Flock(int(lock.Fd()), unix.LOCK_SH|unix.LOCK_NB) != nil }
	if !held() {
		return nil
	}
	var pid int
	if _, err := fmt.Fscan(lock, &pid); err != nil {
		return fmt.Errorf("a server runs, but its lock does not say which process it is: %w", err)
	}
	for _, step := range []struct {
		signal syscall.Signal
		wait   time.Duration
	}{{syscall.SIGTERM, stopWait}, {syscall.SIGKILL, killWait}} {
		if err := syscall.Kill(pid, step.signal); err != nil && !errors.Is(err, syscall.ESRCH) {
			return fmt.Errorf("end process %d: %w", pid, err)
		}
		if waitFor(ctx, step.wait, func() bool { return !held() }) {
			return nil
		}
	}
	return fmt.Errorf("process %d does not end", pid)
}

func waitFor(ctx context.Context, limit time.Duration, done func() bool) bool {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for !done() {
		select {
		case <-ctx.Done():
			return done()
		case <-time.After(poll):
		}
	}
	return true
}

// stopContainers kills containerd and the shims of this data dir, their containers and everything in the node's cgroup.
func stopContainers(ctx context.Context, o Options) error {
	ids := containers(config.RunDir(o.DataDir))
	ours := func() []int {
		return slices.Concat(programs(resolved(o.DataDir)), containerProcesses(ids), cgroupProcesses(config.CgroupRoot(o.DataDir)))
	}
	gone := waitFor(ctx, killWait, func() bool {
		pids := ours()
		for _, pid := range pids {
			// One that has gone meanwhile needs no signal.
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
		return len(pids) == 0
	})
	if !gone {
		return fmt.Errorf("processes %v do not end", ours())
	}
	return nil
}

// programs lists the processes whose program lies in the data dir: containerd and the shims.
func programs(dataDir string) []int {
	return processes(func(pid int) bool {
		exe, err := os.Readlink(filepath.Join("/proc", strconv.Itoa(pid), "exe"))
		return err == nil && pid != os.Getpid() && strings.HasPrefix(exe, filepath.Join(dataDir, "data")+"/") &&
			filepath.Base(exe) != filepath.Base(payload.Program)
	})
}

// containers lists the ids of the containers that containerd runs, by the folders that their shims have
// (containerd's core/runtime/v2, bundle).
func containers(runDir string) (ids []string) {
	dirs, _ := filepath.Glob(filepath.Join(runDir, "containerd", "io.containerd.runtime.v2.task", "*", "*"))
	for _, dir := range dirs {
		// The kubelet's containers have 64 hex digits; a short name of `ctr run` could be part of any cgroup's.
		if id := filepath.Base(dir); len(id) == 64 {
			ids = append(ids, id)
		}
	}
	return ids
}

// containerProcesses lists the processes of containers: their cgroups have the container's id in their names. Where
// systemd makes the cgroups they do not lie below the node's own.
func containerProcesses(ids []string) []int {
	return processes(func(pid int) bool {
		text, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "cgroup"))
		return err == nil && slices.ContainsFunc(ids, func(id string) bool { return strings.Contains(string(text), id) })
	})
}

// resolved is a path without links, as the kernel tells it in /proc.
func resolved(path string) string {
	if r, err := filepath.EvalSymlinks(path); err == nil {
		return r
	}
	return path
}

func processes(match func(pid int) bool) []int {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	var pids []int
	for _, e := range entries {
		if pid, err := strconv.Atoi(e.Name()); err == nil && match(pid) {
			pids = append(pids, pid)
		}
	}
	return pids
}

// unmount takes down, deepest first, what is mounted below the node's folders.
func unmount(_ context.Context, o Options) error {
	mounts, err := mountinfo.GetMounts(below(o.DataDir, config.RunDir(o.DataDir), config.KubeletDir(o.DataDir)))
	if err != nil {
		return fmt.Errorf("list mounts: %w", err)
	}
	var failures []error
	for _, m := range slices.Backward(mounts) {
		if err := unix.Unmount(m.Mountpoint, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && !errors.Is(err, unix.EINVAL) {
			failures = append(failures, fmt.Errorf("unmount %s: %w", m.Mountpoint, err))
		}
	}
	return errors.Join(failures...)
}

// below selects the mounts below the folders, not one on a folder itself.
func below(folders ...string) mountinfo.FilterFunc {
	for i, f := range folders {
		folders[i] = resolved(f) + "/"
	}
	return func(m *mountinfo.Info) (skip, stop bool) {
		return !slices.ContainsFunc(folders, func(f string) bool { return strings.HasPrefix(m.Mountpoint, f) }), false
	}
}

// removeInterfaces removes the bridge with what is plugged into it, and the load balancer's interface.
func removeInterfaces(ctx context.Context, _ Options) error {
	var links []netlink.Link
	var err error
	// The interfaces of pods that have just ended are still going, and a list that changed while it was read is torn.
	waitFor(ctx, killWait, func() bool {
		links, err = netlink.LinkList()
		return !errors.Is(err, netlink.ErrDumpInterrupted)
	})
	if err != nil {
		return fmt.Errorf("list network interfaces: %w", err)
	}
	bridge := 0
	for _, l := range links {
		if l.Attrs().Name == node.Bridge {
			bridge = l.Attrs().Index
		}
	}
	var failures []error
	for _, l := range links {
		a := l.Attrs()
		if bridge != 0 && (a.Index == bridge || a.MasterIndex == bridge) || strings.HasPrefix(a.Name, "polymesh") {
			if err := netlink.LinkDel(l); err != nil && !errors.Is(err, unix.ENODEV) {
				failures = append(failures, fmt.Errorf("remove interface %s: %w", a.Name, err))
			}
		}
	}
	return errors.Join(failures...)
}

// removeRules deletes the tables of kube-proxy and of the CNI plugins; where they used iptables, their chains.
func removeRules(ctx context.Context, o Options) error {
	if !preflight.NFTables() {
		return removeChains(ctx, o.DataDir)
	}
	nft := tool(o.DataDir, "nft")
	if nft == "" {
		// Without nft nothing can have made a table: a reset that was cut off had removed them before the program.
		return nil
	}
	out, err := exec.CommandContext(ctx, nft, "list", "tables").Output()
	if err != nil {
		return fmt.Errorf("list packet filter tables: %w", err)
	}
	var failures []error
	for line := range strings.Lines(string(out)) {
		f := strings.Fields(line) // table <family> <name>
		if len(f) != 3 || !slices.Contains([]string{"kube-proxy", "cni_plugins_masquerade", "cni_hostport", node.Table}, f[2]) && !isLookTrace(ctx, nft, f[1], f[2]) {
			continue
		}
		if out, err := exec.CommandContext(ctx, nft, "delete", "table", f[1], f[2]).CombinedOutput(); err != nil {
			failures = append(failures, fmt.Errorf("delete table %s %s: %w: %s", f[1], f[2], err, strings.TrimSpace(string(out))))
		}
	}
	return errors.Join(failures...)
}

// tool is a program that the payload brings, or else the host's; empty where neither is.
func tool(dataDir, name string) string {
	if shipped, _ := filepath.Glob(filepath.Join(dataDir, "data", "*", "bin", name)); len(shipped) > 0 {
		return shipped[0]
	}
	path, err := exec.LookPath(name)
	if err != nil {
		return ""
	}
	return path
}

// isLookTrace reports whether a table is one of iptables' with nothing in it. iptables makes the table that it is asked to
// look at, and kube-proxy and the CNI plugins look for rules that an earlier version has left.
func isLookTrace(ctx context.Context, nft, family, name string) bool {
	if !slices.Contains([]string{"ip", "ip6"}, family) || !slices.Contains([]string{"filter", "mangle", "nat"}, name) {
		return false
	}
	out, err := exec.CommandContext(ctx, nft, "list", "table", family, name).Output()
	return err == nil && strings.Join(strings.Fields(string(out)), " ") == "table "+family+" "+name+" { }"
}

// removeChains restores the iptables rules without those of Kubernetes and CNI, as K3s's killall script does.
func removeChains(ctx context.Context, dataDir string) error {
	var failures []error
	for _, family := range []string{"iptables", "ip6tables"} {
		rules, err := exec.CommandContext(ctx, tool(dataDir, family+"-save")).Output()
		if err != nil {
			continue
		}
		var keep strings.Builder
		for line := range strings.Lines(string(rules)) {
			if !strings.Contains(line, "KUBE-") && !strings.Contains(line, "CNI-") {
				keep.WriteString(line)
			}
		}
		restore := exec.CommandContext(ctx, tool(dataDir, family+"-restore"))
		restore.Stdin = strings.NewReader(keep.String())
		if out, err := restore.CombinedOutput(); err != nil {
			failures = append(failures, fmt.Errorf("%s-restore: %w: %s", family, err, strings.TrimSpace(string(out))))
		}
	}
	return errors.Join(failures...)
}

// cgroups lists the node's cgroup in every hierarchy where it exists, and systemd's slice for pods.
func cgroups(name string) []string {
	found, _ := filepath.Glob("/sys/fs/cgroup/*" + name)
	for _, dir := range []string{"/sys/fs/cgroup" + name, "/sys/fs/cgroup/kubepods.slice"} {
		if _, err := os.Stat(dir); err == nil && (name == config.CgroupRoot(config.DefaultDataDir) || strings.HasSuffix(dir, name)) {
			found = append(found, dir)
		}
	}
	return found
}

func cgroupProcesses(name string) []int {
	var pids []int
	for _, dir := range cgroups(name) {
		_ = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.Name() == "cgroup.procs" {
				text, _ := os.ReadFile(path)
				for _, f := range strings.Fields(string(text)) {
					if pid, err := strconv.Atoi(f); err == nil {
						pids = append(pids, pid)
					}
				}
			}
			return nil
		})
	}
	return pids
}

func removeCgroups(ctx context.Context, o Options) error {
	var failures []error
	for _, dir := range cgroups(config.CgroupRoot(o.DataDir)) {
		var dirs []string
		_ = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				dirs = append(dirs, path)
			}
			return nil
		})
		for _, d := range slices.Backward(dirs) {
			var err error
			// The kernel takes a moment to notice that the last process has gone.
			waitFor(ctx, killWait, func() bool {
				err = unix.Rmdir(d)
				return err == nil || !errors.Is(err, unix.EBUSY)
			})
			if err != nil && !errors.Is(err, unix.ENOENT) {
				failures = append(failures, fmt.Errorf("remove cgroup %s: %w", d, err))
			}
		}
	}
	return errors.Join(failures...)
}

func removeData(_ context.Context, o Options) error {
	paths := []string{
		o.DataDir, config.RunDir(o.DataDir), config.KubeletDir(o.DataDir), config.PodLogsDir(o.DataDir),
	}
	if o.Kubeconfig != config.DefaultKubeconfig || o.DataDir == config.DefaultDataDir {
		paths = append(paths, o.Kubeconfig)
	}
	logs, _ := filepath.Glob("/var/log/containers/*.log")
	for _, link := range logs {
		if target, err := os.Readlink(link); err == nil && strings.HasPrefix(target, config.PodLogsDir(o.DataDir)+"/") {
			paths = append(paths, link)
		}
	}
	results, _ := filepath.Glob("/var/lib/cni/results/" + node.NetworkName(o.DataDir) + "-*")
	paths = append(paths, results...)
	if o.DataDir == config.DefaultDataDir {
		// The kubelet tells systemd's login manager there how long a shutdown may take (pkg/kubelet/nodeshutdown/systemd).
		paths = append(paths, "/etc/systemd/logind.conf.d/99-kubelet.conf")
	}
	// Of a link both go, the folder that it names first.
	var failures []error
	for _, path := range paths {
		if target := resolved(path); target != path {
			failures = append(failures, remove(target))
		}
		failures = append(failures, remove(path))
	}
	removeShared()
	return errors.Join(failures...)
}

// removeShared removes the folders that the parts of every node make at the same places, once they are empty: another
// node on this machine may still use them.
func removeShared() {
	// The kubelet's socket for device plugins (k8s.io/kubelet/pkg/apis/deviceplugin/v1beta1) stays when it is killed.
	const devices = "/var/lib/kubelet/device-plugins"
	if conn, err := net.Dial("unix", devices+"/kubelet.sock"); err == nil {
		conn.Close()
	} else if errors.Is(err, unix.ECONNREFUSED) {
		_ = os.Remove(devices + "/kubelet.sock")
	}
	for _, dir := range []string{devices, filepath.Dir(devices), "/var/lib/cni/results", "/var/lib/cni", "/var/log/containers"} {
		_ = unix.Rmdir(dir) // fails where there is something else in it
	}
}

func remove(path string) error {
	// What is still mounted may be somebody's volume: nothing below it may be deleted.
	if mounts, err := mountinfo.GetMounts(below(path)); err != nil || len(mounts) > 0 {
		return errors.Join(err, fmt.Errorf("%s was left alone, because it still holds mounted file systems", path))
	}
	// A data dir that is a disk of its own stays as its empty mount point.
	if err := os.RemoveAll(path); err != nil && !errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("remove %s: %w", path, err)
	}
	return nil
}
