package reset

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"polymesh.dev/polymesh/pkg/datadir"
	"polymesh.dev/polymesh/pkg/layout"
)

// lockVar makes this binary take the lock of a data dir like a server, in a separate process; bridgeVar makes it
// expect the bridge to be its own.
const (
	lockVar   = "POLYMESH_TEST_LOCK"
	bridgeVar = "POLYMESH_TEST_BRIDGE"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(lockVar); dir != "" {
		lock, err := datadir.Acquire(layout.DataDir(dir))
		if err == nil && os.Getenv(bridgeVar) != "" {
			err = lock.ExpectBridge(true)
		}
		if err != nil {
			panic(err)
		}
		fmt.Println("locked")
		time.Sleep(time.Hour)
	}
	os.Exit(m.Run())
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
}

func mkdir(t *testing.T, elem ...string) string {
	t.Helper()
	dir := filepath.Join(elem...)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestRemoveLeavesMountedVolumes(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	volume := mkdir(t, dir, "kubelet", "pods", "volume")
	theirs := t.TempDir()
	if err := os.WriteFile(filepath.Join(theirs, "precious"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(theirs, volume, "", unix.MS_BIND, ""); err != nil {
		t.Skip("cannot mount here: ", err)
	}
	err := remove(filepath.Join(dir, "kubelet"))
	if err == nil || !strings.Contains(err.Error(), "still contains mounted file systems") || !exists(filepath.Join(theirs, "precious")) {
		t.Errorf("error is %v", err)
	}
	// Through a link to it, too.
	link := filepath.Join(dir, "link")
	if err := os.Symlink("kubelet", link); err != nil {
		t.Fatal(err)
	}
	if err := remove(link); err == nil {
		t.Error("a link to a folder with mounts was removed")
	}
	if err := unix.Unmount(volume, unix.MNT_DETACH); err != nil {
		t.Fatal(err)
	}
	if err := remove(filepath.Join(dir, "kubelet")); err != nil || exists(filepath.Join(dir, "kubelet")) || !exists(filepath.Join(theirs, "precious")) {
		t.Errorf("after unmounting: %v", err)
	}
	if err := remove(filepath.Join(dir, "kubelet")); err != nil {
		t.Errorf("a second time: %v", err)
	}
}

func TestUnmountAndRemoveOfALinkedDataDir(t *testing.T) {
	needRoot(t)
	disk := t.TempDir()
	if err := unix.Mount("disk", disk, "tmpfs", 0, "size=1m"); err != nil {
		t.Skip("cannot mount here: ", err)
	}
	defer func() { _ = unix.Unmount(disk, unix.MNT_DETACH) }()
	dataDir := filepath.Join(t.TempDir(), "polymesh")
	if err := os.Symlink(disk, dataDir); err != nil {
		t.Fatal(err)
	}
	inner := mkdir(t, disk, "agent", "with space", "rootfs")
	for range 2 {
		if err := unix.Mount("inner", inner, "tmpfs", 0, "size=1m"); err != nil {
			t.Fatal(err)
		}
	}
	mkdir(t, inner, "file")
	if _, err := datadir.Claim(layout.DataDir(dataDir)); err == nil {
		t.Fatal("a folder with another's agent/ was claimed")
	}
	p := &Plan{DataDir: layout.DataDir(dataDir), marker: &datadir.Marker{}}
	if err := p.unmount(t.Context()); err != nil {
		t.Fatal(err)
	}
	if exists(filepath.Join(inner, "file")) {
		t.Fatal("it is still mounted")
	}
	if err := errors.Join(p.removeData(t.Context()), p.removeMarker()); err != nil {
		t.Fatal(err)
	}
	entries, err := os.ReadDir(disk)
	if err != nil || len(entries) > 0 || exists(dataDir) {
		t.Errorf("left: %v, %v; the link is there: %v", entries, err, exists(dataDir))
	}
}

// sleeper starts a program at path that lives until the end of the test.
func sleeper(t *testing.T, path string) int {
	t.Helper()
	cmd := exec.Command(path, "3600")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	return cmd.Process.Pid
}

func TestProgramsOfADataDir(t *testing.T) {
	sleep, err := exec.LookPath("sleep")
	if err != nil {
		t.Skip(err)
	}
	text, err := os.ReadFile(sleep)
	if err != nil {
		t.Fatal(err)
	}
	base := t.TempDir()
	copyTo := func(elem ...string) string {
		path := filepath.Join(append([]string{base}, elem...)...)
		mkdir(t, filepath.Dir(path))
		if err := os.WriteFile(path, text, 0o755); err != nil {
			t.Fatal(err)
		}
		return path
	}
	shim := copyTo("disk", "data", "0123", "bin", "containerd-shim-runc-v2")
	own := copyTo("disk", "data", "0123", "bin", "polymesh")
	other := copyTo("disk", "storage", "volume", "program")
	if err := os.Symlink("disk", filepath.Join(base, "polymesh")); err != nil {
		t.Fatal(err)
	}
	want := sleeper(t, filepath.Join(base, "polymesh", "data", "0123", "bin", filepath.Base(shim)))
	sleeper(t, own)
	sleeper(t, other)
	if got := programs(layout.DataDir(resolved(filepath.Join(base, "polymesh")))); !slices.Equal(got, []int{want}) {
		t.Errorf("programs are %v, want %d only", got, want)
	}
}

func TestContainerProcesses(t *testing.T) {
	needRoot(t)
	id := strings.Repeat("0123456789abcdef", 4)
	run := t.TempDir()
	mkdir(t, run, "containerd", "io.containerd.runtime.v2.task", "k8s.io", id)
	mkdir(t, run, "containerd", "io.containerd.runtime.v2.task", "default", "redis")
	ids := containers(run)
	if !slices.Equal(ids, []string{id}) {
		t.Fatalf("containers are %q", ids)
	}
	cgroup := "/sys/fs/cgroup/cri-containerd-" + id + ".scope"
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); err != nil {
		cgroup = "/sys/fs/cgroup/pids/cri-containerd-" + id + ".scope"
	}
	if err := os.Mkdir(cgroup, 0o755); err != nil {
		t.Skip("cannot make a cgroup here: ", err)
	}
	cmd := exec.Command("sleep", "3600")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if !waitFor(context.Background(), time.Minute, func() bool { return unix.Rmdir(cgroup) == nil }) {
			t.Errorf("%s stays", cgroup)
		}
	}()
	if err := os.WriteFile(filepath.Join(cgroup, "cgroup.procs"), []byte(strconv.Itoa(cmd.Process.Pid)), 0o644); err != nil {
		t.Fatal(err)
	}
	if got := containerProcesses(ids); !slices.Equal(got, []int{cmd.Process.Pid}) {
		t.Errorf("processes are %v, want %d", got, cmd.Process.Pid)
	}
	if got := containerProcesses(nil); len(got) > 0 {
		t.Errorf("without containers: %v", got)
	}
}

// A host that runs on the shipped iptables may have none of its own.
func TestToolsOfThePayloadComeFirst(t *testing.T) {
	dir := t.TempDir()
	if got := tool(layout.DataDir(dir), "no-such-program"); got != "" {
		t.Errorf("found %s", got)
	}
	if got := tool(layout.DataDir(dir), "sh"); !filepath.IsAbs(got) {
		t.Errorf("the host's sh is %q", got)
	}
	bin := mkdir(t, dir, "data", "0123", "bin")
	if err := os.WriteFile(filepath.Join(bin, "sh"), nil, 0o755); err != nil {
		t.Fatal(err)
	}
	if got := tool(layout.DataDir(dir), "sh"); got != filepath.Join(bin, "sh") {
		t.Errorf("found %s", got)
	}
}

// A server that is one of several, and cannot leave its cluster because it does not run, keeps its data unless the reset is forced.
func TestAServerOfSeveralLeavesFirst(t *testing.T) {
	needRoot(t)
	dir := layout.DataDir(t.TempDir())
	if _, err := datadir.Claim(dir); err != nil {
		t.Fatal(err)
	}
	identity := filepath.Join(mkdir(t, dir.Etcd()), "identity.json")
	for text, several := range map[string]bool{
		`{"name":"a-01234567","shared":true}`: true, `{"name":"a-01234567"}`: false,
		`{"name":"a-01234567","shared":true,"removed":true}`: false, `damaged`: false,
	} {
		if err := os.WriteFile(identity, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		for _, force := range []bool{false, true} {
			p, err := Look(t.Context(), Options{DataDir: dir, Kubeconfig: filepath.Join(t.TempDir(), "none"), Force: force})
			if err != nil {
				t.Fatal(err)
			}
			if listed := slices.Contains(p.Remove, "this server from its cluster, which has others"); listed != several {
				t.Errorf("%s: %q will be removed", text, p.Remove)
			}
			var out strings.Builder
			err = p.LeaveCluster(t.Context(), &out)
			if refused := err != nil; refused != (several && !force) || several && !strings.Contains(out.String(), "it does not run: start it first") {
				t.Errorf("%s, force %v: %v, %s", text, force, err, out.String())
			}
			if err := p.LeaveCluster(t.Context(), &out); force && err != nil {
				t.Errorf("%s: a second time: %v", text, err)
			}
		}
	}
	if !exists(identity) {
		t.Error("data was removed")
	}
}
