package service

import (
	"archive/zip"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"

	"polymesh.dev/polymesh/pkg/payload"
	"polymesh.dev/polymesh/pkg/progress"
)

var update = flag.Bool("update", false, "write the golden files")

// shipped writes a file as the build makes them: something that runs, with a payload behind it.
func shipped(t *testing.T, version string) string {
	t.Helper()
	const script = "#!/bin/sh\n"
	program := []byte("the program of " + version)
	sum := sha256.Sum256(program)
	manifest, err := json.Marshal(payload.Manifest{Version: version, Files: map[string]string{payload.Program: "sha256:" + hex.EncodeToString(sum[:])}})
	if err != nil {
		t.Fatal(err)
	}
	var zipped bytes.Buffer
	w := zip.NewWriter(&zipped)
	w.SetOffset(int64(len(script)))
	w.RegisterCompressor(zstd.ZipMethodWinZip, zstd.ZipCompressor())
	for name, text := range map[string][]byte{payload.Program: program, "payload.json": manifest} {
		f, err := w.CreateHeader(&zip.FileHeader{Name: name, Method: zstd.ZipMethodWinZip})
		if err == nil {
			_, err = f.Write(text)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return write(t, script+zipped.String(), 0o755, t.TempDir(), "polymesh")
}

func write(t *testing.T, text string, mode fs.FileMode, elem ...string) string {
	t.Helper()
	path := filepath.Join(elem...)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
	return path
}

// machine is a root folder without systemd.
func machine(t *testing.T) *Machine {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("what is installed is root's")
	}
	return &Machine{Root: t.TempDir(), Path: "/usr/local/bin:/usr/bin"}
}

// offline is a root folder on which systemd is said to run, with the real systemctl, which enables and disables units in it.
// It has nothing to ask there how a unit runs: see systemd_integration_test.go.
func offline(t *testing.T) *Machine {
	t.Helper()
	m := machine(t)
	systemctl, err := exec.LookPath("systemctl")
	if err != nil {
		t.Skip("systemctl is not installed")
	}
	write(t, "", 0o644, m.Root, "run/systemd/system/there")
	m.Systemctl = []string{"sh", "-c", `case $1 in
		show) echo ActiveState=inactive; echo SubState=dead; echo InvocationID=; echo MainPID=0;;
		daemon-reload|reset-failed) ;;
		disable) exec "$0" --root="$ROOT" disable polymesh.service;;
		*) exec "$0" --root="$ROOT" "$@";; esac`, systemctl}
	t.Setenv("ROOT", m.Root)
	return m
}

// tree is every path below the root with what lies there, without empty folders.
func tree(t *testing.T, m *Machine) map[string]string {
	t.Helper()
	found := map[string]string{}
	err := filepath.WalkDir(m.Root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		p, err := fingerprintOf(path)
		found[strings.TrimPrefix(path, m.Root)] = string(p)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

func same(a, b map[string]string) bool { return maps.Equal(a, b) }

func install(t *testing.T, m *Machine, o Options) *Plan {
	t.Helper()
	p, err := m.Install(t.Context(), o, progress.New(io.Discard))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func uninstall(t *testing.T, m *Machine) *Removal {
	t.Helper()
	p, err := m.PlanRemoval()
	if err != nil {
		t.Fatal(err)
	}
	steps := progress.New(io.Discard)
	if err := errors.Join(m.Stop(t.Context(), p, steps), m.Remove(t.Context(), p, steps)); err != nil {
		t.Fatal(err)
	}
	return p
}

func actionOn(changes []Change, target string) Action {
	for _, c := range changes {
		if c.Target == target {
			return c.Action
		}
	}
	return ""
}

func TestUnit(t *testing.T) {
	for name, args := range map[string][]string{
		"plain":   nil,
		"hostile": {"--mesh-profile=demo", "--kubelet-arg=feature-gates=A=true,B=false", `--node-label=a=$HOME %h "b" \c`, "--tls-san=ünïcode", "--node-name=a b", "--config=/etc/x;y"},
	} {
		got, err := unitFile(Server, args)
		if err != nil {
			t.Fatal(err)
		}
		golden := filepath.Join("testdata", name+".service")
		if *update {
			write(t, string(got), 0o644, golden)
		}
		if want, err := os.ReadFile(golden); err != nil || string(want) != string(got) {
			t.Errorf("%s (go test -args -update writes it): %v\n%s", golden, err, got)
		}
	}
	for _, bad := range []string{"a\nExecStartPre=/bin/evil", "a\x00", "\x1b[2J", "\xff", "a\u0085b"} {
		if _, err := unitFile(Server, []string{"--node-name=" + bad}); err == nil || !strings.Contains(err.Error(), "control characters") {
			t.Errorf("%q: %v", bad, err)
		}
		if _, err := environmentFile([]string{"POLYMESH_NODE_NAME=" + bad}); err == nil {
			t.Errorf("%q is taken into the environment", bad)
		}
	}
}

// systemd itself reads the unit.
func TestSystemdTakesTheUnit(t *testing.T) {
	analyze, err := exec.LookPath("systemd-analyze")
	if err != nil {
		t.Skip("systemd-analyze is not installed")
	}
	m := machine(t)
	args := []string{"--node-label=a=$HOME %h \"b\" \\c", "--mesh-profile=demo"}
	text, err := unitFile(Server, args)
	if err != nil {
		t.Fatal(err)
	}
	write(t, "#!/bin/sh\n", 0o755, m.path(Program))
	for _, unit := range []string{"sysinit.target", "basic.target", "multi-user.target", "network-online.target", "shutdown.target"} {
		write(t, "[Unit]\n", 0o644, m.path("/etc/systemd/system/"+unit))
	}
	write(t, string(text), 0o644, m.path(Unit))
	out, err := exec.CommandContext(t.Context(), analyze, "verify", "--man=no", "--recursive-errors=yes", "--root="+m.Root, "polymesh.service").CombinedOutput()
	if err != nil || len(bytes.TrimSpace(out)) > 0 {
		t.Errorf("%v: %s\n%s", err, out, text)
	}
}

func TestEnvironmentComesBack(t *testing.T) {
	want := []string{`POLYMESH_A=plain`, `POLYMESH_B=a "b" \c $d ` + "`e` # f", "POLYMESH_C=k=v", "POLYMESH_D="}
	text, err := environmentFile(want)
	if err != nil {
		t.Fatal(err)
	}
	path := write(t, string(text), 0o600, t.TempDir(), "env")
	if got, err := readEnvironment(path); err != nil || !slices.Equal(got, want) {
		t.Errorf("%q, %v", got, err)
	}
	write(t, "POLYMESH_A=b\nrm -rf /\n", 0o600, path)
	if _, err := readEnvironment(path); err == nil || !strings.Contains(err.Error(), "line 1") {
		t.Errorf("error is %v", err)
	}
	if none, err := readEnvironment(path + ".none"); err != nil || none != nil {
		t.Errorf("%q, %v", none, err)
	}
}

func TestInstallAndUninstall(t *testing.T) {
	m := offline(t)
	before := tree(t, m)
	file := shipped(t, "1")
	o := Options{File: file, Settings: &Settings{Role: Server, Args: []string{"--mesh-profile=demo"}, Environment: []string{"POLYMESH_NODE_NAME=secret"}}}
	dry, err := m.Plan(t.Context(), o)
	if err != nil || !same(before, tree(t, m)) {
		t.Fatalf("a plan: %v, %v", err, tree(t, m))
	}
	p := install(t, m, o)
	if !slices.Equal(dry.Changes, p.Changes) || !p.Changed() {
		t.Errorf("done:\n%v, planned:\n%v", p.Changes, dry.Changes)
	}
	for path, mode := range map[string]fs.FileMode{Program: 0o755, Unit: 0o644, EnvironmentFile: 0o600, recordFile: 0o600} {
		if info, err := os.Stat(m.path(path)); err != nil || info.Mode() != mode {
			t.Errorf("%s: %v, %v", path, info, err)
		}
	}
	unit, _ := os.ReadFile(m.path(Unit))
	if strings.Contains(string(unit), "secret") || !strings.Contains(string(unit), "--mesh-profile=demo") {
		t.Errorf("%s", unit)
	}
	after := tree(t, m)
	if after["/etc/systemd/system/multi-user.target.wants/polymesh.service"] == "" || after["/usr/local/bin/kubectl"] != "link:polymesh" {
		t.Errorf("%v", after)
	}
	// Again, with the same, with nothing, and from the installed file itself.
	for _, o := range []Options{o, {File: file}, {File: m.path(Program)}} {
		if p := install(t, m, o); p.Changed() || !same(after, tree(t, m)) {
			t.Errorf("a second time: %v", p.Changes)
		}
	}
	if cfg, ok, err := m.Installed(); err != nil || !ok || cfg.NodeName != "secret" {
		t.Errorf("%+v, %v, %v", cfg, ok, err)
	}
	// Other settings take the place of the old ones, and a newer file keeps them.
	p = install(t, m, Options{File: shipped(t, "2"), Settings: &Settings{Role: Server, Args: []string{"--mesh-profile=minimal"}}})
	if actionOn(p.Changes, Program) != Replace || actionOn(p.Changes, Unit) != Replace || actionOn(p.Changes, EnvironmentFile) != Delete {
		t.Errorf("%v", p.Changes)
	}
	p = install(t, m, Options{File: shipped(t, "3")})
	if actionOn(p.Changes, Program) != Replace || actionOn(p.Changes, Unit) != Unchanged {
		t.Errorf("%v", p.Changes)
	}
	uninstall(t, m)
	if got := tree(t, m); !same(before, got) {
		t.Errorf("left: %v", got)
	}
	if p := uninstall(t, m); !p.Empty() {
		t.Errorf("a second time: %v", p.Changes)
	}
}

func TestRefusedBeforeAnythingIsWritten(t *testing.T) {
	m := offline(t)
	before := tree(t, m)
	file := shipped(t, "1")
	foreign := write(t, "no shipped file", 0o755, t.TempDir(), "polymesh")
	for want, o := range map[string]Options{
		"--mesh-profile":     {File: file, Settings: &Settings{Role: Server, Args: []string{"--mesh-profile=no-such"}}},
		"unknown flag":       {File: file, Settings: &Settings{Role: Server, Args: []string{"--no-such"}}},
		"control characters": {File: file, Settings: &Settings{Role: Server, Args: []string{"--resolv-conf=/a\nb"}}},
		"--cluster-cidr":     {File: file, Settings: &Settings{Role: Server, Environment: []string{"POLYMESH_CLUSTER_CIDR=x"}}},
		"carries no payload": {File: foreign},
	} {
		if _, err := m.Install(t.Context(), o, progress.New(io.Discard)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("want %s, got %v", want, err)
		}
		if got := tree(t, m); !same(before, got) {
			t.Fatalf("%s: %v", want, got)
		}
	}
	if err := os.RemoveAll(m.path("/run/systemd")); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Plan(t.Context(), Options{File: file}); !errors.Is(err, ErrNoSystemd) {
		t.Errorf("without systemd: %v", err)
	}
	if p := install(t, m, Options{File: file, FileOnly: true}); actionOn(p.Changes, Program) != Create || actionOn(p.Changes, Unit) != "" {
		t.Errorf("%v", p.Changes)
	}
	uninstall(t, m)
	if got := tree(t, m); len(got) > 0 {
		t.Errorf("left: %v", got)
	}
}

// What others have put at one of the places stays as it is, and so does the rest.
func TestPlacesOfOthers(t *testing.T) {
	file := shipped(t, "1")
	elsewhere := t.TempDir()
	link := func(path string) func(*testing.T, *Machine) {
		return func(t *testing.T, m *Machine) {
			write(t, "precious", 0o644, elsewhere, "precious")
			if err := errors.Join(os.MkdirAll(filepath.Dir(m.path(path)), 0o755), os.Symlink(filepath.Join(elsewhere, "precious"), m.path(path))); err != nil {
				t.Fatal(err)
			}
		}
	}
	text := func(path string) func(*testing.T, *Machine) {
		return func(t *testing.T, m *Machine) { write(t, "theirs", 0o755, m.path(path)) }
	}
	folder := func(path string) func(*testing.T, *Machine) {
		return func(t *testing.T, m *Machine) { write(t, "theirs", 0o644, m.path(path), "file") }
	}
	for what, plant := range map[string]func(*testing.T, *Machine){
		"another program": text(Program), "a link at the program's": link(Program), "a folder at the program's": folder(Program),
		"another unit": text(Unit), "a link at the unit's": link(Unit), "another environment": text(EnvironmentFile),
		"a record that is none": text(recordFile), "a record that is a link": link(recordFile),
	} {
		t.Run(what, func(t *testing.T) {
			m := offline(t)
			plant(t, m)
			before := tree(t, m)
			_, err := m.Install(t.Context(), Options{File: file, Settings: &Settings{Role: Server}}, progress.New(io.Discard))
			if err == nil {
				t.Error("no error")
			}
			if got := tree(t, m); !same(before, got) {
				t.Errorf("%v: %v became %v", err, before, got)
			}
		})
	}
	m := offline(t)
	text("/usr/local/bin/kubectl")(t, m)
	text("/usr/bin/istioctl")(t, m)
	before := tree(t, m)
	p := install(t, m, Options{File: file})
	if actionOn(p.Changes, "/usr/local/bin/kubectl") != Leave || actionOn(p.Changes, "/usr/local/bin/istioctl") != Leave {
		t.Errorf("%v", p.Changes)
	}
	uninstall(t, m)
	if got := tree(t, m); !same(before, got) {
		t.Errorf("%v became %v", before, got)
	}
}

func TestChangedSince(t *testing.T) {
	m := offline(t)
	file := shipped(t, "1")
	install(t, m, Options{File: file, Settings: &Settings{Role: Server, Args: []string{"--mesh-profile=demo"}}})
	write(t, "[Service]\nExecStart=/usr/local/bin/polymesh server --debug\n", 0o644, m.path(Unit))
	write(t, "[Service]\n", 0o644, m.path(dropIns), "mine.conf")
	if err := errors.Join(os.Remove(m.path("/usr/local/bin/kubectl")), os.Symlink("/opt/kubectl", m.path("/usr/local/bin/kubectl"))); err != nil {
		t.Fatal(err)
	}
	// A newer file can still be installed; other settings would have no effect.
	p := install(t, m, Options{File: shipped(t, "2")})
	if actionOn(p.Changes, Program) != Replace || actionOn(p.Changes, Unit) != Leave {
		t.Errorf("%v", p.Changes)
	}
	_, err := m.Plan(t.Context(), Options{File: file, Settings: &Settings{Role: Server}})
	if err == nil || !strings.Contains(err.Error(), "has been changed since it was installed") || !strings.Contains(err.Error(), "systemctl edit polymesh") {
		t.Errorf("error is %v", err)
	}
	removal := uninstall(t, m)
	for _, path := range []string{Unit, "/usr/local/bin/kubectl", dropIns} {
		if actionOn(removal.Changes, path) != Leave {
			t.Errorf("%s: %v", path, removal.Changes)
		}
		if _, err := os.Lstat(m.path(path)); err != nil {
			t.Error(err)
		}
	}
	if _, err := os.Lstat(m.path(Program)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the program: %v", err)
	}
}

// A file that was copied there by hand is replaced by another version, but not removed unless it was installed.
func TestProgramCopiedByHand(t *testing.T) {
	m := machine(t)
	one, err := os.ReadFile(shipped(t, "1"))
	if err != nil {
		t.Fatal(err)
	}
	write(t, string(one), 0o755, m.path(Program))
	if p := install(t, m, Options{File: m.path(Program), FileOnly: true}); actionOn(p.Changes, Program) != Unchanged {
		t.Errorf("%v", p.Changes)
	}
	if p := uninstall(t, m); actionOn(p.Changes, Program) != Leave {
		t.Errorf("%v", p.Changes)
	}
	two := shipped(t, "2")
	if p := install(t, m, Options{File: two, FileOnly: true}); actionOn(p.Changes, Program) != Replace {
		t.Errorf("%v", p.Changes)
	}
	// By hand again, in the place of an installed one, and then installed from there.
	if err := os.Remove(m.path(Program)); err != nil {
		t.Fatal(err)
	}
	write(t, string(one), 0o755, m.path(Program))
	if p, err := m.PlanRemoval(); err != nil || actionOn(p.Changes, Program) != Leave {
		t.Errorf("%v, %v", p, err)
	}
	install(t, m, Options{File: m.path(Program), FileOnly: true})
	if p := uninstall(t, m); actionOn(p.Changes, Program) != Delete {
		t.Errorf("%v", p.Changes)
	}
	// One that others can change must not be what root runs at every boot.
	write(t, string(one), 0o777, m.path(Program))
	if err := os.Chmod(m.path(Program), 0o777); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Plan(t.Context(), Options{File: m.path(Program), FileOnly: true}); err == nil || !strings.Contains(err.Error(), "only root can change") {
		t.Errorf("error is %v", err)
	}
}

// An install that ends after any of its writes is finished by the next one, and undone by an uninstall.
func TestInterruptedInstall(t *testing.T) {
	one, two := shipped(t, "1"), shipped(t, "2")
	first := Options{File: one, Settings: &Settings{Role: Server, Args: []string{"--mesh-profile=demo"}, Environment: []string{"POLYMESH_NODE_NAME=a"}}}
	second := Options{File: two, Settings: &Settings{Role: Server, Args: []string{"--mesh-profile=minimal"}, Environment: []string{"POLYMESH_NODE_NAME=b"}}}
	for end := range 8 {
		for _, finish := range []bool{true, false} {
			m := offline(t)
			before := tree(t, m)
			install(t, m, first)
			p, err := m.Plan(t.Context(), second)
			if err != nil {
				t.Fatal(err)
			}
			// What write does, as far as it comes.
			for _, f := range p.files {
				p.record.Files[f.path] = append(p.record.Files[f.path], f.want)
			}
			if err := m.writeRecord(p.record); err != nil {
				t.Fatal(err)
			}
			for i, f := range p.files {
				if i < end && f.action != Unchanged {
					if err := m.put(p.record, f); err != nil {
						t.Fatal(err)
					}
				}
			}
			partial := "/usr/local/bin/.new-1"
			p.record.Partial = []string{partial, "/usr/bin/precious"}
			write(t, "half of", 0o644, m.path(partial))
			write(t, "precious", 0o755, m.path("/usr/bin/precious"))
			before["/usr/bin/precious"] = string(fileFingerprint([]byte("precious")))
			if err := m.writeRecord(p.record); err != nil {
				t.Fatal(err)
			}
			if finish {
				install(t, m, second)
				if _, err := os.Lstat(m.path(partial)); !errors.Is(err, fs.ErrNotExist) {
					t.Errorf("after %d files: half a file is left: %v", end, err)
				}
				if p := install(t, m, second); p.Changed() {
					t.Errorf("after %d files, a second time: %v", end, p.Changes)
				}
			}
			uninstall(t, m)
			if got := tree(t, m); !same(before, got) {
				t.Errorf("after %d files, finished: %v: left %v", end, finish, got)
			}
		}
	}
}

// One install is at work at a time.
func TestSecondInstallAtOnce(t *testing.T) {
	m := machine(t)
	unlock, err := m.lock()
	if err != nil {
		t.Fatal(err)
	}
	defer unlock()
	if _, err := m.Install(context.Background(), Options{File: shipped(t, "1"), FileOnly: true}, progress.New(io.Discard)); err == nil || !strings.Contains(err.Error(), "at work") {
		t.Errorf("error is %v", err)
	}
}

// An earlier version's `make up` listed what it had installed.
func TestInstalledByAnEarlierMakeUp(t *testing.T) {
	m := offline(t)
	before := tree(t, m)
	one, err := os.ReadFile(shipped(t, "1"))
	if err != nil {
		t.Fatal(err)
	}
	write(t, string(one), 0o755, m.path(Program))
	write(t, "[Unit]\n", 0o644, m.path(Unit))
	write(t, "mine", 0o755, m.path("/usr/bin/mine"))
	before["/usr/bin/mine"] = string(fileFingerprint([]byte("mine")))
	if err := os.Symlink("polymesh", m.path("/usr/local/bin/kubectl")); err != nil {
		t.Fatal(err)
	}
	write(t, strings.Join([]string{Program, Unit, "/usr/local/bin/kubectl", "/usr/bin/mine"}, "\n")+"\n", 0o644, m.path(makeUpList))
	p := install(t, m, Options{File: shipped(t, "2"), Settings: &Settings{Role: Server}})
	if actionOn(p.Changes, Program) != Replace || actionOn(p.Changes, Unit) != Replace {
		t.Errorf("%v", p.Changes)
	}
	uninstall(t, m)
	if got := tree(t, m); !same(before, got) {
		t.Errorf("left: %v", got)
	}
}
