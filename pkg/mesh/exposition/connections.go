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
	// ConnectionsPath is where Envoy sends its entries about TCP connections, by OTLP over HTTP, to the agent's Socket.
	ConnectionsPath = "/v1/logs"

	// Entry is the format string of such an entry's body. Its attributes are the tags of all metrics in TCPMetrics, or the lists of
	// tags of the metrics that are meant, by name.
	Entry = "%ACCESS_LOG_TYPE%|%CONNECTION_ID%|%BYTES_SENT%|%BYTES_RECEIVED%"
	// entryFields are its commands.
	entryFields = 4

	opened   = "istio_tcp_connections_opened_total"
	closed   = "istio_tcp_connections_closed_total"
	sent     = "istio_tcp_sent_bytes_total"
	received = "istio_tcp_received_bytes_total"

	// The kinds of entries (envoy/data/accesslog/v3/accesslog.proto, AccessLogType).
	upstreamConnected = "TcpUpstreamConnected"
	periodic          = "TcpPeriodic"
	connectionEnd     = "TcpConnectionEnd"

	// noValue is what an entry has where a format has no value.
	noValue = "-"

	// maxOpen and maxEnded bound what is remembered of connections whose end got lost, and of those whose entries come in another
	// order than they were written: Envoy's threads send them in requests of their own.
	maxOpen, maxEnded = 1 << 16, 1 << 12
	// maxSeries bounds what is counted apart of each metric, as tags of one's own can have values without end. What more there is, is
	// counted as one series, as OpenTelemetry's SDKs do it (https://opentelemetry.io/docs/specs/otel/metrics/sdk/#cardinality-limits).
	maxSeries = 2000
	overflow  = "otel_metric_overflow"
	// maxEntries bounds a request, in bytes. Envoy sends what it has after 16 KiB.
	maxEntries = 16 << 20
)

// TCPMetrics are the metrics that Connections counts.
var TCPMetrics = []string{opened, closed, sent, received}

// Connections counts TCP connections from the entries that Envoy sends of them: when one has its upstream, every now and then, and
// at its end. An entry says how many bytes there were since the connection's beginning.
type Connections struct {
	mu          sync.Mutex
	open, ended *simplelru.LRU[uint64, *connection]
	// counters are by metric and by tags, as they stand in a sample.
	counters map[string]map[string]uint64
}

// connection is what was counted of one.
type connection struct {
	opened, closed bool
	sent, received uint64
}

// NewConnections has counted nothing.
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
		panic(err) // a size below one
	}
	return c
}

// ServeHTTP takes a request with entries.
func (c *Connections) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxEntries))
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	// LogsData is the request's own shape (opentelemetry/proto/logs/v1/logs.proto).
	data := &logs.LogsData{}
	if err := proto.Unmarshal(body, data); err != nil {
		http.Error(w, "not entries of a log: "+err.Error(), http.StatusBadRequest)
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
	said := strings.Split(record.GetBody().GetStringValue(), FoldedBy)
	if len(said) != entryFields {
		return fmt.Errorf("%q is no entry about a connection", said)
	}
	kind := said[0]
	var numbers [entryFields - 1]uint64
	for i, text := range said[1:] {
		if i > 0 && text == noValue {
			continue // there are no bytes yet
		}
		n, err := strconv.ParseUint(text, 10, 64)
		if err != nil {
			return fmt.Errorf("%q is no entry about a connection: %w", said, err)
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
		return nil // it has no upstream yet: what is known of it is not all
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

// connection is what is known of one.
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

// tagsByMetric are the tags of each metric that an entry is for, as they stand in a sample.
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

// escapes are those of values in Prometheus' text.
var escapes = strings.NewReplacer(`\`, `\\`, "\n", `\n`, `"`, `\"`)

// labelOf is a tag with its values, of which those that are missing are empty, as in Envoy's statistics.
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

// notInName are characters that no label's name has; Envoy writes them so, too (source/common/stats/custom_stat_namespaces_impl.cc).
var notInName = regexp.MustCompile(`[^A-Za-z0-9_]`)

// labelName is the label of a tag, whose name the Telemetry API lets be any text.
func labelName(tag string) string {
	name := notInName.ReplaceAllLiteralString(tag, "_")
	if name == "" || name[0] >= '0' && name[0] <= '9' {
		return "_" + name
	}
	return name
}

// text is what was counted as Envoy would write it, for names that keep says yes to.
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
