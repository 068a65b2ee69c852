package server

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"math/big"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"polymesh.dev/polymesh/observe/config"
	"polymesh.dev/polymesh/observe/datadir"
	"polymesh.dev/polymesh/observe/ingest"
	"polymesh.dev/polymesh/observe/logstore"
	"polymesh.dev/polymesh/observe/logstore/logstoretest"
	"polymesh.dev/polymesh/observe/metrics"
	"polymesh.dev/polymesh/observe/nodemetrics"
	"polymesh.dev/polymesh/observe/rowstore"
)

// other is the store of another machine, behind an API server that authenticates nodes.
type other struct {
	away atomic.Bool
	logs *logstore.Store
	in   *ingest.Ingest
	name atomic.Pointer[string]
}

func newOther(t *testing.T) *other {
	t.Helper()
	dir := t.TempDir()
	logs := logstoretest.Open(t, rowstore.Options{Dir: filepath.Join(dir, "logs")})
	numbers, err := metrics.Open(t.Context(), metrics.Options{Dir: filepath.Join(dir, "metrics"), Retention: 24 * time.Hour, Log: discard()})
	require.NoError(t, err)
	t.Cleanup(func() { _ = numbers.Close() })
	in, err := ingest.New(ingest.Options{
		Node: "n1", Logs: logs, Samples: numbers.Appendable(), Families: nodemetrics.Families(), Job: "node", State: filepath.Join(dir, "nodes"), Retention: 365 * 24 * time.Hour,
		Pod: func(string) (ingest.Pod, bool, bool) {
			return ingest.Pod{Namespace: "shop", Name: "api", Node: "n2"}, true, true
		},
		Workload: func(string, string) (string, bool) { return "", false }, Log: discard(),
	})
	require.NoError(t, err)
	return &other{logs: logs, in: in}
}

func (o *other) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	name := r.TLS.PeerCertificates[0].Subject.CommonName
	o.name.Store(&name)
	if o.away.Load() {
		http.Error(w, "away", http.StatusServiceUnavailable)
		return
	}
	r.Header.Set(ingest.NodeHeader, strings.TrimPrefix(name, "system:node:"))
	o.in.ServeHTTP(w, r)
}

// has reports whether these are the lines of a job.
func (o *other) has(t *testing.T, job string, lines ...string) bool {
	t.Helper()
	var got []string
	require.NoError(t, o.logs.Select(t.Context(), logstore.Selector{Matchers: []logstore.Matcher{{Name: "job", Value: job}, {Name: "node", Value: "n2"}}}, func(e logstore.Entry) bool {
		got = append(got, e.Line)
		return true
	}))
	return slices.Equal(got, lines)
}

// pair writes a certificate of a node with its key.
func pair(t *testing.T, file string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	c := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "system:node:n2"}, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, c, c, &key.PublicKey, key)
	require.NoError(t, err)
	private, err := x509.MarshalPKCS8PrivateKey(key)
	require.NoError(t, err)
	text := append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private})...)
	require.NoError(t, os.WriteFile(file, text, 0o600))
}

// A collector keeps what it reads while the store is away, and sends all of it once.
func TestCollect(t *testing.T) {
	defer syscall.Umask(syscall.Umask(0o077))
	dir := t.TempDir()
	r := newOther(t)
	r.away.Store(true)
	api := httptest.NewUnstartedServer(r)
	api.TLS = &tls.Config{ClientAuth: tls.RequireAnyClientCert}
	api.StartTLS()
	defer api.Close()
	ca, cert := filepath.Join(dir, "ca.crt"), filepath.Join(dir, "node.pem")
	require.NoError(t, os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: api.Certificate().Raw}), 0o600))
	pair(t, cert)
	pod, containerd := filepath.Join(dir, "pods", "shop_api_1f", "app"), filepath.Join(dir, "containerd.log")
	require.NoError(t, os.MkdirAll(pod, 0o755))
	write := func(path, text string) {
		f, err := os.OpenFile(path, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
		require.NoError(t, err)
		_, err = f.WriteString(text)
		require.NoError(t, err)
		require.NoError(t, f.Close())
	}
	cri := func(line string) string {
		return time.Now().UTC().Format(time.RFC3339Nano) + " stdout F " + line + "\n"
	}
	write(filepath.Join(pod, "0.log"), cri("one"))
	line := `time="` + time.Now().UTC().Format(time.RFC3339) + `" level=info msg=started`
	write(containerd, line+"\n")

	o, err := config.Parse([]string{
		"--data-dir", filepath.Join(dir, "observe"), "--socket", filepath.Join(dir, "s"), "--node-name", "n2", "--pod-log-dir", filepath.Join(dir, "pods"), "--log-file", "containerd=" + containerd,
		"--push-to", api.URL + "/p", "--push-ca", ca, "--push-cert", cert, "--push-key", cert,
	}, nil)
	require.NoError(t, err)
	start := func() func() {
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- Collect(ctx, o, "1.2.3", discard()) }()
		return func() {
			cancel()
			require.NoError(t, <-done)
		}
	}
	status := func() (s Status) {
		answer, err := client(o.Socket).Get("http://store" + StatusPath)
		if err != nil {
			return s
		}
		defer answer.Body.Close()
		require.NoError(t, json.NewDecoder(answer.Body).Decode(&s))
		return s
	}
	of := func(s Status, name string) ComponentStatus {
		i := slices.IndexFunc(s.Components, func(c ComponentStatus) bool { return c.Name == name })
		if i < 0 {
			return ComponentStatus{}
		}
		return s.Components[i]
	}
	stop := start()
	eventually(t, "something waits", func() bool {
		s := status()
		return of(s, buffer).Numbers["waiting"] > 0 && of(s, sender).Message != "" && of(s, podTailer).Numbers["lines"] == 1
	})
	s := status()
	require.Equal(t, int64(64<<20), s.Disk)
	require.Equal(t, "1.2.3", s.Version)
	code, _ := get(t, client(o.Socket), "/api/v1/query?query=up")
	require.Equal(t, http.StatusNotFound, code, "it is no store")

	// A second one is refused, and so is a store in its folder.
	var held *datadir.HeldError
	second := *o
	second.Socket = filepath.Join(dir, "s2")
	require.ErrorAs(t, Collect(t.Context(), &second, "", discard()), &held)

	stop()
	write(filepath.Join(pod, "0.log"), cri("two"))
	stop = start()
	defer stop()
	r.away.Store(false)
	eventually(t, "all lines are sent", func() bool {
		return r.has(t, "pods", "one", "two") && r.has(t, "polymesh", line)
	})
	eventually(t, "nothing waits", func() bool {
		s := status()
		return of(s, buffer).Numbers["waiting"] == 0 && of(s, sender).Message == "" && of(s, sender).Numbers["pushed"] > 0
	})
	node := r.in.Nodes()[0]
	require.Equal(t, "n2", node.Name)
	require.Zero(t, node.Rejected, node.Reason)
	require.Greater(t, node.Samples, int64(50), "the machine's own numbers")
	require.Equal(t, "system:node:n2", *r.name.Load())
	entries, err := os.ReadDir(o.DataDir)
	require.NoError(t, err)
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	require.Equal(t, []string{"buffer", "lock", "meta"}, names)
}
