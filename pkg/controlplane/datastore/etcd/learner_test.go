//go:build integration

package etcd

import (
	"errors"
	"fmt"
	"testing"
	"time"
)

// The leader removes a learner that never starts, so that another server can join. No other test may run next to this one: the learners'
// progress is that of the member that started last in this process (learnerMatch).
func TestLearnerWithoutProgress(t *testing.T) {
	all := servers(t, "a", "b", "c")
	a, b, c := all[0], all[1], all[2]
	a.stall = 2 * time.Second
	a.start(t)
	a.ready(t)
	lost := New(b.opts)
	id, err := lost.identity()
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := a.AddLearner(t.Context(), "b", lost.peer(id.Name)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the learner is removed", func() error {
		if members := a.members(t); len(members) != 1 {
			return errors.New("it is still a member")
		}
		return nil
	})
	c.join(t, a)
}

// A member that lost the others knows since when there is no leader.
func TestLeaderlessSince(t *testing.T) {
	t.Parallel()
	all := servers(t, "a", "b")
	a, b := all[0], all[1]
	a.start(t)
	a.ready(t)
	b.join(t, a)
	led := func() error {
		if since := a.LeaderlessSince(); !since.IsZero() {
			return fmt.Errorf("there is none since %s", since)
		}
		return nil
	}
	eventually(t, "there is a leader", led)
	before := time.Now()
	stop(t, b.Etcd)
	eventually(t, "there is no leader", func() error {
		if since := a.LeaderlessSince(); since.IsZero() {
			return errors.New("there is one")
		} else if since.Before(before) {
			t.Fatalf("since %s", since)
		}
		return nil
	})
	b.start(t)
	eventually(t, "there is a leader again", led)
}
