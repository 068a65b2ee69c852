// Package reset removes everything that a server, even one that was killed, has created on a machine. It looks for what exists,
// and removes what is proved to be the data dir's: it is inside the dir, which has a marker (pkg/datadir), or it carries the
// marker's id, or the marker or the lock names it. Look lists it, Run removes it; pkg/command asks for confirmation in between.
package reset

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
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

	"polymesh.dev/polymesh/pkg/controlplane/member"
	"polymesh.dev/polymesh/pkg/datadir"
	"polymesh.dev/polymesh/pkg/join"
	"polymesh.dev/polymesh/pkg/layout"
	"polymesh.dev/polymesh/pkg/node/apilb"
	"polymesh.dev/polymesh/pkg/observe"
	"polymesh.dev/polymesh/pkg/payload"
	"polymesh.dev/polymesh/pkg/preflight"
	"polymesh.dev/polymesh/pkg/progress"
)

// Options of a reset.
type Options struct {
	DataDir    layout.DataDir
	Kubeconfig string
	// Force removes a node although it cannot leave its cluster.
	Force bool
	// KeepObserve keeps the store of metrics, logs and traces.
	KeepObserve bool
}

const (
	stopWait = 40 * time.Second
	killWait = 10 * time.Second
	poll     = 50 * time.Millisecond
)

// Plan is what a reset will remove, and what it will leave although it looks like a server's.
type Plan struct {
	DataDir layout.DataDir
	// Remove and Leave are lines for the user, who confirms before Run. Remove is empty if there is nothing to do.
	Remove, Leave []string
	// Agent is set if the data dir is an agent's.
	Agent bool

	kubeconfigs []string // those to be removed
	force       bool
	keepObserve bool
	departure   *member.Departure // of a server of several; nil for another
	marker      *datadir.Marker
	// network is set if interfaces and rules of this network namespace are this data dir's.
	network bool
	unit    string
}

// Look determines what belongs to a data dir. It changes nothing. A folder that is not a data dir is an error.
func Look(ctx context.Context, o Options) (*Plan, error) {
	dataDir, err := layout.ParseDataDir(string(o.DataDir))
	if err != nil {
		return nil, err
	}
	p := &Plan{DataDir: dataDir, force: o.Force, keepObserve: o.KeepObserve}
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
		// The first start of this version would add the marker. Nothing carries its id yet.
		if err = datadir.Earlier(dataDir); err == nil {
			p.marker = &datadir.Marker{Adopted: true, Folders: []string{dataDir.Kubelet(), dataDir.PodLogs()}}
		}
	}
	var foreign *datadir.ForeignError
	if errors.As(err, &foreign) {
		return nil, fmt.Errorf("%w. Nothing was changed: is --data-dir right? If it is, remove the folder by hand", err)
	}
	if err != nil {
		return nil, fmt.Errorf("check %s: %w", dataDir, err)
	}
	if err := p.planServer(ctx); err != nil {
		return nil, err
	}
	if err := p.planNetwork(ctx); err != nil {
		return nil, err
	}
	for _, dir := range cgroups(dataDir.CgroupRoot()) {
		p.Remove = append(p.Remove, "the cgroup "+dir+" with its processes")
	}
	if mounts, err := mountinfo.GetMounts(below(p.folders()...)); err == nil && len(mounts) > 0 {
		p.Remove = append(p.Remove, fmt.Sprintf("the mounts below these folders (what they hold stays where it is another disk's): %d", len(mounts)))
	}
	p.planFiles(o.Kubeconfig)
	return p, nil
}

func isEmpty(dir string) bool {
	entries, err := os.ReadDir(dir)
	return err == nil && len(entries) == 0
}

func (p *Plan) planServer(ctx context.Context) error {
	p.unit = unitOf(ctx, p.DataDir)
	if p.unit != "" {
		p.Remove = append(p.Remove, "the systemd unit "+p.unit+" (stopped, not removed)")
	}
	if p.departure = member.Departing(ctx, p.DataDir); p.departure != nil {
		p.Remove = append(p.Remove, progress.Line(p.departure.String()))
	}
	if node, server, ok := join.Member(p.DataDir); ok {
		p.Agent = true
		p.Remove = append(p.Remove, progress.Line(fmt.Sprintf("the node %s from the cluster of %s", node, server)))
	}
	lock, err := datadir.Look(p.DataDir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if lock.Held && p.unit == "" {
		p.Remove = append(p.Remove, fmt.Sprintf("the running %s, process %d", p.role(), lock.PID))
	}
	store, err := observe.Running(p.DataDir)
	if err != nil {
		p.Leave = append(p.Leave, "the process that uses the store of metrics, logs and traces: "+progress.Line(err.Error()))
	}
	if store != 0 {
		p.Remove = append(p.Remove, fmt.Sprintf("the store of metrics, logs and traces, process %d", store))
	}
	if pids := slices.DeleteFunc(p.processes(), func(pid int) bool { return pid == store }); len(pids) > 0 {
		p.Remove = append(p.Remove, fmt.Sprintf("containerd and all pods (processes: %d)", len(pids)))
	}
	return nil
}

// planNetwork determines whether this network namespace contains something of the data dir's. Interfaces are identified by their alias.
// kube-proxy's and the CNI plugins' rules cannot be marked: they are the data dir's if its server has run in this namespace, and
// they are left while another server, or its pods, needs them.
func (p *Plan) planNetwork(ctx context.Context) error {
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
		// Not started since the last boot: neither interfaces nor rules survive a reboot.
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
	routes, err := p.routes()
	if err != nil {
		return err
	}
	for _, r := range routes {
		p.Remove = append(p.Remove, fmt.Sprintf("the route to %s, pods of another node", r.Dst))
	}
	if p.network && !preflight.NFTables() {
		p.Remove = append(p.Remove, "the iptables chains KUBE-… and CNI-…")
	}
	return nil
}

func (p *Plan) planFiles(kubeconfig string) {
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
				p.Leave = append(p.Leave, fmt.Sprintf("the folder %s, which contained another Kubernetes' files when the server first started", folder))
			}
		}
	}
	own, foreign := p.contents()
	if len(own) > 0 || !p.keeps() {
		p.Remove = append(p.Remove, fmt.Sprintf("the data dir %s: %s", p.DataDir, strings.Join(own, ", ")))
	}
	if p.keeps() {
		p.Leave = append(p.Leave, fmt.Sprintf("what the store of metrics, logs and traces has recorded, in %s", p.DataDir.Observe()))
	}
	for _, name := range foreign {
		p.Leave = append(p.Leave, fmt.Sprintf("%s, which was not created by a server", p.DataDir.Path(name)))
	}
}

// contents returns the names in the data dir: those that a server creates, and others.
func (p *Plan) contents() (own, foreign []string) {
	entries, _ := os.ReadDir(string(p.DataDir))
	for _, e := range entries {
		switch name := e.Name(); {
		case name == "observe" && p.keeps():
		case name == "observe" && !observe.Owns(p.DataDir):
			foreign = append(foreign, name)
		case slices.Contains(datadir.Entries(), name) || strings.HasPrefix(name, "."+datadir.MarkerName+"-"):
			own = append(own, name)
		case name != datadir.MarkerName && name != "lost+found":
			foreign = append(foreign, name)
		}
	}
	return own, foreign
}

// keeps reports whether there is a store that stays.
func (p *Plan) keeps() bool { return p.keepObserve && observe.Owns(p.DataDir) }

// outside returns the folders outside the data dir that belong to it.
func (p *Plan) outside() []string {
	var folders []string
	// The name contains a hash of the data dir, so it is unique.
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

// role is what runs on the data dir, for the user.
func (p *Plan) role() string {
	if p.Agent {
		return "agent"
	}
	return "server"
}

func (p *Plan) folders() []string { return append([]string{string(p.DataDir)}, p.outside()...) }

// Run removes everything, step by step; a failed step does not keep the others from running. The proof that the rest
// is the data dir's is removed last, and only if everything else is gone.
func (p *Plan) Run(ctx context.Context, out io.Writer) error {
	if len(p.Remove) == 0 {
		return nil
	}
	if err := p.LeaveCluster(ctx, out); err != nil {
		return err
	}
	type step struct {
		name string
		do   func(context.Context) error
	}
	steps := []step{
		{p.role() + " stopped", p.stopServer},
		{"store of metrics, logs and traces stopped", func(ctx context.Context) error { return observe.End(ctx, p.DataDir) }},
		{"containers stopped", p.stopContainers},
		{"file systems unmounted", p.unmount},
		{"network interfaces removed", p.removeInterfaces},
		{"routes removed", p.removeRoutes},
		{"packet filter rules removed", p.removeRules},
		{"cgroups removed", p.removeCgroups},
		{"data removed", p.removeData},
	}
	if p.Agent {
		steps = slices.Insert(steps, 1, step{leftStep, func(ctx context.Context) error { return p.leave(ctx, out) }})
	}
	var failures []error
	for _, step := range steps {
		if err := step.do(ctx); err != nil {
			fmt.Fprintf(out, "✗ %s: %s\n", step.name, progress.Line(err.Error()))
			var left *stillMemberError
			if errors.As(err, &left) {
				return errors.New("the node is stopped, and nothing was removed")
			}
			if step.name != leftStep { // with --force, or of a machine that has left
				failures = append(failures, err)
			}
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

// stillMemberError means that an agent could not leave its cluster.
type stillMemberError struct{ error }

// leftStep is the step that --force does not need.
const leftStep = "left the cluster"

// leaveTimeout is how long the servers may take to remove a node.
const leaveTimeout = 15 * time.Second

// leave removes an agent's node from its cluster: after this, its certificate is void. The machine forgets the cluster then, so that a reset that
// is interrupted later does not ask again, with files of which some are gone.
func (p *Plan) leave(ctx context.Context, out io.Writer) error {
	node, server, ok := join.Member(p.DataDir)
	if !ok {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, leaveTimeout)
	defer cancel()
	err := p.leaveBy(ctx, server)
	var gone *join.GoneError
	for _, other := range apilb.Known(p.DataDir.APIServers()) {
		if refusal := new(join.Refusal); err == nil || errors.As(err, &gone) || errors.As(err, &refusal) && refusal.Status < http.StatusInternalServerError {
			break
		}
		err = p.leaveBy(ctx, "https://"+other.String())
	}
	if errors.As(err, &gone) {
		fmt.Fprintf(out, "  node %s: %s\n", progress.Line(node), progress.Line(gone.Error()))
		err = nil
	}
	if err == nil {
		return join.Forget(p.DataDir)
	}
	if p.force {
		return fmt.Errorf("%w: remove the node on a server with `polymesh node remove %s`", err, node)
	}
	return &stillMemberError{fmt.Errorf("%s: %w: run `polymesh reset` again when the server answers, or add --force, and remove the node on a server with `polymesh node remove %s`", server, err, node)}
}

func (p *Plan) leaveBy(ctx context.Context, server string) error {
	ctx, cancel := context.WithTimeout(ctx, leaveTimeout/3)
	defer cancel()
	return join.Leave(ctx, p.DataDir, server)
}

// LeaveCluster removes a server that is one of several from its cluster, which it can only do while it runs. Run does so too: a caller that
// stops the server itself calls this before. After an error nothing was removed.
func (p *Plan) LeaveCluster(ctx context.Context, out io.Writer) error {
	if p.departure == nil {
		return nil
	}
	err := p.departure.Leave(ctx)
	if err == nil {
		p.departure = nil
		fmt.Fprintf(out, "✓ %s\n", leftStep)
		return nil
	}
	fmt.Fprintf(out, "✗ %s: %s\n", leftStep, progress.Line(err.Error()))
	if p.force {
		if p.departure.Node != "" {
			fmt.Fprintf(out, "  remove the node on another server: polymesh node remove %s\n", progress.Line(p.departure.Node))
		}
		p.departure = nil
		return nil
	}
	return errors.New("nothing was removed: `polymesh reset --force` removes the data nevertheless, and the node stays in the cluster until `polymesh node remove` on another server")
}

// unitOf returns the systemd unit that runs, or is about to start, the server of a data dir; empty if there is none.
func unitOf(ctx context.Context, dataDir layout.DataDir) string {
	if lock, err := datadir.Look(dataDir); err == nil && lock.Held {
		text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", lock.PID))
		for line := range strings.Lines(string(text)) {
			if unit := filepath.Base(strings.TrimSpace(line)); strings.HasSuffix(unit, ".service") {
				// Ignore a unit that only contains a shell from which the server was started.
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

// stopServer stops the server through its service manager, or else the process that holds its lock.
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
			// A process that has exited meanwhile needs no signal.
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
		return len(pids) == 0
	})
	if !gone {
		return fmt.Errorf("processes %v do not end", p.processes())
	}
	return nil
}

// processes returns the processes of the node, except the server's own.
func (p *Plan) processes() []int {
	ids := containers(p.DataDir.Run())
	pids := slices.Concat(programs(layout.DataDir(resolved(string(p.DataDir)))), containerProcesses(ids), cgroupProcesses(p.DataDir.CgroupRoot()))
	slices.Sort(pids)
	return slices.Compact(pids)
}

// programs lists the processes whose program is in the data dir: containerd and the shims.
func programs(dataDir layout.DataDir) []int {
	return processes(func(pid int) bool {
		exe, err := os.Readlink(filepath.Join("/proc", strconv.Itoa(pid), "exe"))
		return err == nil && pid != os.Getpid() && strings.HasPrefix(exe, dataDir.Path("data")+"/") &&
			filepath.Base(exe) != filepath.Base(payload.Program)
	})
}

// containers lists the ids of the containers that containerd runs, from the folders of their shims
// (containerd's core/runtime/v2, bundle).
func containers(runDir string) (ids []string) {
	dirs, _ := filepath.Glob(filepath.Join(runDir, "containerd", "io.containerd.runtime.v2.task", "*", "*"))
	for _, dir := range dirs {
		// The kubelet's containers have 64 hex digits; a short name from `ctr run` could match part of any cgroup's.
		if id := filepath.Base(dir); len(id) == 64 {
			ids = append(ids, id)
		}
	}
	return ids
}

// containerProcesses lists the processes of containers: their cgroups' names contain the container's id. If
// systemd creates the cgroups, they are not below the node's own.
func containerProcesses(ids []string) []int {
	return processes(func(pid int) bool {
		text, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "cgroup"))
		return err == nil && slices.ContainsFunc(ids, func(id string) bool { return strings.Contains(string(text), id) })
	})
}

// resolved returns a path without links, as shown by the kernel in /proc.
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

// unmount unmounts everything below the node's folders, deepest first.
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

// below selects the mounts below the folders, but not on a folder itself.
func below(folders ...string) mountinfo.FilterFunc {
	for i, f := range folders {
		folders[i] = resolved(f) + "/"
	}
	return func(m *mountinfo.Info) (skip, stop bool) {
		return !slices.ContainsFunc(folders, func(f string) bool { return strings.HasPrefix(m.Mountpoint, f) }), false
	}
}

// named reports whether an interface has one of a server's names.
func named(name string) bool {
	return name == layout.Bridge || name == layout.PoolLink || slices.Contains(layout.OverlayLinks(), name)
}

// owns reports whether an interface is this data dir's: it carries the dir's alias. A bridge without an alias is from a server
// that was killed before it could mark it, or from an earlier version. A device of the pod network without one is another program's: ours has it at
// once.
func (p *Plan) owns(link *netlink.LinkAttrs) bool {
	if !named(link.Name) {
		return false
	}
	if link.Alias != "" {
		return link.Alias == p.marker.Alias()
	}
	lock, err := datadir.Look(p.DataDir)
	return err == nil && p.network && !slices.Contains(layout.OverlayLinks(), link.Name) && (p.marker.Adopted || lock.Bridge && link.Name == layout.Bridge)
}

func linkList(ctx context.Context) (links []netlink.Link, err error) {
	// Interfaces of pods that have just ended are still being removed, and a list that changes while it is read is inconsistent.
	waitFor(ctx, killWait, func() bool {
		links, err = netlink.LinkList()
		return !errors.Is(err, netlink.ErrDumpInterrupted)
	})
	if err != nil {
		return nil, fmt.Errorf("list network interfaces: %w", err)
	}
	return links, nil
}

// links returns the interfaces to remove: those that the data dir owns, and the pods' ends that are attached to its bridge.
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

// routes returns the routes of the pod network, which carry its protocol number; none while another server may have made them.
func (p *Plan) routes() ([]netlink.Route, error) {
	if !p.network {
		return nil, nil
	}
	all, err := netlink.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Protocol: layout.RouteProtocol}, netlink.RT_FILTER_PROTOCOL)
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	return slices.DeleteFunc(all, func(r netlink.Route) bool { return r.Dst == nil }), nil
}

func (p *Plan) removeRoutes(context.Context) error {
	routes, err := p.routes()
	if err != nil {
		return err
	}
	var failures []error
	for _, r := range routes {
		if err := netlink.RouteDel(&r); err != nil && !errors.Is(err, unix.ESRCH) {
			failures = append(failures, fmt.Errorf("remove the route to %s: %w", r.Dst, err))
		}
	}
	return errors.Join(failures...)
}

// filterTable is an nftables table.
type filterTable struct{ family, name string }

// ruleTables lists the tables of kube-proxy and of the CNI plugins; none if they use iptables.
func ruleTables(ctx context.Context, dataDir layout.DataDir) (tables []filterTable, err error) {
	if !preflight.NFTables() {
		return nil, nil
	}
	nft := tool(dataDir, "nft")
	if nft == "" {
		// Without nft there are no tables: an interrupted reset has removed them before the program.
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

// removeRules deletes the tables, or the chains if iptables is used.
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

// tool returns a program of the payload, or else of the host; empty if neither has it.
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

// isEmptyIPTablesTable reports whether a table is an empty one of iptables. iptables creates each table that it
// lists, and kube-proxy and the CNI plugins list rules that an earlier version may have left.
func isEmptyIPTablesTable(ctx context.Context, nft, family, name string) bool {
	if !slices.Contains([]string{"ip", "ip6"}, family) || !slices.Contains([]string{"filter", "mangle", "nat"}, name) {
		return false
	}
	out, err := exec.CommandContext(ctx, nft, "list", "table", family, name).Output()
	return err == nil && strings.Join(strings.Fields(string(out)), " ") == "table "+family+" "+name+" { }"
}

// removeChains restores the iptables rules without those of Kubernetes and CNI, like K3s's killall script.
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

// cgroups lists the node's cgroup in every hierarchy where it exists. If systemd creates the cgroups, pods are in
// kubepods.slice, which all kubelets of a machine share: it is removed automatically after its last container.
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
			// The kernel needs a moment to notice that the last process has exited.
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

// removeEmptyCgroups removes the cgroups without processes, deepest first. The kernel refuses the others.
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
	// Checked again: the file may have been replaced since the user confirmed.
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
		// The kubelet's setting for systemd's login manager, the maximum shutdown delay (pkg/kubelet/nodeshutdown/systemd).
		paths = append(paths, "/etc/systemd/logind.conf.d/99-kubelet.conf")
	}
	for _, path := range paths {
		failures = append(failures, remove(path))
	}
	if mounts, err := mountinfo.GetMounts(below(string(p.DataDir))); err != nil || len(mounts) > 0 {
		// A remaining mount may be a user's volume: nothing in it may be deleted.
		failures = append(failures, err, fmt.Errorf("%s was not removed, because it still contains mounted file systems", p.DataDir))
	} else {
		own, _ := p.contents()
		for _, name := range own {
			failures = append(failures, remove(p.DataDir.Path(name)))
		}
	}
	removeShared()
	return errors.Join(failures...)
}

// removeMarker removes the marker and the data dir, once it is empty. A data dir that is a separate disk stays as an
// empty mount point; if it is a link to a folder, both are removed.
func (p *Plan) removeMarker() error {
	if p.keeps() {
		// The next server, and the next reset, recognize the data dir by it.
		return p.marker.Keep(p.DataDir)
	}
	if err := os.Remove(p.DataDir.Path(datadir.MarkerName)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	target := resolved(string(p.DataDir))
	if err := unix.Rmdir(target); err != nil && !isEmpty(target) || target == string(p.DataDir) {
		return nil
	}
	if info, err := os.Lstat(string(p.DataDir)); err != nil || info.Mode()&fs.ModeSymlink == 0 {
		return nil // the link is a parent folder
	}
	return os.Remove(string(p.DataDir))
}

// removeShared removes the folders that all nodes use at the same places, once they are empty: another node on this
// machine may still use them.
func removeShared() {
	// The kubelet's socket for device plugins (k8s.io/kubelet/pkg/apis/deviceplugin/v1beta1) stays when it is killed.
	const devices = "/var/lib/kubelet/device-plugins"
	if conn, err := net.Dial("unix", devices+"/kubelet.sock"); err == nil {
		conn.Close()
	} else if errors.Is(err, unix.ECONNREFUSED) {
		_ = os.Remove(devices + "/kubelet.sock")
	}
	for _, dir := range []string{devices, filepath.Dir(devices), "/var/lib/cni/results", "/var/lib/cni", "/var/log/containers"} {
		_ = unix.Rmdir(dir) // fails unless it is empty
	}
}

func remove(path string) error {
	// A remaining mount may be a user's volume: nothing below it may be deleted.
	if mounts, err := mountinfo.GetMounts(below(path)); err != nil || len(mounts) > 0 {
		return errors.Join(err, fmt.Errorf("%s was not removed, because it still contains mounted file systems", path))
	}
	// A data dir that is a separate disk stays as an empty mount point.
	if err := os.RemoveAll(path); err != nil && !errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("remove %s: %w", path, err)
	}
	return nil
}
