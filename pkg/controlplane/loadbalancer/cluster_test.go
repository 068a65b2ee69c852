//go:build integration

package loadbalancer

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"

	"polymesh.dev/polymesh/pkg/controlplane/controlplanetest"
	"polymesh.dev/polymesh/pkg/node/announce"
)

// The component does its work with its own identity, which may do nothing else.
func TestOwnIdentity(t *testing.T) {
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	admins := controlplanetest.Start(t, log)
	own := filepath.Join(filepath.Dir(admins), "servicelb.kubeconfig")
	if info, err := os.Stat(own); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("its kubeconfig: %v %v", info, err)
	}
	admin, ctx := controlplanetest.Client(t, admins), t.Context()
	address := netip.MustParseAddr("192.0.2.1")
	l := New(Options{Kubeconfig: own, NodeName: "none", Addresses: []netip.Addr{address}, Reserved: ReservedPorts(6443), Log: log})
	if err := l.Start(ctx); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := l.Stop(ctx); err != nil {
			t.Error(err)
		}
	}()
	controlplanetest.Eventually(t, "the component is ready", func() error { return l.Ready(ctx) })

	services := admin.CoreV1().Services("default")
	setPort := func(port int) {
		t.Helper()
		patch := fmt.Sprintf(`[{"op":"replace","path":"/spec/ports/0/port","value":%d}]`, port)
		if _, err := services.Patch(ctx, "web", types.JSONPatchType, []byte(patch), metav1.PatchOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	wantAddresses := func(name string, want ...string) {
		t.Helper()
		controlplanetest.Eventually(t, "the addresses of service "+name, func() error {
			svc, err := services.Get(ctx, name, metav1.GetOptions{})
			if err != nil {
				return err
			}
			var got []string
			for _, in := range svc.Status.LoadBalancer.Ingress {
				got = append(got, in.IP)
			}
			if !slices.Equal(got, want) {
				return fmt.Errorf("they are %q, want %q", got, want)
			}
			return nil
		})
	}
	wantEvent := func(reason, message string, count int32) {
		t.Helper()
		controlplanetest.Eventually(t, "event "+reason, func() error {
			list, err := admin.CoreV1().Events("default").List(ctx, metav1.ListOptions{FieldSelector: "involvedObject.name=web"})
			if err != nil {
				return err
			}
			for _, e := range list.Items {
				if e.Reason == reason && strings.Contains(e.Message, message) && e.Count == count && e.Source.Component == l.Name() {
					return nil
				}
			}
			return fmt.Errorf("none among %d", len(list.Items))
		})
	}
	const free = 18081
	web := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: "web"}, Spec: corev1.ServiceSpec{Type: corev1.ServiceTypeLoadBalancer, Ports: []corev1.ServicePort{{Port: free}}}}
	if _, err := services.Create(ctx, web, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	wantAddresses("web", address.String())
	setPort(6443)
	wantAddresses("web")
	wantEvent(reasonPortInUse, "kube-apiserver", 1)
	setPort(free)
	wantAddresses("web", address.String())
	wantEvent("AddressAssigned", address.String(), 1)
	// The same once more is counted in the first event, which is a patch.
	setPort(6443)
	wantEvent(reasonPortInUse, "kube-apiserver", 2)
	if err := l.Ready(ctx); err != nil {
		t.Error(err)
	}

	testNodes(t, admin, wantAddresses)

	self := controlplanetest.Client(t, own)
	for what, f := range map[string]func() error{
		"get secrets": func() error {
			_, err := self.CoreV1().Secrets("default").Get(ctx, "x", metav1.GetOptions{})
			return err
		},
		"list secrets": func() error {
			_, err := self.CoreV1().Secrets("").List(ctx, metav1.ListOptions{})
			return err
		},
		"list pods": func() error {
			_, err := self.CoreV1().Pods("").List(ctx, metav1.ListOptions{})
			return err
		},
		"patch services": func() error {
			_, err := self.CoreV1().Services("default").Patch(ctx, "web", types.MergePatchType, []byte(`{"spec":{"externalIPs":["192.0.2.7"]}}`), metav1.PatchOptions{})
			return err
		},
		"delete services": func() error { return self.CoreV1().Services("default").Delete(ctx, "web", metav1.DeleteOptions{}) },
		"delete events":   func() error { return self.CoreV1().Events("default").Delete(ctx, "x", metav1.DeleteOptions{}) },
		"patch nodes": func() error {
			_, err := self.CoreV1().Nodes().Patch(ctx, "one", types.MergePatchType, []byte(`{"metadata":{"labels":{"a":"b"}}}`), metav1.PatchOptions{})
			return err
		},
		"delete endpoints": func() error {
			return self.DiscoveryV1().EndpointSlices("default").Delete(ctx, "x", metav1.DeleteOptions{})
		},
		"list cluster roles": func() error {
			_, err := self.RbacV1().ClusterRoles().List(ctx, metav1.ListOptions{})
			return err
		},
	} {
		if err := f(); !apierrors.IsForbidden(err) {
			t.Errorf("%s: %v, want it forbidden", what, err)
		}
	}
	if err := l.Stop(ctx); err != nil {
		t.Fatal(err)
	}
	t.Run("pool", func(t *testing.T) { testPool(t, admin, own, log) })
}

// One node announces the address of a service, and another one when that is lost or cordoned.
func testPool(t *testing.T, admin kubernetes.Interface, kubeconfig string, log *slog.Logger) {
	ctx, services := t.Context(), admin.CoreV1().Services("default")
	for i, name := range []string{"pool-a", "pool-b"} {
		controlplanetest.ReadyNode(t, admin, name, fmt.Sprint("198.51.100.", i))
	}
	l := New(Options{
		Kubeconfig: kubeconfig, NodeName: "none", Addresses: []netip.Addr{netip.MustParseAddr("192.0.2.1")}, Log: log,
		Pool: pool("198.51.100.0-198.51.100.9"),
	})
	if err := l.Start(ctx); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := l.Stop(context.Background()); err != nil {
			t.Error(err)
		}
	}()
	if _, err := services.Create(ctx, &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: "pooled"}, Spec: corev1.ServiceSpec{
		Type: corev1.ServiceTypeLoadBalancer, LoadBalancerIP: "198.51.100.5", Ports: []corev1.ServicePort{{Port: 80}},
	}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	announcer := func(what string, want ...string) (node string) {
		t.Helper()
		controlplanetest.Eventually(t, what, func() error {
			svc, err := services.Get(ctx, "pooled", metav1.GetOptions{})
			if err != nil {
				return err
			}
			node = svc.Annotations[announce.Annotation]
			if in := svc.Status.LoadBalancer.Ingress; len(in) != 1 || in[0].IP != "198.51.100.5" || !slices.Contains(want, node) {
				return fmt.Errorf("%q announces %v, want one of %q", node, in, want)
			}
			return nil
		})
		return node
	}
	first := announcer("a node", "pool-a", "pool-b")
	other := map[string]string{"pool-a": "pool-b", "pool-b": "pool-a"}[first]
	cordon := func(node string, on bool) {
		t.Helper()
		if _, err := admin.CoreV1().Nodes().Patch(ctx, node, types.MergePatchType, fmt.Appendf(nil, `{"spec":{"unschedulable":%t}}`, on), metav1.PatchOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	cordon(first, true)
	announcer("the node is cordoned", other)
	cordon(first, false)
	controlplanetest.Eventually(t, "event NodeAssigned", func() error {
		list, err := admin.CoreV1().Events("default").List(ctx, metav1.ListOptions{FieldSelector: "involvedObject.name=pooled,reason=NodeAssigned"})
		if err != nil {
			return err
		}
		var nodes []string
		for _, e := range list.Items {
			nodes = append(nodes, e.Message)
		}
		slices.Sort(nodes)
		if want := []string{"node pool-a announces [198.51.100.5]", "node pool-b announces [198.51.100.5]"}; !slices.Equal(nodes, want) {
			return fmt.Errorf("events %q", nodes)
		}
		return nil
	})
	// A user's text is replaced.
	if _, err := services.Patch(ctx, "pooled", types.MergePatchType, fmt.Appendf(nil, `{"metadata":{"annotations":{%q:"no node"}}}`, announce.Annotation), metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	now := announcer("after a user's change", "pool-a", "pool-b")
	if err := admin.CoreV1().Nodes().Delete(ctx, now, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	announcer("the node is gone", map[string]string{"pool-a": "pool-b", "pool-b": "pool-a"}[now])
	// The services of before have addresses of their own now, but none of a node.
	controlplanetest.Eventually(t, "the other services", func() error {
		svc, err := services.Get(ctx, "web", metav1.GetOptions{})
		if err != nil {
			return err
		}
		// Which one depends on the order in which the services come.
		if in := svc.Status.LoadBalancer.Ingress; len(in) != 1 || !strings.HasPrefix(in[0].IP, "198.51.100.") || slices.Contains([]string{"198.51.100.0", "198.51.100.1", "198.51.100.5"}, in[0].IP) {
			return fmt.Errorf("web has %v", in)
		}
		return nil
	})
}

// Services get the addresses of the nodes that come, and no longer those of nodes that go; with externalTrafficPolicy Local, those of the
// nodes with a ready endpoint.
func testNodes(t *testing.T, admin kubernetes.Interface, wantAddresses func(name string, want ...string)) {
	ctx, nodes := t.Context(), admin.CoreV1().Nodes()
	const own, free = "192.0.2.1", 18081
	patch := `[{"op":"replace","path":"/spec/ports/0/port","value":%d}]`
	if _, err := admin.CoreV1().Services("default").Patch(ctx, "web", types.JSONPatchType, fmt.Appendf(nil, patch, free), metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	wantAddresses("web", own)
	for i, name := range []string{"two", "one"} {
		status := corev1.NodeStatus{
			Addresses:  []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: fmt.Sprint("192.0.2.1", i)}, {Type: corev1.NodeExternalIP, Address: fmt.Sprint("203.0.113.1", i)}},
			Conditions: []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue, LastHeartbeatTime: metav1.Now()}},
		}
		node, err := nodes.Create(ctx, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		node.Status, node.ResourceVersion = status, "" // whatever the controllers write meanwhile
		if _, err := nodes.UpdateStatus(ctx, node, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	wantAddresses("web", own, "203.0.113.11", "192.0.2.11", "203.0.113.10", "192.0.2.10")

	mine, name, port := announce.Class, "local", int32(18082)
	if _, err := admin.CoreV1().Services("default").Create(ctx, &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.ServiceSpec{
		Type: corev1.ServiceTypeLoadBalancer, LoadBalancerClass: &mine, ExternalTrafficPolicy: corev1.ServiceExternalTrafficPolicyLocal, Ports: []corev1.ServicePort{{Port: port}},
	}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	slice := &discoveryv1.EndpointSlice{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{discoveryv1.LabelServiceName: name}}, AddressType: discoveryv1.AddressTypeIPv4}
	for i, node := range []string{"one", "two"} {
		ready := node == "two"
		slice.Endpoints = append(slice.Endpoints, discoveryv1.Endpoint{NodeName: &node, Addresses: []string{fmt.Sprint("10.42.0.1", i)}, Conditions: discoveryv1.EndpointConditions{Ready: &ready}})
	}
	endpoints := admin.DiscoveryV1().EndpointSlices("default")
	slice, err := endpoints.Create(ctx, slice, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	wantAddresses(name, "203.0.113.10", "192.0.2.10")
	slice.Endpoints[0].Conditions.Ready = slice.Endpoints[1].Conditions.Ready
	if slice, err = endpoints.Update(ctx, slice, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	wantAddresses(name, "203.0.113.11", "192.0.2.11", "203.0.113.10", "192.0.2.10")
	slice.Endpoints = slice.Endpoints[:1]
	if _, err := endpoints.Update(ctx, slice, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	wantAddresses(name, "203.0.113.11", "192.0.2.11")

	if _, err := nodes.Patch(ctx, "two", types.MergePatchType, []byte(`{"metadata":{"labels":{"node.kubernetes.io/exclude-from-external-load-balancers":""}}}`), metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	wantAddresses("web", own, "203.0.113.11", "192.0.2.11")
	if err := nodes.Delete(ctx, "one", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	wantAddresses("web", own)
	wantAddresses(name)
}
