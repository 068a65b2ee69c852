// Package server is the store as a whole: it locks the data dir, starts the parts in their order, and serves their APIs on UNIX sockets.
//
// It owns the sockets, the limits of requests, and the dependencies between parts (components.go). A failed part is restarted and reported
// in the status, while the others continue. cmd/polymesh-observe calls Run.
package server

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"polymesh.dev/polymesh/observe/config"
	"polymesh.dev/polymesh/observe/datadir"
)

// How many queries, writes and live logs are answered at a time: on the socket for root, and on all sockets for pods together, so that pods
// cannot keep an administrator out. More would only compete for the processors, and for memory.
const (
	rootQueries, rootWrites, rootTails          = 8, 8, 8
	clusterQueries, clusterWrites, clusterTails = 6, 16, 4
)

// Run runs the store until ctx ends, and returns when everything is on disk. The error is a datadir.HeldError if another process uses the
// data dir.
func Run(ctx context.Context, o *config.Options, version string, log *slog.Logger) error {
	since := time.Now()
	dir, err := open(o)
	if err != nil {
		return err
	}
	defer dir.Close()
	budget, err := dir.Budget(o.Disk)
	if err != nil {
		return err
	}
	log.Info("starting", "version", version, "dir", dir.Path(), "disk", budget.Total.String(), "retention", o.Retention.String(), "socket", o.Socket)
	// The folder also has the server's sockets, which other users' containers must be able to reach.
	if err := os.MkdirAll(filepath.Dir(o.Socket), 0o711); err != nil {
		return fmt.Errorf("create the folder of the socket: %w", err)
	}
	p := newParts(o, dir, budget, log)
	components := p.components()
	if o.ReadOnly {
		// Beside the socket, so that it is removed together with the socket's folder.
		if p.temp, err = os.MkdirTemp(filepath.Dir(o.Socket), "files-"); err != nil {
			return fmt.Errorf("make a folder for what is copied: %w", err)
		}
		defer os.RemoveAll(p.temp)
		components = p.readers()
	}
	if o.ClusterSockets != "" {
		pods := newFront(clusterQueries, clusterWrites, clusterTails, log)
		sockets := clusterSockets(o.ClusterSockets, func() []endpoint { return p.clusterEndpoints(o.ClusterSockets, pods) })
		sockets.After = []string{receivers}
		components = append(components, sockets)
	}
	life, err := newLifecycle(log, components)
	if err != nil {
		return err
	}
	status := statusHandler(Status{Version: version, Since: since, DataDir: dir.Path(), Disk: int64(budget.Total), Retention: int64(o.Retention / time.Second)}, life, p.nodes)
	known, files := status, &slot{name: "the files"}
	if o.ReadOnly {
		status = files
	}
	root := p.rootHandler(newFront(rootQueries, rootWrites, rootTails, log), status)
	return operate(ctx, o.Socket, root, life, func(ctx context.Context, fail func(error)) {
		if !o.ReadOnly {
			return
		}
		// A read-only store waits until all parts are open, and fails with the first error.
		if err := life.opened(ctx); err != nil {
			fail(err)
			return
		}
		files.set(known)
	}, log)
}

// operate runs the components, and serves root's socket, until ctx ends. beside runs meanwhile, and can end both.
func operate(ctx context.Context, socket string, root http.Handler, life *lifecycle, beside func(context.Context, func(error)), log *slog.Logger) error {
	s, err := serve([]endpoint{{socket, 0o600, -1, newHTTP(root, log)}})
	if err != nil {
		return err
	}
	ended := make(chan struct{})
	running, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() {
		defer close(ended)
		select {
		case err := <-s.ended:
			cancel(err)
		case <-running.Done():
		}
		// Before the stores that it reads are closed.
		s.stop(context.WithoutCancel(ctx))
	}()
	if beside != nil {
		go beside(running, cancel)
	}
	life.run(running, ended)
	log.Info("stopped")
	if ctx.Err() != nil {
		return nil
	}
	return context.Cause(running)
}

// open opens the data dir as the options say.
func open(o *config.Options) (*datadir.Dir, error) {
	if o.ReadOnly {
		return datadir.OpenReadOnly(o.DataDir)
	}
	return datadir.Open(o.DataDir, o.Socket)
}
