// Package noderole sets the role labels of a server's node, announces the name servers of its pods, and detects objects that a renamed node has left behind.
//
// It owns the labels node-role.kubernetes.io/control-plane and /master of the server's node, which NodeRestriction forbids
// the kubelet to set. It also removes, from every node that keeps its addresses itself, the taint with which the kubelet registers it
// (pkg/node/external). pkg/server adds it to a server.
package noderole

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	corelisters "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/tools/cache"
	cloudproviderapi "k8s.io/cloud-provider/api"

	"polymesh.dev/polymesh/pkg/component"
	"polymesh.dev/polymesh/pkg/condition"
	"polymesh.dev/polymesh/pkg/kubeconfig"
	"polymesh.dev/polymesh/pkg/layout"
	"polymesh.dev/polymesh/pkg/node/external"
	"polymesh.dev/polymesh/pkg/ssa"
)

// fieldManager is the package's field manager.
const fieldManager = ssa.NodeRole

// recheck is how often failed labels, and nodes that no longer report, are checked.
const recheck = 30 * time.Second

// Nameservers is the annotation of a server's node with the name servers that pods get there: CoreDNS's pods are replaced when it changes
// (pkg/controlplane/addon).
const Nameservers = "polymesh.dev/nameservers"

// Announcement is the value of the annotation.
func Announcement(servers []string) string { return strings.Join(servers, " ") }

// Roles returns the labels of a server's node. master is also set by K3s, for older workloads.
func Roles() []string {
	return []string{layout.ServerLabel, "node-role.kubernetes.io/master"}
}

// Options identify the node.
type Options struct {
	// Node is the name of the server's node.
	Node string
	// Kubeconfig must allow listing, watching and patching nodes. It is read by Start.
	Kubeconfig string
	// Nameservers returns the name servers that pods currently get on the node; nil for none at all.
	Nameservers func() []string
	Log         *slog.Logger
}

// Component is "node-role".
type Component struct {
	component.Background
	opts   Options
	log    *slog.Logger
	client kubernetes.Interface
	nodes  corelisters.NodeLister

	state  atomic.Pointer[error]
	former atomic.Pointer[string] // the machine's former node name; nil or empty for none
}

var _ component.Component = (*Component)(nil)

// New returns the component, not yet started.
func New(o Options) *Component {
	c := &Component{opts: o}
	c.log = o.Log.With("component", c.Name())
	c.set(errors.New("the node has not registered yet"))
	return c
}

// Name implements component.Component.
func (*Component) Name() string { return "node-role" }

// Init implements component.Component.
func (*Component) Init(context.Context) error { return nil }

// Start watches the nodes in the background.
func (c *Component) Start(ctx context.Context) error {
	var err error
	if c.client, err = kubeconfig.Client(c.opts.Kubeconfig, nil); err != nil {
		return err
	}
	factory := informers.NewSharedInformerFactory(c.client, 0)
	nodes := factory.Core().V1().Nodes()
	c.nodes = nodes.Lister()
	changed := component.NewWake()
	notify := func(any) { changed.Call() }
	if _, err := nodes.Informer().AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc: notify, UpdateFunc: func(_, o any) { notify(o) }, DeleteFunc: notify,
	}); err != nil {
		return fmt.Errorf("watch nodes: %w", err)
	}
	c.Go(ctx, func(ctx context.Context) {
		factory.StartWithContext(ctx)
		defer factory.Shutdown()
		component.Rounds(ctx, changed, recheck, func(ctx context.Context) {
			err := c.sync(ctx)
			if err != nil && ctx.Err() == nil {
				c.log.Debug("the node does not have its roles yet", "err", err)
			}
			c.set(err)
		})
	})
	return nil
}

func (c *Component) set(err error) { c.state.Store(&err) }

// sync labels the node, if it exists, and looks for its former object.
func (c *Component) sync(ctx context.Context) error {
	all, err := c.nodes.List(labels.Everything())
	if err != nil {
		return err
	}
	others := c.initialize(ctx, all)
	node, err := c.nodes.Get(c.opts.Node)
	if apierrors.IsNotFound(err) {
		return errors.Join(others, errors.New("the node has not registered yet"))
	}
	if err != nil {
		return errors.Join(others, err)
	}
	name := formerNode(node, all)
	if old := c.former.Swap(&name); name != "" && (old == nil || *old != name) {
		c.log.Warn("this machine was registered under another node name before, and that node's object and pods still exist", "node", name, "remove", "polymesh kubectl delete node "+name)
	}
	return errors.Join(others, c.label(ctx, node))
}

// initialize removes the taint of a node that waits for its addresses, if the node says that it keeps them itself. Without that it waits for a
// cloud provider of the user's.
func (c *Component) initialize(ctx context.Context, nodes []*corev1.Node) error {
	for _, n := range nodes {
		left, waits := initialized(n)
		if !waits {
			continue
		}
		patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"uid": n.UID, "resourceVersion": n.ResourceVersion}, "spec": map[string]any{"taints": left}})
		if err != nil {
			return err
		}
		_, err = c.client.CoreV1().Nodes().Patch(ctx, n.Name, types.MergePatchType, patch, metav1.PatchOptions{FieldManager: fieldManager})
		// After a conflict, the watch reports the node again.
		if err != nil && !apierrors.IsConflict(err) && !apierrors.IsNotFound(err) {
			return fmt.Errorf("remove the taint of node %s: %w", n.Name, err)
		}
	}
	return nil
}

// initialized returns the taints of a node without the one to remove, and whether it has that one.
func initialized(n *corev1.Node) (left []corev1.Taint, waits bool) {
	left = slices.DeleteFunc(slices.Clone(n.Spec.Taints), func(t corev1.Taint) bool { return t.Key == cloudproviderapi.TaintExternalCloudProvider })
	return left, n.Annotations[external.Annotation] != "" && len(left) < len(n.Spec.Taints)
}

// label adds missing labels to the node, and updates its annotation. A label that a user has set to another value stays.
func (c *Component) label(ctx context.Context, node *corev1.Node) error {
	missing := map[string]string{}
	for _, role := range Roles() {
		if _, has := node.Labels[role]; !has {
			missing[role] = "true"
		}
	}
	metadata := map[string]any{}
	if len(missing) > 0 {
		metadata["labels"] = missing
	}
	if c.opts.Nameservers != nil {
		list := Announcement(c.opts.Nameservers())
		if have, announced := node.Annotations[Nameservers]; !announced || have != list {
			metadata["annotations"] = map[string]string{Nameservers: list}
		}
	}
	if len(metadata) == 0 {
		return nil
	}
	patch, err := json.Marshal(map[string]any{"metadata": metadata})
	if err != nil {
		return err
	}
	_, err = c.client.CoreV1().Nodes().Patch(ctx, node.Name, types.MergePatchType, patch, metav1.PatchOptions{FieldManager: fieldManager})
	if err != nil {
		return fmt.Errorf("label node %s: %w", node.Name, err)
	}
	return nil
}

// formerNode finds the node object of the same machine under another name (k3s-io/k3s#6335): same system, same address, no longer
// reporting. The system alone proves nothing, because cloned machines have the same machine id, and one of them may be off.
func formerNode(own *corev1.Node, all []*corev1.Node) string {
	for _, other := range all {
		a, b := own.Status.NodeInfo, other.Status.NodeInfo
		same := a.MachineID != "" && a.MachineID == b.MachineID || a.SystemUUID != "" && a.SystemUUID == b.SystemUUID
		silent := meta.IsStatusConditionPresentAndEqual(condition.Of(other.Status.Conditions), string(corev1.NodeReady), metav1.ConditionUnknown)
		if other.Name != own.Name && same && silent && shareAddress(own, other) {
			return other.Name
		}
	}
	return ""
}

func shareAddress(a, b *corev1.Node) bool {
	return slices.ContainsFunc(a.Status.Addresses, func(address corev1.NodeAddress) bool {
		return address.Type == corev1.NodeInternalIP && slices.Contains(b.Status.Addresses, address)
	})
}

// Ready returns nil once the node has its roles.
func (c *Component) Ready(context.Context) error { return *c.state.Load() }

// Notes implements component.Noted.
func (c *Component) Notes(context.Context) []string {
	var notes []string
	for _, name := range component.Present(c.former.Load()) {
		notes = append(notes, fmt.Sprintf("node %s is this machine under its former name: remove it with its pods by `polymesh kubectl delete node %s`", name, name))
	}
	return notes
}
