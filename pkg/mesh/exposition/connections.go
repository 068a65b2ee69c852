package exposition

import (
	"fmt"
	"io"
	"maps"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/hashicorp/golang-lru/v2/simplelru"
	common "go.opentelemetry.io/proto/otlp/common/v1"
	logs "go.opentelemetry.io/proto/otlp/logs/v1"
	"google.golang.org/protobuf/proto"
)

const (
	// ConnectionsPath is where Envoy sends its log entries for TCP connections, by OTLP over HTTP, on the agent's Socket.
	ConnectionsPath = "/v1/logs"

	// Entry is the format string of an entry's body. Its attributes are the tags of all metrics in TCPMetrics, or a list of
	// tags for each enabled metric, by name.
	Entry = "%ACCESS_LOG_TYPE%|%CONNECTION_ID%|%BYTES_SENT%|%BYTES_RECEIVED%"
	// entryFields is the number of fields in Entry.
	entryFields = 4

	opened   = "istio_tcp_connections_opened_total"
	closed   = "istio_tcp_connections_closed_total"
	sent     = "istio_tcp_sent_bytes_total"
	received = "istio_tcp_received_bytes_total"

	// The types of entries (envoy/data/accesslog/v3/accesslog.proto, AccessLogType).
	upstreamConnected = "TcpUpstreamConnected"
	periodic          = "TcpPeriodic"
	connectionEnd     = "TcpConnectionEnd"

	// noValue is Envoy's output for a format without a value.
	noValue = "-"

	// maxOpen and maxEnded limit the memory for connections whose end was lost, and for those whose entries arrive out of
	// order: each of Envoy's threads sends its own requests.
	maxOpen, maxEnded = 1 << 16, 1 << 12
	// maxSeries limits the series of each metric, as custom tags can have any number of values. The excess is
	// counted in one overflow series, as in OpenTelemetry's SDKs (https://opentelemetry.io/docs/specs/otel/metrics/sdk/#cardinality-limits).
	maxSeries = 2000
	overflow  = "otel_metric_overflow"
	// maxEntries limits a request, in bytes. Envoy sends its buffer after 16 KiB.
	maxEntries = 16 << 20
)

// TCPMetrics are the metrics that Connections counts.
var TCPMetrics = []string{opened, closed, sent, received}

// Connections counts TCP connections from Envoy's log entries: one when the upstream is connected, one per interval, and one at
// the end. Each entry holds the bytes since the start of the connection.
type Connections struct {
	mu          sync.Mutex
	open, ended *simplelru.LRU[uint64, *connection]
	// counters are keyed by metric and by tags as written in a sample.
	counters map[string]map[string]uint64
}

// connection is what was already counted for one connection.
type connection struct {
	opened, closed bool
	sent, received uint64
}

// NewConnections returns empty counters.
func NewConnections() *Connections {
	c := &Connections{counters: map[string]map[string]uint64{}}
	for _, name := range TCPMetrics {
		c.counters[name] = map[string]uint64{}
	}
	var err error
	if c.open, err = simplelru.NewLRU[uint64, *connection](maxOpen, nil); err == nil {
		c.ended, err = simplelru.NewLRU[uint64, *connection](maxEnded, nil)
	}
	if err != nil {
		panic(err) // only for a size below one
	}
	return c
}

// ServeHTTP handles a request with log entries.
func (c *Connections) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxEntries))
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	// The request has the same wire format as LogsData (opentelemetry/proto/logs/v1/logs.proto).
	data := &logs.LogsData{}
	if err := proto.Unmarshal(body, data); err != nil {
		http.Error(w, "not OTLP log entries: "+err.Error(), http.StatusBadRequest)
		return
	}
	for _, resource := range data.ResourceLogs {
		for _, scope := range resource.ScopeLogs {
			for _, record := range scope.LogRecords {
				if err := c.count(record); err != nil {
					http.Error(w, err.Error(), http.StatusBadRequest)
					return
				}
			}
		}
	}
	w.Header().Set("Content-Type", "application/x-protobuf")
}

func (c *Connections) count(record *logs.LogRecord) error {
	fields := strings.Split(record.GetBody().GetStringValue(), FoldedBy)
	if len(fields) != entryFields {
		return fmt.Errorf("%q is not a connection entry", fields)
	}
	kind := fields[0]
	var numbers [entryFields - 1]uint64
	for i, text := range fields[1:] {
		if i > 0 && text == noValue {
			continue // no bytes yet
		}
		n, err := strconv.ParseUint(text, 10, 64)
		if err != nil {
			return fmt.Errorf("%q is not a connection entry: %w", fields, err)
		}
		numbers[i] = n
	}
	id, out, in := numbers[0], numbers[1], numbers[2]
	tags := tagsByMetric(record.Attributes)

	c.mu.Lock()
	defer c.mu.Unlock()
	add := func(metric string, n uint64) {
		text, ok := tags[metric]
		if !ok {
			return
		}
		counters := c.counters[metric]
		if _, known := counters[text]; !known && len(counters) >= maxSeries {
			text = render([]label{{overflow, "true"}})
		}
		counters[text] += n
	}
	n := c.connection(id)
	if kind == periodic && !n.opened {
		return nil // no upstream yet, so some tags are still missing
	}
	if !n.opened {
		n.opened = true
		add(opened, 1)
	}
	if kind == connectionEnd && !n.closed {
		n.closed = true
		add(closed, 1)
	}
	if kind != upstreamConnected {
		if out > n.sent || kind == connectionEnd {
			add(sent, max(out, n.sent)-n.sent)
		}
		if in > n.received || kind == connectionEnd {
			add(received, max(in, n.received)-n.received)
		}
		n.sent, n.received = max(out, n.sent), max(in, n.received)
	}
	if n.closed {
		c.open.Remove(id)
		c.ended.Add(id, n)
	}
	return nil
}

// connection returns the state of a connection.
func (c *Connections) connection(id uint64) *connection {
	if n, ok := c.open.Get(id); ok {
		return n
	}
	if n, ok := c.ended.Get(id); ok {
		return n
	}
	n := &connection{}
	c.open.Add(id, n)
	return n
}

// tagsByMetric returns the tags of each metric that an entry counts for, as written in a sample.
func tagsByMetric(attributes []*common.KeyValue) map[string]string {
	tags := map[string]string{}
	var all []label
	for _, a := range attributes {
		if list, ok := a.GetValue().GetValue().(*common.AnyValue_KvlistValue); ok {
			if slices.Contains(TCPMetrics, a.Key) {
				tags[a.Key] = render(labelsOf(list.KvlistValue.GetValues()))
			}
			continue
		}
		all = append(all, labelOf(a))
	}
	if len(all) > 0 {
		text := render(all)
		for _, metric := range TCPMetrics {
			tags[metric] = text
		}
	}
	return tags
}

func labelsOf(attributes []*common.KeyValue) []label {
	out := make([]label, 0, len(attributes))
	for _, a := range attributes {
		out = append(out, labelOf(a))
	}
	return out
}

// escapes are the escape sequences of Prometheus' text format.
var escapes = strings.NewReplacer(`\`, `\\`, "\n", `\n`, `"`, `\"`)

// labelOf converts a tag. Missing values are empty, as in Envoy's statistics.
func labelOf(a *common.KeyValue) label {
	values := []string{a.GetValue().GetStringValue()}
	names := []string{a.Key}
	if folded, ok := Folded[a.Key]; ok {
		names = folded
		values = strings.SplitN(values[0], FoldedBy, len(folded))
	}
	for i, value := range values {
		if value == noValue && names[i] != responseFlags {
			values[i] = ""
		}
	}
	return label{labelName(a.Key), escapes.Replace(strings.Join(values, FoldedBy))}
}

// notInName matches characters that are invalid in a label name. Envoy replaces them too
// (source/common/stats/custom_stat_namespaces_impl.cc).
var notInName = regexp.MustCompile(`[^A-Za-z0-9_]`)

// labelName returns the label name for a tag, whose name can be any text in the Telemetry API.
func labelName(tag string) string {
	name := notInName.ReplaceAllLiteralString(tag, "_")
	if name == "" || name[0] >= '0' && name[0] <= '9' {
		return "_" + name
	}
	return name
}

// text returns the counters in Envoy's format, for the metrics that keep selects.
func (c *Connections) text(keep func(metric string) bool) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	var b strings.Builder
	for _, metric := range TCPMetrics {
		counters := c.counters[metric]
		if len(counters) == 0 || !keep(metric) {
			continue
		}
		fmt.Fprintf(&b, "# TYPE %s%s counter\n", added, metric)
		for _, tags := range slices.Sorted(maps.Keys(counters)) {
			fmt.Fprintf(&b, "%s%s%s %d\n", added, metric, tags, counters[tags])
		}
	}
	return b.String()
}
