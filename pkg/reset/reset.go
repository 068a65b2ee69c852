// Package reset removes everything that a server made on a machine, also one that was killed. It looks for what is there,
// and removes what is proved to be the data dir's: it lies in the dir, which has a marker (pkg/datadir), or it bears the
// marker's id, or the marker or the lock names it. Look says what that is, Run does it; pkg/command asks in between.
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

	"polymesh.dev/polymesh/pkg/datadir"
	"polymesh.dev/polymesh/pkg/layout"
	"polymesh.dev/polymesh/pkg/payload"
	"polymesh.dev/polymesh/pkg/preflight"
)

// Options say what to remove.
type Options struct {
	DataDir    layout.DataDir
	Kubeconfig string
}

const (
	stopWait = 40 * time.Second
	killWait = 10 * time.Second
	poll     = 50 * time.Millisecond
)

// Plan is what a reset will remove, and what it will leave although it looks like a server's.
type Plan struct {
	DataDir layout.DataDir
	// Remove and Leave are lines for the user, who is asked before Run. Remove is empty where there is nothing to do.
	Remove, Leave []string

	kubeconfigs []string // those that are to be removed
	marker      *datadir.Marker
	// network is true where interfaces and rules of this network namespace are this data dir's.
	network bool
	unit    string
}

// Look finds out what belongs to a data dir. It changes nothing. A folder that is no data dir is an error.
func Look(ctx context.Context, o Options) (*Plan, error) {
	dataDir, err := layout.ParseDataDir(string(o.DataDir))
	if err != nil {
		return nil, err
	}
	p := &Plan{DataDir: dataDir}
	if _, err := os.Stat(string(dataDir)); errors.Is(err, fs.ErrNotExist) {
		return p, nil
	}
	p.marker, err = datadir.Read(dataDir)
	if errors.Is(err, fs.ErrNotExist) {
		if isEmpty(string(dataDir)) {
			p.Remove = append(p.Remove, "the empty folder "+string(dataDir))
			p.marker = &datadir.Marker{}
			return p, nil
		}
		// The first start of this version would mark it. Its id is on nothing yet.
		if err = datadir.Earlier(dataDir); err == nil {
			p.marker = &datadir.Marker{Adopted: true, Folders: []string{dataDir.Kubelet(), dataDir.PodLogs()}}
		}
	}
	var foreign *datadir.ForeignError
	if errors.As(err, &foreign) {
		return nil, fmt.Errorf("%w. Nothing was changed: is --data-dir right? If it is, remove the folder by hand", err)
	}
	if err != nil {
		return nil, fmt.Errorf("look at %s: %w", dataDir, err)
	}
	if err := p.lookAtServer(ctx); err != nil {
		return nil, err
	}
	if err := p.lookAtNetwork(ctx); err != nil {
		return nil, err
	}
	for _, dir := range cgroups(dataDir.CgroupRoot()) {
		p.Remove = append(p.Remove, "the cgroup "+dir+" with its processes")
	}
	if mounts, err := mountinfo.GetMounts(below(p.folders()...)); err == nil && len(mounts) > 0 {
		p.Remove = append(p.Remove, fmt.Sprintf("%d mounts below these folders (what they hold stays where it is another disk's)", len(mounts)))
	}
	p.lookAtFiles(o.Kubeconfig)
	return p, nil
}

func isEmpty(dir string) bool {
	entries, err := os.ReadDir(dir)
	return err == nil && len(entries) == 0
}

func (p *Plan) lookAtServer(ctx context.Context) error {
	p.unit = unitOf(ctx, p.DataDir)
	if p.unit != "" {
		p.Remove = append(p.Remove, "the systemd unit "+p.unit+" (stopped, not removed)")
	}
	lock, err := datadir.Look(p.DataDir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if lock.Held && p.unit == "" {
		p.Remove = append(p.Remove, fmt.Sprintf("the running server, process %d", lock.PID))
	}
	if pids := p.processes(); len(pids) > 0 {
		p.Remove = append(p.Remove, fmt.Sprintf("containerd and all pods, %d processes", len(pids)))
	}
	return nil
}

// lookAtNetwork decides whether this network namespace has something of the data dir's. Interfaces say it by their alias.
// kube-proxy's and the CNI plugins' rules cannot: they are the data dir's where its server has run in this namespace, and
// they are left while another server, or its pods, needs them.
func (p *Plan) lookAtNetwork(ctx context.Context) error {
	others, err := datadir.Others(p.DataDir)
	if err != nil {
		return err
	}
	here, err := datadir.Network()
	if err != nil {
		return err
	}
	lock, err := datadir.Look(p.DataDir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		// Never started since the machine was: neither interfaces nor rules outlive that.
	case err != nil:
		return err
	case lock.Network == here || lock.Network == 0 && p.marker.Adopted:
		p.network = len(others) == 0
	}
	links, err := p.links(ctx)
	if err != nil {
		return err
	}
	for _, l := range links {
		p.Remove = append(p.Remove, "the network interface "+l.Attrs().Name)
	}
	all, err := linkList(ctx)
	if err != nil {
		return err
	}
	for _, l := range all {
		if name := l.Attrs().Name; named(name) && !p.owns(l.Attrs()) {
			p.Leave = append(p.Leave, fmt.Sprintf("the network interface %s, which is not marked as this data dir's", name))
		}
	}
	tables, err := ruleTables(ctx, p.DataDir)
	if err != nil {
		return err
	}
	for _, t := range tables {
		line := "the packet filter table " + t.family + " " + t.name
		switch {
		case p.network:
			p.Remove = append(p.Remove, line)
		case len(others) > 0:
			p.Leave = append(p.Leave, fmt.Sprintf("%s, which the server of %s uses", line, strings.Join(others, ", ")))
		default:
			p.Leave = append(p.Leave, line+", because the server has not run in this network namespace")
		}
	}
	if p.network && !preflight.NFTables() {
		p.Remove = append(p.Remove, "the iptables chains KUBE-… and CNI-…")
	}
	return nil
}

func (p *Plan) lookAtFiles(kubeconfig string) {
	ca, _ := os.ReadFile(datadir.Authority(p.DataDir))
	paths := []string{kubeconfig}
	if noted := p.marker.Kubeconfig; noted != "" && noted != kubeconfig {
		paths = append(paths, noted)
	}
	for _, path := range paths {
		ours, why := ownKubeconfig(path, ca)
		switch {
		case ours:
			p.kubeconfigs = append(p.kubeconfigs, path)
			p.Remove = append(p.Remove, "the kubeconfig "+path)
		case why != "":
			p.Leave = append(p.Leave, fmt.Sprintf("the kubeconfig %s: %s", path, why))
		}
	}
	for _, folder := range p.outside() {
		if _, err := os.Lstat(folder); err == nil {
			p.Remove = append(p.Remove, "the folder "+folder)
		}
	}
	for _, folder := range []string{p.DataDir.Kubelet(), p.DataDir.PodLogs()} {
		if !p.marker.Owns(p.DataDir, folder) && !isEmpty(folder) {
			if _, err := os.Lstat(folder); err == nil {
				p.Leave = append(p.Leave, fmt.Sprintf("the folder %s, which held another Kubernetes' files when the server started first", folder))
			}
		}
	}
	own, foreign := p.contents()
	p.Remove = append(p.Remove, fmt.Sprintf("the data dir %s: %s", p.DataDir, strings.Join(own, ", ")))
	for _, name := range foreign {
		p.Leave = append(p.Leave, fmt.Sprintf("%s, which no server makes", p.DataDir.Path(name)))
	}
}

// contents are the names in the data dir, those that a server makes apart from others.
func (p *Plan) contents() (own, foreign []string) {
	entries, _ := os.ReadDir(string(p.DataDir))
	for _, e := range entries {
		switch name := e.Name(); {
		case slices.Contains(datadir.Entries(), name) || strings.HasPrefix(name, "."+datadir.MarkerName+"-"):
			own = append(own, name)
		case name != datadir.MarkerName && name != "lost+found":
			foreign = append(foreign, name)
		}
	}
	return own, foreign
}

// outside are the folders that belong to the data dir and lie elsewhere.
func (p *Plan) outside() []string {
	var folders []string
	// The name has a hash of the data dir's in it, of which there may be another.
	if lock, err := datadir.Look(p.DataDir); err != nil || lock.DataDir == "" || lock.DataDir == string(p.DataDir) {
		folders = append(folders, p.DataDir.Run())
	}
	for _, folder := range []string{p.DataDir.Kubelet(), p.DataDir.PodLogs()} {
		if p.marker.Owns(p.DataDir, folder) && !strings.HasPrefix(folder, string(p.DataDir)+"/") {
			folders = append(folders, folder)
		}
	}
	return folders
}

func (p *Plan) folders() []string { return append([]string{string(p.DataDir)}, p.outside()...) }

// Run removes it all, step by step; a step that fails does not keep the others from being done. What proves that the rest
// is the data dir's goes last, and only when all else has gone.
func (p *Plan) Run(ctx context.Context, out io.Writer) error {
	if len(p.Remove) == 0 {
		return nil
	}
	steps := []struct {
		name string
		do   func(context.Context) error
	}{
		{"server stopped", p.stopServer},
		{"containers stopped", p.stopContainers},
		{"file systems unmounted", p.unmount},
		{"network interfaces removed", p.removeInterfaces},
		{"packet filter rules removed", p.removeRules},
		{"cgroups removed", p.removeCgroups},
		{"data removed", p.removeData},
	}
	var failures []error
	for _, step := range steps {
		if err := step.do(ctx); err != nil {
			failures = append(failures, err)
			fmt.Fprintf(out, "✗ %s: %v\n", step.name, err)
			continue
		}
		fmt.Fprintf(out, "✓ %s\n", step.name)
	}
	if len(failures) == 0 {
		if err := p.removeMarker(); err != nil {
			failures = append(failures, err)
			fmt.Fprintf(out, "✗ %v\n", err)
		}
	}
	if len(failures) > 0 {
		return errors.New("not everything could be removed: see above, then run `polymesh reset` again")
	}
	return nil
}

// unitOf is the systemd unit that runs, or is about to start, the server of a data dir; empty where there is none.
func unitOf(ctx context.Context, dataDir layout.DataDir) string {
	if lock, err := datadir.Look(dataDir); err == nil && lock.Held {
		text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", lock.PID))
		for line := range strings.Lines(string(text)) {
			if unit := filepath.Base(strings.TrimSpace(line)); strings.HasSuffix(unit, ".service") {
				// Not one that only happens to be the parent of a shell.
				main, err := exec.CommandContext(ctx, "systemctl", "show", "--property=MainPID", "--value", "--", unit).Output()
				if err == nil && strings.TrimSpace(string(main)) == strconv.Itoa(lock.PID) {
					return unit
				}
			}
		}
		return ""
	}
	// A unit that waits to be restarted has no process. The exit code is 0 for "active" only.
	if dataDir != layout.DefaultDataDir {
		return ""
	}
	state, _ := exec.CommandContext(ctx, "systemctl", "is-active", layout.Unit).Output()
	if slices.Contains([]string{"activating", "reloading", "refreshing", "deactivating"}, strings.TrimSpace(string(state))) {
		return layout.Unit
	}
	return ""
}

// stopServer ends the server as its service manager would, or else the process that holds its lock.
func (p *Plan) stopServer(ctx context.Context) error {
	if p.unit != "" {
		if out, err := exec.CommandContext(ctx, "systemctl", "stop", p.unit).CombinedOutput(); err != nil {
			return fmt.Errorf("systemctl stop %s: %w: %s", p.unit, err, strings.TrimSpace(string(out)))
		}
	}
	lock, err := datadir.Look(p.DataDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil || !lock.Held {
		return err
	}
	process, err := lock.Open(p.DataDir)
	if err != nil {
		return err
	}
	defer process.Close()
	free := func() bool {
		lock, err := datadir.Look(p.DataDir)
		return err == nil && !lock.Held
	}
	for _, step := range []struct {
		signal syscall.Signal
		wait   time.Duration
	}{{syscall.SIGTERM, stopWait}, {syscall.SIGKILL, killWait}} {
		if err := process.Signal(step.signal); err != nil {
			return err
		}
		if waitFor(ctx, step.wait, free) {
			return nil
		}
	}
	return fmt.Errorf("process %d does not end", process.PID)
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
func (p *Plan) stopContainers(ctx context.Context) error {
	gone := waitFor(ctx, killWait, func() bool {
		pids := p.processes()
		for _, pid := range pids {
			// One that has gone meanwhile needs no signal.
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
		return len(pids) == 0
	})
	if !gone {
		return fmt.Errorf("processes %v do not end", p.processes())
	}
	return nil
}

// processes are those of the node, without the server's own.
func (p *Plan) processes() []int {
	ids := containers(p.DataDir.Run())
	pids := slices.Concat(programs(layout.DataDir(resolved(string(p.DataDir)))), containerProcesses(ids), cgroupProcesses(p.DataDir.CgroupRoot()))
	slices.Sort(pids)
	return slices.Compact(pids)
}

// programs lists the processes whose program lies in the data dir: containerd and the shims.
func programs(dataDir layout.DataDir) []int {
	return processes(func(pid int) bool {
		exe, err := os.Readlink(filepath.Join("/proc", strconv.Itoa(pid), "exe"))
		return err == nil && pid != os.Getpid() && strings.HasPrefix(exe, dataDir.Path("data")+"/") &&
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
func (p *Plan) unmount(context.Context) error {
	mounts, err := mountinfo.GetMounts(below(p.folders()...))
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

// named reports whether an interface has one of the names that a server gives.
func named(name string) bool { return name == layout.Bridge || name == layout.PoolLink }

// owns reports whether an interface is this data dir's: it bears the dir's alias. One without any is of a server that was
// killed before it could mark it, or of an earlier version's.
func (p *Plan) owns(link *netlink.LinkAttrs) bool {
	if !named(link.Name) {
		return false
	}
	if link.Alias != "" {
		return link.Alias == p.marker.Alias()
	}
	lock, err := datadir.Look(p.DataDir)
	return err == nil && p.network && (p.marker.Adopted || lock.Bridge && link.Name == layout.Bridge)
}

func linkList(ctx context.Context) (links []netlink.Link, err error) {
	// The interfaces of pods that have just ended are still going, and a list that changed while it was read is torn.
	waitFor(ctx, killWait, func() bool {
		links, err = netlink.LinkList()
		return !errors.Is(err, netlink.ErrDumpInterrupted)
	})
	if err != nil {
		return nil, fmt.Errorf("list network interfaces: %w", err)
	}
	return links, nil
}

// links are the interfaces to remove: those that the data dir owns, and the pods' ends that are plugged into its bridge.
func (p *Plan) links(ctx context.Context) ([]netlink.Link, error) {
	all, err := linkList(ctx)
	if err != nil {
		return nil, err
	}
	var own []netlink.Link
	bridge := 0
	for _, l := range all {
		if !p.owns(l.Attrs()) {
			continue
		}
		own = append(own, l)
		if l.Attrs().Name == layout.Bridge {
			bridge = l.Attrs().Index
		}
	}
	for _, l := range all {
		if bridge != 0 && l.Attrs().MasterIndex == bridge && l.Type() == "veth" {
			own = append(own, l)
		}
	}
	return own, nil
}

func (p *Plan) removeInterfaces(ctx context.Context) error {
	links, err := p.links(ctx)
	if err != nil {
		return err
	}
	var failures []error
	for _, l := range links {
		if err := netlink.LinkDel(l); err != nil && !errors.Is(err, unix.ENODEV) {
			failures = append(failures, fmt.Errorf("remove interface %s: %w", l.Attrs().Name, err))
		}
	}
	return errors.Join(failures...)
}

// filterTable is one of nftables.
type filterTable struct{ family, name string }

// ruleTables lists the tables of kube-proxy and of the CNI plugins; none where they use iptables.
func ruleTables(ctx context.Context, dataDir layout.DataDir) (tables []filterTable, err error) {
	if !preflight.NFTables() {
		return nil, nil
	}
	nft := tool(dataDir, "nft")
	if nft == "" {
		// Without nft nothing can have made a table: a reset that was cut off had removed them before the program.
		return nil, nil
	}
	out, err := exec.CommandContext(ctx, nft, "list", "tables").Output()
	if err != nil {
		return nil, fmt.Errorf("list packet filter tables: %w", err)
	}
	for line := range strings.Lines(string(out)) {
		f := strings.Fields(line) // table <family> <name>
		if len(f) == 3 && (slices.Contains(layout.Tables(), f[2]) || isEmptyIPTablesTable(ctx, nft, f[1], f[2])) {
			tables = append(tables, filterTable{f[1], f[2]})
		}
	}
	return tables, nil
}

// removeRules deletes the tables; where iptables is used, the chains.
func (p *Plan) removeRules(ctx context.Context) error {
	if !p.network {
		return nil
	}
	if !preflight.NFTables() {
		return removeChains(ctx, p.DataDir)
	}
	tables, err := ruleTables(ctx, p.DataDir)
	if err != nil {
		return err
	}
	var failures []error
	for _, t := range tables {
		if out, err := exec.CommandContext(ctx, tool(p.DataDir, "nft"), "delete", "table", t.family, t.name).CombinedOutput(); err != nil {
			failures = append(failures, fmt.Errorf("delete table %s %s: %w: %s", t.family, t.name, err, strings.TrimSpace(string(out))))
		}
	}
	return errors.Join(failures...)
}

// tool is a program that the payload brings, or else the host's; empty where neither is.
func tool(dataDir layout.DataDir, name string) string {
	if shipped, _ := filepath.Glob(dataDir.Path("data", "*", "bin", name)); len(shipped) > 0 {
		return shipped[0]
	}
	path, err := exec.LookPath(name)
	if err != nil {
		return ""
	}
	return path
}

// isEmptyIPTablesTable reports whether a table is one of iptables' with nothing in it. iptables makes the table that it is asked to
// look at, and kube-proxy and the CNI plugins look for rules that an earlier version has left.
func isEmptyIPTablesTable(ctx context.Context, nft, family, name string) bool {
	if !slices.Contains([]string{"ip", "ip6"}, family) || !slices.Contains([]string{"filter", "mangle", "nat"}, name) {
		return false
	}
	out, err := exec.CommandContext(ctx, nft, "list", "table", family, name).Output()
	return err == nil && strings.Join(strings.Fields(string(out)), " ") == "table "+family+" "+name+" { }"
}

// removeChains restores the iptables rules without those of Kubernetes and CNI, as K3s's killall script does.
func removeChains(ctx context.Context, dataDir layout.DataDir) error {
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

// cgroups lists the node's cgroup in every hierarchy where it exists. Where systemd makes the cgroups, pods are in
// kubepods.slice, which all kubelets of a machine share: that one goes by itself when the last container in it has gone.
func cgroups(name string) []string {
	found, _ := filepath.Glob("/sys/fs/cgroup/*" + name)
	if dir := "/sys/fs/cgroup" + name; exists(dir) {
		found = append(found, dir)
	}
	return found
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
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

func (p *Plan) removeCgroups(ctx context.Context) error {
	var failures []error
	if p.marker.Owns(p.DataDir, p.DataDir.Kubelet()) && p.DataDir == layout.DefaultDataDir {
		removeEmptyCgroups("/sys/fs/cgroup/kubepods.slice")
	}
	for _, dir := range cgroups(p.DataDir.CgroupRoot()) {
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

// removeEmptyCgroups removes, deepest first, the cgroups without processes. The kernel refuses the others.
func removeEmptyCgroups(dir string) {
	var dirs []string
	_ = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			dirs = append(dirs, path)
		}
		return nil
	})
	for _, d := range slices.Backward(dirs) {
		_ = unix.Rmdir(d)
	}
}

func (p *Plan) removeData(context.Context) error {
	var failures []error
	// Looked at again: what the user was asked about may have become another file since.
	ca, _ := os.ReadFile(datadir.Authority(p.DataDir))
	for _, path := range p.kubeconfigs {
		if ours, _ := ownKubeconfig(path, ca); ours {
			if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
				failures = append(failures, fmt.Errorf("remove the kubeconfig: %w", err))
			}
		}
	}
	paths := p.outside()
	if logDir := p.DataDir.PodLogs(); p.marker.Owns(p.DataDir, logDir) {
		logs, _ := filepath.Glob("/var/log/containers/*.log")
		for _, link := range logs {
			if target, err := os.Readlink(link); err == nil && strings.HasPrefix(target, logDir+"/") {
				paths = append(paths, link)
			}
		}
	}
	results, _ := filepath.Glob("/var/lib/cni/results/" + p.DataDir.PodNetwork() + "-*")
	paths = append(paths, results...)
	if p.DataDir == layout.DefaultDataDir && p.marker.Owns(p.DataDir, p.DataDir.Kubelet()) {
		// The kubelet tells systemd's login manager there how long a shutdown may take (pkg/kubelet/nodeshutdown/systemd).
		paths = append(paths, "/etc/systemd/logind.conf.d/99-kubelet.conf")
	}
	for _, path := range paths {
		failures = append(failures, remove(path))
	}
	if mounts, err := mountinfo.GetMounts(below(string(p.DataDir))); err != nil || len(mounts) > 0 {
		// What is still mounted may be a user's volume: nothing there may be deleted.
		failures = append(failures, err, fmt.Errorf("%s was left alone, because it still holds mounted file systems", p.DataDir))
	} else {
		own, _ := p.contents()
		for _, name := range own {
			failures = append(failures, remove(p.DataDir.Path(name)))
		}
	}
	removeShared()
	return errors.Join(failures...)
}

// removeMarker removes the marker and the data dir, once it is empty. A data dir that is a disk of its own stays as its
// empty mount point; of a link to a folder both go.
func (p *Plan) removeMarker() error {
	if err := os.Remove(p.DataDir.Path(datadir.MarkerName)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	target := resolved(string(p.DataDir))
	if err := unix.Rmdir(target); err != nil && !isEmpty(target) || target == string(p.DataDir) {
		return nil
	}
	if info, err := os.Lstat(string(p.DataDir)); err != nil || info.Mode()&fs.ModeSymlink == 0 {
		return nil // a folder above it is the link
	}
	return os.Remove(string(p.DataDir))
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
	// What is still mounted may be someone's volume: nothing below it may be deleted.
	if mounts, err := mountinfo.GetMounts(below(path)); err != nil || len(mounts) > 0 {
		return errors.Join(err, fmt.Errorf("%s was left alone, because it still holds mounted file systems", path))
	}
	// A data dir that is a disk of its own stays as its empty mount point.
	if err := os.RemoveAll(path); err != nil && !errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("remove %s: %w", path, err)
	}
	return nil
}
