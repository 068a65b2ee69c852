package server

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"slices"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/kubernetes/scheme"
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
	membership, err := join.ReadServerMembership(cfg.DataDir)
	if err == nil && cfg.Server != "" && cfg.Datastore.Kind == config.SQLite {
		membership, err = afterRemoval(cfg, p, membership)
	}
	if err != nil {
		return nil, nil, err
	}
	if membership != nil && !membership.Joining {
		return again(ctx, cfg, p, membership)
	}
	has := false
	if membership == nil {
		has, err = ownCluster(cfg)
	}
	switch {
	case err != nil:
		return nil, nil, err
	case has && cfg.Token.ID != "":
		return cfg, nil, sameCluster(cfg)
	case has && cfg.Server != "":
		p.Log.Info("this server has the data of its cluster already: --server is not used", "server", cfg.Server)
		return cfg, nil, nil
	case has, cfg.Server == "" && cfg.Datastore.Kind == config.SQLite:
		return cfg, nil, nil
	case cfg.Server != "":
		return byServer(ctx, cfg, p)
	}
	return byDatastore(ctx, cfg, p)
}

// afterRemoval lets a server that the cluster has removed join again, as a new member: the old one's data is put aside. The first server
// has a membership from then on.
func afterRemoval(cfg *config.Server, p *process.Process, membership *join.ServerMembership) (*join.ServerMembership, error) {
	aside, err := etcd.SetAside(cfg.DataDir.Etcd(), time.Now())
	if err != nil || aside == "" {
		return membership, err
	}
	p.Log.Info("this server was removed from the cluster: it joins again, with no data", "former", aside)
	if membership != nil {
		return membership, nil
	}
	membership = &join.ServerMembership{NodeName: p.Name, Server: cfg.Server, Datastore: bootstrap.Etcd, Settings: cfg.Settings()}
	return membership, membership.Write(cfg.DataDir)
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
	id, err := bootstrap.EnsureID(cfg.DataDir.ServerID())
	if err != nil {
		return nil, nil, err
	}
	store := bootstrap.Store{Client: client}
	exists, err := store.Exists(ctx)
	if err == nil && !exists && cfg.Token.ID == "" {
		exists, err = awaitFirst(ctx, store, bootstrap.First{Name: p.Name, ID: id}, func(why string) {
			p.Log.Info("waiting for the first server", "why", why)
			p.Waiting("join", why)
		})
		if err == nil && !exists {
			return cfg, nil, nil
		}
	}
	switch {
	case err != nil:
		return nil, nil, err
	case !exists:
		return nil, nil, errors.New("a whole token is set, but the datastore has no cluster: start the first server without a token, or with a secret alone; it writes the token to server/token in its data dir")
	case cfg.Token.ID == "" && cfg.Secret == "":
		return nil, nil, fmt.Errorf("the datastore holds a cluster: to join its servers, give --token-file with the token that `cat %s` prints on one of them", layout.DefaultDataDir.ServerToken())
	}
	bundle, key, err := opened(ctx, cfg, store)
	if err == nil {
		p.Waiting("join", "checking this machine against the servers in the datastore")
		err = admissible(ctx, store, p.Name, id, kubernetes.Get().GitVersion)
	}
	if err != nil {
		return nil, nil, err
	}
	return keep(cfg, p, bundle, key)
}

// awaitFirst decides which of several servers begins the cluster in an empty datastore. It returns false to that one, and true to the others
// once it shares what they need to join it.
func awaitFirst(ctx context.Context, store bootstrap.Store, self bootstrap.First, waiting func(why string)) (bool, error) {
	first, err := store.First(ctx, self)
	if err != nil {
		return false, err
	}
	another := first.Name == self.Name && first.ID != "" && first.ID != self.ID
	for reported := false; ; reported = true {
		// It may have begun, shared and left before.
		switch exists, err := store.Exists(ctx); {
		case err != nil || exists:
			return exists, err
		case another:
			return false, fmt.Errorf("another machine with the name %s of this server begins the cluster in the datastore: give this one another name with --node-name; if it was this machine, with a data dir that is lost, empty the datastore, and start again", self.Name)
		case first.Name == self.Name:
			return false, nil
		}
		if !reported {
			waiting(fmt.Sprintf("server %s begins the cluster in the datastore, and has not shared its keys yet: if that server is lost, so are they; empty the datastore then, and start again", first.Name))
		}
		select {
		case <-ctx.Done():
			return false, ctx.Err()
		case <-time.After(readyInterval):
		}
	}
}

// opened returns what the servers share, for the holder of their token, or of the secret that the user has chosen.
func opened(ctx context.Context, cfg *config.Server, store bootstrap.Store) (bootstrap.Bundle, bootstrap.Key, error) {
	t := cfg.Token
	if cfg.Secret != "" {
		var err error
		if t, err = token.OfSecret("", cfg.Secret); err != nil {
			return bootstrap.Bundle{}, nil, err
		}
	}
	bundle, key, err := store.Open(ctx, t)
	switch {
	case errors.Is(err, bootstrap.ErrNone):
		return bundle, nil, fmt.Errorf("the cluster in the datastore does not accept token %s, which has expired, was revoked, or is another cluster's: `cat %s` on one of its servers prints one that it accepts", t.ID, layout.DefaultDataDir.ServerToken())
	case err != nil || cfg.Secret != "":
		return bundle, key, err // that the secret opens it proves whose it is
	}
	return bundle, key, join.OfToken(bundle, t)
}

// admissible returns why a machine cannot become a server that finds the others in the datastore, as DecideServer in pkg/join does where
// another server decides, and takes the name of its node.
func admissible(ctx context.Context, store bootstrap.Store, name, id, version string) error {
	if err := notAgent(ctx, store.Client, name); err != nil {
		return err
	}
	servers, err := store.Servers(ctx)
	if err != nil {
		return err
	}
	// Records of servers that are gone stay: the one that was started last has the cluster's version.
	var last bootstrap.Server
	var others []string
	for _, s := range servers {
		if s.Version != "" && s.Started.After(last.Started) {
			last = s
		}
		if s.Name != name {
			others = append(others, s.Name)
		}
	}
	ahead, known, err := store.Ahead(ctx, others, join.MaxSkew)
	if err != nil {
		return err
	}
	// The last one may be set up again with a later version, as with an upgrade, while no other one runs.
	if last.Version != "" && (known || last.Name != name) {
		if err := join.ServerVersion(version, last.Version); err != nil {
			return err
		}
	}
	if now := time.Now(); known {
		if err := join.Clock(now, now.Add(ahead)); err != nil {
			return err
		}
	}
	return store.Take(ctx, name, id, false)
}

// notAgent rejects the name of an agent, which would be this server's node, too. There is no API server that could tell.
func notAgent(ctx context.Context, client *clientv3.Client, name string) error {
	got, err := client.Get(ctx, "/registry/minions/"+name)
	if err != nil {
		return fmt.Errorf("look for node %s in the datastore: %w", name, err)
	}
	for _, kv := range got.Kvs {
		obj, _, err := scheme.Codecs.UniversalDeserializer().Decode(kv.Value, nil, nil)
		if err != nil {
			return fmt.Errorf("read node %s in the datastore: %w", name, err)
		}
		if node, ok := obj.(*corev1.Node); ok {
			if _, server := node.Labels[layout.ServerLabel]; server {
				continue // the machine of a server that is set up again
			}
		}
		return fmt.Errorf("the cluster has a node %s already, which is no server: give this server another name with --node-name, or, if that node no longer exists, remove it with `polymesh node remove %s` on another server", name, name)
	}
	return nil
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
	membership := &join.ServerMembership{NodeName: p.Name, Server: cfg.Server, Datastore: b.Datastore, Settings: b.Settings, Joining: true}
	if err := membership.Write(dir); err != nil {
		return nil, nil, err
	}
	if err := certificate.Import(certificate.Store(dir.TLS()), b.Authorities); err != nil {
		return nil, nil, err
	}
	membership.Joining = false
	return adopted, membership, membership.Write(dir)
}

// again is the start of a server that has joined before. It runs with the settings of the last time if no other server answers.
func again(ctx context.Context, cfg *config.Server, p *process.Process, membership *join.ServerMembership) (*config.Server, *join.ServerMembership, error) {
	if membership.NodeName != p.Name {
		return nil, nil, fmt.Errorf("this server is node %s of its cluster, and this machine's name is %s now: start it with --node-name %s", membership.NodeName, p.Name, membership.NodeName)
	}
	if cfg.Token.ID != "" {
		if err := sameCluster(cfg); err != nil {
			return nil, nil, err
		}
	}
	if cfg.ClusterInit {
		cfg, err := cfg.Replace(membership.Settings) // and they become the cluster's
		return cfg, membership, err
	}
	if hasSQLite(cfg) {
		adopted, err := cfg.Adopt(membership.Settings) // the cluster has been moved here
		return adopted, membership, err
	}
	changed := false
	if cfg.Server != "" && cfg.Server != membership.Server {
		membership.Server, changed = cfg.Server, true
	}
	if membership.Server != "" {
		// A server without data has been away, and needs another one to become a member of etcd again.
		empty, err := etcd.Exists(cfg.DataDir.Etcd())
		empty = !empty && err == nil && membership.Datastore == bootstrap.Etcd
		p.Waiting("join", "asking "+membership.Server+" for what the servers share")
		now, err := join.SharedNow(ctx, machine(cfg, p, membership.Server), certificate.Store(cfg.DataDir.TLS()), cfg.DataDir.BootstrapKey(), empty)
		switch {
		case err != nil && empty:
			return nil, nil, err
		case err != nil:
			p.Log.Info("the cluster's settings are those of the last time", "server", membership.Server, "err", err)
		default:
			if !slices.Equal(now.Settings, membership.Settings) {
				membership.Settings, changed = now.Settings, true
			}
		}
	}
	adopted, err := cfg.Adopt(membership.Settings)
	if err != nil {
		return nil, nil, err
	}
	if changed {
		err = membership.Write(cfg.DataDir)
	}
	return adopted, membership, err
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
	shared := &join.Shared{Config: s.cfg, ID: s.id, Datastore: bootstrap.External, Endpoint: endpoint, Settles: s.membership == nil || s.cfg.ClusterInit}
	if local := s.etcd(); local != nil {
		shared.Datastore = bootstrap.Etcd
		shared.AddMember = func(ctx context.Context, node string, m bootstrap.Peer) ([]bootstrap.Peer, error) {
			_, all, err := local.AddLearner(ctx, node, m)
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
func addMember(cfg *config.Server, p *process.Process, membership *join.ServerMembership) func(context.Context, bootstrap.Peer) ([]bootstrap.Peer, error) {
	if membership == nil || hasSQLite(cfg) {
		return nil
	}
	return func(ctx context.Context, self bootstrap.Peer) ([]bootstrap.Peer, error) {
		if membership.Server == "" {
			return nil, errors.New("the servers of the cluster are not known: give --server")
		}
		m := machine(cfg, p, membership.Server)
		m.Waiting = func(why string) { p.Log.Info("waiting to become a member of etcd", "why", why) }
		return join.AddMember(ctx, m, certificate.Store(cfg.DataDir.TLS()), self)
	}
}
