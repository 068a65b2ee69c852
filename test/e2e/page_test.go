//go:build e2e

package e2e

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"polymesh.dev/polymesh/test/e2e/node"
)

// chromium opens the page; the scripts that drive it are in observe/web/test.
const chromium = "/usr/bin/chromium"

// browse runs observe/web/test/shipped.mjs in a browser on the node, with the page that `polymesh dashboard` serves there, and decodes its answer.
// The environment variable POLYMESH_SCREENSHOTS is a folder for pictures of all views.
func browse(t *testing.T, n *node.Node, answer any, args ...string) {
	t.Helper()
	top, err := node.Top()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 8*time.Minute)
	defer cancel()
	dashboard := n.PolymeshCommand(ctx, "dashboard", "--no-browser")
	out, err := dashboard.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var errOut bytes.Buffer
	dashboard.Stderr = &errOut
	dashboard.Cancel = func() error { return dashboard.Process.Signal(os.Interrupt) }
	if err := dashboard.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		cancel()
		_ = dashboard.Wait()
	}()
	address, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatalf("polymesh dashboard printed %q: %v: %s", address, err, &errOut)
	}
	command := append([]string{"test/shipped.mjs", strings.TrimSpace(address), chromium}, args...)
	script := n.Command(ctx, "node", command...)
	script.Dir = filepath.Join(top, "observe", "web")
	var result, problems bytes.Buffer
	script.Stdout, script.Stderr = &result, &problems
	if err := script.Run(); err != nil {
		t.Fatalf("the page: %v: %s%s", err, &result, &problems)
	}
	if err := json.Unmarshal(result.Bytes(), answer); err != nil {
		t.Fatalf("the page: %v: %s", err, &result)
	}
}

// wantOnPage finds one request on the page by clicks, from the connection of two services, with the lines of all five and of their proxies.
func (p *polyglot) wantOnPage() {
	t := p.t
	if _, err := exec.LookPath(chromium); err != nil {
		t.Fatalf("%v: build/debian/install app installs it", err)
	}
	// Requests are there to be clicked at, and rates to be drawn, while the page is open.
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			_, _, _ = p.chain()
			select {
			case <-time.After(time.Second):
			case <-ctx.Done():
			}
		}
	}()
	defer func() { cancel(); <-done }()
	var found struct {
		ID           string   `json:"id"`
		Lines, Spans []string `json:",omitempty"`
	}
	// TestBrowser of observe/page checks all views, of a made-up cluster.
	views := "one"
	shots := os.Getenv("POLYMESH_SCREENSHOTS")
	if shots != "" || !testing.Short() {
		views = "all"
	}
	args := []string{"request", p.name, "node-service", "rust-service", views, shots}
	browse(t, p.Node, &found, args...)
	all := strings.Join(found.Lines, "\n")
	for _, line := range found.Lines {
		if !strings.Contains(line, found.ID) {
			t.Errorf("a line of the request %s does not have its id: %s", found.ID, line)
		}
	}
	spans := strings.Join(found.Spans, "\n")
	for _, link := range chainOrder {
		if !strings.Contains(spans, link.service) {
			t.Errorf("the request %s has no span of %s: %s", found.ID, link.service, spans)
		}
		// What kubectl shows of the same request.
		logs := p.Kubectl(t, "logs", "-n", p.name, "-l", "app="+link.service, "--all-containers", "--tail=-1")
		if !strings.Contains(logs, found.ID) {
			t.Errorf("%s and its proxy have logged nothing about %s", link.service, found.ID)
		}
		for line := range strings.Lines(logs) {
			if line = strings.TrimSpace(line); strings.Contains(line, found.ID) && !strings.Contains(all, line) {
				t.Errorf("the page does not have this line of %s: %s", link.service, line)
			}
		}
	}
	t.Logf("request %s: %d lines, %d spans", found.ID, len(found.Lines), len(found.Spans))
}
