//go:build e2e

package e2e

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protowire"

	"polymesh.dev/polymesh/test/e2e/node"
)

// What clients without a mesh write reaches the store by its Services: spans in Jaeger's Thrift, and samples by Prometheus' remote write,
// which the node with the guide's app allows.
func TestObserveWrites(t *testing.T) {
	n := app(t)
	service := func(name, port string) string {
		return net.JoinHostPort(n.Kubectl(t, "get", "service", name, "-n", "istio-system", "-o", "jsonpath={.spec.clusterIP}"), port)
	}
	t.Run("thrift", func(t *testing.T) {
		name := fmt.Sprintf("thrift-%d", time.Now().UnixNano())
		post(t, n, "http://"+service("jaeger-collector", "14268")+"/api/traces?format=jaeger.thrift", "application/x-thrift", thriftBatch(name, time.Now()), http.StatusOK, http.StatusAccepted)
		n.Eventually(t, time.Minute, func() (bool, string) {
			var traces struct {
				Data []struct {
					Spans []struct{ OperationName string }
				}
			}
			if err := readJSON(n, service("jaeger-query", "16686"), "/api/traces", url.Values{"service": {name}}, &traces); err != nil {
				return false, err.Error()
			}
			return len(traces.Data) == 1 && len(traces.Data[0].Spans) == 1 && traces.Data[0].Spans[0].OperationName == "sell", fmt.Sprintf("the store has %+v", traces)
		})
	})
	t.Run("remote write", func(t *testing.T) {
		prometheus := service("prometheus", "9090")
		name := fmt.Sprintf("sold_%d", time.Now().UnixNano())
		post(t, n, "http://"+prometheus+"/api/v1/write", "application/x-protobuf", literalSnappy(writeRequest(name, 42, time.Now())), http.StatusNoContent)
		n.Eventually(t, time.Minute, func() (bool, string) {
			var found struct {
				Data struct {
					Result []struct{ Value [2]any }
				}
			}
			if err := readJSON(n, prometheus, "/api/v1/query", url.Values{"query": {name}}, &found); err != nil {
				return false, err.Error()
			}
			return len(found.Data.Result) == 1 && found.Data.Result[0].Value[1] == "42", fmt.Sprintf("the store has %+v", found)
		})
	})
}

func post(t *testing.T, n *node.Node, address, contentType string, body []byte, want ...int) {
	t.Helper()
	request, err := http.NewRequestWithContext(t.Context(), http.MethodPost, address, bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	request.Header.Set("Content-Type", contentType)
	if strings.HasSuffix(contentType, "protobuf") {
		request.Header.Set("Content-Encoding", "snappy")
		request.Header.Set("X-Prometheus-Remote-Write-Version", "0.1.0")
	}
	response, err := n.HTTPInside(false).Do(request)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	text, _ := io.ReadAll(io.LimitReader(response.Body, 1<<10))
	if !slices.Contains(want, response.StatusCode) {
		t.Fatalf("%s: %s: %s", address, response.Status, text)
	}
}

// readJSON decodes the answer of a service.
func readJSON(n *node.Node, address, path string, query url.Values, answer any) error {
	text, err := readOK(n, address, path, query)
	if err != nil {
		return err
	}
	return json.Unmarshal([]byte(text), answer)
}

// thriftBatch is a Batch of one span in Thrift's binary protocol
// (https://github.com/jaegertracing/jaeger-idl/blob/main/thrift/jaeger.thrift).
func thriftBatch(service string, start time.Time) []byte {
	const i32, i64, text, structure, list = 8, 10, 11, 12, 15
	var b []byte
	field := func(kind byte, id uint16) { b = binary.BigEndian.AppendUint16(append(b, kind), id) }
	number := func(id uint16, v int64) { field(i64, id); b = binary.BigEndian.AppendUint64(b, uint64(v)) }
	word := func(id uint16, s string) {
		field(text, id)
		b = append(binary.BigEndian.AppendUint32(b, uint32(len(s))), s...)
	}
	end := func() { b = append(b, 0) }

	field(structure, 1) // Process
	word(1, service)
	end()
	field(list, 2) // of Span
	b = binary.BigEndian.AppendUint32(append(b, structure), 1)
	number(1, start.UnixNano()) // trace id, low
	number(2, 1)
	number(3, start.UnixNano()) // span id
	number(4, 0)                // no parent
	word(5, "sell")
	field(i32, 7) // flags
	b = binary.BigEndian.AppendUint32(b, 1)
	number(8, start.UnixMicro())
	number(9, 1500)
	end()
	end()
	return b
}

// writeRequest is a message of Prometheus' remote write 1.0 with one sample (https://prometheus.io/docs/specs/prw/remote_write_spec/).
func writeRequest(name string, value float64, at time.Time) []byte {
	message := func(b []byte, id protowire.Number, inner []byte) []byte {
		return protowire.AppendBytes(protowire.AppendTag(b, id, protowire.BytesType), inner)
	}
	label := message(message(nil, 1, []byte("__name__")), 2, []byte(name))
	sample := protowire.AppendFixed64(protowire.AppendTag(nil, 1, protowire.Fixed64Type), math.Float64bits(value))
	sample = protowire.AppendVarint(protowire.AppendTag(sample, 2, protowire.VarintType), uint64(at.UnixMilli()))
	return message(nil, 1, message(message(nil, 1, label), 2, sample))
}

// literalSnappy is a block of Snappy's format with up to 256 bytes, not compressed (https://github.com/google/snappy/blob/main/format_description.txt).
func literalSnappy(text []byte) []byte {
	return append(append(binary.AppendUvarint(nil, uint64(len(text))), 60<<2, byte(len(text)-1)), text...)
}
