package server

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/net/netutil"
	"google.golang.org/grpc"
)

// ClusterGID is the group that may connect to the sockets for pods: a number that distributions leave free (Debian policy, section 9.2.2). The
// forwarding pods have this group, and nothing else has it.
const ClusterGID = 60431

// maxConnections is how many connections a socket has at a time.
const maxConnections = 256

// socketGrace is how long requests may continue when the store stops.
const socketGrace = 3 * time.Second

// listen creates a UNIX socket with this mode and group. It replaces the socket of a killed process: the caller holds the
// lock of the data dir. The process's umask keeps others out until the mode is set.
func listen(path string, mode os.FileMode, gid int) (net.Listener, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("replace the socket: %w", err)
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	if gid >= 0 {
		err = os.Chown(path, -1, gid)
	}
	if err == nil {
		err = os.Chmod(path, mode)
	}
	if err != nil {
		l.Close()
		return nil, fmt.Errorf("restrict the socket: %w", err)
	}
	return netutil.LimitListener(l, maxConnections), nil
}

// clusterDir creates the folder of the sockets for pods. It stays when the store ends: pods have it mounted.
func clusterDir(path string) error {
	if err := os.MkdirAll(path, 0o710); err != nil {
		return fmt.Errorf("create the folder of the sockets for pods: %w", err)
	}
	if err := os.Chown(path, -1, ClusterGID); err != nil {
		return fmt.Errorf("restrict the folder of the sockets for pods: %w", err)
	}
	if err := os.Chmod(path, 0o710); err != nil {
		return fmt.Errorf("restrict the folder of the sockets for pods: %w", err)
	}
	return nil
}

// answerer serves a listener: http.Server, grpc.Server.
type answerer interface {
	// Serve returns when Stop is called, or when it cannot continue.
	Serve(net.Listener) error
	// Stop lets requests continue until ctx ends, and ends them then. It returns when no request uses the stores any more.
	Stop(ctx context.Context)
}

// hypertext is an HTTP server with the common limits.
type hypertext struct {
	http.Server
	requests sync.WaitGroup
}

func newHTTP(h http.Handler, log *slog.Logger) *hypertext {
	s := &hypertext{}
	s.Server = http.Server{
		ReadHeaderTimeout: headerTime, IdleTimeout: idleTime, MaxHeaderBytes: maxHeader,
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug),
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			s.requests.Add(1)
			defer s.requests.Done()
			h.ServeHTTP(w, r)
		}),
	}
	return s
}

// Limits of a connection of HTTP/2. The buffers bound how much unread data a client can make the server hold.
const (
	maxCalls         = 16
	callBuffer       = 64 << 10
	connectionBuffer = 128 << 10
)

// newHTTP2 returns a server of HTTP/2 without TLS, as for gRPC.
func newHTTP2(h http.Handler, log *slog.Logger) *hypertext {
	s := newHTTP(h, log)
	s.Protocols = new(http.Protocols)
	s.Protocols.SetUnencryptedHTTP2(true)
	s.HTTP2 = &http.HTTP2Config{
		MaxConcurrentStreams: maxCalls, MaxReceiveBufferPerStream: callBuffer, MaxReceiveBufferPerConnection: connectionBuffer,
		SendPingTimeout: time.Minute, PingTimeout: 20 * time.Second, WriteByteTimeout: 20 * time.Second,
	}
	return s
}

// Serve implements answerer.
func (s *hypertext) Serve(l net.Listener) error {
	if err := s.Server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// Stop implements answerer.
func (s *hypertext) Stop(ctx context.Context) {
	if s.Shutdown(ctx) == nil {
		return
	}
	// Contexts of requests end with their connections, and queries with their contexts.
	s.Close()
	ended := make(chan struct{})
	go func() { s.requests.Wait(); close(ended) }()
	select {
	case <-ended:
	case <-time.After(socketGrace):
	}
}

// remote is a gRPC server.
type remote struct{ *grpc.Server }

// Stop implements answerer.
func (s remote) Stop(ctx context.Context) {
	defer context.AfterFunc(ctx, s.Server.Stop)()
	s.GracefulStop()
}

// endpoint is what is served on one socket.
type endpoint struct {
	path   string
	mode   os.FileMode
	gid    int
	server answerer
}

// serving are endpoints on which requests are answered.
type serving struct {
	endpoints []endpoint
	ended     chan error // what Serve has returned
}

// serve starts to answer on all endpoints, or on none.
func serve(endpoints []endpoint) (*serving, error) {
	var listeners []net.Listener
	for _, e := range endpoints {
		l, err := listen(e.path, e.mode, e.gid)
		if err != nil {
			for _, l := range listeners {
				l.Close()
			}
			return nil, fmt.Errorf("serve on %s: %w", e.path, err)
		}
		listeners = append(listeners, l)
	}
	s := &serving{endpoints, make(chan error, len(endpoints))}
	for i, e := range endpoints {
		go func() {
			if err := e.server.Serve(listeners[i]); err != nil {
				s.ended <- fmt.Errorf("serve on %s: %w", e.path, err)
			}
		}()
	}
	return s, nil
}

// stop ends all of them. Requests may continue for socketGrace.
func (s *serving) stop(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, socketGrace)
	defer cancel()
	var all sync.WaitGroup
	for _, e := range s.endpoints {
		all.Go(func() { e.server.Stop(ctx) })
	}
	all.Wait()
}

// clusterSockets is the component that answers pods.
func clusterSockets(dir string, endpoints func() []endpoint) Component {
	return Component{Name: "cluster-sockets", Start: func(context.Context) (Running, error) {
		if err := clusterDir(dir); err != nil {
			return Running{}, err
		}
		s, err := serve(endpoints())
		if err != nil {
			return Running{}, err
		}
		return Running{
			Run: func(ctx context.Context) error {
				select {
				case err := <-s.ended:
					return err
				case <-ctx.Done():
					return nil
				}
			},
			Stop: func(ctx context.Context) error { s.stop(ctx); return nil },
		}, nil
	}}
}

// clusterSocket is the path of the socket for pods with this name.
func clusterSocket(dir, name string) string { return filepath.Join(dir, name+".sock") }
