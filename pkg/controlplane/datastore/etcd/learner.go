package etcd

import (
	"context"
	"errors"
	"expvar"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/tracker"
)

const (
	// stallTimeout is how long a learner may make no progress before the leader removes it: etcd accepts no other one meanwhile, and no
	// server could join. It is K3s's (pkg/etcd/etcd.go).
	stallTimeout = 5 * time.Minute
	// learnerInterval is how often the leader reads the progress of learners.
	learnerInterval = 15 * time.Second
)

// learnerProgress is how far each learner has come, as seen by the leader.
type learnerProgress struct {
	seen map[uint64]learnerState
}

type learnerState struct {
	match uint64 // the last entry of the leader's log that it has
	since time.Time
}

// stalled returns the learners that have not come further for longer than stall. match has the current learners. Learners that are gone
// are forgotten, and on a member that does not lead, all.
func (p *learnerProgress) stalled(match map[uint64]uint64, now time.Time, stall time.Duration) (ids []uint64) {
	next := map[uint64]learnerState{}
	for id, m := range match {
		before, known := p.seen[id]
		if !known || before.match != m {
			before = learnerState{m, now}
		}
		next[id] = before
		if now.Sub(before.since) >= stall {
			ids = append(ids, id)
		}
	}
	p.seen = next
	return ids
}

// evict removes learners that make no progress, if this member leads.
func (e *Etcd) evict(ctx context.Context, server *embed.Etcd, client *clientv3.Client, p *learnerProgress, now time.Time) {
	for _, id := range p.stalled(learnerMatch(server), now, e.stall) {
		ctx, cancel := context.WithTimeout(ctx, requestTimeout)
		_, err := client.MemberRemove(ctx, id)
		cancel()
		if err != nil && !errors.Is(err, rpctypes.ErrMemberNotFound) {
			e.log.Warn("a server that began to join makes no progress, and cannot be removed from etcd", "member", id, "err", err)
			continue
		}
		e.log.Warn("a server that began to join has made no progress, and was removed from etcd so that others can join: start it again to join", "member", id, "after", e.stall)
	}
}

// learnerMatch returns how far each learner is, without those that respond while they receive a snapshot: a large one takes time. Only the leader
// knows; elsewhere it is empty. etcd exports raft's state as a variable of
// the process (init in etcdserver/raft.go), of the member that started last.
func learnerMatch(server *embed.Etcd) map[uint64]uint64 {
	match := map[uint64]uint64{}
	variable, ok := expvar.Get("raft.status").(expvar.Func)
	if !ok || uint64(server.Server.Leader()) != uint64(server.Server.MemberID()) {
		return match
	}
	for _, m := range server.Server.Cluster().Members() {
		if m.IsLearner {
			match[uint64(m.ID)] = 0
		}
	}
	if len(match) == 0 {
		return match
	}
	status, ok := variable().(raft.Status)
	if !ok || status.ID != uint64(server.Server.MemberID()) {
		return nil
	}
	for id := range match {
		p := status.Progress[id]
		match[id] = p.Match
		if p.State == tracker.StateSnapshot && p.RecentActive {
			delete(match, id)
		}
	}
	return match
}
