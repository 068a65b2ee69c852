// Package overview is the state of the whole cluster as one server sees it, for `polymesh status`: nodes, members of etcd, leaders,
// certificates, the last snapshot.
//
// It only reads, each part in parallel and for a limited time, so that a server without a majority still has an answer from what it knows itself.
// collect (here) reads, assemble (assemble.go) judges. pkg/server gives it to the node's status socket.
package overview

import (
	"context"
	"errors"
	"fmt"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"polymesh.dev/polymesh/pkg/certificate"
	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/controlplane/datastore"
	"polymesh.dev/polymesh/pkg/controlplane/datastore/etcd"
	"polymesh.dev/polymesh/pkg/controlplane/snapshot"
	"polymesh.dev/polymesh/pkg/kubeconfig"
	"polymesh.dev/polymesh/pkg/status"
)

const (
	// queryTimeout is the time for one query.
	queryTimeout = 2 * time.Second
	// limit is the time for all of them; that for etcd's members has a timeout for each member in it.
	limit = 3 * time.Second
)

// Options define where the state comes from.
type Options struct {
	// Node is the name of this server's node.
	Node string
	// Version is this server's Kubernetes: v1.36.3.
	Version string
	// Kubeconfig must allow listing nodes, and reading Leases in kube-system.
	Kubeconfig   string
	Certificates certificate.Store
	// Kind is the datastore's.
	Kind config.DatastoreKind
	// Datastore is this server's.
	Datastore datastore.Store
	Snapshots *snapshot.Snapshots
	// SnapshotFailure returns why the last scheduled snapshot failed; nil if it did not.
	SnapshotFailure func() error
}

// Overview collects the state.
type Overview struct{ opts Options }

// New returns an Overview.
func New(o Options) *Overview { return &Overview{o} }

// usage is a datastore that knows its size.
type usage interface {
	Usage(ctx context.Context) (datastore.Usage, error)
}

// result is a value, or why it is not known.
type result[T any] struct {
	value T
	err   error
}

// query begins to find something out.
func query[T any](ctx context.Context, find func(context.Context) (T, error)) <-chan result[T] {
	found := make(chan result[T], 1)
	go func() {
		value, err := find(ctx)
		found <- result[T]{value, err}
	}()
	return found
}

// await waits for a query until ctx ends, also for one that does not end with it.
func await[T any](ctx context.Context, q <-chan result[T]) result[T] {
	select {
	case r := <-q:
		return r
	default:
	}
	select {
	case r := <-q:
		return r
	case <-ctx.Done():
		return result[T]{err: errNoAnswer}
	}
}

var errNoAnswer = fmt.Errorf("no answer within %s", queryTimeout)

// facts is what was found out.
type facts struct {
	nodes        result[[]corev1.Node]
	leases       result[[]coordinationv1.Lease]
	members      result[[]etcd.Member]
	usage        result[datastore.Usage]
	certificates result[[]certificate.Expiry]
	snapshot     result[*snapshot.Info]

	self            uint64 // this server's member
	leaderlessSince time.Time
	size, revision  int64 // of etcd on this server
	snapshotFailure error
}

// Cluster returns the state within seconds.
func (o *Overview) Cluster(ctx context.Context) *status.Cluster {
	return assemble(o.opts, o.collect(ctx), time.Now())
}

func (o *Overview) collect(ctx context.Context) (f facts) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	short, cancelShort := context.WithTimeout(ctx, queryTimeout)
	defer cancelShort()
	nodes := query(short, func(ctx context.Context) ([]corev1.Node, error) {
		client, err := o.client()
		if err != nil {
			return nil, err
		}
		list, err := client.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
		if err != nil {
			return nil, reason(ctx, err)
		}
		return list.Items, nil
	})
	leases := query(short, o.leases)
	certificates := query(short, func(context.Context) ([]certificate.Expiry, error) { return certificate.Expiries(o.opts.Certificates) })
	last := query(short, func(context.Context) (*snapshot.Info, error) { return o.opts.Snapshots.Last() })
	member, _ := o.opts.Datastore.(*etcd.Etcd)
	if member != nil {
		members := query(ctx, member.Members)
		f.self, _ = member.ID()
		f.leaderlessSince = member.LeaderlessSince()
		f.size, f.revision = member.Usage()
		f.members = await(ctx, members)
	}
	if u, ok := o.opts.Datastore.(usage); ok {
		f.usage = await(ctx, query(short, u.Usage))
	}
	f.nodes, f.leases, f.certificates, f.snapshot = await(ctx, nodes), await(ctx, leases), await(ctx, certificates), await(ctx, last)
	f.snapshotFailure = o.opts.SnapshotFailure()
	return f
}

func (o *Overview) client() (kubernetes.Interface, error) {
	client, err := kubeconfig.Client(o.opts.Kubeconfig, func(c *rest.Config) { c.Timeout = queryTimeout })
	if err != nil {
		return nil, errors.New("this server has not started its API server yet")
	}
	return client, nil
}

// electedLeases returns the names of the Leases, in kube-system, of what runs on one server.
func electedLeases() []string {
	return []string{"polymesh", "kube-controller-manager", "kube-scheduler"}
}

func (o *Overview) leases(ctx context.Context) ([]coordinationv1.Lease, error) {
	if !o.opts.Datastore.Endpoint().LeaderElect {
		return nil, nil
	}
	client, err := o.client()
	if err != nil {
		return nil, err
	}
	queries := map[string]<-chan result[*coordinationv1.Lease]{}
	for _, name := range electedLeases() {
		queries[name] = query(ctx, func(ctx context.Context) (*coordinationv1.Lease, error) {
			return client.CoordinationV1().Leases(metav1.NamespaceSystem).Get(ctx, name, metav1.GetOptions{})
		})
	}
	var all []coordinationv1.Lease
	for _, name := range electedLeases() {
		r := <-queries[name]
		if r.err != nil {
			return all, reason(ctx, r.err)
		}
		all = append(all, *r.value)
	}
	return all, nil
}

// reason shortens the error of a request that took too long.
func reason(ctx context.Context, err error) error {
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return errNoAnswer
	}
	return err
}
