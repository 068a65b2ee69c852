package join

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"

	"polymesh.dev/polymesh/pkg/atomicfile"
	"polymesh.dev/polymesh/pkg/bootstrap"
	"polymesh.dev/polymesh/pkg/certificate"
	"polymesh.dev/polymesh/pkg/layout"
	"polymesh.dev/polymesh/pkg/token"
)

// ServerMembership is what a server that has joined others knows of the cluster.
type ServerMembership struct {
	// NodeName is the node's; Server is the server by which it joined, empty if it found the others in the datastore.
	NodeName  string              `json:"nodeName"`
	Server    string              `json:"server,omitempty"`
	Datastore bootstrap.Datastore `json:"datastore"`
	// Settings are the cluster's, of the last time.
	Settings []string `json:"settings"`
	// Joining is set until the machine has all that the servers share.
	Joining bool `json:"joining,omitempty"`
}

// ReadServerMembership returns nil if the server in the data dir has joined no others.
func ReadServerMembership(dir layout.DataDir) (*ServerMembership, error) {
	text, err := os.ReadFile(dir.ServerMembership())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	var m ServerMembership
	if err == nil {
		err = json.Unmarshal(text, &m)
	}
	if err != nil {
		return nil, fmt.Errorf("read what this server knows of the others, %s: %w", dir.ServerMembership(), err)
	}
	return &m, nil
}

// Write keeps it.
func (m *ServerMembership) Write(dir layout.DataDir) error {
	text, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return err
	}
	return atomicfile.Write(dir.ServerMembership(), append(text, '\n'), 0o600)
}

// JoinServers makes the machine a server of the cluster: it gets what the servers share. While no server answers it tries again, until ctx
// ends; a refusal is final.
func JoinServers(ctx context.Context, m Machine) (bootstrap.Bundle, bootstrap.Key, error) {
	if m.Token.ID == "" {
		return bootstrap.Bundle{}, nil, fmt.Errorf("a token is missing: give --token-file, or set the variable POLYMESH_TOKEN; on a server of the cluster, `cat %s` prints it", layout.DefaultDataDir.ServerToken())
	}
	var g ServerGrant
	if err := m.withToken(ctx, ServerPath, Request{NodeName: m.NodeName, NodeIP: m.NodeIP, ExternalIP: m.ExternalIP, Version: m.Version}, &g); err != nil {
		return bootstrap.Bundle{}, nil, err
	}
	b, key, err := bootstrap.OpenWith(m.Token, g.Bundle, g.Key)
	if err != nil {
		return bootstrap.Bundle{}, nil, err
	}
	return b, key, OfToken(b, m.Token)
}

// OfToken checks that a bundle is of the token's cluster.
func OfToken(b bootstrap.Bundle, t token.Token) error {
	ca, err := certificate.ParseAuthority(b.Authorities[certificate.ServerCA+".crt"])
	if err != nil || token.Hash(ca) != t.CAHash {
		return errors.New("what the servers share is of another cluster than the token")
	}
	return nil
}

// asServer returns an HTTP client with a server's own identity.
func asServer(certs certificate.Store) (*http.Client, error) {
	return clientWith(certs.Cert(certificate.ServerCA), certs.Cert(certificate.Polymesh), certs.Key(certificate.Polymesh))
}

// AddMember asks the cluster to add this server's member of etcd, and returns all members. It tries again until ctx ends: one server at
// a time can be added.
func AddMember(ctx context.Context, m Machine, certs certificate.Store, member bootstrap.Peer) ([]bootstrap.Peer, error) {
	hc, err := asServer(certs)
	if err != nil {
		return nil, err
	}
	var got Members
	err = m.retry(ctx, func() error {
		return call(ctx, hc, http.MethodPost, m.Server+MemberPath, "", MemberRequest{NodeName: m.NodeName, Member: member}, &got)
	})
	if err != nil {
		return nil, err
	}
	return got.Members, nil
}

// SharedNow asks a server for what the servers share now. With wait it tries again until one answers, or ctx ends.
func SharedNow(ctx context.Context, m Machine, certs certificate.Store, keyFile string, wait bool) (bootstrap.Bundle, error) {
	key, err := bootstrap.EnsureKey(keyFile)
	if err != nil {
		return bootstrap.Bundle{}, err
	}
	hc, err := asServer(certs)
	if err != nil {
		return bootstrap.Bundle{}, err
	}
	var got Shares
	ask := func() error { return call(ctx, hc, http.MethodGet, m.Server+SharesPath, "", nil, &got) }
	if wait {
		err = m.retry(ctx, ask)
	} else {
		err = ask()
	}
	if err != nil {
		return bootstrap.Bundle{}, err
	}
	return bootstrap.Open(key, got.Bundle)
}
