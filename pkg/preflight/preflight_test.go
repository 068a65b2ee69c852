package preflight

import (
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/datadir"
	"polymesh.dev/polymesh/pkg/layout"
)

func wantError(t *testing.T, what string, err error, want string) {
	t.Helper()
	switch {
	case want == "" && err != nil:
		t.Errorf("%s: %v", what, err)
	case want != "" && (err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n")):
		t.Errorf("%s: error is %v, want one line with %q", what, err, want)
	}
}

func TestAtLeast(t *testing.T) {
	for release, want := range map[string]bool{
		"5.13.0": true, "5.13": true, "5.14.0-503.el9.x86_64": true, "6.1.0-18-amd64": true, "10.0": true, "5.100.1": true, "6.12-rc1": true,
		"5.12.19": false, "5.4.0-150-generic": false, "4.18.0-553.el8": false, "3.10.0": false, "5": false, "": false, "linux": false,
	} {
		if got := atLeast(release, 5, 13); got != want {
			t.Errorf("%q: %v", release, got)
		}
	}
}

func TestWritable(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	wantError(t, "a folder", Writable(dir, 0), "")
	wantError(t, "one that can be made", Writable(filepath.Join(dir, "a", "b", "c"), 1), "")
	wantError(t, "a file", Writable(file, 0), file+" is not a folder, so "+file+" cannot be used: remove it or choose another location")
	wantError(t, "below a file", Writable(filepath.Join(file, "a", "b"), 0), file+" is not a folder, so "+filepath.Join(file, "a", "b")+" cannot be used")
	wantError(t, "more than there is", Writable(dir, 1<<62), "MB are needed: free some, or choose another with --data-dir")
	if entries, _ := os.ReadDir(dir); len(entries) != 1 {
		t.Errorf("something was created: %v", entries)
	}
}

// mount mounts a file system on a new folder, or skips the test if that is not permitted.
func mount(t *testing.T, source, kind string, flags uintptr, data string) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	dir := t.TempDir()
	if source == "" {
		source = dir
	}
	if err := unix.Mount(source, dir, kind, flags, data); err != nil {
		t.Skip("cannot mount here: ", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func TestWritableOnReadOnlyMount(t *testing.T) {
	dir := mount(t, "", "", unix.MS_BIND, "")
	if err := unix.Mount("", dir, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	wantError(t, "read-only", Writable(filepath.Join(dir, "data"), 0), dir+" is not writable (read-only file system): mount it writable or choose another location")
}

func TestNoExec(t *testing.T) {
	with := mount(t, "noexec", "tmpfs", unix.MS_NOEXEC, "")
	wantError(t, "noexec", executable(filepath.Join(with, "data")), "is mounted with noexec, so the programs that are unpacked there cannot be run: mount it with exec, or choose another location with --data-dir")
	without := mount(t, "exec", "tmpfs", 0, "")
	wantError(t, "exec", executable(filepath.Join(without, "data")), "")
}

func TestWritableOnFullDisk(t *testing.T) {
	dir := mount(t, "small", "tmpfs", 0, "size=4m")
	wantError(t, "an empty disk", Writable(dir, 3<<20), "")
	if err := os.WriteFile(filepath.Join(dir, "fill"), make([]byte, 4<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	wantError(t, "a full disk", Writable(filepath.Join(dir, "data"), 1<<20), "the disk of "+dir+" has 0 MB free and 1 MB are needed")
}

func TestPortInUse(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	port := l.Addr().(*net.TCPAddr).Port
	for _, address := range []string{"0.0.0.0", "127.0.0.1"} {
		cfg := &config.Server{BindAddress: netip.MustParseAddr(address), HTTPSPort: port}
		wantError(t, address, apiServerPort(cfg), "port "+strconv.Itoa(port)+", on which the API server listens, is in use: stop the program that uses it (`ss -ltnp sport = :"+
			strconv.Itoa(port)+"` shows it), or choose another port with --https-listen-port")
	}
	wantError(t, "an address of another machine", apiServerPort(&config.Server{BindAddress: netip.MustParseAddr("192.0.2.1"), HTTPSPort: port}), "listen on 192.0.2.1:")
}

// inNamespace moves the test to an empty network namespace with an interface lo, or skips it if that is not permitted.
func inNamespace(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("a network namespace needs root")
	}
	runtime.LockOSThread() // not unlocked: the thread ends with the test
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Skip("cannot create a network namespace here: ", err)
	}
	if out, err := exec.Command("ip", "link", "set", "lo", "up").CombinedOutput(); err != nil {
		t.Skip("cannot set an interface up here: ", string(out))
	}
}

// Each port that a node needs and another program has is one result, with its name. They are the ports of docs/start/requirements.md.
func TestPorts(t *testing.T) {
	inNamespace(t)
	page, err := os.ReadFile("../../docs/start/requirements.md")
	if err != nil {
		t.Fatal(err)
	}
	_, row, _ := strings.Cut(string(page), "\n| ports | ")
	row, _, _ = strings.Cut(row, "\n")
	documented := map[string]bool{}
	for _, number := range regexp.MustCompile(`\b[0-9]{4,5}\b`).FindAllString(row, -1) {
		documented[number] = number != "8472" // UDP, which is part of the pod network's check
	}
	server := func(change func(*config.Server)) []Result {
		cfg := &config.Server{BindAddress: netip.IPv4Unspecified(), HTTPSPort: layout.APIServerPort}
		cfg.DataDir, cfg.Datastore.Kind = layout.DataDir(t.TempDir()), config.SQLite
		change(cfg)
		return Server(cfg, 0)
	}
	node := []string{"10250", "10248", "10256", "10264", "10265"}
	several := append([]string{"6443", "6444", "10257", "10259"}, node...)
	checked := map[string]bool{}
	for name, c := range map[string]struct {
		check func() []Result
		want  []string
	}{
		"SQLite":          {func() []Result { return server(func(*config.Server) {}) }, append([]string{"6443"}, node...)},
		"etcd":            {func() []Result { return server(func(s *config.Server) { s.ClusterInit = true }) }, append([]string{"2379", "2380", "2382"}, several...)},
		"etcd of others":  {func() []Result { return server(func(s *config.Server) { s.Server = "https://192.0.2.1:6443" }) }, append([]string{"2379", "2380", "2382"}, several...)},
		"PostgreSQL":      {func() []Result { return server(func(s *config.Server) { s.Datastore.Kind = config.PostgreSQL }) }, several},
		"an image policy": {func() []Result { return server(func(s *config.Server) { s.ImagePolicyKeys = [][]byte{{}} }) }, append([]string{"6443", "10263"}, node...)},
		"an agent": {func() []Result {
			return Agent(&config.Agent{Node: config.Node{DataDir: layout.DataDir(t.TempDir())}}, 0)
		}, append([]string{"6444"}, node...)},
	} {
		taken := func() (names []string) {
			for _, r := range c.check() {
				if number, ok := strings.CutPrefix(r.Name, "port "); ok && r.Err != nil {
					wantError(t, r.Name, r.Err, "port "+number+", on which ")
					names = append(names, number)
				}
			}
			slices.Sort(names)
			return names
		}
		if got := taken(); len(got) > 0 {
			t.Errorf("%s: nothing listens, and %q are in use", name, got)
		}
		var others []net.Listener
		for number, tcp := range documented {
			if !tcp {
				continue
			}
			l, err := net.Listen("tcp4", "127.0.0.1:"+number)
			if err != nil {
				t.Fatal(err)
			}
			others = append(others, l)
		}
		slices.Sort(c.want)
		if got := taken(); !slices.Equal(got, c.want) {
			t.Errorf("%s: of the ports of the page %q are in use, want %q", name, got, c.want)
		}
		for _, l := range others {
			l.Close()
		}
		for _, number := range c.want {
			checked[number] = true
		}
	}
	for number, tcp := range documented {
		if tcp && !checked[number] {
			t.Errorf("the page has port %s, which is not checked", number)
		}
	}
}

func TestNodeIP(t *testing.T) {
	wantError(t, "an address of this machine", nodeIP(netip.MustParseAddr("127.0.0.1")), "")
	wantError(t, "another's", nodeIP(netip.MustParseAddr("192.0.2.1")), "--node-ip 192.0.2.1 is not an address of this machine (`ip address` lists them)")
	if ip, err := NodeIP(); err == nil && (!ip.Is4() || ip.IsLoopback()) {
		t.Errorf("chosen was %s", ip)
	}
}

func TestRunningServerIsSeen(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("the run directory lies below /run")
	}
	dataDir := layout.DataDir(t.TempDir())
	wantError(t, "a data dir without a server", notRunning(dataDir), "")
	lock, err := datadir.Acquire(dataDir)
	if err != nil {
		t.Skip("cannot create a run directory here: ", err)
	}
	defer os.RemoveAll(dataDir.Run())
	wantError(t, "a running server", notRunning(dataDir), "a node is already running on "+string(dataDir)+": see `polymesh status`, or choose another --data-dir")
	lock.Release()
	wantError(t, "one that has ended", notRunning(dataDir), "")
}

// A user's folder is not used as a data dir, because a reset would remove it.
func TestOwnDataDir(t *testing.T) {
	dataDir := layout.DataDir(t.TempDir())
	wantError(t, "an empty folder", ownDataDir(dataDir), "")
	if err := os.Mkdir(dataDir.Server(), 0o755); err != nil {
		t.Fatal(err)
	}
	wantError(t, "a project's folder", ownDataDir(dataDir), string(dataDir)+" is no data dir of Polymesh: it has no polymesh.json, and no authority in "+
		dataDir.Server("tls", "server-ca.crt")+": choose an empty folder with --data-dir")
}

func TestHostName(t *testing.T) {
	wantError(t, "a name that was given", hostName("a"), "")
	name, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	if config.ValidNodeName(strings.ToLower(name)) {
		wantError(t, "this host's", hostName(""), "")
	} else {
		wantError(t, "this host's", hostName(""), "set one with --node-name")
	}
}

func TestPodNetwork(t *testing.T) {
	socket, err := net.ListenPacket("udp4", "0.0.0.0:0")
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	port := socket.LocalAddr().(*net.UDPAddr).Port
	if _, err := os.Stat("/sys/module/vxlan"); err == nil {
		wantError(t, "a port in use", PodNetwork(config.VXLAN, port, ""), "UDP port "+strconv.Itoa(port)+", which carries packets to other nodes' pods, is in use: stop the program")
	}
	wantError(t, "host-gw", PodNetwork(config.HostGW, port, "lo"), "")
	wantError(t, "an interface that is not there", PodNetwork(config.HostGW, port, "nosuch0"), "--flannel-iface nosuch0: this machine has no such network interface")
	const sockets = `   sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode ref pointer drops
 1082: 00000000:2118 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 8795866 2 0000000000000000 0
 1090: 0100007F:0035 00000000:0000 07 00000000:00000000 00:00000000 00000000   101        0 21118 2 0000000000000000 0
`
	for port, want := range map[int]string{8472: "8795866", 53: "21118", 21118: ""} {
		if got := boundUDP(sockets, port); got != want {
			t.Errorf("port %d: socket %q, want %q", port, got, want)
		}
	}
}

// A server that starts again meets its own VXLAN device, whose socket is no program's.
func TestPodNetworkOfARunningDevice(t *testing.T) {
	inNamespace(t)
	for _, args := range []string{"link add flannel.1 type vxlan id 1 dev lo dstport 8472", "link set flannel.1 up"} {
		if out, err := exec.Command("ip", strings.Fields(args)...).CombinedOutput(); err != nil {
			t.Skip("cannot create a VXLAN device here: ", string(out))
		}
	}
	sockets, err := os.ReadFile("/proc/thread-self/net/udp")
	if err != nil {
		t.Fatal(err)
	}
	if inode := boundUDP(string(sockets), 8472); inode == "" || heldByProcess(inode) {
		t.Errorf("the device's socket %q counts as a program's, in\n%s", inode, sockets)
	}
}

func TestRootIsNeeded(t *testing.T) {
	want := ""
	if os.Geteuid() != 0 {
		want = "run it with sudo"
	}
	wantError(t, "this user", root(), want)
}

func TestResolvConf(t *testing.T) {
	file := filepath.Join(t.TempDir(), "resolv.conf")
	wantError(t, "one that is not there", resolvConf(file), "--resolv-conf: open "+file+": no such file or directory")
	if err := os.WriteFile(file, []byte("nameserver 192.0.2.53\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	wantError(t, "one that is there", resolvConf(file), "")
	wantError(t, "none", resolvConf(""), "")
}

// Only a machine that has joined can do without a token.
func TestToken(t *testing.T) {
	cfg := &config.Agent{Node: config.Node{DataDir: layout.DataDir(t.TempDir())}}
	wantError(t, "a new machine", Token(cfg), "a token is missing: give --token-file")
	if err := os.MkdirAll(filepath.Dir(cfg.DataDir.Membership()), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(cfg.DataDir.Membership(), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Token(cfg); err != nil {
		t.Errorf("a member: %v", err)
	}
}
