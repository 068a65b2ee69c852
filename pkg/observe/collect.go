package observe

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"polymesh.dev/polymesh/pkg/observe/route"
)

const (
	// askInterval is how often a node asks whether the cluster has a store.
	askInterval = time.Minute
	// absences is how many times in a row the answer must be that there is no store before the collector ends: a server that has just started gives nodes no
	// permission for a moment.
	absences = 5
)

// follow runs the process while the cluster has a store. If it has run here before, it starts before a server has answered, so that it also records
// while no server answers.
func (c *Component) follow(ctx context.Context) {
	for ctx.Err() == nil {
		if !c.recorded() && !c.awaitStore(ctx) {
			return
		}
		c.idle.Store(false)
		session, cancel := context.WithCancel(ctx)
		kept := make(chan struct{})
		go func() {
			defer close(kept)
			c.keep(session)
		}()
		none := c.awaitNone(ctx)
		cancel()
		<-kept
		if !none {
			return
		}
		c.log.Info("the cluster has no store of metrics, logs and traces any more: nothing is collected for it")
		c.set(&c.summary, "the cluster has no store")
		c.idle.Store(true)
		if err := errors.Join(c.at.end(ctx), os.RemoveAll(c.at.folder)); err != nil {
			c.log.Warn("the collector, or what it has kept, is still there", "err", err)
			return
		}
	}
}

// recorded reports whether a collector has run here.
func (c *Component) recorded() bool {
	_, err := os.Lstat(c.at.file("meta"))
	return err == nil
}

// awaitStore waits until the cluster has a store. It returns false if ctx has ended.
func (c *Component) awaitStore(ctx context.Context) bool {
	for {
		server, err := route.Ask(ctx, *c.o.Collect)
		switch {
		case ctx.Err() != nil:
			return false
		case err == nil:
			c.server.Store(&server)
			return true
		case errors.Is(err, route.ErrNone):
			c.set(&c.summary, "the cluster has no store")
			c.idle.Store(true)
		default:
			c.set(&c.problem, err.Error())
		}
		select {
		case <-ctx.Done():
			return false
		case <-time.After(c.asks):
		}
	}
}

// awaitNone waits until the cluster has no store. It returns false if ctx has ended.
func (c *Component) awaitNone(ctx context.Context) bool {
	for none := 0; none < absences; {
		server, err := route.Ask(ctx, *c.o.Collect)
		switch {
		case err == nil:
			c.server.Store(&server)
			none = 0
		case errors.Is(err, route.ErrNone):
			none++
		}
		select {
		case <-ctx.Done():
			return false
		case <-time.After(c.asks):
		}
	}
	return ctx.Err() == nil
}

// sent is one line about what a collector has sent, and what waits.
func (s *status) sent(server string, now time.Time) string {
	var waiting, limit, pushed int64
	for _, p := range s.Components {
		switch p.Name {
		case "buffer":
			waiting, limit = p.Numbers["waiting"], p.Numbers["limit"]
		case "push":
			pushed = p.Numbers["pushed"]
		}
	}
	to := "the store"
	if server != "" {
		to = "the store on " + server
	}
	last := "nothing sent yet"
	if pushed > 0 {
		last = "last sent " + max(0, now.Sub(time.UnixMilli(pushed))).Round(time.Second).String() + " ago"
	}
	const kib, mib = 1 << 10, 1 << 20
	return fmt.Sprintf("to %s: %s, %d KiB of %d MiB wait", to, last, (waiting+kib-1)/kib, limit/mib)
}
