package agent

import (
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"polymesh.dev/polymesh/pkg/component"
	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/datadir"
	"polymesh.dev/polymesh/pkg/join"
	"polymesh.dev/polymesh/pkg/layout"
	"polymesh.dev/polymesh/pkg/observe"
	"polymesh.dev/polymesh/pkg/payload"
	"polymesh.dev/polymesh/pkg/process"
	"polymesh.dev/polymesh/pkg/worker"
)

// The components are those of docs/understand/architecture.md, and the kubelet waits for what must be there before the first pod.
func TestComponentsOfAnAgent(t *testing.T) {
	dir, log := layout.DataDir(t.TempDir()), slog.New(slog.DiscardHandler)
	cfg := &config.Agent{Node: config.Node{DataDir: dir}, Joining: config.Joining{Server: "https://192.0.2.1:6443"}}
	p := &process.Process{
		Name: "n2", IP: netip.MustParseAddr("192.0.2.2"), Programs: payload.Dir(t.TempDir()), Manifest: &payload.Manifest{Files: map[string]string{"bin/" + observe.Program: "sha256:"}}, Marker: &datadir.Marker{}, Log: log,
	}
	membership := &join.Membership{Files: join.Files{Client: filepath.Join(dir.NodePKI(), "client.pem")}}
	m := component.NewManager(log)
	addComponents(m, worker.New(options(cfg, p, membership)), join.NewReachability(worker.BalancerURL(), membership.Files), collector(cfg, p, membership.Files))
	var got []string
	for _, c := range m.Status(t.Context()) {
		got = append(got, c.Name)
	}
	if want := documented(t); !slices.Equal(got, want) {
		t.Errorf("the components are %q, and docs/understand/architecture.md has %q", got, want)
	}
	p.Manifest = &payload.Manifest{}
	if collector(cfg, p, membership.Files) != nil {
		t.Error("an agent collects without the program for it")
	}
	if after := m.After("kubelet"); !slices.Equal(after, []string{"containerd", "registry", "network-policy"}) {
		t.Errorf("the kubelet waits for %q", after)
	}
}

// documented returns the names in the sentence about an agent's components.
func documented(t *testing.T) []string {
	t.Helper()
	text, err := os.ReadFile("../../docs/understand/architecture.md")
	if err != nil {
		t.Fatal(err)
	}
	_, sentence, ok := strings.Cut(string(text), "\nAn agent has ")
	if !ok {
		t.Fatal("docs/understand/architecture.md does not list the components of an agent")
	}
	sentence, _, _ = strings.Cut(sentence, ";")
	var names []string
	for _, m := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(sentence, -1) {
		names = append(names, m[1])
	}
	return names
}
