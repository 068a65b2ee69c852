package node

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/knftables"

	"polymesh.dev/polymesh/pkg/layout"
)

const (
	// servicesHook is the kube-proxy chain that all pod traffic to services passes
	// (k8s.io/kubernetes/pkg/proxy/nftables).
	servicesHook = "nat-prerouting"
	// resyncLabel marks the service that triggers kube-proxy's sync.
	resyncLabel = "node.polymesh.dev/resync"
)

// serviceRules are kube-proxy's rules in nftables mode. kube-proxy writes changes only, and does a full sync once an hour
// (FullSyncPeriod); unlike in iptables mode it does not check whether the rules still exist. But when writing a change
// fails, because its table is gone, the next one is a full sync. So restore triggers a change, as an
// administrator would: it creates a service and deletes it.
type serviceRules struct {
	nft    knftables.Interface
	client kubernetes.Interface
	// seen is set once the rules have existed: at startup kube-proxy writes them by itself.
	seen atomic.Bool
}

func newServiceRules(kubeconfig string) (*serviceRules, error) {
	nft, err := knftables.New(knftables.IPv4Family, layout.ProxyTable)
	if err != nil {
		return nil, fmt.Errorf("use nft: %w", err)
	}
	rest, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return nil, err
	}
	client, err := kubernetes.NewForConfig(rest)
	if err != nil {
		return nil, err
	}
	return &serviceRules{nft: nft, client: client}, nil
}

func (s *serviceRules) missing(ctx context.Context) (string, error) {
	rules, err := s.nft.ListRules(ctx, servicesHook)
	if err != nil && !knftables.IsNotFound(err) {
		return "", fmt.Errorf("list the rules of table %s: %w", layout.ProxyTable, err)
	}
	if len(rules) > 0 {
		s.seen.Store(true)
	} else if s.seen.Load() {
		return "the rules of service addresses", nil
	}
	return "", nil
}

const (
	// resyncFails is enough time for kube-proxy to process the new service and fail: it waits a second between two syncs.
	resyncFails = 3 * time.Second
	// resyncEnds is the deadline for the rules; kube-proxy retries by itself after 30 seconds.
	resyncEnds = 15 * time.Second
)

// restore returns when kube-proxy has written its rules.
func (s *serviceRules) restore(ctx context.Context) (err error) {
	// If only rules were removed but not the table, writing a change would succeed, and the rest would stay missing.
	tx := s.nft.NewTransaction()
	tx.Add(&knftables.Table{})
	tx.Delete(&knftables.Table{})
	if err := s.nft.Run(ctx, tx); err != nil {
		return fmt.Errorf("remove what is left of table %s: %w", layout.ProxyTable, err)
	}
	_, err = s.client.CoreV1().Services(metav1.NamespaceSystem).Create(ctx, &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{
			GenerateName: "polymesh-resync-",
			Labels:       map[string]string{resyncLabel: "true"},
			// Hide it from the mesh (istio.io/api/annotation, NetworkingExportTo).
			Annotations: map[string]string{"networking.istio.io/exportTo": "~"},
		},
		// Port 9 is the discard protocol; the service has no endpoints.
		Spec: corev1.ServiceSpec{Ports: []corev1.ServicePort{{Port: 9}}},
	}, metav1.CreateOptions{})
	if err != nil {
		return fmt.Errorf("trigger kube-proxy's sync: %w", err)
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), keepInterval)
		defer cancel()
		err = errors.Join(err, s.removeServices(ctx))
	}()
	if s.wait(ctx, resyncFails) {
		return nil
	}
	if err := s.removeServices(ctx); err != nil {
		return err
	}
	if !s.wait(ctx, resyncEnds) {
		return errors.New("kube-proxy has not written the rules of service addresses again yet")
	}
	return nil
}

func (s *serviceRules) wait(ctx context.Context, limit time.Duration) bool {
	for end := time.Now().Add(limit); time.Now().Before(end) && ctx.Err() == nil; {
		if gone, err := s.missing(ctx); err == nil && gone == "" {
			return true
		}
		select {
		case <-ctx.Done():
		case <-time.After(250 * time.Millisecond):
		}
	}
	return false
}

// removeServices removes the services created by restore, including those of a server that was killed in between.
func (s *serviceRules) removeServices(ctx context.Context) error {
	services := s.client.CoreV1().Services(metav1.NamespaceSystem)
	list, err := services.List(ctx, metav1.ListOptions{LabelSelector: resyncLabel + "=true"})
	if err != nil {
		return fmt.Errorf("list the services that trigger kube-proxy's sync: %w", err)
	}
	for _, svc := range list.Items {
		uid := svc.UID
		err := services.Delete(ctx, svc.Name, metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &uid}})
		if err != nil && !apierrors.IsNotFound(err) {
			return fmt.Errorf("remove service %s: %w", svc.Name, err)
		}
	}
	return nil
}
