package member

import (
	"context"
	"fmt"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"polymesh.dev/polymesh/pkg/condition"
	"polymesh.dev/polymesh/pkg/controlplane/datastore/etcd"
	"polymesh.dev/polymesh/pkg/layout"
)

const (
	// removeTimeout is how long the server that leads etcd may take to remove a member after its node.
	removeTimeout = time.Minute
	removePoll    = 500 * time.Millisecond
)

// Removal removes a node from the cluster.
type Removal struct {
	Client kubernetes.Interface
	// Local is this machine's server, for the members of etcd.
	Local Local
	// Self is the name of this machine's node; empty if none runs here.
	Self string
	// Force removes a node whose machine still runs.
	Force bool
	// Done is called after each step.
	Done func(what string)
}

// view is what a removal is decided by.
type view struct {
	name, self string
	force      bool
	nodes      []corev1.Node
	records    []Record
	members    []etcd.Member
	// unknown is why the members are not known.
	unknown error
}

// Run removes a node and, if it is a server, waits until its member of etcd is removed. An error leaves the node, unless it says otherwise.
func (r Removal) Run(ctx context.Context, name string) error {
	v := view{name: name, self: r.Self, force: r.Force}
	nodes, err := r.Client.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return fmt.Errorf("list the nodes: %w", err)
	}
	v.nodes = nodes.Items
	if v.records, err = Records(ctx, r.Client); err != nil {
		return err
	}
	v.members, _, v.unknown = r.Local.Members(ctx)
	node, member, err := v.decide()
	if err != nil {
		return err
	}
	err = r.Client.CoreV1().Nodes().Delete(ctx, name, metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &node.UID}})
	if err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("remove node %s: %w", name, err)
	}
	r.Done("node " + name + " removed")
	if member == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, removeTimeout)
	defer cancel()
	if err := r.Local.gone(ctx, member.ID, func() bool { return false }); err != nil {
		return fmt.Errorf("node %s is removed, and its member of etcd is not yet: %w: `polymesh status` on the server that leads etcd shows why", name, err)
	}
	r.Done("its member " + memberID(member.ID) + " of etcd removed")
	return nil
}

// decide returns the node to remove, with its member of etcd if it has one, or why it stays.
func (v view) decide() (*corev1.Node, *etcd.Member, error) {
	i := slices.IndexFunc(v.nodes, func(n corev1.Node) bool { return n.Name == v.name })
	if i < 0 {
		if slices.ContainsFunc(v.members, func(m etcd.Member) bool { return m.Node() == v.name }) {
			return nil, nil, fmt.Errorf("there is no node %s, but etcd has a member of that name: remove it with `polymesh etcd remove %s`", v.name, v.name)
		}
		return nil, nil, fmt.Errorf("there is no node %s: `polymesh node list` shows the nodes", v.name)
	}
	node := &v.nodes[i]
	if node.Name == v.self {
		return nil, nil, fmt.Errorf("%s is this machine: `polymesh reset` removes it from the cluster, and the cluster from it", v.name)
	}
	member, err := v.server(node)
	if err != nil {
		return nil, nil, err
	}
	if condition.IsNodeReady(node) && !v.force {
		return nil, nil, fmt.Errorf("node %s is Ready, so its machine runs: move its pods away with `polymesh kubectl drain %s --ignore-daemonsets --delete-emptydir-data`, and run `polymesh reset` there, which removes the node too. If it was switched off, wait a minute until the node is NotReady; --force removes it anyway", v.name, v.name)
	}
	return node, member, nil
}

// server returns the member of etcd of a node that is a server, nil if it has none, or why the cluster cannot be without it.
func (v view) server(node *corev1.Node) (*etcd.Member, error) {
	isServer := func(n corev1.Node) bool {
		_, ok := n.Labels[layout.ServerLabel]
		return ok
	}
	recorded := slices.ContainsFunc(v.records, func(r Record) bool { return r.Node == node.Name && r.UID == node.UID })
	if !isServer(*node) && !recorded {
		return nil, nil
	}
	servers := 0
	for _, n := range v.nodes {
		if isServer(n) {
			servers++
		}
	}
	if servers <= 1 && isServer(*node) {
		return nil, fmt.Errorf("%s is the only server: `polymesh reset` on it removes the whole cluster", v.name)
	}
	member, ok := Of(v.members, v.records, node)
	if !ok {
		// A server that has just joined may not have recorded its member yet.
		i := slices.IndexFunc(v.members, func(m etcd.Member) bool { return m.Node() == node.Name })
		if ok = i >= 0; ok {
			member = v.members[i]
		}
	}
	switch {
	case v.unknown != nil && len(v.records) > 0:
		return nil, fmt.Errorf("%s is a server with a member of etcd: run this on another server, as root, which can check that a majority stays: %w", v.name, v.unknown)
	case !ok:
		return nil, nil
	}
	if err := etcd.MayRemove(v.members, member.ID); err != nil {
		return nil, fmt.Errorf("node %s stays: %w", v.name, err)
	}
	return &member, nil
}
