package join

import (
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"polymesh.dev/polymesh/pkg/atomicfile"
	"polymesh.dev/polymesh/pkg/certificate"
	"polymesh.dev/polymesh/pkg/layout"
	"polymesh.dev/polymesh/pkg/token"
)

// Machine is the machine that joins.
type Machine struct {
	DataDir layout.DataDir
	// Server is https://HOST:PORT.
	Server string
	// Token is not used while the machine has a certificate, and may be none then.
	Token              token.Token
	NodeName           string
	NodeIP, ExternalIP netip.Addr
	// Version is that of the machine's Kubernetes: v1.36.3.
	Version string
	// Now is the machine's clock, time.Now if nil.
	Now func() time.Time
	// Settling is how long a refusal may be one of a server that is starting, and is tried again; 0 for eight seconds.
	Settling time.Duration
	// Waiting is called when no server answers, with why.
	Waiting func(why string)
	Log     *slog.Logger
}

func (m Machine) now() time.Time {
	if m.Now != nil {
		return m.Now()
	}
	return time.Now()
}

// Join makes the machine a member of the cluster, or finds that it is one. While no server answers it tries again, until ctx ends;
// a refusal is final.
func Join(ctx context.Context, m Machine) (*Membership, error) {
	member := &Membership{Files: files(m.DataDir)}
	had, err := m.membership(member.Files, m.now())
	if err != nil {
		return nil, err
	}
	if had.ca != nil && m.Token.ID != "" && token.Hash(had.ca) != m.Token.CAHash {
		return nil, fmt.Errorf("the token is for another cluster than the one to which %s belongs: `polymesh reset` removes what this machine has of that one", m.DataDir)
	}
	if had.valid {
		member.Cluster, err = m.settings(ctx, member.Files)
		if err == nil {
			return member, nil
		}
		if !errors.Is(err, errNotAccepted) || m.Token.ID == "" {
			return nil, err
		}
		m.Log.Warn("the cluster does not accept this node's certificate, because its node was removed: joining as a new machine, with the token", "node", m.NodeName)
		had.certificate, had.key = nil, nil
	}
	if m.Token.ID == "" {
		return nil, errors.New("this node's certificate has expired or is missing: give a token that the cluster accepts (`polymesh token create` on a server makes one)")
	}
	client, err := m.key("client", had.key)
	if err != nil {
		return nil, err
	}
	serving, err := m.key("serving", nil)
	if err != nil {
		return nil, err
	}
	grant, err := m.ask(ctx, had, client, serving)
	if err != nil {
		return nil, err
	}
	member.Cluster = grant.Cluster
	return member, m.keep(member.Files, grant, client, serving)
}

// ask sends the request until a server answers.
func (m Machine) ask(ctx context.Context, had previous, client, serving *ecdsa.PrivateKey) (*Grant, error) {
	var err error
	r := Request{
		NodeName: m.NodeName, NodeIP: m.NodeIP, ExternalIP: m.ExternalIP, Version: m.Version, Certificate: had.certificate,
	}
	if r.ClientCSR, err = signingRequest(client); err != nil {
		return nil, err
	}
	if r.ServingCSR, err = signingRequest(serving); err != nil {
		return nil, err
	}
	g := &Grant{}
	if err := m.withToken(ctx, AgentPath, r, g); err != nil {
		return nil, err
	}
	if err := g.Cluster.check(); err != nil {
		return nil, err
	}
	if ca, err := certificate.ParseAuthority(g.ServerCA); err != nil || token.Hash(ca) != m.Token.CAHash {
		return nil, errors.New("the authority in the server's answer is not the token's")
	}
	return g, nil
}

func signingRequest(key *ecdsa.PrivateKey) ([]byte, error) {
	return x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{}}, key)
}

// errNotAccepted means that the cluster does not accept the node's certificate, which is valid by itself.
var errNotAccepted = errors.New("the cluster does not accept this node's certificate, because its node was removed: give a token to join again as a new machine (`polymesh token create` on a server makes one), or remove what this machine has of the cluster with `polymesh reset`")

// settings asks the server for the cluster's settings, and uses those of the last time while it does not answer: pods of this node
// run without a server, too.
func (m Machine) settings(ctx context.Context, f Files) (Cluster, error) {
	saved, unread := readMembership(m.DataDir)
	if unread == nil {
		unread = saved.Cluster.check()
	}
	hc, err := client(f)
	if err != nil {
		return Cluster{}, err
	}
	var now Cluster
	ask := func() error { return call(ctx, hc, http.MethodGet, m.Server+ClusterPath, "", nil, &now) }
	if unread == nil {
		err := ask()
		if unauthorized(err) {
			// Not a server that has just started.
			if err = m.retry(ctx, ask); unauthorized(err) {
				return Cluster{}, errNotAccepted
			}
		}
		if err != nil {
			m.Log.Warn("no server answers: the cluster's settings are those of the last time", "server", m.Server, "err", err)
			return saved.Cluster, nil
		}
	} else if err := m.retry(ctx, ask); unauthorized(err) {
		return Cluster{}, errNotAccepted
	} else if err != nil {
		return Cluster{}, err
	}
	if err := now.check(); err != nil {
		return Cluster{}, err
	}
	return now, m.write(now)
}

// GoneError means that the machine is not a node of the cluster any more, so that there is nothing to leave.
type GoneError struct{ message string }

func (e *GoneError) Error() string { return e.message }

// Leave removes the machine's node from the cluster by a server. A machine that has left before, or whose node was removed, gets a GoneError.
// After any other error it may still be a member.
func Leave(ctx context.Context, dir layout.DataDir, server string) error {
	f := files(dir)
	identity, err := identityOf(f.ServerCA, f.Client, f.Client)
	if err != nil {
		return err
	}
	pair := identity.Certificates[0]
	sent := false
	// As without it, but a server that knows no such authority gets no certificate, and its 401 then says nothing about the node.
	identity.GetClientCertificate = func(asked *tls.CertificateRequestInfo) (*tls.Certificate, error) {
		if sent = asked.SupportsCertificate(&pair) == nil; !sent {
			return &tls.Certificate{}, nil
		}
		return &pair, nil
	}
	// The kubelet reports the same (machineId in cAdvisor).
	id, _ := os.ReadFile("/etc/machine-id")
	err = call(ctx, clientAs(identity), http.MethodPost, server+LeavePath, "", Leaving{MachineID: strings.TrimSpace(string(id))}, &struct{}{})
	var refusal *Refusal
	if !errors.As(err, &refusal) {
		return err
	}
	switch refusal.Status {
	case http.StatusConflict:
		return &GoneError{refusal.Message}
	case http.StatusUnauthorized:
		// A server that does not know yet which nodes were removed answers 503, see Filter. So there is one other reason to refuse a
		// certificate of the cluster: it is not valid by the clock of the server.
		if sent && validAt(pair.Leaf, refusal.at) && validAt(pair.Leaf, time.Now()) {
			return &GoneError{"its node was removed before"}
		}
		return fmt.Errorf("the server does not accept this node's certificate, which is valid from %s to %s: %w", pair.Leaf.NotBefore.UTC().Format(time.DateTime), pair.Leaf.NotAfter.UTC().Format(time.DateTime), err)
	}
	return err
}

func validAt(c *x509.Certificate, at time.Time) bool {
	return !at.Before(c.NotBefore) && at.Before(c.NotAfter)
}

// Forget ends the membership of a machine that has left its cluster: Member does not find it after that, whatever else is there.
func Forget(dir layout.DataDir) error {
	ca := files(dir).ServerCA // without it there is no membership, see keep
	if err := os.Remove(ca); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("forget the cluster that this machine has left: %w", err)
	}
	return atomicfile.SyncDir(filepath.Dir(ca))
}
