package install

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	appslisters "k8s.io/client-go/listers/apps/v1"

	"polymesh.dev/polymesh/pkg/diagnose"
)

// health watches the Deployments that the server installed, and reports why they are not available.
type health struct {
	client      kubernetes.Interface
	deployments []string // in istioNamespace
	synced      func() bool
	lister      appslisters.DeploymentNamespaceLister

	mu      sync.Mutex
	reason  map[string]string // by deployment
	checked time.Time         // when it was read last
}

// reasonAge is how long the reason of an unavailable Deployment is cached: finding it lists pods.
const reasonAge = time.Second

// newHealth returns nil if the record has no Deployment: the profile empty installs none.
func newHealth(ctx context.Context, client kubernetes.Interface, record *Record) *health {
	h := &health{client: client, deployments: deploymentsOf(record), reason: map[string]string{}}
	if len(h.deployments) == 0 {
		return nil
	}
	// The control plane sorts last and is checked first: gateways wait for it.
	slices.Reverse(h.deployments)
	factory := informers.NewSharedInformerFactoryWithOptions(client, 0, informers.WithNamespace(istioNamespace))
	informer := factory.Apps().V1().Deployments()
	h.synced = informer.Informer().HasSynced
	h.lister = informer.Lister().Deployments(istioNamespace)
	factory.Start(ctx.Done())
	return h
}

// check returns nil if every existing Deployment is available. It ignores those that the user removed.
func (h *health) check(ctx context.Context) error {
	if !h.synced() {
		return errors.New("reading the state of the control plane")
	}
	for _, name := range h.deployments {
		d, err := h.lister.Get(name)
		if err != nil {
			continue
		}
		if diagnose.Available(d) {
			continue
		}
		return fmt.Errorf("%s: %d/%d available%s", name, d.Status.AvailableReplicas, replicas(d), h.why(ctx, d))
	}
	return nil
}

func replicas(d *appsv1.Deployment) int32 {
	if d.Spec.Replicas == nil {
		return 1
	}
	return *d.Spec.Replicas
}

// why returns the reason why a Deployment is not available.
func (h *health) why(ctx context.Context, d *appsv1.Deployment) string {
	h.mu.Lock()
	defer h.mu.Unlock()
	if time.Since(h.checked) < reasonAge {
		return h.reason[d.Name]
	}
	h.checked = time.Now()
	clear(h.reason)
	if summary, err := diagnose.Summary(ctx, h.client, d); err == nil {
		h.reason[d.Name] = ": " + summary
	}
	return h.reason[d.Name]
}
