package workload

import "testing"

func TestParse(t *testing.T) {
	whole := Workload{"b-v1", "demo", "b", "v1", "Kubernetes", "b", "1.0"}
	for text, want := range map[string]Workload{
		whole.String():           whole,
		Workload{}.String():      {},
		"b;demo;b;v1;Kubernetes": {Name: "b", Namespace: "demo", CanonicalService: "b", CanonicalRevision: "v1", Cluster: "Kubernetes"},
	} {
		if got, ok := Parse(text); !ok || got != want {
			t.Errorf("%q: got %+v, %v; want %+v", text, got, ok, want)
		}
	}
	for _, text := range []string{"", "b", "a;b;c;d", "a;b;c;d;e;f", "a;b;c;d;e;f;g;h"} {
		if got, ok := Parse(text); ok {
			t.Errorf("%q was read as %+v", text, got)
		}
	}
}

func TestLabelsFitValues(t *testing.T) {
	if len(Labels) != len(Workload{}.Values()) {
		t.Errorf("%d labels for %d values", len(Labels), len(Workload{}.Values()))
	}
}
