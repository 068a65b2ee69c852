package dialect_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"time"

	bootstrap "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"
	cluster "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpoint "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	route "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	hcm "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	upstreamhttp "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"istio.io/istio/pilot/pkg/model"
	v3 "istio.io/istio/pilot/pkg/xds/v3"

	"polymesh.dev/polymesh/pkg/mesh/exposition"
	"polymesh.dev/polymesh/pkg/mesh/workload"
	"polymesh.dev/polymesh/pkg/porttest"
)

// TestTraffic sends real requests through two Envoys, from a to b's ports, with listeners, routes, clusters and endpoints from
// istiod and the dialect. Only addresses are replaced: there is no iptables redirection here.
func TestTraffic(t *testing.T) {
	envoyPath(t)
	for _, mode := range []struct {
		name    string
		configs []string
	}{{"permissive", nil}, {"strict", []string{"strict.yaml"}}} {
		for _, port := range []struct {
			name, host      string
			service, target uint32
			protocols       []protocol
		}{
			{"http", "b", 80, 8080, []protocol{http1}},
			{"grpc", "b", 81, 8081, []protocol{grpcCall}},
			{"tcp", "b", 82, 8082, []protocol{rawTCP}},
			{"https", "b", 84, 8084, []protocol{rawTLS}},
			{"auto", "b", 83, 8083, []protocol{http1, http2, grpcCall, rawTLS, rawTCP}},
			{"unnamed", "unnamed", 90, 8090, []protocol{http1, http2, grpcCall, rawTLS, rawTCP}},
		} {
			t.Run(mode.name+"/"+port.name, func(t *testing.T) {
				p := newPath(t, serveApp(t), mode.configs, port.host, port.service, port.target)
				for _, protocol := range port.protocols {
					t.Run(string(protocol), func(t *testing.T) {
						p.send(t, protocol)
						// A client without a sidecar.
						if err := p.call(p.inbound, protocol, nil); (err != nil) != (mode.name == "strict") {
							t.Errorf("without mutual TLS: %v", err)
						}
					})
				}
			})
		}
	}
}

// TestSeveralIdentities: the server's proxy refuses a caller from the mesh whose certificate has more than one identity, even if one
// of them is its own, whether client certificates are required or optional.
func TestSeveralIdentities(t *testing.T) {
	envoyPath(t)
	const own, other = "spiffe://cluster.local/ns/demo/sa/a", "spiffe://cluster.local/ns/bank/sa/payments"
	for _, mode := range []struct {
		name    string
		configs []string
	}{{"permissive", nil}, {"strict", []string{"strict.yaml"}}} {
		for _, port := range []struct {
			name            string
			service, target uint32
		}{{"http", 80, 8080}, {"tcp", 82, 8082}, {"auto", 83, 8083}} {
			t.Run(mode.name+"/"+port.name, func(t *testing.T) {
				p := newPath(t, serveApp(t), mode.configs, "b", port.service, port.target)
				for _, ids := range [][]string{{own}, {own, other}, {other, own}, {own, own}} {
					protocol, offer := "istio", rawTCP
					if port.name == "http" {
						protocol, offer = "istio-http/1.1", http1
					}
					c, err := tls.Dial("tcp", p.inbound, &tls.Config{
						InsecureSkipVerify: true, //nolint:gosec // the server's identity does not matter here
						NextProtos:         []string{protocol}, Certificates: []tls.Certificate{p.ca.issue(t, ids...)},
					})
					if err == nil {
						err = answeredOver(c, offer)
					}
					if (err == nil) != (len(ids) == 1) {
						t.Errorf("a caller with identities %q: %v\nserver: %s", ids, err, p.server.log)
					}
				}
			})
		}
	}
}

// answeredOver sends a request on a connection, and checks the app's response.
func answeredOver(c net.Conn, protocol protocol) error {
	if protocol == rawTCP {
		return echoed(c)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(30 * time.Second))
	if _, err := io.WriteString(c, "GET / HTTP/1.1\r\nHost: b.demo.svc.cluster.local\r\n\r\n"); err != nil {
		return err
	}
	response, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return errors.New(response.Status)
	}
	return nil
}

// TestServerFirst: protocols where the server speaks first, such as MySQL and SMTP. On a port with an explicit protocol,
// the greeting arrives at once. A proxy that sniffs, for HTTP at the client or for TLS at a permissive server, waits for
// the client's first bytes until protocolDetectionTimeout, by default without limit. This is Istio's behavior, whose
// documentation recommends declaring the protocol
// (https://istio.io/latest/docs/ops/deployment/application-requirements/#server-first-protocols).
func TestServerFirst(t *testing.T) {
	envoyPath(t)
	for _, mode := range []struct {
		name    string
		configs []string
	}{{"permissive", nil}, {"strict", []string{"strict.yaml"}}} {
		for _, port := range []struct {
			name, host      string
			service, target uint32
			sniffed         bool
		}{{"tcp", "b", 82, 8082, false}, {"auto", "b", 83, 8083, true}, {"unnamed", "unnamed", 90, 8090, true}} {
			t.Run(mode.name+"/"+port.name, func(t *testing.T) {
				p := newPath(t, serveGreeting(t), mode.configs, port.host, port.service, port.target)
				if err := greeted(t, p.client, p.address, port.sniffed); err != nil {
					t.Errorf("through both proxies: %v", err)
				}
				// A client without a sidecar.
				if err := greeted(t, p.server, p.inbound, true); (err != nil) != (mode.name == "strict") {
					t.Errorf("without mutual TLS: %v", err)
				}
			})
		}
	}
}

// TestOpenConnection: the bytes of a connection are counted while it is open, and only once.
func TestOpenConnection(t *testing.T) {
	envoyPath(t)
	const service, target = 82, 8082
	p := newPath(t, serveGreeting(t), []string{"reporting.yaml"}, "b", service, target)
	c, err := net.Dial("tcp", p.address)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(30 * time.Second))
	got := make([]byte, len(greeting))
	if _, err := io.ReadFull(c, got); err != nil {
		t.Fatal(err)
	}
	sent, received := fmt.Sprintf("} %d\n", len(greeting)), fmt.Sprintf("} %d\n", len(echoWord))
	p.wantMetric(t, p.client, "istio_tcp_sent_bytes_total", `destination_workload="b"`, sent)
	p.wantMetric(t, p.server, "istio_tcp_connections_opened_total", `source_workload="a"`, "} 1\n")
	for _, e := range []*envoyProcess{p.client, p.server} {
		if text := e.metrics(t); strings.Contains(text, "istio_tcp_connections_closed_total{") {
			t.Errorf("an open connection is counted as closed:\n%s", text)
		}
	}
	if err := echoed(c); err != nil {
		t.Fatal(err)
	}
	p.wantMetric(t, p.client, "istio_tcp_connections_closed_total", `destination_workload="b"`, "} 1\n")
	p.wantMetric(t, p.client, "istio_tcp_sent_bytes_total", `destination_workload="b"`, fmt.Sprintf("} %d\n", len(greeting)+len(echoWord)))
	p.wantMetric(t, p.client, "istio_tcp_received_bytes_total", `destination_workload="b"`, received)
	p.wantMetric(t, p.client, "istio_tcp_connections_opened_total", `destination_workload="b"`, "} 1\n")
}

// greeting is the server's first message.
const greeting = "220 ready\n"

// serveGreeting greets each client, and echoes echoWord.
func serveGreeting(t *testing.T) *app {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				word := make([]byte, len(echoWord))
				if _, err := io.WriteString(c, greeting); err != nil {
					return
				}
				if _, err := io.ReadFull(c, word); err == nil {
					_, _ = c.Write(word)
				}
			}()
		}
	}()
	return &app{port: uint32(l.Addr().(*net.TCPAddr).Port)}
}

// greeted connects through a proxy, and checks the greeting and the echo. If the proxy waits, the client speaks first, as
// soon as the proxy reports a connection without a filter chain.
func greeted(t *testing.T, e *envoyProcess, address string, waits bool) error {
	t.Helper()
	c, err := net.Dial("tcp", address)
	if err != nil {
		return err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(30 * time.Second))
	want := []string{greeting, echoWord}
	if waits {
		waitFor(t, e, "connection with undetected protocol", func() bool { return sum(e.stats(t, `downstream_pre_cx_active$`)) == 1 })
	}
	for i, text := range want {
		if i == 0 == waits {
			if _, err := io.WriteString(c, echoWord); err != nil {
				return err
			}
		}
		got := make([]byte, len(text))
		if _, err := io.ReadFull(c, got); err != nil {
			return err
		}
		if string(got) != text {
			return fmt.Errorf("got %q, want %q", got, text)
		}
	}
	return nil
}

// protocol is the protocol of the app.
type protocol string

const (
	http1    protocol = "HTTP/1.1"
	http2    protocol = "HTTP/2"
	grpcCall protocol = "gRPC"
	rawTLS   protocol = "TLS"
	rawTCP   protocol = "TCP"
)

// send calls the app through both proxies, and verifies that both detect the protocol and identify each other.
func (p *path) send(t *testing.T, protocol protocol) {
	t.Helper()
	var answer string
	if err := p.call(p.address, protocol, &answer); err != nil {
		t.Fatalf("%v\nclient: %s\nserver: %s", err, p.client.log, p.server.log)
	}
	principals := []string{
		`source_principal="spiffe://cluster.local/ns/demo/sa/a"`, `destination_principal="spiffe://cluster.local/ns/demo/sa/b"`,
	}
	client := []string{`reporter="source"`, `source_workload="a"`, `destination_workload="b"`, `destination_app="b"`, `destination_version="v1"`,
		`destination_workload_namespace="demo"`, `destination_canonical_service="b"`, `destination_service_name="` + p.host + `"`}
	server := []string{`reporter="destination"`, `connection_security_policy="mutual_tls"`, `destination_workload="b"`,
		`source_workload="a"`, `source_workload_namespace="demo"`, `source_app="a"`, `source_version="v1"`, `source_canonical_service="a"`,
		`source_cluster="Kubernetes"`, `destination_service="` + p.host + `.demo.svc.cluster.local"`}
	client, server = append(client, principals...), append(server, principals...)
	switch protocol {
	case rawTLS, rawTCP:
		for _, name := range []string{"opened_total", "closed_total"} {
			p.wantMetric(t, p.server, "istio_tcp_connections_"+name, append(server, `request_protocol="tcp"`)...)
			p.wantMetric(t, p.client, "istio_tcp_connections_"+name, append(client, `request_protocol="tcp"`)...)
		}
		p.wantMetric(t, p.client, "istio_tcp_received_bytes_total", client...)
		return
	}
	want := "HTTP/2.0 "
	if protocol == http1 {
		want = "HTTP/1.1 "
	}
	if !strings.HasPrefix(answer, want) {
		t.Errorf("the app received %q, want %s", answer, want)
	}
	// The server's proxy parsed the request as HTTP, and identifies the client.
	if !strings.Contains(answer, "URI=spiffe://cluster.local/ns/demo/sa/a") {
		t.Errorf("the app does not see the client's identity: %q", answer)
	}
	as := `request_protocol="http"`
	if protocol == grpcCall {
		as = `request_protocol="grpc"`
		p.wantMetric(t, p.client, "istio_request_messages_total", append(client, as, "} 2")...)
		p.wantMetric(t, p.server, "istio_request_messages_total", append(server, as, "} 2")...)
	}
	p.wantMetric(t, p.server, "istio_requests_total", append(server, as, `response_code="200"`)...)
	p.wantMetric(t, p.client, "istio_requests_total", append(client, as, `response_code="200"`)...)
}

// path is a client's Envoy, a server's Envoy and an app behind it.
type path struct {
	host           string
	app            *app
	address        string // the client's listener
	inbound        string // the server's
	client, server *envoyProcess
	ca             *authority
}

func newPath(t *testing.T, behind *app, configs []string, host string, service, target uint32) *path {
	t.Helper()
	var client, server *model.Proxy
	for _, s := range scenes() {
		switch s.name {
		case "sidecar-client":
			client = s.proxy
		case "sidecar-strict":
			server = s.proxy
		}
	}
	f, _ := newIstiod(t, scene{configs: configs, proxy: client})
	wrap(t, f)
	ca := newAuthority(t)
	inboundPort, outboundPort := uint32(porttest.Loopback(t).Port()), uint32(porttest.Loopback(t).Port())

	in := generate(t, f, server)
	inbound := &listener.Listener{}
	find(t, in[v3.ListenerType], "virtualInbound", inbound)
	var chains []*listener.FilterChain
	for _, c := range inbound.FilterChains {
		if c.FilterChainMatch.GetDestinationPort().GetValue() == target {
			c.FilterChainMatch.DestinationPort.Value = inboundPort
			chains = append(chains, c)
		}
	}
	inbound.FilterChains, inbound.DefaultFilterChain = chains, nil
	listenOn(inbound, inboundPort)
	toApp := &cluster.Cluster{}
	find(t, in[v3.ClusterType], fmt.Sprintf("inbound|%d||", target), toApp)
	// Istio's cluster sends to the original destination, which is the listener itself here.
	toApp.ClusterDiscoveryType = &cluster.Cluster_Type{Type: cluster.Cluster_STATIC}
	toApp.LbPolicy, toApp.UpstreamBindConfig, toApp.LbConfig = cluster.Cluster_ROUND_ROBIN, nil, nil
	toApp.LoadAssignment = &endpoint.ClusterLoadAssignment{ClusterName: toApp.Name, Endpoints: []*endpoint.LocalityLbEndpoints{{
		LbEndpoints: []*endpoint.LbEndpoint{{HostIdentifier: &endpoint.LbEndpoint_Endpoint{Endpoint: &endpoint.Endpoint{
			Address: loopback(behind.port),
		}}}},
	}}}

	out := generate(t, f, client)
	name := fmt.Sprintf("outbound|%d||%s.demo.svc.cluster.local", service, host)
	toServer, endpoints := &cluster.Cluster{}, &endpoint.ClusterLoadAssignment{}
	find(t, out[v3.ClusterType], name, toServer)
	find(t, out[v3.EndpointType], name, endpoints)
	endpoints.Endpoints[0].LbEndpoints[0].GetEndpoint().Address = loopback(inboundPort)
	toServer.ClusterDiscoveryType = &cluster.Cluster_Type{Type: cluster.Cluster_STATIC}
	toServer.EdsClusterConfig, toServer.LoadAssignment = nil, endpoints
	outbound := &listener.Listener{}
	for _, candidate := range []string{fmt.Sprintf("10.0.0.2_%d", service), fmt.Sprintf("10.0.0.3_%d", service), fmt.Sprintf("0.0.0.0_%d", service)} {
		if r := byName(out[v3.ListenerType])[candidate]; r != nil {
			if err := r.Resource.UnmarshalTo(outbound); err != nil {
				t.Fatal(err)
			}
		}
	}
	inlineRoutes(t, outbound, out[v3.RouteType])
	listenOn(outbound, outboundPort)

	return &path{
		host: host, app: behind, ca: ca,
		address: fmt.Sprintf("127.0.0.1:%d", outboundPort),
		inbound: fmt.Sprintf("127.0.0.1:%d", inboundPort),
		server:  staticEnvoy(t, server, ca, []*listener.Listener{inbound}, []*cluster.Cluster{toApp}),
		client:  staticEnvoy(t, client, ca, []*listener.Listener{outbound}, []*cluster.Cluster{toServer}),
	}
}

func find(t *testing.T, rs model.Resources, name string, m proto.Message) {
	t.Helper()
	r := byName(rs)[name]
	if r == nil {
		t.Fatalf("istiod generated no %s", name)
	}
	if err := r.Resource.UnmarshalTo(m); err != nil {
		t.Fatal(err)
	}
}

func loopback(port uint32) *core.Address {
	return &core.Address{Address: &core.Address_SocketAddress{SocketAddress: &core.SocketAddress{
		Address: "127.0.0.1", PortSpecifier: &core.SocketAddress_PortValue{PortValue: port},
	}}}
}

// listenOn binds a listener to a real port, instead of redirected connections.
func listenOn(l *listener.Listener, port uint32) {
	l.Address, l.AdditionalAddresses, l.BindToPort, l.UseOriginalDst = loopback(port), nil, nil, nil
	var filters []*listener.ListenerFilter
	for _, f := range l.ListenerFilters {
		if f.Name != "envoy.filters.listener.original_dst" {
			f.FilterDisabled = nil // matches by port
			filters = append(filters, f)
		}
	}
	l.ListenerFilters = filters
}

// inlineRoutes replaces RDS references in a listener by the route configurations.
func inlineRoutes(t *testing.T, l *listener.Listener, routes model.Resources) {
	t.Helper()
	chains := l.FilterChains
	if l.DefaultFilterChain != nil {
		chains = append(chains, l.DefaultFilterChain)
	}
	for _, chain := range chains {
		for _, f := range chain.Filters {
			m := &hcm.HttpConnectionManager{}
			if !f.GetTypedConfig().MessageIs(m) {
				continue
			}
			if err := f.GetTypedConfig().UnmarshalTo(m); err != nil {
				t.Fatal(err)
			}
			config := &route.RouteConfiguration{}
			find(t, routes, m.GetRds().GetRouteConfigName(), config)
			m.RouteSpecifier = &hcm.HttpConnectionManager_RouteConfig{RouteConfig: config}
			f.ConfigType = &listener.Filter_TypedConfig{TypedConfig: toAny(t, m)}
		}
	}
}

// app is a server for every protocol on one port.
type app struct {
	port uint32
	// roots hold the app's TLS certificate.
	roots *x509.CertPool
}

// serveApp answers HTTP requests with a description of them, and echoes echoWord, also over TLS.
func serveApp(t *testing.T) *app {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	protocols := &http.Protocols{}
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	srv := &http.Server{Protocols: protocols, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body) // an earlier response would cut off gRPC messages
		fmt.Fprintf(w, "%s %s", r.Proto, r.Header.Get("X-Forwarded-Client-Cert"))
	})}
	t.Cleanup(func() { _ = srv.Close() })
	secure := httptest.NewTLSServer(nil) // for its certificate
	secure.Close()
	roots := x509.NewCertPool()
	roots.AddCert(secure.Certificate())
	handover := &connListener{conns: make(chan net.Conn), addr: l.Addr(), done: make(chan struct{})}
	go func() { _ = srv.Serve(handover) }()
	echo := func(c net.Conn) {
		defer c.Close()
		word := make([]byte, len(echoWord))
		if _, err := io.ReadFull(c, word); err == nil {
			_, _ = c.Write(word)
		}
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				first := make([]byte, 1)
				if _, err := io.ReadFull(c, first); err != nil {
					_ = c.Close()
					return
				}
				again := &prefixedConn{c, first}
				switch first[0] {
				case echoWord[0]:
					echo(again)
				case 0x16: // a TLS handshake
					echo(tls.Server(again, secure.TLS))
				default:
					select {
					case handover.conns <- again:
					case <-handover.done:
						_ = c.Close()
					}
				}
			}()
		}
	}()
	return &app{uint32(l.Addr().(*net.TCPAddr).Port), roots}
}

const echoWord = "\x00ping\n"

type connListener struct {
	conns chan net.Conn
	addr  net.Addr
	done  chan struct{}
}

func (l *connListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

func (l *connListener) Close() error {
	select {
	case <-l.done:
	default:
		close(l.done)
	}
	return nil
}
func (l *connListener) Addr() net.Addr { return l.addr }

type prefixedConn struct {
	net.Conn
	prefix []byte
}

func (c *prefixedConn) Read(b []byte) (int, error) {
	if len(c.prefix) > 0 {
		n := copy(b, c.prefix)
		c.prefix = c.prefix[n:]
		return n, nil
	}
	return c.Conn.Read(b)
}

// staticEnvoy runs Envoy with static listeners and clusters, the workload's certificate from SDS, and the agent's metrics code
// next to it.
func staticEnvoy(t *testing.T, p *model.Proxy, ca *authority, ls []*listener.Listener, cs []*cluster.Cluster) *envoyProcess {
	t.Helper()
	who := p.Metadata.WorkloadName
	options := &upstreamhttp.HttpProtocolOptions{UpstreamProtocolOptions: &upstreamhttp.HttpProtocolOptions_ExplicitHttpConfig_{
		ExplicitHttpConfig: &upstreamhttp.HttpProtocolOptions_ExplicitHttpConfig{
			ProtocolConfig: &upstreamhttp.HttpProtocolOptions_ExplicitHttpConfig_Http2ProtocolOptions{Http2ProtocolOptions: &core.Http2ProtocolOptions{}},
		},
	}}
	pipe := func(path string) *core.Address {
		return &core.Address{Address: &core.Address_Pipe{Pipe: &core.Pipe{Path: path}}}
	}
	to := func(name, path string) *endpoint.ClusterLoadAssignment {
		return &endpoint.ClusterLoadAssignment{ClusterName: name, Endpoints: []*endpoint.LocalityLbEndpoints{{
			LbEndpoints: []*endpoint.LbEndpoint{{HostIdentifier: &endpoint.LbEndpoint_Endpoint{Endpoint: &endpoint.Endpoint{Address: pipe(path)}}}},
		}}}
	}
	cs = append(cs, &cluster.Cluster{
		Name: "sds-grpc", ClusterDiscoveryType: &cluster.Cluster_Type{Type: cluster.Cluster_STATIC},
		TypedExtensionProtocolOptions: map[string]*anypb.Any{"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": toAny(t, options)},
		LoadAssignment:                to("sds-grpc", ca.serveSDS(t, p.ConfigNamespace, who)),
	})
	dir := socketDir(t)
	admin := filepath.Join(dir, "admin")
	agent, err := net.Listen("unix", filepath.Join(dir, "agent"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = agent.Close() })
	cs = append(cs, &cluster.Cluster{
		Name: "prometheus_stats", ClusterDiscoveryType: &cluster.Cluster_Type{Type: cluster.Cluster_STATIC}, LoadAssignment: to("prometheus_stats", agent.Addr().String()),
	})
	js, err := protojson.Marshal(&bootstrap.Bootstrap{
		Node:            nodeOf(p),
		Admin:           &bootstrap.Admin{Address: pipe(admin)},
		StaticResources: &bootstrap.Bootstrap_StaticResources{Listeners: ls, Clusters: cs},
	})
	if err != nil {
		t.Fatal(err)
	}
	e := runEnvoy(t, string(js), admin, nil)
	e.agent = exposition.Handler(e.admin, "envoy", workload.Workload{
		Name: who, Namespace: "demo", CanonicalService: who, CanonicalRevision: "v1", Cluster: "Kubernetes", App: who, Version: "v1",
	})
	server := &http.Server{Handler: e.agent}
	go func() { _ = server.Serve(agent) }()
	waitFor(t, e, "listener", func() bool {
		return e.stats(t, "^listener_manager.workers_started$")["listener_manager.workers_started"] == 1 &&
			e.stats(t, "^listener_manager.total_listeners_active$")["listener_manager.total_listeners_active"] == float64(len(ls))
	})
	return e
}

// call sends one request to the app, and stores the response if it is HTTP.
func (p *path) call(address string, protocol protocol, answer *string) error {
	dialer := &net.Dialer{Timeout: 30 * time.Second}
	switch protocol {
	case rawTCP:
		c, err := dialer.Dial("tcp", address)
		if err != nil {
			return err
		}
		return echoed(c)
	case rawTLS:
		c, err := tls.DialWithDialer(dialer, "tcp", address, &tls.Config{ServerName: "example.com", RootCAs: p.app.roots})
		if err != nil {
			return err
		}
		return echoed(c)
	}
	got, err := get(address, protocol)
	if answer != nil {
		*answer = got
	}
	return err
}

func get(address string, protocol protocol) (string, error) {
	protocols := &http.Protocols{}
	protocols.SetHTTP1(protocol == http1)
	protocols.SetUnencryptedHTTP2(protocol != http1)
	tr := &http.Transport{Protocols: protocols, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "tcp", address)
	}}
	defer tr.CloseIdleConnections()
	var body io.Reader
	if protocol == grpcCall {
		body = bytes.NewReader(make([]byte, 2*5)) // two empty gRPC messages
	}
	req, err := http.NewRequest(http.MethodGet, "http://b.demo.svc.cluster.local/", body)
	if err != nil {
		return "", err
	}
	if protocol == grpcCall {
		req.Header.Set("Content-Type", "application/grpc")
	}
	resp, err := (&http.Client{Transport: tr, Timeout: 30 * time.Second}).Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	if err != nil {
		return "", err
	}
	if resp.StatusCode != http.StatusOK {
		return "", fmt.Errorf("%s: %s", resp.Status, answer)
	}
	return string(answer), nil
}

// echoed sends echoWord and checks the echo.
func echoed(c net.Conn) error {
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(30 * time.Second))
	if _, err := io.WriteString(c, echoWord); err != nil {
		return err
	}
	got := make([]byte, len(echoWord))
	if _, err := io.ReadFull(c, got); err != nil {
		return err
	}
	if string(got) != echoWord {
		return fmt.Errorf("the echo is %q", got)
	}
	return nil
}

// metrics returns Istio's metrics, as written by the agent next to Envoy.
func (e *envoyProcess) metrics(t *testing.T) string {
	t.Helper()
	w := httptest.NewRecorder()
	e.agent.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/stats/prometheus?filter=istio_", nil))
	if w.Code != http.StatusOK {
		t.Fatalf("the agent returned %d: %s", w.Code, w.Body)
	}
	return w.Body.String()
}

// wantMetric waits for a sample with all the labels and a value of at least one.
func (p *path) wantMetric(t *testing.T, e *envoyProcess, name string, labels ...string) {
	t.Helper()
	var seen string
	defer func() {
		if t.Failed() {
			t.Logf("%s:\n%s", name, seen)
		}
	}()
	waitFor(t, e, name+" "+strings.Join(labels, ","), func() bool {
		seen = e.metrics(t)
	lines:
		for line := range strings.Lines(seen) {
			if !strings.HasPrefix(line, name+"{") || strings.HasSuffix(strings.TrimSpace(line), " 0") {
				continue
			}
			for _, l := range labels {
				if !strings.Contains(line, l) {
					continue lines
				}
			}
			return true
		}
		return false
	})
}
