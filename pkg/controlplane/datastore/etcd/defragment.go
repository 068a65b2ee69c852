package etcd

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

const (
	// defragmentAfter is how long a member runs between two defragmentations.
	defragmentAfter = 7 * 24 * time.Hour
	// defragmentCheck is how often a member checks whether it is its turn, plus or minus half of it, so that members do not check at once.
	defragmentCheck = time.Hour
	// turnLife is how long a member may have its turn, in seconds: a defragmentation stops its requests, so it cannot extend it meanwhile.
	turnLife = 15 * 60
	// turnKey exists while a member defragments. Next to the API server's prefix, as claimKey of package datastore.
	turnKey = "/polymesh/etcd/defragmenting"
	// doneKey is when each member has defragmented last.
	doneKey = "/polymesh/etcd/defragmented"
)

// defragmented is the value of doneKey: the time of the last defragmentation, or of the check that found it needless, by member.
type defragmented map[uint64]time.Time

// care defragments the database once a week, until ctx ends. The API server compacts it; only this gives space back.
func (e *Etcd) care(ctx context.Context, client *clientv3.Client) {
	for {
		wait := time.NewTimer(defragmentCheck/2 + rand.N(defragmentCheck))
		select {
		case <-ctx.Done():
			wait.Stop()
			return
		case <-wait.C:
		}
		if err := e.defragment(ctx, client, time.Now(), defragAbove<<20); err != nil && ctx.Err() == nil {
			e.log.Warn("the weekly defragmentation of etcd is put off", "err", err)
		}
	}
}

// defragment defragments this member if it is its turn, and if that frees at least so many bytes.
func (e *Etcd) defragment(ctx context.Context, client *clientv3.Client, now time.Time, least int64) (err error) {
	server := e.server.Load().Server
	if server.IsLearner() {
		return nil
	}
	self := uint64(server.MemberID())
	short, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	done, revision, err := readDefragmented(short, client)
	if err != nil {
		return err
	}
	if now.Sub(done[self]) < defragmentAfter {
		return nil
	}
	members, err := e.Members(short)
	if err != nil {
		return err
	}
	if turn, err := isTurn(members, done, self, now); err != nil || !turn {
		return err
	}
	// One at a time: the key is gone with its lease if this member fails.
	lease, err := client.Grant(short, turnLife)
	if err != nil {
		return fmt.Errorf("take the turn: %w", err)
	}
	defer func() {
		give, cancel := context.WithTimeout(context.WithoutCancel(ctx), requestTimeout)
		defer cancel()
		if _, revoked := client.Revoke(give, lease.ID); revoked != nil && !errors.Is(revoked, rpctypes.ErrLeaseNotFound) {
			err = errors.Join(err, fmt.Errorf("give the turn back: %w", revoked))
		}
	}()
	taken, err := client.Txn(short).If(clientv3.Compare(clientv3.CreateRevision(turnKey), "=", 0), clientv3.Compare(clientv3.ModRevision(doneKey), "=", revision)).
		Then(clientv3.OpPut(turnKey, fmt.Sprint(self), clientv3.WithLease(lease.ID))).Commit()
	if err != nil {
		return fmt.Errorf("take the turn: %w", err)
	}
	if !taken.Succeeded {
		return nil // another member has it
	}
	backend := server.Backend()
	if before := backend.Size(); before-backend.SizeInUse() >= least {
		long, cancel := context.WithTimeout(ctx, maintainTimeout)
		defer cancel()
		begin := time.Now()
		if _, err := client.Defragment(long, e.Endpoint().Servers); err != nil {
			return fmt.Errorf("defragment etcd: %w", err)
		}
		e.log.Info("defragmented etcd", "bytes", backend.Size(), "before", before, "after", time.Since(begin).Round(time.Millisecond).String())
	}
	done[self] = now
	keep := defragmented{}
	for _, m := range members {
		if at, ok := done[m.ID]; ok {
			keep[m.ID] = at
		}
	}
	text, err := json.Marshal(keep)
	if err != nil {
		return err
	}
	last, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	if _, err := client.Put(last, doneKey, string(text)); err != nil {
		return fmt.Errorf("note the defragmentation: %w", err)
	}
	return nil
}

// readDefragmented reads doneKey, and its revision.
func readDefragmented(ctx context.Context, client *clientv3.Client) (done defragmented, revision int64, err error) {
	got, err := client.Get(ctx, doneKey)
	if err != nil {
		return nil, 0, fmt.Errorf("read when etcd was defragmented: %w", err)
	}
	done = defragmented{}
	if len(got.Kvs) == 0 {
		return done, 0, nil
	}
	// What cannot be read is written again.
	_ = json.Unmarshal(got.Kvs[0].Value, &done)
	if done == nil {
		done = defragmented{}
	}
	return done, got.Kvs[0].ModRevision, nil
}

// isTurn reports whether it is a member's turn: followers have it in the order of their ids, the leader when all of them have had it. A member
// does not respond meanwhile, so there is none while another one is away.
func isTurn(members []Member, done defragmented, self uint64, now time.Time) (bool, error) {
	voters := slices.DeleteFunc(slices.Clone(members), func(m Member) bool { return m.Learner })
	slices.SortFunc(voters, func(a, b Member) int {
		switch {
		case a.Leader != b.Leader && a.Leader:
			return 1
		case a.Leader != b.Leader:
			return -1
		}
		return cmp.Compare(a.ID, b.ID)
	})
	for _, m := range voters {
		if m.Problem != "" {
			return false, fmt.Errorf("member %s does not respond: %s", m.Node(), m.Problem)
		}
	}
	for _, m := range voters {
		if now.Sub(done[m.ID]) >= defragmentAfter {
			return m.ID == self, nil
		}
	}
	return false, nil
}
