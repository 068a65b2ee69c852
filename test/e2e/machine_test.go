//go:build e2e

package e2e

import (
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"polymesh.dev/polymesh/test/e2e/node"
)

const machinePod = `
apiVersion: v1
kind: Pod
metadata: {name: echo, namespace: default}
spec:
  securityContext: {runAsNonRoot: true, runAsUser: 65532}
  containers:
  - name: echo
    image: "` + echoImage + `"
    ports: [{containerPort: 8080, hostPort: 8088}]
`

// usersMachine is a node that other programs and users change while the server runs.
type usersMachine struct {
	*node.Node
	nft     string
	outside string // URL in the outside world
	names   string // the file with the name servers
}

// One node for all subtests, started by a shell with the umask of a hardened host.
func TestMachineChanges(t *testing.T) {
	ownNodes(t, 1)
	names := filepath.Join(t.TempDir(), "resolv.conf")
	if err := os.WriteFile(names, []byte("nameserver 127.0.0.53\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	n := node.ForTest(t, node.Options{Umask: "077", Args: []string{"--disable", "istio,metrics-server,local-storage", "--resolv-conf", names}})
	if err := n.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	// CoreDNS does not run as root: with the shell's umask it would not find its own program.
	n.WaitReady(t, 4*time.Minute)
	importEcho(t, n)
	n.Apply(t, machinePod)
	n.Kubectl(t, "wait", "--for=condition=Ready", "pod/echo", "--timeout=120s")

	l, err := n.ListenOutside("tcp", net.JoinHostPort(n.OutsideAddress(), "8000"))
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "outside") })}
	go func() { _ = server.Serve(l) }()
	t.Cleanup(func() { server.Close() })
	m := &usersMachine{n, shippedNFT(t), "http://" + l.Addr().String() + "/", names}
	m.works(t)

	t.Run("flushed rules", m.testFlush)
	t.Run("flushed while the server is down", m.testFlushWhileDown)
	t.Run("forwarding turned off", m.testForwarding)
	t.Run("bridge deleted", m.testBridge)
	t.Run("device between nodes deleted", m.testOverlay)
	t.Run("another name server", m.testNameserver)
	t.Run("what listens", m.testListeners)
	t.Run("address gone", m.testAddress)
}

// works waits until service addresses, the cluster's names, the pod's way out and its hostPort work: 30 seconds are what the
// documentation promises.
func (m *usersMachine) works(t *testing.T) {
	t.Helper()
	m.Eventually(t, 30*time.Second, func() (bool, string) {
		for _, service := range []string{"10.43.0.1:443", "10.43.0.10:53"} {
			c, err := m.Dial(t.Context(), "tcp", service)
			if err != nil {
				return false, "service address " + service + ": " + err.Error()
			}
			c.Close()
		}
		if out, err := m.Exec("default", "echo", "echo", "/echo", "get", m.outside); err != nil || !strings.Contains(out, "outside") {
			return false, fmt.Sprintf("the pod gets %q from outside (%v)", out, err)
		}
		answer, err := m.HTTP(false).Get("http://" + net.JoinHostPort(m.Address(), "8088") + "/")
		if err != nil {
			return false, "hostPort: " + err.Error()
		}
		defer answer.Body.Close()
		_, err = io.Copy(io.Discard, answer.Body)
		return err == nil && answer.StatusCode == http.StatusOK, fmt.Sprintf("hostPort: %s, %v", answer.Status, err)
	})
}

func (m *usersMachine) do(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := m.Command(t.Context(), name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
	}
}

// says waits until `polymesh status` prints this and ends with this code.
func (m *usersMachine) says(t *testing.T, code int, text string) {
	t.Helper()
	m.Eventually(t, time.Minute, func() (bool, string) {
		out, got := m.Status(t)
		return got == code && strings.Contains(out, text), fmt.Sprintf("polymesh status ends with %d, want %d with %q:\n%s", got, code, text, out)
	})
}

// What `systemctl restart nftables`, and a firewall's reload, do.
func (m *usersMachine) testFlush(t *testing.T) {
	m.do(t, m.nft, "flush", "ruleset")
	if out, code := m.Status(t); code != 1 || !strings.Contains(out, "service addresses") {
		t.Errorf("right after the flush polymesh status ends with %d:\n%s", code, out)
	}
	m.works(t)
	m.says(t, 0, "put back what another program had removed: the rules of service addresses")
	log, err := os.ReadFile(m.Log())
	if err != nil || !strings.Contains(string(log), "another program has removed a part of the node's network") {
		t.Errorf("the log does not contain it (%v)", err)
	}
}

func (m *usersMachine) testFlushWhileDown(t *testing.T) {
	if err := m.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	m.do(t, m.nft, "flush", "ruleset")
	if err := m.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	m.WaitReady(t, 3*time.Minute)
	m.works(t)
}

func (m *usersMachine) testForwarding(t *testing.T) {
	m.do(t, "sh", "-c", "echo 0 >/proc/sys/net/ipv4/ip_forward")
	m.works(t)
	m.says(t, 0, "put back what another program had removed: packet forwarding")
}

func (m *usersMachine) testOverlay(t *testing.T) {
	m.do(t, "ip", "link", "delete", "flannel.1")
	m.says(t, 0, "put back what another program had removed: the interface flannel.1")
	m.do(t, "ip", "link", "show", "flannel.1")
}

func (m *usersMachine) testBridge(t *testing.T) {
	m.do(t, "ip", "link", "delete", "cni0")
	m.works(t)
	m.says(t, 0, "put back what another program had removed: the interface cni0")
}

func (m *usersMachine) testNameserver(t *testing.T) {
	m.says(t, 0, "no name server that pods can reach")
	// A hash of the name servers, with which the pods of CoreDNS are replaced.
	hash := func() string {
		return m.Kubectl(t, "get", "-n", "kube-system", "deployment", "coredns", "-o", `jsonpath={.spec.template.metadata.annotations.addon\.polymesh\.dev/nameservers}`)
	}
	before := hash()
	if before == "" {
		t.Error("CoreDNS's pods have no hash of the name servers")
	}
	if err := os.WriteFile(m.names, []byte("nameserver "+m.OutsideAddress()+" # from the router\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	m.Eventually(t, time.Minute, func() (bool, string) {
		return hash() != before, "CoreDNS's pods are not replaced"
	})
	m.WaitRollout(t, "kube-system", "deployment/coredns")
	m.WaitReady(t, time.Minute)
	if out, _ := m.Status(t); strings.Contains(out, "no name server") {
		t.Errorf("polymesh status still reports that there is none:\n%s", out)
	}
}

func (m *usersMachine) testListeners(t *testing.T) {
	for _, port := range []string{"6443", "10250"} {
		for cipher, want := range map[uint16]bool{tls.TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA: false, tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256: true} {
			c, err := m.Dial(t.Context(), "tcp", net.JoinHostPort(m.Address(), port))
			if err != nil {
				t.Fatal(err)
			}
			err = tls.Client(c, &tls.Config{InsecureSkipVerify: true, MaxVersion: tls.VersionTLS12, CipherSuites: []uint16{cipher}}).HandshakeContext(t.Context()) //nolint:gosec // what counts is the handshake
			c.Close()
			if (err == nil) != want {
				t.Errorf("port %s, %s: %v, want it accepted: %v", port, tls.CipherSuiteName(cipher), err, want)
			}
		}
	}
	// kube-proxy's metrics, and with them those of all components, without authentication.
	if c, err := m.Dial(t.Context(), "tcp", "127.0.0.1:10249"); err == nil {
		c.Close()
		t.Error("a server listens on 127.0.0.1:10249")
	}
}

func (m *usersMachine) testAddress(t *testing.T) {
	address := m.Address()
	m.do(t, "ip", "address", "delete", address+"/24", "dev", "eth0")
	m.says(t, 1, "the node's address "+address+" is on no interface any more: restart the server")
	m.do(t, "ip", "address", "add", address+"/24", "dev", "eth0")
	m.do(t, "ip", "route", "replace", "default", "via", m.OutsideAddress())
	m.works(t)
	m.says(t, 0, "kube-proxy")
}
