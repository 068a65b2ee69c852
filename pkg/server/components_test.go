package server

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
	"polymesh.dev/polymesh/pkg/mesh/install"
	"polymesh.dev/polymesh/pkg/observe"
	"polymesh.dev/polymesh/pkg/payload"
	"polymesh.dev/polymesh/pkg/process"
)

// The components and their order are also documented in docs/understand/architecture.md.
func TestComponentsOfAServer(t *testing.T) {
	table := componentTable(t)
	for args, want := range map[string][]string{
		"--disable observe": {"certificates", "datastore", "containerd", "images", "kube-apiserver", "secrets-encryption", "kube-controller-manager", "kube-scheduler", "registry", "network-policy", "kubelet", "kube-proxy",
			"pool-addresses", "pod-network", "join", "node-role", "image-policy", "snapshots", "serving-certificates", "coredns", "metrics-server", "local-storage", "servicelb", "istio", "observe-access"},
		"": {"certificates", "datastore", "containerd", "images", "kube-apiserver", "secrets-encryption", "kube-controller-manager", "kube-scheduler", "registry", "network-policy", "kubelet", "kube-proxy",
			"pool-addresses", "pod-network", "join", "node-role", "image-policy", "snapshots", "observe", "serving-certificates", "coredns", "metrics-server", "local-storage", "servicelb", "istio", "observe-access"},
		// A disabled add-on stays in the list to be removed; components with nothing to remove are left out.
		"--disable servicelb,istio,coredns,observe": {"certificates", "datastore", "containerd", "images", "kube-apiserver", "secrets-encryption", "kube-controller-manager", "kube-scheduler",
			"registry", "network-policy", "kubelet", "kube-proxy", "pool-addresses", "pod-network", "join", "node-role", "image-policy", "snapshots", "serving-certificates", "coredns", "metrics-server", "local-storage", "observe-access"},
		// An encryption configuration that is not ours is ignored: its keys are unknown here.
		"--disable observe --kube-apiserver-arg=encryption-provider-config=/kms.yaml": {"certificates", "datastore", "containerd", "images", "kube-apiserver", "kube-controller-manager", "kube-scheduler",
			"registry", "network-policy", "kubelet", "kube-proxy", "pool-addresses", "pod-network", "join", "node-role", "image-policy", "snapshots", "serving-certificates", "coredns", "metrics-server", "local-storage", "servicelb", "istio", "observe-access"},
	} {
		s := serverFor(t, args, nil, "bin/"+observe.Program)
		m := component.NewManager(s.Log)
		s.addComponents(m)
		var got []string
		for _, c := range m.Status(t.Context()) {
			got = append(got, c.Name)
			after := m.After(c.Name)
			if row, ok := table[c.Name]; !ok || !slices.Equal(row.after, after) {
				t.Errorf("docs/understand/architecture.md: %s waits for %q, want %q", c.Name, row.after, after)
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s: components are %q, want %q", args, got, want)
		}
		if args == "" {
			slices.SortFunc(got, func(a, b string) int { return table[a].line - table[b].line })
			if !slices.Equal(got, want) {
				t.Errorf("docs/understand/architecture.md has the order %q, want %q", got, want)
			}
		}
	}
}

// serverFor is a server with these flags and membership, and with these programs in its payload.
func serverFor(t *testing.T, args string, membership *join.ServerMembership, programs ...string) *server {
	t.Helper()
	empty := filepath.Join(t.TempDir(), "config.yaml")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	cfg, err := config.Parse(append([]string{"-c", empty, "-d", t.TempDir()}, strings.Fields(args)...), nil)
	if err != nil {
		t.Fatal(err)
	}
	manifest := &payload.Manifest{Files: map[string]string{}}
	for _, p := range programs {
		manifest.Files[p] = "sha256:"
	}
	s, err := newServer(cfg, &process.Process{
		Name: "n1", IP: netip.MustParseAddr("192.0.2.1"), Programs: payload.Dir(t.TempDir()), Manifest: manifest, Marker: &datadir.Marker{}, Log: slog.New(slog.DiscardHandler),
	}, membership)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// The store is on the first server, if it is on and in the file. What pods and proxies have to do with it is the whole cluster's.
func TestWhoHasTheStore(t *testing.T) {
	joined, program := &join.ServerMembership{NodeName: "n1", Server: "https://192.0.2.2:6443"}, "bin/"+observe.Program
	for what, c := range map[string]struct {
		args                      string
		membership                *join.ServerMembership
		programs                  []string
		here, accessible, logging bool
	}{
		"on":                      {"", nil, []string{program}, true, true, true},
		"off":                     {"--disable observe", nil, []string{program}, false, false, false},
		"not in the file":         {"", nil, []string{"bin/containerd"}, false, false, false},
		"on another server":       {"", joined, []string{program}, false, true, true},
		"off on another server":   {"--disable observe", joined, []string{program}, false, false, false},
		"sending only":            {"--observe-cluster-access ingest", nil, []string{program}, true, true, true},
		"not for pods":            {"--observe-cluster-access off", nil, []string{program}, true, false, true},
		"not for pods, elsewhere": {"--observe-cluster-access off", joined, []string{program}, false, false, true},
	} {
		s := serverFor(t, c.args, c.membership, c.programs...)
		if got := s.observes(); got != c.here {
			t.Errorf("%s: the store is here: %t", what, got)
		}
		if got := s.accessible(); got != c.accessible {
			t.Errorf("%s: pods reach it: %t", what, got)
		}
		if got, want := s.telemetry(), (install.Telemetry{Traces: c.accessible, AccessLogs: c.logging}); got != want {
			t.Errorf("%s: the proxies report %+v, want %+v", what, got, want)
		}
		m := component.NewManager(s.Log)
		s.addComponents(m)
		var names []string
		for _, c := range m.Status(t.Context()) {
			names = append(names, c.Name)
		}
		if c.here && !slices.Contains(names, "observe") {
			t.Errorf("%s: the component of the store is missing", what)
		}
		// Which makes the pods, or removes them.
		if got, want := slices.Contains(names, "observe-access"), c.here || !c.accessible; got != want {
			t.Errorf("%s: the component of its pods is there: %t", what, got)
		}
	}
}

// componentTable reads the table of components in docs/understand/architecture.md.
func componentTable(t *testing.T) map[string]componentRow {
	t.Helper()
	doc, err := os.ReadFile("../../docs/understand/architecture.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rows, ok := strings.Cut(string(doc), "| component | waits for |")
	if !ok {
		t.Fatal("docs/understand/architecture.md has no table of components")
	}
	rows, _, _ = strings.Cut(rows, "\n\n")
	names := regexp.MustCompile("`([^`]+)`")
	table := map[string]componentRow{}
	for _, line := range strings.Split(rows, "\n")[2:] {
		cells := strings.Split(line, "|")
		var after []string
		for _, m := range names.FindAllStringSubmatch(cells[2], -1) {
			after = append(after, m[1])
		}
		for _, m := range names.FindAllStringSubmatch(cells[1], -1) {
			table[m[1]] = componentRow{len(table), after}
		}
	}
	return table
}

// componentRow is a component's row in the documentation: its position, and the components it waits for.
type componentRow struct {
	line  int
	after []string
}
