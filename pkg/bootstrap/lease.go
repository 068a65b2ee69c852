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
	// leaseLife is how long a Lease counts without a renewal, and leaseInterval how often a kubelet renews it, at most (nodeLeaseDurationSeconds
	// in the kubelet's configuration: 40 seconds, renewed after a quarter of it).
	leaseLife, leaseInterval = 40 * time.Second, 15 * time.Second
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

// TakenError means that the name of this server's node is another machine's.
type TakenError struct{ Name string }

func (err *TakenError) Error() string {
	return fmt.Sprintf("another machine runs as server %s of this cluster: give this one another name with --node-name, or, if it replaces that machine, stop that one and wait a minute", err.Name)
}

// Take gives the name of a server's node to one data dir, by its id: two machines with one name, clones for example, would be one node. A data
// dir that is new, or was restored on another machine, gets the name when the node's Lease is no longer renewed. ran is set for one with which
// the server has run before: a record without an id, which a version before has written, is its own. The error is a TakenError if the other
// machine runs.
func (s Store) Take(ctx context.Context, name, id string, ran bool) error {
	for written := false; !written; {
		r, err := s.Server(ctx, name)
		if err != nil || r.ID == id {
			return err
		}
		if !ran || r.ID != "" {
			have, err := s.leases(ctx, name)
			if err != nil {
				return err
			}
			if len(have) == 0 && r.ID != "" && !r.Registered {
				have[name] = lease{} // the other one may be about to register its node
			}
			if _, runs, err := s.renewal(ctx, have, cmp.Or(s.LeaseLife, leaseLife)); err != nil {
				return err
			} else if runs {
				return &TakenError{name}
			}
		}
		r.Name, r.ID, r.Registered = name, id, false // its node is not this machine's
		if written, err = s.write(ctx, r); err != nil {
			return err
		}
	}
	return nil
}

// Holds returns a TakenError if another data dir has taken the name since.
func (s Store) Holds(ctx context.Context, name, id string) error {
	r, err := s.Server(ctx, name)
	if err == nil && r.ID != "" && r.ID != id {
		err = &TakenError{name}
	}
	return err
}
