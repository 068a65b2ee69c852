package component

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// The programs in these tests are the test binary itself, in a role selected by the environment.
const roleVar = "POLYMESH_TEST_ROLE"

func TestMain(m *testing.M) {
	switch os.Getenv(roleVar) {
	case "":
		os.Exit(m.Run())
	case "obedient":
		fmt.Println("up", os.Getpid())
		time.Sleep(time.Hour)
	case "stubborn":
		signal.Ignore(syscall.SIGTERM)
		fmt.Println("up", os.Getpid())
		time.Sleep(time.Hour)
	case "with grandchild":
		// The grandchild keeps the output open after its parent has exited.
		cmd := exec.Command(os.Args[0])
		cmd.Env, cmd.Stdout = role("obedient"), os.Stdout
		if err := cmd.Start(); err != nil {
			panic(err)
		}
		_ = cmd.Wait()
	case "server":
		c := child("stubborn", os.Stdout)
		if err := c.Start(context.Background()); err != nil {
			panic(err)
		}
		time.Sleep(time.Hour)
	}
}

func role(name string) []string { return append(os.Environ(), roleVar+"="+name) }

func child(name string, output *os.File) *Child {
	return &Child{Path: os.Args[0], Env: role(name), Output: output, Log: slog.New(slog.DiscardHandler)}
}

// output collects a child's output.
type output struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.String()
}

func start(t *testing.T, name string) (*Child, *output) {
	t.Helper()
	o := &output{}
	c := child(name, nil)
	c.Output = o
	if err := c.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		_ = c.Stop(ctx)
	})
	eventually(t, "the child is up", func() bool { return strings.Contains(o.String(), "up") })
	return c, o
}

func eventually(t *testing.T, what string, done func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !done(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not in time: %s", what)
		}
	}
}

// gone reports whether a process has exited; a zombie counts as exited.
func gone(pid int) bool {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return true
	}
	_, state, _ := strings.Cut(string(text), ") ")
	return strings.HasPrefix(state, "Z") || strings.HasPrefix(state, "X")
}

func TestChildIsStartedAgain(t *testing.T) {
	c, _ := start(t, "obedient")
	first := c.PID()
	if err := syscall.Kill(first, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "another process", func() bool { return c.PID() != 0 && c.PID() != first })
	second := c.PID()
	if err := c.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	if c.PID() != 0 || !gone(first) || !gone(second) {
		t.Errorf("processes %d and %d, now %d", first, second, c.PID())
	}
	if err := c.Stop(t.Context()); err != nil {
		t.Errorf("second stop: %v", err)
	}
}

func TestChildIsStartedAgainThoughItsOutputIsHeld(t *testing.T) {
	c, o := start(t, "with grandchild")
	first := c.PID()
	var grandchild int
	if _, err := fmt.Sscanf(o.String(), "up %d", &grandchild); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = syscall.Kill(grandchild, syscall.SIGKILL) }()
	if err := syscall.Kill(first, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "another process", func() bool { return c.PID() != 0 && c.PID() != first })
	if gone(grandchild) {
		t.Error("the grandchild is gone: this test proves nothing")
	}
	eventually(t, "the second grandchild", func() bool { return strings.Count(o.String(), "up") == 2 })
	for line := range strings.Lines(o.String()) {
		var pid int
		if _, err := fmt.Sscanf(line, "up %d", &pid); err == nil {
			defer func() { _ = syscall.Kill(pid, syscall.SIGKILL) }()
		}
	}
}

func TestStopKillsAChildThatDoesNotListen(t *testing.T) {
	c, _ := start(t, "stubborn")
	pid := c.PID()
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if err := c.Stop(ctx); err != nil {
		t.Fatal(err)
	}
	if ctx.Err() == nil || !gone(pid) {
		t.Error("it exited by itself, or not at all")
	}
}

func TestChildDiesWithItsParent(t *testing.T) {
	parent := exec.Command(os.Args[0])
	parent.Env = role("server")
	out, err := parent.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := parent.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	var pid int
	if _, err := fmt.Sscanf(line, "up %d", &pid); err != nil {
		t.Fatal(err)
	}
	if gone(pid) {
		t.Fatal("the child is gone before its parent")
	}
	if err := parent.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = parent.Wait()
	eventually(t, "the child, which ignores SIGTERM, is gone", func() bool { return gone(pid) })
}

func TestChildThatCannotStart(t *testing.T) {
	c := &Child{Path: "/no/such/program", Log: slog.New(slog.DiscardHandler)}
	if err := c.Start(t.Context()); err == nil || !strings.Contains(err.Error(), "/no/such/program") {
		t.Errorf("error is %v", err)
	}
	if err := c.Stop(t.Context()); err != nil || c.PID() != 0 {
		t.Errorf("stop: %v, process %d", err, c.PID())
	}
	if err := new(Child).Stop(t.Context()); err != nil {
		t.Errorf("stop before the start: %v", err)
	}
}
