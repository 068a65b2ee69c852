//go:build integration

package etcd

import (
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"
)

func TestTurns(t *testing.T) {
	now := time.Now()
	old := now.Add(-8 * 24 * time.Hour)
	all := func(change func([]Member)) []Member {
		m := []Member{{ID: 3, Name: "c-1"}, {ID: 1, Name: "a-1", Leader: true}, {ID: 2, Name: "b-1"}, {ID: 4, Name: "d-1", Learner: true, Problem: "no answer"}}
		change(m)
		return m
	}
	none := func([]Member) {}
	for _, c := range []struct {
		what    string
		members []Member
		done    defragmented
		turn    uint64 // 0 for none
		err     string
	}{
		{"at first, a follower", all(none), defragmented{}, 2, ""},
		{"the other follower", all(none), defragmented{2: now}, 3, ""},
		{"the leader last", all(none), defragmented{2: now, 3: now, 1: old}, 1, ""},
		{"all done", all(none), defragmented{1: now, 2: now, 3: now}, 0, ""},
		{"another leader", all(func(m []Member) { m[1].Leader, m[2].Leader = false, true }), defragmented{}, 1, ""},
		{"one is away", all(func(m []Member) { m[0].Problem = "no answer" }), defragmented{}, 0, "member c does not respond"},
	} {
		for id := uint64(1); id <= 4; id++ {
			turn, err := isTurn(c.members, c.done, id, now)
			if turn != (id == c.turn) || (err != nil) != (c.err != "") || err != nil && !strings.Contains(err.Error(), c.err) {
				t.Errorf("%s: member %d: %v, %v", c.what, id, turn, err)
			}
		}
	}
}

// Three members that all want to defragment do it one after the other, the leader last, and once a week.
func TestDefragmentation(t *testing.T) {
	t.Parallel()
	all := servers(t, "a", "b", "c")
	all[0].start(t)
	all[0].ready(t)
	all[1].join(t, all[0])
	all[2].join(t, all[0])
	for i := range 200 {
		if _, err := all[0].client(t).Put(t.Context(), "/registry/large", strings.Repeat(fmt.Sprint(i%10), 64<<10)); err != nil {
			t.Fatal(err)
		}
	}
	c := all[0].client(t)
	got, err := c.Get(t.Context(), "/registry/large")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Compact(t.Context(), got.Header.Revision); err != nil {
		t.Fatal(err)
	}
	size := map[string]int64{}
	for _, s := range all {
		eventually(t, s.name+" has compacted", func() error {
			// What a compaction has removed counts as free from the next writes on.
			if _, err := c.Put(t.Context(), "/registry/small", "x"); err != nil {
				return err
			}
			if b := s.server.Load().Server.Backend(); b.Size()-b.SizeInUse() < 4<<20 {
				return fmt.Errorf("%d of %d bytes are in use", b.SizeInUse(), b.Size())
			}
			return nil
		})
		size[s.name] = s.server.Load().Server.Backend().Size()
	}
	now := time.Now()
	var order []string
	for len(order) < 3 {
		var wait sync.WaitGroup
		before := map[string]time.Time{}
		done, _, err := readDefragmented(t.Context(), c)
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range all {
			before[s.name] = done[uint64(s.server.Load().Server.MemberID())]
			wait.Go(func() {
				if err := s.defragment(t.Context(), s.client(t), now, 1<<20); err != nil {
					t.Errorf("%s: %v", s.name, err)
				}
			})
		}
		wait.Wait()
		if done, _, err = readDefragmented(t.Context(), c); err != nil {
			t.Fatal(err)
		}
		round := 0
		for _, s := range all {
			if !done[uint64(s.server.Load().Server.MemberID())].Equal(before[s.name]) {
				order = append(order, s.name)
				round++
			}
		}
		// Members that check at the same moment may find their turn one after the other.
		if round == 0 {
			t.Fatalf("no member was defragmented after %q", order)
		}
	}
	for _, s := range all {
		if now := s.server.Load().Server.Backend().Size(); now >= size[s.name] {
			t.Errorf("%s has %d bytes, and had %d", s.name, now, size[s.name])
		}
	}
	if leader := order[2]; !all[0].members(t)[leader].Leader {
		t.Errorf("the order is %q, with members %+v", order, all[0].members(t))
	}
	revision := func() int64 {
		got, err := c.Get(t.Context(), doneKey)
		if err != nil {
			t.Fatal(err)
		}
		return got.Kvs[0].ModRevision
	}
	last := revision()
	for _, s := range all {
		if err := s.defragment(t.Context(), s.client(t), now.Add(time.Hour), 0); err != nil {
			t.Error(err)
		}
	}
	if revision() != last {
		t.Error("a member was defragmented twice within a week")
	}
	if got, err := c.Get(t.Context(), turnKey); err != nil || len(got.Kvs) != 0 {
		t.Errorf("the turn is not given back: %v, %v", got, err)
	}
}
