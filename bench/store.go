package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"time"

	"golang.org/x/sync/errgroup"

	"polymesh.dev/polymesh/pkg/status"
	"polymesh.dev/polymesh/test/e2e/node"
)

const (
	// storeRate is requests per second to the app, each of which is four lines and four spans of proxies.
	storeRate = 50
	// writtenRate is lines per second of one pod, above the 2,000 that the store keeps of one.
	writtenRate = 5000
	// queryRounds is how often each query is sent.
	queryRounds = 20
)

// writer is a pod that writes lines of about 100 bytes.
const writer = `{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "writer", "namespace": "default"}, "spec": {
	"terminationGracePeriodSeconds": 0, "containers": [{"name": "writer", "image": "my-registry/fastapi-service:1.0.0", "imagePullPolicy": "IfNotPresent", "command": ["python", "-uc",
	"import time\ni = 0\nwhile True:\n  print('\\n'.join('line %%09d of a pod that writes far more than any pod should, with a number that differs: %%d' %% (i + k, hash((i, k))) for k in range(%d)), flush=True)\n  i += %d\n  time.sleep(0.1)"]}]}}`

// storePhases are those of the measurement, in order.
var storePhases = []struct{ id, what string }{
	{"rest", "at rest"},
	{"requests", fmt.Sprintf("%d requests per second to the app", storeRate)},
	{"writer", fmt.Sprintf("a pod that writes %d lines per second, of which 2,000 are kept", writtenRate)},
}

// storeFigures are the columns of the table of phases.
var storeFigures = []string{"most RSS", "most anonymous", "CPU", "lines", "spans", "series"}

func storeFigure(phase, what string) figureID { return figureID("store " + phase + " " + what) }

func storeMatrix() matrix {
	m := matrix{heads: []string{"the store", "most RSS, MB", "most anonymous, MB", "CPU, % of a core", "lines per second", "spans per second", "series"}}
	for _, p := range storePhases {
		l := line{name: p.what}
		for _, what := range storeFigures {
			l.ids = append(l.ids, storeFigure(p.id, what))
		}
		m.lines = append(m.lines, l)
	}
	return m
}

// storeQuery is a request as the page, or Grafana, sends it.
type storeQuery struct {
	id, what, path string
	query          url.Values
}

var storeQueries = []storeQuery{
	{"graph", "the page's graph of all services, 15 minutes", "/api/polymesh/v1/graph", url.Values{"window": {"15m"}}},
	{"overview", "the page's overview", "/api/polymesh/v1/overview", nil},
	{"rates", "PromQL: requests by workload and code, now", "/api/v1/query", url.Values{"query": {`sum by (destination_workload, response_code) (rate(istio_requests_total{reporter="destination"}[5m]))`}}},
	{"quantile", "PromQL: the 99th percentile by workload, now", "/api/v1/query", url.Values{"query": {`histogram_quantile(0.99, sum by (le, destination_workload) (rate(istio_request_duration_milliseconds_bucket[5m])))`}}},
	{"lines", "LogQL: 100 lines with a word", "/loki/api/v1/query_range", url.Values{"query": {`{job="pods",namespace="` + appNamespace + `"} |= "predict"`}, "limit": {"100"}}},
	{"errors", "LogQL: lines by pod in a minute, now", "/loki/api/v1/query", url.Values{"query": {`sum by (pod) (count_over_time({job="pods"}[1m]))`}}},
	{"traces", "traces of one service", "/jaeger/api/traces", url.Values{"service": {"fastapi-service." + appNamespace}, "limit": {"20"}}},
}

func storeQueryRows() []row {
	var rows []row
	for _, q := range storeQueries {
		rows = append(rows, row{id: storeFigure("query", q.id), what: q.what, unit: "ms"})
	}
	return rows
}

// store measures the store of metrics, logs and traces on a server with Istio's demo profile and the guide's app: at rest, under requests, with a pod
// that writes too much, and how long queries take.
func (b *bench) store(ctx context.Context) error {
	return b.on(ctx, node.Options{Observe: true, Args: []string{"--mesh-profile", "demo"}}, func(n *node.Node) error {
		if err := startReady(ctx, n); err != nil {
			return err
		}
		if err := b.deployApp(ctx, n); err != nil {
			return err
		}
		if err := b.rest(ctx, n, storeIdle); err != nil {
			return err
		}
		if err := b.storePhase(ctx, n, "rest", b.idle, nil); err != nil {
			return err
		}
		if err := b.storePhase(ctx, n, "requests", b.load, func(ctx context.Context) error { return requestApp(ctx, n) }); err != nil {
			return err
		}
		for _, q := range storeQueries {
			if err := b.storeQuery(ctx, n, q); err != nil {
				return fmt.Errorf("%s: %w", q.what, err)
			}
		}
		if err := apply(ctx, n, fmt.Sprintf(writer, writtenRate/10, writtenRate/10)); err != nil {
			return err
		}
		if err := polymesh(ctx, n, "kubectl", "wait", "pod/writer", "--for=condition=Ready", "--timeout=120s"); err != nil {
			return err
		}
		return b.storePhase(ctx, n, "writer", b.load, nil)
	})
}

// storePhase measures the store for a time, while load runs.
func (b *bench) storePhase(ctx context.Context, n *node.Node, phase string, length time.Duration, load func(context.Context) error) error {
	before, err := storeNumbers(ctx, n)
	if err != nil {
		return err
	}
	begin, cpu := time.Now(), cpuSeconds(before.pid)
	g, ctx := errgroup.WithContext(ctx)
	ctx, cancel := context.WithTimeout(ctx, length)
	defer cancel()
	if load != nil {
		g.Go(func() error { return load(ctx) })
	}
	var rss, anonymous uint64
	g.Go(func() error {
		for ctx.Err() == nil {
			r, a := status.Memory(before.pid)
			if r == 0 {
				return fmt.Errorf("the store, process %d, has ended", before.pid)
			}
			rss, anonymous = max(rss, r), max(anonymous, a)
			_ = wait(ctx, 100*time.Millisecond) // it ends the loop
		}
		return nil
	})
	if err := g.Wait(); err != nil {
		return err
	}
	took := time.Since(begin).Seconds()
	used := cpuSeconds(before.pid) - cpu
	after, err := storeNumbers(context.WithoutCancel(ctx), n)
	if err != nil {
		return err
	}
	if after.pid != before.pid {
		return fmt.Errorf("the store was process %d, and is %d", before.pid, after.pid)
	}
	b.results.add(storeFigure(phase, "most RSS"), float64(rss)/1e6)
	b.results.add(storeFigure(phase, "most anonymous"), float64(anonymous)/1e6)
	b.results.add(storeFigure(phase, "CPU"), 100*used/took)
	b.results.add(storeFigure(phase, "lines"), float64(after.lines-before.lines)/took)
	b.results.add(storeFigure(phase, "spans"), float64(after.spans-before.spans)/took)
	b.results.add(storeFigure(phase, "series"), float64(after.series))
	return nil
}

// requestApp sends requests to the app, from outside, until ctx ends. Every answer must be right.
func requestApp(ctx context.Context, n *node.Node) error {
	pace := time.NewTicker(time.Second / storeRate)
	defer pace.Stop()
	g, inner := errgroup.WithContext(ctx)
	for {
		select {
		case <-inner.Done():
			if err := g.Wait(); ctx.Err() == nil {
				return err
			}
			return nil
		case <-pace.C:
			g.Go(func() error {
				err := predict(inner, n)
				if ctx.Err() != nil {
					return nil
				}
				return err
			})
		}
	}
}

// storeQuery measures one query, from the request to the end of the answer.
func (b *bench) storeQuery(ctx context.Context, n *node.Node, q storeQuery) error {
	var times []float64
	for range queryRounds {
		begin := time.Now()
		if _, err := askStore(ctx, n, q.path, q.query); err != nil {
			return err
		}
		times = append(times, time.Since(begin).Seconds()*1000)
	}
	b.results.add(storeFigure("query", q.id), median(times))
	return nil
}

// stored is what the store says it has.
type stored struct {
	pid                  int
	lines, spans, series int64
}

func storeNumbers(ctx context.Context, n *node.Node) (stored, error) {
	report, err := n.Report(ctx)
	if err != nil {
		return stored{}, err
	}
	s := stored{}
	for _, c := range report.Components {
		if c.Name == "observe" {
			s.pid = c.PID
		}
	}
	if s.pid == 0 {
		return s, errors.New("the store does not run")
	}
	text, err := askStore(ctx, n, "/api/polymesh/v1/status", nil)
	if err != nil {
		return s, err
	}
	var answer struct {
		Components []struct {
			Name    string
			Numbers map[string]int64
		}
	}
	if err := json.Unmarshal(text, &answer); err != nil {
		return s, fmt.Errorf("read the store's status: %w", err)
	}
	for _, c := range answer.Components {
		switch c.Name {
		case "metrics":
			s.series = c.Numbers["series"]
		case "logs":
			s.lines = c.Numbers["lines"]
		case "traces":
			s.spans = c.Numbers["spans"]
		}
	}
	return s, nil
}

func askStore(ctx context.Context, n *node.Node, path string, query url.Values) ([]byte, error) {
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", n.Layout().ObserveSocket())
	}}}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://store"+path+"?"+query.Encode(), nil)
	if err != nil {
		return nil, err
	}
	response, err := client.Do(request)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err == nil && response.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s %.200s", path, response.Status, text)
	}
	return text, err
}
