package datadir

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"polymesh.dev/polymesh/pkg/layout"
)

func write(t *testing.T, text string, elem ...string) {
	t.Helper()
	path := filepath.Join(elem...)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestClaim(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "new", "data")
	if err := Check(layout.DataDir(dir)); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(dir); err == nil {
		t.Error("a check has created it")
	}
	if _, err := Read(layout.DataDir(dir)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("before a claim: %v", err)
	}
	m, err := Claim(layout.DataDir(dir))
	if err != nil {
		t.Fatal(err)
	}
	if m.Adopted || !strings.HasSuffix(m.Alias(), m.ID) {
		t.Errorf("%+v", m)
	}
	info, err := os.Stat(filepath.Join(dir, MarkerName))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
	write(t, "", dir, "server", "anything")
	again, err := Claim(layout.DataDir(dir))
	if err != nil || again.ID != m.ID {
		t.Errorf("a second claim: %+v, %v", again, err)
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 2 {
		t.Errorf("it holds %v", entries)
	}
}

func TestClaimByManyAtOnce(t *testing.T) {
	dir := t.TempDir()
	ids := make([]string, 20)
	var wg sync.WaitGroup
	for i := range ids {
		wg.Go(func() {
			m, err := Claim(layout.DataDir(dir))
			if err != nil {
				t.Error(err)
				return
			}
			ids[i] = m.ID
		})
	}
	wg.Wait()
	for _, id := range ids {
		if id != ids[0] {
			t.Fatalf("ids are %q", ids)
		}
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 1 {
		t.Errorf("left: %v", entries)
	}
}

// Files that users may put there before the first start, according to the documentation, are accepted.
func TestWhatUsersPrepare(t *testing.T) {
	dir := t.TempDir()
	write(t, "", dir, "agent", "images", "app.tar")
	write(t, "", dir, "agent", "etc", "containerd", "certs.d", "docker.io", "hosts.toml")
	write(t, "", dir, "lost+found", "x")
	if err := Check(layout.DataDir(dir)); err != nil {
		t.Error(err)
	}
	write(t, "", dir, "agent", "main.go")
	if err := Check(layout.DataDir(dir)); err == nil {
		t.Error("a project's agent/ is accepted")
	}
}

func TestMarkersThatProveNothing(t *testing.T) {
	for what, plant := range map[string]func(path string) error{
		"empty":     func(path string) error { return os.WriteFile(path, nil, 0o600) },
		"another's": func(path string) error { return os.WriteFile(path, []byte(`{"name":"my project"}`), 0o600) },
		"a bad id":  func(path string) error { return os.WriteFile(path, []byte(`{"id":"../../etc"}`), 0o600) },
		"open to all": func(path string) error {
			return errors.Join(os.WriteFile(path, []byte(`{"id":"0123456789abcdef0123456789abcdef"}`), 0o600), os.Chmod(path, 0o666))
		},
		"a folder": func(path string) error { return os.Mkdir(path, 0o700) },
		"a link":   func(path string) error { return os.Symlink("/etc/hostname", path) },
	} {
		dir := t.TempDir()
		if err := plant(filepath.Join(dir, MarkerName)); err != nil {
			t.Fatal(err)
		}
		if m, err := Read(layout.DataDir(dir)); err == nil || errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: %+v, %v", what, m, err)
		}
		if _, err := Claim(layout.DataDir(dir)); err == nil {
			t.Errorf("%s: it was claimed", what)
		}
	}
}

func TestLock(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("the run directory lies below /run")
	}
	dir := t.TempDir()
	run := layout.DataDir(dir).Run()
	t.Cleanup(func() { os.RemoveAll(run) })
	if _, err := Look(layout.DataDir(dir)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("before: %v", err)
	}
	// An earlier version's lock, longer than the start of the new one.
	write(t, strings.Repeat("9", 400)+"\n", run, LockName)
	if err := os.Chmod(filepath.Join(run, LockName), 0o644); err != nil {
		t.Fatal(err)
	}
	lock, err := Acquire(layout.DataDir(dir))
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(filepath.Join(run, LockName)); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	if _, err := Acquire(layout.DataDir(dir)); err == nil || !strings.Contains(err.Error(), "another server holds "+filepath.Join(run, LockName)) {
		t.Errorf("a second server: %v", err)
	}
	if err := lock.ExpectBridge(true); err != nil {
		t.Fatal(err)
	}
	here, err := Network()
	if err != nil {
		t.Fatal(err)
	}
	s, err := Look(layout.DataDir(dir))
	if err != nil || !s.Held || s.PID != os.Getpid() || s.Started == 0 || s.DataDir != dir || s.Network != here || !s.Bridge {
		t.Errorf("%+v, %v", s, err)
	}
	if err := lock.ExpectBridge(false); err != nil {
		t.Fatal(err)
	}
	lock.Release()
	if s, err := Look(layout.DataDir(dir)); err != nil || s.Held || s.Bridge || s.PID != os.Getpid() {
		t.Errorf("after: %+v, %v", s, err)
	}
	// What an earlier start has seen in this network namespace still holds.
	write(t, strings.Replace(`{"pid":1,"network":N,"bridge":true}`, "N", strconv.FormatUint(here, 10), 1), run, LockName)
	lock, err = Acquire(layout.DataDir(dir))
	if err != nil || !lock.BridgeExpected() {
		t.Errorf("%v, expected: %v", err, lock.BridgeExpected())
	}
	lock.Release()
	write(t, `{"pid":1,"network":1,"bridge":true}`, run, LockName)
	lock, err = Acquire(layout.DataDir(dir))
	if err != nil || lock.BridgeExpected() {
		t.Errorf("%v, expected: %v", err, lock.BridgeExpected())
	}
	lock.Release()
	// An earlier version's contains only the process id.
	write(t, "1234\n", run, LockName)
	if s, err := Look(layout.DataDir(dir)); err != nil || s.PID != 1234 || s.Network != 0 {
		t.Errorf("an earlier version's: %+v, %v", s, err)
	}
}
