package addon

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
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
	"polymesh.dev/polymesh/pkg/controlplane/noderole"
	"polymesh.dev/polymesh/pkg/layout"
	"polymesh.dev/polymesh/pkg/placement"
)

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
		same := slices.Equal(in.Hosts, a.inputs.Hosts) && in.Spread == a.inputs.Spread && in.Resolvers == a.inputs.Resolvers
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

// trimmed leaves of a node's annotations only what is used here.
func trimmed(obj any) (any, error) {
	n, ok := obj.(*corev1.Node)
	if !ok {
		return placement.Trimmed(obj)
	}
	list, announced := n.Annotations[noderole.Nameservers]
	out, err := placement.Trimmed(n)
	if announced {
		n.Annotations = map[string]string{noderole.Nameservers: list}
	}
	return out, err
}

// nameserversOf returns a hash of the different lists of name servers that the servers' nodes have: the own one's by its machine, the others' as
// they have announced them. Whichever server leads, it is the same. Agents do not count: one that was broken into could replace CoreDNS's pods
// again and again.
func nameserversOf(name string, own []string, nodes []*corev1.Node) string {
	lists := []string{noderole.Announcement(own)}
	for _, n := range nodes {
		list, announced := n.Annotations[noderole.Nameservers]
		if _, server := n.Labels[layout.ServerLabel]; server && announced && n.Name != name {
			lists = append(lists, list)
		}
	}
	slices.Sort(lists)
	sum := sha256.New()
	for _, list := range slices.Compact(lists) {
		of := sha256.Sum256([]byte(list))
		sum.Write(of[:])
	}
	return hex.EncodeToString(sum.Sum(nil)[:16])
}

// allNodes returns the nodes that are known: none before the API server has been queried.
func (a *Addon) allNodes() ([]*corev1.Node, error) {
	if a.nodes == nil {
		return nil, nil
	}
	return a.nodes.List(labels.Everything())
}

// hosts returns the names and addresses of the nodes: the server's own node by its settings, the others by their objects. An agent
// chooses its name and its address. A name with a dot could be that of any server in the world, so it is left out, and so is an address
// that is another node's or cannot be a node's. Of two nodes with one address, a server has it, or else the older one. The order does not depend on
// which server leads.
func hosts(own host, internal []netip.Prefix, nodes []*corev1.Node) []host {
	out := []host{own}
	order := slices.SortedFunc(slices.Values(nodes), func(a, b *corev1.Node) int {
		return cmp.Or(cmp.Compare(rank(a), rank(b)), a.CreationTimestamp.Compare(b.CreationTimestamp.Time), cmp.Compare(a.Name, b.Name))
	})
	taken := map[netip.Addr]bool{own.Address: true}
	for _, n := range order {
		invalid := validation.IsDNS1123Label(n.Name)
		if rank(n) == 0 {
			invalid = validation.IsDNS1123Subdomain(n.Name)
		}
		if n.Name == own.Name || n.Name == "localhost" || len(invalid) > 0 || n.DeletionTimestamp != nil {
			continue
		}
		for _, a := range nodeaddress.Of(n, corev1.NodeInternalIP, internal) {
			if !taken[a] {
				taken[a] = true
				out = append(out, host{a, n.Name})
			}
		}
	}
	slices.SortFunc(out, func(a, b host) int { return cmp.Or(cmp.Compare(a.Name, b.Name), a.Address.Compare(b.Address)) })
	return out
}

// rank is 0 for a server's node, by a label that NodeRestriction keeps nodes from setting, and 1 for another.
func rank(n *corev1.Node) int {
	if _, ok := n.Labels[layout.ServerLabel]; ok {
		return 0
	}
	return 1
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
