package main

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	"go.opentelemetry.io/otel/trace"
)

type HealthResponse struct {
	Status    string    `json:"status"`
	Timestamp time.Time `json:"timestamp"`
}

type GatewayResponse struct {
	Message string `json:"message"`
	Service string `json:"service"`
}

func healthHandler(w http.ResponseWriter, r *http.Request) {
	response := HealthResponse{
		Status:    "healthy",
		Timestamp: time.Now(),
	}
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(response)
}

func gatewayHandler(w http.ResponseWriter, r *http.Request) {
	response := GatewayResponse{
		Message: "Request processed by Go Gateway",
		Service: "go-service",
	}
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(response)
}

func main() {
	slog.SetDefault(slog.New(logHandler(os.Stdout)))
	port := os.Getenv("PORT")
	if port == "" {
		port = "8080"
	}

	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	tracing, stopTracing, err := newTracing(ctx)
	if err != nil {
		slog.Error(err.Error())
		os.Exit(1)
	}
	slog.Info("Go service starting on port " + port)
	if err := run(ctx, ":"+port, newHandler(os.Getenv("NEXT_URL"), tracing)); err != nil {
		slog.Error(err.Error())
		os.Exit(1)
	}
	last, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if err := stopTracing(last); err != nil {
		slog.Warn("the last spans were not sent: " + err.Error())
	}
	slog.Info("stopped")
}

// newHandler serves the paths. The chain goes on at nextURL, or ends here if that is empty.
func newHandler(nextURL string, tracing trace.TracerProvider) http.Handler {
	observed := http.NewServeMux()
	observed.HandleFunc("/api/v1/gateway", gatewayHandler)
	observed.Handle("GET /api/v1/chain", &chain{nextURL: nextURL, client: &http.Client{Timeout: callTimeout}})

	mux := http.NewServeMux()
	mux.HandleFunc("/health", healthHandler)
	mux.HandleFunc("/ready", healthHandler)
	o := newObserver(tracing)
	mux.Handle("GET /metrics", o.metrics())
	mux.Handle("/", o.observe(observed))
	return mux
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
