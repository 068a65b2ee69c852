package exposition

import (
	"bufio"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"

	"polymesh.dev/polymesh/pkg/mesh/workload"
)

const (
	// added is the prefix that Envoy adds to each name (source/server/admin/prometheus_stats.cc).
	added = "envoy_"
	ours  = added + "istio_"
	// unknown is Istio's label value for unknown.
	unknown = "unknown"
	// serviceParts is the number of values in Service.
	serviceParts = 3
	// maxLine limits a line, in bytes. Envoy's longest lines have a few kilobytes.
	maxLine = 1 << 20
)

// Rewrite copies Envoy's Prometheus text, replacing the dialect's statistics by Istio's metrics. self is the
// workload of this Envoy.
func Rewrite(to io.Writer, from io.Reader, self workload.Workload) error {
	w := bufio.NewWriter(to)
	lines := bufio.NewScanner(from)
	lines.Buffer(make([]byte, 0, 64<<10), maxLine)
	var f *family
	for lines.Scan() {
		line := lines.Text()
		switch {
		case strings.HasPrefix(line, "# TYPE "+ours):
			f.write(w)
			f = newFamily(line, self)
		case f != nil && strings.HasPrefix(line, ours):
			if err := f.add(line); err != nil {
				return err
			}
		default:
			f.write(w)
			f = nil
			_, _ = w.WriteString(line)
			_ = w.WriteByte('\n')
		}
	}
	if err := lines.Err(); err != nil {
		return fmt.Errorf("read Envoy's statistics: %w", err)
	}
	f.write(w)
	return w.Flush()
}

// family is one metric: Envoy writes all its samples in a row.
type family struct {
	name, kind string
	self       workload.Workload
	order      []string // of series, as they came
	series     map[string]*value
}

// value is a sample's value: Envoy's own text until another sample is added to it.
type value struct {
	text  string
	sum   float64
	added bool
}

func newFamily(line string, self workload.Workload) *family {
	name, kind, _ := strings.Cut(strings.TrimPrefix(line, "# TYPE "+added), " ")
	return &family{name: name, kind: kind, self: self, series: map[string]*value{}}
}

// add adds a sample. Samples that differ only in tags that do not become labels are merged.
func (f *family) add(line string) error {
	name, tags, number, err := parseSample(strings.TrimPrefix(line, added))
	if err != nil {
		return err
	}
	sample, err := strconv.ParseFloat(number, 64)
	if err != nil {
		return fmt.Errorf("the value of %q is not a number", line)
	}
	scaled := false
	if i := slices.IndexFunc(tags, func(l label) bool { return l.name == Messages }); i >= 0 {
		scaled = true
		sample *= messages(f.name, tags[i].value)
	}
	key := name + render(unfold(tags, f.self))
	v := f.series[key]
	if v == nil {
		f.series[key] = &value{text: number, sum: sample, added: scaled}
		f.order = append(f.order, key)
		return nil
	}
	v.sum += sample
	v.added = true
	return nil
}

// messages returns a stream's number of messages in the metric's direction.
func messages(metric, text string) float64 {
	requests, responses, _ := strings.Cut(text, ",")
	if strings.HasPrefix(metric, "istio_response_") {
		requests = responses
	}
	n, err := strconv.ParseFloat(requests, 64)
	if err != nil {
		return 0
	}
	return n
}

func (f *family) write(w *bufio.Writer) {
	if f == nil || len(f.order) == 0 {
		return
	}
	if text, ok := help[f.name]; ok {
		fmt.Fprintf(w, "# HELP %s %s\n", f.name, text)
	}
	fmt.Fprintf(w, "# TYPE %s %s\n", f.name, f.kind)
	for _, key := range f.order {
		v := f.series[key]
		if v.added {
			v.text = strconv.FormatFloat(v.sum, 'f', -1, 64)
		}
		_, _ = w.WriteString(key)
		_ = w.WriteByte(' ')
		_, _ = w.WriteString(v.text)
		_ = w.WriteByte('\n')
	}
}

// label is one label of a sample; its value stays escaped.
type label struct{ name, value string }

// parseSample parses a line of the text format (https://prometheus.io/docs/instrumenting/exposition_formats/).
func parseSample(line string) (name string, labels []label, number string, err error) {
	broken := func() (string, []label, string, error) {
		return "", nil, "", fmt.Errorf("%q is not a metric sample", line)
	}
	i := strings.IndexAny(line, "{ ")
	if i <= 0 {
		return broken()
	}
	name, rest := line[:i], line[i:]
	if rest[0] == '{' {
		rest = rest[1:]
		for rest != "" && rest[0] != '}' {
			key, after, ok := strings.Cut(rest, `="`)
			end := closingQuote(after)
			if !ok || end < 0 {
				return broken()
			}
			labels = append(labels, label{key, after[:end]})
			rest = strings.TrimPrefix(after[end+1:], ",")
		}
		if rest == "" {
			return broken()
		}
		rest = rest[1:]
	}
	fields := strings.Fields(rest)
	if len(fields) == 0 {
		return broken()
	}
	return name, labels, fields[0], nil
}

// closingQuote returns the index of the closing quote.
func closingQuote(text string) int {
	for i := 0; i < len(text); i++ {
		switch text[i] {
		case '\\':
			i++
		case '"':
			return i
		}
	}
	return -1
}

// separate splits tags that hold several others. Of two tags with one name, the later one wins. If the number of values is
// wrong, a value from a peer contains the separator. It is then unclear which value belongs to which tag, so all values from
// peers, which come last, are dropped.
func separate(tags []label) (out []label, whole bool) {
	out, whole = make([]label, 0, len(tags)+len(Folded[HTTP])), true
	for _, t := range tags {
		names, ok := Folded[t.name]
		if !ok {
			out = append(out, t)
			continue
		}
		values := strings.Split(t.value, FoldedBy)
		if len(values) != len(names) {
			whole = false
			names = names[:slices.Index(names, PeerLabels)]
			values = append(values, make([]string, len(names))...) // if there are too few
		}
		for i, name := range names {
			out = append(out, label{name, values[i]})
		}
	}
	return out, whole
}

// unfold converts a statistic's tags into the labels of Istio's metric. self is the workload of this Envoy.
func unfold(tags []label, self workload.Workload) []label {
	tags, whole := separate(tags)
	has := map[string]string{}
	for _, t := range tags {
		has[t.name] = t.value
	}
	if has[Reporter] == "" {
		return tags
	}
	out := map[string]string{}
	// Without a valid workload, the peer is not authenticated.
	peer, known := workload.Parse(has[Peer])
	source, destination := self, peer
	inbound := has[Reporter] == "destination"
	switch {
	case inbound:
		source, destination = destination, source
	case known:
		destination = peer.WithLabels(has[PeerLabels])
	}
	unfoldWorkload(out, "source_", source)
	unfoldWorkload(out, "destination_", destination)
	out[SourcePrincipal], out[DestinationPrincipal] = unknown, unknown
	service := strings.Split(has[Service], ";")
	if len(service) != serviceParts {
		service = make([]string, serviceParts)
	}
	out[DestinationService], out[DestinationServiceName], out[DestinationNamespace] = service[0], service[1], service[2]
	if inbound && service[2] == "" {
		out[DestinationNamespace] = out["destination_workload_namespace"]
	}
	out[ConnectionSecurityPolicy] = unknown
	if inbound && whole {
		// A server knows whether the client had a certificate. Istio leaves this unknown at a client.
		out[ConnectionSecurityPolicy] = "none"
		if has[SourcePrincipal] != "" {
			out[ConnectionSecurityPolicy] = "mutual_tls"
		}
	}
	extra := []string{}
	for _, t := range tags {
		switch t.name {
		case Peer, PeerLabels, Service, Without, Messages:
			continue
		case SourcePrincipal, DestinationPrincipal:
			if workload.IsPrincipal(t.value) {
				out[t.name] = t.value
			}
			continue
		}
		out[t.name] = t.value
		if !slices.Contains(order, t.name) {
			extra = append(extra, t.name)
		}
	}
	for name, value := range out {
		if value == "" && name != grpcStatus {
			out[name] = unknown
		}
	}
	for name := range strings.SplitSeq(has[Without], ",") {
		delete(out, name)
	}
	labels := make([]label, 0, len(out))
	for _, name := range slices.Concat(order, extra) {
		if v, ok := out[name]; ok {
			labels = append(labels, label{name, v})
		}
	}
	return labels
}

// unfoldWorkload sets the labels of the source or destination workload.
func unfoldWorkload(out map[string]string, side string, w workload.Workload) {
	if w.CanonicalRevision == "" {
		w.CanonicalRevision = workload.Latest
	}
	for i, value := range w.Values() {
		out[side+workload.Labels[i]] = value
	}
}

func render(labels []label) string {
	if len(labels) == 0 {
		return ""
	}
	var b strings.Builder
	for i, l := range labels {
		b.WriteByte("{,"[min(i, 1)])
		b.WriteString(l.name)
		b.WriteString(`="`)
		b.WriteString(l.value)
		b.WriteByte('"')
	}
	b.WriteByte('}')
	return b.String()
}
