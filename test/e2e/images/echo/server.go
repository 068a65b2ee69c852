package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	testpb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
)

// reply is what the server reports about a request.
type reply struct {
	Method  string              `json:"method"`
	Path    string              `json:"path"`
	Host    string              `json:"host"`
	Remote  string              `json:"remote"`
	Headers map[string][]string `json:"headers"`
	Body    string              `json:"body,omitempty"`
	// Version is what the pod's manifest says in VERSION, Pod is the pod's name.
	Version string `json:"version"`
	Pod     string `json:"pod"`
	// Attempt counts the requests with the same id that have reached this pod.
	Attempt int `json:"attempt,omitempty"`
	// Called is the answer of the server that /call has called.
	Called json.RawMessage `json:"called,omitempty"`
}

// server answers in three protocols. The HTTP paths, any other path being echoed:
//
//	/healthz            200, or 503 after /fail and until /ok: what a probe asks
//	/alloc?mb=N         takes N MiB of memory and keeps it: what a limit is for
//	/exit?code=N        ends the process
//	/file?path=P        reads a file; a POST writes its body there
//	/set?status=S&delay=D  lets this pod echo with status S, and D late; /set alone puts that back
//	/call?url=U         calls another echo, passes on the headers of a trace, and reports what that one has answered
//
// A query can say status and delay for its own request too, and with first=N&id=I for the first N requests with this id.
type server struct {
	version, pod string
	log          bool // every request that is echoed
	failing      atomic.Bool
	health       *health.Server

	mu       sync.Mutex
	kept     [][]byte
	usual    manner
	attempts map[string]int

	testpb.UnimplementedTestServiceServer
}

func newServer() *server {
	pod, err := os.Hostname()
	if err != nil {
		pod = "unknown"
	}
	return &server{
		version: os.Getenv("VERSION"), pod: pod, health: health.NewServer(),
		usual: manner{status: http.StatusOK}, attempts: map[string]int{},
	}
}

// serve listens until ctx ends, then lets the requests under way finish.
func serve(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("serve", flag.ContinueOnError)
	httpAddress := flags.String("http", ":8080", "address of HTTP")
	grpcAddress := flags.String("grpc", ":9090", "address of gRPC")
	tcpAddress := flags.String("tcp", ":9000", "address of TCP")
	logging := flags.Bool("log", false, "log method, host and path of every request that is echoed")
	if err := flags.Parse(args); err != nil {
		return err
	}

	s := newServer()
	s.log = *logging
	web := &http.Server{Addr: *httpAddress, Handler: s.handler(), ReadHeaderTimeout: 10 * time.Second}
	rpc := grpc.NewServer()
	healthpb.RegisterHealthServer(rpc, s.health)
	testpb.RegisterTestServiceServer(rpc, s)
	rpcListener, err := net.Listen("tcp", *grpcAddress)
	if err != nil {
		return fmt.Errorf("listen for gRPC: %w", err)
	}
	tcpListener, err := net.Listen("tcp", *tcpAddress)
	if err != nil {
		return fmt.Errorf("listen for TCP: %w", err)
	}

	ended := make(chan error, 3)
	go func() { ended <- web.ListenAndServe() }()
	go func() { ended <- rpc.Serve(rpcListener) }()
	go func() { ended <- echoTCP(tcpListener) }()
	log.Printf("HTTP on %s, gRPC on %s, TCP on %s", *httpAddress, *grpcAddress, *tcpAddress)
	select {
	case err := <-ended:
		return err
	case <-ctx.Done():
	}
	grace, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	return errors.Join(web.Shutdown(grace), tcpListener.Close())
}

func (s *server) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/healthz", func(w http.ResponseWriter, _ *http.Request) {
		if s.failing.Load() {
			http.Error(w, "failing", http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
	})
	mux.HandleFunc("/fail", func(w http.ResponseWriter, _ *http.Request) { s.setFailing(w, true) })
	mux.HandleFunc("/ok", func(w http.ResponseWriter, _ *http.Request) { s.setFailing(w, false) })
	mux.HandleFunc("/alloc", s.alloc)
	mux.HandleFunc("/exit", func(w http.ResponseWriter, r *http.Request) {
		if code, ok := number(w, r, "code"); ok {
			os.Exit(code)
		}
	})
	mux.HandleFunc("/file", file)
	mux.HandleFunc("/set", s.set)
	mux.HandleFunc("/call", s.call)
	mux.HandleFunc("/", s.echo)
	return mux
}

func (s *server) echo(w http.ResponseWriter, r *http.Request) {
	if s.log {
		log.Printf("%s %s%s", r.Method, r.Host, r.URL.RequestURI())
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, 1<<20))
	if err != nil {
		http.Error(w, err.Error(), http.StatusRequestEntityTooLarge)
		return
	}
	m, attempt, err := s.manner(r.URL.Query())
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	select {
	case <-r.Context().Done():
		return // no one waits for the answer any more
	case <-time.After(m.delay):
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(m.status)
	s.writeReply(w, reply{
		Method: r.Method, Path: r.URL.RequestURI(), Host: r.Host, Remote: r.RemoteAddr, Headers: r.Header, Body: string(body),
		Attempt: attempt,
	})
}

// traceHeaders are those that an app has to pass on so that its calls belong to the trace of the request that it serves
// (https://istio.io/latest/docs/tasks/observability/distributed-tracing/overview/): the id that decides about sampling,
// W3C's, and B3's in both forms.
var traceHeaders = []string{
	"x-request-id", "traceparent", "tracestate", "baggage",
	"b3", "x-b3-traceid", "x-b3-spanid", "x-b3-parentspanid", "x-b3-sampled", "x-b3-flags",
}

func (s *server) call(w http.ResponseWriter, r *http.Request) {
	request, err := http.NewRequestWithContext(r.Context(), http.MethodGet, r.URL.Query().Get("url"), nil)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	for _, name := range traceHeaders {
		if value := r.Header.Get(name); value != "" {
			request.Header.Set(name, value)
		}
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadGateway)
		return
	}
	defer response.Body.Close()
	answer, err := io.ReadAll(response.Body)
	if err != nil || response.StatusCode != http.StatusOK || !json.Valid(answer) {
		http.Error(w, fmt.Sprintf("%s answered %s: %v %s", request.URL, response.Status, err, answer), http.StatusBadGateway)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	s.writeReply(w, reply{
		Method: r.Method, Path: r.URL.RequestURI(), Host: r.Host, Remote: r.RemoteAddr, Headers: r.Header, Called: answer,
	})
}

// manner is how a request is echoed.
type manner struct {
	status int
	delay  time.Duration
}

// manner defines how to echo a request with this query, and as which attempt with its id it counts.
func (s *server) manner(query url.Values) (manner, int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	m, err := s.usual.with(query)
	if err != nil || !query.Has("id") {
		return m, 0, err
	}
	first, err := strconv.Atoi(query.Get("first"))
	if err != nil {
		return m, 0, errors.New("an id needs first, a number")
	}
	s.attempts[query.Get("id")]++
	attempt := s.attempts[query.Get("id")]
	if attempt > first {
		m = s.usual
	}
	return m, attempt, nil
}

func (m manner) with(query url.Values) (manner, error) {
	if text := query.Get("status"); text != "" {
		status, err := strconv.Atoi(text)
		if err != nil || status < 200 || status > 599 {
			return m, errors.New("status must be a number from 200 to 599")
		}
		m.status = status
	}
	if text := query.Get("delay"); text != "" {
		delay, err := time.ParseDuration(text)
		if err != nil {
			return m, errors.New("delay must be a duration such as 2s")
		}
		m.delay = delay
	}
	return m, nil
}

func (s *server) set(w http.ResponseWriter, r *http.Request) {
	m, err := manner{status: http.StatusOK}.with(r.URL.Query())
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	s.mu.Lock()
	s.usual = m
	s.mu.Unlock()
	fmt.Fprintf(w, "%s answers %d after %s\n", s.pod, m.status, m.delay)
}

func (s *server) writeReply(w io.Writer, r reply) {
	r.Version, r.Pod = s.version, s.pod
	if err := json.NewEncoder(w).Encode(r); err != nil {
		log.Printf("write the reply: %v", err)
	}
}

func (s *server) setFailing(w io.Writer, failing bool) {
	s.failing.Store(failing)
	status := healthpb.HealthCheckResponse_SERVING
	if failing {
		status = healthpb.HealthCheckResponse_NOT_SERVING
	}
	s.health.SetServingStatus("", status)
	fmt.Fprintln(w, status)
}

func (s *server) alloc(w http.ResponseWriter, r *http.Request) {
	mb, ok := number(w, r, "mb")
	if !ok {
		return
	}
	memory := make([]byte, mb<<20)
	for i := range memory {
		memory[i] = byte(i) // untouched memory counts for nothing
	}
	s.mu.Lock()
	s.kept = append(s.kept, memory)
	s.mu.Unlock()
	fmt.Fprintf(w, "took %d MiB\n", mb)
}

// UnaryCall answers with the request's metadata as JSON: the gRPC side of echo.
func (s *server) UnaryCall(ctx context.Context, _ *testpb.SimpleRequest) (*testpb.SimpleResponse, error) {
	headers, _ := metadata.FromIncomingContext(ctx)
	said := reply{Method: "UnaryCall", Headers: headers, Version: s.version, Pod: s.pod}
	if from, ok := peer.FromContext(ctx); ok {
		said.Remote = from.Addr.String()
	}
	body, err := json.Marshal(said)
	if err != nil {
		return nil, err
	}
	return &testpb.SimpleResponse{Payload: &testpb.Payload{Body: body}}, nil
}

func file(w http.ResponseWriter, r *http.Request) {
	path := r.URL.Query().Get("path")
	if r.Method == http.MethodPost {
		body, err := io.ReadAll(r.Body)
		if err == nil {
			err = os.WriteFile(path, body, 0o644)
		}
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
		}
		return
	}
	content, err := os.ReadFile(path)
	if err != nil {
		http.Error(w, err.Error(), http.StatusNotFound)
		return
	}
	if _, err := w.Write(content); err != nil {
		log.Printf("write %s: %v", path, err)
	}
}

func number(w http.ResponseWriter, r *http.Request, name string) (int, bool) {
	n, err := strconv.Atoi(r.URL.Query().Get(name))
	if err != nil || n < 0 {
		http.Error(w, fmt.Sprintf("%s must be a number", name), http.StatusBadRequest)
		return 0, false
	}
	return n, true
}

// echoTCP sends back what it gets, on every connection, until the listener is closed.
func echoTCP(listener net.Listener) error {
	for {
		connection, err := listener.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer connection.Close()
			if _, err := io.Copy(connection, connection); err != nil {
				log.Printf("TCP from %s: %v", connection.RemoteAddr(), err)
			}
		}()
	}
}
