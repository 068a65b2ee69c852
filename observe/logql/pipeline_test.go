package logql

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"polymesh.dev/polymesh/observe/logstore"
)

const (
	jsonLine = `{"protocol": "HTTP/2.0","servers": ["129.0.1.1","10.2.1.3"],"request": {"time": "6.032","method": "GET","host": "foo.grafana.net","size": "55","headers": {"Accept": "*/*","User-Agent": "curl/7.68.0"}},` +
		`"response": {"status": 401,"size": "228","latency_seconds": "6.031"}}`
	logfmtLine = `at=info method=GET path=/ host=grafana.net fwd="124.133.124.161" service=8ms status=200`
	nginxLine  = `0.191.12.2 - - [10/Jun/2021:09:14:29 +0000] "GET /api/plugins/versioncheck HTTP/1.1" 200 2 "-" "Go-http-client/2.0" "13.76.247.102, 34.120.177.193" "TLSv1.2" "US" ""`
	pushLine   = `level=debug ts=2021-06-10T09:24:13.472094048Z caller=logging.go:66 traceID=0568b66ad2d9294c msg="POST /loki/api/v1/push (204) 16.652862ms"`
	patternOne = `ts=2024-04-05T08:40:13.585911094Z caller=http.go:194 level=debug traceID=23e54a271db607cc orgID=3648 msg="POST /push.v1.PusherService/Push (200) 12.684035ms"`
)

// step is a query and what becomes of a line. A line that is dropped has no labels and no line.
type step struct {
	query, line string
	labels      string // those that the pipeline made, name=value by space
	out         string // the line, if it is another one
	dropped     bool
}

func kept(query, line, labels string) step    { return step{query: query, line: line, labels: labels} }
func dropped(query, line string) step         { return step{query: query, line: line, dropped: true} }
func to(query, line, labels, out string) step { return step{query, line, labels, out, false} }

func TestPipeline(t *testing.T) {
	for _, s := range []step{
		// Line filters.
		kept(`|= "error"`, "an error here", ``),
		dropped(`|= "error"`, "an ERROR here"),
		dropped(`!= "kafka.server:type=ReplicaManager"`, "x kafka.server:type=ReplicaManager y"),
		kept(`!= "kafka.server:type=ReplicaManager"`, "kafka_server:type=ReplicaManager", ``),
		kept(`|~ "tsdb-ops.*io:2003"`, "a tsdb-ops b\nio:2003 c", ``),
		kept("|~ `error=\\w+`", "x error=a y", ``),
		dropped("|~ `error=\\w+`", "x error= y"),
		kept(`|~ "(?i)ERROR"`, "error", ``),
		dropped(`!~ "a.c"`, "xabcx"),
		dropped(`|= "error" != "timeout"`, "error: timeout"),
		kept(`|= "error" != "timeout"`, "error: other", ``),
		kept(`|= "a" or "b"`, "b", ``),
		dropped(`|= "a" or "b"`, "c"),
		dropped(`!= "a" or "b"`, "b"),
		kept(`!= "a" or "b"`, "c", ``),
		kept(`|= ""`, "c", ``),
		kept("|> `<_> caller=http.go:194 level=debug <_> msg=\"POST /push.v1.PusherService/Push <_>`", patternOne, ``),
		dropped("!> `<_> caller=http.go:194 level=debug <_> msg=\"POST /push.v1.PusherService/Push <_>`", patternOne),
		kept(`|> "a <_> c"`, "a b c c", ``),
		dropped(`|> "a <_> c"`, "a b c d"),
		dropped(`|> "a <_>"`, "a "),
		dropped(`|> "<_>"`, ""),
		kept(`|> ""`, "", ``),
		dropped(`|> ""`, "x"),
		dropped(`|> "hello"`, "hello world"),

		// Addresses.
		dropped(`|= ip("3.180.71.3")`, `93.180.71.3 - - "GET"`),
		kept(`|= ip("3.180.71.3")`, `3.180.71.3 - - "GET"`, ``),
		kept(`|= ip("192.168.4.5/16")`, `from 192.168.200.1:80.`, ``),
		dropped(`!= ip("192.168.4.5-192.168.4.20")`, `x=192.168.4.20`),
		kept(`!= ip("192.168.4.5-192.168.4.20")`, `x=192.168.4.21`, ``),
		kept(`|= ip("2001:db8::1-2001:db8::8")`, `[2001:db8::5]:443`, ``),
		kept(`|= ip("::1")`, `at ::1.`, ``),
		dropped(`|= ip("::1")`, `at ::2`),
		kept(`| logfmt | addr = ip("192.168.4.5/16") | addr != ip("192.168.4.2")`, `addr=192.168.4.3`, `addr=192.168.4.3`),
		dropped(`| logfmt | addr = ip("192.168.4.5/16") | addr != ip("192.168.4.2")`, `addr=192.168.4.2`),
		kept(`| logfmt | addr = ip("192.168.4.0/24") or addr = ip("10.10.15.0/24")`, `addr=10.10.15.9`, `addr=10.10.15.9`),
		dropped(`| logfmt | addr != ip("10.0.0.0/8")`, `other=1`),
		kept(`| json | addr = ip("10.0.0.0/8")`, `no json`, `__error__=JSONParserErr`),

		// JSON.
		kept(`| json`, jsonLine, `protocol=HTTP/2.0 request_time=6.032 request_method=GET request_host=foo.grafana.net request_size=55 request_headers_Accept=*/* `+
			`request_headers_User_Agent=curl/7.68.0 response_status=401 response_size=228 response_latency_seconds=6.031`),
		kept(`| json first_server="servers[0]", ua="request.headers[\"User-Agent\"]"`, jsonLine, `first_server=129.0.1.1 ua=curl/7.68.0`),
		kept(`| json server_list="servers", headers="response"`, jsonLine, `server_list=["129.0.1.1","10.2.1.3"] headers={"status":°401,"size":°"228","latency_seconds":°"6.031"}`),
		kept(`| json servers`, jsonLine, `servers=["129.0.1.1","10.2.1.3"]`),
		kept(`| json none="a.b[3]", one="protocol"`, jsonLine, `none= one=HTTP/2.0`),
		kept(`| json`, `{ "a.b": {"c": "d"}, "e": "f" }`, `a_b_c=d e=f`),
		kept(`| json`, `{"n":null,"t":true,"e":"","x":-1.5e3,"1a":"b","ü":"c","q":"a\"\u00e9\/"}`, `t=true e= x=-1.5e3 _1a=b _=c q=a"é/`),
		kept(`| json`, `{"a":"1","a":"2","job":"y"}`, `a=1 job_extracted=y`),
		kept(`| json`, `{"trace_id":"new"}`, `trace_id_extracted=new`),
		kept(`| json`, `INFO GET / loki.net 200`, `__error__=JSONParserErr`),
		kept(`| json`, `[1]`, `__error__=JSONParserErr`),
		kept(`| json x="[0]"`, `[1]`, `x=1`),
		kept(`| json`, `{"a":1} x`, `__error__=JSONParserErr`),
		kept(`| json`, `{"a":01}`, `__error__=JSONParserErr`),
		kept(`| json`, `{"a":`+strings.Repeat(`{"a":`, 100)+`1`+strings.Repeat(`}`, 101), `__error__=JSONParserErr`),
		dropped(`| json | __error__ != "JSONParserErr"`, `no`),
		dropped(`| json | __error__ = ""`, `no`),
		kept(`| json | __error__ != ""`, `no`, `__error__=JSONParserErr`),
		kept(`| json | drop __error__`, `no`, ``),
		kept(`| json | x > 5`, `no`, `__error__=JSONParserErr`),

		// logfmt.
		kept(`| logfmt`, logfmtLine, `at=info method=GET path=/ host=grafana.net fwd=124.133.124.161 service=8ms status=200`),
		kept(`| logfmt host, fwd_ip="fwd"`, logfmtLine, `host=grafana.net fwd_ip=124.133.124.161`),
		kept(`| logfmt host, none`, logfmtLine, `host=grafana.net none=`),
		kept(`| logfmt`, `a=1 =value foo=bar=buzz fo"o=bar alone empty= b="x y" c="q\"q\n" d`, `a=1 b=x°y c=q"q¶`),
		kept(`| logfmt --strict`, `a=1 =value b=2`, `a=1 __error__=LogfmtParserErr`),
		kept(`| logfmt --strict`, `foo=bar=buzz`, `__error__=LogfmtParserErr`),
		kept(`| logfmt --strict`, `fo"o=bar`, `__error__=LogfmtParserErr`),
		kept(`| logfmt --strict`, `key=value key2="value in double quotes"`, `key=value key2=value°in°double°quotes`),
		kept(`| logfmt --keep-empty`, `a=1 alone empty=`, `a=1 alone= empty=`),
		kept(`| logfmt --strict --keep-empty`, `a=" unterminated`, `__error__=LogfmtParserErr`),
		kept(`| logfmt`, `a.b=1 job=z`, `a_b=1 job_extracted=z`),
		kept(`| json | logfmt`, `a=1`, `__error__=JSONParserErr a=1`),

		// pattern, regexp, unpack.
		kept("| pattern `<ip> - - <_> \"<method> <uri> <_>\" <status> <size> <_> \"<agent>\" <_>`", nginxLine,
			`ip=0.191.12.2 method=GET uri=/api/plugins/versioncheck status=200 size=2 agent=Go-http-client/2.0`),
		kept("| pattern `<_> msg=\"<method> <path> (<status>) <latency>\"`", pushLine, `method=POST path=/loki/api/v1/push status=204 latency=16.652862ms`),
		kept("| pattern `<<from>> -> <<to>>`", `<from@domain.com> -> <to@domain.com>`, `from=from@domain.com to=to@domain.com`),
		kept("| pattern `x <a>`", `y 1`, ``),
		kept("| pattern `<a>,<b>`", `1`, `a=1`),
		kept(`| regexp "(?P<method>\\w+) (?P<path>[\\w|/]+) \\((?P<status>\\d+?)\\) (?P<duration>.*)"`, `POST /api/prom/api/v1/query_range (200) 1.5s`,
			`method=POST path=/api/prom/api/v1/query_range status=200 duration=1.5s`),
		kept(`| regexp "(?P<x>\\d+)"`, `none`, ``),
		to(`| unpack`, `{"container": "myapp","pod": "pod-3223f","_entry": "original log message"}`, `container=myapp pod=pod-3223f`, `original log message`),
		kept(`| unpack`, `{"container": "myapp"}`, ``),
		kept(`| unpack`, `no`, `__error__=JSONParserErr`),
		to(`| logfmt | line_format "{{.msg}}" | regexp "(?P<method>\\w+) (?P<path>[\\w|/]+) \\((?P<status>\\d+?)\\) (?P<duration>.*)" | keep method, path`,
			`level=debug msg="POST /api/prom/api/v1/query_range (200) 1.5s"`, `method=POST path=/api/prom/api/v1/query_range`, `POST /api/prom/api/v1/query_range (200) 1.5s`),

		// Label filters.
		kept(`| logfmt | duration > 1m and bytes_consumed > 20MB`, `duration=61s bytes_consumed=20.5MB`, `duration=61s bytes_consumed=20.5MB`),
		dropped(`| logfmt | duration > 1m and bytes_consumed > 20MB`, `duration=59s bytes_consumed=21MB`),
		dropped(`| logfmt | duration > 1m and bytes_consumed > 20MB`, `duration=2m bytes_consumed=20MB`),
		kept(`| logfmt | size = 1.5KiB`, `size=1536B`, `size=1536B`),
		kept(`| logfmt | status >= 400 and status < 5e2`, `status=404`, `status=404`),
		kept(`| logfmt | status == 404.0`, `status=404`, `status=404`),
		dropped(`| logfmt | status != 404`, `status=404`),
		dropped(`| logfmt | status > 1`, `other=404`),
		kept(`| logfmt | t > -5 | u <= -1h`, `t=-4 u=-61m`, `t=-4 u=-61m`),
		kept(`| logfmt | status > 1`, `status=abc`, `status=abc __error__=LabelFilterErr`),
		kept(`| logfmt | took > 1s`, `took=5`, `took=5 __error__=LabelFilterErr`),
		dropped(`| logfmt | took > 1s | __error__=""`, `took=5`),
		kept(`| logfmt | method=~"2.." or size == 20KB`, `method=200`, `method=200`),
		dropped(`| logfmt | method=~"2.."`, `method=2000`),
		kept(`| logfmt | none=""`, `a=1`, `a=1`),
		kept(`| logfmt | none!="x"`, `a=1`, `a=1`),
		kept(`| logfmt | a="1" or b="2" and c="3"`, `a=1`, `a=1`),
		dropped(`| logfmt | (a="1" or b="2") and c="3"`, `a=1`),
		kept(`| job="x"`, `y`, ``),
		kept(`| trace_id="0123"`, `y`, ``),
		kept(`| json | __error__="JSONParserErr" or x=1`, `y`, `__error__=JSONParserErr`),

		// Formatting.
		to(`| logfmt | line_format "{{.query}} {{.duration}}"`, `query=q duration=1s`, `query=q duration=1s`, `q 1s`),
		to(`| logfmt | line_format "{{.ip}} {{.status}} {{div .duration 1000}}"`, `ip=1.1.1.1 status=200 duration=3000`, `ip=1.1.1.1 status=200 duration=3000`, `1.1.1.1 200 3`),
		to(`| line_format "{{.none}}|{{.job}}|{{.trace_id}}|{{__line__}}"`, `y`, ``, `|x|0123|y`),
		kept(`| logfmt | label_format foo=bar | drop bar`, `bar=1`, `foo=1`),
		kept(`| logfmt | label_format foo="{{.bar}}"`, `bar=1`, `foo=1 bar=1`),
		kept(`| logfmt | label_format foo="new" | label_format foo="{{.foo}}er"`, `foo=1`, `foo=newer`),
		kept(`| label_format new=job`, `y`, ``),
		kept(`| label_format job="z"`, `y`, `job=z`),
		kept(`| line_format "{{repeat 999999999 .job}}"`, `y`, `__error__=TemplateFormatErr`),
		to("| decolorize", "[2022-11-04 22:17:57.811] \x1b[0;32mhttp\x1b[0m: GET /_health (0 ms) 204", ``, "[2022-11-04 22:17:57.811] http: GET /_health (0 ms) 204"),
		to("| decolorize", "a\x1b[", ``, "a"),
		to(`| logfmt | query != "" | label_format query="{{ Replace .query \"\\n\" \"\" -1 }}" | line_format "{{ .ts}}\t{{.duration}}\ttraceID = {{.traceID}}\t{{ printf \"%-100.100s\" .query }} " | keep x`,
			`ts=2020-10-23T20:32:18.094668233Z traceID=1980d41501b57b68 query="{cluster=\"ops-tools1\", job=\"loki-ops/query-frontend\"} |= \"query_range\"" duration=650.22401ms`, ``,
			"2020-10-23T20:32:18.094668233Z\t650.22401ms\ttraceID = 1980d41501b57b68\t"+`{cluster="ops-tools1", job="loki-ops/query-frontend"} |= "query_range"`+strings.Repeat(" ", 100-70)+" "),

		// drop and keep.
		kept(`|json|drop level, method="GET"`, `{"level": "info", "method": "GET", "path": "/", "host": "grafana.net", "status": "200"}`, `host=grafana.net path=/ status=200`),
		kept(`|json|drop level, path, app=~"some-api.*"`, `{"app": "some-api-service", "level": "info", "method": "GET", "path": "/", "host": "grafana.net", "status": "200"}`,
			`host=grafana.net method=GET status=200`),
		kept(`|json|drop level, path, app=~"some-api.*"`, `{"app": "other-service", "level": "info", "method": "GET", "path": "/", "host": "grafana.net", "status": "200"}`,
			`app=other-service host=grafana.net method=GET status=200`),
		kept(`|json|keep level, method="GET"`, `{"level": "info", "method": "GET", "path": "/"}`, `level=info method=GET`),
		kept(`|json|keep level, method="GET"`, `{"level": "info", "method": "POST", "path": "/"}`, `level=info`),
		kept(`|json|keep level, tenant, app=~"some-api.*"`, `{"app": "some-api-service", "level": "info", "path": "/"}`, `app=some-api-service level=info`),
		kept(`|json|keep level`, `no`, `__error__=JSONParserErr`),
	} {
		log, err := ParseLog(`{job="x"} ` + s.query)
		require.NoError(t, err, s.query)
		pipeline, err := log.NewPipeline()
		require.NoError(t, err)
		got, ok := pipeline.Run(logstore.Entry{Time: testStart, Line: s.line, Labels: fields("job", "x"), Metadata: fields("trace_id", "0123")})
		what := s.query + "\n" + s.line
		require.Equal(t, s.dropped, !ok, what)
		if !ok {
			continue
		}
		want := map[string]string{}
		for _, pair := range strings.Fields(s.labels) {
			name, value, _ := strings.Cut(pair, "=")
			want[name] = strings.NewReplacer("°", " ", "¶", "\n").Replace(value)
		}
		made := map[string]string{}
		for _, l := range got.Entries[0].Parsed {
			if l.Name != detailsLabel {
				made[l.Name] = l.Value
			}
		}
		if s.out == "" {
			s.out = s.line
		}
		require.Equal(t, want, made, what)
		require.Equal(t, s.out, got.Entries[0].Text, what)
	}
}

func TestTemplates(t *testing.T) {
	for text, want := range map[string]string{
		`{{ .path | replace " " "_" | trunc 5 | upper }}`:                                                       `/A_B/`,
		`{{ if and (contains "he" "hello") (contains "llo" "hello") }} yes {{end}}`:                             ` yes `,
		`{{ if contains .err "ErrTimeout" }} timeout {{else if contains "he" "hello"}} yes {{else}} no {{end}}`: ` yes `,
		`{{ date "2006-01-02" (toDate "2006-01-02" "2021-11-02") }}`:                                            `2021-11-02`,
		`{{ toDateInZone "2006-01-02" "UTC" "2021-11-02" | unixEpoch }}`:                                        `1635811200`,
		`{{ toDateInZone "2006-01-02" "UTC" "2021-11-02" | unixEpochMillis }}`:                                  `1635811200000`,
		`{{ toDateInZone "2006-01-02" "UTC" "2021-11-02" | unixEpochNanos }}`:                                   `1635811200000000000`,
		`{{ date "2006-01-02" (unixToTime "1679577215") }}`:                                                     `2023-03-23`,
		`{{ "1h30m" | duration_seconds }} {{ duration "100ms" }}`:                                               `5400 0.1`,
		`{{ "5 MiB" | bytes }} {{ bytes "3k" }} {{ bytes "1G" }}`:                                               `5.24288e+06 3000 1e+09`,
		`{{ alignLeft 5 "hello world"}}|{{ alignLeft 5 "hi"}}|`:                                                 `hello|hi   |`,
		`{{ alignRight 5 "hello world"}}|{{ alignRight 5 "hi"}}|`:                                               `world|   hi|`,
		`{{ "foo" | b64enc }} {{ b64dec "Zm9v" }}`:                                                              `Zm9v foo`,
		`{{ default "-" "" }}{{ default "-" "foo" }}{{ .none | default "x" }}`:                                  `-foox`,
		`{{ range $q := fromJson .queries }}{{ $q.query }};{{ end }}`:                                           `a;b;`,
		`{{ fromJson "no" }}`: ``,
		`{{ "HELLO" | lower }} {{ upper "hello" }} {{ title "hello world" }}`: `hello HELLO Hello World`,
		`{{ indent 2 "a\nb" }}`:                       "  a\n  b",
		`{{ nindent 2 "a\nb" }}`:                      "\n  a\n  b",
		`{{ repeat 3 "hello" }}`:                      `hellohellohello`,
		`{{ printf "%-6.3s|%5.1f|%d" .path 2.25 7 }}`: `/a    |  2.2|7`,
		`{{ replace "hello" "world" "hello world" }}`: `world world`,
		`{{ substr 0 5 "hello world"}} {{ substr 6 11 "hello world"}} {{ substr 6 -1 "hello world"}}`:                       `hello world world`,
		`{{ trim "   hello    " }}{{ trimAll "$" "$5.00" }}{{ trimPrefix "-" "-hello" }}{{ trimSuffix "-" "hello-" }}`:      `hello5.00hellohello`,
		`{{ trunc 5 "hello world"}} {{ trunc -5 "hello world"}}`:                                                            `hello world`,
		`{{ urlencode "a b&c" }} {{ urldecode "a%20b" }}`:                                                                   `a+b%26c a b`,
		`{{ if eq "hello" "hello" }}y{{end}}{{ if hasSuffix "lo" "hello" }}y{{end}}{{ if hasPrefix "he" "hello" }}y{{end}}`: `yyy`,
		`{{ add 3 2 5 }} {{ addf 3.5 2 5 }} {{ sub 5 2 }} {{ subf 5.5 2 1.5 }}`:                                             `10 10.5 3 2`,
		`{{ mul 5 2 3 }} {{ mulf 5.5 2 2.5 }} {{ div 10 2 }} {{ divf 10 2 4 }} {{ mod 10 3 }}`:                              `30 27.5 5 1.25 1`,
		`{{ ceil 123.001 }} {{ floor 123.9999 }} {{ round 123.555555 3 }} {{ round 123.88571428571 5 .2 }}`:                 `124 123 123.556 123.88572`,
		`{{ max 1 2 3 }} {{ maxf 1 2.5 3 }} {{ min 1 2 3 }} {{ minf 1 2.5 3 }}`:                                             `3 3 1 1`,
		`{{ "3" | int }} {{ "3.5" | float64 }} {{ add "4" 1.9 }} {{ add "x" 1 }}`:                                           `3 3.5 5 1`,
		`{{ count "a|b" "abab" }} {{ count "o" "foo" }}`:                                                                    `4 2`,
		`{{ regexReplaceAll "(a*)bc" "aabc" "${1}a" }} {{ regexReplaceAllLiteral "(ts=)" "ts=1" "$1=" }}`:                   `aaa $1=1`,
		`{{ __timestamp__ | unixEpochNanos | len }}`:                                                                        `19`,
		`{{ (__timestamp__).Unix | printf "%d" | len }}`:                                                                    `10`,
		`{{ .path | Replace "x" "y" -1 }}`:                                                                                  ``,
		`{{ html "<" }}{{ js "'" }}{{ urlquery " " }}{{ print 1 2 "a" }}`:                                                   `&lt;\'+1 2a`,
	} {
		r := newRecord()
		r.reset(logstore.Entry{Time: testStart, Line: "line", Labels: fields("path", "/a b/c", "queries", `[{"query":"a"},{"query":"b"}]`, "err", "x")})
		template, err := newTemplate(text)
		require.NoError(t, err, text)
		got, ok := template.execute(r)
		if want == "" && !ok {
			continue
		}
		require.True(t, ok, "%s: %s", text, r.details)
		require.Equal(t, want, got, text)
	}
}

// TestTemplateBounds has templates that would run forever, or take all memory.
func TestTemplateBounds(t *testing.T) {
	doubling := `{{$a := print .path .path}}` + strings.Repeat(`{{$a = print $a $a}}`, 60)
	many := `{{$a := repeat 250000 "x"}}`
	for c := 'b'; c <= 'z'; c++ {
		many += `{{$` + string(c) + ` := upper $a}}`
	}
	for name, text := range map[string]string{
		"rounds":        `{{range 1000000000000}}{{end}}`,
		"nested rounds": `{{range 9999}}{{range 9999}}{{end}}{{end}}`,
		"output":        `{{range 9999}}{{$.path}}` + strings.Repeat("x", 100) + `{{end}}`,
		"doubling":      doubling,
		"variables":     many,
		"width":         `{{printf "%999999d" 1}}`,
		"star":          `{{printf "%*d" 999999 1}}`,
		"arguments":     `{{$a := repeat 250000 "x"}}{{printf "` + strings.Repeat("%[1]s", 1000) + `" $a}}`,
		"repeat":        `{{repeat 999999999 "x"}}`,
		"indent":        `{{indent 999999999 "x"}}`,
		"align":         `{{alignLeft 999999999 "x"}}`,
		"replace":       `{{replace "" (repeat 1000 "x") (repeat 1000 "y")}}`,
		"regexp":        `{{regexReplaceAll "." (repeat 10000 "y") "$0$0$0$0$0$0$0$0$0$0"}}`,
		"large regexp":  `{{count "(abcdefghij){900}" "x"}}`,
		"bad regexp":    `{{count "(" "x"}}`,
		"division":      `{{div 1 0}}{{mod 1 0}}`,
		"call":          `{{call .path}}`,
		"round":         `{{round 1.5 400}}`,
		"index":         `{{index fromJson "[1]" 5}}`,
	} {
		t.Run(name, func(t *testing.T) {
			r := newRecord()
			r.reset(logstore.Entry{Time: testStart, Line: "line", Labels: fields("path", "/a")})
			template, err := newTemplate(text)
			require.NoError(t, err)
			got, ok := template.execute(r)
			require.False(t, ok, "%.100s", got)
			require.Equal(t, errTemplate, r.err)
			t.Log(r.details)
		})
	}
	_, err := newTemplate(strings.Repeat("x", maxTemplate+1))
	require.Error(t, err)
}

func TestLevel(t *testing.T) {
	for line, want := range map[string]string{
		`{"time":"x","level":"ERROR","msg":"a"}`:             "error",
		`{"msg":"level of water","severity": "Warning"}`:     "warn",
		`ts=1 level=debug msg="level=error"`:                 "debug",
		`2026-11-30T04:07:00Z WARN [main] error`:             "warn",
		`I1130 04:07:00.000000 1 main.go:1] starting`:        "unknown",
		`[2026-11-30T04:07:00.000Z] "GET / HTTP/1.1" 200 - `: "unknown",
		`panic: runtime error`:                               "fatal",
		``:                                                   "unknown",
	} {
		require.Equal(t, want, levelOf(logstore.Entry{Line: line}), line)
	}
	require.Equal(t, "info", levelOf(logstore.Entry{Line: "error", Metadata: fields("severity_text", "INFO")}))
	require.Equal(t, "fatal", levelOf(logstore.Entry{Line: "error", Labels: fields("level", "Panic")}))
}
