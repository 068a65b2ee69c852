package install

import (
	"maps"
	"reflect"
	"strings"
	"testing"
)

func TestDecide(t *testing.T) {
	want := Identity{Version: "1.31.0", Profile: "default", Values: "aa"}
	older := Identity{Version: "1.30.0", Profile: "default", Values: "bb"}
	ours := func(p Phase, id Identity) *Record {
		return &Record{Owner: Ours, Phase: p, Identity: id, Objects: map[string]string{ownPlane: "x"}}
	}
	for _, tc := range []struct {
		name   string
		o      Observed
		action Action
		reason string
	}{
		{"empty cluster", Observed{}, Install, "no Istio"},
		{"user's install", Observed{Present: []string{"Deployment istio-system/istiod"}}, Leave, "before the server"},
		{"only CRDs of Helm's base chart", Observed{Present: []string{"CustomResourceDefinition gateways.networking.istio.io"}}, Leave, "gateways"},
		{"user's, later uninstalled", Observed{Record: &Record{Owner: Users, Phase: Installed}}, Leave, "own"},
		{"killed in the first install", Observed{Record: ours(Installing, want)}, Finish, "interrupted"},
		{"killed in the first install, then another build", Observed{Record: ours(Installing, older)}, Finish, "interrupted"},
		{"killed in an upgrade", Observed{Record: ours(Installing, want), Changed: []string{"x"}}, Finish, "interrupted"},
		{"interrupted, user installed a revision", Observed{Record: ours(Installing, want), Foreign: []string{"Deployment istio-system/istiod-canary"}}, Leave, "canary"},
		{"restart", Observed{Record: ours(Installed, want)}, Keep, "as installed"},
		{"restart beside a user's revision", Observed{Record: ours(Installed, want), Foreign: []string{"istiod-canary"}}, Keep, ""},
		{"restart after a change", Observed{Record: ours(Installed, want), Changed: []string{"x"}}, Keep, ""},
		{"restart after an uninstall", Observed{Record: ours(Installed, want), Gone: true}, Leave, "uninstalled"},
		{"new build", Observed{Record: ours(Installed, older)}, Upgrade, "from 1.30.0"},
		{"new build after an uninstall", Observed{Record: ours(Installed, older), Gone: true, Changed: []string{"x"}}, Leave, "uninstalled"},
		{"new build beside a user's revision", Observed{Record: ours(Installed, older), Foreign: []string{"istiod-canary"}}, Leave, "canary"},
		{"new build after changes", Observed{Record: ours(Installed, older), Changed: []string{"a", "b", "c", "d", "e"}}, Leave, "a, b, c and 2 more"},
		{"other profile", Observed{Record: ours(Installed, Identity{Version: "1.31.0", Profile: "demo", Values: "cc"})}, Upgrade, "profile demo, to"},
		{"empty profile, then another", Observed{Record: &Record{Owner: Ours, Phase: Installed, Identity: older}}, Upgrade, ""},
		{"empty profile, user's install, then another", Observed{Record: &Record{Owner: Ours, Phase: Installed, Identity: older}, Foreign: []string{"Deployment istio-system/istiod"}}, Leave, "istiod"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			d := Decide(tc.o, want)
			if d.Action != tc.action || !strings.Contains(d.Reason, tc.reason) {
				t.Errorf("got %s (%s), want %s (...%s...)", d.Action, d.Reason, tc.action, tc.reason)
			}
		})
	}
}

func TestRecordRoundTrip(t *testing.T) {
	r := &Record{Owner: Ours, Phase: Installed, Identity: Identity{"v", "demo", "h"}, IngressClass: true, GatewayAPI: "v1.6.0 experimental", Telemetry: TelemetryRecord{"s", "p"}, Objects: map[string]string{ownPlane: "0123"}}
	data, err := r.data()
	if err != nil {
		t.Fatal(err)
	}
	back, err := parseRecord(data)
	if err != nil || !reflect.DeepEqual(r, back) {
		t.Errorf("got %+v, %v; want %+v", back, err, r)
	}
	data = maps.Clone(data)
	data["objects"] = "{"
	if _, err := parseRecord(data); err == nil || !strings.Contains(err.Error(), "delete it") {
		t.Errorf("a damaged record: %v", err)
	}
}
