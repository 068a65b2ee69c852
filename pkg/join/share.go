package join

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"strings"
	"time"

	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/endpoints/request"
	"k8s.io/client-go/kubernetes"
	bootstrapapi "k8s.io/cluster-bootstrap/token/api"

	"polymesh.dev/polymesh/pkg/atomicfile"
	"polymesh.dev/polymesh/pkg/bootstrap"
	"polymesh.dev/polymesh/pkg/certificate"
	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/controlplane/datastore"
	"polymesh.dev/polymesh/pkg/token"
)

// Shared is for a server whose datastore other servers can share.
type Shared struct {
	// Config is this server's, whose settings and data dir have what it shares.
	Config *config.Server
	// ID is that of its data dir; empty where servers do not find each other in the datastore.
	ID        string
	Datastore bootstrap.Datastore
	Endpoint  datastore.Endpoint
	// Settles is set on the server whose settings are the cluster's: not on one that has joined.
	Settles bool
	// AddMember adds the member of etcd of a node, and returns all members; nil where the servers run no etcd.
	AddMember func(ctx context.Context, node string, m bootstrap.Peer) ([]bootstrap.Peer, error)
}

// openStore connects to a datastore. The caller calls done.
func openStore(e datastore.Endpoint) (store bootstrap.Store, done func(), err error) {
	client, err := e.Client()
	if err != nil {
		return store, nil, err
	}
	return bootstrap.Store{Client: client}, func() { client.Close() }, nil
}

// bundle returns what this server would share, without a token.
func (o *Shared) bundle() (b bootstrap.Bundle, err error) {
	b.Settings, b.Datastore = o.Config.Settings(), o.Datastore
	authorities, err := certificate.EnsureAuthorities(certificate.Store(o.Config.DataDir.TLS()), time.Now())
	if err != nil {
		return b, err
	}
	if b.Authorities, err = authorities.Export(); err != nil {
		return b, err
	}
	b.Encryption, err = os.ReadFile(o.Config.DataDir.EncryptionFile())
	return b, err
}

// share keeps in the datastore what a further server needs, and the server token in its file. then, which may be nil, reads what is there now.
func (s *Server) share(ctx context.Context, client kubernetes.Interface, then func(bootstrap.Store) error) (note string, err error) {
	s.sharing.Lock()
	defer s.sharing.Unlock()
	o := s.opts.Shared
	key, err := bootstrap.EnsureKey(o.Config.DataDir.BootstrapKey())
	if err != nil {
		return "", err
	}
	store, done, err := openStore(o.Endpoint)
	if err != nil {
		return "", err
	}
	defer done()
	if o.ID != "" {
		if err := store.Holds(ctx, s.opts.Name, o.ID); err != nil {
			return "", err
		}
	}
	bundle, err := o.bundle()
	if err != nil {
		return "", err
	}
	before, err := store.Read(ctx, key)
	if err != nil && !errors.Is(err, bootstrap.ErrNone) {
		return "", err
	}
	if err == nil && !o.Settles {
		bundle.Settings = before.Settings
	}
	t, note, err := s.serverToken(ctx, client, store, key, before.Token)
	if err != nil {
		return "", err
	}
	if bundle.Token = before.Token; t.ID != "" {
		bundle.Token = t.String()
	}
	if err := store.Save(ctx, key, bundle); err != nil {
		return "", err
	}
	if t.ID != "" {
		if err := store.Allow(ctx, key, t); err != nil {
			return "", err
		}
	}
	err = store.Keep(ctx, func(ctx context.Context) (map[string]bool, error) { return tokenIDs(ctx, client) })
	if err == nil && then != nil {
		err = then(store)
	}
	return note, err
}

// serverToken returns the token in server/token. Where there is no file, it is the one that the servers share, or that of the secret which the
// user has chosen, or a new one. The zero token is one that was revoked, which is not made again: whoever wants another removes the file on all
// servers.
func (s *Server) serverToken(ctx context.Context, client kubernetes.Interface, store bootstrap.Store, key bootstrap.Key, shared string) (t token.Token, note string, err error) {
	file := s.opts.Shared.Config.DataDir.ServerToken()
	text, err := os.ReadFile(file)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return t, "", fmt.Errorf("read the server token: %w", err)
	}
	ids, err := tokenIDs(ctx, client)
	if err != nil {
		return t, "", err
	}
	chosen, err := s.chosen()
	if err != nil {
		return t, "", err
	}
	if text != nil {
		if t, err = token.Parse(string(text)); err != nil || t.Role() != token.Server {
			return token.Token{}, fmt.Sprintf("%s does not contain a token for servers: remove it for a new one", file), nil
		}
		if !ids[t.ID] {
			return token.Token{}, fmt.Sprintf("the token in %s was revoked: `polymesh token create --role server` makes another, or remove the file for a new one in it", file), nil
		}
		if chosen.ID != "" && chosen != t {
			note = fmt.Sprintf("the servers' secret in the settings is not that of this cluster, whose token is in %s: to change it, set it on all servers, remove that file on each, and restart them; then revoke token %s", file, t.ID)
		}
		other, err := token.Parse(shared)
		if err != nil || other == t || chosen.ID != "" {
			return t, note, nil
		}
		first, err := firstServerToken(ctx, client, t, other)
		if err != nil || first == t {
			return t, "", err
		}
		return first, "", s.writeServerToken(first)
	}
	if t, err = token.Parse(shared); err != nil || !ids[t.ID] || chosen.ID != "" {
		if t, err = s.newServerToken(ctx, client, store, key, chosen, ids); err != nil {
			return token.Token{}, "", err
		}
	}
	return t, "", s.writeServerToken(t)
}

func (s *Server) writeServerToken(t token.Token) error {
	if err := atomicfile.Write(s.opts.Shared.Config.DataDir.ServerToken(), []byte(t.String()+"\n"), 0o600); err != nil {
		return fmt.Errorf("write the server token: %w", err)
	}
	return nil
}

// firstServerToken returns which of two tokens all servers use: this server's own, and the one that they share. Two servers whose files were
// removed at the same time may have made one each; any other token in the file is the user's choice, and stays.
func firstServerToken(ctx context.Context, client kubernetes.Interface, own, shared token.Token) (token.Token, error) {
	secrets, err := tokenSecrets(ctx, client, serverTokenLabel)
	if err != nil {
		return own, err
	}
	made := map[string]bool{}
	for _, s := range secrets {
		made[strings.TrimPrefix(s.Name, bootstrapapi.BootstrapTokenSecretPrefix)] = true
	}
	if made[own.ID] && made[shared.ID] && shared.ID < own.ID {
		return shared, nil
	}
	return own, nil
}

// newServerToken lets the cluster accept the token that the user has chosen, or a new one.
func (s *Server) newServerToken(ctx context.Context, client kubernetes.Interface, store bootstrap.Store, key bootstrap.Key, chosen token.Token, ids map[string]bool) (token.Token, error) {
	t := chosen
	if t.ID == "" {
		ca, err := authority(s.opts.Certificates, certificate.ServerCA)
		if err != nil {
			return t, err
		}
		if t, err = token.New(token.Hash(ca), token.Server); err != nil {
			return t, err
		}
	}
	if ids[t.ID] {
		return t, nil // another server has the same secret
	}
	allow := func(ctx context.Context, t token.Token) error { return store.Allow(ctx, key, t) }
	return t, register(ctx, client, t, TokenOptions{Description: "server/token"}, allow, map[string]string{serverTokenLabel: "true"})
}

// chosen returns the token of the secret that the user has chosen; the zero token if none is. It is called with sharing locked.
func (s *Server) chosen() (token.Token, error) {
	secret := s.opts.Shared.Config.Secret
	if secret == "" || s.ofSecret.ID != "" {
		return s.ofSecret, nil
	}
	ca, err := authority(s.opts.Certificates, certificate.ServerCA)
	if err != nil {
		return token.Token{}, err
	}
	s.ofSecret, err = token.OfSecret(token.Hash(ca), secret)
	return s.ofSecret, err
}

// tokenIDs returns the ids of the tokens for servers.
func tokenIDs(ctx context.Context, client kubernetes.Interface) (map[string]bool, error) {
	infos, err := ListTokens(ctx, client)
	if err != nil {
		return nil, err
	}
	ids := map[string]bool{}
	for _, i := range infos {
		if i.Role == token.Server {
			ids[i.ID] = true
		}
	}
	return ids, nil
}

// server answers a machine that becomes a server.
func (s *Server) server(r *http.Request) (any, error) {
	req, client, done, err := s.joining(r)
	if err != nil {
		return nil, err
	}
	defer done()
	if s.opts.Shared == nil {
		return nil, refuse(http.StatusConflict, "this cluster keeps its state in SQLite, which only one server can use: start its server once with --cluster-init, which moves the state to etcd, and join then")
	}
	view, err := s.view(r.Context(), client, req.NodeName)
	if err != nil {
		return nil, err
	}
	log := s.log.With("node", fmt.Sprintf("%.63q", req.NodeName), "address", req.NodeIP, "token", caller(r))
	id, ok := strings.CutPrefix(caller(r), bootstrapapi.BootstrapUserPrefix)
	if !ok {
		return nil, refuse(http.StatusForbidden, "a machine becomes a server with a server's token")
	}
	refused := DecideServer(req, view)
	if refused == nil {
		_, refused, err = take(r.Context(), client, req, joins{role: token.Server, token: caller(r)}, view)
	}
	if err != nil {
		return nil, err
	}
	if refused != nil {
		log.Warn("a server was refused", "why", refused.Message)
		return nil, refused
	}
	var g ServerGrant
	_, err = s.share(r.Context(), client, func(store bootstrap.Store) (err error) {
		g.Bundle, g.Key, err = store.Sealed(r.Context(), id)
		return err
	})
	if errors.Is(err, bootstrap.ErrNone) {
		return nil, refuse(http.StatusForbidden, "token %s opens nothing: `polymesh token create --role server` on a server makes one that does", id)
	}
	if err != nil {
		return nil, err
	}
	log.Info("a server joins")
	return g, nil
}

// member adds a server's member of etcd. RBAC grants it to no one, so that only servers, whose group needs no grant, can.
func (s *Server) member(r *http.Request) (any, error) {
	if err := onlyServers(r); err != nil {
		return nil, err
	}
	if s.opts.Shared == nil || s.opts.Shared.AddMember == nil {
		return nil, refuse(http.StatusConflict, "the servers of this cluster run no etcd")
	}
	var req MemberRequest
	if err := read(r, &req); err != nil {
		return nil, err
	}
	u, err := url.Parse(req.Member.URL)
	if err == nil {
		_, err = netip.ParseAddrPort(u.Host)
	}
	if err != nil || u.Scheme != "https" || u.Path != "" || strings.ContainsAny(req.Member.Name, "=, ") || req.Member.Node() != req.NodeName {
		return nil, refuse(http.StatusBadRequest, "%.100q at %.100q cannot be a member of etcd", req.Member.Name, req.Member.URL)
	}
	members, err := s.opts.Shared.AddMember(r.Context(), req.NodeName, req.Member)
	if err != nil {
		if refusal := new(Refusal); errors.As(err, &refusal) {
			return nil, refusal
		}
		// The other side tries again, and shows why.
		return nil, refuse(http.StatusServiceUnavailable, "%v", err)
	}
	s.log.Info("a server's member of etcd is added", "member", req.Member.Name, "address", req.Member.URL)
	return Members{members}, nil
}

// shares answers a server that starts again.
func (s *Server) shares(r *http.Request) (any, error) {
	if err := onlyServers(r); err != nil {
		return nil, err
	}
	if s.opts.Shared == nil {
		return nil, refuse(http.StatusConflict, "this cluster has one server only")
	}
	client, err := s.api()
	if err != nil {
		return nil, err
	}
	var shares Shares
	_, err = s.share(r.Context(), client, func(store bootstrap.Store) (err error) {
		shares.Bundle, err = store.Bundle(r.Context())
		return err
	})
	return shares, err
}

func onlyServers(r *http.Request) error {
	if u, ok := request.UserFrom(r.Context()); ok {
		for _, g := range u.GetGroups() {
			if g == user.SystemPrivilegedGroup {
				return nil
			}
		}
	}
	return refuse(http.StatusForbidden, "only servers may send this request")
}

// ShareToken returns what lets a new token open what the servers share, for commands on a server.
func ShareToken(keyFile, endpointFile string) func(context.Context, token.Token) error {
	return func(ctx context.Context, t token.Token) error {
		key, err := os.ReadFile(keyFile)
		if errors.Is(err, fs.ErrNotExist) {
			return errors.New("a token for servers is made on a server whose datastore others can share: if this is the cluster's only server, on SQLite, start it once with --cluster-init")
		}
		if err != nil {
			return fmt.Errorf("a server's token is made on a server whose datastore others can share: %w", err)
		}
		endpoint, err := datastore.ReadEndpoint(endpointFile)
		if err != nil {
			return err
		}
		store, done, err := openStore(endpoint)
		if err != nil {
			return err
		}
		defer done()
		return store.Allow(ctx, bytes.Clone(key), t)
	}
}
