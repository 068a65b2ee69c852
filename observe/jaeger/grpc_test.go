package jaeger

import (
	"context"
	"io"
	"log/slog"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"github.com/jaegertracing/jaeger-idl/model/v1"
	"github.com/jaegertracing/jaeger-idl/proto-gen/api_v2"
	"github.com/stretchr/testify/require"
	"golang.org/x/sync/semaphore"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"polymesh.dev/polymesh/observe/tracestore"
)

func client(t *testing.T, s *tracestore.Store) api_v2.QueryServiceClient {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	server := GRPC(Options{Store: s, Log: slog.New(slog.DiscardHandler)})
	done := make(chan error, 1)
	go func() { done <- server.Serve(listener) }()
	t.Cleanup(func() {
		server.Stop()
		require.NoError(t, <-done)
	})
	connection, err := grpc.NewClient(listener.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.ForceCodecV2(codec{})))
	require.NoError(t, err)
	t.Cleanup(func() { _ = connection.Close() })
	return api_v2.NewQueryServiceClient(connection)
}

// receiveSpans reads all spans of an answer.
func receiveSpans(t *testing.T, in interface {
	Recv() (*api_v2.SpansResponseChunk, error)
}, err error) ([]model.Span, error) {
	t.Helper()
	require.NoError(t, err)
	var all []model.Span
	for {
		part, err := in.Recv()
		if err == io.EOF {
			return all, nil
		}
		if err != nil {
			return nil, err
		}
		require.LessOrEqual(t, len(part.Spans), chunk)
		all = append(all, part.Spans...)
	}
}

func TestGRPC(t *testing.T) {
	s := open(t)
	start := time.Now().UTC().Truncate(time.Microsecond)
	spans := request(start)
	for i := range 30 {
		one := spans[0]
		one.SpanID = model.NewSpanID(uint64(i + 1)).String()
		spans = append(spans, one)
	}
	store(t, s, spans...)
	c := client(t, s)
	ctx := t.Context()
	id, err := model.TraceIDFromString(spans[0].TraceID)
	require.NoError(t, err)

	stream, err := c.GetTrace(ctx, &api_v2.GetTraceRequest{TraceID: id})
	got, err := receiveSpans(t, stream, err)
	require.NoError(t, err)
	require.Len(t, got, 32)
	server := got[0]
	require.Equal(t, model.NewSpanID(0x00f067aa0ba902b8), server.SpanID)
	require.Equal(t, "back.shop", server.Process.ServiceName)
	require.Equal(t, model.NewSpanID(0x00f067aa0ba902b7), server.ParentSpanID())
	require.Len(t, server.References, 3)
	require.Equal(t, model.SpanRefType_FOLLOWS_FROM, server.References[1].RefType)
	require.Equal(t, []model.KeyValue{
		model.String("span.kind", "server"), model.String("otel.status_code", "ERROR"), model.Bool("error", true), model.String("otel.status_description", "broken"),
		model.String("w3c.tracestate", "a=b"),
	}, server.Tags)
	require.Equal(t, []model.Log{{Timestamp: start.Add(time.Microsecond), Fields: []model.KeyValue{model.String("event", "exception"), model.String("exception.type", "ValueError")}}}, server.Logs)
	require.Len(t, server.Warnings, 1)
	require.Contains(t, got[1].Tags, model.Binary("bytes", []byte{0, 1}))
	require.Contains(t, got[1].Tags, model.Float64("double", 0.5))
	require.Contains(t, got[1].Tags, model.Int64("large", 9007199254740993))

	found, err := c.FindTraces(ctx, &api_v2.FindTracesRequest{Query: &api_v2.TraceQueryParameters{
		ServiceName: "front.shop", OperationName: "GET /", Tags: map[string]string{"int": "7"}, StartTimeMin: start.Add(-time.Hour), StartTimeMax: start.Add(time.Hour),
		DurationMin: time.Millisecond, DurationMax: time.Second, SearchDepth: 10,
	}})
	got, err = receiveSpans(t, found, err)
	require.NoError(t, err)
	require.Len(t, got, 32)
	found, err = c.FindTraces(ctx, &api_v2.FindTracesRequest{Query: &api_v2.TraceQueryParameters{}})
	got, err = receiveSpans(t, found, err)
	require.NoError(t, err)
	require.Len(t, got, 32)

	services, err := c.GetServices(ctx, &api_v2.GetServicesRequest{})
	require.NoError(t, err)
	require.Equal(t, []string{"back.shop", "front.shop"}, services.Services)
	operations, err := c.GetOperations(ctx, &api_v2.GetOperationsRequest{Service: "back.shop", SpanKind: "server"})
	require.NoError(t, err)
	require.Equal(t, []*api_v2.Operation{{Name: "GET /", SpanKind: "server"}}, operations.Operations)
	require.Equal(t, []string{"GET /"}, operations.OperationNames)
	links, err := c.GetDependencies(ctx, &api_v2.GetDependenciesRequest{StartTime: start.Add(-time.Hour), EndTime: start.Add(time.Hour)})
	require.NoError(t, err)
	require.Equal(t, []model.DependencyLink{{Parent: "front.shop", Child: "back.shop", CallCount: 1}}, links.Dependencies)

	stream, err = c.GetTrace(ctx, &api_v2.GetTraceRequest{TraceID: model.NewTraceID(1, 2)})
	_, err = receiveSpans(t, stream, err)
	require.Equal(t, codes.NotFound, status.Code(err))
	stream, err = c.GetTrace(ctx, &api_v2.GetTraceRequest{})
	_, err = receiveSpans(t, stream, err)
	require.Equal(t, codes.InvalidArgument, status.Code(err))
	found, err = c.FindTraces(ctx, &api_v2.FindTracesRequest{})
	_, err = receiveSpans(t, found, err)
	require.Equal(t, codes.InvalidArgument, status.Code(err))
	_, err = c.GetOperations(ctx, &api_v2.GetOperationsRequest{})
	require.Equal(t, codes.InvalidArgument, status.Code(err))
	_, err = c.ArchiveTrace(ctx, &api_v2.ArchiveTraceRequest{})
	require.Equal(t, codes.Unimplemented, status.Code(err))
}

// deaf is a client that reads a message in the time that it takes, and none for a negative one.
type deaf struct {
	api_v2.QueryService_FindTracesServer
	ctx   context.Context
	takes time.Duration
	read  int
}

func (d *deaf) Context() context.Context { return d.ctx }

func (d *deaf) Send(*api_v2.SpansResponseChunk) error {
	var ready <-chan time.Time // nil is never ready
	if d.takes >= 0 {
		ready = time.After(d.takes)
	}
	select {
	case <-ready:
		d.read++
		return nil
	case <-d.ctx.Done():
		return d.ctx.Err()
	}
}

// Who does not read is left soon, and who reads slowly in the end.
func TestSlowReaders(t *testing.T) {
	large := &tracestore.Trace{Spans: make([]tracestore.Span, 50*chunk)}
	for name, c := range map[string]struct {
		takes, until time.Duration
		read         int
	}{
		"nothing":     {-1, writeTime, 0},
		"slowly":      {writeTime - time.Second, callTime, int(callTime / (writeTime - time.Second))},
		"fast enough": {time.Second, 50 * time.Second, 50},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				q := &queryService{turns: semaphore.NewWeighted(questions)}
				call, end := context.WithCancel(t.Context())
				ctx, release, err := q.turn(call)
				require.NoError(t, err)
				client := &deaf{ctx: call, takes: c.takes}
				begin := time.Now()
				err = send(ctx, client, large)
				require.Equal(t, c.until, time.Since(begin))
				if c.read == 50 {
					require.NoError(t, err)
				} else {
					require.Equal(t, codes.DeadlineExceeded, status.Code(err))
				}
				release()
				end()
				synctest.Wait()
				require.GreaterOrEqual(t, client.read, c.read)
			})
		})
	}
}

// However many connections there are, few questions are answered at a time.
func TestQuestionsWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := &queryService{turns: semaphore.NewWeighted(questions)}
		_, release, err := q.turn(t.Context())
		require.NoError(t, err)
		for range questions - 1 {
			_, _, err := q.turn(t.Context())
			require.NoError(t, err)
		}
		begin := time.Now()
		for _, ask := range []func() error{
			func() error {
				return q.FindTraces(&api_v2.FindTracesRequest{Query: &api_v2.TraceQueryParameters{}}, &deaf{ctx: t.Context()})
			},
			func() error { return q.GetTrace(&api_v2.GetTraceRequest{}, &deaf{ctx: t.Context()}) },
			func() error { _, err := q.unary(t.Context(), nil, nil, nil); return err },
		} {
			require.Equal(t, codes.Unavailable, status.Code(ask()))
		}
		require.Equal(t, 3*patience, time.Since(begin))
		time.AfterFunc(patience/2, release)
		answer, err := q.unary(t.Context(), nil, nil, func(ctx context.Context, _ any) (any, error) {
			deadline, _ := ctx.Deadline()
			return time.Until(deadline), nil
		})
		require.NoError(t, err)
		require.Equal(t, callTime, answer)
	})
}
