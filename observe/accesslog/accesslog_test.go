package accesslog

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

const inbound = `[2026-11-30T04:05:06.123Z] "GET /api/items?id=1 HTTP/1.1" 200 - via_upstream - "-" 0 152 9 8 "10.0.0.7" "curl/8.5.0" ` +
	`"30450c11-359b-9e2d-9844-a7a456c25a09" "api.shop:8080" "10.42.0.9:8080" inbound|8080|| 127.0.0.6:43581 10.42.0.9:8080 10.42.0.7:0 ` +
	`outbound_.8080_._.api.shop.svc.cluster.local default`

func TestText(t *testing.T) {
	for name, c := range map[string]struct {
		line string
		want Fields
	}{
		"inbound": {inbound, Fields{
			"start_time": "2026-11-30T04:05:06.123Z", "method": "GET", "path": "/api/items?id=1", "protocol": "HTTP/1.1", "response_code": "200",
			"response_code_details": "via_upstream", "bytes_received": "0", "bytes_sent": "152", "duration": "9", "upstream_service_time": "8",
			"x_forwarded_for": "10.0.0.7", "user_agent": "curl/8.5.0", "request_id": "30450c11-359b-9e2d-9844-a7a456c25a09", "authority": "api.shop:8080",
			"upstream_host": "10.42.0.9:8080", "upstream_cluster": "inbound|8080||", "upstream_local_address": "127.0.0.6:43581",
			"downstream_local_address": "10.42.0.9:8080", "downstream_remote_address": "10.42.0.7:0",
			"requested_server_name": "outbound_.8080_._.api.shop.svc.cluster.local", "route_name": "default",
		}},
		"no healthy upstream": {
			`[2026-11-30T04:05:06.123Z] "POST /pay HTTP/2" 503 UF,URX upstream_reset_before_response_started{remote_connection_failure|TLS_error} - ` +
				`"TLS_error:|268435581:SSL routines:OPENSSL_internal:CERTIFICATE_VERIFY_FAILED:TLS_error_end" 10 91 30 - "-" "Go-http-client/2.0" "id-1" "pay" ` +
				`"[fd00::9]:8080" outbound|8080||pay.shop.svc.cluster.local - 10.43.0.1:8080 10.42.0.7:50000 - default` + "\n",
			Fields{
				"start_time": "2026-11-30T04:05:06.123Z", "method": "POST", "path": "/pay", "protocol": "HTTP/2", "response_code": "503", "response_flags": "UF,URX",
				"response_code_details":             "upstream_reset_before_response_started{remote_connection_failure|TLS_error}",
				"upstream_transport_failure_reason": "TLS_error:|268435581:SSL routines:OPENSSL_internal:CERTIFICATE_VERIFY_FAILED:TLS_error_end",
				"bytes_received":                    "10", "bytes_sent": "91", "duration": "30", "user_agent": "Go-http-client/2.0", "request_id": "id-1", "authority": "pay",
				"upstream_host": "[fd00::9]:8080", "upstream_cluster": "outbound|8080||pay.shop.svc.cluster.local", "downstream_local_address": "10.43.0.1:8080",
				"downstream_remote_address": "10.42.0.7:50000", "route_name": "default",
			},
		},
		"TCP": {
			`[2026-11-30T04:05:06.123Z] "- - -" 0 - - - "-" 1203 8051 15003 - "-" "-" "-" "-" "10.42.0.5:5432" outbound|5432||db.shop.svc.cluster.local ` +
				`10.42.0.7:40000 10.43.7.7:5432 10.42.0.7:39000 - -`,
			Fields{
				"start_time": "2026-11-30T04:05:06.123Z", "response_code": "0", "bytes_received": "1203", "bytes_sent": "8051", "duration": "15003",
				"upstream_host": "10.42.0.5:5432", "upstream_cluster": "outbound|5432||db.shop.svc.cluster.local", "upstream_local_address": "10.42.0.7:40000",
				"downstream_local_address": "10.43.7.7:5432", "downstream_remote_address": "10.42.0.7:39000",
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			got, ok := Parse(c.line)
			require.True(t, ok)
			require.Equal(t, c.want, got)
		})
	}
	got, ok := Parse(inbound + " 4bf92f3577b34da6")
	require.True(t, ok, "a field that was added at the end")
	require.Equal(t, "default", got["route_name"])
	require.Equal(t, 152.0, got.Number("bytes_sent"))
	require.Zero(t, got.Number("method"))
}

// TestForgery: what a caller writes into his headers cannot become another field.
func TestForgery(t *testing.T) {
	forged := `x" "forged-id" "forged-authority" "6.6.6.6:6" outbound|1||forged 1.1.1.1:1 2.2.2.2:2 3.3.3.3:3 forged.name forged-route`
	for what, line := range map[string]string{
		"user agent":    strings.Replace(inbound, "curl/8.5.0", forged, 1),
		"forwarded for": strings.Replace(inbound, "10.0.0.7", `a" "b`+forged, 1),
		"path":          strings.Replace(inbound, "/api/items?id=1", `/"HTTP/1.1"_200`, 1),
	} {
		got, ok := Parse(line)
		require.True(t, ok, what)
		require.Equal(t, "30450c11-359b-9e2d-9844-a7a456c25a09", got["request_id"], what)
		require.Equal(t, "api.shop:8080", got["authority"], what)
		require.Equal(t, "inbound|8080||", got["upstream_cluster"], what)
		require.Equal(t, "200", got["response_code"], what)
		require.Equal(t, "10.42.0.7:0", got["downstream_remote_address"], what)
	}
}

func TestJSON(t *testing.T) {
	got, ok := Parse(`{"start_time":"2026-11-30T04:05:06.123Z","method":"GET","path":"/a\"b","response_code":200,"response_flags":"-","duration":7,` +
		`"upstream_cluster":"inbound|8080||","request_id":"id-1","user_agent":null,"bytes_sent":"12","added":{"a":1},"trace_id":"t"}`)
	require.True(t, ok)
	require.Equal(t, Fields{
		"start_time": "2026-11-30T04:05:06.123Z", "method": "GET", "path": `/a"b`, "response_code": "200", "duration": "7",
		"upstream_cluster": "inbound|8080||", "request_id": "id-1", "bytes_sent": "12", "trace_id": "t",
	}, got)
}

func TestOtherLines(t *testing.T) {
	for _, line := range []string{
		"", "[", "{", "{}", "[2026-11-30T04:05:06.123Z]", `[2026-11-30T04:05:06.123Z] "GET / HTTP/1.1" 200`,
		"2026-11-30T04:05:06.123456Z\tinfo\tEnvoy proxy is ready",
		`[2026-11-30 04:05:06.123][1][info][main] [source/server/server.cc:1] starting`,
		`{"level":"info","msg":"x","request_id":"id-1"}`,
		`{"start_time":"yesterday","response_flags":"-","upstream_cluster":"x"}`,
		`{"start_time":"2026-11-30T04:05:06.123Z","response_flags":"-","upstream_cluster":"x","duration":-1}`,
		strings.Replace(inbound, " 200 ", " two hundred ", 1),
		strings.Replace(inbound, "2026", "now", 1),
		strings.Repeat("[", maxLine+1),
	} {
		_, ok := Parse(line)
		require.False(t, ok, line[:min(len(line), 80)])
	}
}

func FuzzParse(f *testing.F) {
	f.Add(inbound)
	f.Add(`{"start_time":"2026-11-30T04:05:06.123Z","response_flags":"-","upstream_cluster":"x"}`)
	f.Fuzz(func(t *testing.T, line string) {
		fields, ok := Parse(line)
		if !ok {
			require.Nil(t, fields)
			return
		}
		require.NotEmpty(t, fields["start_time"])
		require.LessOrEqual(t, len(fields), maxFields)
	})
}

func BenchmarkText(b *testing.B) {
	for b.Loop() {
		Parse(inbound)
	}
}
