package reset

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"polymesh.dev/polymesh/pkg/certificate"
	"polymesh.dev/polymesh/pkg/datadir"
	"polymesh.dev/polymesh/pkg/layout"
)

// claimed creates a data dir as a first start does, with certificates.
func claimed(t *testing.T) (dataDir string, marker *datadir.Marker) {
	t.Helper()
	dataDir = filepath.Join(t.TempDir(), "data-dir")
	marker, err := datadir.Claim(layout.DataDir(dataDir))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(layout.DataDir(dataDir).Run()) })
	certificates(t, dataDir)
	return dataDir, marker
}

func certificates(t *testing.T, dataDir string) certificate.Store {
	t.Helper()
	dir := filepath.Join(dataDir, "server", "tls")
	ip := netip.MustParseAddr("192.0.2.1")
	if _, err := certificate.Ensure(certificate.Options{Dir: dir, NodeName: "n", NodeIP: ip, ServiceIP: ip, ClusterDomain: "cluster.local", Now: time.Now()}); err != nil {
		t.Fatal(err)
	}
	return certificate.Store(dir)
}

func write(t *testing.T, text string, elem ...string) string {
	t.Helper()
	path := filepath.Join(elem...)
	mkdir(t, filepath.Dir(path))
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// tree returns every path below a folder.
func tree(t *testing.T, dir string) (paths []string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, _ os.DirEntry, err error) error {
		paths = append(paths, path)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return paths
}

// private moves the test into its own network namespace.
func private(t *testing.T) {
	t.Helper()
	needRoot(t)
	runtime.LockOSThread() // not unlocked: the thread ends with the test
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Skip("cannot create a network namespace here: ", err)
	}
}

func TestFoldersOfOthersStay(t *testing.T) {
	payload := `{"version":"1"}`
	sum := sha256.Sum256([]byte(payload))
	id := hex.EncodeToString(sum[:8])
	for what, files := range map[string][]string{
		"a project with data/":              {"data/letters.txt"},
		"a project with server/":            {"server/main.go"},
		"a project with all four":           {"data/a", "server/b", "agent/c", "storage/d"},
		"a system":                          {"bin/sh", "etc/passwd", "home/me/file"},
		"a payload that is not its hash":    {"data/0123456789abcdef/payload.json", "server/db/state.db"},
		"a payload and a foreign server/":   {"data/" + id + "/payload.json", "server/main.go"},
		"a payload beside foreign data":     {"data/" + id + "/payload.json", "data/letters.txt"},
		"another program's polymesh.json":   {"polymesh.json", "server/main.go"},
		"a folder with an unrelated marker": {"data/polymesh.json", "server/polymesh.json"},
	} {
		dir := t.TempDir()
		for _, f := range files {
			write(t, payload, dir, f)
		}
		before := tree(t, dir)
		_, err := Look(t.Context(), Options{DataDir: layout.DataDir(dir), Kubeconfig: filepath.Join(dir, "none")})
		if err == nil || !strings.Contains(err.Error(), dir+" is no data dir of Polymesh: ") || !strings.Contains(err.Error(), "Nothing was changed") {
			t.Errorf("%s: error is %v", what, err)
		}
		// A server does not use it as a data dir either, because its files would be mixed with these.
		if what != "a system" {
			if _, err := datadir.Claim(layout.DataDir(dir)); err == nil {
				t.Errorf("%s is accepted as a data dir", what)
			}
		}
		if after := tree(t, dir); !slices.Equal(before, after) {
			t.Errorf("%s: %q became %q", what, before, after)
		}
	}
}

func TestDataDirThatDoesNotExist(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "none")
	kubeconfig := write(t, "text", t.TempDir(), "config")
	p, err := Look(t.Context(), Options{DataDir: layout.DataDir(dir), Kubeconfig: kubeconfig})
	if err != nil || len(p.Remove) > 0 {
		t.Fatalf("%+v, %v", p, err)
	}
	var out strings.Builder
	if err := p.Run(t.Context(), &out); err != nil || out.Len() > 0 || !exists(kubeconfig) {
		t.Errorf("%q, %v", out.String(), err)
	}
}

// A data dir of an earlier version has no marker; its payload and authority prove what it is.
func TestDataDirOfAnEarlierVersion(t *testing.T) {
	private(t)
	dir := filepath.Join(t.TempDir(), "old")
	payload := `{"version":"0.9"}`
	sum := sha256.Sum256([]byte(payload))
	write(t, payload, dir, "data", hex.EncodeToString(sum[:8]), "payload.json")
	certificates(t, dir)
	write(t, "", dir, "agent", "containerd", "x")
	// So does a backup of server/ alone, with which a server can be started.
	restored := filepath.Join(t.TempDir(), "restored")
	certificates(t, restored)
	if m, err := datadir.Claim(layout.DataDir(restored)); err != nil || !m.Adopted {
		t.Errorf("a restored backup: %+v, %v", m, err)
	}
	p, err := Look(t.Context(), Options{DataDir: layout.DataDir(dir), Kubeconfig: "/nonexistent"})
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Run(t.Context(), io.Discard); err != nil || exists(dir) {
		t.Errorf("%v, it is there: %v", err, exists(dir))
	}
}

func TestOnlyOwnFilesOfADataDirGo(t *testing.T) {
	private(t)
	dir, _ := claimed(t)
	letters := write(t, "", dir, "letters.txt")
	theirs := write(t, "", t.TempDir(), "precious")
	if err := os.Symlink(filepath.Dir(theirs), filepath.Join(dir, "storage")); err != nil {
		t.Fatal(err)
	}
	p, err := Look(t.Context(), Options{DataDir: layout.DataDir(dir), Kubeconfig: "/nonexistent"})
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Contains(p.Leave, letters+", which was not created by a server") {
		t.Errorf("not listed to stay: %q", p.Leave)
	}
	if !slices.Contains(p.Remove, "the data dir "+dir+": server, storage") {
		t.Errorf("not listed for removal: %q", p.Remove)
	}
	if err := p.Run(t.Context(), io.Discard); err != nil {
		t.Fatal(err)
	}
	if got := tree(t, dir); !slices.Equal(got, []string{dir, letters}) || !exists(theirs) {
		t.Errorf("left: %q; behind the link: %v", got, exists(theirs))
	}
}

// A store that is kept stays with the mark by which the next server, and the next reset, recognize it, and nothing of what was recorded there.
func TestStoreIsKept(t *testing.T) {
	private(t)
	dir, marker := claimed(t)
	format := write(t, "1\n", dir, "observe", "meta", "format")
	if _, err := marker.Take(layout.DataDir(dir), mkdir(t, t.TempDir(), "kubelet")); err != nil {
		t.Fatal(err)
	}
	o := Options{DataDir: layout.DataDir(dir), Kubeconfig: "/nonexistent", KeepObserve: true}
	p, err := Look(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Contains(p.Remove, "the data dir "+dir+": server") || !slices.ContainsFunc(p.Leave, func(line string) bool { return strings.HasSuffix(line, dir+"/observe") }) {
		t.Errorf("goes: %q, stays: %q", p.Remove, p.Leave)
	}
	if err := p.Run(t.Context(), io.Discard); err != nil {
		t.Fatal(err)
	}
	if exists(filepath.Join(dir, "server")) || !exists(format) {
		t.Errorf("left: %q", tree(t, dir))
	}
	kept, err := datadir.Claim(layout.DataDir(dir))
	if err != nil || kept.ID != marker.ID || len(kept.Folders) > 0 {
		t.Errorf("the next server finds %+v: %v", kept, err)
	}
	if p, err = Look(t.Context(), o); err != nil || len(p.Remove) > 0 {
		t.Errorf("again: %q, %v", p.Remove, err)
	}
	// Without the flag, it goes as well.
	o.KeepObserve = false
	if p, err = Look(t.Context(), o); err != nil || !slices.Contains(p.Remove, "the data dir "+dir+": observe") {
		t.Fatalf("without the flag: %q, %v", p.Remove, err)
	}
	if err := p.Run(t.Context(), io.Discard); err != nil || exists(dir) {
		t.Errorf("%v, it is there: %v", err, exists(dir))
	}
}

// A folder of that name in the data dir that no store has created is another program's.
func TestFolderThatIsNoStore(t *testing.T) {
	private(t)
	dir, _ := claimed(t)
	letter := write(t, "", dir, "observe", "letter.txt")
	p, err := Look(t.Context(), Options{DataDir: layout.DataDir(dir), Kubeconfig: "/nonexistent"})
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Run(t.Context(), io.Discard); err != nil || !exists(letter) {
		t.Errorf("%v, it is there: %v", err, exists(letter))
	}
}

// The proof that the rest is ours is kept until there is no rest.
func TestMarkerGoesLast(t *testing.T) {
	private(t)
	dir, _ := claimed(t)
	volume := mkdir(t, dir, "storage", "volume")
	p, err := Look(t.Context(), Options{DataDir: layout.DataDir(dir), Kubeconfig: "/nonexistent"})
	if err != nil {
		t.Fatal(err)
	}
	// An attribute that keeps even root from removing it, like a failing disk.
	if out, err := exec.Command("chattr", "+i", volume).CombinedOutput(); err != nil {
		t.Skipf("chattr: %v: %s", err, out)
	}
	defer func() { _ = exec.Command("chattr", "-i", volume).Run() }()
	if err := p.Run(t.Context(), io.Discard); err == nil || !exists(filepath.Join(dir, datadir.MarkerName)) {
		t.Fatalf("error is %v, the marker is there: %v", err, exists(filepath.Join(dir, datadir.MarkerName)))
	}
	if err := exec.Command("chattr", "-i", volume).Run(); err != nil {
		t.Fatal(err)
	}
	p, err = Look(t.Context(), Options{DataDir: layout.DataDir(dir), Kubeconfig: "/nonexistent"})
	if err == nil {
		err = p.Run(t.Context(), io.Discard)
	}
	if err != nil || exists(dir) {
		t.Errorf("a second reset: %v, it is there: %v", err, exists(dir))
	}
}

func TestKubeconfigs(t *testing.T) {
	needRoot(t)
	other, _ := claimed(t)
	for what, c := range map[string]struct {
		plant func(t *testing.T, path string, own certificate.Store)
		goes  bool
		why   string
	}{
		"its own": {func(t *testing.T, path string, own certificate.Store) {
			if err := own.WritePortableKubeconfig(path, certificate.Admin, "https://127.0.0.1:6443", 0o600); err != nil {
				t.Fatal(err)
			}
		}, true, ""},
		"none": {func(*testing.T, string, certificate.Store) {}, false, ""},
		"a folder": {func(t *testing.T, path string, _ certificate.Store) {
			write(t, "", path, "home", "letters.txt")
		}, false, "not a regular file"},
		"a link to its own": {func(t *testing.T, path string, own certificate.Store) {
			if err := own.WritePortableKubeconfig(path+".real", certificate.Admin, "https://127.0.0.1:6443", 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Symlink(path+".real", path); err != nil {
				t.Fatal(err)
			}
		}, false, "not a regular file"},
		"a pipe": {func(t *testing.T, path string, _ certificate.Store) {
			if err := unix.Mkfifo(path, 0o600); err != nil {
				t.Fatal(err)
			}
		}, false, "not a regular file"},
		"a text": {func(t *testing.T, path string, _ certificate.Store) { write(t, "dear diary", path) }, false, "not a kubeconfig"},
		"another cluster's": {func(t *testing.T, path string, _ certificate.Store) {
			if err := certificate.Store(filepath.Join(other, "server", "tls")).WritePortableKubeconfig(path, certificate.Admin, "https://127.0.0.1:6443", 0o600); err != nil {
				t.Fatal(err)
			}
		}, false, "another cluster's"},
		"a merged one": {func(t *testing.T, path string, own certificate.Store) {
			if err := own.WritePortableKubeconfig(path, certificate.Admin, "https://127.0.0.1:6443", 0o600); err != nil {
				t.Fatal(err)
			}
			text, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			write(t, strings.Replace(string(text), "clusters:\n", "clusters:\n- cluster:\n    server: https://work.example.com\n  name: work\n", 1), path)
		}, false, "it has access to other clusters too"},
	} {
		for _, noted := range []bool{false, true} {
			name := what + ", named by the user"
			if noted {
				name = what + ", where the server wrote one"
			}
			t.Run(name, func(t *testing.T) {
				private(t)
				dir := filepath.Join(t.TempDir(), "data-dir")
				marker, err := datadir.Claim(layout.DataDir(dir))
				if err != nil {
					t.Fatal(err)
				}
				own := certificates(t, dir)
				path := filepath.Join(t.TempDir(), "config")
				c.plant(t, path, own)
				before := tree(t, filepath.Dir(path))
				o := Options{DataDir: layout.DataDir(dir), Kubeconfig: path}
				if noted {
					if err := marker.NoteKubeconfig(layout.DataDir(dir), path); err != nil {
						t.Fatal(err)
					}
					o.Kubeconfig = "/nonexistent"
				}
				p, err := Look(t.Context(), o)
				if err != nil {
					t.Fatal(err)
				}
				if listed := slices.Contains(p.Remove, "the kubeconfig "+path); listed != c.goes {
					t.Errorf("listed for removal: %v", listed)
				}
				if text := strings.Join(p.Leave, "\n"); c.why != "" && !strings.Contains(text, "the kubeconfig "+path+": ") || !strings.Contains(text, c.why) {
					t.Errorf("listed to stay: %q, want %q", text, c.why)
				}
				if err := p.Run(t.Context(), io.Discard); err != nil || exists(dir) {
					t.Errorf("%v, the data dir is there: %v", err, exists(dir))
				}
				if c.goes {
					before = slices.DeleteFunc(before, func(s string) bool { return s == path })
				}
				if after := tree(t, filepath.Dir(path)); !slices.Equal(before, after) {
					t.Errorf("%q became %q", before, after)
				}
			})
		}
	}
}

// like starts this binary as a server of the data dir that holds its lock.
func like(t *testing.T, dataDir string, env ...string) *exec.Cmd {
	t.Helper()
	program := filepath.Join(dataDir, "data", "0123456789abcdef", "bin", "polymesh")
	mkdir(t, filepath.Dir(program))
	if err := os.Link(os.Args[0], program); err != nil {
		self, err := os.ReadFile(os.Args[0])
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(program, self, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return locks(t, program, dataDir, env...)
}

func locks(t *testing.T, program, dataDir string, env ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(program)
	cmd.Env = append(append(os.Environ(), lockVar+"="+dataDir), env...)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		os.RemoveAll(layout.DataDir(dataDir).Run())
	})
	if _, err := io.ReadFull(out, make([]byte, len("locked"))); err != nil {
		t.Fatal(err)
	}
	return cmd
}

func TestStopServerByItsLock(t *testing.T) {
	private(t)
	dir, _ := claimed(t)
	p := &Plan{DataDir: layout.DataDir(dir), marker: &datadir.Marker{}}
	if err := p.stopServer(t.Context()); err != nil {
		t.Errorf("without a server: %v", err)
	}
	server := like(t, dir)
	info, err := os.Stat(filepath.Join(layout.DataDir(dir).Run(), datadir.LockName))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the lock is %v, %v", info.Mode(), err)
	}
	if err := p.stopServer(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := server.Wait(); err == nil || err.Error() != "signal: terminated" {
		t.Errorf("it ended by %v", err)
	}
	// The lock's file still exists, but is not locked.
	if err := p.stopServer(t.Context()); err != nil {
		t.Errorf("after the server: %v", err)
	}
}

// A process that is not a server of the data dir is not ended, whatever the lock contains.
func TestStopServerEndsNoOther(t *testing.T) {
	private(t)
	dir, _ := claimed(t)
	p := &Plan{DataDir: layout.DataDir(dir), marker: &datadir.Marker{}}
	holder := locks(t, os.Args[0], dir) // its program is elsewhere
	if err := p.stopServer(t.Context()); err == nil || !strings.Contains(err.Error(), "is not a server of "+dir) {
		t.Errorf("error is %v", err)
	}
	if holder.ProcessState != nil {
		t.Error("it was ended")
	}
	// The process id of a server that has ended, reused by a later process that runs the right program.
	server := like(t, filepath.Join(t.TempDir(), "other"))
	lock := filepath.Join(layout.DataDir(dir).Run(), datadir.LockName)
	for _, text := range []string{
		fmt.Sprintf(`{"pid":%d,"started":1,"dataDir":%q}`, server.Process.Pid, dir),
		fmt.Sprintln(server.Process.Pid),
		`{"pid":-1}`, `{"pid":1}`, "",
	} {
		if err := os.WriteFile(lock, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := p.stopServer(t.Context()); err == nil {
			t.Errorf("lock %q: no error", text)
		}
	}
	if err := server.Process.Signal(unix.Signal(0)); err != nil {
		t.Errorf("it was ended: %v", err)
	}
}

func bridge(t *testing.T, name, alias string) {
	t.Helper()
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	link := &netlink.Bridge{LinkAttrs: attrs}
	if err := netlink.LinkAdd(link); err != nil {
		t.Skip("cannot create a network interface here: ", err)
	}
	if alias == "" {
		return
	}
	if err := netlink.LinkSetAlias(link, alias); err != nil {
		t.Fatal(err)
	}
}

func has(name string) bool {
	_, err := netlink.LinkByName(name)
	return err == nil
}

func rules(t *testing.T, args ...string) string {
	t.Helper()
	nft, err := exec.LookPath("nft")
	if err != nil {
		t.Skip(err)
	}
	out, err := exec.Command(nft, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("nft %s: %v: %s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

func TestInterfacesOfOthersStay(t *testing.T) {
	for what, c := range map[string]struct {
		alias   string // OWN stands for the data dir's
		run     bool   // the server has run here
		expects bool   // and has seen that there was no bridge
		adopted bool
		goes    bool
	}{
		"its own":                                  {alias: "OWN", goes: true},
		"another data dir's":                       {alias: "polymesh 0123456789abcdef0123456789abcdef", run: true, expects: true, adopted: true},
		"without a mark":                           {},
		"without a mark, after a start":            {run: true},
		"made since the server saw none":           {run: true, expects: true, goes: true},
		"of an earlier version":                    {run: true, adopted: true, goes: true},
		"of an earlier version that ran elsewhere": {adopted: true},
	} {
		t.Run(what, func(t *testing.T) {
			private(t)
			dir, marker := claimed(t)
			marker.Adopted = c.adopted
			if c.run {
				var env []string
				if c.expects {
					env = []string{bridgeVar + "=1"}
				}
				server := like(t, dir, env...)
				_ = server.Process.Kill()
				_ = server.Wait()
			}
			bridge(t, layout.Bridge, strings.Replace(c.alias, "OWN", marker.Alias(), 1))
			bridge(t, "polymesh-mine", "")
			veth := netlink.NewLinkAttrs()
			veth.Name = "veth0"
			if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: veth, PeerName: "veth1"}); err != nil {
				t.Fatal(err)
			}
			end, err := netlink.LinkByName("veth0")
			if err != nil {
				t.Fatal(err)
			}
			cni, err := netlink.LinkByName(layout.Bridge)
			if err != nil {
				t.Fatal(err)
			}
			if err := netlink.LinkSetMaster(end, cni); err != nil {
				t.Fatal(err)
			}
			p := &Plan{DataDir: layout.DataDir(dir), marker: marker}
			if err := p.planNetwork(t.Context()); err != nil {
				t.Fatal(err)
			}
			if listed := slices.Contains(p.Remove, "the network interface "+layout.Bridge); listed != c.goes {
				t.Errorf("listed for removal: %v: %q, %q", listed, p.Remove, p.Leave)
			}
			if err := p.removeInterfaces(t.Context()); err != nil {
				t.Fatal(err)
			}
			if gone := !has(layout.Bridge); gone != c.goes || gone == has("veth0") {
				t.Errorf("the bridge is gone: %v, the pod's end: %v", gone, !has("veth0"))
			}
			if !has("polymesh-mine") {
				t.Error("an interface that only has a similar name is gone")
			}
		})
	}
}

// Two servers in one network namespace: what only one of them can have created is removed with it, what both use stays.
func TestRulesOfARunningServerStay(t *testing.T) {
	private(t)
	first, one := claimed(t)
	second, two := claimed(t)
	server := like(t, first)
	like(t, second)
	bridge(t, layout.Bridge, one.Alias())
	bridge(t, layout.PoolLink, two.Alias())
	rules(t, "add table ip kube-proxy; add table inet cni_plugins_masquerade; add table ip mine")
	p := &Plan{DataDir: layout.DataDir(second), marker: two}
	if err := p.planNetwork(t.Context()); err != nil {
		t.Fatal(err)
	}
	if !slices.Contains(p.Leave, "the packet filter table ip kube-proxy, which the server of "+first+" uses") || !slices.Contains(p.Leave, "the network interface cni0, which is not marked as this data dir's") {
		t.Errorf("listed to stay: %q", p.Leave)
	}
	for _, step := range []func() error{func() error { return p.removeInterfaces(t.Context()) }, func() error { return p.removeRules(t.Context()) }} {
		if err := step(); err != nil {
			t.Fatal(err)
		}
	}
	if left := rules(t, "list", "tables"); !strings.Contains(left, "kube-proxy") || !strings.Contains(left, "masquerade") || !has(layout.Bridge) || has(layout.PoolLink) {
		t.Errorf("left: %s, bridge %v, load balancer %v", left, has(layout.Bridge), has(layout.PoolLink))
	}
	// A server that was killed leaves its pods running; they need the rules too.
	_ = server.Process.Kill()
	_ = server.Wait()
	pods := mkdir(t, layout.DataDir(first).Run(), "containerd", "io.containerd.runtime.v2.task", "k8s.io", strings.Repeat("0", 64))
	if others, err := datadir.Others(layout.DataDir(second)); err != nil || !slices.Equal(others, []string{first}) {
		t.Errorf("others with pods: %q, %v", others, err)
	}
	if err := os.Remove(pods); err != nil {
		t.Fatal(err)
	}
	// The only one again.
	p = &Plan{DataDir: layout.DataDir(second), marker: two}
	if err := p.planNetwork(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := p.removeRules(t.Context()); err != nil {
		t.Fatal(err)
	}
	if left := strings.TrimSpace(rules(t, "list", "tables")); left != "table ip mine" {
		t.Errorf("left: %s", left)
	}
}

// A server in another network namespace does not affect this one, and vice versa.
func TestAnotherNamespace(t *testing.T) {
	private(t)
	dir, marker := claimed(t)
	server := like(t, dir)
	_ = server.Process.Kill()
	_ = server.Wait()
	private(t) // another one
	rules(t, "add table ip kube-proxy")
	p := &Plan{DataDir: layout.DataDir(dir), marker: marker}
	if err := p.planNetwork(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := p.removeRules(t.Context()); err != nil || !strings.Contains(rules(t, "list", "tables"), "kube-proxy") {
		t.Errorf("%v, tables: %s", err, rules(t, "list", "tables"))
	}
	if !slices.Contains(p.Leave, "the packet filter table ip kube-proxy, because the server has not run in this network namespace") {
		t.Errorf("listed to stay: %q", p.Leave)
	}
	if others, err := datadir.Others(layout.DataDir(filepath.Join(t.TempDir(), "x"))); err != nil || slices.Contains(others, dir) {
		t.Errorf("others: %q, %v", others, err)
	}
}

// Everything that Look lists is removed by Run.
func TestPlanNamesWhatGoes(t *testing.T) {
	private(t)
	dir, marker := claimed(t)
	outside := mkdir(t, t.TempDir(), "kubelet")
	if foreign, err := marker.Take(layout.DataDir(dir), outside, "/etc", filepath.Join(dir, "inside")); err != nil || !slices.Equal(foreign, []string{"/etc"}) {
		t.Errorf("folders of others: %q, %v", foreign, err)
	}
	again, err := datadir.Read(layout.DataDir(dir))
	if err != nil || !again.Owns(layout.DataDir(dir), outside) || again.Owns(layout.DataDir(dir), "/etc") || !again.Owns(layout.DataDir(dir), filepath.Join(dir, "inside")) {
		t.Errorf("%+v, %v", again, err)
	}
	run := layout.DataDir(dir).Run()
	mkdir(t, run)
	p, err := Look(t.Context(), Options{DataDir: layout.DataDir(dir), Kubeconfig: "/nonexistent"})
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]bool{"the folder " + run: true, "the data dir " + dir + ": server": true}
	for _, line := range p.Remove {
		delete(want, line)
	}
	if len(want) > 0 {
		t.Errorf("not listed: %q in %q", slices.Collect(maps.Keys(want)), p.Remove)
	}
	if err := p.Run(t.Context(), io.Discard); err != nil || exists(run) || exists(dir) {
		t.Errorf("%v: %v %v", err, exists(run), exists(dir))
	}
}

// The pod network's device goes if it carries the mark, and its routes by their protocol; other programs' stay.
func TestWaysToOtherNodesGo(t *testing.T) {
	for what, alias := range map[string]string{"its own": "OWN", "K3s's": "", "another data dir's": "polymesh 0123456789abcdef0123456789abcdef"} {
		t.Run(what, func(t *testing.T) {
			private(t)
			dir, marker := claimed(t)
			marker.Adopted = true
			server := like(t, dir)
			_ = server.Process.Kill()
			_ = server.Wait()
			bridge(t, layout.FlannelLink, strings.Replace(alias, "OWN", marker.Alias(), 1))
			bridge(t, "eth0", "")
			link, err := netlink.LinkByName("eth0")
			if err != nil {
				t.Fatal(err)
			}
			address, err := netlink.ParseAddr("198.18.0.1/24")
			if err != nil {
				t.Fatal(err)
			}
			if err := netlink.AddrAdd(link, address); err != nil {
				t.Fatal(err)
			}
			if err := netlink.LinkSetUp(link); err != nil {
				t.Fatal(err)
			}
			for cidr, protocol := range map[string]netlink.RouteProtocol{"10.42.1.0/24": layout.RouteProtocol, "10.42.2.0/24": unix.RTPROT_STATIC} {
				_, dst, err := net.ParseCIDR(cidr)
				if err != nil {
					t.Fatal(err)
				}
				if err := netlink.RouteAdd(&netlink.Route{Dst: dst, Gw: net.IPv4(198, 18, 0, 2), LinkIndex: link.Attrs().Index, Protocol: protocol}); err != nil {
					t.Fatal(err)
				}
			}
			p := &Plan{DataDir: layout.DataDir(dir), marker: marker}
			if err := p.planNetwork(t.Context()); err != nil {
				t.Fatal(err)
			}
			ours := alias == "OWN"
			if slices.Contains(p.Remove, "the network interface flannel.1") != ours || !slices.Contains(p.Remove, "the route to 10.42.1.0/24, pods of another node") {
				t.Errorf("to remove: %q, to leave: %q", p.Remove, p.Leave)
			}
			for _, step := range []func(context.Context) error{p.removeInterfaces, p.removeRoutes} {
				if err := step(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			routes, err := netlink.RouteList(link, netlink.FAMILY_V4)
			if err != nil || slices.ContainsFunc(routes, func(r netlink.Route) bool { return r.Protocol == layout.RouteProtocol }) ||
				!slices.ContainsFunc(routes, func(r netlink.Route) bool { return r.Dst.String() == "10.42.2.0/24" }) {
				t.Errorf("the routes are %v, %v", routes, err)
			}
			if has(layout.FlannelLink) == ours {
				t.Errorf("flannel.1 is there: %v", !ours)
			}
		})
	}
}
