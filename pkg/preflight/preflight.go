// Package preflight checks the machine before a node starts: a list of named checks, each with a one-line error that contains the
// problem and the remedy. The launcher calls it before it unpacks. The only change it makes is to load kernel modules: a module's
// feature is only visible once it is loaded (docs/start/requirements.md documents this).
package preflight

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/datadir"
	"polymesh.dev/polymesh/pkg/layout"
)

// Result is the result of one check.
type Result struct {
	// Name is the check's name, for people and for programs: "kernel".
	Name string
	// Err is the problem, and what to do about it; nil if there is none.
	Err error
}

// Failed returns the first error.
func Failed(results []Result) error {
	for _, r := range results {
		if r.Err != nil {
			return r.Err
		}
	}
	return nil
}

// Server checks that a server with this configuration can run here, in the order in which a user would fix problems. need is the
// disk space in bytes that it needs at least in the data dir.
func Server(cfg *config.Server, need uint64) []Result {
	results := append([]Result{{"role", notAgent(cfg.DataDir)}, {"token", ServerToken(cfg)}}, Node(&cfg.Node, need)...)
	results = append(results, Result{"kubeconfig", Writable(filepath.Dir(cfg.Kubeconfig), 0)})
	results = append(results, serverPorts(cfg)...)
	results = append(results, Result{"pod network", PodNetwork(cfg.FlannelBackend, cfg.FlannelPort, cfg.FlannelIface)})
	if cfg.Datastore.Kind != config.SQLite {
		results = append(results, Result{"datastore's certificates", readable(map[string]string{
			"datastore-cafile": cfg.Datastore.CAFile, "datastore-certfile": cfg.Datastore.CertFile, "datastore-keyfile": cfg.Datastore.KeyFile,
		})})
	}
	return results
}

// serverPorts checks the ports on which a server's own parts listen, besides those of every node.
func serverPorts(cfg *config.Server) []Result {
	var numbers []int
	_, err := os.Stat(cfg.DataDir.Etcd())
	member := cfg.Datastore.Kind == config.SQLite && (err == nil || cfg.ClusterInit || cfg.Server != "")
	if member {
		numbers = append(numbers, layout.EtcdClientPort, layout.EtcdPeerPort, layout.EtcdHTTPPort)
	}
	if member || cfg.Datastore.Kind != config.SQLite { // one of several servers
		numbers = append(numbers, layout.APIBalancerPort, layout.ControllersPort, layout.SchedulerPort)
	}
	if len(cfg.ImagePolicyKeys) > 0 {
		numbers = append(numbers, layout.ImagePolicyPort)
	}
	api := Result{portName(cfg.HTTPSPort), apiServerPort(cfg)}
	return append([]Result{api}, portsFree(func(p layout.Port) bool { return slices.Contains(numbers, p.Number) })...)
}

// Agent is Server for an agent.
func Agent(cfg *config.Agent, need uint64) []Result {
	results := append([]Result{{"role", notServer(cfg.DataDir)}, {"token", Token(cfg)}}, Node(&cfg.Node, need)...)
	return append(results, portsFree(func(p layout.Port) bool { return p.Number == layout.APIBalancerPort })...)
}

// Token checks that a machine that has not joined a cluster has a token.
func Token(cfg *config.Agent) error {
	if cfg.Token.ID != "" {
		return nil
	}
	if _, err := os.Stat(cfg.DataDir.Membership()); err != nil {
		return fmt.Errorf("a token is missing: give --token-file, or set the variable POLYMESH_TOKEN; on a server, `cat %s` prints it", layout.DefaultDataDir.NodeToken())
	}
	return nil
}

// ServerToken checks that a server that has not joined the others has a token.
func ServerToken(cfg *config.Server) error {
	if cfg.Token.ID != "" || cfg.Server == "" {
		return nil
	}
	for _, file := range []string{cfg.DataDir.ServerMembership(), cfg.DataDir.TLS()} {
		if _, err := os.Stat(file); err == nil {
			return nil
		}
	}
	return fmt.Errorf("a token is missing: give --token-file, or set the variable POLYMESH_TOKEN; on a server of the cluster, `cat %s` prints it", layout.DefaultDataDir.ServerToken())
}

// notServer rejects the data dir of a server: the agent would run next to, or instead of, the cluster that is in it.
func notServer(dataDir layout.DataDir) error {
	if _, err := os.Stat(dataDir.TLS()); err == nil {
		return fmt.Errorf("%s is the data dir of a server: start `polymesh server`, choose another --data-dir, or remove that cluster with `polymesh reset`", dataDir)
	}
	return nil
}

// notAgent rejects the data dir of an agent.
func notAgent(dataDir layout.DataDir) error {
	if _, err := os.Stat(dataDir.Membership()); err == nil {
		return fmt.Errorf("%s is the data dir of an agent: start `polymesh agent`, choose another --data-dir, or let this node leave its cluster with `polymesh reset`", dataDir)
	}
	return nil
}

// Node checks what every node needs.
func Node(cfg *config.Node, need uint64) []Result {
	results := []Result{
		{"root", root()},
		{"lock", notRunning(cfg.DataDir)},
		{"data dir", ownDataDir(cfg.DataDir)},
		{"node name", hostName(cfg.NodeName)},
		{"kernel", kernel()},
		{"cgroups", cgroups()},
		{"disk", Writable(string(cfg.DataDir), need)},
		{"mount options", executable(string(cfg.DataDir))},
	}
	results = append(results, portsFree(func(p layout.Port) bool { return !p.Unused && !p.UDP })...)
	return append(results, Result{"node IP", nodeIP(cfg.NodeIP)}, Result{"name servers", resolvConf(cfg.ResolvConf)})
}

func root() error {
	if os.Geteuid() != 0 {
		return errors.New("a node needs root, because it creates containers and network rules: run it with sudo")
	}
	return nil
}

// hostName checks that the host's name is a valid node name if none is given.
func hostName(given string) error {
	if given != "" {
		return nil
	}
	name, err := os.Hostname()
	if err != nil {
		return fmt.Errorf("read the host's name: %w", err)
	}
	if !config.ValidNodeName(strings.ToLower(name)) {
		return fmt.Errorf("the host's name %q is not a valid node name, which may only contain letters, digits, - and .: set one with --node-name", name)
	}
	return nil
}

// resolvConf checks that a configured file can be read.
func resolvConf(file string) error {
	if file == "" {
		return nil
	}
	if _, err := os.ReadFile(file); err != nil {
		return fmt.Errorf("--resolv-conf: %w", err)
	}
	return nil
}

// readable checks that files, by the flag that names them, can be read.
func readable(files map[string]string) error {
	for _, flag := range slices.Sorted(maps.Keys(files)) {
		if files[flag] == "" {
			continue
		}
		if _, err := os.ReadFile(files[flag]); err != nil {
			return fmt.Errorf("--%s: %w", flag, err)
		}
	}
	return nil
}

// notRunning returns an error if a server already runs on the data dir, according to its lock.
func notRunning(dataDir layout.DataDir) error {
	lock, err := datadir.Look(dataDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("check the lock of %s: %w", dataDir, err)
	}
	if lock.Held {
		return fmt.Errorf("a node is already running on %s: see `polymesh status`, or choose another --data-dir", dataDir)
	}
	return nil
}

// ownDataDir rejects a folder in which the server's files would be mixed with others.
func ownDataDir(dataDir layout.DataDir) error {
	err := datadir.Check(dataDir)
	var foreign *datadir.ForeignError
	if errors.As(err, &foreign) {
		return fmt.Errorf("%w: choose an empty folder with --data-dir", err)
	}
	return err
}

// kernel checks the features that containers and pod networking need. It loads the modules that may provide them.
func kernel() error {
	for _, module := range []string{"overlay", "br_netfilter", "nf_conntrack", "veth"} {
		// Only the check below counts; this fails if the feature is built in, or there is no modprobe.
		_ = exec.Command("modprobe", "--quiet", module).Run()
	}
	filesystems, err := os.ReadFile("/proc/filesystems")
	if err != nil {
		return fmt.Errorf("read the kernel's file systems: %w", err)
	}
	if !slices.Contains(strings.Fields(string(filesystems)), "overlay") {
		return errors.New("the kernel has no overlayfs, which container images need: load the module (modprobe overlay) or use a kernel with CONFIG_OVERLAY_FS")
	}
	for path, what := range map[string]string{
		"/proc/sys/net/bridge/bridge-nf-call-iptables": "bridge netfilter (modprobe br_netfilter, CONFIG_BRIDGE_NETFILTER)",
		"/proc/sys/net/netfilter/nf_conntrack_max":     "connection tracking (modprobe nf_conntrack, CONFIG_NF_CONNTRACK)",
		"/proc/self/ns/net":                            "network namespaces (CONFIG_NET_NS)",
		"/proc/self/ns/pid":                            "process namespaces (CONFIG_PID_NS)",
	} {
		if _, err := os.Stat(path); err != nil {
			return fmt.Errorf("the kernel has no %s: %s is missing", what, path)
		}
	}
	return packetFilter()
}

// PodNetwork checks what packets to other nodes' pods need: the backend's kernel feature, its UDP port, and the interface, which is empty for the
// node's. It loads the module that may provide VXLAN. An agent learns the backend and the port when it joins.
func PodNetwork(backend config.FlannelBackend, port int, iface string) error {
	if iface != "" {
		if _, err := net.InterfaceByName(iface); err != nil {
			return fmt.Errorf("--flannel-iface %s: this machine has no such network interface (`ip link` lists them)", iface)
		}
	}
	// Both modules have a version or parameters, so their folders exist even if they are built in.
	switch backend {
	case config.VXLAN:
		_ = exec.Command("modprobe", "--quiet", "vxlan").Run()
	case config.WireGuard:
		_ = exec.Command("modprobe", "--quiet", "wireguard").Run()
		_, kernel := os.Stat("/sys/module/wireguard")
		if _, err := os.Stat("/dev/net/tun"); err != nil && kernel != nil {
			return errors.New("the kernel has neither WireGuard nor TUN devices, one of which encrypts packets to other nodes' pods: load a module (modprobe wireguard, or tun; CONFIG_WIREGUARD, CONFIG_TUN)")
		}
	default:
		return nil
	}
	if _, err := os.Stat("/sys/module/vxlan"); err != nil && backend == config.VXLAN {
		return errors.New("the kernel has no VXLAN, which carries packets to other nodes' pods: load the module (modprobe vxlan, CONFIG_VXLAN), or set --flannel-backend host-gw if all nodes are in one subnet")
	}
	sockets, err := os.ReadFile("/proc/thread-self/net/udp")
	if err != nil {
		return fmt.Errorf("list UDP ports: %w", err)
	}
	// The socket of a VXLAN or WireGuard device, our own for example, belongs to no process; VXLAN devices share it.
	if inode := boundUDP(string(sockets), port); inode != "" && heldByProcess(inode) {
		return fmt.Errorf("UDP port %d, which carries packets to other nodes' pods, is in use: stop the program that uses it (`ss -lunp sport = :%d` shows it), or set another --flannel-port on all servers", port, port)
	}
	return nil
}

// boundUDP returns the inode of the socket that uses a UDP port, by /proc/net/udp (proc_net_udp(5)); empty if there is none.
func boundUDP(sockets string, port int) string {
	for line := range strings.Lines(sockets) {
		f := strings.Fields(line)
		if len(f) > 9 && strings.HasSuffix(f[1], fmt.Sprintf(":%04X", port)) {
			return f[9]
		}
	}
	return ""
}

// heldByProcess reports whether a process has a socket open (proc_pid_fd(5)).
func heldByProcess(inode string) bool {
	files, _ := filepath.Glob("/proc/[0-9]*/fd/*")
	return slices.ContainsFunc(files, func(file string) bool {
		target, err := os.Readlink(file)
		return err == nil && target == "socket:["+inode+"]"
	})
}

// packetFilter checks the kernel interface that kube-proxy uses to write its rules. nft and iptables, in its nf_tables flavor, are shipped;
// both use the same interface.
func packetFilter() error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_NETFILTER)
	if err != nil {
		return fmt.Errorf("the kernel has no netfilter netlink (modprobe nf_tables, CONFIG_NF_TABLES): %w", err)
	}
	return unix.Close(fd)
}

// NFTables reports whether kube-proxy's nftables mode works on the running kernel: from 5.13 on
// (https://kubernetes.io/docs/reference/networking/virtual-ips/#proxy-mode-nftables).
func NFTables() bool { return KernelAtLeast(5, 13) }

// KernelAtLeast reports whether the running kernel has this version or a later one.
func KernelAtLeast(major, minor int) bool {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return false
	}
	return atLeast(unix.ByteSliceToString(u.Release[:]), major, minor)
}

func atLeast(release string, major, minor int) bool {
	parts := strings.FieldsFunc(release, func(r rune) bool { return r < '0' || r > '9' })
	if len(parts) < 2 {
		return false
	}
	a, _ := strconv.Atoi(parts[0])
	b, _ := strconv.Atoi(parts[1])
	return a > major || a == major && b >= minor
}

// cgroups checks the controllers that the kubelet requires, in cgroup v1 or v2.
func cgroups() error {
	var have []string
	if text, err := os.ReadFile("/sys/fs/cgroup/cgroup.controllers"); err == nil {
		have = strings.Fields(string(text))
	} else {
		text, err := os.ReadFile("/proc/cgroups")
		if err != nil {
			return fmt.Errorf("the kernel has no cgroups (CONFIG_CGROUPS): %w", err)
		}
		for line := range strings.Lines(string(text)) {
			if f := strings.Fields(line); len(f) == 4 && f[3] == "1" {
				if _, err := os.Stat("/sys/fs/cgroup/" + f[0]); err == nil {
					have = append(have, f[0])
				}
			}
		}
	}
	for _, controller := range []string{"cpu", "cpuset", "memory", "pids"} {
		if !slices.Contains(have, controller) {
			return fmt.Errorf("the cgroup controller %q is not there: enable it in the kernel (for memory: cgroup_enable=memory on its command line) and mount it below /sys/fs/cgroup", controller)
		}
	}
	return nil
}

// Writable checks that a directory can be created or written, and that its disk has need bytes of free space. It changes
// nothing: for a directory that does not exist, the nearest existing parent is checked.
func Writable(dir string, need uint64) error {
	existing, err := nearest(dir)
	if err != nil {
		return err
	}
	if err := unix.Access(existing, unix.W_OK|unix.X_OK); err != nil {
		return fmt.Errorf("%s is not writable (%w): mount it writable or choose another location", existing, err)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(existing, &st); err != nil {
		return fmt.Errorf("check the disk of %s: %w", existing, err)
	}
	if free := st.Bavail * uint64(st.Bsize); free < need {
		return fmt.Errorf("the disk of %s has %d MB free and %d MB are needed: free some, or choose another with --data-dir", existing, free>>20, need>>20)
	}
	return nil
}

// nearest returns the folder itself, or else its nearest existing parent.
func nearest(dir string) (string, error) {
	for existing := dir; ; existing = filepath.Dir(existing) {
		info, err := os.Stat(existing)
		if err == nil {
			if !info.IsDir() {
				return "", fmt.Errorf("%s is not a folder, so %s cannot be used: remove it or choose another location", existing, dir)
			}
			return existing, nil
		}
		// A parent is a file, which the next round finds.
		if !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.ENOTDIR) {
			return "", fmt.Errorf("check %s: %w", existing, err)
		}
	}
}

// NoExec reports whether programs in a folder, or its nearest existing parent, cannot be run because the file
// system is mounted with noexec.
func NoExec(dir string) (bool, error) {
	existing, err := nearest(dir)
	if err != nil {
		return false, err
	}
	var st unix.Statfs_t
	if err := unix.Statfs(existing, &st); err != nil {
		return false, fmt.Errorf("check the file system of %s: %w", existing, err)
	}
	// statfs(2): mount flags have the same values as in mount(2).
	return st.Flags&unix.MS_NOEXEC != 0, nil
}

// executable checks that programs in the data dir can be run.
func executable(dataDir string) error {
	noexec, err := NoExec(dataDir)
	if noexec {
		return fmt.Errorf("the file system of %s is mounted with noexec, so the programs that are unpacked there cannot be run: mount it with exec, or choose another location with --data-dir", dataDir)
	}
	return err
}

// apiServerPort checks that the API server can listen.
func apiServerPort(cfg *config.Server) error {
	return free("the API server", netip.AddrPortFrom(cfg.BindAddress, uint16(cfg.HTTPSPort)), ", or choose another port with --https-listen-port")
}

// portName is the name of the check of a TCP port.
func portName(port int) string { return "port " + strconv.Itoa(port) }

// portsFree checks that those of the ports of a node's parts for which which returns true are free, each with a result of its own.
func portsFree(which func(layout.Port) bool) (results []Result) {
	for _, p := range layout.Ports() {
		if !which(p) {
			continue
		}
		address := netip.AddrPortFrom(netip.IPv4Unspecified(), uint16(p.Number))
		if p.Loopback {
			address = layout.Loopback(p.Number)
		}
		results = append(results, Result{portName(p.Number), free(p.What, address, "")})
	}
	return results
}

// free checks that one can listen on a port. hint follows on what to do if not.
func free(what string, address netip.AddrPort, hint string) error {
	l, err := net.Listen("tcp", address.String())
	if errors.Is(err, syscall.EADDRINUSE) {
		port := address.Port()
		return fmt.Errorf("port %d, on which %s listens, is in use: stop the program that uses it (`ss -ltnp sport = :%d` shows it)%s", port, what, port, hint)
	}
	if err != nil {
		return fmt.Errorf("listen on %s for %s: %w", address, what, err)
	}
	return l.Close()
}

func nodeIP(want netip.Addr) error {
	if !want.IsValid() {
		_, err := NodeIP()
		return err
	}
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return fmt.Errorf("list the machine's addresses: %w", err)
	}
	for _, a := range addrs {
		if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr() == want {
			return nil
		}
	}
	return fmt.Errorf("--node-ip %s is not an address of this machine (`ip address` lists them)", want)
}

// NodeIP chooses the node's address: that of the interface with the default route, or else the first global IPv4 address of
// an interface that is up, so that it works on a machine without any route.
func NodeIP() (netip.Addr, error) {
	routes, _ := os.ReadFile("/proc/thread-self/net/route")
	for line := range strings.Lines(string(routes)) {
		if f := strings.Fields(line); len(f) > 7 && f[1] == "00000000" && f[7] == "00000000" {
			if iface, err := net.InterfaceByName(f[0]); err == nil {
				if a, ok := globalIPv4(iface); ok {
					return a, nil
				}
			}
		}
	}
	ifaces, err := net.Interfaces()
	if err != nil {
		return netip.Addr{}, fmt.Errorf("list the machine's interfaces: %w", err)
	}
	for _, iface := range ifaces {
		// Leftovers of the pod network from an earlier run must not become the node's address.
		if slices.ContainsFunc(layout.InterfacePrefixes(), func(prefix string) bool { return strings.HasPrefix(iface.Name, prefix) }) {
			continue
		}
		if a, ok := globalIPv4(&iface); ok {
			return a, nil
		}
	}
	return netip.Addr{}, errors.New("no interface that is up has an IPv4 address for the node: configure one, or set --node-ip")
}

func globalIPv4(iface *net.Interface) (netip.Addr, bool) {
	if iface.Flags&net.FlagUp == 0 || iface.Flags&net.FlagLoopback != 0 {
		return netip.Addr{}, false
	}
	addrs, err := iface.Addrs()
	if err != nil {
		return netip.Addr{}, false
	}
	for _, a := range addrs {
		if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr().Is4() && p.Addr().IsGlobalUnicast() {
			return p.Addr(), true
		}
	}
	return netip.Addr{}, false
}
