package external

import (
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	corelisters "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"

	"polymesh.dev/polymesh/pkg/config"
)

var (
	ownAddress      = netip.MustParseAddr("192.0.2.1")
	externalAddress = netip.MustParseAddr("203.0.113.1")
)

func testNode(name string, addresses ...string) *corev1.Node {
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, UID: "uid"}}
	for i, a := range addresses {
		kind := corev1.NodeInternalIP
		if i > 0 {
			kind = corev1.NodeExternalIP
		}
		n.Status.Addresses = append(n.Status.Addresses, corev1.NodeAddress{Type: kind, Address: a})
	}
	n.Status.Addresses = append(n.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeHostName, Address: name})
	return n
}

func TestOf(t *testing.T) {
	for name, c := range map[string]struct {
		settings config.Node
		want     bool
	}{
		"none":                {config.Node{}, false},
		"one":                 {config.Node{ExternalIP: externalAddress}, true},
		"the own address":     {config.Node{ExternalIP: ownAddress}, false},
		"user's provider":     {config.Node{ExternalIP: externalAddress, KubeletArgs: []string{"cloud-provider=external"}}, false},
		"user's addresses":    {config.Node{ExternalIP: externalAddress, KubeletArgs: []string{"--node-ip=192.0.2.1,2001:db8::1"}}, false},
		"another kubelet-arg": {config.Node{ExternalIP: externalAddress, KubeletArgs: []string{"v=2"}}, true},
	} {
		if a, ok := Of(c.settings, ownAddress); ok != c.want || ok && a != externalAddress {
			t.Errorf("%s: %s, %v", name, a, ok)
		}
	}
}

// What is written is the own node's status only, and nothing if it is as it has to be or another node has the address.
func TestSync(t *testing.T) {
	announced := testNode("node", "192.0.2.1", "203.0.113.1")
	announced.Annotations = map[string]string{Annotation: "203.0.113.1"}
	without := testNode("node", "192.0.2.1")
	without.Annotations = announced.Annotations
	other := []corev1.Node{*testNode("other", "192.0.2.2", "::ffff:203.0.113.1")}
	for name, c := range map[string]struct {
		node   *corev1.Node
		others []corev1.Node
		wrote  []string // addresses
		err    string
	}{
		"as the kubelet registers it":       {testNode("node", "192.0.2.1"), nil, []string{"192.0.2.1", "203.0.113.1"}, ""},
		"with other addresses before":       {testNode("node", "192.0.2.9", "203.0.113.9"), []corev1.Node{*testNode("other", "192.0.2.2")}, []string{"192.0.2.1", "203.0.113.1"}, ""},
		"announced":                         {announced, nil, nil, ""},
		"not registered":                    {nil, nil, nil, "not registered"},
		"another node has the address":      {testNode("node", "192.0.2.9"), other, []string{"192.0.2.1"}, "node other has the address 203.0.113.1 already"},
		"another node still has it":         {without, other, nil, "node other has the address 203.0.113.1 already"},
		"another node does not have it now": {without, nil, []string{"192.0.2.1", "203.0.113.1"}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			var wrote []string
			api := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("Content-Type", "application/json")
				if r.Method != http.MethodPatch {
					list := corev1.NodeList{TypeMeta: metav1.TypeMeta{Kind: "NodeList", APIVersion: "v1"}, Items: c.others}
					if c.node != nil {
						list.Items = append(list.Items, *c.node)
					}
					_ = json.NewEncoder(w).Encode(list)
					return
				}
				text, _ := io.ReadAll(r.Body)
				wrote = append(wrote, r.URL.Path, string(text))
				_ = json.NewEncoder(w).Encode(corev1.Node{TypeMeta: metav1.TypeMeta{Kind: "Node", APIVersion: "v1"}})
			}))
			defer api.Close()
			client, err := kubernetes.NewForConfig(&rest.Config{Host: api.URL})
			if err != nil {
				t.Fatal(err)
			}
			cached := cache.NewIndexer(cache.MetaNamespaceKeyFunc, nil)
			if c.node != nil {
				if err := cached.Add(c.node); err != nil {
					t.Fatal(err)
				}
			}
			a := New(Options{Node: "node", IP: ownAddress, External: externalAddress, Log: slog.New(slog.DiscardHandler)})
			a.client, a.nodes = client, corelisters.NewNodeLister(cached)
			err = a.sync(t.Context())
			if (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) {
				t.Errorf("error %v, want %q", err, c.err)
			}
			if c.wrote == nil {
				if len(wrote) > 0 {
					t.Errorf("wrote %q", wrote)
				}
				return
			}
			if len(wrote) != 2 || wrote[0] != "/api/v1/nodes/node/status" {
				t.Fatalf("wrote %q", wrote)
			}
			var got corev1.Node
			if err := json.Unmarshal([]byte(wrote[1]), &got); err != nil {
				t.Fatal(err)
			}
			if want := testNode("node", c.wrote...).Status.Addresses; !slices.Equal(got.Status.Addresses, want) {
				t.Errorf("addresses %v, want %v", got.Status.Addresses, want)
			}
			if got.UID != "uid" || got.Annotations[Annotation] != "203.0.113.1" {
				t.Errorf("metadata %+v", got.ObjectMeta)
			}
		})
	}
}
