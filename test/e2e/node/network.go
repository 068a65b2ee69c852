package node

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
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

func (s namespace) exists() bool {
	_, err := os.Lstat(s.path())
	return err == nil
}

// command returns a command in the namespace. nsenter executes the program, so the process is the program itself.
func (s namespace) command(name string, args ...string) *exec.Cmd {
	return exec.Command("nsenter", append([]string{"--net=" + s.path(), "--", name}, args...)...)
}

// OutsideHost is another address in the outside world, the same one for every cluster, so that a manifest can name it.
// (198.18.0.0/15 is for tests, RFC 2544.)
const OutsideHost = "198.19.0.1"

// Each cluster has its own network: the outside world is .1, and nodes follow. A cluster's bridge is not connected to anything else,
// so all clusters have the same addresses.
const (
	network     = "198.18.0"
	outsidePart = 1 // the last part of an address
	maxNodes    = 254 - outsidePart
	outsidePort = "out"
)

// port is a node's port of the bridge.
func port(number int) string { return fmt.Sprintf("n%d", number) }

// delayed is the suffix of the port that replaces a node's port while its traffic is delayed.
const delayed = "d"

// connect creates the bridge in the cluster's namespace, with the outside world on it. The outside world responds that nothing else is
// reachable, so that no one waits.
func (c *Cluster) connect() error {
	wires, outside := string(c.wires), string(c.outside)
	if err := ip("-n "+wires+" link add br0 type bridge", "-n "+wires+" link set br0 up", "netns add "+outside); err != nil {
		return err
	}
	err := c.wires.do(func() error {
		// A plain switch: the packet filter for IP does not see its traffic.
		for _, name := range []string{"iptables", "ip6tables", "arptables"} {
			err := os.WriteFile("/proc/sys/net/bridge/bridge-nf-call-"+name, []byte("0"), 0o644)
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	if err := c.wire(c.outside, outsidePort, outsidePart); err != nil {
		return err
	}
	if err := ip("-n "+outside+" address add "+OutsideHost+"/32 dev lo", "-n "+outside+" route add unreachable default"); err != nil {
		return err
	}
	return c.outside.do(func() error {
		// A machine that forwards responds with "unreachable"; one that does not, does not respond.
		return os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0o644)
	})
}

// plug creates the node's namespace and connects it to the others.
func (n *Node) plug() error {
	if err := ip("netns add " + string(n.inside)); err != nil {
		return err
	}
	if err := n.cluster.wire(n.inside, port(n.number), outsidePart+n.number); err != nil {
		return err
	}
	if n.opts.NoDefaultRoute {
		return nil
	}
	return ip("-n " + string(n.inside) + " route add default via " + n.OutsideAddress())
}

// wire connects a namespace, as its eth0, to a port of the bridge. A machine that comes back has the same link address, which its
// neighbors know.
func (c *Cluster) wire(s namespace, port string, part int) error {
	inside, wires := string(s), string(c.wires)
	return ip(
		fmt.Sprintf("link add eth0 netns %s address 02:00:c6:12:00:%02x type veth peer name %s netns %s", inside, part, port, wires),
		fmt.Sprintf("-n %s link set %s master br0 up", wires, port),
		fmt.Sprintf("-n %s address add %s.%d/24 dev eth0", inside, network, part),
		fmt.Sprintf("-n %s link set lo up", inside),
		fmt.Sprintf("-n %s link set eth0 up", inside),
	)
}

// ip runs `ip` with each of these lines of arguments, until one fails.
func ip(lines ...string) error {
	for _, line := range lines {
		if err := tool("ip", strings.Fields(line)...); err != nil {
			return err
		}
	}
	return nil
}

// Address returns the node's address: the API server's, and that of LoadBalancer services.
func (n *Node) Address() string { return fmt.Sprintf("%s.%d", network, outsidePart+n.number) }

// OutsideAddress returns the address of the outside world.
func (n *Node) OutsideAddress() string { return fmt.Sprintf("%s.%d", network, outsidePart) }

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
		// The thread stays locked: nothing else may run on it.
		return errors.Join(err, fmt.Errorf("leave network namespace %s: %w", s, back))
	}
	runtime.UnlockOSThread()
	return err
}

// dial connects from inside the namespace to an IP address and port. Names would be resolved on other threads.
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

// DialOutside connects from the outside world.
func (n *Node) DialOutside(ctx context.Context, network, address string) (net.Conn, error) {
	return n.outside.dial(ctx, network, address)
}

// Listen listens on the node itself.
func (n *Node) Listen(network, address string) (net.Listener, error) {
	return n.inside.listen(network, address)
}

// ListenOutside listens in the outside world.
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

// HTTP returns a client in the outside world. It does not retry. With keep it keeps its connections, otherwise each request has a new
// one.
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
