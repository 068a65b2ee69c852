package dialect

import (
	"bytes"
	"encoding/binary"
	"testing"

	cluster "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpoint "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/structpb"
)

// TestMemo: a resource is translated only once, and resources that differ slightly are not confused.
func TestMemo(t *testing.T) {
	tr := NewTranslator(ShippedEnvoy(), nil)
	for _, m := range []proto.Message{
		&cluster.Cluster{Name: "BlackHoleCluster"},
		&listener.Listener{Name: "plain", TrafficDirection: core.TrafficDirection_OUTBOUND},
	} {
		in := mustPack(m)
		first := tr.Resource(in)
		again := tr.Resource(&anypb.Any{TypeUrl: in.TypeUrl, Value: bytes.Clone(in.Value)})
		if !proto.Equal(first.Resource, again.Resource) || first.Refused != nil || again.Refused != nil {
			t.Errorf("%v became %v, and then %v", m, first, again)
		}
		if changed := first.Resource != in; changed && again.Resource != first.Resource {
			t.Errorf("%v was translated twice", m)
		}
	}
	// The same bytes, of another type.
	black := mustPack(&cluster.Cluster{Name: "BlackHoleCluster"})
	as := &anypb.Any{TypeUrl: mustPack(&core.TypedExtensionConfig{}).TypeUrl, Value: black.Value}
	if got := tr.Resource(as); got.Resource != as {
		t.Errorf("%v became %v", as, got)
	}
}

// TestMemoOfEndpoints: endpoint labels are not part of the generated resource, and can change.
func TestMemoOfEndpoints(t *testing.T) {
	version := "v1"
	tr := NewTranslator(ShippedEnvoy(), func(string, string) map[string]map[string]string {
		return map[string]map[string]string{"10.0.0.1": {"version": version}}
	})
	workload, err := structpb.NewStruct(map[string]any{"workload": "a;demo;a;v1;Kubernetes"})
	if err != nil {
		t.Fatal(err)
	}
	in := mustPack(&endpoint.ClusterLoadAssignment{
		ClusterName: "outbound|80||a.demo.svc.cluster.local",
		Endpoints: []*endpoint.LocalityLbEndpoints{{LbEndpoints: []*endpoint.LbEndpoint{{
			HostIdentifier: &endpoint.LbEndpoint_Endpoint{Endpoint: &endpoint.Endpoint{Address: &core.Address{Address: &core.Address_SocketAddress{
				SocketAddress: &core.SocketAddress{Address: "10.0.0.1"},
			}}}},
			Metadata: &core.Metadata{FilterMetadata: map[string]*structpb.Struct{istioMetadata: workload}},
		}}}},
	})
	first := tr.Resource(in)
	version = "v2"
	if then := tr.Resource(in); first.Refused != nil || then.Refused != nil || !bytes.Contains(then.Resource.Value, []byte(";v2")) || bytes.Contains(first.Resource.Value, []byte(";v2")) {
		t.Errorf("first %v, then %v", first, then)
	}
}

// TestMemoSize: the oldest entries are evicted when there is no room.
func TestMemoSize(t *testing.T) {
	m := newMemo()
	const size = 1 << 20
	for i := range 3 * memoSize / size {
		value := make([]byte, size)
		binary.BigEndian.PutUint32(value, uint32(i))
		m.result(&anypb.Any{Value: value}, func() Result { return Result{Resource: &anypb.Any{Value: value[:1]}} })
	}
	if kept := m.entries.Len(); m.size > memoSize || kept == 0 || m.size != kept*(size+1) {
		t.Errorf("%d entries are kept, of %d bytes", kept, m.size)
	}
}
