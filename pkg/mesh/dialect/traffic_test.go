package dialect_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
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

	"polymesh.dev/polymesh/pkg/mesh/dialect"
	"polymesh.dev/polymesh/pkg/mesh/exposition"
)

// TestTraffic sends real requests through two Envoys, from a to b's ports, with what istiod and the dialect make of the
// listeners, routes, clusters and endpoints. Only addresses are replaced: there is no iptables redirection here.
func TestTraffic(t *testing.T) {
	envoyPath(t)
	for _, mode := range []struct {
		name    string
		configs []string
	}{{"permissive", nil}, {"strict", []string{"strict.yaml"}}} {
		for _, port := range []struct {
			name              string
			service, target   uint32
			http1, http2, tcp bool
		}{
			{"http", 80, 8080, true, false, false},
			{"grpc", 81, 8081, false, true, false},
			{"tcp", 82, 8082, false, false, true},
			{"sniffed", 83, 8083, true, true, true},
		} {
			t.Run(mode.name+"/"+port.name, func(t *testing.T) {
				p := newPath(t, mode.configs, port.service, port.target)
				http1, http2 := &http.Protocols{}, &http.Protocols{}
				http1.SetHTTP1(true)
				http2.SetUnencryptedHTTP2(true)
				for _, c := range []struct {
					on    bool
					proto *http.Protocols
					want  string
				}{{port.http1, http1, "HTTP/1.1"}, {port.http2, http2, "HTTP/2.0"}} {
					if !c.on {
						continue
					}
					got := p.request(t, c.proto)
					if !strings.HasPrefix(got, c.want+" ") {
						t.Errorf("the app was called with %q, want %s", got, c.want)
					}
					// The server's proxy read the request as HTTP, and knows the client.
					if !strings.Contains(got, "URI=spiffe://cluster.local/ns/demo/sa/a") {
						t.Errorf("no identity of the client at the app: %q", got)
					}
				}
				if port.http1 {
					// A client without a sidecar.
					_, err := get(p.inbound, http1)
					if refused := err != nil; refused != (mode.name == "strict") {
						t.Errorf("plain text: %v", err)
					}
				}
				if port.http2 {
					p.wantMetric(t, p.server, "istio_requests_total", `request_protocol="grpc"`)
					p.wantMetric(t, p.client, "istio_request_messages_total", `request_protocol="grpc"`, `destination_workload="b"`, "} 2")
					p.wantMetric(t, p.server, "istio_request_messages_total", `source_workload="a"`, "} 2")
				}
				if port.http1 || port.http2 {
					p.wantMetric(t, p.server, "istio_requests_total", `reporter="destination"`, `response_code="200"`,
						`source_principal="spiffe://cluster.local/ns/demo/sa/a"`, `destination_principal="spiffe://cluster.local/ns/demo/sa/b"`,
						`destination_service="b.demo.svc.cluster.local"`, `destination_workload="b"`, `connection_security_policy="mutual_tls"`,
						`source_workload="a"`, `source_workload_namespace="demo"`, `source_app="a"`, `source_version="v1"`, `source_canonical_service="a"`,
						`source_cluster="Kubernetes"`)
					p.wantMetric(t, p.client, "istio_requests_total", `reporter="source"`, `source_workload="a"`,
						`destination_workload="b"`, `destination_workload_namespace="demo"`, `destination_service_name="b"`,
						`destination_principal="spiffe://cluster.local/ns/demo/sa/b"`, `destination_canonical_service="b"`,
						`destination_app="b"`, `destination_version="v1"`)
				}
				if port.tcp {
					p.echo(t)
					p.wantMetric(t, p.server, "istio_tcp_connections_closed_total", `reporter="destination"`,
						`source_principal="spiffe://cluster.local/ns/demo/sa/a"`, `request_protocol="tcp"`, `source_workload="a"`, `source_app="a"`)
					for _, e := range []*envoyProcess{p.client, p.server} {
						p.wantMetric(t, e, "istio_tcp_connections_opened_total", `destination_workload="b"`, `source_workload="a"`)
					}
					p.wantMetric(t, p.client, "istio_tcp_received_bytes_total", `destination_service_name="b"`)
				}
			})
		}
	}
}

// path is a client's Envoy, a server's Envoy and an app behind it.
type path struct {
	address        string // the client's listener
	inbound        string // the server's
	client, server *envoyProcess
}

func newPath(t *testing.T, configs []string, service, target uint32) *path {
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
	dialect.Wrap(f.Discovery.Generators, dialect.NewTranslator(dialect.ShippedEnvoy(), dialect.EndpointsOf(f.Discovery.Env.EndpointIndex)))
	ca := newAuthority(t)
	inboundPort, outboundPort := freePort(t), freePort(t)

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
	// Istio's sends to the original destination, which is the listener itself here.
	toApp.ClusterDiscoveryType = &cluster.Cluster_Type{Type: cluster.Cluster_STATIC}
	toApp.LbPolicy, toApp.UpstreamBindConfig, toApp.LbConfig = cluster.Cluster_ROUND_ROBIN, nil, nil
	toApp.LoadAssignment = &endpoint.ClusterLoadAssignment{ClusterName: toApp.Name, Endpoints: []*endpoint.LocalityLbEndpoints{{
		LbEndpoints: []*endpoint.LbEndpoint{{HostIdentifier: &endpoint.LbEndpoint_Endpoint{Endpoint: &endpoint.Endpoint{
			Address: loopback(serveApp(t)),
		}}}},
	}}}

	out := generate(t, f, client)
	name := fmt.Sprintf("outbound|%d||b.demo.svc.cluster.local", service)
	toServer, endpoints := &cluster.Cluster{}, &endpoint.ClusterLoadAssignment{}
	find(t, out[v3.ClusterType], name, toServer)
	find(t, out[v3.EndpointType], name, endpoints)
	endpoints.Endpoints[0].LbEndpoints[0].GetEndpoint().Address = loopback(inboundPort)
	toServer.ClusterDiscoveryType = &cluster.Cluster_Type{Type: cluster.Cluster_STATIC}
	toServer.EdsClusterConfig, toServer.LoadAssignment = nil, endpoints
	outbound := &listener.Listener{}
	for _, candidate := range []string{fmt.Sprintf("10.0.0.2_%d", service), fmt.Sprintf("0.0.0.0_%d", service)} {
		if r := byName(out[v3.ListenerType])[candidate]; r != nil {
			if err := r.Resource.UnmarshalTo(outbound); err != nil {
				t.Fatal(err)
			}
		}
	}
	inlineRoutes(t, outbound, out[v3.RouteType])
	listenOn(outbound, outboundPort)

	return &path{
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

// listenOn gives a listener a real port in the place of redirected connections.
func listenOn(l *listener.Listener, port uint32) {
	l.Address, l.AdditionalAddresses, l.BindToPort, l.UseOriginalDst = loopback(port), nil, nil, nil
	var filters []*listener.ListenerFilter
	for _, f := range l.ListenerFilters {
		if f.Name != "envoy.filters.listener.original_dst" {
			f.FilterDisabled = nil // is by port
			filters = append(filters, f)
		}
	}
	l.ListenerFilters = filters
}

// inlineRoutes puts route configurations where the listener asks for them by name.
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

func freePort(t *testing.T) uint32 {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return uint32(l.Addr().(*net.TCPAddr).Port)
}

// serveApp answers HTTP with what it knows of the request, and echoes a connection that begins with echoWord.
func serveApp(t *testing.T) uint32 {
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
		fmt.Fprintf(w, "%s %s", r.Proto, r.Header.Get("X-Forwarded-Client-Cert"))
	})}
	t.Cleanup(func() { _ = srv.Close() })
	port := uint32(l.Addr().(*net.TCPAddr).Port)
	handover := &connListener{conns: make(chan net.Conn), addr: l.Addr(), done: make(chan struct{})}
	go func() { _ = srv.Serve(handover) }()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				first := make([]byte, len(echoWord))
				if _, err := io.ReadFull(c, first); err != nil {
					_ = c.Close()
					return
				}
				if string(first) == echoWord {
					_, _ = c.Write(first)
					_ = c.Close()
					return
				}
				select {
				case handover.conns <- &prefixedConn{c, first}:
				case <-handover.done:
					_ = c.Close()
				}
			}()
		}
	}()
	return port
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

// staticEnvoy runs Envoy with listeners and clusters in its bootstrap, and the workload's certificate by SDS.
func staticEnvoy(t *testing.T, p *model.Proxy, ca *authority, ls []*listener.Listener, cs []*cluster.Cluster) *envoyProcess {
	t.Helper()
	options := &upstreamhttp.HttpProtocolOptions{UpstreamProtocolOptions: &upstreamhttp.HttpProtocolOptions_ExplicitHttpConfig_{
		ExplicitHttpConfig: &upstreamhttp.HttpProtocolOptions_ExplicitHttpConfig{
			ProtocolConfig: &upstreamhttp.HttpProtocolOptions_ExplicitHttpConfig_Http2ProtocolOptions{Http2ProtocolOptions: &core.Http2ProtocolOptions{}},
		},
	}}
	pipe := func(path string) *core.Address {
		return &core.Address{Address: &core.Address_Pipe{Pipe: &core.Pipe{Path: path}}}
	}
	cs = append(cs, &cluster.Cluster{
		Name: "sds-grpc", ClusterDiscoveryType: &cluster.Cluster_Type{Type: cluster.Cluster_STATIC},
		TypedExtensionProtocolOptions: map[string]*anypb.Any{"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": toAny(t, options)},
		LoadAssignment: &endpoint.ClusterLoadAssignment{ClusterName: "sds-grpc", Endpoints: []*endpoint.LocalityLbEndpoints{{
			LbEndpoints: []*endpoint.LbEndpoint{{HostIdentifier: &endpoint.LbEndpoint_Endpoint{Endpoint: &endpoint.Endpoint{
				Address: pipe(ca.serveSDS(t, p.ConfigNamespace, p.Metadata.WorkloadName)),
			}}}},
		}}},
	})
	admin := filepath.Join(socketDir(t), "admin")
	js, err := protojson.Marshal(&bootstrap.Bootstrap{
		Node:            nodeOf(p),
		Admin:           &bootstrap.Admin{Address: pipe(admin)},
		StaticResources: &bootstrap.Bootstrap_StaticResources{Listeners: ls, Clusters: cs},
	})
	if err != nil {
		t.Fatal(err)
	}
	e := runEnvoy(t, string(js), admin, nil)
	waitFor(t, e, "listener", func() bool {
		return e.stats(t, "^listener_manager.workers_started$")["listener_manager.workers_started"] == 1 &&
			e.stats(t, "^listener_manager.total_listeners_active$")["listener_manager.total_listeners_active"] == float64(len(ls))
	})
	return e
}

func (p *path) request(t *testing.T, protocols *http.Protocols) string {
	t.Helper()
	body, err := get(p.address, protocols)
	if err != nil {
		t.Fatalf("%v\nclient: %s\nserver: %s", err, p.client.log, p.server.log)
	}
	return body
}

func get(address string, protocols *http.Protocols) (string, error) {
	tr := &http.Transport{Protocols: protocols, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "tcp", address)
	}}
	defer tr.CloseIdleConnections()
	var body io.Reader
	if protocols.UnencryptedHTTP2() {
		body = bytes.NewReader(make([]byte, 2*5)) // two messages of gRPC, with nothing in them
	}
	req, err := http.NewRequest(http.MethodGet, "http://b.demo.svc.cluster.local/", body)
	if err != nil {
		return "", err
	}
	if protocols.UnencryptedHTTP2() {
		req.Header.Set("Content-Type", "application/grpc")
	}
	resp, err := (&http.Client{Transport: tr, Timeout: 10 * time.Second}).Do(req)
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

func (p *path) echo(t *testing.T) {
	t.Helper()
	c, err := net.Dial("tcp", p.address)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := io.WriteString(c, echoWord); err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(c)
	if err != nil || string(got) != echoWord {
		t.Fatalf("echo: %q %v", got, err)
	}
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
		var text strings.Builder
		if err := exposition.Rewrite(&text, bytes.NewReader(e.get(t, "/stats/prometheus?filter=istio_"))); err != nil {
			t.Fatal(err)
		}
		seen = text.String()
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
