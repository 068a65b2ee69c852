package receive

import (
	"bytes"
	"cmp"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"mime"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"

	"polymesh.dev/polymesh/observe/receive/guard"
	"polymesh.dev/polymesh/observe/tracestore"
)

// zipkinSpan is a span of Zipkin's version 2.
type zipkinSpan struct {
	TraceID     string             `json:"traceId"`
	ID          string             `json:"id"`
	ParentID    string             `json:"parentId"`
	Kind        string             `json:"kind"`
	Name        string             `json:"name"`
	Timestamp   micros             `json:"timestamp"`
	Duration    micros             `json:"duration"`
	Local       zipkinEndpoint     `json:"localEndpoint"`
	Remote      zipkinEndpoint     `json:"remoteEndpoint"`
	Annotations []zipkinAnnotation `json:"annotations"`
	Tags        map[string]string  `json:"tags"`
	Shared      bool               `json:"shared"`
}

type zipkinEndpoint struct {
	ServiceName string `json:"serviceName"`
	IPv4        string `json:"ipv4"`
	IPv6        string `json:"ipv6"`
	Port        int64  `json:"port"`
}

type zipkinAnnotation struct {
	Timestamp micros `json:"timestamp"`
	Value     string `json:"value"`
}

// micros is a number of microseconds. Some clients write it with a fraction, some as a text.
type micros int64

// UnmarshalJSON implements json.Unmarshaler.
func (m *micros) UnmarshalJSON(text []byte) error {
	number := strings.Trim(string(text), `"`)
	if number == "null" || number == "" {
		return nil
	}
	if n, err := strconv.ParseInt(number, 10, 64); err == nil {
		*m = micros(n)
		return nil
	}
	f, err := strconv.ParseFloat(number, 64)
	if err != nil || f < 0 || f > 1<<60 {
		return fmt.Errorf("%.40q is not a number of microseconds", number)
	}
	*m = micros(f)
	return nil
}

// Zipkin serves Zipkin's API for reporters: POST /api/v2/spans.
func (r *Receiver) Zipkin() http.Handler {
	mux := http.NewServeMux()
	if r.opts.Spans != nil {
		mux.HandleFunc("POST /api/v2/spans", r.serveZipkin)
	}
	return mux
}

func (r *Receiver) serveZipkin(w http.ResponseWriter, req *http.Request) {
	accepted(w, r.readZipkin(w, req))
}

// accepted answers a reporter. Zipkin has no answer for dropped spans; they are counted, and stored traces are complete.
func accepted(w http.ResponseWriter, err error) {
	if err == nil {
		w.WriteHeader(http.StatusAccepted)
		return
	}
	failed := status.Convert(err)
	code := httpCode(failed.Code())
	if code == http.StatusServiceUnavailable {
		w.Header().Set("Retry-After", "5")
	}
	http.Error(w, failed.Message(), code)
}

func (r *Receiver) readZipkin(w http.ResponseWriter, req *http.Request) error {
	kind, _, _ := mime.ParseMediaType(req.Header.Get("Content-Type"))
	read, measure := zipkinJSON, guard.JSON
	if kind == protobufType || kind == "application/protobuf" {
		read, measure = zipkinProto, zipkinMemory
	}
	message, release, err := r.measured(w, req, measure)
	if err != nil {
		return err
	}
	defer release()
	store := spanStore{r: r}
	now := time.Now()
	if err := read(message, func(z *zipkinSpan) error { return store.add(z.span(now)) }); err != nil {
		return err
	}
	return store.flush()
}

// zipkinJSON calls each for the spans of a list. Spans before an error are stored; sending them again does not duplicate them.
func zipkinJSON(text []byte, each func(*zipkinSpan) error) error {
	decoder := json.NewDecoder(bytes.NewReader(text))
	if first, err := decoder.Token(); err != nil || first != json.Delim('[') {
		return refused(errors.New("reading Zipkin's spans: they are not a JSON list"))
	}
	for decoder.More() {
		var one zipkinSpan
		if err := decoder.Decode(&one); err != nil {
			return refused(fmt.Errorf("reading Zipkin's spans: %w", err))
		}
		if err := each(&one); err != nil {
			return err
		}
	}
	if _, err := decoder.Token(); err != nil {
		return refused(fmt.Errorf("reading Zipkin's spans: %w", err))
	}
	return nil
}

var zipkinKinds = map[string]tracestore.Kind{
	"CLIENT": tracestore.KindClient, "SERVER": tracestore.KindServer, "PRODUCER": tracestore.KindProducer, "CONSUMER": tracestore.KindConsumer,
}

// span converts a span to OpenTelemetry's model. Names for Zipkin's fields are those of OpenTelemetry's collector.
func (z *zipkinSpan) span(now time.Time) tracestore.Span {
	s := tracestore.Span{
		TraceID: padded(z.TraceID, 32), SpanID: padded(z.ID, 16), Name: z.Name, Kind: zipkinKinds[strings.ToUpper(z.Kind)],
		Start: now, Service: z.Local.ServiceName, Shared: z.Shared,
	}
	if z.ParentID != "" && padded(z.ParentID, 16) != s.SpanID {
		s.ParentID = padded(z.ParentID, 16)
	}
	if s.Service == "" {
		s.Service = noService
	}
	switch {
	case z.Timestamp > 0:
		s.Start = time.UnixMicro(int64(z.Timestamp))
	case len(z.Annotations) > 0 && z.Annotations[0].Timestamp > 0:
		s.Start = time.UnixMicro(int64(z.Annotations[0].Timestamp))
	}
	const longest = micros(1 << 40) // twelve days
	s.Duration = time.Duration(max(0, min(z.Duration, longest))) * time.Microsecond

	text := func(key, value string) {
		if value != "" {
			s.Attributes = append(s.Attributes, tracestore.Attribute{Key: key, Value: tracestore.Value{Type: tracestore.String, Text: value}})
		}
	}
	for _, key := range slices.Sorted(maps.Keys(z.Tags)) {
		if value := z.Tags[key]; !ownField(&s, key, value) {
			s.Attributes = append(s.Attributes, tracestore.Attribute{Key: key, Value: tracestore.Value{Type: tracestore.String, Text: value}})
		}
	}
	port := func(key string, value int64) {
		if value > 0 {
			s.Attributes = append(s.Attributes, tracestore.Attribute{Key: key, Value: tracestore.Value{Type: tracestore.Int, Text: strconv.FormatInt(value, 10)}})
		}
	}
	text("net.host.ip", cmp.Or(z.Local.IPv4, z.Local.IPv6))
	port("net.host.port", z.Local.Port)
	text("peer.service", z.Remote.ServiceName)
	text("net.peer.ip", cmp.Or(z.Remote.IPv4, z.Remote.IPv6))
	port("net.peer.port", z.Remote.Port)
	for _, a := range z.Annotations {
		at := s.Start
		if a.Timestamp > 0 {
			at = time.UnixMicro(int64(a.Timestamp))
		}
		s.Events = append(s.Events, tracestore.Event{Time: at, Name: a.Value})
	}
	return s
}

// ownField handles a tag that has its own field in a span, under the names that OpenTelemetry uses for tags.
func ownField(s *tracestore.Span, key, value string) bool {
	switch key {
	case "error":
		s.Status = tracestore.StatusError
		if value != "true" {
			s.StatusMessage = value
		}
	case "otel.status_code":
		switch strings.TrimPrefix(value, "STATUS_CODE_") {
		case "OK":
			s.Status = tracestore.StatusOK
		case "ERROR":
			s.Status = tracestore.StatusError
		}
	case "otel.status_description":
		s.StatusMessage = value
	case "otel.scope.name", "otel.library.name":
		s.Scope.Name = value
	case "otel.scope.version", "otel.library.version":
		s.Scope.Version = value
	case "w3c.tracestate":
		s.TraceState = value
	default:
		return false
	}
	return true
}

// padded returns an id with all digits: Zipkin's may have only 64 bits, and no leading zeros.
func padded(id string, digits int) string {
	id = strings.ToLower(id)
	if id != "" && len(id) < digits {
		return strings.Repeat("0", digits-len(id)) + id
	}
	return id
}

// fields calls each for the fields of a protobuf message: numbers have a value, texts and messages have bytes.
func fields(b []byte, each func(number protowire.Number, value uint64, text []byte) error) error {
	for len(b) > 0 {
		number, kind, n := protowire.ConsumeTag(b)
		if n < 0 {
			return protowire.ParseError(n)
		}
		b = b[n:]
		var value uint64
		var text []byte
		switch kind {
		case protowire.VarintType:
			value, n = protowire.ConsumeVarint(b)
		case protowire.Fixed64Type:
			value, n = protowire.ConsumeFixed64(b)
		case protowire.BytesType:
			text, n = protowire.ConsumeBytes(b)
		case protowire.Fixed32Type:
			_, n = protowire.ConsumeFixed32(b)
		default:
			return fmt.Errorf("a field has the wire type %d", kind)
		}
		if n < 0 {
			return protowire.ParseError(n)
		}
		b = b[n:]
		if err := each(number, value, text); err != nil {
			return err
		}
	}
	return nil
}

// zipkinMemory is guard.Proto for Zipkin's messages, for which no library has descriptors. They have a fixed depth.
func zipkinMemory(message []byte, l guard.Limits) (int, error) {
	const perSpan, perPart = 512, 96
	memory := 0
	err := fields(message, func(_ protowire.Number, _ uint64, span []byte) error {
		memory += perSpan
		return fields(span, func(protowire.Number, uint64, []byte) error {
			if memory += perPart; memory > l.Memory {
				return fmt.Errorf("%w: it has too many elements; send it in parts", guard.ErrRefused)
			}
			return nil
		})
	})
	if err == nil && memory > l.Memory {
		err = fmt.Errorf("%w: it has too many spans; send them in parts", guard.ErrRefused)
	}
	return memory, err
}

// zipkinProto calls each for the spans of a ListOfSpans of Zipkin's zipkin.proto.
func zipkinProto(message []byte, each func(*zipkinSpan) error) error {
	return fields(message, func(number protowire.Number, _ uint64, text []byte) error {
		if number != 1 {
			return nil
		}
		one, err := zipkinProtoSpan(text)
		if err != nil {
			return refused(fmt.Errorf("reading Zipkin's spans: %w", err))
		}
		return each(&one)
	})
}

func zipkinProtoSpan(message []byte) (zipkinSpan, error) {
	var s zipkinSpan
	kinds := [...]string{"", "CLIENT", "SERVER", "PRODUCER", "CONSUMER"}
	err := fields(message, func(number protowire.Number, value uint64, text []byte) (err error) {
		switch number {
		case 1:
			s.TraceID = hex.EncodeToString(text)
		case 2:
			s.ParentID = hex.EncodeToString(text)
		case 3:
			s.ID = hex.EncodeToString(text)
		case 4:
			if value < uint64(len(kinds)) {
				s.Kind = kinds[value]
			}
		case 5:
			s.Name = string(text)
		case 6:
			s.Timestamp = micros(value & (1<<62 - 1))
		case 7:
			s.Duration = micros(value & (1<<62 - 1))
		case 8:
			s.Local, err = zipkinProtoEndpoint(text)
		case 9:
			s.Remote, err = zipkinProtoEndpoint(text)
		case 10:
			var a zipkinAnnotation
			err = fields(text, func(number protowire.Number, value uint64, text []byte) error {
				switch number {
				case 1:
					a.Timestamp = micros(value & (1<<62 - 1))
				case 2:
					a.Value = string(text)
				}
				return nil
			})
			s.Annotations = append(s.Annotations, a)
		case 11:
			var key, tag string
			err = fields(text, func(number protowire.Number, _ uint64, text []byte) error {
				switch number {
				case 1:
					key = string(text)
				case 2:
					tag = string(text)
				}
				return nil
			})
			if s.Tags == nil {
				s.Tags = map[string]string{}
			}
			s.Tags[key] = tag
		case 13:
			s.Shared = value != 0
		}
		return err
	})
	return s, err
}

func zipkinProtoEndpoint(message []byte) (zipkinEndpoint, error) {
	var e zipkinEndpoint
	err := fields(message, func(number protowire.Number, value uint64, text []byte) error {
		switch number {
		case 1:
			e.ServiceName = string(text)
		case 2:
			e.IPv4 = address(text)
		case 3:
			e.IPv6 = address(text)
		case 4:
			e.Port = int64(value & 0xffff)
		}
		return nil
	})
	return e, err
}

func address(bytes []byte) string {
	if a, ok := netip.AddrFromSlice(bytes); ok {
		return a.String()
	}
	return ""
}
