package main

import (
	"bytes"
	"context"
	_ "embed"
	"encoding/json"
	"fmt"
	"strings"
	"text/template"
	"time"

	"polymesh.dev/polymesh/pkg/status"
	"polymesh.dev/polymesh/test/e2e/node"
)

//go:embed load.yaml
var loadManifests string

// way is a path of requests from a client to a server. Its name is also the prefix of its pods.
type way struct {
	Name, what string
	client     bool // the client has a sidecar
	server     bool // the server has a sidecar
}

// end is a pod of a way.
type end struct {
	Name    string
	Sidecar bool
}

// Ends are used in the manifests.
func (w way) Ends() []end { return []end{{"client", w.client}, {"server", w.server}} }

var (
	direct = way{"direct", "no mesh", false, false}
	one    = way{"one", "one sidecar, at the server, plain text", false, true}
	two    = way{"two", "two sidecars, mTLS", true, true}
	quiet  = way{"quiet", "two sidecars, mTLS, no metrics", true, true}
	ways   = []way{direct, one, two, quiet}
)

const (
	loadNamespace = "bench-load"
	// connections is the number of the client's connections, as in Istio's own measurements.
	connections = "16"
	topRate     = 1000
)

// rates are those of the targets, in requests per second.
var rates = []int{100, 500, topRate}

// figure returns the id of a figure of a way at a rate.
func (w way) figure(rate int, what string) figureID {
	return figureID(fmt.Sprintf("load %s %d %s", w.Name, rate, what))
}

// most is the id of the maximum number of requests per second.
func (w way) most() figureID { return figureID("load " + w.Name + " most") }

// requests measures requests of 1 KB through the mesh, for each way in turn at each rate.
func (b *bench) requests(ctx context.Context) error {
	return b.on(ctx, node.Options{}, func(n *node.Node) error {
		if err := b.startWays(ctx, n); err != nil {
			return err
		}
		for _, rate := range rates {
			for _, w := range ways {
				if err := b.measureWay(ctx, n, w, rate); err != nil {
					return fmt.Errorf("%s, %d requests per second: %w", w.what, rate, err)
				}
			}
		}
		for _, id := range []string{"client CPU", "server CPU"} {
			on, off := b.results.last(two.figure(topRate, id)), b.results.last(quiet.figure(topRate, id))
			b.results.add(figureID("stats logger: "+id), 100*(on-off)/on)
		}
		for _, w := range ways {
			// At the maximum rate: at most one request at a time on each connection.
			found, err := attack(ctx, n, w.Name+"-client", w.target(), b.load, "-rate=0", "-max-workers="+connections)
			if err != nil {
				return fmt.Errorf("%s, maximum rate: %w", w.what, err)
			}
			b.results.add(w.most(), found.Throughput)
		}
		return nil
	})
}

// startWays creates the pods, and waits until requests take the intended ways.
func (b *bench) startWays(ctx context.Context, n *node.Node) error {
	if err := startReady(ctx, n); err != nil {
		return err
	}
	if err := b.importArchives(ctx, n, "bench/load.tar"); err != nil {
		return err
	}
	var manifests strings.Builder
	if err := template.Must(template.New("load.yaml").Parse(loadManifests)).Execute(&manifests, ways); err != nil {
		return err
	}
	if err := apply(ctx, n, manifests.String()); err != nil {
		return err
	}
	for _, w := range ways {
		for _, e := range w.Ends() {
			if err := polymesh(ctx, n, "kubectl", "rollout", "status", "-n", loadNamespace, "deployment/"+w.Name+"-"+e.Name, "--timeout=300s"); err != nil {
				return err
			}
		}
		if err := eventually(ctx, n, 2*time.Minute, func() error { return w.check(ctx, n) }); err != nil {
			return fmt.Errorf("%s: %w", w.what, err)
		}
		// The first requests open connections and fill caches.
		if _, err := attack(ctx, n, w.Name+"-client", w.target(), b.load/4, "-rate=500"); err != nil {
			return fmt.Errorf("%s, first requests: %w", w.what, err)
		}
	}
	return nil
}

// check verifies what the server sees of a request, and what a sidecar counts.
func (w way) check(ctx context.Context, n *node.Node) error {
	answer, err := inPod(ctx, n, loadNamespace, w.Name+"-client", "end", "/echo", "get", w.url())
	if err != nil {
		return err
	}
	// Envoy at a server forwards the client's certificate, and adds an id.
	for header, want := range map[string]bool{"X-Forwarded-Client-Cert": w.client && w.server, "X-Request-Id": w.server} {
		if strings.Contains(answer, header) != want {
			return fmt.Errorf("the server sees %s: %v, want %v: %s", header, !want, want, answer)
		}
	}
	for _, e := range w.Ends() {
		if !e.Sidecar {
			continue
		}
		counted, err := inPod(ctx, n, loadNamespace, w.Name+"-"+e.Name, "istio-proxy", "pilot-agent", "request", "GET", "stats?filter=istio_requests_total")
		if err != nil {
			return err
		}
		if want := w != quiet; strings.Contains(counted, "istio_requests_total") != want {
			return fmt.Errorf("the %s's sidecar counts requests: %v, want %v", e.Name, !want, want)
		}
	}
	return nil
}

func (w way) target() string { return "POST " + w.url() + "\n@/body\n" }

func (w way) url() string { return "http://" + w.Name + "-server:8080/" }

// measureWay sends requests at a fixed rate, and measures the sidecars' usage meanwhile.
func (b *bench) measureWay(ctx context.Context, n *node.Node, w way, rate int) error {
	found, err := processesOf(ctx, n)
	if err != nil {
		return err
	}
	envoys := map[string]process{} // by end
	for _, p := range found {
		for _, e := range w.Ends() {
			if p.Name == w.Name+"-"+e.Name+": envoy" {
				p.CPU = cpuSeconds(p.PID)
				envoys[e.Name] = p
			}
		}
	}
	result, err := attack(ctx, n, w.Name+"-client", w.target(), b.load, fmt.Sprintf("-rate=%d", rate))
	if err != nil {
		return err
	}
	for _, e := range w.Ends() {
		if !e.Sidecar {
			continue
		}
		p, ok := envoys[e.Name]
		if !ok {
			return fmt.Errorf("the %s has no Envoy", e.Name)
		}
		rss, anonymous := status.Memory(p.PID)
		if rss == 0 {
			return fmt.Errorf("the %s's Envoy exited during the measurement", e.Name)
		}
		// Seconds for a thousand requests equal cores at a thousand requests per second.
		b.results.add(w.figure(rate, e.Name+" CPU"), 1000*(cpuSeconds(p.PID)-p.CPU)/float64(result.Requests))
		b.results.add(w.figure(rate, e.Name+" RSS"), float64(rss)/1e6)
		b.results.add(w.figure(rate, e.Name+" anonymous"), float64(anonymous)/1e6)
	}
	b.results.add(w.figure(rate, "reached"), result.Throughput)
	b.results.add(w.figure(rate, "p50"), result.Latencies.P50/1e6)
	b.results.add(w.figure(rate, "p90"), result.Latencies.P90/1e6)
	b.results.add(w.figure(rate, "p99"), result.Latencies.P99/1e6)
	return nil
}

// attackReport is vegeta's report; times are in nanoseconds.
type attackReport struct {
	Latencies struct {
		P50 float64 `json:"50th"`
		P90 float64 `json:"90th"`
		P99 float64 `json:"99th"`
	} `json:"latencies"`
	Requests   int      `json:"requests"`
	Throughput float64  `json:"throughput"`
	Success    float64  `json:"success"`
	Errors     []string `json:"errors"`
}

// attack sends requests from a Deployment's pod for a time; the target is in vegeta's format. With a rate, vegeta sends each
// request on schedule, however late earlier responses are; the latency includes waiting for a free connection.
// A failed request is an error, because it would count as a fast one.
func attack(ctx context.Context, n *node.Node, client, target string, duration time.Duration, how ...string) (*attackReport, error) {
	const results = "/results/attack"
	args := append([]string{"/vegeta", "attack", "-duration=" + duration.String(), "-timeout=0", "-max-body=0",
		"-connections=" + connections, "-max-connections=" + connections, "-output=" + results}, how...)
	if _, err := inPodWith(ctx, n, target, loadNamespace, client, "end", args...); err != nil {
		return nil, err
	}
	out, err := inPod(ctx, n, loadNamespace, client, "end", "/vegeta", "report", "-type=json", results)
	if err != nil {
		return nil, err
	}
	return readAttack([]byte(out))
}

// readAttack reads vegeta's report.
func readAttack(text []byte) (*attackReport, error) {
	report := &attackReport{}
	if err := json.Unmarshal(text, report); err != nil {
		return nil, fmt.Errorf("read vegeta's report: %w", err)
	}
	if report.Success < 1 {
		return nil, fmt.Errorf("%.2f %% of %d requests failed: %s", 100*(1-report.Success), report.Requests, strings.Join(report.Errors, "; "))
	}
	return report, nil
}

// inPod runs a command in a container of a Deployment's pod and returns its output.
func inPod(ctx context.Context, n *node.Node, namespace, deployment, container string, command ...string) (string, error) {
	return inPodWith(ctx, n, "", namespace, deployment, container, command...)
}

func inPodWith(ctx context.Context, n *node.Node, input, namespace, deployment, container string, command ...string) (string, error) {
	cmd := n.PolymeshCommand(ctx, append([]string{"kubectl", "exec", "-i", "-n", namespace, "deployment/" + deployment, "-c", container, "--"}, command...)...)
	var out, errOut bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(input), &out, &errOut
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("%s in %s: %w: %s", strings.Join(command, " "), deployment, err, strings.TrimSpace(errOut.String()))
	}
	return out.String(), nil
}

// apply applies manifests with kubectl.
func apply(ctx context.Context, n *node.Node, manifests string) error {
	cmd := n.PolymeshCommand(ctx, "kubectl", "apply", "-f", "-")
	cmd.Stdin = strings.NewReader(manifests)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("kubectl apply: %w: %s", err, strings.TrimSpace(string(out)))
	}
	return nil
}
