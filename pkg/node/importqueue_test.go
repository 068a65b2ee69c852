package node

import (
	"context"
	"errors"
	"testing"

	"polymesh.dev/polymesh/pkg/imagestore"
)

// What waits for an image gets it next, and only then continues.
func TestAwaitedImagesComeFirst(t *testing.T) {
	const pause, dns, istio = imagestore.ShippedRegistry + "/pause:1", imagestore.ShippedRegistry + "/coredns:1", imagestore.ShippedRegistry + "/istio/proxyv2:1"
	i := &Images{shipped: newImportQueue([]string{pause, dns, istio})}
	i.shipped.keep([]string{dns, istio})
	if err := i.Await(t.Context(), pause); err != nil {
		t.Fatal(err)
	}
	got := make(chan error)
	ask := func(ref string) { go func() { got <- i.Await(context.WithoutCancel(t.Context()), ref) }() }
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	// A caller that gives up has still moved it to the front.
	if err := i.Await(ended, istio); !errors.Is(err, context.Canceled) {
		t.Fatalf("error is %v", err)
	}
	ask(istio)
	if ref := i.shipped.next(); ref != istio {
		t.Fatalf("next is %s", ref)
	}
	select {
	case err := <-got:
		t.Fatalf("it has not waited: %v", err)
	default:
	}
	i.shipped.imported(istio)
	if err := <-got; err != nil {
		t.Fatal(err)
	}
	if n := i.shipped.left(); n != 1 {
		t.Errorf("%d are missing", n)
	}
	// A name by digest may be any image's.
	ask(imagestore.ShippedRegistry + "/coredns@sha256:0000000000000000000000000000000000000000000000000000000000000000")
	if ref := i.shipped.next(); ref != dns {
		t.Fatalf("next is %s", ref)
	}
	i.shipped.imported(dns)
	if err := <-got; err != nil {
		t.Fatal(err)
	}
	if ref := i.shipped.next(); ref != "" {
		t.Errorf("next is %s", ref)
	}
}

func TestAwaitOfAFailedImport(t *testing.T) {
	const dns = imagestore.ShippedRegistry + "/coredns:1"
	i := &Images{shipped: newImportQueue([]string{dns})}
	full := errors.New("no space left on device")
	got := make(chan error)
	go func() { got <- i.Await(context.WithoutCancel(t.Context()), dns) }()
	i.shipped.fail(full)
	if err := <-got; !errors.Is(err, full) {
		t.Errorf("error is %v", err)
	}
}

func TestOthersImagesAreNotAwaited(t *testing.T) {
	i := &Images{shipped: newImportQueue([]string{imagestore.ShippedRegistry + "/coredns:1"})}
	for _, ref := range []string{"docker.io/library/nginx:1", "sha256:0123", "", "registry.polymesh.dev.example.com/coredns:1", imagestore.ShippedRegistry + "/unknown:1"} {
		if err := i.Await(t.Context(), ref); err != nil {
			t.Errorf("%q: %v", ref, err)
		}
	}
}
