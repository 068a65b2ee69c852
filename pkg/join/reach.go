package join

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"polymesh.dev/polymesh/pkg/certificate"
	"polymesh.dev/polymesh/pkg/component"
	"polymesh.dev/polymesh/pkg/condition"
	"polymesh.dev/polymesh/pkg/controlplane/nodeaddress"
	"polymesh.dev/polymesh/pkg/layout"
)

// Nodes connect to servers, so a node works whose kubelet no server can reach, behind a firewall for example. Only logs, exec,
// port-forward and metrics fail, later, with errors that do not say why. So servers try each kubelet, and a node asks them to.

const (
	// reachTimeout is how long a connection to a kubelet may take; reachInterval is the time between two tries.
	reachTimeout  = 5 * time.Second
	reachInterval = 30 * time.Second
	// reachedInterval is the time between two questions of a node that was reached.
	reachedInterval = 5 * time.Minute
	// parallelReaches is how many kubelets are tried at the same time.
	parallelReaches = 8
	// maxAsking is how many nodes are answered at the same time.
	maxAsking = 32
	// shownNodes is how many nodes a note names.
	shownNodes = 3
)

// Reach is a server's answer to a node that asks whether its kubelet can be reached.
type Reach struct {
	// Server is the name of the server's machine, Problem empty if the kubelet was reached.
	Server  string `json:"server"`
	Problem string `json:"problem,omitempty"`
}

// reach connects to a kubelet as the API server does. Its serving certificate is part of that.
func reach(ctx context.Context, roots *x509.CertPool, address netip.Addr, port uint16) error {
	ctx, cancel := context.WithTimeout(ctx, reachTimeout)
	defer cancel()
	dialer := tls.Dialer{Config: &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: roots, ServerName: address.String()}}
	conn, err := dialer.DialContext(ctx, "tcp", net.JoinHostPort(address.String(), strconv.Itoa(int(port))))
	if err != nil {
		return err
	}
	return conn.Close()
}

// address is where the API server connects to a node (kubelet-preferred-address-types in pkg/controlplane).
func address(n *corev1.Node, external bool) (netip.Addr, bool) {
	for _, kind := range nodeaddress.Preferred(external) {
		for _, a := range n.Status.Addresses {
			if ip, err := netip.ParseAddr(a.Address); err == nil && a.Type == kind {
				return ip, true
			}
		}
	}
	return netip.Addr{}, false
}

func kubeletRoots(certs certificate.Store) (*x509.CertPool, error) {
	text, err := os.ReadFile(certs.Cert(certificate.KubeletCA))
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(text)
	return roots, nil
}

// reaching tries all kubelets again and again, until ctx ends. Nodes that are not Ready are left out: their state says it.
func (s *Server) reaching(ctx context.Context) {
	ticker := time.NewTicker(reachInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		roots, err := kubeletRoots(s.opts.Certificates)
		if err != nil {
			s.log.Warn("cannot read the authority of kubelets", "err", err)
			continue
		}
		var mu sync.Mutex
		failed := map[string]error{}
		var g errgroup.Group
		g.SetLimit(parallelReaches)
		for _, n := range s.records.all() {
			g.Go(func() error {
				at, ok := address(n, s.opts.Cluster.FlannelExternalIP)
				if !ok || !condition.IsNodeReady(n) {
					return nil
				}
				if err := reach(ctx, roots, at, layout.KubeletPort); err != nil {
					mu.Lock()
					defer mu.Unlock()
					failed[n.Name] = err
				}
				return nil
			})
		}
		_ = g.Wait()
		note := unreachable(failed)
		if ctx.Err() == nil {
			s.unreachable.Store(&note)
		}
	}
}

// unreachable is a note about kubelets that were not reached.
func unreachable(failed map[string]error) string {
	if len(failed) == 0 {
		return ""
	}
	var shown []string
	names := slices.Sorted(maps.Keys(failed))
	for _, name := range names[:min(len(names), shownNodes)] {
		shown = append(shown, fmt.Sprintf("%s (%v)", name, failed[name]))
	}
	if more := len(names) - len(shown); more > 0 {
		shown = append(shown, fmt.Sprintf("%d more", more))
	}
	return fmt.Sprintf("this server cannot reach the kubelet of %s: `kubectl logs`, `exec` and `top` fail there until TCP %d is open from the servers to the nodes", strings.Join(shown, ", "), layout.KubeletPort)
}

// reach answers a node whether this server reaches its kubelet. Only the port of kubelets is tried, at the address that the API server
// would use.
func (s *Server) reach(r *http.Request) (any, error) {
	name, ok := strings.CutPrefix(caller(r), User(""))
	if !ok {
		return nil, refuse(http.StatusForbidden, "only a node can ask whether its kubelet is reached")
	}
	if !s.asking.begin(name) {
		return nil, refuse(http.StatusTooManyRequests, "this node, or many others, send this request at this moment: try again")
	}
	defer s.asking.end(name)
	client, err := s.api()
	if err != nil {
		return nil, err
	}
	n, err := client.CoreV1().Nodes().Get(r.Context(), name, metav1.GetOptions{})
	if err != nil && !apierrors.IsNotFound(err) {
		return nil, fmt.Errorf("look for node %s: %w", name, err)
	}
	at, ok := address(n, s.opts.Cluster.FlannelExternalIP)
	if err != nil || !ok {
		return nil, refuse(http.StatusServiceUnavailable, "node %s has not registered its address yet: try again", name)
	}
	roots, err := kubeletRoots(s.opts.Certificates)
	if err != nil {
		return nil, err
	}
	answer := Reach{Server: s.opts.Name}
	if err := reach(r.Context(), roots, at, layout.KubeletPort); err != nil {
		answer.Problem = err.Error()
		s.log.Warn("the kubelet of a node is not reached: `kubectl logs` and `exec` fail there", "node", name, "err", err)
	}
	return answer, nil
}

// asking are the nodes that are answered whether they are reached: each one once, because a node chooses how long that takes, and in places
// of their own, because machines must be able to join meanwhile.
type asking struct {
	mu    sync.Mutex
	nodes map[string]bool
}

func (a *asking) begin(node string) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.nodes[node] || len(a.nodes) >= maxAsking {
		return false
	}
	if a.nodes == nil {
		a.nodes = map[string]bool{}
	}
	a.nodes[node] = true
	return true
}

func (a *asking) end(node string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.nodes, node)
}

// Reachability is the component "reachability" of an agent: it asks a server whether it reaches the kubelet here.
type Reachability struct {
	component.Background
	server string
	files  Files
	note   atomic.Pointer[string]
}

// NewReachability returns the component, not yet started. server is https://HOST:PORT.
func NewReachability(server string, f Files) *Reachability {
	return &Reachability{server: server, files: f}
}

// Name implements component.Component.
func (r *Reachability) Name() string { return "reachability" }

// Init does nothing.
func (r *Reachability) Init(context.Context) error { return nil }

// Start asks in the background.
func (r *Reachability) Start(ctx context.Context) error {
	r.Go(ctx, func(ctx context.Context) {
		for {
			note, err := r.ask(ctx)
			next := reachInterval
			var refusal *Refusal
			switch {
			case errors.As(err, &refusal) && refusal.Status == http.StatusServiceUnavailable:
				next = retryInterval
			case err == nil:
				r.note.Store(&note)
				if note == "" {
					next = reachedInterval
				}
			}
			select {
			case <-ctx.Done():
				return
			case <-time.After(next):
			}
		}
	})
	return nil
}

func (r *Reachability) ask(ctx context.Context) (note string, err error) {
	hc, err := client(r.files) // again each time: the kubelet renews the certificate
	if err != nil {
		return "", err
	}
	var a Reach
	if err := call(ctx, hc, http.MethodPost, r.server+ReachPath, "", nil, &a); err != nil {
		return "", err // of an older server, or because there is none, which the balancer reports
	}
	if a.Problem == "" {
		return "", nil
	}
	return fmt.Sprintf("server %.63q cannot reach this node's kubelet (%.200q): `kubectl logs`, `exec` and `top` fail here until TCP %d is open from the servers to this machine", a.Server, a.Problem, layout.KubeletPort), nil
}

// Ready returns nil: a node works without.
func (r *Reachability) Ready(context.Context) error { return nil }

// Notes implements component.Noted.
func (r *Reachability) Notes(context.Context) []string { return component.Present(r.note.Load()) }
