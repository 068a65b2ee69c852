package join

import (
	"bytes"
	"context"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apiserver/pkg/endpoints/request"
	"k8s.io/client-go/kubernetes"
	"k8s.io/klog/v2"

	"polymesh.dev/polymesh/pkg/atomicfile"
	"polymesh.dev/polymesh/pkg/bootstrap"
	"polymesh.dev/polymesh/pkg/certificate"
	"polymesh.dev/polymesh/pkg/component"
	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/kubeconfig"
	"polymesh.dev/polymesh/pkg/token"
)

const (
	// maxBody is the limit of a request, in bytes; two signing requests and a certificate have about 2,000.
	maxBody = 64 << 10
	// maxJoins is how many machines are answered at the same time.
	maxJoins = 8
	// recordInterval is how often the records are compared with the nodes, beside each change.
	recordInterval = 2 * time.Second
	// tokenInterval is how often the file with the node token is compared with the cluster.
	tokenInterval = 30 * time.Second
)

// Options are a server's.
type Options struct {
	// Name and Address are this server's node's.
	Name    string
	Address netip.Addr
	// Kubeconfig may read and write nodes, their leases, and the tokens.
	Kubeconfig   string
	Certificates certificate.Store
	Cluster      Cluster
	// Version is the API server's: v1.36.3.
	Version string
	// TokenFile is where the node token is written.
	TokenFile string
	// Shared is nil if the datastore is for one server only.
	Shared *Shared
	Log    *slog.Logger
}

// Server is the component "join".
type Server struct {
	component.Background
	opts    Options
	log     *slog.Logger
	client  atomic.Pointer[kubernetes.Clientset]
	joins   chan struct{} // has a value for each machine that is answered
	asking  asking
	records *records
	problem atomic.Pointer[string]
	note    atomic.Pointer[string]
	// sharing is one round of share at a time.
	sharing sync.Mutex
	// ofSecret is the token of the servers' secret in the settings, which is costly to derive; guarded by sharing.
	ofSecret token.Token
	// unreachable is about kubelets that this server cannot reach.
	unreachable atomic.Pointer[string]
	failed      chan error
}

// NewServer returns the component, not yet started.
func NewServer(o Options) *Server {
	return &Server{opts: o, log: o.Log.With("component", "join"), joins: make(chan struct{}, maxJoins), records: newRecords(o.Name), failed: make(chan error, 1)}
}

// Name implements component.Component.
func (s *Server) Name() string { return "join" }

// Init does nothing.
func (s *Server) Init(context.Context) error { return nil }

// Handlers are the paths for the API server, which has checked who calls, and whether they may, before it passes a request on.
func (s *Server) Handlers() map[string]http.Handler {
	return map[string]http.Handler{
		AgentPath: answer(http.MethodPost, s.agent), ClusterPath: answer(http.MethodGet, s.cluster), LeavePath: answer(http.MethodPost, s.leave),
		ServerPath: answer(http.MethodPost, s.server), MemberPath: answer(http.MethodPost, s.member), SharesPath: answer(http.MethodGet, s.shares),
		ReachPath: answer(http.MethodPost, s.reach),
	}
}

// Start begins to answer, and keeps the file with the node token.
func (s *Server) Start(ctx context.Context) error {
	rest, err := kubeconfig.Config(s.opts.Kubeconfig)
	if err != nil {
		return err
	}
	// maxJoins limits the requests, and machines must not wait for each other in the client's own queue.
	rest.Timeout, rest.QPS = 10*time.Second, -1
	client, err := kubernetes.NewForConfig(rest)
	if err != nil {
		return err
	}
	s.client.Store(client)
	watching := *rest
	watching.Timeout = 0
	watcher, err := kubernetes.NewForConfig(&watching)
	if err != nil {
		return err
	}
	s.Go(ctx, func(ctx context.Context) {
		var following sync.WaitGroup
		defer following.Wait()
		following.Go(func() { s.reaching(ctx) })
		following.Go(func() { s.records.follow(ctx, watcher, s.log.Info) })
		tokens := time.NewTicker(tokenInterval)
		defer tokens.Stop()
		// Before there is a token with which the name could be taken.
		if !s.recordSelf(ctx, client) {
			return
		}
		s.round(ctx, client)
		for {
			select {
			case <-ctx.Done():
				return
			case <-tokens.C:
				s.round(ctx, client)
			}
		}
	})
	return nil
}

// Failed implements component.Failing: the name of this server's node is another machine's.
func (s *Server) Failed() <-chan error { return s.failed }

// recordSelf records this server, when the records are known. It returns false if it cannot, or ctx ends.
func (s *Server) recordSelf(ctx context.Context, client kubernetes.Interface) bool {
	select {
	case <-ctx.Done():
		return false
	case <-s.records.adopted:
	}
	for {
		err := recordServer(ctx, client, s.opts.Name, s.opts.Address, time.Now())
		var taken *NameTakenError
		switch {
		case err == nil:
			return true
		case errors.As(err, &taken):
			s.failed <- err
			return false
		}
		problem := fmt.Sprintf("record this server: %v", err)
		s.problem.Store(&problem)
		select {
		case <-ctx.Done():
			return false
		case <-time.After(retryInterval):
		}
	}
}

func (s *Server) round(ctx context.Context, client kubernetes.Interface) {
	note, err := s.keepToken(ctx, client)
	if err == nil && s.opts.Shared != nil {
		var more string
		if more, err = s.share(ctx, client, nil); note == "" {
			note = more
		}
	}
	if ctx.Err() != nil {
		return
	}
	problem := ""
	if err != nil {
		problem = err.Error()
	}
	if taken := new(bootstrap.TakenError); errors.As(err, &taken) {
		select {
		case s.failed <- err:
		default:
		}
	}
	s.problem.Store(&problem)
	s.note.Store(&note)
}

// keepToken writes the node token to its file. A token that was revoked is not made again: whoever wants another removes the file.
func (s *Server) keepToken(ctx context.Context, client kubernetes.Interface) (note string, err error) {
	have, err := os.ReadFile(s.opts.TokenFile)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("read the node token: %w", err)
	}
	missing := err != nil
	ca, err := authority(s.opts.Certificates, certificate.ServerCA)
	if err != nil {
		return "", err
	}
	t, ok, err := nodeToken(ctx, client, token.Hash(ca), missing)
	switch {
	case err != nil:
		return "", err
	case !ok:
		return fmt.Sprintf("the token in %s was revoked: `polymesh token create` makes another, or remove the file for a new one in it", s.opts.TokenFile), nil
	}
	text := []byte(t.String() + "\n")
	if bytes.Equal(have, text) {
		return "", nil
	}
	if err := atomicfile.Write(s.opts.TokenFile, text, 0o600); err != nil {
		return "", fmt.Errorf("write the node token: %w", err)
	}
	return "", nil
}

// Ready returns nil when the node token is written.
func (s *Server) Ready(context.Context) error {
	switch problem := s.problem.Load(); {
	case problem == nil:
		return errors.New("making the token for nodes")
	case *problem != "":
		return errors.New(*problem)
	}
	return nil
}

// Notes implements component.Noted.
func (s *Server) Notes(context.Context) []string {
	return component.Present(s.note.Load(), s.records.behind.Load(), s.unreachable.Load())
}

func authority(certs certificate.Store, name string) (*x509.Certificate, error) {
	text, err := os.ReadFile(certs.Cert(name))
	if err != nil {
		return nil, fmt.Errorf("read authority %s: %w", name, err)
	}
	ca, err := certificate.ParseAuthority(text)
	if err != nil {
		return nil, fmt.Errorf("read authority %s in %s: %w", name, certs.Cert(name), err)
	}
	return ca, nil
}

// answer makes a handler that writes JSON, a Refusal with its status.
func answer(method string, do func(*http.Request) (any, error)) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		status, body := http.StatusOK, any(nil)
		var err error
		if r.Method != method {
			err = refuse(http.StatusMethodNotAllowed, "use %s", method)
		} else {
			r.Body = http.MaxBytesReader(w, r.Body, maxBody)
			body, err = do(r)
		}
		var refusal *Refusal
		if err != nil && !errors.As(err, &refusal) {
			klog.ErrorS(err, "A machine's request failed", "path", r.URL.Path)
			refusal = refuse(http.StatusInternalServerError, "the server failed: its log says why")
		}
		if refusal != nil {
			status, body = refusal.Status, refusal
		}
		text, err := json.Marshal(body)
		if err != nil {
			status, text = http.StatusInternalServerError, nil
		}
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(status)
		_, _ = w.Write(text)
	})
}

func (s *Server) api() (kubernetes.Interface, error) {
	if client := s.client.Load(); client != nil {
		return client, nil
	}
	return nil, refuse(http.StatusServiceUnavailable, "the server is starting: try again")
}

// joining reads the request of a machine that joins, if not too many others do. The caller calls done.
func (s *Server) joining(r *http.Request) (req Request, client kubernetes.Interface, done func(), err error) {
	// First, so that slow senders do not keep others from joining.
	if err := read(r, &req); err != nil {
		return req, nil, nil, err
	}
	if client, err = s.api(); err != nil {
		return req, nil, nil, err
	}
	select {
	case s.joins <- struct{}{}:
		return req, client, func() { <-s.joins }, nil
	default:
		return req, nil, nil, refuse(http.StatusTooManyRequests, "many machines join at this moment: try again")
	}
}

// read reads the body of a request.
func read(r *http.Request, body any) error {
	if err := json.NewDecoder(r.Body).Decode(body); err != nil {
		return refuse(http.StatusBadRequest, "the request cannot be read: %v", err)
	}
	return nil
}

// agent decides, records the name, and signs.
func (s *Server) agent(r *http.Request) (any, error) {
	req, client, done, err := s.joining(r)
	if err != nil {
		return nil, err
	}
	defer done()
	view, err := s.view(r.Context(), client, req.NodeName)
	if err != nil {
		return nil, err
	}
	keys, refused := Decide(req, view)
	var made time.Time
	if refused == nil {
		made, refused, err = take(r.Context(), client, req, joins{role: token.Agent, key: keys.Client, token: caller(r)}, view)
	}
	if refused == nil && err == nil {
		// It may have registered between the list and the record.
		var n *corev1.Node
		n, err = client.CoreV1().Nodes().Get(r.Context(), req.NodeName, metav1.GetOptions{})
		switch {
		case apierrors.IsNotFound(err):
			err = nil
		case err == nil:
			view.Nodes = []corev1.Node{*n}
			_, refused = Decide(req, view)
		}
	}
	if err != nil {
		return nil, err
	}
	log := s.log.With("node", fmt.Sprintf("%.63q", req.NodeName), "address", req.NodeIP, "token", caller(r))
	if refused != nil {
		log.Warn("a machine was refused", "why", refused.Message)
		return nil, refused
	}
	grant, err := s.grant(req, keys, made)
	if err == nil {
		log.Info("a machine joins")
	}
	return grant, err
}

// caller is the name of who calls; a bootstrap token's contains its id.
func caller(r *http.Request) string {
	if user, ok := request.UserFrom(r.Context()); ok {
		return user.GetName()
	}
	return ""
}

func (s *Server) view(ctx context.Context, client kubernetes.Interface, name string) (View, error) {
	ca, err := authority(s.opts.Certificates, certificate.ClientCA)
	if err != nil {
		return View{}, err
	}
	nodes, err := client.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return View{}, fmt.Errorf("list the nodes: %w", err)
	}
	v := View{Now: time.Now(), Version: s.opts.Version, Cluster: s.opts.Cluster, ClientCA: ca, Nodes: nodes.Items}
	if config.ValidNodeName(name) {
		if v.Record, err = recordOf(ctx, client, name); err != nil {
			return View{}, err
		}
	}
	for _, n := range nodes.Items {
		if n.Name != name {
			continue
		}
		lease, err := client.CoordinationV1().Leases(corev1.NamespaceNodeLease).Get(ctx, name, metav1.GetOptions{})
		if err == nil && lease.Spec.RenewTime != nil {
			v.LastHeard = lease.Spec.RenewTime.Time
		}
	}
	return v, nil
}

func (s *Server) grant(r Request, keys Keys, now time.Time) (g *Grant, err error) {
	g = &Grant{}
	if g.Cluster, err = s.settings(); err != nil {
		return nil, err
	}
	for name, to := range map[string]*[]byte{certificate.ServerCA: &g.ServerCA, certificate.ClientCA: &g.ClientCA} {
		if *to, err = os.ReadFile(s.opts.Certificates.Cert(name)); err != nil {
			return nil, err
		}
	}
	subject := pkix.Name{CommonName: User(r.NodeName), Organization: []string{"system:nodes"}}
	g.ClientCertificate, err = s.opts.Certificates.Sign(certificate.ClientCA, certificate.Request{
		Public: keys.Client, Subject: subject, Usage: x509.ExtKeyUsageClientAuth,
	}, now)
	if err != nil {
		return nil, err
	}
	addresses := []net.IP{r.NodeIP.AsSlice()}
	if r.ExternalIP.IsValid() {
		addresses = append(addresses, r.ExternalIP.AsSlice())
	}
	g.ServingCertificate, err = s.opts.Certificates.Sign(certificate.KubeletCA, certificate.Request{
		Public: keys.Serving, Subject: subject, Usage: x509.ExtKeyUsageServerAuth, Names: []string{r.NodeName}, Addresses: addresses,
	}, now)
	return g, err
}

func (s *Server) cluster(*http.Request) (any, error) { return s.settings() }

// settings are the cluster's, with the authority by which nodes know each other.
func (s *Server) settings() (Cluster, error) {
	text, err := os.ReadFile(s.opts.Certificates.Cert(certificate.KubeletCA))
	if err != nil {
		return Cluster{}, fmt.Errorf("read authority %s: %w", certificate.KubeletCA, err)
	}
	c := s.opts.Cluster
	c.KubeletCA = string(text)
	return c, nil
}

// leave removes the caller's own node.
func (s *Server) leave(r *http.Request) (any, error) {
	name, ok := strings.CutPrefix(caller(r), User(""))
	if !ok {
		return nil, refuse(http.StatusForbidden, "only a node can leave the cluster")
	}
	client, err := s.api()
	if err != nil {
		return nil, err
	}
	var leaving Leaving
	if err := read(r, &leaving); err != nil {
		return nil, err
	}
	node, err := client.CoreV1().Nodes().Get(r.Context(), name, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		return struct{}{}, retireName(r.Context(), client, name, time.Now())
	case err != nil:
		return nil, fmt.Errorf("look for node %s: %w", name, err)
	}
	if id := node.Status.NodeInfo.MachineID; id != "" && leaving.MachineID != "" && id != leaving.MachineID {
		return nil, refuse(http.StatusConflict, "another machine is node %s now: it stays", name)
	}
	if err := client.CoreV1().Nodes().Delete(r.Context(), name, metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &node.UID}}); err != nil && !apierrors.IsNotFound(err) {
		return nil, fmt.Errorf("remove node %s: %w", name, err)
	}
	if err := retireName(r.Context(), client, name, time.Now()); err != nil {
		return nil, err
	}
	s.log.Info("a node left", "node", name)
	return struct{}{}, nil
}
