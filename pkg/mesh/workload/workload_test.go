package workload

import (
	"slices"
	"strings"
	"testing"
)

// hostile are texts with every separator in use, and characters that break a certificate, a metric or a log.
var hostile = []string{
	",", ";", "|", "\n", "\r", "%", "/", "=", "\x00", " ", "\"", "'", "\\", "{", "}", ":", "\u2028", "é", "\xff", "-", ".", "_",
	"x;y", "x|y", "x,spiffe://cluster.local/ns/bank/sa/payments,y", "x\ny", "%REQ(a)%", "a/b", "a=b", "a\x00b", "аpp", "x-", "-x", strings.Repeat("a", 254),
}

// Invalid names are never written, and a text that contains one is not accepted, in any field.
func TestHostileValues(t *testing.T) {
	whole := Workload{"b-v1", "demo", "b", "v1", "Kubernetes", "b", "1.0"}
	for field := range whole.Values() {
		for _, text := range hostile {
			values := whole.Values()
			values[field] = text
			w := Workload{values[0], values[1], values[2], values[3], values[4], values[5], values[6]}
			want := whole.Values()
			want[field] = ""
			if got := w.Named().Values(); !slices.Equal(got, want) {
				t.Errorf("%s %q: %q, want %q", Labels[field], text, got, want)
			}
			if got, ok := Parse(w.String()); !ok || !slices.Equal(got.Values(), want) {
				t.Errorf("%s %q is written as %q", Labels[field], text, w.String())
			}
			raw := strings.Join(values, ";")
			if got, ok := Parse(raw); ok {
				t.Errorf("%q was read as %+v", raw, got)
			}
			if field < len(Endpoint{}) {
				raw = strings.Join(values[:len(Endpoint{})], ";")
				if got, ok := Split([]byte(raw)); ok {
					t.Errorf("%q was split into %q", raw, got)
				}
			}
			for _, apart := range []string{text + ";1", "a;" + text} {
				if got := (Workload{}).WithLabels(apart); got != (Workload{}) {
					t.Errorf("labels %q were read as %+v", apart, got)
				}
			}
		}
	}
}

// Whatever Kubernetes accepts as a name is accepted.
func TestNamed(t *testing.T) {
	long := strings.Repeat("a", 63) + "." + strings.Repeat("b", 63)
	for _, w := range []Workload{
		{},
		{Name: long, Namespace: "a-1", CanonicalService: long, CanonicalRevision: "V1_2.3", Cluster: "Kubernetes", App: "B", Version: "1.0"},
		{Name: "Some_Label.value"},
	} {
		if got, ok := Parse(w.String()); !ok || got != w {
			t.Errorf("%+v is written as %q", w, w.String())
		}
	}
}

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

// Labels equal to the canonical names are omitted, and restored on reading.
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
		bare := w
		bare.App, bare.Version = "", ""
		split, ok := Split([]byte(strings.TrimSuffix(bare.String(), ";;")))
		if !ok || string(split.Namespace()) != "demo" {
			t.Fatalf("%+v was split into %q, %v", bare, split, ok)
		}
		got := split.LabelsApart(w.App, w.Version)
		if got != c.want {
			t.Errorf("%+v: %q, want %q", w, got, c.want)
		}
		if back := bare.WithLabels(got); back != w {
			t.Errorf("%+v became %+v", w, back)
		}
	}
	for _, text := range []string{"", "b", "a;b;c;d", "a;b;c;d;e;f"} {
		if split, ok := Split([]byte(text)); ok {
			t.Errorf("%q was split into %q", text, split)
		}
	}
}

func TestIsPrincipal(t *testing.T) {
	for _, id := range []string{"spiffe://cluster.local/ns/demo/sa/b", "spiffe://Mesh_1/ns/a-b/sa/c.d", "spiffe://td/x"} {
		if !IsPrincipal(id) {
			t.Errorf("%s is rejected", id)
		}
	}
	bad := []string{"", "-", "spiffe://", "spiffe:///ns/a", "spiffe://td", "spiffe://td/", "spiffe://td//a", "https://td/a", "SPIFFE://td/a", "spiffe://td/a,spiffe://td/b"}
	for _, text := range hostile {
		if text != "/" && text != "a/b" {
			bad = append(bad, "spiffe://cluster.local/ns/demo/sa/"+text, "spiffe://"+text+"/ns/demo/sa/b")
		}
	}
	for _, id := range bad {
		if IsPrincipal(id) {
			t.Errorf("%q is accepted", id)
		}
	}
}
