// Package etcd is the datastore of a cluster with several servers: each server runs one member of an etcd cluster inside its process.
//
// It owns <data-dir>/server/db/etcd and three ports: the API server of this machine, and nothing else, connects to 127.0.0.1;
// the other members connect to the node's address. Both need a certificate of etcd's own authority, which only servers have.
// pkg/server uses it in place of SQLite; membership (members.go) is for what adds and removes servers.
package etcd

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/version"
	"go.etcd.io/etcd/client/pkg/v3/transport"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"

	"polymesh.dev/polymesh/pkg/atomicfile"
	"polymesh.dev/polymesh/pkg/bootstrap"
	"polymesh.dev/polymesh/pkg/certificate"
	"polymesh.dev/polymesh/pkg/component"
	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/controlplane/datastore"
)

// Options of a member.
type Options struct {
	// Dir contains the member's data.
	Dir string
	// Node is the node's name. The member's name is made of it.
	Node string
	// Client is the address for this machine's API server, HTTP for etcd's own health check and metrics, and Peer for other members.
	Client, HTTP, Peer netip.AddrPort
	// Certificates contains etcd's authority and certificates.
	Certificates certificate.Store
	// Join has the cluster add this member (AddLearner), and returns all members; nil for the first member of a cluster. It is called
	// before the member's first start only.
	Join func(ctx context.Context, self Peer) ([]Peer, error)
	// SQLite is a database of kine's. If it is there, and the member has no data, the cluster's state moves from it to etcd.
	SQLite string
	// Args are the administrator's settings. Their Quota is DefaultQuota if it is 0.
	Args config.EtcdArgs
	Log  *slog.Logger
}

// Peer is a member for the others.
type Peer = bootstrap.Peer

const (
	// DefaultQuota is etcd's own.
	DefaultQuota = 2 << 30
	// maxQuota is the most that etcd recommends (https://etcd.io/docs/v3.6/dev-guide/limit/).
	maxQuota = 8 << 30
)

const (
	// Longer than etcd's default: on machines that do other work too, a busy disk must not look like the death of the leader
	// (https://etcd.io/docs/v3.6/tuning/#time-parameters). All members need the same, also the first one before others join.
	tick, election = 300, 3000 // milliseconds
	// defragAbove is how much a defragmentation at the start must free, in megabytes.
	defragAbove = 100
	// requestTimeout is the time for a request to the member in this process.
	requestTimeout = 5 * time.Second
	// maintainTimeout is the time for a compaction and a defragmentation of a full database.
	maintainTimeout = 5 * time.Minute
	// leaderInterval is how often a member checks whether it knows a leader.
	leaderInterval = time.Second
	// fullPercent is the use of the quota, in percent, for a warning.
	fullPercent = 80
)

// Etcd is the component "datastore".
type Etcd struct {
	component.Background
	opts   Options
	log    *slog.Logger
	failed chan error

	// stall is how long a learner may make no progress; stallTimeout, except in tests.
	stall time.Duration
	// promote is how often the leader tries to promote learners; promoteInterval, except in tests.
	promote time.Duration

	server     atomic.Pointer[embed.Etcd]
	removed    atomic.Bool // the cluster has removed this member
	stopping   atomic.Bool
	leaderless atomic.Pointer[time.Time] // since when it knows no leader; nil while it knows one
	foreign    atomic.Bool               // the other members belong to another cluster
	stranger   atomic.Bool               // a member of another cluster connects to this one

	mu      sync.Mutex
	client  *clientv3.Client
	problem string // what keeps a full database from being repaired
	note    string
}

var (
	_ datastore.Store   = (*Etcd)(nil)
	_ component.Failing = (*Etcd)(nil)
	_ component.Noted   = (*Etcd)(nil)
)

// New returns a member that has not started.
func New(o Options) *Etcd {
	if o.Args.Quota == 0 {
		o.Args.Quota = DefaultQuota
	}
	e := &Etcd{opts: o, failed: make(chan error, 1), stall: stallTimeout, promote: promoteInterval}
	e.log = o.Log.With("component", e.Name())
	return e
}

// Exists reports whether dir contains a member's data: then the server's datastore is etcd. etcd creates the folder and a database before it
// asks the other members; only with its log it is a member (isMemberInitialized in embed).
func Exists(dir string) (bool, error) {
	files, err := os.ReadDir(filepath.Join(dir, "member", "wal"))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return slices.ContainsFunc(files, func(f fs.DirEntry) bool { return filepath.Ext(f.Name()) == ".wal" }), err
}

// Endpoint implements datastore.Store. Other servers may join at any time.
func (e *Etcd) Endpoint() datastore.Endpoint {
	certs := e.opts.Certificates
	return datastore.Endpoint{
		Servers: "https://" + e.opts.Client.String(), LeaderElect: true,
		CA: certs.Cert(certificate.EtcdCA), Cert: certs.Cert(certificate.EtcdClient), Key: certs.Key(certificate.EtcdClient),
	}
}

// Name implements component.Component.
func (*Etcd) Name() string { return "datastore" }

// Version is etcd's version.
func (*Etcd) Version() string { return "etcd " + version.Version }

// Init checks the addresses.
func (e *Etcd) Init(context.Context) error {
	for _, a := range []netip.AddrPort{e.opts.Client, e.opts.HTTP} {
		if !a.Addr().IsLoopback() {
			return fmt.Errorf("etcd's address for clients, %s, is not on loopback", a)
		}
	}
	if !e.opts.Peer.IsValid() || e.opts.Peer.Addr().IsUnspecified() {
		return fmt.Errorf("etcd's address for other members, %s, is not one that they can connect to", e.opts.Peer)
	}
	return nil
}

// identity is what a member must know about itself before it starts. It is in a file next to its data.
type identity struct {
	// Name is unique forever: a node that is removed and joins again is another member.
	Name string `json:"name"`
	Membership
}

// identityName is the name of its file.
const identityName = "identity.json"

// NodeOf returns the name of the node whose member has its data in dir; empty if there is none, or if it has not started yet.
func NodeOf(dir string) string {
	id, err := readIdentity(dir)
	if err != nil {
		return ""
	}
	return Member{Name: id.Name}.Node()
}

// readIdentity reads the identity of the member with its data in dir. The error is fs.ErrNotExist if there is none.
func readIdentity(dir string) (id identity, err error) {
	text, err := os.ReadFile(filepath.Join(dir, identityName))
	if err == nil {
		err = json.Unmarshal(text, &id)
	}
	return id, err
}

// identity returns this member's. The name is generated at the first call, and kept.
func (e *Etcd) identity() (id identity, err error) {
	id, err = readIdentity(e.opts.Dir)
	if err == nil && (Member{Name: id.Name}).Node() != e.opts.Node {
		return id, fmt.Errorf("%s is of member %q, and this node is %q: start it with the node name that it had", e.opts.Dir, id.Name, e.opts.Node)
	}
	if errors.Is(err, fs.ErrNotExist) {
		random := make([]byte, 4)
		_, _ = rand.Read(random)
		id.Name = e.opts.Node + "-" + hex.EncodeToString(random)
		err = e.keep(id)
	}
	if err != nil {
		return id, fmt.Errorf("read the identity of this member of etcd: %w", err)
	}
	return id, nil
}

func (e *Etcd) keep(id identity) error {
	text, err := json.Marshal(id)
	if err != nil {
		return err
	}
	if err := atomicfile.MkdirAll(e.opts.Dir, 0o700); err != nil {
		return err
	}
	return atomicfile.Write(filepath.Join(e.opts.Dir, identityName), text, 0o600)
}

// peer is this member, for the others.
func (e *Etcd) peer(name string) Peer {
	return Peer{Name: name, URL: "https://" + e.opts.Peer.String()}
}

// config returns etcd's configuration, with the data in dir. join are the members of the cluster; none for a new one.
func (e *Etcd) config(id identity, dir string, join []Peer) (*embed.Config, error) {
	certs := e.opts.Certificates
	self := e.peer(id.Name)
	cfg := embed.NewConfig()
	cfg.Name, cfg.Dir = id.Name, dir
	cfg.ClusterState, cfg.InitialCluster = embed.ClusterStateFlagNew, self.Name+"="+self.URL
	if len(join) > 0 {
		var members []string
		for _, m := range join {
			members = append(members, m.Name+"="+m.URL)
		}
		cfg.ClusterState, cfg.InitialCluster = embed.ClusterStateFlagExisting, strings.Join(members, ",")
	}
	cfg.TickMs, cfg.ElectionMs = tick, election
	if e.opts.Args.Heartbeat > 0 {
		cfg.TickMs, cfg.ElectionMs = e.opts.Args.Heartbeat, e.opts.Args.Election
	}
	if e.opts.Args.SnapshotCount > 0 {
		cfg.SnapshotCount = e.opts.Args.SnapshotCount
	}
	for _, l := range []struct {
		urls *[]url.URL
		addr netip.AddrPort
	}{
		{&cfg.ListenClientUrls, e.opts.Client}, {&cfg.AdvertiseClientUrls, e.opts.Client}, {&cfg.ListenClientHttpUrls, e.opts.HTTP},
		{&cfg.ListenPeerUrls, e.opts.Peer}, {&cfg.AdvertisePeerUrls, e.opts.Peer},
	} {
		*l.urls = []url.URL{{Scheme: "https", Host: l.addr.String()}}
	}
	// A member is a server for the others, and their client with the certificate that has no address in it: the
	// addresses of a client's certificate are compared with where it connects from.
	info := transport.TLSInfo{
		TrustedCAFile: certs.Cert(certificate.EtcdCA), ClientCertAuth: true,
		CertFile: certs.Cert(certificate.EtcdServing), KeyFile: certs.Key(certificate.EtcdServing),
		ClientCertFile: certs.Cert(certificate.EtcdClient), ClientKeyFile: certs.Key(certificate.EtcdClient),
	}
	cfg.ClientTLSInfo, cfg.PeerTLSInfo = info, info
	cfg.CipherSuites = certificate.CipherSuites()
	cfg.QuotaBackendBytes = e.opts.Args.Quota
	cfg.AuthToken = "" // clients have certificates
	// NewConfig leaves it at 0, and then each request is logged as slow.
	cfg.WarningUnaryRequestDuration = embed.DefaultWarningUnaryRequestDuration
	cfg.BootstrapDefragThresholdMegabytes = defragAbove
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(e.zap())
	return cfg, cfg.Validate()
}

// Start starts the member. It does not wait for the others: Ready does.
func (e *Etcd) Start(ctx context.Context) (err error) {
	id, err := e.identity()
	if err != nil {
		return err
	}
	if id.Removed {
		return errRemoved
	}
	if err := e.migrate(ctx); err != nil {
		return err
	}
	var members []Peer
	if e.opts.Join != nil {
		exists, err := Exists(e.opts.Dir)
		if err == nil && !exists {
			members, err = e.opts.Join(ctx, e.peer(id.Name))
		}
		if err != nil {
			return fmt.Errorf("join the cluster's etcd: %w", err)
		}
	}
	cfg, err := e.config(id, e.opts.Dir, members)
	if err != nil {
		return fmt.Errorf("configure etcd: %w", err)
	}
	server, err := e.startEtcd(cfg)
	if err != nil && e.removed.Load() {
		return e.ended()
	}
	if err != nil {
		return fmt.Errorf("start etcd on the data in %s: %w", e.opts.Dir, err)
	}
	client, err := e.Endpoint().Client()
	if err != nil {
		e.close(server)
		return err
	}
	e.server.Store(server)
	e.mu.Lock()
	e.client = client
	e.mu.Unlock()
	e.Go(ctx, func(ctx context.Context) { e.run(ctx, server, client) })
	return nil
}

// startEtcd returns etcd's fatal errors and panics of its start as errors: they are mostly about the files.
func (e *Etcd) startEtcd(cfg *embed.Config) (server *embed.Etcd, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%v", p)
		}
	}()
	return embed.StartEtcd(cfg)
}

// close stops a member. etcd logs the end of its listeners as an error.
func (e *Etcd) close(server *embed.Etcd) {
	e.stopping.Store(true)
	// Until a member is ready, for which it needs a majority, its listeners wait for that or for the end of the server, and Close waits for
	// them first (serve and Close in etcd's embed): without a majority it would never return.
	select {
	case <-server.Server.ReadyNotify():
	default:
		server.Server.Stop()
	}
	server.Close()
	e.stopping.Store(false)
}

// run watches the member until ctx ends, and stops it then.
func (e *Etcd) run(ctx context.Context, server *embed.Etcd, client *clientv3.Client) {
	defer func() {
		_ = client.Close()
		e.close(server)
	}()
	ctx, end := context.WithCancel(ctx)
	var wait sync.WaitGroup
	defer func() {
		end()
		wait.Wait()
	}()
	wait.Go(func() { e.care(ctx, client) })
	first := server.Server.ReadyNotify()
	addressed := false // the others know this member's address
	promote := time.NewTicker(e.promote)
	defer promote.Stop()
	// etcd reports a new leader, but not the loss of one.
	leader, learners := time.NewTicker(leaderInterval), time.NewTicker(min(learnerInterval, e.stall))
	defer leader.Stop()
	defer learners.Stop()
	var progress learnerProgress
	for {
		e.noteLeader(server)
		select {
		case <-leader.C:
		case now := <-learners.C:
			e.evict(ctx, server, client, &progress, now)
		case <-ctx.Done():
			return
		case <-promote.C:
			e.promoteLearners(ctx, server, client)
			if first == nil && !addressed {
				addressed = e.updateURL(ctx, server, client)
			}
		case <-first:
			first = nil
			addressed = e.updateURL(ctx, server, client)
			e.repair(ctx, client)
		case <-server.Server.StopNotify():
			e.failed <- e.ended()
			return
		case err := <-server.Err():
			// The listeners of a member that is not ready yet end with it, and may report that first.
			if err == nil || e.removed.Load() {
				err = e.ended()
			}
			e.failed <- err
			return
		}
	}
}

// ended explains why a member has stopped by itself.
func (e *Etcd) ended() error {
	if !e.removed.Load() {
		return errors.New("etcd has stopped by itself: its last log lines have the reason")
	}
	id, err := e.identity()
	if err == nil {
		id.Removed = true
		err = e.keep(id)
	}
	return errors.Join(errRemoved, err)
}

// noteLeader keeps since when this member knows no leader.
func (e *Etcd) noteLeader(server *embed.Etcd) {
	if server.Server.Leader() != 0 {
		e.leaderless.Store(nil)
		return
	}
	now := time.Now()
	e.leaderless.CompareAndSwap(nil, &now)
}

// LeaderlessSince returns since when this member knows no leader of etcd, at most since its start: then the datastore can be neither
// read nor written. It is zero while there is a leader.
func (e *Etcd) LeaderlessSince() time.Time {
	if since := e.leaderless.Load(); since != nil {
		return *since
	}
	return time.Time{}
}

// Failed implements component.Failing.
func (e *Etcd) Failed() <-chan error { return e.failed }

// repair makes a database that has reached its quota accept writes again, if it can: the alarm stays until someone disarms it, and
// Kubernetes cannot compact while it is on.
func (e *Etcd) repair(ctx context.Context, client *clientv3.Client) {
	ctx, cancel := context.WithTimeout(ctx, maintainTimeout)
	defer cancel()
	err := e.disarm(ctx, client)
	if err != nil {
		e.log.Error("make the full datastore accept writes", "err", err)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.problem = ""
	if err != nil {
		e.problem = err.Error()
	}
}

// updateURL announces to the other members that this one has another address than at its last start.
func (e *Etcd) updateURL(ctx context.Context, server *embed.Etcd, client *clientv3.Client) (done bool) {
	id := server.Server.MemberID()
	member, url := server.Server.Cluster().Member(id), e.peer("").URL
	if member == nil || slices.Equal(member.PeerURLs, []string{url}) {
		return true
	}
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	if _, err := client.MemberUpdate(ctx, uint64(id), []string{url}); err != nil {
		e.log.Error("change the address of this member of etcd", "from", member.PeerURLs, "to", url, "err", err)
		return false
	}
	e.log.Info("the address of this member of etcd has changed", "from", member.PeerURLs, "to", url)
	return true
}

func (e *Etcd) disarm(ctx context.Context, client *clientv3.Client) error {
	server := e.server.Load().Server
	if server.IsLearner() {
		return nil
	}
	alarms, err := client.AlarmList(ctx)
	if err != nil {
		return fmt.Errorf("list etcd's alarms: %w", err)
	}
	self := uint64(server.MemberID())
	for _, a := range alarms.Alarms {
		if a.Alarm != etcdserverpb.AlarmType_NOSPACE || a.MemberID != self {
			continue
		}
		e.log.Warn("the datastore has reached its quota: compacting and defragmenting it", "bytes", server.Backend().Size(), "quota", e.opts.Args.Quota)
		status, err := client.Status(ctx, e.Endpoint().Servers)
		if err != nil {
			return fmt.Errorf("read etcd's revision: %w", err)
		}
		// The API server has not started: no one reads an old revision.
		if _, err := client.Compact(ctx, status.Header.Revision, clientv3.WithCompactPhysical()); err != nil && !strings.Contains(err.Error(), "has been compacted") {
			return fmt.Errorf("compact etcd: %w", err)
		}
		if _, err := client.Defragment(ctx, e.Endpoint().Servers); err != nil {
			return fmt.Errorf("defragment etcd: %w", err)
		}
		if size := server.Backend().Size(); size*100 > e.opts.Args.Quota*fullPercent {
			return fmt.Errorf("the datastore is full: %d MB of %d MB are in use after a defragmentation, and writes fail", size>>20, e.opts.Args.Quota>>20)
		}
		if _, err := client.AlarmDisarm(ctx, &clientv3.AlarmMember{MemberID: self, Alarm: etcdserverpb.AlarmType_NOSPACE}); err != nil {
			return fmt.Errorf("end etcd's alarm: %w", err)
		}
		e.log.Info("the datastore accepts writes again", "bytes", server.Backend().Size())
	}
	return nil
}

// Ready returns nil if this member answers a read that needs a majority.
func (e *Etcd) Ready(ctx context.Context) error {
	server := e.server.Load()
	if server == nil {
		return errors.New("starting")
	}
	e.mu.Lock()
	client, problem := e.client, e.problem
	e.mu.Unlock()
	if problem != "" {
		return errors.New(problem)
	}
	if server.Server.IsLearner() {
		return errors.New("this member receives the cluster's data, and votes when it has it")
	}
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	if _, err := client.Get(ctx, "/registry/health"); err != nil {
		return e.noMajority(ctx, err)
	}
	members := server.Server.Cluster().Members()
	if id, err := e.identity(); err == nil && !id.Shared && len(members) > 1 {
		id.Shared = true
		if err := e.keep(id); err != nil {
			return fmt.Errorf("keep the identity of this member of etcd: %w", err)
		}
	}
	note := ""
	if size := server.Server.Backend().SizeInUse(); size*100 > e.opts.Args.Quota*fullPercent {
		note = fmt.Sprintf("the datastore has %d MB, %d %% of its quota of %d MB: writes fail above it", size>>20, size*100/e.opts.Args.Quota, e.opts.Args.Quota>>20)
	}
	e.mu.Lock()
	e.note = note
	e.mu.Unlock()
	return nil
}

// noMajority explains a failed read, with the members that are away.
func (e *Etcd) noMajority(ctx context.Context, err error) error {
	server := e.server.Load().Server
	if server.Leader() != 0 {
		return fmt.Errorf("etcd: %w", err)
	}
	members := server.Cluster().Members()
	if e.foreign.Load() {
		return fmt.Errorf("the other members of etcd belong to another cluster, which was made by a restore or a reset since: `polymesh reset` this server, and join it again with --server: %w", err)
	}
	return fmt.Errorf("etcd has no leader: a majority of its %d members must run and be reachable on port %d: %w", len(members), e.opts.Peer.Port(), err)
}

// Notes implements component.Noted.
func (e *Etcd) Notes(context.Context) []string {
	e.mu.Lock()
	note := e.note
	e.mu.Unlock()
	return component.Present(&note)
}
