package join

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	clientcertificate "k8s.io/client-go/util/certificate"
	"k8s.io/client-go/util/keyutil"

	"polymesh.dev/polymesh/pkg/atomicfile"
	"polymesh.dev/polymesh/pkg/certificate"
	"polymesh.dev/polymesh/pkg/layout"
	"polymesh.dev/polymesh/pkg/token"
)

const (
	// requestTimeout is how long one try may take; retryInterval is the time between two.
	requestTimeout = 15 * time.Second
	retryInterval  = 2 * time.Second
	// settling is how long a refusal may be one of a server that is starting.
	settling = 8 * time.Second
	// maxAnswer is the limit of a server's answer, in bytes.
	maxAnswer = 1 << 20
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

// Membership is what a node has from joining: its files, and the cluster's settings.
type Membership struct {
	Cluster Cluster
	Files   Files
}

// Files are the node's files, which the kubelet renews.
type Files struct{ ServerCA, ClientCA, Client, Serving string }

func files(dir layout.DataDir) Files {
	pki := func(name string) string { return filepath.Join(dir.NodePKI(), name) }
	return Files{ServerCA: pki("server-ca.crt"), ClientCA: pki("client-ca.crt"), Client: pki("kubelet-client-current.pem"), Serving: pki("kubelet-server-current.pem")}
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

// previous is what the machine has of an earlier time.
type previous struct {
	valid bool
	// ca is the cluster's authority, nil before the first time; certificate is the node's own, in DER form.
	ca          *x509.Certificate
	certificate []byte
	key         *ecdsa.PrivateKey
}

func (m Machine) membership(f Files, now time.Time) (previous, error) {
	var p previous
	text, err := os.ReadFile(f.ServerCA)
	if errors.Is(err, fs.ErrNotExist) {
		return p, nil
	}
	if err != nil {
		return p, err
	}
	if p.ca, err = certificate.ParseAuthority(text); err != nil {
		return p, fmt.Errorf("%s is damaged: %w: restore it, or `polymesh reset` to join again", f.ServerCA, err)
	}
	for _, file := range []string{f.Client, f.Serving} {
		if err := recoverPair(file); err != nil {
			return p, fmt.Errorf("recover the certificate %s: %w", file, err)
		}
	}
	pair, err := tls.LoadX509KeyPair(f.Client, f.Client)
	if err != nil {
		return p, nil // interrupted before it was there, or damaged: a new one is asked for
	}
	key, ok := pair.PrivateKey.(*ecdsa.PrivateKey)
	if !ok || pair.Leaf.Subject.CommonName != User(m.NodeName) {
		if ok {
			m.Log.Warn("this machine was another node of the cluster, whose object stays: remove it with `polymesh node remove`", "node", pair.Leaf.Subject.CommonName)
		}
		return p, nil
	}
	p.certificate, p.key = pair.Certificate[0], key
	p.valid = now.Before(pair.Leaf.NotAfter)
	return p, nil
}

// recoverPair completes a renewal that a crash has interrupted. The store removes its link to the certificate in use before it makes the
// new one, and syncs neither.
func recoverPair(current string) error {
	prefix := strings.TrimSuffix(filepath.Base(current), "-current.pem")
	store, err := clientcertificate.NewFileStore(prefix, filepath.Dir(current), filepath.Dir(current), "", "") // finds a link that is only to be renamed
	if err != nil {
		return err
	}
	if _, err := tls.LoadX509KeyPair(current, current); err == nil {
		return nil
	}
	// Their names have the time.
	made, err := filepath.Glob(filepath.Join(filepath.Dir(current), prefix+"-[0-9]*.pem"))
	if err != nil {
		return err
	}
	for _, file := range slices.Backward(made) {
		if _, err := tls.LoadX509KeyPair(file, file); err != nil {
			continue
		}
		text, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		cert, key := splitPair(text)
		_, err = store.Update(cert, key)
		return err
	}
	return nil
}

// splitPair separates the certificates of a file from their key.
func splitPair(text []byte) (certs, key []byte) {
	for block, rest := pem.Decode(text); block != nil; block, rest = pem.Decode(rest) {
		if block.Type == "CERTIFICATE" {
			certs = append(certs, pem.EncodeToMemory(block)...)
		} else {
			key = append(key, pem.EncodeToMemory(block)...)
		}
	}
	return certs, key
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

// withToken sends a request with the token until a server answers.
func (m Machine) withToken(ctx context.Context, path string, r Request, answer any) error {
	hc := &http.Client{Timeout: requestTimeout, CheckRedirect: noRedirect, Transport: &http.Transport{TLSClientConfig: pinned(m.Token.CAHash, m.Server, m.now), DisableKeepAlives: true}}
	err := m.retry(ctx, func() error {
		r.Now = m.now()
		return call(ctx, hc, http.MethodPost, m.Server+path, m.Token.Bearer(), r, answer)
	})
	if unauthorized(err) {
		return fmt.Errorf("the cluster does not accept token %s, which has expired or was revoked: `polymesh token create%s` on a server makes another", m.Token.ID, map[bool]string{true: " --role server"}[path == ServerPath])
	}
	return err
}

// unauthorized reports whether the API server does not accept who asks.
func unauthorized(err error) bool {
	var refusal *Refusal
	return errors.As(err, &refusal) && refusal.Status == http.StatusUnauthorized
}

// retry calls a server until it answers.
func (m Machine) retry(ctx context.Context, try func() error) error {
	begin := time.Now()
	for last := ""; ; {
		err := try()
		var refusal *Refusal
		var other *otherServerError
		hint := ""
		switch {
		case err == nil:
			return nil
		// A server that has just started knows neither tokens nor roles for a moment.
		case errors.As(err, &refusal) && slices.Contains([]int{http.StatusUnauthorized, http.StatusForbidden, http.StatusNotFound}, refusal.Status) && time.Since(begin) < settling:
			hint = fmt.Sprintf(" (tried again for %s, because a server that has just started accepts no token for a moment)", settling)
		case errors.As(err, &refusal) && refusal.Status < 500 && refusal.Status != http.StatusTooManyRequests, errors.As(err, &other):
			return err
		case ctx.Err() != nil:
			return fmt.Errorf("join by %s: %w", m.Server, err)
		}
		if text := err.Error() + hint; text != last {
			m.Log.Info("waiting for a server", "server", m.Server, "err", text)
			m.Waiting(text)
			last = text
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("join by %s: %w", m.Server, err)
		case <-time.After(retryInterval):
		}
	}
}

// call sends JSON and reads JSON. An answer other than 200 is a Refusal.
func call(ctx context.Context, client *http.Client, method, url, bearer string, body, answer any) error {
	var text []byte
	if body != nil {
		var err error
		if text, err = json.Marshal(body); err != nil {
			return err
		}
	}
	req, err := http.NewRequestWithContext(ctx, method, url, bytes.NewReader(text))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	if bearer != "" {
		req.Header.Set("Authorization", "Bearer "+bearer)
	}
	resp, err := client.Do(req)
	if err != nil {
		return reason(err)
	}
	defer resp.Body.Close()
	got, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		refusal := &Refusal{Status: resp.StatusCode}
		// The API server's own answers are a Status, which has a message too.
		if json.Unmarshal(got, refusal) != nil || refusal.Message == "" {
			refusal.Message = fmt.Sprintf("the server answered %s", resp.Status)
		}
		return refusal
	}
	return json.Unmarshal(got, answer)
}

// noRedirect: a token is for one server.
func noRedirect(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }

// reason removes the URL from net/http's errors: the log line has it.
func reason(err error) error {
	var wrapped *url.Error
	if errors.As(err, &wrapped) {
		return wrapped.Err
	}
	return err
}

// otherServerError means that the server is not one of the token's cluster.
type otherServerError struct{ message string }

func (e *otherServerError) Error() string { return e.message }

// pinned accepts a server whose chain contains the authority with the hash, and whose certificate is for the host.
func pinned(hash, server string, now func() time.Time) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS12,
		// The standard check needs the authority beforehand; this one takes it from the handshake. Nothing is sent before it.
		InsecureSkipVerify: true,
		VerifyConnection: func(state tls.ConnectionState) error {
			chain := state.PeerCertificates
			roots := x509.NewCertPool()
			found := false
			for _, c := range chain[1:] {
				if c.IsCA && token.Hash(c) == hash {
					roots.AddCert(c)
					found = true
				}
			}
			if !found {
				return &otherServerError{fmt.Sprintf("%s is not a server of the token's cluster: none of its certificates is the authority with the hash %.12s…: check --server and the token, and what is between this machine and the server", server, hash)}
			}
			u, err := url.Parse(server)
			if err != nil {
				return err
			}
			_, err = chain[0].Verify(x509.VerifyOptions{Roots: roots, DNSName: u.Hostname(), CurrentTime: now(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}})
			var invalid x509.CertificateInvalidError
			var host x509.HostnameError
			switch {
			case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
				return &otherServerError{fmt.Sprintf("this machine's clock shows %s, but the server's certificate is valid from %s to %s: set the clock",
					now().UTC().Format(time.DateTime), chain[0].NotBefore.UTC().Format(time.DateTime), chain[0].NotAfter.UTC().Format(time.DateTime))}
			case errors.As(err, &host):
				return &otherServerError{fmt.Sprintf("the server's certificate is not for %s: start the servers with --tls-san %s, or join by another of their addresses", u.Hostname(), u.Hostname())}
			case err != nil:
				return &otherServerError{err.Error()}
			}
			return nil
		},
	}
}

// key returns a key for joining, the same again after an interruption: the cluster keeps the name for it.
func (m Machine) key(name string, have *ecdsa.PrivateKey) (*ecdsa.PrivateKey, error) {
	path := m.keyFile(name)
	if have != nil {
		return have, os.RemoveAll(path)
	}
	if text, err := os.ReadFile(path); err == nil {
		if key, err := keyutil.ParsePrivateKeyPEM(text); err == nil {
			if key, ok := key.(*ecdsa.PrivateKey); ok {
				return key, nil
			}
		}
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	text, err := keyutil.MarshalPrivateKeyToPEM(key)
	if err != nil {
		return nil, err
	}
	return key, atomicfile.Write(path, text, 0o600)
}

func (m Machine) keyFile(name string) string {
	return filepath.Join(m.DataDir.NodePKI(), "join-"+name+".key")
}

func signingRequest(key *ecdsa.PrivateKey) ([]byte, error) {
	return x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{}}, key)
}

// keep writes what the cluster granted. The certificates go where the kubelet keeps those that it renews; the authority, without
// which there is no membership, is written last.
func (m Machine) keep(f Files, g *Grant, client, serving *ecdsa.PrivateKey) error {
	for _, pair := range []struct {
		store string
		cert  []byte
		key   *ecdsa.PrivateKey
	}{{"kubelet-client", g.ClientCertificate, client}, {"kubelet-server", g.ServingCertificate, serving}} {
		key, err := keyutil.MarshalPrivateKeyToPEM(pair.key)
		if err != nil {
			return err
		}
		store, err := clientcertificate.NewFileStore(pair.store, m.DataDir.NodePKI(), m.DataDir.NodePKI(), "", "")
		if err != nil {
			return err
		}
		if _, err := store.Update(pair.cert, key); err != nil {
			return fmt.Errorf("keep the node's certificate in %s: %w", pair.store, err)
		}
	}
	if err := m.write(g.Cluster); err != nil {
		return err
	}
	if err := atomicfile.Write(f.ClientCA, g.ClientCA, 0o644); err != nil {
		return err
	}
	if err := atomicfile.Write(f.ServerCA, g.ServerCA, 0o644); err != nil {
		return err
	}
	for _, name := range []string{"client", "serving"} {
		if err := os.RemoveAll(m.keyFile(name)); err != nil {
			return err
		}
	}
	return nil
}

// membership is the file with what an agent knows of its cluster.
type membership struct {
	NodeName string  `json:"nodeName"`
	Server   string  `json:"server"`
	Cluster  Cluster `json:"cluster"`
}

func (m Machine) write(c Cluster) error {
	text, err := json.MarshalIndent(membership{m.NodeName, m.Server, c}, "", "  ")
	if err != nil {
		return err
	}
	return atomicfile.Write(m.DataDir.Membership(), append(text, '\n'), 0o600)
}

func readMembership(dir layout.DataDir) (*membership, error) {
	text, err := os.ReadFile(dir.Membership())
	if err != nil {
		return nil, err
	}
	var m membership
	if err := json.Unmarshal(text, &m); err != nil {
		return nil, fmt.Errorf("read %s: %w", dir.Membership(), err)
	}
	return &m, nil
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

// client is one that authenticates as the node.
func client(f Files) (*http.Client, error) { return clientWith(f.ServerCA, f.Client, f.Client) }

func clientWith(caFile, certFile, keyFile string) (*http.Client, error) {
	ca, err := os.ReadFile(caFile)
	if err != nil {
		return nil, err
	}
	pair, err := tls.LoadX509KeyPair(certFile, keyFile)
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	const dial = 3 * time.Second
	return &http.Client{Timeout: requestTimeout, CheckRedirect: noRedirect, Transport: &http.Transport{
		DialContext: (&net.Dialer{Timeout: dial}).DialContext, TLSHandshakeTimeout: dial, DisableKeepAlives: true,
		TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: roots, Certificates: []tls.Certificate{pair}},
	}}, nil
}

// Member returns the name of the node that a machine is, and the server by which it joined. ok is false if it has not joined a cluster.
func Member(dir layout.DataDir) (node, server string, ok bool) {
	if _, err := os.Stat(files(dir).ServerCA); err != nil {
		return "", "", false
	}
	m, err := readMembership(dir)
	if err != nil {
		return "", "", false
	}
	return m.NodeName, m.Server, true
}

// Leave removes the machine's node from the cluster by a server.
func Leave(ctx context.Context, dir layout.DataDir, server string) error {
	hc, err := client(files(dir))
	if err != nil {
		return err
	}
	// The kubelet reports the same (machineId in cAdvisor).
	id, _ := os.ReadFile("/etc/machine-id")
	return call(ctx, hc, http.MethodPost, server+LeavePath, "", Leaving{MachineID: strings.TrimSpace(string(id))}, &struct{}{})
}
