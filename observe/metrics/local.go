package metrics

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"google.golang.org/grpc/test/bufconn"

	"polymesh.dev/polymesh/observe/scrapeconfig"
)

// localTargets connects to the targets of the store's own jobs: to a gatherer in this process through memory, to another program of this machine by its
// UNIX socket, and to everything else by TCP. So they are scraped like any target, with "up" and staleness, and without an open port.
type localTargets struct {
	memory  map[string]*bufconn.Listener
	sockets map[string]string
	servers []*http.Server
	dialer  net.Dialer
}

func newLocalTargets(sources map[string]prometheus.Gatherer, sockets map[string]string, self prometheus.Gatherer) *localTargets {
	l := &localTargets{memory: map[string]*bufconn.Listener{}, sockets: map[string]string{}, dialer: net.Dialer{Timeout: 10 * time.Second}}
	for job, path := range sockets {
		l.sockets[scrapeconfig.LocalAddress(job)] = path
	}
	l.serve(scrapeconfig.JobSelf, self)
	for job, g := range sources {
		l.serve(job, g)
	}
	return l
}

func (l *localTargets) serve(job string, g prometheus.Gatherer) {
	listener := bufconn.Listen(64 << 10)
	l.memory[scrapeconfig.LocalAddress(job)] = listener
	s := &http.Server{Handler: promhttp.HandlerFor(g, promhttp.HandlerOpts{DisableCompression: true}), ReadHeaderTimeout: 10 * time.Second}
	l.servers = append(l.servers, s)
	go func() { _ = s.Serve(listener) }() // until close
}

func (l *localTargets) dial(ctx context.Context, network, address string) (net.Conn, error) {
	if listener, ok := l.memory[address]; ok {
		return listener.DialContext(ctx)
	}
	if path, ok := l.sockets[address]; ok {
		conn, err := l.dialer.DialContext(ctx, "unix", path)
		if err != nil {
			return nil, fmt.Errorf("connect %s: %w", address, err)
		}
		return conn, nil
	}
	return l.dialer.DialContext(ctx, network, address)
}

func (l *localTargets) close() {
	for _, s := range l.servers {
		_ = s.Close()
	}
}
