package controlplanetest

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
)

// argumentsVariable has the arguments of Start in the process of a test binary that runs a control plane, as JSON.
const argumentsVariable = "POLYMESH_TEST_CONTROL_PLANE"

// started begins the line in which that process prints its kubeconfig's path.
const started = "kubeconfig "

// StartProcess is Start in a process of its own, for tests that start more than one control plane: the test binary again, which only runs its
// test TestServer. stop stops the control plane, which the end of the test does too, and waits for the process.
func StartProcess(t *testing.T, args ...string) (kubeconfig string, stop func()) {
	t.Helper()
	text, err := json.Marshal(args)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0], "-test.run=^TestServer$", "-test.v")
	cmd.Env = append(os.Environ(), argumentsVariable+"="+string(text))
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	stop = sync.OnceFunc(func() {
		in.Close()
		if err := cmd.Wait(); err != nil {
			t.Errorf("the control plane with %q: %v", args, err)
		}
	})
	t.Cleanup(stop)
	for lines := bufio.NewScanner(out); lines.Scan(); {
		if path, ok := strings.CutPrefix(lines.Text(), started); ok {
			go func() { _, _ = io.Copy(io.Discard, out) }()
			return path, stop
		}
	}
	t.Fatalf("the control plane with %q did not start", args)
	return "", nil
}

// ServeProcess is the test TestServer of packages that use StartProcess: it runs a control plane until its standard input ends.
func ServeProcess(t *testing.T) {
	text := os.Getenv(argumentsVariable)
	if text == "" {
		t.Skip("only for other tests")
	}
	var args []string
	if err := json.Unmarshal([]byte(text), &args); err != nil {
		t.Fatal(err)
	}
	kubeconfig := Start(t, slog.New(slog.NewTextHandler(os.Stderr, nil)), args...)
	fmt.Printf("\n%s%s\n", started, kubeconfig)
	_, _ = io.Copy(io.Discard, os.Stdin)
}
