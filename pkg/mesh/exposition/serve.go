package exposition

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"regexp"
	"strings"
	"time"

	"polymesh.dev/polymesh/pkg/mesh/workload"
)

// Socket is where the agent serves the metrics, and where Envoy's bootstrap forwards scrapes to (build/images adds it
// to Istio's template). It is relative to the working directory of both, like all of Istio's paths in a proxy.
const Socket = "./etc/istio/proxy/prometheus.sock"

// path is the path of the metrics in Envoy's admin interface.
const path = "/stats/prometheus"

// Serve serves the rewritten metrics of the Envoy with the admin interface at admin (host:port) on a Unix socket, until ctx
// ends. self is the workload of this Envoy.
func Serve(ctx context.Context, socket, admin string, self workload.Workload) error {
	if err := os.Remove(socket); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove the socket of a previous run: %w", err)
	}
	listener, err := net.Listen("unix", socket)
	if err != nil {
		return fmt.Errorf("listen for Prometheus scrapes: %w", err)
	}
	// No compression on this hop: Envoy's listener compresses for clients that accept it.
	client := &http.Client{Transport: &http.Transport{DisableCompression: true, MaxIdleConns: 1, IdleConnTimeout: time.Minute}}
	server := &http.Server{Handler: Handler(client, admin, self), ReadHeaderTimeout: 10 * time.Second}
	defer context.AfterFunc(ctx, func() { server.Close() })()
	if err := server.Serve(listener); ctx.Err() == nil {
		return fmt.Errorf("serve Prometheus: %w", err)
	}
	return nil
}

// Handler serves the rewritten metrics of the Envoy with the admin interface at admin, fetched with client, and counts the
// connections that Envoy logs.
func Handler(client *http.Client, admin string, self workload.Workload) http.Handler {
	connections := NewConnections()
	mux := http.NewServeMux()
	mux.Handle("POST "+ConnectionsPath, connections)
	mux.HandleFunc("GET "+path, func(w http.ResponseWriter, r *http.Request) {
		forward(w, r, client, admin, connections, self)
	})
	return mux
}

func forward(w http.ResponseWriter, r *http.Request, client *http.Client, admin string, connections *Connections, self workload.Workload) {
	wanted, err := regexp.Compile(r.URL.Query().Get("filter")) // the same syntax as Envoy's
	if err != nil {
		http.Error(w, "filter: "+err.Error(), http.StatusBadRequest)
		return
	}
	from := url.URL{Scheme: "http", Host: admin, Path: path, RawQuery: r.URL.RawQuery}
	request, err := http.NewRequestWithContext(r.Context(), http.MethodGet, from.String(), nil)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	response, err := client.Do(request)
	if err != nil {
		http.Error(w, "Envoy's admin interface does not respond: "+err.Error(), http.StatusServiceUnavailable)
		return
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		http.Error(w, "Envoy's admin interface returned "+response.Status, http.StatusBadGateway)
		return
	}
	w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	text := io.MultiReader(response.Body, strings.NewReader(connections.text(wanted.MatchString)))
	if err := Rewrite(w, text, self); err != nil {
		// A part is already sent. Abort, so that a truncated response is not taken for a complete one.
		panic(http.ErrAbortHandler)
	}
}
