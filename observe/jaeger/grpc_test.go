package jaeger

import (
	"io"
	"net"
	"testing"
	"time"

	"github.com/jaegertracing/jaeger-idl/model/v1"
	"github.com/jaegertracing/jaeger-idl/proto-gen/api_v2"
	"github.com/stretchr/testify/require"
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
	server := GRPC(Options{Store: s})
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
