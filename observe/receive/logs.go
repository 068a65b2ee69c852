package receive

import (
	"cmp"
	"encoding/hex"
	"fmt"
	"strings"
	"time"

	collect "go.opentelemetry.io/proto/otlp/collector/logs/v1"
	common "go.opentelemetry.io/proto/otlp/common/v1"
	logs "go.opentelemetry.io/proto/otlp/logs/v1"

	"polymesh.dev/polymesh/observe/logstore"
)

// Job is the label job of log records from OTLP. It separates what clients claim about themselves from what was read on the node.
const Job = "otlp"

// The attributes of a resource that become labels: the first one that exists. Others do not, because labels must have few values.
var labels = []struct {
	name string
	keys []string
}{
	{"namespace", []string{"k8s.namespace.name", "service.namespace"}},
	{"pod", []string{"k8s.pod.name"}},
	{"container", []string{"k8s.container.name"}},
	{"node", []string{"k8s.node.name"}},
	{"workload", []string{"k8s.deployment.name", "k8s.statefulset.name", "k8s.daemonset.name", "k8s.cronjob.name", "k8s.job.name", serviceName}},
}

// entries returns all log records of a request as lines.
func entries(req *collect.ExportLogsServiceRequest, now time.Time) []logstore.Entry {
	var out []logstore.Entry
	for _, resource := range req.GetResourceLogs() {
		attributes := resource.GetResource().GetAttributes()
		stream := streamLabels(attributes)
		for _, scoped := range resource.GetScopeLogs() {
			for _, record := range scoped.GetLogRecords() {
				out = append(out, entry(record, stream, attributes, scoped.GetScope().GetName(), now))
			}
		}
	}
	return out
}

func streamLabels(resource []*common.KeyValue) []logstore.Field {
	known := map[string]string{}
	for _, a := range resource {
		known[a.GetKey()] = value(a.GetValue()).Text
	}
	out := []logstore.Field{{Name: "job", Value: Job}}
	for _, l := range labels {
		text := ""
		for _, key := range l.keys {
			text = cmp.Or(text, known[key])
		}
		if text != "" && len(text) <= logstore.MaxLabelBytes {
			out = append(out, logstore.Field{Name: l.name, Value: text})
		}
	}
	return out
}

// entry returns a log record as a line. Metadata about the record precedes that about its sender, in case not all of it fits.
func entry(r *logs.LogRecord, stream []logstore.Field, resource []*common.KeyValue, scope string, now time.Time) logstore.Entry {
	e := logstore.Entry{Time: now, Labels: stream, Line: value(r.GetBody()).Text}
	if nanos := cmp.Or(r.GetTimeUnixNano(), r.GetObservedTimeUnixNano()); nanos != 0 {
		e.Time = moment(nanos)
	}
	m := metadata{seen: map[string]struct{}{}}
	level := strings.ToLower(r.GetSeverityText())
	if level == "" {
		level = severity(r.GetSeverityNumber())
	}
	m.add("level", level)
	if id := r.GetTraceId(); len(id) == 16 {
		m.add("trace_id", hex.EncodeToString(id))
	}
	if id := r.GetSpanId(); len(id) == 8 {
		m.add("span_id", hex.EncodeToString(id))
	}
	m.add("event_name", r.GetEventName())
	for _, a := range r.GetAttributes() {
		m.add(a.GetKey(), value(a.GetValue()).Text)
	}
	m.add("scope_name", scope)
	for _, a := range resource {
		m.add(a.GetKey(), value(a.GetValue()).Text)
	}
	if m.left > 0 {
		m.fields = append(m.fields, logstore.Field{Name: "attributes_left_off", Value: fmt.Sprint(m.left)})
	}
	e.Metadata = m.fields
	return e
}

// severity returns the name of a severity's range.
func severity(n logs.SeverityNumber) string {
	names := [...]string{"trace", "debug", "info", "warn", "error", "fatal"}
	if n < 1 || n > 24 {
		return ""
	}
	return names[(n-1)/4]
}

// metadata collects fields up to logstore's limits.
type metadata struct {
	fields []logstore.Field
	seen   map[string]struct{}
	bytes  int
	left   int
}

// add adds a field. Its name is converted to a valid name in LogQL.
func (m *metadata) add(name, text string) {
	if name == "" || text == "" {
		return
	}
	name = strings.Map(func(c rune) rune {
		if c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' {
			return c
		}
		return '_'
	}, name[:min(len(name), logstore.MaxNameBytes)])
	if name[0] >= '0' && name[0] <= '9' {
		name = "_" + name[:min(len(name), logstore.MaxNameBytes-1)]
	}
	if _, ok := m.seen[name]; ok {
		return
	}
	// One field is reserved for the number of dropped ones.
	const reserved = 64
	if len(m.fields) >= logstore.MaxMetadata-1 || m.bytes+len(name)+len(text) > logstore.MaxMetadataBytes-reserved {
		m.left++
		return
	}
	m.seen[name] = struct{}{}
	m.bytes += len(name) + len(text)
	m.fields = append(m.fields, logstore.Field{Name: name, Value: text})
}
