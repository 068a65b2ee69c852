package loki

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/klauspost/compress/snappy"
	"github.com/prometheus/prometheus/model/labels"
	"google.golang.org/protobuf/encoding/protowire"

	"polymesh.dev/polymesh/observe/logql"
	"polymesh.dev/polymesh/observe/logstore"
	"polymesh.dev/polymesh/observe/receive/guard"
	"polymesh.dev/polymesh/observe/rowstore"
)

// Limits on one push, and on all of them.
const (
	maxPush    = 4 << 20 // bytes, compressed or not
	maxEntries = 50_000
	maxStreams = 2_000
	// maxParts is how many objects, arrays and fields of metadata a push may have. Each takes more memory than its text.
	maxParts = 3 * maxEntries
	// maxPushLabels leaves room for source and job.
	maxPushLabels = logstore.MaxLabels - 2
	// grace is how much a clock may be ahead.
	grace = 10 * time.Minute
	// A push is allowed as long as the mean stays below pushBytesPerSecond.
	pushBytesPerSecond = 4 << 20
	pushBurst          = 4 * maxPush
	// arriving is how many bytes of all pushes may be in memory while they arrive.
	arriving    = 16 << 20
	arrivalTime = 10 * time.Second
	// unpacking is how many pushes are unpacked and decoded at a time, which takes a multiple of their size. Others wait for patience.
	unpacking = 2
	patience  = 5 * time.Second
)

// The labels that only the platform sets, and its own jobs.
var (
	reservedLabels = []string{"namespace", "pod", "container", "node", "workload", "stream", "source"}
	reservedJobs   = []string{"pods", "events", "objects", "rollouts", "findings", "polymesh", "kernel", "otlp"}
)

const (
	sourceLabel    = "source"
	pushed         = "push"
	reservedPrefix = "pushed_"
)

var (
	// errTooLarge means that a body is too large.
	errTooLarge = fmt.Errorf("the push has more than %d bytes", maxPush)
	errBusy     = errors.New("too many pushes at the same time: try again later")
)

// rateError is the answer when pushes exceed their rate.
type rateError struct{ bytes int }

func (e *rateError) Error() string {
	return fmt.Sprintf("ingestion rate limit exceeded (limit: %d bytes/sec) while attempting to ingest %d bytes; reduce log volume", pushBytesPerSecond, e.bytes)
}

// push stores lines. Invalid lines do not prevent the others from being stored.
func (l *Loki) push(w http.ResponseWriter, r *http.Request) {
	p, err := l.readPush(w, r)
	if err != nil {
		refusePush(w, err)
		return
	}
	defer p.release()
	if len(p.entries) > 0 {
		var rejected *rowstore.RejectedError
		switch err := l.opts.Store.Append(p.entries); {
		case errors.As(err, &rejected):
			p.refuse(rejected.Rows, "%s", rejected.Reason)
		case err != nil:
			l.opts.Log.Error("cannot store pushed lines", "err", err)
			w.Header().Set("Retry-After", "5")
			http.Error(w, "the lines cannot be stored now: "+err.Error(), http.StatusServiceUnavailable)
			return
		}
	}
	if p.refused > 0 {
		http.Error(w, fmt.Sprintf("%d lines were not stored, the first because %s", p.refused, p.reason), http.StatusBadRequest)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

// refusePush answers a push that is refused as a whole.
func refusePush(w http.ResponseWriter, err error) {
	code := http.StatusBadRequest
	var above *rateError
	switch {
	case errors.Is(err, errTooLarge):
		code = http.StatusRequestEntityTooLarge
	case errors.Is(err, errBusy):
		w.Header().Set("Retry-After", "5")
		code = http.StatusServiceUnavailable
	case errors.As(err, &above):
		w.Header().Set("Retry-After", "1")
		code = http.StatusTooManyRequests
	}
	http.Error(w, err.Error(), code)
}

// readPush reads a push. Clients choose how many pushes they send at a time and how far these expand. So a push is measured, and must be within the rate and
// get its turn, before it is unpacked. The turn is held until release.
func (l *Loki) readPush(w http.ResponseWriter, r *http.Request) (*pushing, error) {
	kind, encoding, err := pushType(r.Header)
	if err != nil {
		return nil, err
	}
	raw, arrived, err := guard.Arrive(w, r, l.arriving, maxPush, arrivalTime)
	defer arrived()
	var tooLarge *http.MaxBytesError
	switch {
	case errors.As(err, &tooLarge):
		return nil, errTooLarge
	case errors.Is(err, guard.ErrBusy):
		return nil, errBusy
	case err != nil:
		return nil, invalid("reading the body: %s", err)
	}
	size, err := unpackedSize(raw, encoding)
	if err != nil {
		return nil, err
	}
	if !l.rate.take(size, time.Now()) {
		return nil, &rateError{size}
	}
	release, err := l.turn(r.Context())
	if err != nil {
		return nil, err
	}
	p := &pushing{now: time.Now(), release: release}
	body, err := unpack(raw, encoding, size)
	if err == nil {
		if kind == "json" {
			err = p.json(body)
		} else {
			err = p.proto(body)
		}
		if err != nil {
			err = fmt.Errorf("reading the push: %w", err)
		}
	}
	if err != nil {
		release()
		return nil, err
	}
	return p, nil
}

// pushType returns the type of a body, json or proto, and its compression.
func pushType(h http.Header) (kind, encoding string, err error) {
	kind = "proto"
	switch media, _, err := mime.ParseMediaType(h.Get("Content-Type")); {
	case err == nil && media == "application/json":
		kind = "json"
	case h.Get("Content-Type") != "" && media != "application/x-protobuf":
		return "", "", invalid("the content type %.40q is neither application/json nor application/x-protobuf", h.Get("Content-Type"))
	}
	switch encoding = h.Get("Content-Encoding"); {
	case kind == "proto" && encoding == "": // Loki's clients compress with snappy and do not say so
		encoding = "snappy"
	case encoding != "" && encoding != "identity" && encoding != "snappy" && encoding != "gzip":
		return "", "", invalid("Content-Encoding %.40q not supported", encoding)
	}
	return kind, encoding, nil
}

// unpackedSize returns the decompressed size of a body, without storing it.
func unpackedSize(raw []byte, encoding string) (int, error) {
	size := int64(len(raw))
	switch encoding {
	case "snappy":
		n, err := snappy.DecodedLen(raw)
		if err != nil {
			return 0, invalid("the body is not compressed with snappy: %s", err)
		}
		size = int64(n)
	case "gzip":
		z, err := gzip.NewReader(bytes.NewReader(raw))
		if err != nil {
			return 0, invalid("the body is not gzip: %s", err)
		}
		if size, err = io.Copy(io.Discard, io.LimitReader(z, maxPush+1)); err != nil {
			return 0, invalid("the body is not gzip: %s", err)
		}
	}
	if size > maxPush {
		return 0, errTooLarge
	}
	return int(size), nil
}

// unpack unpacks a body of which the size is known.
func unpack(raw []byte, encoding string, size int) ([]byte, error) {
	switch encoding {
	case "snappy":
		body, err := snappy.Decode(nil, raw)
		if err != nil {
			return nil, invalid("the body is not compressed with snappy: %s", err)
		}
		return body, nil
	case "gzip":
		z, err := gzip.NewReader(bytes.NewReader(raw))
		if err != nil {
			return nil, invalid("the body is not gzip: %s", err)
		}
		body := make([]byte, size)
		if _, err := io.ReadFull(z, body); err != nil {
			return nil, invalid("the body is not gzip: %s", err)
		}
		return body, nil
	}
	return raw, nil
}

// turn waits until another push may be unpacked.
func (l *Loki) turn(ctx context.Context) (func(), error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	if err := l.unpacking.Acquire(ctx, 1); err != nil {
		return nil, errBusy
	}
	return func() { l.unpacking.Release(1) }, nil
}

// pushing is the state while a push is parsed.
type pushing struct {
	now     time.Time
	release func()
	entries []logstore.Entry
	streams int
	seen    int // lines
	parts   int // fields of metadata
	refused int
	reason  string
}

func (p *pushing) refuse(lines int, format string, args ...any) {
	if p.refused += lines; p.reason == "" {
		p.reason = fmt.Sprintf(format, args...)
	}
}

var (
	errManyStreams = fmt.Errorf("it has more than %d streams", maxStreams)
	errManyLines   = fmt.Errorf("it has more than %d lines", maxEntries)
	errManyParts   = errors.New("it has too many objects, arrays and fields")
)

// stream checks the labels of a stream and applies the platform's rules. It returns why the stream is refused, empty if it is not.
func (p *pushing) stream(given []logstore.Field) (fields []logstore.Field, reason string, err error) {
	if p.streams++; p.streams > maxStreams {
		return nil, "", errManyStreams
	}
	if len(given) > maxPushLabels {
		return nil, fmt.Sprintf("a stream has %d labels, more than %d", len(given), maxPushLabels), nil
	}
	job := ""
	for _, f := range given {
		if f.Name == "job" && !slices.Contains(reservedJobs, f.Value) {
			job = f.Value
			continue
		}
		if f.Name == "job" || slices.Contains(reservedLabels, f.Name) {
			f.Name = reservedPrefix + f.Name
		}
		fields = append(fields, f)
	}
	if job == "" {
		job = pushed
	}
	return append(fields, logstore.Field{Name: "job", Value: job}, logstore.Field{Name: sourceLabel, Value: pushed}), "", nil
}

// line adds a line of a stream.
func (p *pushing) line(stream []logstore.Field, reason string, at time.Time, line string, metadata []logstore.Field) error {
	if p.seen++; p.seen > maxEntries {
		return errManyLines
	}
	switch {
	case reason != "":
		p.refuse(1, "%s", reason)
	case at.After(p.now.Add(grace)):
		p.refuse(1, "it has timestamp too new: %s", at.UTC().Format(time.RFC3339))
	default:
		p.entries = append(p.entries, logstore.Entry{Time: at, Labels: stream, Line: line, Metadata: metadata})
	}
	return nil
}

// jsonPush is Loki's JSON.
type jsonPush struct {
	Streams []struct {
		Stream map[string]string   `json:"stream"`
		Values [][]json.RawMessage `json:"values"`
	} `json:"streams"`
}

func (p *pushing) json(body []byte) error {
	if brackets(body) > maxParts {
		return errManyParts
	}
	var push jsonPush
	if err := json.Unmarshal(body, &push); err != nil {
		return err
	}
	for _, s := range push.Streams {
		stream, reason, err := p.stream(sortedFields(s.Stream))
		if err != nil {
			return err
		}
		for _, value := range s.Values {
			at, line, metadata, err := jsonLine(value)
			if err != nil {
				return err
			}
			if err := p.line(stream, reason, at, line, metadata); err != nil {
				return err
			}
		}
	}
	return nil
}

// brackets counts the objects and arrays of a JSON text.
func brackets(body []byte) int {
	n, inText := 0, false
	for i := 0; i < len(body); i++ {
		switch c := body[i]; {
		case inText && c == '\\':
			i++
		case c == '"':
			inText = !inText
		case !inText && (c == '{' || c == '[' || c == ','):
			n++
		}
	}
	return n
}

func sortedFields(m map[string]string) []logstore.Field {
	fields := make([]logstore.Field, 0, len(m))
	for name, value := range m {
		fields = append(fields, logstore.Field{Name: name, Value: value})
	}
	slices.SortFunc(fields, func(a, b logstore.Field) int {
		if a.Name < b.Name {
			return -1
		}
		return 1
	})
	return fields
}

// jsonLine reads ["nanoseconds", "line", {"name": "value"}].
func jsonLine(value []json.RawMessage) (at time.Time, line string, metadata []logstore.Field, err error) {
	if len(value) < 2 || len(value) > 3 {
		return at, "", nil, errors.New("a value is not [time, line] or [time, line, metadata]")
	}
	var stamp string
	if err := json.Unmarshal(value[0], &stamp); err != nil {
		return at, "", nil, errors.New("a time is not a string of nanoseconds")
	}
	n, err := strconv.ParseInt(stamp, 10, 64)
	if err != nil {
		return at, "", nil, fmt.Errorf("%.40q is not a time in nanoseconds", stamp)
	}
	if err := json.Unmarshal(value[1], &line); err != nil {
		return at, "", nil, errors.New("a line is not a string")
	}
	if len(value) == 3 {
		var m map[string]string
		if err := json.Unmarshal(value[2], &m); err != nil {
			return at, "", nil, errors.New("the metadata of a line is not an object of strings")
		}
		metadata = sortedFields(m)
	}
	return time.Unix(0, n), line, metadata, nil
}

// proto parses Loki's PushRequest in place: a decoder would take many times its size in memory. Its fields: streams = 1 {labels = 1, entries = 2 {
// timestamp = 1 {seconds = 1, nanos = 2}, line = 2, metadata = 3 {name = 1, value = 2}}}.
func (p *pushing) proto(body []byte) error {
	return protoFields(body, func(number protowire.Number, value []byte, _ uint64) error {
		if number != 1 {
			return nil
		}
		return p.protoStream(value)
	})
}

func (p *pushing) protoStream(body []byte) error {
	var text string
	if err := protoFields(body, func(number protowire.Number, value []byte, _ uint64) error {
		if number == 1 {
			text = string(value)
		}
		return nil
	}); err != nil {
		return err
	}
	matchers, err := logql.ParseMatchers(text)
	if err != nil {
		return fmt.Errorf("the labels of a stream: %w", err)
	}
	given := make([]logstore.Field, 0, len(matchers))
	for _, m := range matchers {
		if m.Type != labels.MatchEqual {
			return errors.New("the labels of a stream are not all like name=\"value\"")
		}
		given = append(given, logstore.Field{Name: m.Name, Value: m.Value})
	}
	stream, reason, err := p.stream(given)
	if err != nil {
		return err
	}
	return protoFields(body, func(number protowire.Number, value []byte, _ uint64) error {
		if number != 2 {
			return nil
		}
		at, line, metadata, err := protoLine(value)
		if err != nil {
			return err
		}
		if p.parts += len(metadata); p.parts > maxParts {
			return errManyParts
		}
		return p.line(stream, reason, at, line, metadata)
	})
}

func protoLine(body []byte) (at time.Time, line string, metadata []logstore.Field, err error) {
	var seconds, nanos int64
	err = protoFields(body, func(number protowire.Number, value []byte, _ uint64) error {
		switch number {
		case 1:
			return protoFields(value, func(number protowire.Number, _ []byte, n uint64) error {
				switch number {
				case 1:
					seconds = int64(n)
				case 2:
					nanos = int64(int32(n))
				}
				return nil
			})
		case 2:
			line = string(value)
		case 3:
			if len(metadata) > logstore.MaxMetadata {
				return fmt.Errorf("a line has more than %d fields of metadata", logstore.MaxMetadata)
			}
			var f logstore.Field
			err := protoFields(value, func(number protowire.Number, value []byte, _ uint64) error {
				switch number {
				case 1:
					f.Name = string(value)
				case 2:
					f.Value = string(value)
				}
				return nil
			})
			metadata = append(metadata, f)
			return err
		}
		return nil
	})
	return time.Unix(seconds, nanos), line, metadata, err
}

// protoFields calls a function for the fields of a message: with the bytes of a field with a length, or the number of a varint. Others are skipped.
func protoFields(body []byte, each func(number protowire.Number, value []byte, n uint64) error) error {
	for len(body) > 0 {
		number, kind, size := protowire.ConsumeTag(body)
		if size < 0 {
			return protowire.ParseError(size)
		}
		body = body[size:]
		var value []byte
		var n uint64
		switch kind {
		case protowire.BytesType:
			value, size = protowire.ConsumeBytes(body)
		case protowire.VarintType:
			n, size = protowire.ConsumeVarint(body)
		case protowire.Fixed32Type, protowire.Fixed64Type:
			if size = protowire.ConsumeFieldValue(number, kind, body); size >= 0 {
				body = body[size:]
				continue
			}
		default: // groups, which nest, and which no client sends
			return errors.New("it has a field of a kind that Loki does not have")
		}
		if size < 0 {
			return protowire.ParseError(size)
		}
		body = body[size:]
		if err := each(number, value, n); err != nil {
			return err
		}
	}
	return nil
}

// rate is a bucket that fills with time.
type rate struct {
	perSecond, most float64

	mu   sync.Mutex
	has  float64
	last time.Time
}

func newRate(perSecond, most int) *rate {
	return &rate{perSecond: float64(perSecond), most: float64(most), has: float64(most)}
}

func (r *rate) take(n int, now time.Time) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.last.IsZero() {
		r.has = min(r.most, r.has+max(0, now.Sub(r.last).Seconds())*r.perSecond)
	}
	r.last = now
	if float64(n) > r.has {
		return false
	}
	r.has -= float64(n)
	return true
}
