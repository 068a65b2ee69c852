//go:build integration

package bridge

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/clientcmd"

	"polymesh.dev/polymesh/pkg/controlplane/controlplanetest"
)

// listed is a read-only registry with these services.
type listed []Service

func (listed) String() string                                { return "http://registry.test/" }
func (l listed) Services(context.Context) ([]Service, error) { return l, nil }

// A hostile registry, on a real API server: no address of the cluster gets into the mesh, everything written is accepted by
// the server, and the report can be written.
func TestHostileRegistry(t *testing.T) {
	kubeconfig := controlplanetest.Start(t, slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn})))
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	config.QPS, config.Burst = 500, 500
	controlplanetest.InstallIstioTypes(t, config)
	at := func(id, address string) Instance { return Instance{ID: id, Address: address, Port: 80, State: Up} }
	registry := listed{
		{"good", []Instance{at("good", "192.0.2.10"), at("mapped", "::ffff:192.0.2.11")}},
		{"own", []Instance{at("api", "10.43.0.1"), at("dns", "10.43.0.10"), at("pod", "10.42.7.9"), at("node", "198.51.100.7"), at("metadata", "169.254.169.254")}},
		{"\x1b]0;title\a", []Instance{at("x", "192.0.2.12")}},
		{"strange", []Instance{at("\x00\x1b[2J\u202e", "192.0.2.13")}},
	}
	for i := range 400 {
		s := Service{Name: fmt.Sprintf("flood-%d", i)}
		for j := range 10 {
			s.Instances = append(s.Instances, at(strings.Repeat("\x01", 500)+fmt.Sprint(j), "169.254.169.254"))
		}
		registry = append(registry, s)
	}
	b, err := New(t.Context(), Options{Name: "eureka", Namespace: "bridges", Domain: "eureka.internal", Port: 80, Interval: time.Minute, MaxLoss: 50,
		Registry: registry, REST: config, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	node, err := b.cluster.core.CoreV1().Nodes().Create(t.Context(), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "a"}, Spec: corev1.NodeSpec{PodCIDR: "10.42.7.0/24", PodCIDRs: []string{"10.42.7.0/24"}}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	node.ResourceVersion = "" // whatever the controllers write meanwhile
	node.Status.Addresses = []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: "198.51.100.7"}, {Type: corev1.NodeHostName, Address: "a"}}
	if _, err := b.cluster.core.CoreV1().Nodes().UpdateStatus(t.Context(), node, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	report := b.pass(t.Context(), time.Now())
	if report.Error != "" {
		t.Fatal(report.Error)
	}
	entries, err := b.cluster.dynamic.Resource(workloadEntries).Namespace("bridges").List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var addresses []string
	for _, e := range entries.Items {
		addresses = append(addresses, e.Object["spec"].(map[string]any)["address"].(string))
	}
	slices.Sort(addresses)
	if want := []string{"192.0.2.10", "192.0.2.11", "192.0.2.13"}; !slices.Equal(addresses, want) {
		t.Errorf("in the mesh are %v, want %v", addresses, want)
	}
	for _, s := range report.Services {
		if s.Name == "own" && len(s.LeftOut) != 5 {
			t.Errorf("left out are %v", s.LeftOut)
		}
	}
	if err := b.save(t.Context(), report); err != nil {
		t.Fatal(err)
	}
	read, err := ReadReports(t.Context(), b.cluster.core, "bridges")
	if err != nil || len(read) != 1 || read[0].Omitted == nil || read[0].Omitted.Services == 0 {
		t.Fatalf("%d reports, %v", len(read), err)
	}
}
