package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"polymesh.dev/polymesh/test/e2e/node"
)

// memberIdle are a server with etcd alone, then the three of a cluster, in the order in which they start.
var memberIdle = []setting{"one member", "first of three", "second of three", "third of three"}

// members measures servers with etcd at rest: the only one, and then the three of a cluster, one after the other.
func (b *bench) members(ctx context.Context) (err error) {
	c, err := node.NewCluster()
	if err != nil {
		return err
	}
	defer func() {
		closing, cancel := context.WithTimeout(context.WithoutCancel(ctx), 3*time.Minute)
		defer cancel()
		err = errors.Join(err, c.Close(closing))
	}()
	var servers []*node.Node
	add := func(o node.Options) error {
		n, err := c.Add(o)
		if err != nil {
			return err
		}
		servers = append(servers, n)
		return startReady(ctx, n)
	}
	if err := add(node.Options{Args: []string{"--cluster-init", "--disable", "istio"}}); err != nil {
		return err
	}
	if err := b.rest(ctx, servers[0], memberIdle[0]); err != nil {
		return err
	}
	for range 2 {
		if err := add(node.Options{Joins: servers[0], Serves: true}); err != nil {
			return err
		}
	}
	for i, n := range servers {
		if err := b.rest(ctx, n, memberIdle[1+i]); err != nil {
			return err
		}
	}
	return nil
}

// memberRows are those of servers at rest, by datastore.
func memberRows() []row {
	rows := []row{
		{"bare server RSS", "one server, SQLite: server, RSS", "MB", "", ""},
		{"bare server anonymous", "one server, SQLite: server, anonymous", "MB", "", ""},
		{"bare all anonymous", "one server, SQLite: all processes, anonymous", "MB", "", ""},
		{"bare all CPU", "one server, SQLite: all processes, CPU", "% of a core", "", ""},
	}
	for i, id := range memberIdle {
		what := "one server, etcd"
		if i > 0 {
			what = fmt.Sprintf("three servers, etcd, the %s", id)
		}
		rows = append(rows,
			row{figureID(string(id) + " server RSS"), what + ": server, RSS", "MB", "", ""},
			row{figureID(string(id) + " server anonymous"), what + ": server, anonymous", "MB", "", ""},
			row{figureID(string(id) + " all anonymous"), what + ": all processes, anonymous", "MB", "", ""},
			row{figureID(string(id) + " all CPU"), what + ": all processes, CPU", "% of a core", "", ""})
	}
	return rows
}
