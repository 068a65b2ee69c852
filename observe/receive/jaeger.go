package receive

import (
	"bytes"
	"context"
	"encoding/base64"
	"fmt"
	"mime"
	"net/http"
	"strconv"
	"time"

	"github.com/apache/thrift/lib/go/thrift"
	"github.com/jaegertracing/jaeger-idl/thrift-gen/jaeger"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"polymesh.dev/polymesh/observe/receive/guard"
	"polymesh.dev/polymesh/observe/tracestore"
)

// refTypeKey is the attribute of a link that says which kind of a reference it was.
const refTypeKey = "opentracing.ref_type"

// Jaeger serves the API of Jaeger's collector for its own clients, which are older than OpenTelemetry: POST /api/traces, a batch in Thrift's binary encoding.
func (r *Receiver) Jaeger() http.Handler {
	mux := http.NewServeMux()
	if r.opts.Spans != nil {
		mux.HandleFunc("POST /api/traces", func(w http.ResponseWriter, req *http.Request) { accepted(w, r.readJaeger(w, req)) })
	}
	return mux
}

func (r *Receiver) readJaeger(w http.ResponseWriter, req *http.Request) error {
	switch kind, _, err := mime.ParseMediaType(req.Header.Get("Content-Type")); {
	case err != nil, kind != "application/x-thrift" && kind != "application/vnd.apache.thrift.binary":
		return status.Error(codes.Unimplemented, "the content type is not application/x-thrift")
	}
	message, release, err := r.measured(w, req, guard.Thrift)
	if err != nil {
		return err
	}
	defer release()
	batch, err := jaegerBatch(req.Context(), message)
	if err != nil {
		return refused(fmt.Errorf("reading Jaeger's spans: %w", err))
	}
	service, process := jaegerProcess(batch.GetProcess())
	store := spanStore{r: r}
	for i, one := range batch.GetSpans() {
		s := fromJaeger(one)
		s.Service, s.Resource = service, process
		if err := store.add(s); err != nil {
			return err
		}
		batch.Spans[i] = nil
	}
	return store.flush()
}

// jaegerBatch decodes a message that guard has accepted.
func jaegerBatch(ctx context.Context, message []byte) (*jaeger.Batch, error) {
	limits := &thrift.TConfiguration{MaxMessageSize: MaxMessage, MaxFrameSize: MaxMessage}
	batch := jaeger.NewBatch()
	err := batch.Read(ctx, thrift.NewTBinaryProtocolConf(&thrift.TMemoryBuffer{Buffer: bytes.NewBuffer(message)}, limits))
	return batch, err
}

func jaegerProcess(p *jaeger.Process) (service string, tags []tracestore.Attribute) {
	if service = p.GetServiceName(); service == "" {
		service = noService
	}
	return service, jaegerTags(p.GetTags())
}

// fromJaeger converts a span to OpenTelemetry's model.
func fromJaeger(j *jaeger.Span) tracestore.Span {
	s := tracestore.Span{
		TraceID: jaegerTrace(j.GetTraceIdHigh(), j.GetTraceIdLow()), SpanID: jaegerID(j.GetSpanId()), Name: j.GetOperationName(),
		Start: time.UnixMicro(j.GetStartTime()), Flags: uint32(j.GetFlags()) & 1, // sampled
	}
	const longest = 1 << 40 // twelve days
	s.Duration = time.Duration(max(0, min(j.GetDuration(), longest))) * time.Microsecond
	if j.GetParentSpanId() != 0 {
		s.ParentID = jaegerID(j.GetParentSpanId())
	}
	for _, ref := range j.GetReferences() {
		trace, id := jaegerTrace(ref.GetTraceIdHigh(), ref.GetTraceIdLow()), jaegerID(ref.GetSpanId())
		if ref.GetRefType() == jaeger.SpanRefType_CHILD_OF && trace == s.TraceID && (s.ParentID == "" || s.ParentID == id) {
			s.ParentID = id
			continue
		}
		kind := "follows_from"
		if ref.GetRefType() == jaeger.SpanRefType_CHILD_OF {
			kind = "child_of"
		}
		s.Links = append(s.Links, tracestore.Link{TraceID: trace, SpanID: id, Attributes: []tracestore.Attribute{
			{Key: refTypeKey, Value: tracestore.Value{Type: tracestore.String, Text: kind}},
		}})
	}
	for _, a := range jaegerTags(j.GetTags()) {
		kind, known := tracestore.ParseKind(a.Value.Text)
		switch {
		case a.Key == "span.kind" && known && s.Kind == tracestore.KindUnspecified:
			s.Kind = kind
		case a.Key == "error" && a.Value.Text == "false": // it means that there is no error
		case !ownField(&s, a.Key, a.Value.Text):
			s.Attributes = append(s.Attributes, a)
		}
	}
	for _, l := range j.GetLogs() {
		e := tracestore.Event{Time: time.UnixMicro(l.GetTimestamp())}
		for _, a := range jaegerTags(l.GetFields()) {
			if a.Key == "event" && e.Name == "" {
				e.Name = a.Value.Text
				continue
			}
			e.Attributes = append(e.Attributes, a)
		}
		s.Events = append(s.Events, e)
	}
	return s
}

func jaegerTags(in []*jaeger.Tag) []tracestore.Attribute {
	out := make([]tracestore.Attribute, 0, len(in))
	for _, t := range in {
		a := tracestore.Attribute{Key: t.GetKey(), Value: tracestore.Value{Type: tracestore.String, Text: t.GetVStr()}}
		switch t.GetVType() {
		case jaeger.TagType_BOOL:
			a.Value = tracestore.Value{Type: tracestore.Bool, Text: strconv.FormatBool(t.GetVBool())}
		case jaeger.TagType_LONG:
			a.Value = tracestore.Value{Type: tracestore.Int, Text: strconv.FormatInt(t.GetVLong(), 10)}
		case jaeger.TagType_DOUBLE:
			a.Value = tracestore.Value{Type: tracestore.Float, Text: strconv.FormatFloat(t.GetVDouble(), 'g', -1, 64)}
		case jaeger.TagType_BINARY:
			a.Value = tracestore.Value{Type: tracestore.Bytes, Text: base64.StdEncoding.EncodeToString(t.GetVBinary())}
		}
		out = append(out, a)
	}
	return out
}

func jaegerTrace(high, low int64) string { return jaegerID(high) + jaegerID(low) }

func jaegerID(id int64) string { return fmt.Sprintf("%016x", uint64(id)) }
