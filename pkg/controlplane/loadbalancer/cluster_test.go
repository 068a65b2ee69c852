//go:build integration

package loadbalancer

import (
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"polymesh.dev/polymesh/pkg/controlplane/controlplanetest"
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
	l := New(Options{Kubeconfig: own, NodeName: "none", Addresses: []netip.Addr{address}, LinkAlias: t.Name(), Reserved: ReservedPorts(6443), Log: log})
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
	wantAddress := func(want string) {
		t.Helper()
		controlplanetest.Eventually(t, "the address of the service", func() error {
			svc, err := services.Get(ctx, "web", metav1.GetOptions{})
			if err != nil {
				return err
			}
			got := ""
			if in := svc.Status.LoadBalancer.Ingress; len(in) > 0 {
				got = in[0].IP
			}
			if got != want {
				return fmt.Errorf("it is %q, want %q", got, want)
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
	wantAddress(address.String())
	setPort(6443)
	wantAddress("")
	wantEvent(reasonPortInUse, "kube-apiserver", 1)
	setPort(free)
	wantAddress(address.String())
	wantEvent("AddressAssigned", address.String(), 1)
	// The same once more is counted in the first event, which is a patch.
	setPort(6443)
	wantEvent(reasonPortInUse, "kube-apiserver", 2)
	if err := l.Ready(ctx); err != nil {
		t.Error(err)
	}

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
		"list cluster roles": func() error {
			_, err := self.RbacV1().ClusterRoles().List(ctx, metav1.ListOptions{})
			return err
		},
	} {
		if err := f(); !apierrors.IsForbidden(err) {
			t.Errorf("%s: %v, want it forbidden", what, err)
		}
	}
}
