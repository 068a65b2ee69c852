package component

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"
)

// terms are a server's terms as the leader; each value begins or ends one.
type terms chan bool

func (ts terms) Watch(ctx context.Context, term func(context.Context)) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-ts:
		}
		leading, lose := context.WithCancel(ctx)
		go func() {
			select {
			case <-ts:
			case <-leading.Done():
			}
			lose()
		}()
		term(leading)
		lose()
	}
}

func TestElected(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := &journal{}
		var built []*piece
		build := func() Component {
			p := &piece{journal: j, name: fmt.Sprint("mesh", len(built)), failure: make(chan error, 1)}
			built = append(built, p)
			return p
		}
		turn := make(terms)
		m := manager()
		m.Add(Elected(turn, build, slog.New(slog.DiscardHandler)))
		ctx, cancel := context.WithCancel(context.Background())
		done := run(ctx, m)
		state := func(want State) {
			t.Helper()
			time.Sleep(watchPoll + time.Second)
			if got := m.Status(context.Background())[0].State; got != want {
				t.Errorf("the state is %s, want %s", got, want)
			}
		}
		// A server that is not the leader blocks neither startup nor the components that wait for this one.
		<-m.Settled()
		state(Standby)
		turn <- true
		state(Ready)
		turn <- false
		state(Standby)
		j.index(t, "stop mesh0")

		// A component that fails on the leader is restarted, and the server keeps running.
		turn <- true
		state(Ready)
		built[1].failure <- errors.New("lost the API server")
		state(Ready)
		j.index(t, "start mesh2")
		turn <- false
		state(Standby)

		// The end of the server is the end of its term.
		turn <- true
		state(Ready)
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		j.index(t, "stop mesh3")
	})
}

// With a single server, the component is not wrapped.
func TestElectedWithoutLeadership(t *testing.T) {
	p := &piece{journal: &journal{}, name: "mesh"}
	if c := Elected(nil, func() Component { return p }, slog.New(slog.DiscardHandler)); c != Component(p) {
		t.Errorf("it is %T", c)
	}
}
