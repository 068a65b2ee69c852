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
		got := c.w.LabelsApart()
		if got != c.want {
			t.Errorf("%+v: %q, want %q", c.w, got, c.want)
		}
		said := c.w
		said.App, said.Version = "", ""
		if back := said.WithLabels(got); back != c.w {
			t.Errorf("%+v became %+v", c.w, back)
		}
	}
}
