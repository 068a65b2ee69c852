package server

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

func discard() *slog.Logger { return slog.New(slog.DiscardHandler) }

// record records what happens, in order.
type record struct {
	mu    sync.Mutex
	lines []string
}

func (j *record) add(line string) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.lines = append(j.lines, line)
}

func (j *record) component(name string, start func() error, after ...string) Component {
	return Component{Name: name, After: after, Start: func(context.Context) (Running, error) {
		j.add("start " + name)
		if start != nil {
			if err := start(); err != nil {
				return Running{}, err
			}
		}
		return Running{Stop: func(context.Context) error { j.add("stop " + name); return nil }}, nil
	}}
}

func states(l *lifecycle) map[string]State {
	m := map[string]State{}
	for _, s := range l.status() {
		m[s.Name] = s.State
	}
	return m
}

func TestOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := &record{}
		l, err := newLifecycle(discard(), []Component{j.component("store", nil), j.component("reader", nil, "store"), j.component("api", nil, "reader", "store")})
		require.NoError(t, err)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); l.run(ctx, ctx.Done()) }()
		synctest.Wait()
		require.Equal(t, map[string]State{"store": Ready, "reader": Ready, "api": Ready}, states(l))
		cancel()
		<-done
		require.Equal(t, []string{"start store", "start reader", "start api", "stop api", "stop reader", "stop store"}, j.lines)
		require.Equal(t, map[string]State{"store": Stopped, "reader": Stopped, "api": Stopped}, states(l))
	})
	_, err := newLifecycle(discard(), []Component{{Name: "a", After: []string{"b"}}, {Name: "b"}})
	require.ErrorContains(t, err, "a waits for b, which is not before it")
}

// A part that cannot start keeps those that need it waiting, and no one else.
func TestFailedStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := &record{}
		var broken error = errors.New("the disk is damaged")
		l, err := newLifecycle(discard(), []Component{
			j.component("metrics", func() error { return broken }), j.component("page", nil, "metrics"), j.component("logs", nil),
			j.component("traces", func() error { panic("unexpected") }),
		})
		require.NoError(t, err)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); l.run(ctx, ctx.Done()) }()
		synctest.Wait()
		require.Equal(t, map[string]State{"metrics": Failed, "page": Waiting, "logs": Ready, "traces": Failed}, states(l))
		require.Equal(t, "the disk is damaged", l.status()[0].Message)
		require.Equal(t, "panicked: unexpected", l.status()[3].Message)
		time.Sleep(10 * time.Minute)
		restarts := l.status()[0].Restarts
		require.Greater(t, restarts, 8)
		require.Less(t, restarts, 20)
		broken = nil
		time.Sleep(pauseMax)
		synctest.Wait()
		require.Equal(t, map[string]State{"metrics": Ready, "page": Ready, "logs": Ready, "traces": Failed}, states(l))
		require.Empty(t, l.status()[0].Message)
		cancel()
		<-done
		require.False(t, slices.Contains(j.lines, "stop traces"))
	})
}

// What ends by itself is stopped and started again.
func TestWorkThatEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := &record{}
		ends := make(chan error)
		c := j.component("tailer", nil)
		start := c.Start
		c.Start = func(ctx context.Context) (Running, error) {
			r, err := start(ctx)
			r.Run = func(ctx context.Context) error {
				select {
				case err := <-ends:
					return err
				case <-ctx.Done():
					return nil
				}
			}
			r.Problem = func() string { return "3 lines dropped" }
			r.Numbers = func() map[string]int64 { return map[string]int64{"lines": 7} }
			return r, err
		}
		l, err := newLifecycle(discard(), []Component{c})
		require.NoError(t, err)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); l.run(ctx, ctx.Done()) }()
		synctest.Wait()
		s := l.status()[0]
		require.Equal(t, "3 lines dropped", s.Message)
		require.Equal(t, map[string]int64{"lines": 7}, s.Numbers)
		ends <- errors.New("lost the folder")
		synctest.Wait()
		s = l.status()[0]
		require.Equal(t, Failed, s.State)
		require.Equal(t, "lost the folder", s.Message)
		require.Nil(t, s.Numbers)
		time.Sleep(pauseMin)
		synctest.Wait()
		require.Equal(t, Ready, l.status()[0].State)
		require.Equal(t, 1, l.status()[0].Restarts)
		cancel()
		<-done
		require.Equal(t, []string{"start tailer", "stop tailer", "start tailer", "stop tailer"}, j.lines)
	})
}
