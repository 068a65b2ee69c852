package apilb

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	discoveryv1 "k8s.io/api/discovery/v1"

	"polymesh.dev/polymesh/pkg/certificate"
)

// Servers come from the list and from the configuration. One that is in neither any more is left; an empty list changes nothing.
func TestListChanges(t *testing.T) {
	servers, b := three(t)
	listed(t, b)
	healthy(t, b, servers["a"], servers["b"], servers["c"])
	listed(t, b, servers["b"])
	// a is the configured one.
	healthy(t, b, servers["a"], servers["b"])
	s := open(t, b)
	if s.server != "b" {
		t.Errorf("the connection goes to %s, want b, which is in the list", s.server)
	}
	listed(t, b, servers["c"])
	s.waitEnd(t)
	healthy(t, b, servers["a"], servers["c"])
	goesTo(t, b, servers["c"])
	servers["c"].kill()
	goesTo(t, b, servers["a"])
}

// The list outlives the process: a node finds its cluster although the configured server is away.
func TestListIsKept(t *testing.T) {
	store := cluster(t)
	a, c := newServer(t, store, "a", listen), newServer(t, store, "c", listen)
	state := filepath.Join(t.TempDir(), "servers.json")
	first := balancer(t, store, func(b *Balancer) { b.opts.Server, b.opts.State = a.addr.String(), state })
	listed(t, first, a, c)
	eventually(t, "the list is written", func() error {
		known, err := readState(state, netip.AddrPort{})
		if err == nil && len(known) != 2 {
			err = fmt.Errorf("it contains %v", known)
		}
		return err
	})
	if info, err := os.Stat(state); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the file is %v, %v", info, err)
	}
	a.kill()
	second := balancer(t, store, func(b *Balancer) { b.opts.Server, b.opts.State = a.addr.String(), state })
	goesTo(t, second, c)
	healthy(t, second, c)
	// And an old file does not keep a node from the configured server.
	c.kill()
	a.start()
	healthy(t, second, a)
	goesTo(t, second, a)
}

// A file that is not a list of servers is ignored, and the configured server is used.
func TestHostileState(t *testing.T) {
	self := netip.MustParseAddrPort("127.0.0.1:6444")
	many := `{"servers":["` + strings.Repeat(`10.0.0.1:1","`, 8192) + `10.0.0.1:1"]}`
	var distinct []string
	for i := range 2 * maxServers {
		distinct = append(distinct, fmt.Sprintf(`"10.0.0.1:%d"`, i+1))
	}
	for content, want := range map[string]struct {
		servers int
		err     string
	}{
		``:                                 {err: "unexpected end"},
		`{`:                                {err: "unexpected end"},
		`{"servers":"10.0.0.1:6443"}`:      {err: "cannot unmarshal"},
		`{"servers":[1]}`:                  {err: "cannot unmarshal"},
		`{"servers":["example.com:6443"]}`: {err: "is not an address"},
		`{"servers":["10.0.0.1"]}`:         {err: "is not an address"},
		many:                               {err: "more than 65536 bytes"},
		`{"servers":[]}`:                   {},
		`{"servers":["127.0.0.1:6444","::ffff:127.0.0.1:6444","0.0.0.0:1","10.0.0.1:0","224.0.0.1:1","169.254.169.254:80","[fe80::1%eth0]:1"]}`: {err: "is not an address"},
		`{"servers":["127.0.0.1:6444","[::ffff:127.0.0.1]:6444","0.0.0.0:1","10.0.0.1:0","224.0.0.1:1","169.254.169.254:80","[fe80::1%e]:1"]}`:  {},
		`{"servers":["10.0.0.1:6443","[::ffff:10.0.0.1]:6443","10.0.0.2:6443"]}`:                                                                {servers: 2},
		`{"servers":[` + strings.Join(distinct, ",") + `]}`:                                                                                     {servers: maxServers},
	} {
		path := filepath.Join(t.TempDir(), "servers.json")
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := readState(path, self)
		if len(got) != want.servers || (err == nil) != (want.err == "") || err != nil && !strings.Contains(err.Error(), want.err) {
			t.Errorf("%.80s: %v, %v; want %d servers and %q", content, got, err, want.servers, want.err)
		}
	}
	store := cluster(t)
	a := newServer(t, store, "a", listen)
	b := balancer(t, store, func(b *Balancer) {
		b.opts.Server = a.addr.String()
		if err := os.MkdirAll(filepath.Dir(b.opts.State), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(b.opts.State, []byte(`{"servers":["a b"]}`), 0o600); err != nil {
			t.Fatal(err)
		}
	})
	healthy(t, b, a)
	goesTo(t, b, a)
}

// Of an EndpointSlice only what can be a server is used.
func TestAddresses(t *testing.T) {
	port, no, bad := int32(6443), false, int32(70000)
	s := &discoveryv1.EndpointSlice{
		Ports: []discoveryv1.EndpointPort{{Port: &port}, {Port: &bad}, {}},
		Endpoints: []discoveryv1.Endpoint{
			{Addresses: []string{"10.0.0.1", "10.0.0.1", "example.com", "", "0.0.0.0"}},
			{Addresses: []string{"10.0.0.2"}, Conditions: discoveryv1.EndpointConditions{Ready: &no}},
		},
	}
	if got, want := usable(addresses(s), netip.AddrPort{}), []netip.AddrPort{netip.MustParseAddrPort("10.0.0.1:6443")}; !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}

// A server of another cluster, and one that does not accept the node, is not used, even if it answers /readyz.
func TestForeignServers(t *testing.T) {
	mine, foreign := cluster(t), cluster(t)
	a, x := newServer(t, mine, "a", listen), newServer(t, foreign, "x", listen)
	b := balancer(t, mine, func(b *Balancer) { b.opts.Server, b.opts.Own = a.addr.String(), x.addr })
	healthy(t, b, a)
	goesTo(t, b, a)
	if note := strings.Join(b.Notes(t.Context()), "\n"); !strings.Contains(note, x.addr.String()+": tls: failed to verify certificate: x509: certificate signed by unknown authority") {
		t.Errorf("the note is %q", note)
	}
	other := balancer(t, mine, func(b *Balancer) {
		b.opts.Server = a.addr.String()
		b.opts.Cert, b.opts.Key = mine.Cert(certificate.KubeProxy), mine.Key(certificate.KubeProxy)
	})
	eventually(t, "the server does not accept the certificate", func() error {
		if err := other.Ready(t.Context()); err == nil || !strings.Contains(err.Error(), "/readyz returned 401: it does not accept this node's certificate") {
			return fmt.Errorf("the component is %v", err)
		}
		return nil
	})
}

// A node that has no certificate yet can connect, in order to get one; then it is used.
func TestFirstCertificate(t *testing.T) {
	store := cluster(t)
	a := newServer(t, store, "a", listen)
	dir := t.TempDir()
	b := balancer(t, store, func(b *Balancer) {
		b.opts.Server = a.addr.String()
		b.opts.Cert, b.opts.Key = filepath.Join(dir, "cert"), filepath.Join(dir, "key")
	})
	eventually(t, "the check needs the certificate", func() error {
		if err := b.Ready(t.Context()); err == nil || !strings.Contains(err.Error(), "read the node's certificate: ") {
			return fmt.Errorf("the component is %v", err)
		}
		return nil
	})
	direct, err := net.Dial("tcp", b.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer direct.Close()
	config := &tls.Config{InsecureSkipVerify: true} // only that it is forwarded matters here
	if err := tls.Client(direct, config).HandshakeContext(t.Context()); err != nil {
		t.Errorf("without a certificate: %v", err)
	}
	for from, to := range map[string]string{store.Key(certificate.Kubelet): b.opts.Key, store.Cert(certificate.Kubelet): b.opts.Cert} {
		text, err := os.ReadFile(from)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(to, text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	healthy(t, b, a)
}

// The configured name is resolved again: a registration address that moves is followed.
func TestNameMoves(t *testing.T) {
	store := cluster(t)
	a := newServer(t, store, "a", "127.0.0.2:0")
	c := newServer(t, store, "c", netip.AddrPortFrom(netip.MustParseAddr("127.0.0.3"), a.addr.Port()).String())
	var answer atomic.Pointer[netip.Addr]
	b := balancer(t, store, func(b *Balancer) {
		b.opts.Server = fmt.Sprintf("api.example.com:%d", a.addr.Port())
		b.resolver = nameServer(t, &answer)
	})
	eventually(t, "the name does not exist", func() error {
		if err := b.Ready(t.Context()); err == nil || !strings.Contains(err.Error(), "no such host") {
			return fmt.Errorf("the component is %v", err)
		}
		return nil
	})
	first, second := a.addr.Addr(), c.addr.Addr()
	answer.Store(&first)
	healthy(t, b, a)
	s := open(t, b)
	answer.Store(&second)
	healthy(t, b, c)
	s.waitEnd(t)
	goesTo(t, b, c)
	// While the name cannot be resolved, its last addresses are used.
	answer.Store(nil)
	goesTo(t, b, c)
}

// nameServer is a resolver with a DNS server (RFC 1035) that returns answer for each name, or that there is no such name.
func nameServer(t *testing.T, answer *atomic.Pointer[netip.Addr]) *net.Resolver {
	t.Helper()
	l, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			buffer := make([]byte, 512)
			n, from, err := l.ReadFrom(buffer)
			if err != nil {
				return
			}
			end := 12
			for end < n && buffer[end] != 0 {
				end += int(buffer[end]) + 1
			}
			end += 5 // the root label, type and class
			if end > n {
				continue
			}
			reply := append([]byte{}, buffer[:end]...)
			flags, answers := uint16(0x8180), uint16(0)
			ip := answer.Load()
			switch {
			case ip == nil:
				flags |= 3 // NXDOMAIN
			case binary.BigEndian.Uint16(buffer[end-4:]) == 1: // A
				answers = 1
				reply = append(reply, 0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 0, 0, 4)
				reply = append(reply, ip.AsSlice()...)
			}
			binary.BigEndian.PutUint16(reply[2:], flags)
			binary.BigEndian.PutUint16(reply[6:], answers)
			binary.BigEndian.PutUint32(reply[8:], 0)
			_, _ = l.WriteTo(reply, from)
		}
	}()
	return &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "udp", l.LocalAddr().String())
	}}
}
