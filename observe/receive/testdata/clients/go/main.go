// clients sends a trace through each exporter of OpenTelemetry's SDK for Go, two of zipkin-go's, and one of Jaeger's own client. It prints which ones.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"

	"github.com/opentracing/opentracing-go"
	"github.com/opentracing/opentracing-go/ext"
	"github.com/opentracing/opentracing-go/log"
	zipkin "github.com/openzipkin/zipkin-go"
	"github.com/openzipkin/zipkin-go/model"
	zipkinproto "github.com/openzipkin/zipkin-go/proto/zipkin_proto3"
	"github.com/openzipkin/zipkin-go/reporter"
	zipkinhttp "github.com/openzipkin/zipkin-go/reporter/http"
	"github.com/uber/jaeger-client-go"
	"github.com/uber/jaeger-client-go/transport"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracegrpc"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp"
	"go.opentelemetry.io/otel/sdk/resource"
	sdk "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
)

func main() {
	if err := run(context.Background()); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func say(kind, service, trace string) {
	_ = json.NewEncoder(os.Stdout).Encode(map[string]string{"kind": kind, "service": service, "trace": trace})
}

func run(ctx context.Context) error {
	grpc, err := otlptracegrpc.New(ctx, otlptracegrpc.WithEndpoint(os.Getenv("GRPC")), otlptracegrpc.WithInsecure(), otlptracegrpc.WithCompressor("gzip"))
	if err != nil {
		return err
	}
	if err := opentelemetry(ctx, "go-grpc", grpc); err != nil {
		return err
	}
	http, err := otlptracehttp.New(ctx, otlptracehttp.WithEndpointURL(os.Getenv("HTTP")+"/v1/traces"), otlptracehttp.WithCompression(otlptracehttp.GzipCompression))
	if err != nil {
		return err
	}
	if err := opentelemetry(ctx, "go-http", http); err != nil {
		return err
	}
	url := os.Getenv("ZIPKIN") + "/api/v2/spans"
	if err := zipkinGo("go-zipkin", zipkinhttp.NewReporter(url)); err != nil {
		return err
	}
	if err := zipkinGo("go-zipkin-protobuf", zipkinhttp.NewReporter(url, zipkinhttp.Serializer(zipkinproto.SpanSerializer{}))); err != nil {
		return err
	}
	return jaegerGo("go-jaeger", os.Getenv("JAEGER")+"/api/traces")
}

func jaegerGo(service, url string) error {
	to := transport.NewHTTPTransport(url)
	tracer, closer := jaeger.NewTracer(service, jaeger.NewConstSampler(true), jaeger.NewRemoteReporter(to), jaeger.TracerOptions.Gen128Bit(true), jaeger.TracerOptions.Tag("host.name", "node-1"))
	parent := tracer.StartSpan("parent", ext.SpanKindRPCServer, opentracing.Tags{"http.status_code": 503, "text": `ä<&>"`})
	child := tracer.StartSpan("child", ext.SpanKindRPCClient, opentracing.ChildOf(parent.Context()), opentracing.Tags{"error": true})
	child.LogFields(log.Event("retried"), log.Int("attempt", 2))
	child.Finish()
	parent.Finish()
	say("jaeger", service, parent.Context().(jaeger.SpanContext).TraceID().String())
	return closer.Close()
}

func opentelemetry(ctx context.Context, service string, exporter sdk.SpanExporter) error {
	provider := sdk.NewTracerProvider(sdk.WithBatcher(exporter),
		sdk.WithResource(resource.NewSchemaless(attribute.String("service.name", service), attribute.String("host.name", "node-1"))))
	tracer := provider.Tracer("clients", trace.WithInstrumentationVersion("1.0"))
	ctx, parent := tracer.Start(ctx, "parent", trace.WithSpanKind(trace.SpanKindServer),
		trace.WithAttributes(attribute.Int("http.response.status_code", 503), attribute.String("text", `ä<&>"`)))
	linked := trace.NewSpanContext(trace.SpanContextConfig{
		TraceID: trace.TraceID{0x0a, 0xf7, 0x65, 0x19, 0x16, 0xcd, 0x43, 0xdd, 0x84, 0x48, 0xeb, 0x21, 0x1c, 0x80, 0x31, 0x9c},
		SpanID:  trace.SpanID{0xb7, 0xad, 0x6b, 0x71, 0x69, 0x20, 0x33, 0x31}, TraceFlags: trace.FlagsSampled,
	})
	_, child := tracer.Start(ctx, "child", trace.WithSpanKind(trace.SpanKindClient), trace.WithLinks(trace.Link{SpanContext: linked, Attributes: []attribute.KeyValue{attribute.String("a", "b")}}))
	child.SetAttributes(attribute.Bool("yes", true), attribute.Float64("ratio", 0.25), attribute.StringSlice("list", []string{"a", "b"}), attribute.Int64Slice("numbers", []int64{1, 2}),
		attribute.String("empty", ""))
	child.AddEvent("retried", trace.WithAttributes(attribute.Int("attempt", 2)))
	child.SetStatus(codes.Error, "it broke")
	child.End()
	parent.End()
	say("opentelemetry", service, parent.SpanContext().TraceID().String())
	return provider.Shutdown(context.Background())
}

func zipkinGo(service string, to reporter.Reporter) error {
	endpoint, err := zipkin.NewEndpoint(service, "10.0.0.1:80")
	if err != nil {
		return err
	}
	tracer, err := zipkin.NewTracer(to, zipkin.WithLocalEndpoint(endpoint), zipkin.WithTraceID128Bit(true))
	if err != nil {
		return err
	}
	parent := tracer.StartSpan("parent", zipkin.Kind(model.Server))
	parent.Tag("http.status_code", "503")
	child := tracer.StartSpan("child", zipkin.Parent(parent.Context()), zipkin.Kind(model.Client))
	child.Finish()
	parent.Finish()
	say("zipkin", service, parent.Context().TraceID.String())
	return to.Close()
}
