package main

import (
	"archive/zip"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"

	"polymesh.dev/polymesh/pkg/payload"
)

// When run as the launcher of a test, this binary runs main. Its payload's program is a script that prints how it was called.
const launcherVar = "POLYMESH_TEST_LAUNCHER"

const script = "#!/bin/sh\necho \"args: $*\"\nenv | grep -E '^(POLYMESH_PAYLOAD_DIR|GOGC|POLYMESH_GOGC)='\n[ \"$1\" != install ] || echo \"$POLYMESH_PAYLOAD_FILE\"\n"

func TestMain(m *testing.M) {
	if os.Getenv(launcherVar) != "" {
		main()
		return
	}
	os.Exit(m.Run())
}

// shipped writes a copy of this binary with an appended payload.
func shipped(t *testing.T) string {
	t.Helper()
	launcher, err := os.ReadFile(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	var zipped bytes.Buffer
	w := zip.NewWriter(&zipped)
	w.SetOffset(int64(len(launcher)))
	w.RegisterCompressor(zstd.ZipMethodWinZip, zstd.ZipCompressor())
	files := map[string]string{payload.Program: script, "bin/containerd": "other"}
	manifest := payload.Manifest{Version: "1", Files: map[string]string{}}
	for name, text := range files {
		sum := sha256.Sum256([]byte(text))
		manifest.Files[name] = "sha256:" + hex.EncodeToString(sum[:])
	}
	text, err := json.Marshal(manifest)
	if err != nil {
		t.Fatal(err)
	}
	files["payload.json"] = string(text)
	for name, text := range files {
		m, err := w.CreateHeader(&zip.FileHeader{Name: name, Method: zstd.ZipMethodWinZip})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := m.Write([]byte(text)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "polymesh")
	if err := os.WriteFile(path, append(launcher, zipped.Bytes()...), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

// launch calls the shipped file and returns its output, and its error output when it failed.
func launch(t *testing.T, file string, env []string, args ...string) (out, failure string) {
	t.Helper()
	cmd := exec.Command(file, args...)
	cmd.Env = append([]string{launcherVar + "=1", "PATH=" + os.Getenv("PATH")}, env...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.String(), fmt.Sprintf("%v: %s", err, stderr.String())
	}
	return stdout.String(), ""
}

func TestCommandUnpacksTheProgramOnceToTheCache(t *testing.T) {
	file, home := shipped(t), t.TempDir()
	for range 2 {
		out, failure := launch(t, file, []string{"HOME=" + home, payload.EnvDir + "=/of/another/version"}, "kubectl", "get", "pods", "--all-namespaces")
		dirs, _ := filepath.Glob(home + "/.cache/polymesh/data/*")
		if failure != "" || len(dirs) != 1 {
			t.Fatalf("%s%s%q", out, failure, dirs)
		}
		if want := "args: kubectl get pods --all-namespaces\nPOLYMESH_PAYLOAD_DIR=" + dirs[0] + "\n"; out != want {
			t.Errorf("got %q, want %q", out, want)
		}
		if _, err := os.Stat(filepath.Join(dirs[0], "bin", "containerd")); err == nil {
			t.Error("more than the program was unpacked")
		}
	}
	// A link's name is passed on: by it the program detects that it is kubectl.
	link := filepath.Join(t.TempDir(), "kubectl")
	if err := os.Symlink(file, link); err != nil {
		t.Fatal(err)
	}
	if out, failure := launch(t, link, []string{"HOME=" + home}, "version"); failure != "" || !strings.HasPrefix(out, "args: version\n") {
		t.Errorf("%s%s", out, failure)
	}
}

// `polymesh install` copies the file that was called, whatever the environment says.
func TestCommandKnowsItsFile(t *testing.T) {
	file := shipped(t)
	out, failure := launch(t, file, []string{"HOME=" + t.TempDir(), payload.EnvFile + "=/another/file"}, "install")
	if failure != "" || !strings.HasSuffix(out, "\n"+file+"\n") {
		t.Errorf("%q %s", out, failure)
	}
}

func TestCommandUsesTheDataDir(t *testing.T) {
	file, home, dataDir := shipped(t), t.TempDir(), t.TempDir()
	p, err := payload.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	dir := payload.In(dataDir, p.ID)
	names, _ := p.Missing(dir, false)
	if err := p.Unpack(dir, names); err != nil {
		t.Fatal(err)
	}
	out, failure := launch(t, file, []string{"HOME=" + home, "POLYMESH_DATA_DIR=" + dataDir}, "status")
	if want := "args: status\nPOLYMESH_PAYLOAD_DIR=" + string(dir) + "\n"; out != want || failure != "" {
		t.Errorf("got %q %s, want %q", out, failure, want)
	}
	if _, err := os.Stat(filepath.Join(home, ".cache")); err == nil {
		t.Error("the program was unpacked again")
	}
}

// With `sudo -E` the cache belongs to a user whom root does not trust.
func TestProgramOfAnotherUserIsNotRun(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	const nobody = 65534
	file := shipped(t)
	p, err := payload.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	// The same size as the real one.
	evil := "#!/bin/sh\necho evil\n"
	evil += strings.Repeat("#", len(script)-len(evil))
	for what, owned := range map[string]func(cache string, dir payload.Dir) []string{
		"another's cache": func(cache string, dir payload.Dir) []string {
			return []string{cache, string(dir), dir.Path(payload.Program)}
		},
		"another's program":  func(_ string, dir payload.Dir) []string { return []string{dir.Path(payload.Program)} },
		"another's data dir": func(string, payload.Dir) []string { return nil },
	} {
		t.Run(what, func(t *testing.T) {
			cache, temp := t.TempDir(), t.TempDir()
			env := []string{"XDG_CACHE_HOME=" + cache, "TMPDIR=" + temp}
			dir := payload.In(filepath.Join(cache, "polymesh"), p.ID)
			if what == "another's data dir" {
				data := t.TempDir()
				if err := os.Chmod(data, 0o777); err != nil {
					t.Fatal(err)
				}
				dir, env = payload.In(data, p.ID), append(env, "POLYMESH_DATA_DIR="+data)
			}
			if err := os.MkdirAll(filepath.Dir(dir.Path(payload.Program)), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(dir.Path(payload.Program), []byte(evil), 0o755); err != nil {
				t.Fatal(err)
			}
			for _, path := range owned(cache, dir) {
				if err := os.Chown(path, nobody, nobody); err != nil {
					t.Fatal(err)
				}
			}
			out, failure := launch(t, file, env, "version")
			if failure != "" || !strings.HasPrefix(out, "args: version\n") {
				t.Errorf("%q %s", out, failure)
			}
		})
	}
}

func TestServerHelpNeedsNoMachine(t *testing.T) {
	out, failure := launch(t, shipped(t), []string{"HOME=" + t.TempDir()}, "server", "--help")
	if failure != "" || !strings.HasPrefix(out, "args: server --help\n") {
		t.Errorf("%s%s", out, failure)
	}
}

// An agent's Go collects garbage more often from its start on, unless the user has set GOGC.
func TestAgentStartsWithAnotherGOGC(t *testing.T) {
	file, home := shipped(t), t.TempDir()
	for _, c := range []struct {
		role string
		env  []string
		want []string
	}{
		{"agent", nil, []string{"GOGC=10", "POLYMESH_GOGC=10"}},
		{"agent", []string{"GOGC=", "POLYMESH_GOGC=7"}, []string{"GOGC=10", "POLYMESH_GOGC=10"}},
		{"agent", []string{"GOGC=73", "POLYMESH_GOGC=73"}, []string{"GOGC=73"}},
		{"server", []string{"POLYMESH_GOGC=10"}, nil},
	} {
		out, failure := launch(t, file, append([]string{"HOME=" + home}, c.env...), c.role, "--help")
		var got []string
		for line := range strings.Lines(out) {
			if strings.Contains(line, "GOGC=") {
				got = append(got, strings.TrimSpace(line))
			}
		}
		slices.Sort(got)
		if failure != "" || !slices.Equal(got, c.want) {
			t.Errorf("%s with %q: %q %s, want %q", c.role, c.env, got, failure, c.want)
		}
	}
}

// A problem with a server's command line or machine is reported on one line, and nothing is created.
func TestServerIsRefusedBeforeAnythingIsMade(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	port := l.Addr().(*net.TCPAddr).Port
	file, home := shipped(t), t.TempDir()
	dataDir := filepath.Join(home, "data")
	config := filepath.Join(t.TempDir(), "config.yaml")
	if err := os.WriteFile(config, []byte("nod-name: a\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	cases := map[string]string{
		"--no-such":           "unknown flag: --no-such",
		"extra":               `unexpected argument "extra"`,
		"--config=" + config:  `unknown key "nod-name"; valid keys: `,
		"--node-ip=127.0.0.1": "--node-ip",
	}
	if os.Geteuid() == 0 {
		cases[fmt.Sprintf("--https-listen-port=%d", port)] = fmt.Sprintf("port %d, on which the API server listens, is in use", port)
	}
	for arg, want := range cases {
		out, failure := launch(t, file, []string{"HOME=" + home}, "server", "--data-dir", dataDir, "--write-kubeconfig", filepath.Join(home, "kubeconfig"), arg)
		lines := strings.Count(strings.TrimSpace(failure), "\n")
		if out != "" || !strings.HasPrefix(failure, "exit status 1: polymesh: ") || !strings.Contains(failure, want) || lines > 0 {
			t.Errorf("%s: got %q %q, want one line with %q", arg, out, failure, want)
		}
		if entries, _ := os.ReadDir(home); len(entries) > 0 {
			t.Errorf("%s: made %v", arg, entries)
		}
	}
}

// Programs on a file system with noexec cannot be run: nothing is unpacked there.
func TestHomeWithNoExec(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	home := t.TempDir()
	if err := unix.Mount("home", home, "tmpfs", unix.MS_NOEXEC, "mode=0700"); err != nil {
		t.Skip("cannot mount here: ", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(home, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	_, failure := launch(t, shipped(t), []string{"HOME=" + home}, "version")
	if want := "polymesh: the file system of " + home + "/.cache/polymesh is mounted with noexec"; !strings.Contains(failure, want) || !strings.Contains(failure, "set XDG_CACHE_HOME") {
		t.Errorf("got %q, want %q", failure, want)
	}
	if entries, _ := os.ReadDir(home); len(entries) > 0 {
		t.Errorf("made %v", entries)
	}
}

func TestFileWithoutPayload(t *testing.T) {
	_, failure := launch(t, os.Args[0], []string{"HOME=" + t.TempDir()}, "version")
	if !strings.Contains(failure, "carries no payload (was it built with `make`, and copied completely?)") {
		t.Errorf("got %q", failure)
	}
}
