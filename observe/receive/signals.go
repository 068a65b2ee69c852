package receive

import (
	"bytes"
	"context"
	"net/http"
	"time"

	"go.opentelemetry.io/collector/pdata/plog/plogotlp"
	"go.opentelemetry.io/collector/pdata/pmetric/pmetricotlp"
	"go.opentelemetry.io/collector/pdata/ptrace/ptraceotlp"
	collectlogs "go.opentelemetry.io/proto/otlp/collector/logs/v1"
	collectmetrics "go.opentelemetry.io/proto/otlp/collector/metrics/v1"
	collect "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"polymesh.dev/polymesh/observe/receive/guard"
)

// signal is one of OTLP's three: traces, logs, metrics.
type signal struct {
	path    string // of HTTP
	service string // of gRPC
	request protoreflect.MessageDescriptor
	// fromJSON returns an empty message that can parse OTLP's JSON, which differs from protobuf's.
	fromJSON func() jsonMessage
	// take stores a message in protobuf's encoding that guard has accepted.
	take   func(ctx context.Context, r *Receiver, message []byte) (outcome, error)
	answer func(outcome) proto.Message
}

// jsonMessage converts JSON to the binary encoding, so that there is only one decoder.
type jsonMessage interface {
	UnmarshalJSON([]byte) error
	MarshalProto() ([]byte, error)
}

// signals returns the signals that the receiver can store.
func (r *Receiver) signals() []signal {
	var out []signal
	if r.opts.Spans != nil {
		out = append(out, signal{
			path: "/v1/traces", service: "opentelemetry.proto.collector.trace.v1.TraceService",
			request:  (*collect.ExportTraceServiceRequest)(nil).ProtoReflect().Descriptor(),
			fromJSON: func() jsonMessage { return ptraceotlp.NewExportRequest() },
			take:     takeTraces,
			answer: func(o outcome) proto.Message {
				answer := &collect.ExportTraceServiceResponse{}
				if o != (outcome{}) {
					answer.PartialSuccess = &collect.ExportTracePartialSuccess{RejectedSpans: o.rejected, ErrorMessage: o.message}
				}
				return answer
			},
		})
	}
	if r.opts.Logs != nil {
		out = append(out, signal{
			path: "/v1/logs", service: "opentelemetry.proto.collector.logs.v1.LogsService",
			request:  (*collectlogs.ExportLogsServiceRequest)(nil).ProtoReflect().Descriptor(),
			fromJSON: func() jsonMessage { return plogotlp.NewExportRequest() },
			take:     takeLogs,
			answer: func(o outcome) proto.Message {
				answer := &collectlogs.ExportLogsServiceResponse{}
				if o != (outcome{}) {
					answer.PartialSuccess = &collectlogs.ExportLogsPartialSuccess{RejectedLogRecords: o.rejected, ErrorMessage: o.message}
				}
				return answer
			},
		})
	}
	if r.opts.Metrics != nil {
		out = append(out, signal{
			path: "/v1/metrics", service: "opentelemetry.proto.collector.metrics.v1.MetricsService",
			request:  (*collectmetrics.ExportMetricsServiceRequest)(nil).ProtoReflect().Descriptor(),
			fromJSON: func() jsonMessage { return pmetricotlp.NewExportRequest() },
			take:     takeMetrics,
			answer:   func(outcome) proto.Message { return &collectmetrics.ExportMetricsServiceResponse{} },
		})
	}
	return out
}

// export handles a message in protobuf's encoding.
func (r *Receiver) export(ctx context.Context, s signal, message []byte) (proto.Message, error) {
	memory, err := guard.Proto(s.request, message, guard.OTLP)
	if err != nil {
		return nil, refused(err)
	}
	release, err := r.room(ctx, memory+2*len(message))
	if err != nil {
		return nil, err
	}
	defer release()
	o, err := s.take(ctx, r, message)
	if err != nil {
		return nil, err
	}
	return s.answer(o), nil
}

// exportJSON handles a message in OTLP's JSON.
func (r *Receiver) exportJSON(ctx context.Context, s signal, text []byte) (proto.Message, error) {
	memory, err := guard.JSON(text, guard.OTLP)
	if err != nil {
		return nil, refused(err)
	}
	release, err := r.room(ctx, memory+2*len(text))
	if err != nil {
		return nil, err
	}
	message, err := toProto(s.fromJSON(), text)
	release()
	if err != nil {
		return nil, refused(err)
	}
	return r.export(ctx, s, message)
}

func toProto(m jsonMessage, text []byte) ([]byte, error) {
	if err := m.UnmarshalJSON(text); err != nil {
		return nil, err
	}
	return m.MarshalProto()
}

// decode decodes a message that guard has accepted.
func decode(message []byte, into proto.Message) error {
	if err := (proto.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(message, into); err != nil {
		return refused(err)
	}
	return nil
}

func takeTraces(_ context.Context, r *Receiver, message []byte) (outcome, error) {
	req := &collect.ExportTraceServiceRequest{}
	if err := decode(message, req); err != nil {
		return outcome{}, err
	}
	store := spanStore{r: r}
	if err := eachSpan(req, store.add); err != nil {
		return outcome{}, err
	}
	err := store.flush()
	return store.outcome, err
}

func takeLogs(_ context.Context, r *Receiver, message []byte) (outcome, error) {
	req := &collectlogs.ExportLogsServiceRequest{}
	if err := decode(message, req); err != nil {
		return outcome{}, err
	}
	return r.storeLogs(entries(req, time.Now()))
}

// takeMetrics passes a message on to the handler for metrics.
func takeMetrics(ctx context.Context, r *Receiver, message []byte) (outcome, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "/v1/metrics", bytes.NewReader(message))
	if err != nil {
		return outcome{}, refused(err)
	}
	req.Header.Set("Content-Type", protobufType)
	answer := &answered{header: http.Header{}}
	r.opts.Metrics.ServeHTTP(answer, req)
	switch {
	case answer.code < 300:
		return outcome{}, nil
	case answer.code >= 500 || answer.code == http.StatusTooManyRequests:
		return outcome{}, status.Error(codes.Unavailable, answer.text.String())
	}
	return outcome{}, status.Error(codes.InvalidArgument, answer.text.String())
}

// answered is an HTTP answer in memory.
type answered struct {
	header http.Header
	code   int
	text   bytes.Buffer
}

func (a *answered) Header() http.Header { return a.header }

func (a *answered) WriteHeader(code int) {
	if a.code == 0 {
		a.code = code
	}
}

func (a *answered) Write(b []byte) (int, error) {
	a.WriteHeader(http.StatusOK)
	const enough = 1 << 10
	if room := enough - a.text.Len(); room > 0 {
		a.text.Write(b[:min(len(b), room)])
	}
	return len(b), nil
}
