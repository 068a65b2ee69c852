//go:build integration

package apilb

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"net/url"
	"path/filepath"
	"slices"
	"testing"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/clientcmd"

	"polymesh.dev/polymesh/pkg/certificate"
	"polymesh.dev/polymesh/pkg/controlplane/controlplanetest"
)

// With a real API server: the node's certificate is enough for the check and the list, the list is that of the cluster, and the node can
// read no other EndpointSlice.
func TestCluster(t *testing.T) {
	kubeconfig := controlplanetest.Start(t, slog.New(slog.DiscardHandler))
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	server, err := url.Parse(config.Host)
	if err != nil {
		t.Fatal(err)
	}
	store := certificate.Store(filepath.Dir(config.CAFile))
	b := balancer(t, store, func(b *Balancer) { b.opts.Server = server.Host })
	eventually(t, "the server is healthy", func() error { return b.Ready(t.Context()) })
	local := netip.MustParseAddrPort(server.Host)
	want := netip.AddrPortFrom(netip.MustParseAddr("192.0.2.1"), local.Port()) // what controlplanetest's server advertises
	eventually(t, "the list is the cluster's, and is kept", func() error {
		known, err := readState(b.opts.State, netip.AddrPort{})
		if err == nil && !slices.Equal(known, []netip.AddrPort{want}) {
			err = fmt.Errorf("it is %v, want %s", known, want)
		}
		return err
	})
	client, err := b.client(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	admin := controlplanetest.Client(t, kubeconfig)
	list := admin.DiscoveryV1().EndpointSlices(metav1.NamespaceDefault)
	object, err := list.Get(t.Context(), slice, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client.DiscoveryV1().EndpointSlices(metav1.NamespaceDefault).Get(t.Context(), slice, metav1.GetOptions{}); err != nil {
		t.Errorf("the list through the balancer: %v", err)
	}
	for namespace, name := range map[string]string{metav1.NamespaceDefault: "other", metav1.NamespaceSystem: slice} {
		if _, err := client.DiscoveryV1().EndpointSlices(namespace).Get(t.Context(), name, metav1.GetOptions{}); !apierrors.IsForbidden(err) {
			t.Errorf("the node reads EndpointSlice %s of %s: %v", name, namespace, err)
		}
	}
	object.Endpoints[0].Addresses = append(object.Endpoints[0].Addresses, "192.0.2.2")
	if _, err := list.Update(t.Context(), object, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	// The API server itself restores the object within seconds.
	eventually(t, "a change arrives", func() error {
		for _, s := range b.view.Load().servers {
			if s.addr.Addr() == netip.MustParseAddr("192.0.2.2") {
				return nil
			}
		}
		return errors.New("not yet")
	})
}
