package server

import (
	"log/slog"
	"slices"
	"testing"

	"polymesh.dev/polymesh/pkg/component"
	"polymesh.dev/polymesh/pkg/join"
	"polymesh.dev/polymesh/pkg/layout"
	"polymesh.dev/polymesh/pkg/observe"
	"polymesh.dev/polymesh/pkg/worker"
)

// Of several servers, the first has the store, and the others collect for it and know the way.
func TestSeveralServers(t *testing.T) {
	joined, program := &join.ServerMembership{NodeName: "n1", Server: "https://192.0.2.2:6443"}, "bin/"+observe.Program
	for what, c := range map[string]struct {
		args           string
		membership     *join.ServerMembership
		programs       []string
		observe, route bool
	}{
		"the first":              {"--cluster-init", nil, []string{program}, true, true},
		"another":                {"", joined, []string{program}, true, true},
		"the first, off":         {"--cluster-init --disable observe", nil, []string{program}, false, true},
		"another, off":           {"--disable observe", joined, []string{program}, false, true},
		"another, not in a file": {"", joined, nil, false, true},
	} {
		s := serverFor(t, c.args, c.membership, c.programs...)
		m := component.NewManager(slog.New(slog.DiscardHandler))
		s.addComponents(m)
		var names []string
		for _, status := range m.Status(t.Context()) {
			names = append(names, status.Name)
		}
		if slices.Contains(names, "observe") != c.observe || slices.Contains(names, "observe-route") != c.route {
			t.Errorf("%s: %q", what, names)
		}
		if o := s.route(); (o.Socket != "") != (c.observe && c.membership == nil) || o.Server != "n1" || o.Address.String() != "192.0.2.1:6443" {
			t.Errorf("%s: %+v", what, o)
		}
	}
	// No job of a user reaches the platform's own ports.
	ports := serverFor(t, "", nil, program).store(nil).Ports
	for _, port := range []int{layout.APIServerPort, layout.KubeletPort, layout.EtcdPeerPort, layout.RegistryPeerPort} {
		if !slices.Contains(ports, port) {
			t.Errorf("the store may connect users' jobs to port %d: %v", port, ports)
		}
	}
	o := serverFor(t, "", joined, program).collector(nil)
	if o.Collect == nil || o.Collect.Server != worker.BalancerURL() || o.Kubeconfig != "" {
		t.Errorf("%+v", o)
	}
}
