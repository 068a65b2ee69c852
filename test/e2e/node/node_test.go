//go:build e2e

package node

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// leaveEnv makes this program a run that is killed, leaving a node behind.
const leaveEnv = "POLYMESH_E2E_LEAVE"

func TestMain(m *testing.M) {
	if err := Guard(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	if os.Getenv(leaveEnv) != "" {
		n, err := New(Options{})
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		fmt.Println(n.Name)
		select {}
	}
	os.Exit(m.Run())
}

func TestNetwork(t *testing.T) {
	n := ForTest(t, Options{})
	listener, err := n.Listen("tcp", ":80")
	if err != nil {
		t.Fatal(err)
	}
	outside, err := n.ListenOutside("tcp", OutsideHost+":80")
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, r.RemoteAddr) })}
	go func() { _ = server.Serve(listener) }()
	go func() { _ = server.Serve(outside) }()
	defer server.Close()
	for _, keep := range []bool{false, true} {
		client := n.HTTP(keep)
		seen := map[string]bool{}
		for range 3 {
			resp, err := client.Get("http://" + n.Address())
			if err != nil {
				t.Fatal(err)
			}
			body, err := io.ReadAll(resp.Body)
			resp.Body.Close()
			if err != nil || !strings.HasPrefix(string(body), n.OutsideAddress()+":") {
				t.Errorf("the caller is %s (%v), want %s", body, err, n.OutsideAddress())
			}
			seen[string(body)] = true
		}
		if want := map[bool]int{false: 3, true: 1}[keep]; len(seen) != want {
			t.Errorf("keep %v: %d connections, want %d", keep, len(seen), want)
		}
	}
	// The node calls back.
	resp, err := n.HTTPInside(false).Get("http://" + OutsideHost)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if body, err := io.ReadAll(resp.Body); err != nil || !strings.HasPrefix(string(body), n.Address()+":") {
		t.Errorf("the caller is %s (%v), want %s", body, err, n.Address())
	}
	// The world has nothing else, and says so.
	if _, err := n.Dial(t.Context(), "tcp", "192.0.2.1:80"); err == nil || !strings.Contains(err.Error(), "no route to host") {
		t.Errorf("got %v, want no route to host", err)
	}
}

func TestKilledRunLeavesNothing(t *testing.T) {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), leaveEnv+"=1")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var name string
	if _, err := fmt.Fscanln(out, &name); err != nil {
		t.Fatal(err)
	}
	traces := func() (found []string) {
		for _, path := range []string{namespace(name).path(), namespace(name + "-out").path(), filepath.Join(os.TempDir(), name)} {
			if _, err := os.Stat(path); err == nil {
				found = append(found, path)
			}
		}
		return found
	}
	if len(traces()) != 3 {
		t.Fatalf("the node %q has only %v", name, traces())
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // killed
	for deadline := time.Now().Add(time.Minute); len(traces()) > 0; time.Sleep(poll) {
		if time.Now().After(deadline) {
			t.Fatalf("the watchdog left %v", traces())
		}
	}
}
