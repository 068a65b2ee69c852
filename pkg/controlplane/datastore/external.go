package datastore

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"polymesh.dev/polymesh/pkg/component"
	"polymesh.dev/polymesh/pkg/config"
)

// External is the component "datastore" where that is an etcd outside: the API server connects to it directly.
type External struct {
	Outside
	component.Background
	endpoint Endpoint

	mu      sync.Mutex
	client  *clientv3.Client
	version string
	away    []string // members that did not answer the last check, and why
}

var (
	_ Store           = (*External)(nil)
	_ component.Noted = (*External)(nil)
)

// NewExternal returns a datastore that is not connected yet.
func NewExternal(d config.Datastore) *External {
	return &External{endpoint: Endpoint{Servers: string(d.Endpoint), CA: d.CAFile, Cert: d.CertFile, Key: d.KeyFile, LeaderElect: true}}
}

// Endpoint implements Store.
func (e *External) Endpoint() Endpoint { return e.endpoint }

// Name implements component.Component.
func (*External) Name() string { return "datastore" }

// Version is the version of etcd, once it has answered.
func (e *External) Version() string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return strings.TrimSpace("etcd " + e.version)
}

// Init does nothing: config has checked the endpoint.
func (*External) Init(context.Context) error { return nil }

// Start connects in the background.
func (e *External) Start(ctx context.Context) error {
	client, err := e.endpoint.Client()
	if err != nil {
		return err
	}
	e.mu.Lock()
	e.client = client
	e.mu.Unlock()
	e.Go(ctx, func(ctx context.Context) {
		<-ctx.Done()
		_ = client.Close()
	})
	return nil
}

// memberTimeout is the time for one member's answer.
const memberTimeout = 3 * time.Second

// Ready returns nil if etcd answers a read that needs a majority of its members.
func (e *External) Ready(ctx context.Context) error {
	e.mu.Lock()
	client := e.client
	e.mu.Unlock()
	if client == nil {
		return errors.New("not connected yet")
	}
	e.checkMembers(ctx, client)
	ctx, cancel := context.WithTimeout(ctx, memberTimeout)
	defer cancel()
	// The key of etcd's and the API server's own health checks.
	if _, err := client.Get(ctx, "/registry/health"); err != nil {
		e.mu.Lock()
		defer e.mu.Unlock()
		if len(e.away) > 0 {
			return fmt.Errorf("etcd has no majority that answers: %s", strings.Join(e.away, "; "))
		}
		return fmt.Errorf("etcd at %s: %w", e.endpoint.Servers, err)
	}
	return nil
}

// checkMembers asks each member for its status.
func (e *External) checkMembers(ctx context.Context, client *clientv3.Client) {
	ctx, cancel := context.WithTimeout(ctx, memberTimeout)
	defer cancel()
	members := client.Endpoints()
	problems, versions := make([]string, len(members)), make([]string, len(members))
	var wait sync.WaitGroup
	for i, member := range members {
		wait.Go(func() {
			status, err := client.Status(ctx, member)
			if err != nil {
				problems[i] = fmt.Sprintf("%s: %v", member, err)
				return
			}
			versions[i] = status.Version
		})
	}
	wait.Wait()
	e.mu.Lock()
	defer e.mu.Unlock()
	e.away = nil
	for i := range members {
		if problems[i] != "" {
			e.away = append(e.away, problems[i])
		} else {
			e.version = versions[i]
		}
	}
}

// Notes implements component.Noted: members that are away.
func (e *External) Notes(context.Context) []string {
	e.mu.Lock()
	defer e.mu.Unlock()
	var notes []string
	for _, problem := range e.away {
		notes = append(notes, "a member of etcd does not answer: "+problem)
	}
	return notes
}
