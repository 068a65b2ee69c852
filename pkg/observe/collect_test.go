package observe

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"polymesh.dev/polymesh/pkg/layout"
	"polymesh.dev/polymesh/pkg/observe/route"
)

// api is an API server that says whether the cluster has a store.
type api struct {
	status atomic.Int64
	asked  atomic.Int64
	node   route.Node
}

func startAPI(t *testing.T, status int) *api {
	t.Helper()
	a := &api{}
	a.status.Store(int64(status))
	s := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		a.asked.Add(1)
		if r.URL.Path != layout.ObserveIngestPath || r.Method != http.MethodGet {
			http.Error(w, r.Method+" "+r.URL.Path, http.StatusBadRequest)
			return
		}
		w.WriteHeader(int(a.status.Load()))
		fmt.Fprint(w, `{"server":"server-1"}`)
	}))
	t.Cleanup(s.Close)
	dir := t.TempDir()
	key, err := x509.MarshalPKCS8PrivateKey(s.TLS.Certificates[0].PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	cert := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})
	a.node = route.Node{Server: s.URL, CA: filepath.Join(dir, "ca.crt"), Cert: filepath.Join(dir, "node.pem"), Key: filepath.Join(dir, "node.pem")}
	for file, text := range map[string][]byte{a.node.CA: cert, a.node.Cert: append(cert, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})...)} {
		if err := os.WriteFile(file, text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return a
}

func collectorFor(t *testing.T, dir layout.DataDir, n route.Node) *Component {
	t.Helper()
	o := optionsFor(dir)
	o.Collect = &n
	c := New(o)
	c.asks = 10 * time.Millisecond
	if err := c.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Stop(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return c
}

// A node collects while its cluster has a store.
func TestCollector(t *testing.T) {
	t.Setenv("GOMEMLIMIT", "1GiB")
	dir := newDir(t)
	a := startAPI(t, http.StatusForbidden)
	c := collectorFor(t, dir, a.node)
	eventually(t, "the node knows that there is no store", func() bool { return c.Ready(t.Context()) == nil })
	if pid, err := Running(dir); pid != 0 || err != nil || c.Summary() != "the cluster has no store" {
		t.Errorf("process %d, %v, %q", pid, err, c.Summary())
	}

	if err := os.MkdirAll(dir.ObserveCollector("meta"), 0o700); err != nil {
		t.Fatal(err)
	}
	pushed := time.Now().Add(-3 * time.Second).UnixMilli()
	parts := fmt.Sprintf(`[{"name":"buffer","state":"Ready","numbers":{"waiting":3000,"limit":67108864}},{"name":"push","state":"Ready","message":"the store is away","numbers":{"pushed":%d}}]`, pushed)
	if err := os.WriteFile(dir.ObserveCollector("parts"), []byte(parts), 0o600); err != nil {
		t.Fatal(err)
	}
	a.status.Store(http.StatusOK)
	eventually(t, "the collector runs", func() bool {
		return c.PID() != 0 && c.Ready(t.Context()) == nil && strings.Contains(c.Summary(), "wait")
	})
	pid := c.PID()
	if got := c.Summary(); !strings.HasPrefix(got, "to the store on server-1: last sent ") || !strings.HasSuffix(got, "s ago, 3 KiB of 64 MiB wait") {
		t.Errorf("%q", got)
	}
	if notes := strings.Join(c.Notes(t.Context()), "; "); !strings.Contains(notes, "push: the store is away") {
		t.Errorf("notes %q", notes)
	}
	p, err := collectorOf(dir).find()
	if err != nil || p == nil || p.pid != pid {
		t.Fatalf("%+v, %v", p, err)
	}
	line := strings.Join(p.args, " ")
	for _, want := range []string{
		"--data-dir=" + dir.Agent("observe") + " ", "--push-to=" + a.node.Server + "/polymesh/v1/observe-ingest", "--push-ca=" + a.node.CA, "--push-cert=" + a.node.Cert, "--push-key=" + a.node.Key,
		"--node-name=node-1", "--log-file=containerd=/c.log", "--socket=" + dir.Run("observe-collector.sock"),
	} {
		if !strings.Contains(line+" ", want) {
			t.Errorf("%q is not in %q", want, line)
		}
	}
	for _, no := range []string{"kubeconfig", "kubelet", "retention", "cluster-sockets", "disk"} {
		if strings.Contains(line, "--"+no) {
			t.Errorf("--%s is in %q", no, line)
		}
	}
	if environment := read(t, fmt.Sprintf("/proc/%d/environ", pid)); strings.Contains(environment, "GOMEMLIMIT") {
		t.Errorf("the server's limit of the heap is in %q", environment)
	}
	// A store of the same data dir is another process, and is not ended with it.
	if err := EndStore(t.Context(), dir); err != nil {
		t.Error(err)
	}
	if now := c.PID(); now != pid {
		t.Errorf("process %d, want %d", now, pid)
	}

	// No server answers, or one that has just started gives no permission: it continues.
	a.status.Store(http.StatusBadGateway)
	asked := a.asked.Load()
	eventually(t, "the node has asked again", func() bool { return a.asked.Load() > asked+2*absences })
	if now := c.PID(); now != pid {
		t.Errorf("process %d, want %d", now, pid)
	}
	a.status.Store(http.StatusNotFound)
	eventually(t, "the collector ends", func() bool { pid, err := Running(dir); return pid == 0 && err == nil && c.PID() == 0 })
	eventually(t, "nothing is kept", func() bool { _, err := os.Stat(dir.ObserveCollector()); return os.IsNotExist(err) })
	if err := c.Ready(t.Context()); err != nil || c.Summary() != "the cluster has no store" {
		t.Errorf("%v, %q", err, c.Summary())
	}
}

// A node that has collected before goes on though no server answers, after it was started again, too.
func TestCollectorWithoutServers(t *testing.T) {
	dir := newDir(t)
	a := startAPI(t, http.StatusServiceUnavailable)
	c := collectorFor(t, dir, a.node)
	eventually(t, "it says why it waits", func() bool {
		err := c.Ready(t.Context())
		return err != nil && strings.Contains(err.Error(), "503 Service Unavailable")
	})
	if err := c.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(dir.ObserveCollector("meta"), 0o700); err != nil {
		t.Fatal(err)
	}
	c = collectorFor(t, dir, a.node)
	pid := ready(t, c)
	if err := c.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	next := collectorFor(t, dir, a.node)
	if got := ready(t, next); got != pid {
		t.Errorf("the next agent's collector is process %d, want %d", got, pid)
	}
	if running, err := Running(dir); running != pid || err != nil {
		t.Errorf("%d, %v", running, err)
	}
}
