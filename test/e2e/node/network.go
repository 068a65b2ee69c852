package node

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// namespace is a network namespace by its name for `ip netns`.
type namespace string

func (s namespace) path() string { return filepath.Join("/run/netns", string(s)) }

// OutsideHost is a further address in the world outside, the same one for every node, so that a manifest can name it.
// (198.18.0.0/15 is for tests, RFC 2544.)
const OutsideHost = "198.19.0.1"

// connect makes both namespaces and the wire between them: the node is 198.18.<subnet>.2, the world outside .1 and
// OutsideHost. The world answers that nothing else can be reached, so that no one waits.
func (n *Node) connect(subnet byte) error {
	inside, outside := string(n.inside), string(n.outside)
	commands := [][]string{
		{"netns", "add", inside},
		{"netns", "add", outside},
		{"link", "add", "eth0", "netns", inside, "type", "veth", "peer", "name", "eth0", "netns", outside},
		{"-n", inside, "address", "add", fmt.Sprintf("198.18.%d.2/24", subnet), "dev", "eth0"},
		{"-n", outside, "address", "add", fmt.Sprintf("198.18.%d.1/24", subnet), "dev", "eth0"},
		{"-n", inside, "link", "set", "lo", "up"},
		{"-n", outside, "link", "set", "lo", "up"},
		{"-n", outside, "address", "add", OutsideHost + "/32", "dev", "lo"},
		{"-n", inside, "link", "set", "eth0", "up"},
		{"-n", outside, "link", "set", "eth0", "up"},
		{"-n", outside, "route", "add", "unreachable", "default"},
	}
	if !n.opts.NoDefaultRoute {
		commands = append(commands, []string{"-n", inside, "route", "add", "default", "via", fmt.Sprintf("198.18.%d.1", subnet)})
	}
	for _, args := range commands {
		if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
			return fmt.Errorf("ip %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(string(out)))
		}
	}
	return n.outside.do(func() error {
		// A machine that forwards says "unreachable"; one that does not, says nothing.
		return os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0o644)
	})
}

// Address is the node's address: the API server's, and that of LoadBalancer services.
func (n *Node) Address() string { return n.address(n.inside) }

// OutsideAddress is the address of the world outside.
func (n *Node) OutsideAddress() string { return n.address(n.outside) }

func (n *Node) address(s namespace) string {
	address := ""
	err := s.do(func() error {
		eth0, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		addrs, err := eth0.Addrs()
		if err != nil {
			return err
		}
		for _, a := range addrs {
			if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr().Is4() {
				address = p.Addr().String()
			}
		}
		return nil
	})
	if err != nil {
		panic(fmt.Sprintf("node %s has lost its network: %v", n.Name, err))
	}
	return address
}

// do calls f on a thread inside the namespace.
func (s namespace) do(f func() error) error {
	target, err := os.Open(s.path())
	if err != nil {
		return err
	}
	defer target.Close()
	runtime.LockOSThread()
	own, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		runtime.UnlockOSThread()
		return err
	}
	defer own.Close()
	if err := unix.Setns(int(target.Fd()), unix.CLONE_NEWNET); err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("enter network namespace %s: %w", s, err)
	}
	err = f()
	if back := unix.Setns(int(own.Fd()), unix.CLONE_NEWNET); back != nil {
		// The thread stays locked: it must not serve anything else.
		return errors.Join(err, fmt.Errorf("leave network namespace %s: %w", s, back))
	}
	runtime.UnlockOSThread()
	return err
}

// dial connects from inside the namespace to an IP address and port. Names would be looked up on other threads.
func (s namespace) dial(ctx context.Context, network, address string) (connection net.Conn, err error) {
	if _, err := netip.ParseAddrPort(address); err != nil {
		return nil, fmt.Errorf("dial in namespace %s: %w", s, err)
	}
	err = s.do(func() (err error) {
		connection, err = (&net.Dialer{Timeout: 10 * time.Second}).DialContext(ctx, network, address)
		return err
	})
	return connection, err
}

// Dial connects from the node itself, which also reaches pods and services by their addresses.
func (n *Node) Dial(ctx context.Context, network, address string) (net.Conn, error) {
	return n.inside.dial(ctx, network, address)
}

// DialOutside connects from the world outside.
func (n *Node) DialOutside(ctx context.Context, network, address string) (net.Conn, error) {
	return n.outside.dial(ctx, network, address)
}

// Listen listens on the node itself.
func (n *Node) Listen(network, address string) (net.Listener, error) {
	return n.inside.listen(network, address)
}

// ListenOutside listens in the world outside.
func (n *Node) ListenOutside(network, address string) (net.Listener, error) {
	return n.outside.listen(network, address)
}

func (s namespace) listen(network, address string) (listener net.Listener, err error) {
	err = s.do(func() (err error) {
		listener, err = net.Listen(network, address)
		return err
	})
	return listener, err
}

// HTTP returns a client in the world outside. It retries nothing; with keep it keeps its connections, otherwise each
// request has a new one.
func (n *Node) HTTP(keep bool) *http.Client { return httpClient(n.outside, keep) }

// HTTPInside returns a client on the node itself, for the addresses of pods.
func (n *Node) HTTPInside(keep bool) *http.Client { return httpClient(n.inside, keep) }

func httpClient(s namespace, keep bool) *http.Client {
	return &http.Client{
		Timeout: 30 * time.Second,
		Transport: &http.Transport{
			DialContext: s.dial, DisableKeepAlives: !keep,
			MaxIdleConns: 1000, MaxIdleConnsPerHost: 1000,
			DisableCompression: true,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}
