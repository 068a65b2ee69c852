package jaeger

import (
	"cmp"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/jaegertracing/jaeger-idl/model/v1"
	"github.com/jaegertracing/jaeger-idl/proto-gen/api_v2"
	"golang.org/x/sync/semaphore"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"

	"polymesh.dev/polymesh/observe/tracestore"
)

const (
	// chunk is how many spans a message has, as in Jaeger.
	chunk = 10
	// questions is how many calls of all connections are answered at a time. Others wait up to patience.
	questions = 4
	patience  = 10 * time.Second
)

// GRPC returns a server of jaeger.api_v2.QueryService, which Kiali uses.
func GRPC(o Options) *grpc.Server {
	q := &queryService{s: &server{o}, turns: semaphore.NewWeighted(questions)}
	srv := grpc.NewServer(
		grpc.UnaryInterceptor(q.unary),
		grpc.ForceServerCodecV2(codec{}),
		grpc.MaxRecvMsgSize(64<<10), // questions are short
		grpc.MaxConcurrentStreams(16),
		grpc.MaxHeaderListSize(16<<10),
		grpc.ConnectionTimeout(10*time.Second),
		grpc.InitialWindowSize(64<<10),
		grpc.InitialConnWindowSize(64<<10),
		grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionIdle: 5 * time.Minute, Time: time.Minute, Timeout: 20 * time.Second}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}),
	)
	api_v2.RegisterQueryServiceServer(srv, q)
	return srv
}

type queryService struct {
	api_v2.UnimplementedQueryServiceServer
	s     *server
	turns *semaphore.Weighted
}

// turn waits until another call may be answered, and limits its time. It is only for calls with a complete request: a client that sends none
// does not take a slot.
func (q *queryService) turn(ctx context.Context) (context.Context, func(), error) {
	waiting, stop := context.WithTimeout(ctx, patience)
	defer stop()
	if err := q.turns.Acquire(waiting, 1); err != nil {
		return nil, nil, status.Error(codes.Unavailable, "too many questions at the same time: ask again later")
	}
	ctx, cancel := context.WithTimeout(ctx, callTime)
	return ctx, func() { cancel(); q.turns.Release(1) }, nil
}

func (q *queryService) unary(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	ctx, release, err := q.turn(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	return handler(ctx, req)
}

// GetTrace implements api_v2.QueryServiceServer.
func (q *queryService) GetTrace(req *api_v2.GetTraceRequest, out api_v2.QueryService_GetTraceServer) error {
	ctx, release, err := q.turn(out.Context())
	if err != nil {
		return err
	}
	defer release()
	t, err := q.s.Store.Trace(ctx, req.TraceID.String())
	if err != nil {
		return q.failed(err)
	}
	return send(ctx, out, &t)
}

// FindTraces implements api_v2.QueryServiceServer.
func (q *queryService) FindTraces(req *api_v2.FindTracesRequest, out api_v2.QueryService_FindTracesServer) error {
	asked := req.GetQuery()
	if asked == nil {
		return status.Error(codes.InvalidArgument, "missing query")
	}
	query := tracestore.Query{
		Service: asked.ServiceName, Operation: asked.OperationName, Tags: asked.Tags, MinDuration: asked.DurationMin, MaxDuration: asked.DurationMax,
		Limit: cmp.Or(min(int(asked.SearchDepth), tracestore.MaxTraces), defaultLimit),
	}
	// An unset time is in the year 1, or 1970.
	epoch := time.Unix(0, 0)
	if query.Start = time.Now().Add(-lookback); asked.StartTimeMin.After(epoch) {
		query.Start = asked.StartTimeMin
	}
	if asked.StartTimeMax.After(epoch) {
		query.End = asked.StartTimeMax
	}
	ctx, release, err := q.turn(out.Context())
	if err != nil {
		return err
	}
	defer release()
	var failed error
	err = q.s.Store.Walk(ctx, query, func(t tracestore.Trace) bool {
		failed = send(ctx, out, &t)
		return failed == nil
	})
	if err != nil {
		return q.failed(err)
	}
	return failed
}

// GetServices implements api_v2.QueryServiceServer.
func (q *queryService) GetServices(ctx context.Context, _ *api_v2.GetServicesRequest) (*api_v2.GetServicesResponse, error) {
	names, err := q.s.Store.Services(ctx, time.Time{}, time.Time{})
	if err != nil {
		return nil, q.failed(err)
	}
	return &api_v2.GetServicesResponse{Services: names}, nil
}

// GetOperations implements api_v2.QueryServiceServer.
func (q *queryService) GetOperations(ctx context.Context, req *api_v2.GetOperationsRequest) (*api_v2.GetOperationsResponse, error) {
	all, err := q.s.listOperations(ctx, req.Service, req.SpanKind)
	if err != nil {
		return nil, q.failed(err)
	}
	out := &api_v2.GetOperationsResponse{}
	for _, o := range all {
		out.Operations = append(out.Operations, &api_v2.Operation{Name: o.Name, SpanKind: o.SpanKind})
		if n := len(out.OperationNames); n == 0 || out.OperationNames[n-1] != o.Name {
			out.OperationNames = append(out.OperationNames, o.Name)
		}
	}
	return out, nil
}

// GetDependencies implements api_v2.QueryServiceServer.
func (q *queryService) GetDependencies(ctx context.Context, req *api_v2.GetDependenciesRequest) (*api_v2.GetDependenciesResponse, error) {
	all, err := q.s.Store.Dependencies(ctx, req.StartTime, req.EndTime)
	if err != nil {
		return nil, q.failed(err)
	}
	out := &api_v2.GetDependenciesResponse{}
	for _, d := range all {
		out.Dependencies = append(out.Dependencies, model.DependencyLink{Parent: d.Parent, Child: d.Child, CallCount: d.Calls})
	}
	return out, nil
}

func (q *queryService) failed(err error) error {
	switch {
	case errors.Is(err, tracestore.ErrNotFound):
		return status.Error(codes.NotFound, "trace not found")
	case errors.Is(err, tracestore.ErrQuery):
		return status.Error(codes.InvalidArgument, err.Error())
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return status.FromContextError(err).Err()
	}
	q.s.Log.Warn("a question about traces is not answered", "error", err)
	return status.Error(codes.Internal, err.Error())
}

// send sends a trace in parts. A client that does not read one in time is left.
func send(ctx context.Context, out interface {
	Send(*api_v2.SpansResponseChunk) error
}, t *tracestore.Trace) error {
	sent := make(chan error)
	go func() { // ends with the call, in which Send returns
		defer close(sent)
		for spans := range slices.Chunk(t.Spans, chunk) {
			var part api_v2.SpansResponseChunk
			for i := range spans {
				part.Spans = append(part.Spans, modelSpan(&spans[i]))
			}
			err := out.Send(&part)
			select {
			case sent <- err:
			case <-ctx.Done():
				return
			}
			if err != nil {
				return
			}
		}
	}()
	timer := time.NewTimer(writeTime)
	defer timer.Stop()
	for {
		select {
		case err, more := <-sent:
			switch {
			case err != nil:
				return err
			case !more:
				return nil
			}
			timer.Reset(writeTime)
		case <-timer.C:
			return status.Error(codes.DeadlineExceeded, "the trace took too long to be read")
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		}
	}
}

func modelSpan(s *tracestore.Span) model.Span {
	out := model.Span{
		TraceID: modelTraceID(s.TraceID), SpanID: modelSpanID(s.SpanID), OperationName: s.Name, StartTime: s.Start, Duration: s.Duration, Tags: keyValues(tags(s)),
		Process: &model.Process{ServiceName: s.Service, Tags: keyValues(s.Resource)}, Warnings: s.Warnings,
	}
	for _, r := range references(s) {
		kind := model.SpanRefType_CHILD_OF
		if r.RefType == followsFrom {
			kind = model.SpanRefType_FOLLOWS_FROM
		}
		out.References = append(out.References, model.SpanRef{TraceID: modelTraceID(r.TraceID), SpanID: modelSpanID(r.SpanID), RefType: kind})
	}
	for _, e := range s.Events {
		out.Logs = append(out.Logs, model.Log{Timestamp: e.Time, Fields: keyValues(fields(&e))})
	}
	return out
}

// Stored ids can be read.
func modelTraceID(id string) model.TraceID { out, _ := model.TraceIDFromString(id); return out }
func modelSpanID(id string) model.SpanID   { out, _ := model.SpanIDFromString(id); return out }

func keyValues(in []tracestore.Attribute) []model.KeyValue {
	out := make([]model.KeyValue, 0, len(in))
	for _, a := range in {
		out = append(out, keyValue(a))
	}
	return out
}

func keyValue(a tracestore.Attribute) model.KeyValue {
	text := a.Value.Text
	switch a.Value.Type {
	case tracestore.Bool:
		return model.Bool(a.Key, text == "true")
	case tracestore.Int:
		if n, err := strconv.ParseInt(text, 10, 64); err == nil {
			return model.Int64(a.Key, n)
		}
	case tracestore.Float:
		if f, err := strconv.ParseFloat(text, 64); err == nil {
			return model.Float64(a.Key, f)
		}
	case tracestore.Bytes:
		if b, err := base64.StdEncoding.DecodeString(text); err == nil {
			return model.Binary(a.Key, b)
		}
	}
	return model.String(a.Key, text)
}

// codec uses the methods of Jaeger's messages, whose types the current protobuf library does not support.
type codec struct{}

// Name is the content subtype that gRPC's clients send.
func (codec) Name() string { return "proto" }

// Marshal implements encoding.CodecV2.
func (codec) Marshal(v any) (mem.BufferSlice, error) {
	message, ok := v.(interface{ Marshal() ([]byte, error) })
	if !ok {
		return nil, fmt.Errorf("%T is none of Jaeger's messages", v)
	}
	text, err := message.Marshal()
	if err != nil {
		return nil, err
	}
	return mem.BufferSlice{mem.SliceBuffer(text)}, nil
}

// Unmarshal implements encoding.CodecV2.
func (codec) Unmarshal(data mem.BufferSlice, into any) error {
	message, ok := into.(interface{ Unmarshal([]byte) error })
	if !ok {
		return fmt.Errorf("%T is none of Jaeger's messages", into)
	}
	return message.Unmarshal(data.Materialize())
}
