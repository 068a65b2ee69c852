// Package member removes a server's member of etcd when the server's node is removed from the cluster.
//
// It owns the records of which node a member belongs to, Secrets in kube-system that only servers write: neither the name of a
// node nor that of a member, which others choose, decides what is removed. Each server with a member of etcd has the component
// "etcd-members" (pkg/server): it keeps the record of its own member, and on the server whose member leads etcd it removes members.
// Etcd's election is enough, and a leader without a majority can change nothing.
package member

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"
	corelisters "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"

	"polymesh.dev/polymesh/pkg/component"
	"polymesh.dev/polymesh/pkg/controlplane/datastore/etcd"
	"polymesh.dev/polymesh/pkg/kubeconfig"
)

// recheck is the default of Options.Recheck.
const recheck = 15 * time.Second

// Reasons of events about nodes.
const (
	Removed    = "EtcdMemberRemoved"
	NotRemoved = "EtcdMemberNotRemoved"
)

// Options of the component.
type Options struct {
	// Node is the name of this server's node.
	Node string
	// Etcd is this server's member.
	Etcd *etcd.Etcd
	// Kubeconfig must allow reading nodes, writing Secrets in kube-system, and creating events. It is read by Start.
	Kubeconfig string
	// Recheck is how often a removal that was refused is tried again; 0 for 15 seconds.
	Recheck time.Duration
	Log     *slog.Logger
}

// Component is "etcd-members".
type Component struct {
	component.Background
	opts   Options
	log    *slog.Logger
	client kubernetes.Interface
	nodes  corelisters.NodeLister
	events record.EventRecorder

	own   *Record // as it is stored; nil until it is
	clean bool    // a version before has left no records
	state atomic.Pointer[error]
	// refused has a line for each member that should be removed, and cannot be.
	refused atomic.Pointer[[]string]
}

var (
	_ component.Component = (*Component)(nil)
	_ component.Noted     = (*Component)(nil)
)

// New returns the component, not yet started.
func New(o Options) *Component {
	c := &Component{opts: o}
	c.log = o.Log.With("component", c.Name())
	c.set(errors.New("the node has not registered yet"))
	return c
}

// Name implements component.Component.
func (*Component) Name() string { return "etcd-members" }

// Init implements component.Component.
func (*Component) Init(context.Context) error { return nil }

func (c *Component) set(err error) { c.state.Store(&err) }

// Start watches the nodes in the background.
func (c *Component) Start(ctx context.Context) error {
	var err error
	if c.client, err = kubeconfig.Client(c.opts.Kubeconfig, nil); err != nil {
		return err
	}
	factory := informers.NewSharedInformerFactory(c.client, 0)
	c.nodes = factory.Core().V1().Nodes().Lister()
	changed := component.NewWake()
	notify := func(any) { changed.Call() }
	// Changes of a node that exists do not matter.
	if _, err := factory.Core().V1().Nodes().Informer().AddEventHandler(cache.ResourceEventHandlerFuncs{AddFunc: notify, DeleteFunc: notify}); err != nil {
		return fmt.Errorf("watch nodes: %w", err)
	}
	broadcaster := record.NewBroadcaster()
	c.events = broadcaster.NewRecorder(scheme.Scheme, corev1.EventSource{Component: "polymesh-" + c.Name(), Host: c.opts.Node})
	c.Go(ctx, func(ctx context.Context) {
		broadcaster.StartRecordingToSink(&typedcorev1.EventSinkImpl{Interface: c.client.CoreV1().Events("")})
		defer broadcaster.Shutdown()
		factory.StartWithContext(ctx)
		defer factory.Shutdown()
		component.Rounds(ctx, changed, cmp.Or(c.opts.Recheck, recheck), func(ctx context.Context) {
			err := c.sync(ctx)
			if err != nil && ctx.Err() == nil {
				c.log.Debug("the members of etcd are not compared with the nodes yet", "err", err)
			}
			c.set(err)
		})
	})
	return nil
}

// sync records this server's member, and removes members if it leads.
func (c *Component) sync(ctx context.Context) error {
	registered, err := c.recordOwn(ctx)
	// Without a node of its own it can still remove others.
	return errors.Join(err, c.removeOrphans(ctx, registered))
}

// recordOwn records the node of this server's member. It reports whether the node exists.
func (c *Component) recordOwn(ctx context.Context) (registered bool, err error) {
	node, err := c.client.CoreV1().Nodes().Get(ctx, c.opts.Node, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		if c.own != nil {
			return false, nil // it was removed, and this member will be
		}
		return false, errors.New("the node has not registered yet")
	}
	if err != nil {
		return false, fmt.Errorf("read node %s: %w", c.opts.Node, err)
	}
	id, ok := c.opts.Etcd.ID()
	if !ok {
		return false, errors.New("etcd has not started")
	}
	own := Record{ID: id, Node: node.Name, UID: node.UID}
	if c.own != nil && *c.own == own {
		return true, nil
	}
	if err := write(ctx, c.client, own); err != nil {
		return false, fmt.Errorf("record the member of etcd of node %s: %w", node.Name, err)
	}
	c.own = &own
	return true, nil
}

// removeOrphans removes the members whose nodes were removed, if this server's member leads.
func (c *Component) removeOrphans(ctx context.Context, registered bool) error {
	if !c.opts.Etcd.Leads() {
		c.refused.Store(nil)
		return nil
	}
	records, err := Records(ctx, c.client)
	if err != nil {
		return err
	}
	if registered && len(records) == 1 && records[0].ID == c.own.ID {
		c.refused.Store(nil) // the only server
		return c.tidy(ctx, nil, records)
	}
	nodes, err := c.nodes.List(labels.Everything())
	if err != nil {
		return fmt.Errorf("list the nodes: %w", err)
	}
	uids := map[string]types.UID{}
	for _, n := range nodes {
		uids[n.Name] = n.UID
	}
	// After the records: a member that has one is in the list.
	members, err := c.opts.Etcd.Members(ctx)
	if err != nil {
		return err
	}
	if err := c.tidy(ctx, members, records); err != nil {
		return err
	}
	orphans, stale := compare(members, records, uids)
	for _, r := range stale {
		if err := forget(ctx, c.client, r); err != nil {
			return err
		}
	}
	var refused, before []string
	if last := c.refused.Load(); last != nil {
		before = *last
	}
	for _, r := range orphans {
		// The list of nodes is a cache.
		node, err := c.client.CoreV1().Nodes().Get(ctx, r.Node, metav1.GetOptions{})
		if err == nil && node.UID == r.UID {
			continue
		}
		if err != nil && !apierrors.IsNotFound(err) {
			return fmt.Errorf("read node %s: %w", r.Node, err)
		}
		if err := c.remove(ctx, r); err != nil {
			line := fmt.Sprintf("node %s was removed, and its member of etcd stays: %v", r.Node, err)
			refused = append(refused, line)
			if !slices.Contains(before, line) {
				c.log.Warn("a member of etcd cannot be removed", "node", r.Node, "err", err)
				c.events.Event(reference(r), corev1.EventTypeWarning, NotRemoved, line)
			}
		}
	}
	c.refused.Store(&refused)
	return nil
}

// tidy removes what a version before has left.
func (c *Component) tidy(ctx context.Context, members []etcd.Member, records []Record) error {
	if c.clean {
		return nil
	}
	stay, err := forgetFormer(ctx, c.client, members, records)
	c.clean = err == nil && stay == 0
	return err
}

func (c *Component) remove(ctx context.Context, r Record) error {
	if err := c.opts.Etcd.Remove(ctx, r.ID); err != nil {
		return err
	}
	c.log.Info("the member of etcd of a removed node was removed", "node", r.Node, "member", memberID(r.ID))
	c.events.Event(reference(r), corev1.EventTypeNormal, Removed, fmt.Sprintf("the member %s of etcd was removed with its node", memberID(r.ID)))
	return forget(ctx, c.client, r)
}

// reference is a node for events, which may be gone. Events about nodes have their name as UID, as the kubelet's.
func reference(r Record) *corev1.ObjectReference {
	return &corev1.ObjectReference{APIVersion: "v1", Kind: "Node", Name: r.Node, UID: types.UID(r.Node)}
}

// Ready returns nil once this server's member is recorded.
func (c *Component) Ready(context.Context) error { return *c.state.Load() }

// Notes implements component.Noted.
func (c *Component) Notes(context.Context) []string {
	if refused := c.refused.Load(); refused != nil {
		return *refused
	}
	return nil
}
