//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptrace"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/time/rate"

	"polymesh.dev/polymesh/test/e2e/node"
)

// loadWorkers is how many requests are under way at once. The example's circuit breaker lets 100 pass.
const loadWorkers = 24

// traffic is requests of which a load sends so many in a second.
type traffic struct {
	perSecond rate.Limit
	// request returns one, and a part of its response.
	request func(number int64) (method, path, body, want string)
}

// guideTraffic is requests to the two services that have code in the guide: all three routes. It leaves the machine enough time to start
// pods.
var guideTraffic = traffic{150, guideRequest}

// load is traffic for the guide's app, from outside through the gateway, half of it on connections that are kept, half on new ones.
// Nothing is sent a second time.
type load struct {
	t       *testing.T
	n       *node.Node
	request func(number int64) (method, path, body, want string)
	stop    context.CancelFunc
	workers sync.WaitGroup
	ended   bool
	sent    atomic.Int64

	mu       sync.Mutex
	answered map[string]int // by route, kind of connection and status
	lost     []string
	numbers  []int64 // of the lost ones
}

// startLoad starts traffic to a node's address, which end ends, at the latest with the test. A request that is lost fails the test.
func startLoad(t *testing.T, n *node.Node, sends traffic) *load {
	ctx, stop := context.WithCancel(context.Background())
	l := &load{t: t, n: n, request: sends.request, stop: stop, answered: map[string]int{}}
	pace := rate.NewLimiter(sends.perSecond, loadWorkers)
	for i := range loadWorkers {
		keep := i%2 == 0
		client := n.HTTP(keep)
		l.workers.Go(func() {
			defer client.CloseIdleConnections()
			for pace.Wait(ctx) == nil {
				l.one(client, keep, l.sent.Add(1))
			}
		})
	}
	t.Cleanup(l.end)
	return l
}

// wait waits until this many requests were sent since the start.
func (l *load) wait(count int64) {
	l.t.Helper()
	l.n.Eventually(l.t, 10*time.Minute, func() (bool, string) {
		sent := l.sent.Load()
		return sent >= count, fmt.Sprintf("%d of %d requests were sent", sent, count)
	})
}

func guideRequest(number int64) (method, path, body, want string) {
	query := fmt.Sprintf("?number=%d", number)
	switch number % 10 {
	case 0:
		return http.MethodGet, "/api/v1/call-go" + query, "", `"status":"healthy"`
	case 1, 3, 5, 7:
		return http.MethodGet, "/api/v1/gateway" + query, "", `"service":"go-service"`
	default:
		return http.MethodPost, "/api/v1/predict" + query, fmt.Sprintf(`{"data": [%d, %d]}`, number, number+2),
			fmt.Sprintf(`{"prediction":%d.0,"confidence":0.95}`, number+1)
	}
}

func (l *load) one(client *http.Client, keep bool, number int64) {
	method, path, body, want := l.request(number)
	connections := 0
	// The transport sends a GET again, unasked, when a kept connection turns out to be closed. Here that is a loss.
	ctx := httptrace.WithClientTrace(context.Background(), &httptrace.ClientTrace{GotConn: func(httptrace.GotConnInfo) { connections++ }})
	request, err := http.NewRequestWithContext(ctx, method, "http://"+l.n.Address()+path, strings.NewReader(body))
	if err != nil {
		l.lose(number, err.Error())
		return
	}
	request.Host = appHost
	request.Header.Set("Content-Type", "application/json")
	kind := "a new connection"
	if keep {
		kind = "a kept connection"
	}
	begin := time.Now()
	lose := func(format string, args ...any) {
		l.lose(number, fmt.Sprintf("%s %s %s on %s, %s: %s", begin.Format("15:04:05.000"), method, path, kind,
			time.Since(begin).Round(time.Millisecond), fmt.Sprintf(format, args...)))
	}
	response, err := client.Do(request)
	if err != nil {
		lose("%v", err)
		return
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	switch {
	case err != nil:
		lose("status %d, then %v", response.StatusCode, err)
	case response.StatusCode != http.StatusOK || !strings.Contains(string(text), want):
		lose("status %d %v %q, want %q", response.StatusCode, response.Header, text, want)
	case connections > 1:
		lose("answered, but only when it was sent again on a second connection")
	default:
		name, _, _ := strings.Cut(path, "?")
		l.mu.Lock()
		l.answered[fmt.Sprintf("%s %s on %s: %d", method, name, kind, response.StatusCode)]++
		l.mu.Unlock()
	}
}

func (l *load) lose(number int64, why string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lost = append(l.lost, why)
	l.numbers = append(l.numbers, number)
}

// end waits for the requests under way and reports what became of all.
func (l *load) end() {
	l.t.Helper()
	if l.ended {
		return
	}
	l.ended = true
	l.stop()
	l.workers.Wait()
	sent := l.sent.Load()
	for _, what := range slices.Sorted(maps.Keys(l.answered)) {
		l.t.Logf("%6d × %s", l.answered[what], what)
	}
	if len(l.lost) == 0 {
		l.t.Logf("0 of %d requests lost", sent)
		return
	}
	const most = 20
	l.t.Errorf("%d of %d requests lost:\n%s", len(l.lost), sent, strings.Join(l.lost[:min(most, len(l.lost))], "\n"))
	l.t.Logf("what the proxies that still run say of them:\n%s", l.accessLogs(l.numbers[:min(most, len(l.numbers))]))
}

// accessLogs finds requests in the access logs (the profile demo writes them), which contain Envoy's reason by its response
// flags.
func (l *load) accessLogs(numbers []int64) string {
	var found strings.Builder
	for _, from := range [][]string{
		{"-n", "istio-system", "-l", "istio=ingressgateway"},
		{"-n", appNamespace, "-l", "app", "-c", "istio-proxy"},
	} {
		out, err := l.n.KubectlErr(append([]string{"logs", "--prefix", "--tail=-1", "--since=15m"}, from...)...)
		if err != nil {
			fmt.Fprintln(&found, err)
		}
		for line := range strings.Lines(out) {
			if slices.ContainsFunc(numbers, func(n int64) bool { return strings.Contains(line, fmt.Sprintf("?number=%d ", n)) }) {
				found.WriteString(line)
			}
		}
	}
	return found.String()
}
