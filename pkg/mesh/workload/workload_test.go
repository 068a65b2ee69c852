package workload

import (
	"strings"
	"testing"
)

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

// Labels that the canonical names let expect are not said, and all come back.
func TestLabelsApart(t *testing.T) {
	for _, c := range []struct {
		w    Workload
		want string
	}{
		{Workload{CanonicalService: "b", CanonicalRevision: "v1", App: "b", Version: "v1"}, ""},
		{Workload{CanonicalService: "b", CanonicalRevision: "latest", App: "b"}, ""},
		{Workload{}, ""},
		{Workload{CanonicalService: "b", CanonicalRevision: "v1", App: "c", Version: "v1"}, "c;v1"},
		{Workload{CanonicalService: "b", CanonicalRevision: "latest", App: "b", Version: "latest"}, "b;latest"},
		{Workload{CanonicalService: "b", CanonicalRevision: "latest"}, ";"},
	} {
		w := c.w
		w.Name, w.Namespace, w.Cluster = "b-1", "demo", "Kubernetes"
		said := w
		said.App, said.Version = "", ""
		split, ok := Split([]byte(strings.TrimSuffix(said.String(), ";;")))
		if !ok || string(split.Namespace()) != "demo" {
			t.Fatalf("%+v was split into %q, %v", said, split, ok)
		}
		got := split.LabelsApart(w.App, w.Version)
		if got != c.want {
			t.Errorf("%+v: %q, want %q", w, got, c.want)
		}
		if back := said.WithLabels(got); back != w {
			t.Errorf("%+v became %+v", w, back)
		}
	}
	for _, text := range []string{"", "b", "a;b;c;d", "a;b;c;d;e;f"} {
		if split, ok := Split([]byte(text)); ok {
			t.Errorf("%q was split into %q", text, split)
		}
	}
}
