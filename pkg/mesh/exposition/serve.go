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

// Socket is where the agent serves the text and where Envoy's bootstrap sends those who ask for it (build/images puts it
// into Istio's template). It is relative to the working directory of both, as all of Istio's paths in a proxy are.
const Socket = "./etc/istio/proxy/prometheus.sock"

// path is where Envoy's admin interface has the text.
const path = "/stats/prometheus"

// Serve answers on a UNIX socket with the rewritten text of the Envoy whose admin interface is at admin (host:port), beside the
// workload self, until ctx ends.
func Serve(ctx context.Context, socket, admin string, self workload.Workload) error {
	if err := os.Remove(socket); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove the socket of an earlier run: %w", err)
	}
	listener, err := net.Listen("unix", socket)
	if err != nil {
		return fmt.Errorf("listen for requests of Prometheus: %w", err)
	}
	// No compression on the way: Envoy's listener compresses for who wants it.
	client := &http.Client{Transport: &http.Transport{DisableCompression: true, MaxIdleConns: 1, IdleConnTimeout: time.Minute}}
	server := &http.Server{Handler: Handler(client, admin, self), ReadHeaderTimeout: 10 * time.Second}
	defer context.AfterFunc(ctx, func() { server.Close() })()
	if err := server.Serve(listener); ctx.Err() == nil {
		return fmt.Errorf("serve Prometheus: %w", err)
	}
	return nil
}

// Handler answers with the rewritten text of the Envoy whose admin interface is at admin, asked by way of the client, and counts the
// connections that Envoy tells it of.
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
	wanted, err := regexp.Compile(r.URL.Query().Get("filter")) // Envoy's own syntax, too
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
		http.Error(w, "Envoy's admin interface does not answer: "+err.Error(), http.StatusServiceUnavailable)
		return
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		http.Error(w, "Envoy's admin interface says "+response.Status, http.StatusBadGateway)
		return
	}
	w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	text := io.MultiReader(response.Body, strings.NewReader(connections.text(wanted.MatchString)))
	if err := Rewrite(w, text, self); err != nil {
		// Part of it is sent by now; a broken answer is not taken for a whole one.
		panic(http.ErrAbortHandler)
	}
}
