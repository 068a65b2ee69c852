// service-name answers at /service-name, and asks another service for each request where it is told of one.
package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"
)

const (
	serviceName = "service-name"
	callTimeout = 10 * time.Second
)

func main() {
	slog.SetDefault(slog.New(logHandler(os.Stdout)))
	port := cmp.Or(os.Getenv("PORT"), "8080")
	s := &service{
		message: cmp.Or(os.Getenv("MESSAGE"), "hello"),
		nextURL: os.Getenv("NEXT_URL"),
		client:  &http.Client{Timeout: callTimeout},
	}

	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	slog.Info("listening on port " + port)
	if err := run(ctx, ":"+port, s.handler()); err != nil {
		slog.Error(err.Error())
		os.Exit(1)
	}
	slog.Info("stopped")
}

// run serves until ctx ends, and then finishes the requests that have begun.
func run(ctx context.Context, address string, handler http.Handler) error {
	server := &http.Server{Addr: address, Handler: handler, ReadHeaderTimeout: 10 * time.Second}
	stopped := make(chan error, 1)
	go func() {
		<-ctx.Done()
		slog.Info("shutting down")
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		stopped <- server.Shutdown(ctx)
	}()
	if err := server.ListenAndServe(); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return <-stopped
}

// service is what answers. nextURL is whom it asks for each request; no one if it is empty.
type service struct {
	message string
	nextURL string
	client  *http.Client
}

type answer struct {
	Service string          `json:"service"`
	Message string          `json:"message"`
	Next    json.RawMessage `json:"next,omitempty"`
}

func (s *service) handler() http.Handler {
	observed := http.NewServeMux()
	observed.HandleFunc("GET /service-name", s.answer)

	o := newObserver()
	mux := http.NewServeMux()
	mux.HandleFunc("GET /health", status("healthy"))
	mux.HandleFunc("GET /ready", status("ready"))
	mux.Handle("GET /metrics", o.metrics())
	mux.Handle("/", o.observe(observed))
	return mux
}

func status(text string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		writeJSON(w, http.StatusOK, map[string]string{"status": text})
	}
}

func (s *service) answer(w http.ResponseWriter, r *http.Request) {
	a := answer{Service: serviceName, Message: s.message}
	if s.nextURL != "" {
		next, err := s.next(r)
		if err != nil {
			writeJSON(w, http.StatusBadGateway, map[string]string{"error": fmt.Sprintf("%s asks %s: %v", serviceName, s.nextURL, err)})
			return
		}
		a.Next = next
	}
	writeJSON(w, http.StatusOK, a)
}

// next asks the next service on behalf of a request.
func (s *service) next(r *http.Request) (json.RawMessage, error) {
	request, err := http.NewRequestWithContext(r.Context(), http.MethodGet, s.nextURL, nil)
	if err != nil {
		return nil, err
	}
	passTrace(r.Header, request.Header)
	response, err := s.client.Do(request)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil {
		return nil, err
	}
	if response.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s: %s", response.Status, strings.TrimSpace(string(text)))
	}
	if !json.Valid(text) {
		return nil, fmt.Errorf("the answer is not JSON: %s", text)
	}
	return text, nil
}

func writeJSON(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	// An error means that the client has gone.
	_ = json.NewEncoder(w).Encode(v)
}
