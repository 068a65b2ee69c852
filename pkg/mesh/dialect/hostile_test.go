package dialect

import (
	"fmt"
	"strings"
	"testing"

	cluster "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpoint "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"
)

// hostileTexts are possible values of an owner reference or annotation that contain separators used anywhere.
func hostileTexts() (texts []string) {
	for _, separator := range []string{",", ";", "|", "\n", "%", "/", "=", "\x00", "\u2028", "，", " ", "\"", "\\"} {
		texts = append(texts, separator, "x"+separator+"y", "x"+separator, strings.Repeat("x"+separator, 4), "%REQ(authorization)%"+separator)
	}
	return append(texts, "x;demo;payments;v1;Kubernetes", strings.Repeat("x", 300))
}

func metadataOf(t *testing.T, namespace string, fields map[string]any) *core.Metadata {
	t.Helper()
	s, err := structpb.NewStruct(fields)
	if err != nil {
		t.Fatal(err)
	}
	return &core.Metadata{FilterMetadata: map[string]*structpb.Struct{namespace: s, "other": {Fields: map[string]*structpb.Value{"a": structpb.NewStringValue("b")}}}}
}

// Clients receive nothing about an endpoint's workload that is not a valid name; everything else about the endpoint stays.
func TestHostileEndpoints(t *testing.T) {
	translator := NewTranslator(ShippedEnvoy(), nil)
	names := []string{"b-v1", "demo", "b", "v1", "Kubernetes"}
	for field := range names {
		for _, text := range append(hostileTexts(), names[field]) {
			values := append([]string{}, names...)
			values[field] = text
			before := &endpoint.ClusterLoadAssignment{ClusterName: "outbound|80||b.demo.svc.cluster.local", Endpoints: []*endpoint.LocalityLbEndpoints{{
				LbEndpoints: []*endpoint.LbEndpoint{{
					Metadata: metadataOf(t, istioMetadata, map[string]any{workloadKey: strings.Join(values, ";"), "tlsMode": "istio"}),
				}},
			}}}
			packed, err := pack(before)
			if err != nil {
				t.Fatal(err)
			}
			result := translator.Resource(packed)
			after := &endpoint.ClusterLoadAssignment{}
			if err := result.Resource.UnmarshalTo(after); err != nil {
				t.Fatal(err)
			}
			// Labels of the dialect's own, none of which are known here.
			delete(after.Endpoints[0].LbEndpoints[0].Metadata.FilterMetadata, ownMetadata)
			want := before
			if text != names[field] {
				want = proto.Clone(before).(*endpoint.ClusterLoadAssignment)
				want.Endpoints[0].LbEndpoints[0].Metadata.FilterMetadata[istioMetadata].Fields[workloadKey] = structpb.NewStringValue("")
			}
			if !proto.Equal(after, want) {
				t.Errorf("%q became %v", values, after)
			}
			if again := translator.Resource(result.Resource); !proto.Equal(again.Resource, result.Resource) {
				t.Errorf("%q: translated again, it is %v", values, again.Resource)
			}
		}
	}
}

// A service with an invalid host, name or namespace does not become a label.
func TestHostileServices(t *testing.T) {
	for _, field := range []string{"host", "name", "namespace", ""} {
		for _, text := range hostileTexts() {
			if len(text) == 300 {
				continue // valid except for its length
			}
			service := map[string]any{"host": "b.demo.svc.cluster.local", "name": "b", "namespace": "demo"}
			want := "b.demo.svc.cluster.local;b;demo"
			if field != "" {
				service[field], want = text, ""
			}
			encoded, err := proto.Marshal(&cluster.Cluster{Metadata: metadataOf(t, istioMetadata, map[string]any{"services": []any{service}})})
			if err != nil {
				t.Fatal(err)
			}
			if got := serviceOf(encoded); got != want {
				t.Errorf("%v: %q, want %q", service, got, want)
			}
		}
	}
}

// Label values and remembered cases that depend on user-supplied names are bounded.
func TestReporterIsBounded(t *testing.T) {
	r := newReporter()
	counted := map[string]bool{}
	for i := range maxTypes + 10 {
		counted[r.counted(fmt.Sprint("type.", i))] = true
	}
	counted[r.counted(strings.Repeat("x", maxText+1))] = true
	if len(counted) != maxTypes+1 || !counted[otherTypes] || r.counted("type.0") != "type.0" {
		t.Errorf("%d types are counted separately", len(counted))
	}
	for i := range maxLogged + 10 {
		r.remember(fmt.Sprint(i))
	}
	if n := r.logged.Len(); n > maxLogged {
		t.Errorf("%d cases are remembered", n)
	}
	if r.remember("new") || !r.remember("new") {
		t.Error("a case is logged twice, or not at all")
	}
	for text, want := range map[string]string{
		"a/b.c": "a/b.c", "a\nb": `"a\nb"`, "\x1b[2J": `"\x1b[2J"`, "\u2028": `"\u2028"`, strings.Repeat("x", maxText+1): strings.Repeat("x", maxText) + "...",
	} {
		if got := quoted(text); got != want {
			t.Errorf("%q is logged as %s", text, got)
		}
	}
}
