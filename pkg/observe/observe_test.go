package observe

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"polymesh.dev/polymesh/pkg/cgroup"
	"polymesh.dev/polymesh/pkg/layout"
)

// serverVar makes the test binary a server, which runs the component for this data dir until it is killed.
const serverVar = "POLYMESH_TEST_SERVER"

// The store in these tests is the test binary itself, under the program's name: the lock, the socket and the command line are those of
// the real one, which is in another module. test/e2e has the real one.
func TestMain(m *testing.M) {
	if filepath.Base(os.Args[0]) == Program {
		if err := store(os.Args[1:]); err != nil {
			fmt.Fprintln(os.Stderr, "polymesh-observe:", err)
			os.Exit(1)
		}
		return
	}
	if dir := os.Getenv(serverVar); dir != "" {
		c := New(optionsFor(layout.DataDir(dir)))
		if err := c.Start(context.Background()); err != nil {
			panic(err)
		}
		time.Sleep(time.Hour)
	}
	os.Exit(m.Run())
}

func store(args []string) error {
	flags := map[string]string{}
	for _, arg := range args {
		name, value, _ := strings.Cut(strings.TrimPrefix(arg, "--"), "=")
		flags[name] = value
	}
	dir := flags["data-dir"]
	if _, err := os.Stat(filepath.Join(dir, "broken")); err == nil {
		return fmt.Errorf("the disk is damaged")
	}
	f, err := os.OpenFile(filepath.Join(dir, lockName), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	defer f.Close() // not before: a file that is not used any more is closed at any time, and the lock is gone
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return err
	}
	_, started := stat(os.Getpid())
	text, err := json.Marshal(holder{os.Getpid(), started})
	if err != nil {
		return err
	}
	if err := os.WriteFile(f.Name(), text, 0o600); err != nil {
		return err
	}
	_ = os.Remove(flags["socket"])
	l, err := net.Listen("unix", flags["socket"])
	if err != nil {
		return err
	}
	go http.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { //nolint:errcheck // ends with the process
		parts, err := os.ReadFile(filepath.Join(dir, "parts"))
		if err != nil {
			parts = []byte(`[{"name":"logs","state":"Ready"}]`)
		}
		fmt.Fprintf(w, `{"version":"1.2.3","disk":%d,"components":%s}`, 100<<20, parts)
	}))
	end := make(chan os.Signal, 1)
	if _, err := os.Stat(filepath.Join(dir, "stubborn")); err == nil {
		signal.Ignore(syscall.SIGTERM)
	} else {
		signal.Notify(end, syscall.SIGTERM)
	}
	<-end
	return nil
}

func optionsFor(dir layout.DataDir) Options {
	up := make(chan struct{})
	close(up)
	return Options{
		DataDir: dir, Program: dir.Path("data", "current", "bin", Program), Node: "node-1", Memory: 150_000_000, Retention: time.Hour, Kubeconfig: dir.Kubeconfig("observe"),
		PodLogs: dir.PodLogs(), LogFiles: map[string]string{"containerd": "/c.log", "b": "/b.log"}, Up: up, Log: slog.New(slog.NewTextHandler(io.Discard, nil)),
	}
}

// newDir is a data dir with the unpacked program. The store that runs there at the end of the test is ended.
func newDir(t *testing.T) layout.DataDir {
	t.Helper()
	dir := layout.DataDir(t.TempDir())
	unpack(t, dir, "one")
	for _, folder := range []string{dir.Observe(), dir.Run()} {
		if err := os.MkdirAll(folder, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		if err := End(context.Background(), dir); err != nil {
			t.Error(err)
		}
		os.RemoveAll(dir.Run())
	})
	return dir
}

// unpack makes a version the current one.
func unpack(t *testing.T, dir layout.DataDir, id string) {
	t.Helper()
	bin := dir.Path("data", id, "bin")
	if err := os.MkdirAll(bin, 0o755); err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	// A copy: the program of a process is the file that a hard link leads to, under any of its names.
	if out, err := exec.Command("cp", self, filepath.Join(bin, Program)).CombinedOutput(); err != nil {
		t.Fatal(string(out))
	}
	_ = os.Remove(dir.Programs())
	if err := os.Symlink(id, dir.Programs()); err != nil {
		t.Fatal(err)
	}
}

func startComponent(t *testing.T, o Options) *Component {
	t.Helper()
	c := New(o)
	if err := c.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Stop(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return c
}

func eventually(t *testing.T, what string, done func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !done(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not in time: %s", what)
		}
	}
}

func ready(t *testing.T, c *Component) int {
	t.Helper()
	eventually(t, "the store is ready", func() bool { return c.Ready(t.Context()) == nil })
	return c.PID()
}

func TestOutlivesTheServer(t *testing.T) {
	dir := newDir(t)
	server := exec.Command(os.Args[0])
	server.Env = append(os.Environ(), serverVar+"="+string(dir))
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	var pid int
	eventually(t, "the first server's store runs", func() bool { pid, _ = Running(dir); return pid != 0 })
	if session, err := unix.Getsid(pid); err != nil || session != pid {
		t.Errorf("its session is %d: %v", session, err)
	}
	if err := server.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = server.Wait()

	c := startComponent(t, optionsFor(dir))
	if got := ready(t, c); got != pid {
		t.Errorf("the next server's store is process %d, want %d", got, pid)
	}
	if c.Version() != "1.2.3" || c.Summary() != "0 of 100 MiB" {
		t.Errorf("version %q, %q", c.Version(), c.Summary())
	}
	// The end of that server leaves it, too.
	if err := c.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got, err := Running(dir); got != pid {
		t.Errorf("process %d, want %d: %v", got, pid, err)
	}
	if err := End(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	if got, err := Running(dir); got != 0 || err != nil {
		t.Errorf("process %d still runs: %v", got, err)
	}
	if err := End(t.Context(), dir); err != nil {
		t.Errorf("the second end: %v", err)
	}
}

func TestStartedAgain(t *testing.T) {
	dir := newDir(t)
	c := startComponent(t, optionsFor(dir))
	first := ready(t, c)
	if err := syscall.Kill(first, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "another process", func() bool { return c.PID() != 0 && c.PID() != first })
	second := ready(t, c)

	// So is one that another server has started.
	if err := c.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	c = startComponent(t, optionsFor(dir))
	if got := ready(t, c); got != second {
		t.Fatalf("process %d, want %d", got, second)
	}
	if err := syscall.Kill(second, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a third process", func() bool { return c.PID() != 0 && c.PID() != second })
	ready(t, c)
}

func TestOtherProgramOrFlags(t *testing.T) {
	dir := newDir(t)
	o := optionsFor(dir)
	c := startComponent(t, o)
	first := ready(t, c)
	next := func(o Options) int {
		t.Helper()
		if err := c.Stop(t.Context()); err != nil {
			t.Fatal(err)
		}
		c = startComponent(t, o)
		return ready(t, c)
	}
	if pid := next(o); pid != first {
		t.Errorf("the same flags: process %d, want %d", pid, first)
	}
	o.Disk = 1 << 30
	second := next(o)
	if second == first {
		t.Error("other flags did not start it again")
	}
	// An upgrade removes the programs of the version before the last one, also while they run.
	unpack(t, dir, "two")
	if err := os.RemoveAll(dir.Path("data", "one")); err != nil {
		t.Fatal(err)
	}
	if third := next(o); third == second {
		t.Error("another program did not start it again")
	}
}

// A process that holds the lock, and is not the store, is left alone.
func TestForeignProcessIsNotSignalled(t *testing.T) {
	dir := newDir(t)
	f, err := os.Create(dir.Observe(lockName))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		t.Fatal(err)
	}
	_, started := stat(os.Getpid())
	for text, want := range map[string]string{
		fmt.Sprintf(`{"pid":%d,"started":%d}`, os.Getpid(), started):   "is not a store of",
		fmt.Sprintf(`{"pid":%d,"started":%d}`, os.Getpid(), started+1): "is locked by another process than",
		`{"pid":1}`:             "does not say by which process",
		`{"pid":0,"started":1}`: "does not say by which process",
		"":                      "does not say by which process",
	} {
		if err := os.WriteFile(f.Name(), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := End(t.Context(), dir); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", text, err, want)
		}
	}
	if err := os.WriteFile(f.Name(), []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	c := startComponent(t, optionsFor(dir))
	eventually(t, "the status says so", func() bool {
		err := c.Ready(t.Context())
		return err != nil && strings.Contains(err.Error(), "does not say by which process")
	})
}

func TestStoreThatDoesNotStart(t *testing.T) {
	dir := newDir(t)
	if err := os.WriteFile(dir.Observe("broken"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	c := startComponent(t, optionsFor(dir))
	eventually(t, "the status says why", func() bool {
		err := c.Ready(t.Context())
		return err != nil && strings.HasSuffix(err.Error(), "ended: exit status 1: polymesh-observe: the disk is damaged")
	})
	if err := os.Remove(dir.Observe("broken")); err != nil {
		t.Fatal(err)
	}
	ready(t, c)
}

func TestKilledIfItDoesNotEnd(t *testing.T) {
	dir := newDir(t)
	if err := os.WriteFile(dir.Observe("stubborn"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	c := startComponent(t, optionsFor(dir))
	ready(t, c)
	if err := c.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	p, err := storeOf(dir).find()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if err := p.end(ctx); err == nil || !p.alive() {
		t.Errorf("it has ended by SIGTERM, so this proves nothing: %v", err)
	}
	if err := p.signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it is gone", func() bool { return !p.alive() })
	if err := p.signal(syscall.SIGKILL); err != nil {
		t.Errorf("signal what has ended: %v", err)
	}
}

func TestParts(t *testing.T) {
	dir := newDir(t)
	c := startComponent(t, optionsFor(dir))
	ready(t, c)
	set := func(parts string) {
		t.Helper()
		if err := os.WriteFile(dir.Observe("parts"), []byte(parts), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	set(`[{"name":"metrics","state":"Ready","numbers":{"series":3000,"bytes":3145728}},{"name":"logs","state":"Ready","message":"12 lines dropped","numbers":{"lines":12000,"bytes":1048576}},{"name":"pod-logs","state":"Ready","numbers":{"lines":7}}]`)
	if err := c.Ready(t.Context()); err != nil {
		t.Error(err)
	}
	if got := c.Summary(); got != "3000 series, 12000 lines, 4 of 100 MiB" {
		t.Error(got)
	}
	if got := c.Notes(t.Context()); len(got) == 0 || got[len(got)-1] != "logs: 12 lines dropped" {
		t.Errorf("%q", got)
	}
	set(`[{"name":"metrics","state":"Failed","message":"the block is damaged"},{"name":"page","state":"Waiting"}]`)
	if err := c.Ready(t.Context()); err == nil || err.Error() != "metrics: the block is damaged; page is not ready" {
		t.Error(err)
	}
}

func TestMemoryIsLimited(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("cgroups need root")
	}
	dir := newDir(t)
	c := startComponent(t, optionsFor(dir))
	pid := ready(t, c)
	if note := text(&c.unlimited); note != "" {
		t.Skip("this machine's cgroups cannot be used: ", note)
	}
	limit := "memory.limit_in_bytes"
	if cgroup.Unified() {
		limit = "memory.max"
	}
	folder := c.at.cgroup.dir()
	if cgroup.BySystemd() {
		folder = filepath.Join(cgroup.Mount, strings.TrimPrefix(strings.TrimSpace(read(t, fmt.Sprintf("/proc/%d/cgroup", pid))), "0::"))
	}
	// The kernel rounds down to pages.
	if got, err := strconv.ParseInt(strings.TrimSpace(read(t, filepath.Join(folder, limit))), 10, 64); err != nil || got > c.o.Memory || got < c.o.Memory-int64(os.Getpagesize()) {
		t.Errorf("the limit is %d: %v", got, err)
	}
	in := bufio.NewScanner(strings.NewReader(read(t, filepath.Join(folder, "cgroup.procs"))))
	found := false
	for in.Scan() {
		found = found || in.Text() == strconv.Itoa(pid)
	}
	if !found {
		t.Errorf("process %d is not in %s", pid, folder)
	}
	if got := strings.TrimSpace(read(t, fmt.Sprintf("/proc/%d/oom_score_adj", pid))); got != "0" {
		t.Errorf("oom_score_adj is %s", got)
	}
	if err := c.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := End(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(folder); err == nil {
		t.Errorf("%s is still there", folder)
	}
}

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}
