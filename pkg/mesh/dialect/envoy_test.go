package dialect_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/encoding/protojson"
)

// envoyPath returns the shipped Envoy: POLYMESH_ENVOY, or the one that `make` puts in .build. Without it the test is skipped,
// because the golden tests must run on a machine where nothing is built yet.
func envoyPath(t *testing.T) string {
	t.Helper()
	if path := os.Getenv("POLYMESH_ENVOY"); path != "" {
		if _, err := os.Stat(path); err != nil {
			t.Fatalf("POLYMESH_ENVOY: %v", err)
		}
		return path
	}
	path, err := filepath.Abs("../../../.build/images/bin/envoy")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); err != nil {
		t.Skipf("no Envoy: set POLYMESH_ENVOY or run make (%v)", err)
	}
	return path
}

// adsServer is a minimal ADS server that passes every request to a function.
type adsServer struct {
	discovery.UnimplementedAggregatedDiscoveryServiceServer
	handle func(*discovery.DiscoveryRequest, discovery.AggregatedDiscoveryService_StreamAggregatedResourcesServer) error
}

func (s *adsServer) StreamAggregatedResources(stream discovery.AggregatedDiscoveryService_StreamAggregatedResourcesServer) error {
	for {
		req, err := stream.Recv()
		if err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
		if err := s.handle(req, stream); err != nil {
			return err
		}
	}
}

// serveADS listens on a Unix socket until the test ends, and returns its path.
func serveADS(t *testing.T, s *adsServer) string {
	t.Helper()
	socket := filepath.Join(socketDir(t), "ads")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	srv := grpc.NewServer()
	discovery.RegisterAggregatedDiscoveryServiceServer(srv, s)
	go func() { _ = srv.Serve(l) }()
	t.Cleanup(srv.Stop)
	return socket
}

// socketDir returns a temporary directory with a short path: t.TempDir's is too long for a socket.
func socketDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "dialect")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// envoyBootstrap returns a bootstrap for a node, with ADS on a Unix socket. The clusters and the internal listener extension are
// those of Istio's own bootstrap that generated resources refer to
// (istio.io/istio/tools/packaging/common/envoy_bootstrap.json).
func envoyBootstrap(t *testing.T, node *core.Node, ads, sds string) string {
	t.Helper()
	js, err := protojson.Marshal(node)
	if err != nil {
		t.Fatal(err)
	}
	b := &strings.Builder{}
	fmt.Fprintf(b, `
node: %s
admin: {address: {pipe: {path: %s}}}
bootstrap_extensions:
- name: envoy.bootstrap.internal_listener
  typed_config: {"@type": type.googleapis.com/envoy.extensions.bootstrap.internal_listener.v3.InternalListener}
dynamic_resources:
  ads_config:
    api_type: GRPC
    transport_api_version: V3
    set_node_on_first_message_only: true
    grpc_services: [{envoy_grpc: {cluster_name: xds-grpc}}]
  lds_config: {ads: {}, resource_api_version: V3, initial_fetch_timeout: 0s}
  cds_config: {ads: {}, resource_api_version: V3, initial_fetch_timeout: 0s}
static_resources:
  clusters:
`, js, adminSocket(ads))
	for name, socket := range map[string]string{"xds-grpc": ads, "sds-grpc": sds, "prometheus_stats": ads, "agent": ads} {
		fmt.Fprintf(b, `
  - name: %s
    type: STATIC
    connect_timeout: 1s
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {http2_protocol_options: {}}
    load_assignment:
      cluster_name: %[1]s
      endpoints: [{lb_endpoints: [{endpoint: {address: {pipe: {path: %s}}}}]}]
`, name, socket)
	}
	return b.String()
}

func adminSocket(ads string) string { return ads + ".admin" }

// envoyProcess is a running Envoy; admin is its admin interface. The agent, if any, serves Prometheus metrics.
type envoyProcess struct {
	admin *http.Client
	agent http.Handler
	log   *syncBuffer
	done  chan struct{}
}

type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

// String leaves out Envoy's warnings about deprecated fields.
func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	var out strings.Builder
	for line := range strings.Lines(b.b.String()) {
		if !strings.Contains(line, "deprecated option") {
			out.WriteString(line)
		}
	}
	return out.String()
}

// startEnvoy runs Envoy until the test ends, in its own network namespace, because generated listeners have fixed ports.
func startEnvoy(t *testing.T, node *core.Node, ads, sds string) *envoyProcess {
	t.Helper()
	isolated := &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	if os.Geteuid() != 0 {
		isolated.Cloneflags |= syscall.CLONE_NEWUSER
	}
	return runEnvoy(t, envoyBootstrap(t, node, ads, sds), adminSocket(ads), isolated)
}

// runEnvoy runs Envoy with a bootstrap, whose admin interface is on a Unix socket, until the test ends.
func runEnvoy(t *testing.T, bootstrap, admin string, attr *syscall.SysProcAttr) *envoyProcess {
	t.Helper()
	envoy := envoyPath(t)
	config := filepath.Join(t.TempDir(), "bootstrap.yaml")
	if err := os.WriteFile(config, []byte(bootstrap), 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cmd := exec.CommandContext(ctx, envoy, "-c", config, "--concurrency", "1", "--disable-hot-restart", "--log-level", "warning")
	cmd.SysProcAttr = attr
	p := &envoyProcess{
		admin: &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", admin)
		}}},
		log:  &syncBuffer{},
		done: make(chan struct{}),
	}
	cmd.Stdout, cmd.Stderr = p.log, p.log
	if err := cmd.Start(); err != nil {
		cancel()
		if errors.Is(err, os.ErrPermission) {
			t.Skipf("not permitted to create a network namespace: %v", err)
		}
		t.Fatalf("start Envoy: %v", err)
	}
	go func() {
		_ = cmd.Wait()
		close(p.done)
	}()
	t.Cleanup(func() {
		cancel()
		<-p.done
	})
	waitFor(t, p, "response from Envoy's admin interface", func() bool {
		resp, err := p.admin.Get("http://envoy/server_info")
		if err != nil {
			return false
		}
		resp.Body.Close()
		return true
	})
	return p
}

// waitFor polls a condition of a running Envoy, and prints Envoy's log on failure.
func waitFor(t *testing.T, p *envoyProcess, what string, ok func() bool) {
	t.Helper()
	deadline := time.After(30 * time.Second)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-p.done:
			t.Fatalf("Envoy exited while waiting for %s:\n%s", what, p.log)
		case <-deadline:
			t.Fatalf("no %s after 30s:\n%s", what, p.log)
		}
	}
}

func (p *envoyProcess) get(t *testing.T, path string) []byte {
	t.Helper()
	resp, err := p.admin.Get("http://envoy" + path)
	if err != nil {
		t.Fatalf("Envoy admin: %v\n%s", err, p.log)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// stats returns the counters and gauges whose names match a regular expression.
func (p *envoyProcess) stats(t *testing.T, filter string) map[string]float64 {
	t.Helper()
	var doc struct {
		Stats []struct {
			Name  string
			Value any
		}
	}
	if err := json.Unmarshal(p.get(t, "/stats?format=json&filter="+url.QueryEscape(filter)), &doc); err != nil {
		t.Fatal(err)
	}
	out := map[string]float64{}
	for _, s := range doc.Stats {
		if v, ok := s.Value.(float64); ok {
			out[s.Name] = v
		}
	}
	return out
}
