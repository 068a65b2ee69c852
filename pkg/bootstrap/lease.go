package bootstrap

import (
	"cmp"
	"context"
	"fmt"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	"k8s.io/client-go/kubernetes/scheme"
)

const (
	// leasePath, with a node's name, is where the API server keeps the Lease that the node's kubelet renews.
	leasePath = "/registry/leases/kube-node-lease/"
	// leaseInterval is how often a kubelet renews it, at most (nodeLeaseDurationSeconds in the kubelet's configuration: 40 seconds, renewed
	// after a quarter of it).
	leaseInterval = 15 * time.Second
	// leasePoll is how often it is read.
	leasePoll = 200 * time.Millisecond
)

// lease is a node's Lease, the zero one if there is none.
type lease struct {
	revision int64
	renewed  time.Time
}

func (s Store) lease(ctx context.Context, node string) (l lease, err error) {
	value, revision, err := s.get(ctx, leasePath+node)
	if err != nil || revision == 0 {
		return l, err
	}
	obj, _, err := scheme.Codecs.UniversalDeserializer().Decode(value, nil, nil)
	if err != nil {
		return l, err
	}
	l.revision = revision
	if o, ok := obj.(*coordinationv1.Lease); ok && o.Spec.RenewTime != nil {
		l.renewed = o.Spec.RenewTime.Time
	}
	return l, nil
}

// renewal waits until one of the Leases is renewed, for at most wait, and returns it. ok is false if none is.
func (s Store) renewal(ctx context.Context, before map[string]lease, wait time.Duration) (l lease, ok bool, err error) {
	if len(before) == 0 {
		return l, false, nil
	}
	deadline := time.NewTimer(wait)
	defer deadline.Stop()
	poll := time.NewTicker(leasePoll)
	defer poll.Stop()
	for {
		select {
		case <-ctx.Done():
			return l, false, ctx.Err()
		case <-deadline.C:
			return l, false, nil
		case <-poll.C:
		}
		for node, old := range before {
			if l, err = s.lease(ctx, node); err != nil {
				return l, false, fmt.Errorf("read the Lease of node %s in the datastore: %w", node, err)
			}
			if l.revision > old.revision {
				return l, true, nil
			}
		}
	}
}

// leases returns the Leases that nodes have.
func (s Store) leases(ctx context.Context, nodes ...string) (map[string]lease, error) {
	found := map[string]lease{}
	for _, node := range nodes {
		l, err := s.lease(ctx, node)
		if err != nil {
			return nil, fmt.Errorf("read the Lease of node %s in the datastore: %w", node, err)
		}
		if l.revision > 0 {
			found[node] = l
		}
	}
	return found, nil
}

// Ahead returns by how much the clocks of nodes that run are ahead of this machine's. One that has renewed its Lease within near is enough, and
// otherwise the next renewal of any is. known is false if there is none, as none of them runs.
func (s Store) Ahead(ctx context.Context, nodes []string, near time.Duration) (ahead time.Duration, known bool, err error) {
	have, err := s.leases(ctx, nodes...)
	if err != nil {
		return 0, false, err
	}
	for _, l := range have {
		if ahead = time.Until(l.renewed); ahead.Abs() <= near {
			return ahead, true, nil
		}
	}
	l, known, err := s.renewal(ctx, have, cmp.Or(s.LeaseLife, leaseInterval))
	return time.Until(l.renewed), known, err
}
