// Package status implements `polymesh status`: a running node reports the state of its components, and a server that of its cluster,
// on a socket in its run directory; nothing is written to disk. Other commands that need the running node use the socket too.
package status

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"polymesh.dev/polymesh/pkg/component"
)

// Report is a server's status.
type Report struct {
	Version    string    `json:"version"`
	PID        int       `json:"pid"`
	Since      time.Time `json:"since"`
	DataDir    string    `json:"dataDir"`
	Node       string    `json:"node"`
	NodeIP     string    `json:"nodeIP"`
	Kubeconfig string    `json:"kubeconfig"`
	// Memory is the resident memory of the server process in bytes, Anonymous the part that is not file-backed.
	Memory     uint64      `json:"memoryBytes"`
	Anonymous  uint64      `json:"anonymousBytes"`
	Ready      bool        `json:"ready"`
	Components []Component `json:"components"`
	// Role is "server" or "agent".
	Role string `json:"role"`
	// Servers are the API servers that an agent knows.
	Servers []APIServer `json:"servers,omitempty"`
	// Cluster is set on a server if it was requested: see Scope.
	Cluster *Cluster `json:"cluster,omitempty"`
	// Workloads is set on a server, with every scope but NodeOnly.
	Workloads *Workloads `json:"workloads,omitempty"`
}

// The roles of a node.
const (
	RoleServer = "server"
	RoleAgent  = "agent"
)

// APIServer is an API server that an agent knows.
type APIServer struct {
	Address string `json:"address"`
	// Connections is the number of connections from this node to it.
	Connections int `json:"connections"`
	// Current is set for the one to which new connections go.
	Current bool `json:"current,omitempty"`
	// Problem is why it is not used; empty if it works.
	Problem string `json:"problem,omitempty"`
}

// Component is one row of the report.
type Component struct {
	component.Status
	// Memory is the resident memory of the component's own process in bytes; 0 if it runs in the server process.
	Memory uint64 `json:"memoryBytes,omitempty"`
	// InServer is set if the component runs inside the server process.
	InServer bool `json:"inServer"`
}

// Source is where the states come from: a component.Manager.
type Source interface {
	Status(ctx context.Context) []component.Status
}

// Server serves the status on a socket. Its methods may be called while it runs.
type Server struct {
	mux     *http.ServeMux
	cluster atomic.Pointer[func(context.Context) *Cluster]
	servers atomic.Pointer[func() []APIServer]
	// workloads is asked for workloadsTime at most.
	workloads atomic.Pointer[func(context.Context) *Workloads]
}

// workloadsTime is how long a report waits for what is wrong with the workloads.
const workloadsTime = 2 * time.Second

// Serve serves the status on the socket until ctx ends.
func Serve(ctx context.Context, socket string, base Report, source Source) (*Server, error) {
	if err := os.MkdirAll(filepath.Dir(socket), 0o711); err != nil {
		return nil, err
	}
	if err := os.Remove(socket); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("remove the socket of a previous run: %w", err)
	}
	listener, err := net.Listen("unix", socket)
	if err != nil {
		return nil, fmt.Errorf("listen for status requests: %w", err)
	}
	if err := os.Chmod(socket, 0o600); err != nil {
		return nil, err
	}
	s := &Server{mux: http.NewServeMux()}
	s.mux.HandleFunc("GET "+statusPath, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(s.report(r.Context(), base, source, Scope(r.FormValue(scopeParameter))))
	})
	server := &http.Server{Handler: s.mux, ReadHeaderTimeout: 5 * time.Second}
	context.AfterFunc(ctx, func() { server.Close() })
	go func() { _ = server.Serve(listener) }()
	return s, nil
}

// Handle adds a path to the socket, which only root can use, for other commands that need the running node.
func (s *Server) Handle(pattern string, h http.Handler) { s.mux.Handle(pattern, h) }

// DescribeCluster sets where a server's report gets the state of the cluster from. f bounds its own time.
func (s *Server) DescribeCluster(f func(context.Context) *Cluster) { s.cluster.Store(&f) }

// DescribeServers sets where an agent's report gets the API servers from.
func (s *Server) DescribeServers(f func() []APIServer) { s.servers.Store(&f) }

// DescribeWorkloads sets where a server's report gets from what is wrong with the workloads. f returns when its context ends.
func (s *Server) DescribeWorkloads(f func(context.Context) *Workloads) { s.workloads.Store(&f) }

func (s *Server) report(ctx context.Context, base Report, source Source, scope Scope) Report {
	var cluster <-chan *Cluster
	if f := s.cluster.Load(); f != nil && scope != NodeOnly {
		found := make(chan *Cluster, 1)
		cluster = found
		go func() { found <- (*f)(ctx) }()
	}
	var workloads <-chan *Workloads
	if f := s.workloads.Load(); f != nil && scope != NodeOnly {
		found := make(chan *Workloads, 1)
		workloads = found
		go func() {
			ctx, cancel := context.WithTimeout(ctx, workloadsTime)
			defer cancel()
			found <- (*f)(ctx)
		}()
	}
	base.PID = os.Getpid()
	base.Memory, base.Anonymous = Memory(base.PID)
	components := source.Status(ctx)
	base.Ready = len(components) > 0
	for _, s := range components {
		row := Component{Status: s, InServer: !s.Separate}
		row.Memory, _ = Memory(s.PID)
		base.Ready = base.Ready && (s.State == component.Ready || s.State == component.Standby)
		base.Components = append(base.Components, row)
	}
	if f := s.servers.Load(); f != nil {
		base.Servers = (*f)()
	}
	if cluster != nil {
		if c := <-cluster; c.Several() || scope == WithCluster {
			base.Cluster = c
		}
	}
	if workloads != nil {
		base.Workloads = <-workloads
	}
	return base
}

// ErrNotRunning means that no server is running for the data dir.
var ErrNotRunning = errors.New("no server is running")

// Scope is what a report contains.
type Scope string

// The scopes.
const (
	// NodeOnly is this node.
	NodeOnly Scope = ""
	// Automatic is this node and, if the cluster has several nodes, the cluster.
	Automatic Scope = "auto"
	// WithCluster is this node and the cluster.
	WithCluster Scope = "cluster"
)

const (
	statusPath     = "/status"
	scopeParameter = "scope"
	// maxResponse is the limit of a response, in bytes.
	maxResponse = 16 << 20
)

// Ask requests the report of the node that listens on the socket.
func Ask(ctx context.Context, socket string) (*Report, error) {
	return AskFor(ctx, socket, NodeOnly)
}

// AskFor requests a report with a scope.
func AskFor(ctx context.Context, socket string, scope Scope) (*Report, error) {
	r := &Report{}
	if err := Call(ctx, socket, http.MethodGet, statusPath+"?"+scopeParameter+"="+string(scope), nil, r); err != nil {
		return nil, err
	}
	return r, nil
}

// RefusedError is a response of the node that is an error.
type RefusedError struct {
	Status  int    `json:"-"`
	Message string `json:"message"`
}

func (err *RefusedError) Error() string { return err.Message }

// Call sends a request with a JSON body, nil for none, to the node that listens on the socket, and reads a JSON response. Errors are
// ErrNotRunning, and RefusedError for another status than 200.
func Call(ctx context.Context, socket, method, path string, body, response any) error {
	client := &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", socket)
		},
		DisableKeepAlives: true,
	}}
	var text bytes.Buffer
	if body != nil {
		if err := json.NewEncoder(&text).Encode(body); err != nil {
			return err
		}
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://polymesh"+path, &text)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
		return ErrNotRunning
	}
	if errors.Is(err, fs.ErrPermission) {
		return fmt.Errorf("only root can read %s: run it with sudo", socket)
	}
	if failed := new(url.Error); errors.As(err, &failed) {
		err = failed.Err // its address means nothing
	}
	if err != nil {
		return fmt.Errorf("send a request to the running node: %w", err)
	}
	defer resp.Body.Close()
	got, err := io.ReadAll(io.LimitReader(resp.Body, maxResponse))
	if err != nil {
		return fmt.Errorf("read the node's response: %w", err)
	}
	if resp.StatusCode != http.StatusOK {
		refused := &RefusedError{Status: resp.StatusCode}
		if json.Unmarshal(got, refused) != nil || refused.Message == "" {
			refused.Message = "the node responded with " + resp.Status
		}
		return refused
	}
	if err := json.Unmarshal(got, response); err != nil {
		return fmt.Errorf("read the node's response: %w", err)
	}
	return nil
}

// Refuse responds with an error, for a handler of Handle.
func Refuse(w http.ResponseWriter, status int, err error) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(RefusedError{Message: err.Error()})
}

// Memory returns the resident and the anonymous memory of a process, in bytes; both are 0 if the process does not exist.
func Memory(pid int) (resident, anonymous uint64) {
	if pid == 0 {
		return 0, 0
	}
	text, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "status"))
	if err != nil {
		return 0, 0
	}
	for line := range strings.Lines(string(text)) {
		f := strings.Fields(line)
		if len(f) < 2 {
			continue
		}
		kib, _ := strconv.ParseUint(f[1], 10, 64)
		switch f[0] {
		case "VmRSS:":
			resident = kib << 10
		case "RssAnon:":
			anonymous = kib << 10
		}
	}
	return resident, anonymous
}
