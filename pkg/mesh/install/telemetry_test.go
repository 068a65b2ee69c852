package install

import (
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

func TestDecideTelemetry(t *testing.T) {
	recorded := TelemetryRecord{Spec: "new", Print: "p"}
	ours := ObservedTelemetry{Live: true, Ours: true, Print: "p"}
	with := func(o ObservedTelemetry, others ...string) ObservedTelemetry { o.Others = others; return o }
	for _, tc := range []struct {
		name   string
		record TelemetryRecord
		o      ObservedTelemetry
		want   string
		action Action
		reason string
	}{
		{"first start", TelemetryRecord{}, ObservedTelemetry{}, "new", Install, "none"},
		{"interrupted before the record", TelemetryRecord{}, ours, "new", Finish, "not recorded"},
		{"again", recorded, ours, "new", Keep, "as applied"},
		{"other settings", TelemetryRecord{Spec: "old", Print: "p"}, ours, "new", Upgrade, "differ"},
		{"deleted by the user", recorded, ObservedTelemetry{}, "new", Leave, "removed"},
		{"deleted by the user, other settings", TelemetryRecord{Spec: "old", Print: "p"}, ObservedTelemetry{}, "new", Leave, "removed"},
		{"changed by the user", recorded, ObservedTelemetry{Live: true, Ours: true, Print: "q"}, "new", Leave, "changed"},
		{"changed by the user, store off", recorded, ObservedTelemetry{Live: true, Ours: true, Print: "q"}, "", Leave, "changed"},
		{"the user's of that name", TelemetryRecord{}, ObservedTelemetry{Live: true, Print: ""}, "new", Leave, "created"},
		{"the user's for the mesh was first", TelemetryRecord{}, with(ObservedTelemetry{}, "mesh-default"), "new", Leave, "mesh-default"},
		{"the user's for the mesh comes", recorded, with(ours, "mesh-default"), "new", Remove, "mesh-default"},
		{"it came, and ours was changed", recorded, with(ObservedTelemetry{Live: true, Ours: true, Print: "q"}, "mesh-default"), "new", Leave, "changed"},
		{"store off", recorded, ours, "", Remove, "off"},
		{"store off from the beginning", TelemetryRecord{}, ObservedTelemetry{}, "", Keep, "off"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if d := DecideTelemetry(tc.record, tc.o, tc.want); d.Action != tc.action || !strings.Contains(d.Reason, tc.reason) {
				t.Errorf("got %s (%s), want %s (...%s...)", d.Action, d.Reason, tc.action, tc.reason)
			}
		})
	}
}

func TestMeshWide(t *testing.T) {
	for text, want := range map[string]bool{
		`{"spec":{"tracing":[{"disableSpanReporting":true}]}}`: true,
		`{"spec":{}}`:              true,
		`{"spec":{"selector":{}}}`: true,
		`{"spec":{"selector":{"matchLabels":{"app":"gateway"}}}}`: false,
		`{"spec":{"targetRefs":[{"kind":"Gateway","name":"g"}]}}`: false,
		`{"spec":{"targetRef":{"kind":"Gateway","name":"g"}}}`:    false,
	} {
		obj := &unstructured.Unstructured{}
		if err := obj.UnmarshalJSON([]byte(`{"apiVersion":"telemetry.istio.io/v1","kind":"Telemetry",` + text[1:])); err != nil {
			t.Fatal(err)
		}
		if got := meshWide(obj); got != want {
			t.Errorf("%s: %t", text, got)
		}
	}
}

func TestTelemetrySpec(t *testing.T) {
	if s := (Telemetry{}).spec(); s != nil {
		t.Errorf("nothing is %v", s)
	}
	all, err := hashOf(Telemetry{Traces: true, AccessLogs: true}.spec())
	if err != nil {
		t.Fatal(err)
	}
	if one, err := hashOf(Telemetry{AccessLogs: true}.spec()); err != nil || one == all || one == "" {
		t.Errorf("%q, %q, %v", one, all, err)
	}
}
