// Package accesslog reads lines of the proxies' access logs, in Istio's default text format and in its JSON format.
//
// It is used when lines are read, never when they are stored: the stored line stays what the proxy wrote. Callers of a mesh choose their path,
// user agent and other headers, and Envoy escapes nothing in the text format; so a line is read from both ends towards them, and what such a
// caller writes can only end up in the fields that are his.
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
// downstream_local_address, downstream_remote_address, requested_server_name, route_name; of JSON lines also those that were added.
// A field that Envoy has no value for ("-") is not there.
type Fields map[string]string

// Number is a field as a number, zero when it is none.
func (f Fields) Number(name string) float64 {
	n, err := strconv.ParseFloat(f[name], 64)
	if err != nil {
		return 0
	}
	return n
}

const (
	// maxLine bounds what is looked at.
	maxLine = 64 << 10
	// maxFields bounds how many fields a JSON line may have.
	maxFields = 100
)

// The fields of the text format, in their order. Those in quotes are between.
var (
	beforeFailure = [...]string{"response_code", "response_flags", "response_code_details", "connection_termination_details"}
	numbers       = [...]string{"bytes_received", "bytes_sent", "duration", "upstream_service_time"}
	quoted        = [...]string{"x_forwarded_for", "user_agent", "request_id", "authority", "upstream_host"}
	trailing      = [...]string{
		"upstream_cluster", "upstream_local_address", "downstream_local_address", "downstream_remote_address", "requested_server_name", "route_name",
	}
)

// quotes is how many of them the format has; with more, somebody else wrote one.
const quotes = 14

// Parse reads a line. It is false for what is no access log's: the proxies write other lines, too.
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
	// A path has no spaces: Envoy takes no request that has one in it.
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
		// Nobody else's quotes: fields that were added at the end do no harm.
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
		// From the right: what the proxies themselves wrote. What is left is the user agent's.
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

// valid says whether the fields that are always there have the form that Envoy gives them.
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

// text is a line that is taken apart from both ends.
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
	// An app's own lines have some of these, but not what only a proxy knows.
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
