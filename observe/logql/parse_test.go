package logql

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// documented are the examples of Loki's documentation: log queries, metric queries, the reference, addresses, template functions.
var documented = []string{
	`{container="query-frontend",namespace="loki-dev"} |= "metrics.go" | logfmt | duration > 10s and throughput_mb < 500`,
	`{app="mysql",name="mysql-backup"}`,
	`{name =~ "mysql.+"}`,
	`{name !~ "mysql.+", job="x"}`,
	"{name !~ `mysql-\\d+`, job=\"x\"}",
	`{name =~ "(?s).*mysql.*", job="x"}`,
	`{job="mysql"} |= "error"`,
	`{instance=~"kafka-[23]",name="kafka"} != "kafka.server:type=ReplicaManager"`,
	`{name="kafka"} |~ "tsdb-ops.*io:2003"`,
	"{name=\"cassandra\"} |~  `error=\\w+`",
	`{job="mysql"} |= "error" != "timeout"`,
	`{job="mysql"} |= "error" | json | line_format "{{.err}}"`,
	`{job="mysql"} | json | line_format "{{.message}}" |= "error"`,
	`{job="example"} | decolorize`,
	`{job="a"} | duration >= 20ms or size == 20KB and method!~"2.."`,
	`{job="a"} | duration >= 20ms or size == 20KB | method!~"2.."`,
	`{job="a"} | duration >= 20ms or size == 20KB , method!~"2.."`,
	`{job="a"} | duration >= 20ms or size == 20KB  method!~"2.."`,
	`{job="a"} | ((duration >= 20ms or method="GET") and size <= 20KB)`,
	`{job="a"} | duration >= 20ms or (method="GET" and size <= 20KB)`,
	`{job="a"} | json first_server="servers[0]", ua="request.headers[\"User-Agent\"]"`,
	`{job="a"} | json server_list="servers", headers="request.headers"`,
	`{job="a"} | json servers`,
	`{job="a"} | logfmt host, fwd_ip="fwd"`,
	`{job="a"} | logfmt --strict`,
	`{job="a"} | logfmt --strict host, fwd_ip="fwd"`,
	`{job="a"} | logfmt --keep-empty --strict host`,
	"{job=\"a\"} | pattern `<ip> - - <_> \"<method> <uri> <_>\" <status> <size> <_> \"<agent>\" <_>`",
	"{job=\"a\"} | pattern `<_> msg=\"<method> <path> (<status>) <latency>\"`",
	`{job="a"} | regexp "(?P<method>\\w+) (?P<path>[\\w|/]+) \\((?P<status>\\d+?)\\) (?P<duration>.*)"`,
	`{job="a"} | unpack`,
	`{container="frontend"} | logfmt | line_format "{{.query}} {{.duration}}"`,
	`{container="frontend"} | logfmt | line_format "{{.ip}} {{.status}} {{div .duration 1000}}"`,
	`{job="a"} | label_format foo=bar | label_format foo="new"`,
	`{job="varlogs"}|json|drop level, method="GET"`,
	`{job="varlogs"}|json|drop __error__`,
	`{job="varlogs"}|json|drop level, path, app=~"some-api.*"`,
	`{job="varlogs"}|json|keep level, method="GET"`,
	`{job="varlogs"}|json|keep level, tenant, app=~"some-api.*"`,
	`count_over_time({job="mysql"}[5m])`,
	`sum by (host) (rate({job="mysql"} |= "error" != "timeout" | json | duration > 10s [1m]))`,
	`count_over_time({job="mysql"}[5m] offset 5m)`,
	"sum(count_over_time({namespace=\"traefik\"}[5m])) # will return nothing\n or\nvector(0) # will return 0",
	"{job_name=\"myapp\"} != ip(\"192.168.4.5-192.168.4.20\")",
	`{job_name="myapp"} | logfmt | addr = ip("192.168.4.5/16") | addr != ip("192.168.4.2")`,
	`{job_name="myapp"} | logfmt | remote_addr = ip("2001:db8::1-2001:db8::8") | level = "error"`,
	`{job_name="myapp"} | logfmt | addr = ip("192.168.4.0/24") or addr = ip("10.10.15.0/24")`,
	`{job_name="myapp"} |= ip("192.168.4.5/16")`,
	`{job="security"} |~ "Invalid user.*" | regexp "(^(?P<user>\\S+ {1,2}){8})" | regexp "(^(?P<ip>\\S+ {1,2}){10})" | line_format "IP = {{.ip}}\tUSER = {{.user}}"`,
	`{job="security"} != "grafana_com" |= "session opened" != "sudo: " |regexp "(^(?P<user>\\S+ {1,2}){11})" | line_format "USER = {{.user}}"`,
	`{cluster="ops-tools1", namespace="loki-dev", job="loki-dev/query-frontend"} |= "metrics.go" != "out of order" | logfmt | duration > 30s or status_code != "200"`,
	`{job="loki-ops/query-frontend"} | logfmt | line_format "{{.msg}}" | regexp "(?P<method>\\w+) (?P<path>[\\w|/]+) \\((?P<status>\\d+?)\\) (?P<duration>.*)"`,
	`{cluster="ops-tools1", name="querier", namespace="loki-dev"}
  |= "metrics.go" != "loki-canary"
  | logfmt
  | query != ""
  | label_format query="{{ Replace .query \"\\n\" \"\" -1 }}"
  | line_format "{{ .ts}}\t{{.duration}}\ttraceID = {{.traceID}}\t{{ printf \"%-100.100s\" .query }} "`,
	`quantile_over_time(0.99,
      {cluster="ops-tools1",container="ingress-nginx"}
        | json
        | __error__ = ""
        | unwrap request_time [1m]) by (path)`,
	`sum by (org_id) (sum_over_time({cluster="ops-tools1",container="loki-dev"} |= "metrics.go" | logfmt | unwrap bytes_processed [1m]))`,
	`topk(10,sum(rate({region="us-east1"}[5m])) by (name))`,
	`sum(count_over_time({job="mysql"}[5m])) by (level)`,
	`avg(rate(({job="nginx"} |= "GET" | json | path="/home")[10s])) by (region)`,
	`1 + 1`,
	`sum(rate({app="foo"}[1m])) * 2`,
	`sum(rate({app="foo", level="warn"}[1m])) / sum(rate({app="foo", level="error"}[1m]))`,
	`rate({app=~"foo|bar"}[1m]) and rate({app="bar"}[1m])`,
	`count_over_time({foo="bar"}[1m]) > 10`,
	`count_over_time({foo="bar"}[1m]) > bool 10`,
	`sum without(app) (count_over_time({app="foo"}[1m])) > sum without(app) (count_over_time({app="bar"}[1m]))`,
	`sum without(app) (count_over_time({app="foo"}[1m])) > bool sum without(app) (count_over_time({app="bar"}[1m]))`,
	"{service_name=`distributor`} |> `<_> caller=http.go:194 level=debug <_> msg=\"POST /push.v1.PusherService/Push <_>`",
	"{service_name=`distributor`} !> `<_> caller=http.go:194 level=debug <_> msg=\"POST /push.v1.PusherService/Push <_>`",
	`1 + 2 / 3`,
	`2 * 3 % 2`,
	`max by(machine) (count_over_time({app="foo"}[1m])) > bool ignoring(machine) avg(count_over_time({app="foo"}[1m]))`,
	`sum by(machine) (count_over_time({app="foo"}[1m])) / on() sum(count_over_time({app="foo"}[1m]))`,
	`sum by (app, status) (rate({job="http-server"} | json [5m])) / on (app) group_left sum by (app) (rate({job="http-server"} | json [5m]))`,
	`sum by (user, namespace) (rate({job="events"} | logfmt | discarded="true" [5m]))
* on (user) group_left(organization)
max_over_time({job="cost-calculator"} | logfmt | unwrap cost [5m]) by (user, organization)`,
	`{app="foo"} # anything that comes after will not be interpreted in your query`,
	"{app=\"foo\"}\n    | json\n    # this line will be ignored\n    | bar=\"baz\" # this checks if bar = \"baz\"",
	`{cluster="ops-tools1",container="ingress-nginx"} | json | __error__ != "JSONParserErr"`,
	"quantile_over_time(\n\t0.99,\n\t{container=\"ingress-nginx\",service=\"hosted-grafana\"}\n\t| json\n\t| unwrap response_latency_seconds\n\t| __error__=\"\"[1m]\n\t) by (cluster)",
	`label_replace(rate({job="api-server",service="a:c"} |= "err" [1m]), "foo", "$1", "service", "(.*):.*")`,
	"{job=\"loki/querier\"} | label_format nowEpoch=`{{(unixEpoch now)}}`,createDateEpoch=`{{unixEpoch (toDate \"2006-01-02\" .createDate)}}` | label_format dateTimeDiff=`{{sub .nowEpoch .createDateEpoch}}` | dateTimeDiff > 86400",
	"{job=\"loki/querier\"} |= \"finish in prometheus\" | logfmt | line_format `{{ range $q := fromJson .queries }} {{ $q.query }} {{ end }}`",
	"{job=\"access_log\"} | json | line_format `{{.http_request_headers_x_forwarded_for | default \"-\"}}`",
	"{job=\"xyzlog\"} | line_format `{{ __line__ | count \"XYZ\"}}`",
	`approx_topk(3, sum by (name) (count_over_time({job="a"}[5m])))`,
	`sort_desc(sum by (name) (rate({job="a"}[5m])))`,
	`sum(rate_counter({job="tns/app"} | logfmt | __error__="" | unwrap label | __error__="" [5m]))`,
	`sum_over_time({job="a"} | logfmt | unwrap duration(took) [5m])`,
	`sum_over_time({job="a"} | logfmt | unwrap duration_seconds(took) [5m])`,
	`avg_over_time({job="a"} | logfmt | unwrap bytes(size) [5m]) without (pod)`,
	`vector(1)+vector(1)`,
}

// more are forms that the grammar allows and no example shows.
var more = []string{
	`{a="b",}`,
	`({a="b"} |= "x")`,
	`count_over_time({a="b"}[5m] |= "x" | json)`,
	`count_over_time(({a="b"})[5m])`,
	`count_over_time(({a="b"}[5m]))`,
	`count_over_time({a="b"} | json [1h30m] offset -5m)`,
	`sum_over_time({a="b"}[5m] offset 1d | json | unwrap x | y="z")`,
	`{a="b"} |= "x" or "y" or ip("10.0.0.0/8") != "z" or "w"`,
	`{a="b"} |~ "x" or "y"`,
	`{a="b"} | level = "error" or level=~"warn.*" and x > 1.5e3, y <= 0x10`,
	`{a="b"} | x > -5 | y != -1.5h`,
	`{a="b"} | json="x" | drop="y" | pattern != "z"`,
	`{a="b"} | count > 5 and rate = "x" or by = "y"`,
	`sum by (level, detected_level) (count_over_time({a="b"} | drop __error__ [1m]))`,
	`sum by () (rate({a="b"}[1m]))`,
	`avg_over_time({a="b"} | unwrap x [5s]) by ()`,
	`topk by (level) (5, rate({a="b"}[1m]))`,
	`-1 + +2`,
	`vector(-1.5)`,
	`2 ^ 3 ^ 2`,
	`0 / 0 + 1`,
	`-1 / 0`,
	`rate({a="b"}[1m]) unless on (x, y,) rate({c="d"}[1m]) or vector(0)`,
	`rate({a="b"}[1m]) * ignoring (x) group_right (y) rate({c="d"}[1m])`,
	`{a="b"} | json x="[0]", y="[\"a b\"].c[2].d", z`,
	`{a="b"} | pattern "<<from>> -> <<to>>"`,
	`{a="b"} |> "" or "<_>"`,
	`{_x1="d"}`,
	"{a=\"b\"} | size > 1.5KiB and size < 5GB and size != 20B and t >= 20µs and t < 1w",
	`{a="b"} | line_format ""`,
	`{a="b"} | line_format "{{ if and (contains \"he\" \"hello\") (contains \"llo\" \"hello\") }} yes {{end}}"`,
}

func TestParse(t *testing.T) {
	for _, query := range append(append([]string{}, documented...), more...) {
		expr, err := Parse(query)
		require.NoError(t, err, query)
		text := expr.String()
		again, err := Parse(text)
		require.NoError(t, err, "%s\nfrom %s", text, query)
		require.Equal(t, text, again.String())
	}
}

// TestParsed shows how some queries are understood.
func TestParsed(t *testing.T) {
	for query, want := range map[string]string{
		`1 + 2 / 3 * 3`:       `3`,
		`2 * 3 % 4`:           `2`,
		`2 ^ 3 ^ 2`:           `512`,
		`1 >= 1`:              `1`,
		`vector(1)+vector(1)`: `(vector(1) + vector(1))`,
		`vector(1) or vector(2) and vector(3) > 4`: `(vector(1) or (vector(2) and (vector(3) > 4)))`,
		`vector(1) - vector(2) - vector(3)`:        `((vector(1) - vector(2)) - vector(3))`,
		`{a="b"} | x="1" or y="2" and z="3"`:       `{a="b"} | (x="1" or (y="2" and z="3"))`,
		`{a="b"} | x="1" or y="2" z="3"`:           `{a="b"} | (x="1" or (y="2" and z="3"))`,
		`{a="b"} | x="1" or y="2" | z="3"`:         `{a="b"} | (x="1" or y="2") | z="3"`,
		`{a="b"} | x>5m != "line"`:                 `{a="b"} | x > 5m != "line"`,
		`sum(rate({a="b"}[90s])) by (c)`:           `sum by (c) (rate({a="b"} [1m30s]))`,
		`{a="b"} | json servers`:                   `{a="b"} | json servers="servers"`,
	} {
		expr, err := Parse(query)
		require.NoError(t, err, query)
		require.Equal(t, want, expr.String(), query)
	}
}

func TestParseErrors(t *testing.T) {
	deep := strings.Repeat("(", maxNested+1) + "1" + strings.Repeat(")", maxNested+1)
	for query, want := range map[string]string{
		``:                                      `parse error at line 1, col 1: syntax error: unexpected end of the query`,
		`{`:                                     `parse error at line 1, col 2: syntax error: unexpected end of the query, expecting identifier`,
		`{}`:                                    `queries require at least one regexp or equality matcher that does not have an empty-compatible value`,
		`{a:b="c"}`:                             `"a:b" is not a valid label name of a stream`,
		`{_time="c"}`:                           `"_time" is not a valid label name of a stream`,
		`{a=~".*"}`:                             `queries require at least one regexp or equality matcher`,
		`{a!="b"}`:                              `queries require at least one regexp or equality matcher`,
		`{a="b"`:                                `unexpected end of the query, expecting }`,
		`{a="b`:                                 `parse error at line 1, col 4: syntax error: literal not terminated`,
		"{a=\"b\"}\n |= `x":                     `parse error at line 2, col 5: syntax error: literal not terminated`,
		`{a="b"} |= x`:                          `unexpected x, expecting string`,
		`{a="b"} | unwrap x`:                    `parse error at line 1, col 11: syntax error: unexpected unwrap`,
		`{a="b"} | distinct x`:                  `unexpected distinct`,
		`{a="b"} |~ "("`:                        `error parsing regexp: missing closing )`,
		`{a=~"("}`:                              `error parsing regexp: missing closing )`,
		`{a="b"} |~ "(abcdefghij){900}"`:        `is too large`,
		`{a="b"} | regexp "x"`:                  `at least one named capture must be supplied`,
		`{a="b"} | regexp "(?P<x>a)(?P<x>b)"`:   `duplicate`,
		`{a="b"} | pattern "<_>"`:               `at least one named capture is required`,
		`{a="b"} | pattern "<a><b>"`:            `consecutive captures`,
		`{a="b"} |> "<a>"`:                      `named captures are not allowed`,
		`{a="b"} |~ ip("1.2.3.4")`:              `ip() can only be used with |= and !=`,
		`{a="b"} |= ip("1.2.3")`:                `ip: invalid pattern`,
		`{a="b"} | x = ip("10.0.0.9-10.0.0.1")`: `ip: invalid pattern`,
		`{a="b"} | x > "y"`:                     `unexpected`,
		`{a="b"} | x =~ 5`:                      `expecting string`,
		`{a="b"} | line_format "{{.x"`:          `invalid template`,
		`{a="b"} | line_format "{{nosuch .x}}"`: `invalid template: line:1: function "nosuch" not defined`,
		"{a=\"b\"} | line_format `{{define \"x\"}}{{template \"x\"}}{{end}}{{template \"x\"}}`": `define, block and template are not supported`,
		`{a="b"} | label_format __error__="x"`:                                                  `__error__ cannot be formatted`,
		`{a="b"} | label_format foo=bar,foo="new"`:                                              `multiple label name 'foo' not allowed in a single format operation`,
		`{a="b"} | json x="a..b"`:                                                               `cannot parse expression [a..b]`,
		`{a="b"} | logfmt --loose`:                                                              `expecting --strict or --keep-empty`,
		`rate({a="b"})`:                                                                         `needs a range like [5m]`,
		`rate({a="b"}[0s])`:                                                                     `the range must be more than 0`,
		`rate({a="b"}[5m][5m])`:                                                                 `unexpected [`,
		`count_over_time({job="mysql"}[5m]) offset 5m`:                                          `unexpected offset`,
		`sum_over_time({a="b"}[5m])`:                                                            `invalid aggregation sum_over_time without unwrap`,
		`count_over_time({a="b"} | unwrap x [5m])`:                                              `invalid aggregation count_over_time with unwrap`,
		`sum_over_time({a="b"} | unwrap x [5m]) by (y)`:                                         `grouping not allowed for sum_over_time aggregation`,
		`sum_over_time({a="b"} | unwrap x | json [5m])`:                                         `only label filters can follow unwrap`,
		`sum_over_time({a="b"} | unwrap minutes(x) [5m])`:                                       `expecting bytes, duration or duration_seconds`,
		`quantile_over_time({a="b"} | unwrap x [5m])`:                                           `parameter required for operation quantile_over_time`,
		`topk(rate({a="b"}[5m]))`:                                                               `parameter required for operation topk`,
		`topk(0, rate({a="b"}[5m]))`:                                                            `invalid parameter (must be greater than 0) topk(0`,
		`sum({a="b"})`:                                                                          `unexpected log query`,
		`{a="b"} + 1`:                                                                           `a leg of binary operation (+): a log query`,
		`1 or vector(1)`:                                                                        `unexpected literal for a leg of logical/set binary operation (or)`,
		`vector(1) + bool vector(1)`:                                                            `bool can only be used with a comparison`,
		`rate({a="b"}[1m]) and on (x) group_left rate({c="d"}[1m])`:                             `no grouping allowed for "and" operation`,
		`label_replace(rate({a="b"}[1m]), "a b", "", "", "")`:                                   `invalid label name in label_replace`,
		`label_replace(rate({a="b"}[1m]), "a", "", "b", "(")`:                                   `invalid regex in label_replace`,
		`1e`:                `"1e" is not a number, duration or count of bytes`,
		`5x`:                `"5x" is not a number, duration or count of bytes`,
		`{a="b"} | x > 5m5`: `is not a number, duration or count of bytes`,
		deep:                `the query is nested more than 64 deep`,
		`1` + strings.Repeat(" or vector(1)", 200):         `unexpected literal`,
		`vector(1)` + strings.Repeat(" or vector(1)", 200): `the query is nested more than 64 deep`,
		`{a="b"}` + strings.Repeat(` | json`, maxStages+1): `the query has more than 128 stages`,
		strings.Repeat("1", maxQuery+1):                    `input size too long`,
		strings.Repeat("+ ", maxTokens+1):                  `the query has more than 16384 words`,
	} {
		expr, err := Parse(query)
		require.Error(t, err, "%.100s gave %v", query, expr)
		require.Contains(t, err.Error(), want, "%.100s", query)
		require.True(t, Refused(err))
		require.Less(t, len(err.Error()), 300)
	}
}

func TestParseMatchers(t *testing.T) {
	m, err := ParseMatchers(` {a="b", c=~"d.*"} `)
	require.NoError(t, err)
	require.Len(t, m, 2)
	m, err = ParseMatchers(`{}`)
	require.NoError(t, err)
	require.Empty(t, m)
	for _, bad := range []string{``, `{a="b"} | json`, `a="b"`, `{a}`} {
		_, err = ParseMatchers(bad)
		require.Error(t, err, bad)
	}
}

// FuzzParse looks for queries that cannot be written down again, and for pipelines that do not end.
func FuzzParse(f *testing.F) {
	for _, query := range append(append([]string{}, documented...), more...) {
		f.Add(query, `{"a":{"b":[1,"x"]}} level=info msg="x \" y" 10.1.2.3 - - [x] "GET /"`)
	}
	f.Fuzz(func(t *testing.T, query, line string) {
		expr, err := Parse(query)
		if err != nil {
			if !Refused(err) {
				t.Fatalf("%q fails with %T", query, err)
			}
			return
		}
		text := expr.String()
		again, err := Parse(text)
		if err != nil {
			t.Fatalf("%q is written as %q, which fails: %s", query, text, err)
		}
		if second := again.String(); second != text {
			t.Fatalf("%q is written as %q and then as %q", query, text, second)
		}
		log, ok := expr.(*LogExpr)
		if !ok {
			g := grid{start: 0, step: 1000, count: 2}
			(&translation{grid: g}).write(expr)
			return
		}
		pipeline, err := log.NewPipeline()
		if err != nil {
			t.Fatalf("%q has no pipeline: %s", query, err)
		}
		pipeline.Run(WithLevel(entryOf(line)))
	})
}
