// Package external announces a node's external address, --node-external-ip, in the status of its Node, where users, the other nodes, the API
// servers and the load balancer read it.
//
// The kubelet overwrites status.addresses with its own address, unless it runs with --cloud-provider=external: then it only sets them when it
// registers the node (NodeAddress in pkg/kubelet/nodestatus). So pkg/node runs it like that on a node with an external address, and this
// package keeps the addresses instead. The kubelet then also registers the node with a taint, which a server removes (pkg/controlplane/noderole),
// because NodeRestriction forbids nodes to change their taints.
package external

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	corelisters "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/tools/cache"

	"polymesh.dev/polymesh/pkg/component"
	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/kubeconfig"
	"polymesh.dev/polymesh/pkg/kubeflags"
)

// Annotation is on a node whose addresses this package keeps. Its value is the external address. On a node without it, another cloud provider
// does that.
const Annotation = "polymesh.dev/external-address"

// recheck is how often a failed announcement is tried again.
const recheck = 10 * time.Second

// Of returns the external address that a node announces. There is none if it is the node's own address, or if the user has set the kubelet's
// cloud provider or its addresses, which decide what the status shows.
func Of(settings config.Node, own netip.Addr) (netip.Addr, bool) {
	if !settings.ExternalIP.IsValid() || settings.ExternalIP == own || kubeflags.Sets(settings.KubeletArgs, "cloud-provider") || kubeflags.Sets(settings.KubeletArgs, "node-ip") {
		return netip.Addr{}, false
	}
	return settings.ExternalIP, true
}

// Options of the component.
type Options struct {
	// Node is the node's name, IP its own address, and External the one to announce.
	Node         string
	IP, External netip.Addr
	// Kubeconfig is that of the node itself (system:node:NAME). It may list and watch nodes, and patch the status of its own. Start reads it.
	Kubeconfig string
	Log        *slog.Logger
}

// Address is the component "external-address".
type Address struct {
	component.Background
	opts   Options
	log    *slog.Logger
	client kubernetes.Interface
	nodes  corelisters.NodeLister // of the own node only
	state  atomic.Pointer[error]
}

var _ component.Component = (*Address)(nil)

// New returns the component, not yet started.
func New(o Options) *Address {
	a := &Address{opts: o}
	a.log = o.Log.With("component", a.Name())
	a.set(errors.New(notRegistered))
	return a
}

const notRegistered = "the node has not registered yet"

// Name implements component.Component.
func (*Address) Name() string { return "external-address" }

// Init does nothing.
func (*Address) Init(context.Context) error { return nil }

// Start watches the node in the background.
func (a *Address) Start(ctx context.Context) error {
	var err error
	if a.client, err = kubeconfig.Client(a.opts.Kubeconfig, nil); err != nil {
		return err
	}
	factory := informers.NewSharedInformerFactoryWithOptions(a.client, 0, informers.WithTweakListOptions(func(o *metav1.ListOptions) {
		o.FieldSelector = fields.OneTermEqualSelector(metav1.ObjectNameField, a.opts.Node).String()
	}))
	nodes := factory.Core().V1().Nodes()
	a.nodes = nodes.Lister()
	changed := component.NewWake()
	notify := func(any) { changed.Call() }
	if _, err := nodes.Informer().AddEventHandler(cache.ResourceEventHandlerFuncs{AddFunc: notify, UpdateFunc: func(_, o any) { notify(o) }}); err != nil {
		return fmt.Errorf("watch the own node: %w", err)
	}
	a.Go(ctx, func(ctx context.Context) {
		factory.StartWithContext(ctx)
		defer factory.Shutdown()
		component.Rounds(ctx, changed, recheck, func(ctx context.Context) {
			err := a.sync(ctx)
			if err != nil && ctx.Err() == nil {
				a.log.Debug("the external address is not announced yet", "err", err)
			}
			a.set(err)
		})
	})
	return nil
}

func (a *Address) set(err error) { a.state.Store(&err) }

// Ready returns nil once the node's status has its external address.
func (a *Address) Ready(context.Context) error { return *a.state.Load() }

// sync announces the address, if the node's status differs.
func (a *Address) sync(ctx context.Context) error {
	node, err := a.nodes.Get(a.opts.Node)
	if apierrors.IsNotFound(err) {
		return errors.New(notRegistered)
	}
	if err != nil {
		return err
	}
	announced := func(addresses []corev1.NodeAddress) bool {
		return slices.Equal(node.Status.Addresses, addresses) && node.Annotations[Annotation] == a.opts.External.String()
	}
	want := a.addresses(node, a.opts.External)
	if announced(want) {
		return nil
	}
	all, err := a.client.CoreV1().Nodes().List(ctx, metav1.ListOptions{ResourceVersion: "0"})
	if err != nil {
		return fmt.Errorf("list nodes: %w", err)
	}
	// The node works without its external address: its own one and the annotation are written all the same.
	var taken error
	if other := holder(all.Items, a.opts.Node, a.opts.External); other != "" {
		taken = fmt.Errorf("node %s has the address %s already, so it is not announced as this node's: set another one with --node-external-ip", other, a.opts.External)
		if want = a.addresses(node, netip.Addr{}); announced(want) {
			return taken
		}
	}
	patch, err := json.Marshal(map[string]any{
		"metadata": map[string]any{"uid": node.UID, "annotations": map[string]any{Annotation: a.opts.External.String()}},
		"status":   map[string]any{"addresses": want},
	})
	if err != nil {
		return err
	}
	if _, err := a.client.CoreV1().Nodes().Patch(ctx, node.Name, types.MergePatchType, patch, metav1.PatchOptions{}, "status"); err != nil {
		return fmt.Errorf("write the addresses of node %s: %w", node.Name, err)
	}
	return taken
}

// addresses returns the addresses for the node's status: its own one, the external one if it is valid, and the names that the kubelet has set.
func (a *Address) addresses(node *corev1.Node, external netip.Addr) []corev1.NodeAddress {
	out := []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: a.opts.IP.String()}}
	if external.IsValid() {
		out = append(out, corev1.NodeAddress{Type: corev1.NodeExternalIP, Address: external.String()})
	}
	for _, have := range node.Status.Addresses {
		if have.Type != corev1.NodeInternalIP && have.Type != corev1.NodeExternalIP {
			out = append(out, have)
		}
	}
	return out
}

// holder returns another node that has an address; empty if there is none. It only detects a wrong setting: readers of the addresses have
// rules of their own for an address that two nodes have.
func holder(nodes []corev1.Node, own string, address netip.Addr) string {
	for _, n := range nodes {
		for _, have := range n.Status.Addresses {
			if b, err := netip.ParseAddr(have.Address); err == nil && n.Name != own && b.Unmap() == address {
				return n.Name
			}
		}
	}
	return ""
}
