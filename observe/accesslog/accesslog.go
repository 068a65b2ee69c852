// Package accesslog reads lines of the proxies' access logs, in Istio's default text format and in its JSON format.
//
// It is only used when lines are read: they are stored as the proxy wrote them. Callers in a mesh choose their path,
// user agent and other headers, and Envoy does not escape them in the text format. So a line is parsed from both ends inwards, and a
// caller's text can only end up in the caller's own fields.
package accesslog

import (
	"encoding/json"
	"strconv"
	"strings"
	"time"
)

// Fields are the values of a line by their names in Istio's JSON format: start_time, method, path, protocol, response_code, response_flags,
// response_code_details, connection_termination_details, upstream_transport_failure_reason, bytes_received, bytes_sent, duration,
// upstream_service_time, x_forwarded_for, user_agent, request_id, authority, upstream_host, upstream_cluster, upstream_local_address,
// downstream_local_address, downstream_remote_address, requested_server_name, route_name; JSON lines may have further fields.
// A field without a value ("-") is left out.
type Fields map[string]string

// Number returns a field as a number, zero if it is not a number.
func (f Fields) Number(name string) float64 {
	n, err := strconv.ParseFloat(f[name], 64)
	if err != nil {
		return 0
	}
	return n
}

const (
	// maxLine is how much of a line is parsed.
	maxLine = 64 << 10
	// maxFields bounds how many fields a JSON line may have.
	maxFields = 100
)

// The fields of the text format, in their order. Fields in quotes are between them.
var (
	beforeFailure = [...]string{"response_code", "response_flags", "response_code_details", "connection_termination_details"}
	numbers       = [...]string{"bytes_received", "bytes_sent", "duration", "upstream_service_time"}
	quoted        = [...]string{"x_forwarded_for", "user_agent", "request_id", "authority", "upstream_host"}
	trailing      = [...]string{
		"upstream_cluster", "upstream_local_address", "downstream_local_address", "downstream_remote_address", "requested_server_name", "route_name",
	}
)

// quotes is the number of quotation marks in the format. If there are more, a caller's text contains one.
const quotes = 14

// Parse parses a line. It returns false if it is not an access log line: proxies write other lines, too.
func Parse(line string) (Fields, bool) {
	line = strings.TrimSuffix(line, "\n")
	switch {
	case len(line) > maxLine:
		return nil, false
	case strings.HasPrefix(line, "["):
		return parseText(line)
	case strings.HasPrefix(line, "{"):
		return parseJSON(line)
	}
	return nil, false
}

func parseText(line string) (Fields, bool) {
	f := Fields{}
	t := text{rest: line}
	t.skip("[")
	f.set("start_time", t.until("] \""))
	// A path has no spaces: Envoy rejects requests with one.
	f.set("method", t.until(" "))
	f.set("path", t.until(" "))
	f.set("protocol", t.until("\" "))
	for _, name := range beforeFailure {
		f.set(name, t.until(" "))
	}
	t.skip("\"")
	f.set("upstream_transport_failure_reason", t.until("\" "))
	for _, name := range numbers {
		f.set(name, t.until(" "))
	}
	t.skip("\"")
	if t.failed {
		return nil, false
	}
	if strings.Count(line, "\"") == quotes {
		// Without quotes in callers' texts, additional fields at the end do no harm.
		for i, name := range quoted {
			end := "\" \""
			if i == len(quoted)-1 {
				end = "\" "
			}
			f.set(name, t.until(end))
		}
		for i, name := range trailing {
			if i == len(trailing)-1 {
				f.set(name, t.word())
				break
			}
			f.set(name, t.until(" "))
		}
	} else {
		for i := len(trailing) - 1; i > 0; i-- {
			f.set(trailing[i], t.last(" "))
		}
		f.set(trailing[0], t.last("\" "))
		// From the right: fields that the proxy itself wrote. The rest belongs to the user agent.
		for i := len(quoted) - 1; i > 1; i-- {
			f.set(quoted[i], t.last("\" \""))
		}
		f.set(quoted[0], t.until("\" \""))
		f.set(quoted[1], t.rest)
	}
	if t.failed || !f.valid() {
		return nil, false
	}
	return f, true
}

func (f Fields) set(name, value string) {
	if value != "" && value != "-" {
		f[name] = value
	}
}

// valid reports whether the fields that are always present have Envoy's format.
func (f Fields) valid() bool {
	if _, err := time.Parse(time.RFC3339Nano, f["start_time"]); err != nil {
		return false
	}
	for _, name := range [...]string{"response_code", "bytes_received", "bytes_sent", "duration"} {
		if v, ok := f[name]; ok {
			if _, err := strconv.ParseUint(v, 10, 64); err != nil {
				return false
			}
		}
	}
	return true
}

// text is a line that is parsed from both ends.
type text struct {
	rest   string
	failed bool
}

func (t *text) skip(prefix string) {
	var ok bool
	if t.rest, ok = strings.CutPrefix(t.rest, prefix); !ok {
		t.failed = true
	}
}

func (t *text) until(end string) string {
	before, after, ok := strings.Cut(t.rest, end)
	if !ok {
		t.failed = true
		return ""
	}
	t.rest = after
	return before
}

func (t *text) last(separator string) string {
	i := strings.LastIndex(t.rest, separator)
	if i < 0 {
		t.failed = true
		return ""
	}
	after := t.rest[i+len(separator):]
	t.rest = t.rest[:i]
	return after
}

func (t *text) word() string {
	word, rest, _ := strings.Cut(t.rest, " ")
	t.rest = rest
	return word
}

func parseJSON(line string) (Fields, bool) {
	var values map[string]json.RawMessage
	if err := json.Unmarshal([]byte(line), &values); err != nil || len(values) > maxFields {
		return nil, false
	}
	// Lines of an app may have some of these fields, but not those that only a proxy knows.
	for _, name := range [...]string{"start_time", "response_flags", "upstream_cluster"} {
		if _, ok := values[name]; !ok {
			return nil, false
		}
	}
	f := Fields{}
	for name, raw := range values {
		var s string
		switch {
		case len(raw) == 0 || raw[0] == '{' || raw[0] == '[' || string(raw) == "null":
			continue
		case raw[0] == '"':
			if err := json.Unmarshal(raw, &s); err != nil {
				return nil, false
			}
		default:
			s = string(raw)
		}
		f.set(name, s)
	}
	if !f.valid() {
		return nil, false
	}
	return f, true
}
