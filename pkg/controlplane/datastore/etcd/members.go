package etcd

import (
	"cmp"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"go.etcd.io/etcd/client/pkg/v3/transport"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"

	"polymesh.dev/polymesh/pkg/certificate"
)

// Member is a member of the cluster.
type Member struct {
	ID uint64 `json:"id"`
	// Name is empty until the member has started.
	Name string `json:"name,omitempty"`
	// URL is its address for other members.
	URL string `json:"url"`
	// Learner is set while it receives the cluster's data, and has no vote.
	Learner bool `json:"learner,omitempty"`
	// Leader is set for the one that leads, as far as this member knows.
	Leader bool `json:"leader,omitempty"`
	// Version is the version of etcd that it runs, if it answers; otherwise Problem is why it does not.
	Version string `json:"version,omitempty"`
	Problem string `json:"problem,omitempty"`
	// Expires is when the certificate that it answered with expires.
	Expires time.Time `json:"certificateExpires,omitzero"`
}

// String returns what identifies the member for a user: its node's name, or its address until it has started.
func (m Member) String() string {
	if m.Name == "" {
		return m.URL
	}
	return m.Node()
}

// Node returns the name of the node on which the member runs; empty until it has started.
func (m Member) Node() string { return Peer{Name: m.Name}.Node() }

// byNode orders members for people: by node, and those of one node, or of none yet, by address. etcd's order is that of the IDs, which are
// hashes of the address and the time.
func byNode(a, b Member) int {
	return cmp.Or(strings.Compare(a.Node(), b.Node()), strings.Compare(a.URL, b.URL))
}

// peerTimeout is the time for another member's answer.
const peerTimeout = 2 * time.Second

// Members lists the members as this one knows them, without a majority too, and whether each answers.
func (e *Etcd) Members(ctx context.Context) ([]Member, error) {
	server := e.server.Load()
	if server == nil {
		return nil, errors.New("etcd has not started")
	}
	config, err := peerTLS(e.opts.Certificates)
	if err != nil {
		return nil, err
	}
	var members []Member
	for _, m := range server.Server.Cluster().Members() {
		member := memberOf(*m)
		member.Leader = uint64(m.ID) == uint64(server.Server.Leader())
		members = append(members, member)
	}
	slices.SortFunc(members, byNode)
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: config, DisableKeepAlives: true}}
	var wait sync.WaitGroup
	for i := range members {
		wait.Go(func() {
			m := &members[i]
			if m.URL == "" {
				m.Problem = "it has no address"
				return
			}
			var err error
			if m.Version, m.Expires, err = peerVersion(ctx, client, m.URL); err != nil {
				m.Problem = err.Error()
			}
		})
	}
	wait.Wait()
	return members, nil
}

func peerTLS(certs certificate.Store) (*tls.Config, error) {
	info := transport.TLSInfo{
		TrustedCAFile: certs.Cert(certificate.EtcdCA), CertFile: certs.Cert(certificate.EtcdClient), KeyFile: certs.Key(certificate.EtcdClient),
	}
	config, err := info.ClientConfig()
	if err != nil {
		return nil, fmt.Errorf("read etcd's certificates: %w", err)
	}
	return config, nil
}

// peerVersion requests a member's version, on the port for other members.
func peerVersion(ctx context.Context, client *http.Client, address string) (version string, expires time.Time, err error) {
	ctx, cancel := context.WithTimeout(ctx, peerTimeout)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, address+"/version", nil)
	if err != nil {
		return "", expires, err
	}
	response, err := client.Do(request)
	if err != nil {
		if errors.Is(ctx.Err(), context.DeadlineExceeded) {
			return "", expires, fmt.Errorf("no answer within %s", peerTimeout)
		}
		// The list has the URL already.
		if failed := new(url.Error); errors.As(err, &failed) {
			err = failed.Err
		}
		return "", expires, err
	}
	defer response.Body.Close()
	var v struct {
		Server string `json:"etcdserver"`
	}
	if err := json.NewDecoder(io.LimitReader(response.Body, 4096)).Decode(&v); err != nil || response.StatusCode != http.StatusOK {
		return "", expires, fmt.Errorf("unexpected answer, status %d", response.StatusCode)
	}
	if response.TLS != nil && len(response.TLS.PeerCertificates) > 0 {
		expires = response.TLS.PeerCertificates[0].NotAfter
	}
	return v.Server, expires, nil
}

// NameTakenError is the error of a node whose name a member has already.
type NameTakenError struct{ Node string }

func (err *NameTakenError) Error() string {
	return fmt.Sprintf("node %s is a member of etcd already: on a server, remove it with `polymesh node remove %s`, or with `polymesh etcd remove %s` if there is no such node; or choose another node name", err.Node, err.Node, err.Node)
}

// AddressTakenError is the error of a node whose address a member has already.
type AddressTakenError struct {
	URL, Member string
	ID          uint64
}

func (err *AddressTakenError) Error() string {
	return fmt.Sprintf("%s is the address of member %s of etcd already: on a server, remove it with `polymesh etcd remove %x`", err.URL, err.Member, err.ID)
}

// AddLearner adds the member of a node that joins, as one that does not vote yet, and returns what it needs to start (Options.Join). A
// join that was interrupted before the member had started may be repeated.
func (e *Etcd) AddLearner(ctx context.Context, node string, joins Peer) (id uint64, cluster []Peer, err error) {
	client, err := e.running()
	if err != nil {
		return 0, nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	list, err := client.MemberList(ctx)
	if err != nil {
		return 0, nil, explain("list etcd's members", err)
	}
	for _, m := range list.Members {
		same := len(m.PeerURLs) > 0 && m.PeerURLs[0] == joins.URL
		switch {
		case (Member{Name: m.Name}).Node() == node && m.Name != "":
			return 0, nil, &NameTakenError{node}
		case same && m.Name == "" && m.IsLearner:
			id = m.ID
		case same:
			return 0, nil, &AddressTakenError{joins.URL, m.Name, m.ID}
		}
	}
	members := list.Members
	if id == 0 {
		added, err := client.MemberAddAsLearner(ctx, []string{joins.URL})
		if err != nil {
			return 0, nil, explain("add a member to etcd", err)
		}
		id, members = added.Member.ID, added.Members
	}
	for _, m := range members {
		if len(m.PeerURLs) == 0 {
			continue
		}
		name := m.Name
		if m.ID == id {
			name = joins.Name
		}
		cluster = append(cluster, Peer{Name: name, URL: m.PeerURLs[0]})
	}
	return id, cluster, nil
}

// promoteInterval is how often the leader tries to promote learners.
const promoteInterval = 500 * time.Millisecond

// promoteLearners gives learners a vote as soon as they have the data, if this member leads. A learner cannot promote itself: it does not
// know when it is up to date, and does not even report that it is ready before.
func (e *Etcd) promoteLearners(ctx context.Context, server *embed.Etcd, client *clientv3.Client) {
	if server.Server.Leader() != server.Server.MemberID() {
		return
	}
	for _, m := range server.Server.Cluster().Members() {
		if !m.IsLearner {
			continue
		}
		attempt, cancel := context.WithTimeout(ctx, requestTimeout)
		_, err := client.MemberPromote(attempt, uint64(m.ID))
		cancel()
		switch {
		case err == nil:
			e.log.Info("a member of etcd has a vote", "member", m.Name)
		// It is not up to date yet, or has just been promoted or removed.
		case errors.Is(err, rpctypes.ErrMemberLearnerNotReady), errors.Is(err, rpctypes.ErrMemberNotLearner), errors.Is(err, rpctypes.ErrMemberNotFound):
		default:
			e.log.Debug("promote a member of etcd", "member", m.Name, "err", err)
		}
	}
}

// Remove removes a member, and returns nil if it is already gone. It refuses where the others would not be a majority afterwards
// (MayRemove). If the member leads, another one takes over first.
func (e *Etcd) Remove(ctx context.Context, id uint64) error {
	client, err := e.running()
	if err != nil {
		return err
	}
	members, err := e.Members(ctx)
	if err != nil {
		return err
	}
	i := slices.IndexFunc(members, func(m Member) bool { return m.ID == id })
	if i < 0 {
		return nil
	}
	if err := MayRemove(members, id); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 2*requestTimeout)
	defer cancel()
	if members[i].Leader {
		next := slices.IndexFunc(members, func(m Member) bool { return m.ID != id && !m.Learner && m.Problem == "" })
		// Any member can hand over in its name: raft forwards the request to the leader (stepFollower in raft.go). Only etcd's API
		// accepts it on the leader alone.
		if err := e.server.Load().Server.MoveLeader(ctx, id, members[next].ID); err != nil {
			return explain("hand the leadership of etcd over", err)
		}
	}
	if _, err := client.MemberRemove(ctx, id); err != nil && !errors.Is(err, rpctypes.ErrMemberNotFound) {
		return explain("remove a member from etcd", err)
	}
	return nil
}

// running returns a client of this member.
func (e *Etcd) running() (*clientv3.Client, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.client == nil {
		return nil, errors.New("etcd has not started")
	}
	return e.client, nil
}

// explain adds to etcd's error what it means for the user.
func explain(what string, err error) error {
	switch {
	case errors.Is(err, rpctypes.ErrUnhealthy), errors.Is(err, rpctypes.ErrMemberNotEnoughStarted):
		return fmt.Errorf("%s: a member does not answer, and a change now could leave the cluster without a majority: start it, or remove it, first: %w", what, err)
	case errors.Is(err, rpctypes.ErrTooManyLearners):
		return fmt.Errorf("%s: another server is joining: try again when it has joined: %w", what, err)
	case errors.Is(err, rpctypes.ErrNoLeader), errors.Is(err, context.DeadlineExceeded), errors.Is(err, rpctypes.ErrTimeout), errors.Is(err, rpctypes.ErrTimeoutDueToLeaderFail):
		return fmt.Errorf("%s: etcd has no majority that answers: start the other servers: %w", what, err)
	}
	return fmt.Errorf("%s: %w", what, err)
}

// ID returns this member's id. ok is false before it has started.
func (e *Etcd) ID() (id uint64, ok bool) {
	server := e.server.Load()
	if server == nil {
		return 0, false
	}
	return uint64(server.Server.MemberID()), true
}

// Leads reports whether this member leads etcd, as far as it knows.
func (e *Etcd) Leads() bool {
	id, ok := e.ID()
	return ok && uint64(e.server.Load().Server.Leader()) == id
}

// Usage returns the size of this member's database, in bytes, and its newest revision; zero before it has started.
func (e *Etcd) Usage() (size, revision int64) {
	server := e.server.Load()
	if server == nil {
		return 0, 0
	}
	return server.Server.Backend().Size(), server.Server.KV().Rev()
}
