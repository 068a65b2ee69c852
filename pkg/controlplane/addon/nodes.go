package addon

import (
	"cmp"
	"context"
	"fmt"
	"net/netip"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/tools/cache"
	"sigs.k8s.io/structured-merge-diff/v6/fieldpath"

	"polymesh.dev/polymesh/pkg/controlplane/nodeaddress"
	"polymesh.dev/polymesh/pkg/ssa"
)

// lostAfter is how long a node that no longer reports still counts: pods stay bound to it as long
// (https://kubernetes.io/docs/concepts/scheduling-eviction/taint-and-toleration/#taint-based-evictions).
const lostAfter = 5 * time.Minute

// host is a line of CoreDNS's hosts file.
type host struct {
	Address netip.Addr
	Name    string
}

// followNodes applies the manifests again when what they contain of the nodes changes.
func (a *Addon) followNodes(ctx context.Context) error {
	factory := informers.NewSharedInformerFactoryWithOptions(a.clientset, 0, informers.WithTransform(trimmed))
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

// trimmed keeps the cache small: of a node only what is used stays.
func trimmed(obj any) (any, error) {
	if n, ok := obj.(*corev1.Node); ok {
		n.ManagedFields, n.Annotations, n.Status.Images = nil, nil, nil
	}
	return obj, nil
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

// several reports whether pods can run on at least two nodes. A node that is no longer Ready counts for a while, so that its restart
// changes nothing.
func several(nodes []*corev1.Node, now time.Time) bool {
	n := 0
	for _, node := range nodes {
		if usable(node, now) {
			n++
		}
	}
	return n >= 2
}

// usable reports whether a replica can be on a node: it is Ready, and has no taint that CoreDNS does not tolerate, not even that of a node
// which has just become Ready; or it was, and is lost only for a while.
func usable(node *corev1.Node, now time.Time) bool {
	if node.Spec.Unschedulable || node.DeletionTimestamp != nil {
		return false
	}
	for _, c := range node.Status.Conditions {
		switch {
		case c.Type != corev1.NodeReady:
		case c.Status != corev1.ConditionTrue:
			// A node that has just registered has not been Ready yet.
			before := c.LastTransitionTime.Sub(node.CreationTimestamp.Time) > startsIn
			return before && now.Sub(c.LastTransitionTime.Time) < lostAfter
		default:
			return !slices.ContainsFunc(node.Spec.Taints, func(t corev1.Taint) bool {
				tolerated := t.Key == "CriticalAddonsOnly" || t.Key == "node-role.kubernetes.io/control-plane" && t.Effect == corev1.TaintEffectNoSchedule
				return t.Effect != corev1.TaintEffectPreferNoSchedule && !tolerated
			})
		}
	}
	return false
}

// startsIn is how long a node may take from its registration until it is Ready.
const startsIn = time.Minute

// scaled reports whether someone else has set the number of a live Deployment's replicas, with `kubectl scale` for example: it stays
// theirs. A default belongs to no one.
func scaled(live *unstructured.Unstructured) (bool, error) {
	if live == nil {
		return false, nil
	}
	for _, m := range live.GetManagedFields() {
		if m.Manager == fieldManager && m.Subresource == "" {
			continue
		}
		if owns, err := ssa.Owns(m, fieldpath.MakePathOrDie("spec", "replicas")); err != nil || owns {
			return owns, err
		}
	}
	return false, nil
}
