// Package receive accepts what apps and proxies send: spans by OTLP (gRPC and HTTP, protobuf and JSON), in Zipkin's format and in Jaeger's, log records
// and metrics by OTLP.
//
// It owns these protocols: their encodings, answers and limits. Spans go to tracestore, log records to logstore, metrics, undecoded, to a handler that
// decodes them. Package guard checks everything before it is decoded, and the memory for all requests is bounded, however
// many clients send.
package receive

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"time"

	"golang.org/x/sync/semaphore"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"polymesh.dev/polymesh/observe/logstore"
	"polymesh.dev/polymesh/observe/rowstore"
	"polymesh.dev/polymesh/observe/tracestore"
)

const (
	// MaxMessage is the largest request in bytes, compressed or not. It is the limit of OpenTelemetry's collector for gRPC.
	MaxMessage = 4 << 20
	// arriving is how many bytes of all requests may be in memory while they arrive.
	arriving = 16 << 20
	// readers is how many complete requests are unpacked and decoded at a time. Others wait up to patience.
	readers  = 6
	patience = 5 * time.Second
	// readTime is how long a request may take to arrive.
	readTime = 10 * time.Second
	// decoding bounds the memory for requests that are decoded at the same time, as estimated by guard. A larger request is decoded alone.
	decoding = 16 << 20
	// batch is how many spans are stored at a time: a request may have many, and each takes more memory than its encoding.
	batch = 256
)

// Options say where signals go. Others are answered with "not implemented".
type Options struct {
	// Spans stores spans, as tracestore.Store.Append does.
	Spans func([]tracestore.Span) (tracestore.Result, error)
	// Logs stores log records, as logstore.Store.Append does.
	Logs func([]logstore.Entry) error
	// Metrics takes OTLP's requests for metrics, POST /v1/metrics.
	Metrics http.Handler
	Log     *slog.Logger
}

// Receiver is the protocols' servers. They share the limits on memory.
type Receiver struct {
	opts     Options
	slots    chan struct{}
	arriving *semaphore.Weighted
	decoding *semaphore.Weighted
}

// New returns the receiver.
func New(o Options) *Receiver {
	return &Receiver{opts: o, slots: make(chan struct{}, readers), arriving: semaphore.NewWeighted(arriving), decoding: semaphore.NewWeighted(decoding)}
}

// errBusy is the answer when all slots are taken. Clients retry.
var errBusy = status.Error(codes.Unavailable, "too many requests are being read; send it again")

// slot waits until another request may be unpacked.
func (r *Receiver) slot(ctx context.Context) (func(), error) {
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case r.slots <- struct{}{}:
		return func() { <-r.slots }, nil
	case <-ctx.Done():
		return nil, status.FromContextError(ctx.Err()).Err()
	case <-timer.C:
		return nil, errBusy
	}
}

// room waits until there is memory to decode a request.
func (r *Receiver) room(ctx context.Context, bytes int) (func(), error) {
	n := int64(min(bytes, decoding))
	if err := r.decoding.Acquire(ctx, n); err != nil {
		return nil, status.FromContextError(err).Err()
	}
	return func() { r.decoding.Release(n) }, nil
}

// refused is the answer to a message that a retry would not help.
func refused(err error) error { return status.Error(codes.InvalidArgument, err.Error()) }

// outcome is how much of a request was not stored, and why.
type outcome struct {
	rejected int64
	message  string
}

// spanStore stores the spans of a request in batches.
type spanStore struct {
	r       *Receiver
	waiting []tracestore.Span
	outcome outcome
}

func (s *spanStore) add(one tracestore.Span) error {
	if s.waiting == nil {
		s.waiting = make([]tracestore.Span, 0, batch)
	}
	s.waiting = append(s.waiting, one)
	if len(s.waiting) < batch {
		return nil
	}
	return s.flush()
}

// flush stores the current batch.
func (s *spanStore) flush() error {
	if len(s.waiting) == 0 {
		return nil
	}
	result, err := s.r.opts.Spans(s.waiting)
	clear(s.waiting)
	s.waiting = s.waiting[:0]
	if err != nil {
		return s.r.unavailable("spans", err)
	}
	s.outcome.rejected += int64(result.Sampled + result.Refused)
	s.outcome.message = cmp.Or(s.outcome.message, result.Reason)
	return nil
}

// storeLogs stores log records and returns what to report to the client.
func (r *Receiver) storeLogs(entries []logstore.Entry) (outcome, error) {
	if len(entries) == 0 {
		return outcome{}, nil
	}
	err := r.opts.Logs(entries)
	var some *rowstore.RejectedError
	if errors.As(err, &some) {
		return outcome{int64(some.Rows), some.Reason}, nil
	}
	if err != nil {
		return outcome{}, r.unavailable("log records", err)
	}
	return outcome{}, nil
}

// unavailable is the answer when nothing can be stored now. Clients retry later.
func (r *Receiver) unavailable(what string, err error) error {
	r.opts.Log.Debug("what was received is not stored", "what", what, "error", err)
	return status.Error(codes.Unavailable, fmt.Sprintf("%s cannot be stored now", what))
}
