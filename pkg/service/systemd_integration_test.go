//go:build integration

package service

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"polymesh.dev/polymesh/pkg/layout"
	"polymesh.dev/polymesh/pkg/progress"
)

// boot becomes a systemd that can change nothing on the machine. Its cgroups lie in one of its own, which is all that it sees of
// them; of other hierarchies, the kernel's settings, the machine's ID and /run it sees copies or can only read. Folders of the
// root lie where systemd has its units, and where the unit has its program; of Debian's own units none is there.
const boot = `
for cgroups in /sys/fs/cgroup /sys/fs/cgroup/unified none; do
	[ "$(stat -f -c %T $cgroups 2>/dev/null)" != cgroup2fs ] || break
done
mkdir $cgroups/$CGROUP
echo $$ >$cgroups/$CGROUP/cgroup.procs
exec unshare --cgroup sh -ec "$BOOT"`

const bootInside = `
mount --make-rprivate /
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t tmpfs run /run
mount -t proc proc /proc
mount --bind /proc/sys /proc/sys
mount -o remount,bind,ro /proc/sys
mount --bind "$ROOT/machine-id" /etc/machine-id
mount --bind "$ROOT/etc/systemd/system" /etc/systemd/system
mount --bind "$ROOT/usr/local/bin" /usr/local/bin
mount --bind "$ROOT/stock" /lib/systemd/system
mount --bind "$ROOT/empty" /lib/systemd/system-generators
exec /lib/systemd/systemd --system --unit=multi-user.target --log-target=console --show-status=0`

// server is what the service runs: ready at once, or not at all if its settings require that.
const server = `#!/bin/sh
case $POLYMESH_NODE_NAME in
bad) echo "polymesh: a bad name" >&2; exit 1;;
slow) exec sleep infinity;;
esac
systemd-notify --ready
exec sleep infinity
`

// booted is a machine that a systemd of its own runs.
func booted(t *testing.T) *Machine {
	t.Helper()
	if os.Getenv("POLYMESH_TEST_SYSTEMD") == "" {
		t.Skip("it boots a systemd in namespaces of its own, on the machine's cgroups: `make test-all` runs it")
	}
	m := machine(t)
	for _, program := range []string{"/lib/systemd/systemd", "systemctl", "systemd-notify", "nsenter", "unshare"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skip(err)
		}
	}
	for _, dir := range []string{"etc/systemd/system", "usr/local/bin", "stock", "empty", "run/systemd/system"} {
		if err := os.MkdirAll(filepath.Join(m.Root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, unit := range []string{"sysinit.target", "basic.target", "multi-user.target", "network-online.target", "shutdown.target"} {
		write(t, "[Unit]\nDescription="+unit+"\nDefaultDependencies=no\n", 0o644, m.Root, "stock", unit)
	}
	write(t, "0123456789abcdef0123456789abcdef\n", 0o444, m.Root, "machine-id")
	if _, err := os.Stat("/etc/machine-id"); err != nil {
		t.Skip(err)
	}
	var out bytes.Buffer
	cmd := exec.Command("unshare", "--pid", "--mount", "--ipc", "--uts", "--net", "--fork", "sh", "-ec", boot)
	cgroup := "polymesh-service-test-" + strconv.Itoa(os.Getpid())
	cmd.Env = append(os.Environ(), "ROOT="+m.Root, "container=test", "CGROUP="+cgroup, "BOOT="+bootInside)
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	parent, systemd := strconv.Itoa(cmd.Process.Pid), 0
	t.Cleanup(func() {
		// With the first process of its namespace all others end.
		if systemd != 0 {
			_ = syscall.Kill(systemd, syscall.SIGKILL)
		} else {
			_ = cmd.Process.Kill()
		}
		_ = cmd.Wait()
		removeCgroups(t, cgroup)
		if t.Failed() {
			t.Logf("systemd says: %s", out.String())
		}
	})
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(100 * time.Millisecond) {
		child, _ := os.ReadFile(filepath.Join("/proc", parent, "task", parent, "children"))
		if pid := strings.TrimSpace(string(child)); pid != "" {
			systemd, _ = strconv.Atoi(pid)
			m.Systemctl = []string{"nsenter", "--target", pid, "--mount", "--pid", "--ipc", "--uts", "--cgroup", "--net", "systemctl"}
			state, _ := m.systemctl(t.Context(), "is-system-running")
			if state = strings.TrimSpace(state); state == "running" || state == "degraded" {
				return m
			}
		}
		if time.Now().After(deadline) {
			t.Fatalf("systemd does not start: %s", out.String())
		}
	}
}

// removeCgroups removes the cgroups of a systemd that has ended, in every hierarchy, from the innermost out.
func removeCgroups(t *testing.T, name string) {
	dirs, _ := filepath.Glob("/sys/fs/cgroup/*/" + name)
	for _, top := range append(dirs, "/sys/fs/cgroup/"+name) {
		var below []string
		_ = filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				below = append(below, path)
			}
			return nil
		})
		for _, dir := range slices.Backward(below) {
			if err := os.Remove(dir); err != nil {
				t.Error(err)
			}
		}
	}
}

func TestSystemd(t *testing.T) {
	m := booted(t)
	shipped := func(version string) string {
		text, err := os.ReadFile(shipped(t, version))
		if err != nil {
			t.Fatal(err)
		}
		return write(t, server+string(text), 0o755, t.TempDir(), "polymesh")
	}
	named := func(name string) *Settings {
		return &Settings{Role: Server, Args: []string{"--node-label=a=b"}, Environment: []string{"POLYMESH_NODE_NAME=" + name}}
	}
	now := func() state {
		t.Helper()
		s, err := m.state(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	one := shipped("1")

	// Without --now it is enabled, and does not run.
	install(t, m, Options{File: one, Settings: named("good")})
	if s := now(); s.runs() || !m.isEnabled(t.Context()) {
		t.Fatalf("%+v, enabled: %v", s, m.isEnabled(t.Context()))
	}
	p := install(t, m, Options{File: one, Now: true})
	first := now()
	if first.active != "active" || actionOn(p.Changes[len(p.Changes)-1:], layout.Unit) != Start {
		t.Fatalf("%+v: %v", first, p.Changes)
	}
	if p := install(t, m, Options{File: one, Now: true}); p.Changed() || now() != first {
		t.Errorf("a second time: %v", p.Changes)
	}

	// A change without --now leaves the server, also when it is found again; with --now it is restarted, once.
	two := shipped("2")
	for range 2 {
		p = install(t, m, Options{File: two})
		if last := p.Changes[len(p.Changes)-1]; last.Action != Leave || now() != first {
			t.Errorf("%v", p.Changes)
		}
	}
	p = install(t, m, Options{File: two, Now: true})
	second := now()
	if p.Changes[len(p.Changes)-1].Action != Restart || second.active != "active" || second.invocation == first.invocation {
		t.Errorf("%v: %+v, %+v", p.Changes, first, second)
	}
	if p := install(t, m, Options{File: two, Now: true}); p.Changed() || now() != second {
		t.Errorf("a second time: %v", p.Changes)
	}
	// A restart by hand does as well.
	install(t, m, Options{File: two, Settings: named("other")})
	if _, err := m.systemctl(t.Context(), "restart", layout.Unit); err != nil {
		t.Fatal(err)
	}
	if p := install(t, m, Options{File: two, Now: true}); p.Changed() {
		t.Errorf("after a restart by hand: %v", p.Changes)
	}

	// A server that does not start is an error, and the next install mends it.
	_, err := m.Install(t.Context(), Options{File: two, Settings: named("bad"), Now: true}, progress.New(io.Discard))
	if err == nil || !strings.Contains(err.Error(), "the service does not start") {
		t.Errorf("error is %v", err)
	}
	install(t, m, Options{File: two, Settings: named("good"), Now: true})
	if s := now(); s.active != "active" {
		t.Errorf("%+v", s)
	}

	removal := uninstall(t, m)
	if s := now(); s.runs() || removal.Changes[0].Action != Stop {
		t.Errorf("%+v, %v", s, removal.Changes)
	}
	for _, path := range []string{Unit, EnvironmentFile, Program, recordDir, "/etc/systemd/system/multi-user.target.wants/" + layout.Unit} {
		if _, err := os.Lstat(m.path(path)); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is left: %v", path, err)
		}
	}
}
