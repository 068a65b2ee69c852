package dialect_test

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http/httptest"
	"os"
	"os/exec"
	"testing"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"istio.io/istio/pilot/pkg/xds"
	"istio.io/istio/pkg/security"
)

// The proxies of a benchmark run in a separate process, so that their CPU time is not attributed to istiod.

// proxiesEnv makes this program run as the proxies.
const proxiesEnv = "POLYMESH_TEST_PROXIES"

func TestMain(m *testing.M) {
	if os.Getenv(proxiesEnv) != "" {
		if err := beProxies(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// subscriptions are the proxies' requests, and the server's address.
type subscriptions struct {
	Address string
	// Proxies holds the encoded initial requests of each proxy.
	Proxies [][][]byte
}

// beProxies sends the subscriptions that it reads from stdin, and writes a line for each response.
func beProxies() error {
	var subs subscriptions
	if err := json.NewDecoder(os.Stdin).Decode(&subs); err != nil {
		return err
	}
	conn, err := grpc.NewClient(subs.Address, grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{InsecureSkipVerify: true})), //nolint:gosec // this test's own server
		grpc.WithDefaultCallOptions(grpc.ForceCodec(rawCodec{}), grpc.MaxCallRecvMsgSize(1<<30)))
	if err != nil {
		return err
	}
	defer conn.Close()
	failed := make(chan error)
	for _, requests := range subs.Proxies {
		go func() { failed <- beProxy(conn, requests) }()
	}
	return <-failed
}

func beProxy(conn *grpc.ClientConn, requests [][]byte) error {
	stream, err := conn.NewStream(context.Background(), &grpc.StreamDesc{ClientStreams: true, ServerStreams: true},
		discovery.AggregatedDiscoveryService_DeltaAggregatedResources_FullMethodName)
	if err != nil {
		return err
	}
	// The next request follows the response to the last one, as in Envoy.
	for n := 0; ; n++ {
		if n < len(requests) {
			if err := stream.SendMsg(&requests[n]); err != nil {
				return err
			}
		}
		var response []byte
		if err := stream.RecvMsg(&response); err != nil {
			return err
		}
		ack, err := acknowledge(response)
		if err != nil {
			return err
		}
		if err := stream.SendMsg(&ack); err != nil {
			return err
		}
		fmt.Println("answer")
	}
}

// acknowledge builds the ACK for a response, without decoding its resources.
func acknowledge(response []byte) ([]byte, error) {
	const typeURL, nonce = 4, 5
	ack := &discovery.DeltaDiscoveryRequest{}
	for b := response; len(b) > 0; {
		number, typ, n := protowire.ConsumeTag(b)
		size := protowire.ConsumeFieldValue(number, typ, b[max(n, 0):])
		if n < 0 || size < 0 {
			return nil, fmt.Errorf("parse a response: %w", protowire.ParseError(min(n, size)))
		}
		value, _ := protowire.ConsumeBytes(b[n:])
		switch number {
		case typeURL:
			ack.TypeUrl = string(value)
		case nonce:
			ack.ResponseNonce = string(value)
		}
		b = b[n+size:]
	}
	return proto.Marshal(ack)
}

// rawCodec passes messages through as bytes.
type rawCodec struct{}

func (rawCodec) Marshal(v any) ([]byte, error) { return *v.(*[]byte), nil }
func (rawCodec) Unmarshal(data []byte, v any) error {
	*v.(*[]byte) = data
	return nil
}
func (rawCodec) Name() string { return "proto" }

// proxies are connected to one istiod.
type proxies struct {
	answers *bufio.Reader
}

// connectProxies serves istiod over gRPC and TLS, and starts a process that subscribes. It returns when all proxies
// have their first responses.
func connectProxies(t testing.TB, server *xds.DiscoveryServer, requests [][]*discovery.DeltaDiscoveryRequest) *proxies {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	certificate := httptest.NewTLSServer(nil)
	certificate.Close()
	server.Authenticators = []security.Authenticator{anyCaller{}}
	srv := grpc.NewServer(grpc.Creds(credentials.NewServerTLSFromCert(&certificate.TLS.Certificates[0])))
	server.Register(srv)
	go func() { _ = srv.Serve(l) }()
	t.Cleanup(srv.Stop)

	subs := subscriptions{Address: l.Addr().String()}
	first := 0
	for _, of := range requests {
		var encoded [][]byte
		for _, request := range of {
			b, err := proto.Marshal(request)
			if err != nil {
				t.Fatal(err)
			}
			encoded = append(encoded, b)
			first++
		}
		subs.Proxies = append(subs.Proxies, encoded)
	}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), proxiesEnv+"=1")
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	if err := json.NewEncoder(in).Encode(subs); err != nil {
		t.Fatal(err)
	}
	_ = in.Close()
	p := &proxies{bufio.NewReader(out)}
	p.wait(t, first)
	return p
}

// wait waits for n responses.
func (p *proxies) wait(t testing.TB, n int) {
	t.Helper()
	for range n {
		if _, err := p.answers.ReadString('\n'); err != nil && err != io.EOF {
			t.Fatalf("the proxies' process: %v", err)
		} else if err == io.EOF {
			t.Fatal("the proxies' process exited")
		}
	}
}

// anyCaller authenticates every caller, as each of the ten proxies.
type anyCaller struct{}

func (anyCaller) Authenticate(security.AuthContext) (*security.Caller, error) {
	caller := &security.Caller{}
	for i := range 10 {
		caller.Identities = append(caller.Identities, fmt.Sprintf("spiffe://cluster.local/ns/demo/sa/a%d", i))
	}
	return caller, nil
}
func (anyCaller) AuthenticatorType() string { return "anyCaller" }
