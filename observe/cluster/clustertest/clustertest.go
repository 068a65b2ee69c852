// Package clustertest gives tests a real API server: the control plane of a Polymesh server, without nodes, in a process of its own.
//
// It is the test program of the main module's pkg/controlplane/controlplanetest, which `make test-observe` builds; the two modules have no
// packages in common. Pods stay Pending, as there is no kubelet: a test that needs another status writes it.
package clustertest

import (
	"bufio"
	"context"
	"io"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
)

// Program is the variable with the path of the program, if it is not where make puts it.
const Program = "POLYMESH_TEST_CONTROL_PLANE_PROGRAM"

// Start starts a control plane that ends with the test, and returns its administrator's configuration, without a rate limit.
func Start(t testing.TB) *rest.Config {
	t.Helper()
	program := os.Getenv(Program)
	if program == "" {
		program = filepath.Join(module(t), "../.build/test/controlplane")
	}
	if _, err := os.Stat(program); err != nil {
		t.Fatalf("%v: `make test-observe` in the main module builds it, or set %s", err, Program)
	}
	cmd := exec.Command(program, "-test.run=^TestServer$", "-test.v")
	cmd.Env = append(os.Environ(), "POLYMESH_TEST_CONTROL_PLANE=[]", "TMPDIR="+t.TempDir())
	in, err := cmd.StdinPipe()
	require.NoError(t, err)
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	log, err := os.Create(filepath.Join(t.TempDir(), "log"))
	require.NoError(t, err)
	cmd.Stderr = log
	require.NoError(t, cmd.Start())
	t.Cleanup(func() {
		in.Close()
		if err := cmd.Wait(); err != nil {
			text, _ := os.ReadFile(log.Name())
			t.Errorf("the control plane: %v\n%s", err, tail(string(text)))
		}
	})
	for lines := bufio.NewScanner(out); lines.Scan(); {
		if file, ok := strings.CutPrefix(lines.Text(), "kubeconfig "); ok {
			go func() { _, _ = io.Copy(io.Discard, out) }()
			config, err := clientcmd.BuildConfigFromFlags("", file)
			require.NoError(t, err)
			config.QPS = -1
			return config
		}
	}
	text, _ := os.ReadFile(log.Name())
	t.Fatalf("the control plane did not start:\n%s", tail(string(text)))
	return nil
}

func tail(text string) string { return text[max(0, len(text)-4000):] }

// module returns the folder of the module.
func module(t testing.TB) string {
	dir, err := os.Getwd()
	require.NoError(t, err)
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir
		}
		require.NotEqual(t, "/", dir)
		dir = filepath.Dir(dir)
	}
}

// Client returns a client.
func Client(t testing.TB, config *rest.Config) *kubernetes.Clientset {
	t.Helper()
	client, err := kubernetes.NewForConfig(config)
	require.NoError(t, err)
	return client
}

// WriteKubeconfig writes a kubeconfig with a token for the API server at an address.
func WriteKubeconfig(t testing.TB, file, address, token string, config *rest.Config) {
	t.Helper()
	c := clientcmdapi.NewConfig()
	c.Clusters["test"] = &clientcmdapi.Cluster{Server: "https://" + address, CertificateAuthority: config.CAFile, CertificateAuthorityData: config.CAData}
	c.AuthInfos["test"] = &clientcmdapi.AuthInfo{Token: token}
	c.Contexts["test"] = &clientcmdapi.Context{Cluster: "test", AuthInfo: "test"}
	c.CurrentContext = "test"
	text, err := clientcmd.Write(*c)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(file+".new", text, 0o600))
	require.NoError(t, os.Rename(file+".new", file))
}

// Gate is a way to the API server that can be closed, as if that was away.
type Gate struct {
	Address string // of loopback
	target  string

	mu       sync.Mutex
	listener net.Listener
	open     map[net.Conn]bool
}

// NewGate returns a gate that is closed.
func NewGate(t testing.TB, config *rest.Config) *Gate {
	t.Helper()
	u, err := url.Parse(config.Host)
	require.NoError(t, err)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	g := &Gate{Address: l.Addr().String(), target: u.Host, open: map[net.Conn]bool{}}
	l.Close()
	t.Cleanup(g.Close)
	return g
}

// Open lets connections through.
func (g *Gate) Open(t testing.TB) {
	t.Helper()
	l, err := net.Listen("tcp", g.Address)
	require.NoError(t, err)
	g.mu.Lock()
	g.listener = l
	g.mu.Unlock()
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go g.forward(conn)
		}
	}()
}

// Close ends all connections and refuses new ones.
func (g *Gate) Close() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.listener != nil {
		g.listener.Close()
		g.listener = nil
	}
	for conn := range g.open {
		conn.Close()
	}
}

func (g *Gate) forward(conn net.Conn) {
	defer conn.Close()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	to, err := (&net.Dialer{}).DialContext(ctx, "tcp", g.target)
	if err != nil {
		return
	}
	defer to.Close()
	g.mu.Lock()
	closed := g.listener == nil
	g.open[conn], g.open[to] = true, true
	g.mu.Unlock()
	defer func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		delete(g.open, conn)
		delete(g.open, to)
	}()
	if closed {
		return
	}
	done := make(chan struct{}, 2)
	pipe := func(a, b net.Conn) {
		_, _ = io.Copy(a, b)
		done <- struct{}{}
	}
	go pipe(conn, to)
	go pipe(to, conn)
	<-done
}
