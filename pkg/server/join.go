package server

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"slices"
	"time"

	kubernetes "k8s.io/component-base/version"

	"polymesh.dev/polymesh/pkg/atomicfile"
	"polymesh.dev/polymesh/pkg/bootstrap"
	"polymesh.dev/polymesh/pkg/certificate"
	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/controlplane/datastore"
	"polymesh.dev/polymesh/pkg/controlplane/datastore/etcd"
	"polymesh.dev/polymesh/pkg/join"
	"polymesh.dev/polymesh/pkg/layout"
	"polymesh.dev/polymesh/pkg/process"
	"polymesh.dev/polymesh/pkg/token"
)

// joined makes the machine one of the cluster's servers, if it is to be one and is not yet, and returns its configuration with the
// cluster's settings. The membership is nil for a server that has joined no others.
func joined(ctx context.Context, cfg *config.Server, p *process.Process) (*config.Server, *join.ServerMembership, error) {
	member, err := join.ReadServerMembership(cfg.DataDir)
	if err == nil && cfg.Server != "" && cfg.Datastore.Kind == config.SQLite {
		member, err = afterRemoval(cfg, p, member)
	}
	if err != nil {
		return nil, nil, err
	}
	if member != nil && !member.Joining {
		return again(ctx, cfg, p, member)
	}
	own := false
	if member == nil {
		own, err = ownCluster(cfg)
	}
	switch {
	case err != nil:
		return nil, nil, err
	case own && cfg.Token.ID != "":
		return cfg, nil, sameCluster(cfg)
	case own && cfg.Server != "":
		p.Log.Info("this server has the data of its cluster already: --server is not used", "server", cfg.Server)
		return cfg, nil, nil
	case own, cfg.Server == "" && cfg.Datastore.Kind == config.SQLite:
		return cfg, nil, nil
	case cfg.Server != "":
		return byServer(ctx, cfg, p)
	}
	return byDatastore(ctx, cfg, p)
}

// afterRemoval lets a server that the cluster has removed join again, as a new member: the old one's data is put aside. The first server
// has a membership from then on.
func afterRemoval(cfg *config.Server, p *process.Process, member *join.ServerMembership) (*join.ServerMembership, error) {
	aside, err := etcd.SetAside(cfg.DataDir.Etcd(), time.Now())
	if err != nil || aside == "" {
		return member, err
	}
	p.Log.Info("this server was removed from the cluster: it joins again, with no data", "former", aside)
	if member != nil {
		return member, nil
	}
	member = &join.ServerMembership{NodeName: p.Name, Server: cfg.Server, Datastore: bootstrap.Etcd, Settings: cfg.Settings()}
	return member, member.Write(cfg.DataDir)
}

// ownCluster reports whether the data dir has the authorities of a cluster, and is no rest of an interrupted join.
func ownCluster(cfg *config.Server) (bool, error) {
	if _, err := os.Stat(certificate.Store(cfg.DataDir.TLS()).Cert(certificate.ServerCA)); err != nil {
		return false, ignoreMissing(err)
	}
	if cfg.Datastore.Kind != config.SQLite {
		return true, nil
	}
	db, err := os.ReadDir(cfg.DataDir.Server("db"))
	if err = ignoreMissing(err); err != nil || len(db) == 0 {
		return false, err
	}
	if exists, err := etcd.Exists(cfg.DataDir.Etcd()); err != nil || exists || cfg.Server == "" {
		return true, err
	}
	return true, fmt.Errorf("this machine has a cluster of its own, in SQLite: to join the one of %s, remove it with `polymesh reset` first", cfg.Server)
}

func ignoreMissing(err error) error {
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}

// sameCluster checks that the token is of the cluster whose authorities are here.
func sameCluster(cfg *config.Server) error {
	text, err := os.ReadFile(certificate.Store(cfg.DataDir.TLS()).Cert(certificate.ServerCA))
	if err != nil {
		return err
	}
	ca, err := certificate.ParseAuthority(text)
	if err != nil {
		return err
	}
	if token.Hash(ca) != cfg.Token.CAHash {
		return fmt.Errorf("the token is for another cluster than the one in %s: `polymesh reset` removes that one", cfg.DataDir)
	}
	return nil
}

// machine is this one, for the other servers.
func machine(cfg *config.Server, p *process.Process, server string) join.Machine {
	return join.Machine{
		DataDir: cfg.DataDir, Server: server, Token: cfg.Token, NodeName: p.Name, NodeIP: p.IP, ExternalIP: cfg.ExternalIP, Version: kubernetes.Get().GitVersion, Log: p.Log,
		Waiting: func(why string) { p.Waiting("join", "waiting for "+server+": "+why) },
	}
}

// byServer joins by another server.
func byServer(ctx context.Context, cfg *config.Server, p *process.Process) (*config.Server, *join.ServerMembership, error) {
	p.Waiting("join", "joining the servers of "+cfg.Server)
	bundle, key, err := join.JoinServers(ctx, machine(cfg, p, cfg.Server))
	if err != nil {
		return nil, nil, err
	}
	return keep(cfg, p, bundle, key)
}

// byDatastore joins the cluster in a datastore outside, if there is one: no other server has to run.
func byDatastore(ctx context.Context, cfg *config.Server, p *process.Process) (_ *config.Server, _ *join.ServerMembership, err error) {
	p.Waiting("join", "looking for a cluster in the datastore")
	db := newDatastore(cfg, p, nil)
	if err := db.Init(ctx); err != nil {
		return nil, nil, err
	}
	if err := db.Start(ctx); err != nil {
		return nil, nil, err
	}
	defer func() {
		stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
		defer cancel()
		err = errors.Join(err, db.Stop(stop))
	}()
	for why := ""; ; {
		err := db.Ready(ctx)
		if err == nil {
			break
		}
		if text := err.Error(); text != why {
			p.Log.Info("waiting for the datastore", "err", text)
			p.Waiting("join", "waiting for the datastore: "+text)
			why = text
		}
		select {
		case <-ctx.Done():
			return nil, nil, ctx.Err()
		case <-time.After(readyInterval):
		}
	}
	client, err := db.Endpoint().Client()
	if err != nil {
		return nil, nil, err
	}
	defer client.Close()
	store := bootstrap.Store{Client: client}
	exists, err := store.Exists(ctx)
	switch {
	case err != nil:
		return nil, nil, err
	case !exists && cfg.Token.ID == "":
		return cfg, nil, nil // the cluster's first server
	case !exists:
		return nil, nil, errors.New("a token is set, but the datastore has no cluster: start the first server without a token; it writes one to server/token in its data dir")
	case cfg.Token.ID == "":
		return nil, nil, fmt.Errorf("the datastore holds a cluster: to join its servers, give --token-file with the token that `cat %s` prints on one of them", layout.DefaultDataDir.ServerToken())
	}
	bundle, key, err := store.Open(ctx, cfg.Token)
	if errors.Is(err, bootstrap.ErrNone) {
		err = fmt.Errorf("the cluster in the datastore does not accept token %s, which has expired, was revoked, or is another cluster's", cfg.Token.ID)
	}
	if err == nil {
		err = join.OfToken(bundle, cfg.Token)
	}
	if err != nil {
		return nil, nil, err
	}
	return keep(cfg, p, bundle, key)
}

const (
	stopTimeout   = 30 * time.Second
	readyInterval = 200 * time.Millisecond
)

// keep writes what the servers share. The membership, without which the machine has not joined, is written last.
func keep(cfg *config.Server, p *process.Process, b bootstrap.Bundle, key bootstrap.Key) (*config.Server, *join.ServerMembership, error) {
	switch outside := cfg.Datastore.Kind != config.SQLite; {
	case outside && b.Datastore != bootstrap.External:
		return nil, nil, errors.New("the cluster's state is in etcd on its servers: remove --datastore-endpoint here")
	case !outside && b.Datastore != bootstrap.Etcd:
		return nil, nil, errors.New("the cluster's state is in a datastore outside of its servers: give --datastore-endpoint as on the other servers")
	}
	adopted, err := cfg.Adopt(b.Settings)
	if err != nil {
		return nil, nil, err
	}
	dir := cfg.DataDir
	if err := atomicfile.MkdirAll(dir.Server("cred"), 0o700); err != nil {
		return nil, nil, err
	}
	if err := bootstrap.WriteKey(dir.BootstrapKey(), key); err != nil {
		return nil, nil, err
	}
	if b.Token != "" {
		if err := atomicfile.Write(dir.ServerToken(), []byte(b.Token+"\n"), 0o600); err != nil {
			return nil, nil, err
		}
	}
	// An interrupted join is begun again, and not taken for a cluster of its own.
	member := &join.ServerMembership{NodeName: p.Name, Server: cfg.Server, Datastore: b.Datastore, Settings: b.Settings, Joining: true}
	if err := member.Write(dir); err != nil {
		return nil, nil, err
	}
	if err := certificate.Import(certificate.Store(dir.TLS()), b.Authorities); err != nil {
		return nil, nil, err
	}
	member.Joining = false
	return adopted, member, member.Write(dir)
}

// again is the start of a server that has joined before. It runs with the settings of the last time if no other server answers.
func again(ctx context.Context, cfg *config.Server, p *process.Process, member *join.ServerMembership) (*config.Server, *join.ServerMembership, error) {
	if member.NodeName != p.Name {
		return nil, nil, fmt.Errorf("this server is node %s of its cluster, and this machine's name is %s now: start it with --node-name %s", member.NodeName, p.Name, member.NodeName)
	}
	if cfg.Token.ID != "" {
		if err := sameCluster(cfg); err != nil {
			return nil, nil, err
		}
	}
	if cfg.ClusterInit {
		cfg, err := cfg.Replace(member.Settings) // and they become the cluster's
		return cfg, member, err
	}
	if hasSQLite(cfg) {
		adopted, err := cfg.Adopt(member.Settings) // the cluster has been moved here
		return adopted, member, err
	}
	changed := false
	if cfg.Server != "" && cfg.Server != member.Server {
		member.Server, changed = cfg.Server, true
	}
	if member.Server != "" {
		// A server without data has been away, and needs another one to become a member of etcd again.
		empty, err := etcd.Exists(cfg.DataDir.Etcd())
		empty = !empty && err == nil && member.Datastore == bootstrap.Etcd
		p.Waiting("join", "asking "+member.Server+" for what the servers share")
		now, err := join.SharedNow(ctx, machine(cfg, p, member.Server), certificate.Store(cfg.DataDir.TLS()), cfg.DataDir.BootstrapKey(), empty)
		switch {
		case err != nil && empty:
			return nil, nil, err
		case err != nil:
			p.Log.Info("the cluster's settings are those of the last time", "server", member.Server, "err", err)
		default:
			if !slices.Equal(now.Settings, member.Settings) {
				member.Settings, changed = now.Settings, true
			}
		}
	}
	adopted, err := cfg.Adopt(member.Settings)
	if err != nil {
		return nil, nil, err
	}
	if changed {
		err = member.Write(cfg.DataDir)
	}
	return adopted, member, err
}

// hasSQLite reports whether the cluster's state is in SQLite on this server: also on one that has joined others, if it has been moved there since.
func hasSQLite(cfg *config.Server) bool {
	_, err := os.Stat(cfg.DataDir.Server("db", datastore.CopyName))
	return cfg.Datastore.Kind == config.SQLite && err == nil
}

// shared returns what other servers can share; nil for SQLite.
func (s *server) shared() *join.Shared {
	endpoint := s.datastore.Endpoint()
	if !endpoint.LeaderElect {
		return nil
	}
	shared := &join.Shared{Config: s.cfg, Datastore: bootstrap.External, Endpoint: endpoint, Settles: s.member == nil || s.cfg.ClusterInit}
	if member, ok := s.datastore.(*etcd.Etcd); ok {
		shared.Datastore = bootstrap.Etcd
		shared.AddMember = func(ctx context.Context, node string, m bootstrap.Peer) ([]bootstrap.Peer, error) {
			_, all, err := member.AddLearner(ctx, node, m)
			var name *etcd.NameTakenError
			var address *etcd.AddressTakenError
			if errors.As(err, &name) || errors.As(err, &address) {
				err = &join.Refusal{Status: http.StatusConflict, Message: err.Error()}
			}
			return all, err
		}
	}
	return shared
}

// addMember returns how this server's member of etcd joins the others; nil for the first one.
func addMember(cfg *config.Server, p *process.Process, member *join.ServerMembership) func(context.Context, bootstrap.Peer) ([]bootstrap.Peer, error) {
	if member == nil || hasSQLite(cfg) {
		return nil
	}
	return func(ctx context.Context, self bootstrap.Peer) ([]bootstrap.Peer, error) {
		if member.Server == "" {
			return nil, errors.New("the servers of the cluster are not known: give --server")
		}
		m := machine(cfg, p, member.Server)
		m.Waiting = func(why string) { p.Log.Info("waiting to become a member of etcd", "why", why) }
		return join.AddMember(ctx, m, certificate.Store(cfg.DataDir.TLS()), self)
	}
}
