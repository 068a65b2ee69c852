package ingest

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"polymesh.dev/polymesh/observe/logstore"
	"polymesh.dev/polymesh/observe/podlogs"
	"polymesh.dev/polymesh/observe/push"
	"polymesh.dev/polymesh/observe/rowstore"
	"polymesh.dev/polymesh/observe/rowstore/rowstoretest"
)

// The child processes of TestKilled are the test binary itself, in a role, until they are killed.
const (
	roleVar    = "INGEST_TEST_ROLE"
	dirVar     = "INGEST_TEST_DIR"
	addressVar = "INGEST_TEST_ADDRESS"
)

func TestMain(m *testing.M) {
	rowstoretest.LimitMemory()
	var err error
	switch os.Getenv(roleVar) {
	case "":
		os.Exit(m.Run())
	case "store":
		err = storeForever(os.Getenv(dirVar), os.Getenv(addressVar))
	case "collector":
		err = collectForever(os.Getenv(dirVar), os.Getenv(addressVar))
	}
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}

// onePod is the pod of the tests.
var onePod = Pod{"shop", "api-7d9f8b6c5-x2x4z", "n2"}

const onePodUID = "6b1c1b2e-0c2a-4f57-8f43-0f4f5d8d2a11"

func optionsFor(dir string, logs *logstore.Store) Options {
	return Options{
		Node: "n1", Logs: logs, State: filepath.Join(dir, "nodes.json"), Retention: 7 * 24 * time.Hour, Job: "node",
		Pod: func(uid string) (Pod, bool, bool) {
			if uid == onePodUID {
				return onePod, true, true
			}
			return Pod{}, false, true
		},
		Workload: func(string, string) (string, bool) { return "api", true }, Log: slog.New(slog.DiscardHandler),
	}
}

// storeForever is a store behind an API server that authenticates nodes.
func storeForever(dir, address string) error {
	logs, err := logstore.Open(logstore.Options{Store: rowstore.Options{Dir: filepath.Join(dir, "logs")}, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		return err
	}
	in, err := New(optionsFor(dir, logs))
	if err != nil {
		return err
	}
	go func() { _ = in.Run(context.Background()) }()
	mux := http.NewServeMux()
	mux.HandleFunc("/push", func(w http.ResponseWriter, r *http.Request) {
		name, _ := strings.CutPrefix(r.TLS.PeerCertificates[0].Subject.CommonName, "system:node:")
		r.Header.Set(NodeHeader, name)
		in.ServeHTTP(w, r)
	})
	mux.HandleFunc("/stored", func(w http.ResponseWriter, r *http.Request) {
		var all []logstore.Entry
		err := logs.Select(r.Context(), logstore.Selector{Matchers: []logstore.Matcher{{Name: "node", Value: "n2"}}}, func(e logstore.Entry) bool {
			all = append(all, e)
			return true
		})
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		_ = json.NewEncoder(w).Encode(stored{all, in.Nodes()})
	})
	ca, err := os.ReadFile(filepath.Join(dir, "ca.crt"))
	if err != nil {
		return err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	s := &http.Server{Addr: address, Handler: mux, TLSConfig: &tls.Config{ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: roots}}
	return s.ListenAndServeTLS(filepath.Join(dir, "server.pem"), filepath.Join(dir, "server.pem"))
}

// stored is what a store of the tests has.
type stored struct {
	Entries []logstore.Entry
	Nodes   []NodeStatus
}

// collectForever is a node's collector.
func collectForever(dir, address string) error {
	b, err := push.Open(push.Options{Dir: filepath.Join(dir, "buffer"), MaxBytes: 64 << 20, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		return err
	}
	t := podlogs.New(podlogs.Options{Root: filepath.Join(dir, "pods"), Node: "n2", Store: b, State: filepath.Join(dir, "places"), LinesPerSecond: 100_000, Log: slog.New(slog.DiscardHandler)})
	s := push.NewSender(push.SenderOptions{
		URL: "https://" + address + "/push", CA: filepath.Join(dir, "ca.crt"), Cert: filepath.Join(dir, "node.pem"), Key: filepath.Join(dir, "node.pem"), Buffer: b, Log: slog.New(slog.DiscardHandler),
	})
	go func() { _ = s.Run(context.Background()) }()
	return t.Run(context.Background())
}
