package addon

import (
	"cmp"
	"context"
	"fmt"
	"net/netip"
	"slices"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/tools/cache"

	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/controlplane/nodeaddress"
	"polymesh.dev/polymesh/pkg/placement"
)

// host is a line of CoreDNS's hosts file.
type host struct {
	Address netip.Addr
	Name    string
}

// followNodes applies the manifests again when what they contain of the nodes changes.
func (a *Addon) followNodes(ctx context.Context) error {
	factory := informers.NewSharedInformerFactoryWithOptions(a.clientset, 0, informers.WithTransform(placement.Trimmed))
	nodes := factory.Core().V1().Nodes()
	a.nodes, a.nodesSynced = nodes.Lister(), nodes.Informer().HasSynced
	changed := func(any) {
		in, err := a.current()
		a.mu.Lock()
		same := slices.Equal(in.Hosts, a.inputs.Hosts) && in.Spread == a.inputs.Spread
		a.mu.Unlock()
		if err != nil || !same {
			a.loop.Kick()
		}
	}
	if _, err := nodes.Informer().AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc: changed, UpdateFunc: func(_, obj any) { changed(obj) }, DeleteFunc: changed,
	}); err != nil {
		return fmt.Errorf("watch nodes: %w", err)
	}
	a.watching.Go(ctx, func(ctx context.Context) {
		factory.StartWithContext(ctx)
		<-ctx.Done()
		factory.Shutdown()
	})
	return nil
}

// allNodes returns the nodes that are known: none before the API server has been queried.
func (a *Addon) allNodes() ([]*corev1.Node, error) {
	if a.nodes == nil {
		return nil, nil
	}
	return a.nodes.List(labels.Everything())
}

// hosts returns the names and addresses of the nodes: the server's own node by its settings, the others by their objects. A node
// chooses its name and its address. A name with a dot could be that of any server in the world, so it is left out, and so is an address
// that is another node's or cannot be a node's. Of two nodes with one address, the older one has it.
func hosts(own host, internal []netip.Prefix, nodes []*corev1.Node) []host {
	out := []host{own}
	order := slices.SortedFunc(slices.Values(nodes), func(a, b *corev1.Node) int {
		return cmp.Or(a.CreationTimestamp.Compare(b.CreationTimestamp.Time), cmp.Compare(a.Name, b.Name))
	})
	taken := map[netip.Addr]bool{own.Address: true}
	for _, n := range order {
		if n.Name == own.Name || n.Name == "localhost" || len(validation.IsDNS1123Label(n.Name)) > 0 || n.DeletionTimestamp != nil {
			continue
		}
		for _, a := range nodeaddress.Of(n, corev1.NodeInternalIP, internal) {
			if !taken[a] {
				taken[a] = true
				out = append(out, host{a, n.Name})
			}
		}
	}
	slices.SortFunc(out[1:], func(a, b host) int { return cmp.Or(cmp.Compare(a.Name, b.Name), a.Address.Compare(b.Address)) })
	return out
}

// replicated reports whether the add-on has a second replica from the second node on.
func (a *Addon) replicated() bool {
	return !a.opts.Disabled && (a.opts.Name == config.CoreDNS || a.opts.Name == config.MetricsServer)
}

// deployment returns the Deployment of the add-on as it is in the cluster, or is to be; nil if there is none.
func (a *Addon) deployment(objects map[id]*unstructured.Unstructured) (*appsv1.Deployment, error) {
	obj := objects[a.deploymentID()]
	if obj == nil {
		return nil, nil
	}
	d := &appsv1.Deployment{}
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(obj.Object, d); err != nil {
		return nil, fmt.Errorf("read Deployment %s: %w", obj.GetName(), err)
	}
	return d, nil
}

func (a *Addon) deploymentID() id {
	return id{kindOf("Deployment"), metav1.NamespaceSystem, a.Name()}
}

// replicas decides how many replicas the add-on has, from what it has now.
func (a *Addon) replicas(ctx context.Context, in *inputs, existing map[id]*unstructured.Unstructured) (err error) {
	if in.Scaled, err = placement.Others(existing[a.deploymentID()], a.manager(), "spec", "replicas"); err != nil || in.Spread {
		return err
	}
	d, err := a.deployment(existing)
	if err != nil || d == nil {
		return err
	}
	nodes, err := a.allNodes()
	if err != nil {
		return err
	}
	in.Spread, err = placement.Spread(ctx, a.clientset, d, nodes, time.Now())
	return err
}
