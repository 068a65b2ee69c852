package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"polymesh.dev/polymesh/pkg/status"
	"polymesh.dev/polymesh/test/e2e/node"
)

const (
	apiClients = 8
	// apiRounds is how often each server has the load in each run.
	apiRounds = 3
	// Requests of each client in a round. There are apiClients·apiCreates objects to list.
	apiCreates, apiGets, apiLists = 200, 500, 20
)

// collector is a way to run the server's garbage collector.
type collector struct{ name, gogc string }

var (
	shippedGC  = collector{"as it ships", ""}
	collectors = []collector{shippedGC, {"GOGC=25", "25"}, {"GOGC=100", "100"}}
	requestsOf = []string{"create", "get", "list"}
)

func (c collector) figure(what string) figureID { return figureID("API, " + c.name + ": " + what) }

// api sends requests to API servers that differ in nothing but GOGC, one server after the other: two nodes at the same time would
// share the cores.
func (b *bench) api(ctx context.Context) error {
	// Another one begins in each run.
	for i := range collectors {
		c := collectors[(i+b.run)%len(collectors)]
		o := node.Options{Args: []string{"--disable", "istio"}}
		if c.gogc != "" {
			o.Env = []string{"GOGC=" + c.gogc}
		}
		if err := b.on(ctx, o, func(n *node.Node) error { return b.apiOf(ctx, n, c) }); err != nil {
			return fmt.Errorf("%s: %w", c.name, err)
		}
	}
	return nil
}

func (b *bench) apiOf(ctx context.Context, n *node.Node, c collector) error {
	if err := startReady(ctx, n); err != nil {
		return err
	}
	if err := b.apiRest(ctx, n, c, "before"); err != nil {
		return err
	}
	for i := range apiRounds {
		if err := b.apiRound(ctx, n, c, i); err != nil {
			return fmt.Errorf("round %d: %w", i+1, err)
		}
	}
	return b.apiRest(ctx, n, c, "after")
}

// apiRest measures a server at rest.
func (b *bench) apiRest(ctx context.Context, n *node.Node, c collector, when string) error {
	if err := wait(ctx, b.settle); err != nil {
		return err
	}
	begin, spent := time.Now(), cpuSeconds(n.PID())
	if err := wait(ctx, b.idle); err != nil {
		return err
	}
	rss, anonymous, err := serverMemory(n)
	if err != nil {
		return err
	}
	b.results.add(c.figure("RSS "+when), rss)
	b.results.add(c.figure("anonymous "+when), anonymous)
	b.results.add(c.figure("CPU "+when), 100*(cpuSeconds(n.PID())-spent)/time.Since(begin).Seconds())
	client, err := n.NewClient()
	if err != nil {
		return err
	}
	percent, err := gcPercent(ctx, client)
	b.results.add(c.figure("GOGC "+when), percent)
	return err
}

// gcPercent is the server's present GOGC, by its metrics.
func gcPercent(ctx context.Context, client kubernetes.Interface) (float64, error) {
	text, err := client.CoreV1().RESTClient().Get().AbsPath("/metrics").DoRaw(ctx)
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		if value, ok := strings.CutPrefix(line, "go_gc_gogc_percent "); ok {
			return strconv.ParseFloat(strings.TrimSpace(value), 64)
		}
	}
	return 0, errors.New("the metrics have no go_gc_gogc_percent")
}

// apiRound sends all kinds of requests, one kind after the other, and takes away what they made.
func (b *bench) apiRound(ctx context.Context, n *node.Node, c collector, round int) error {
	clients := make([]kubernetes.Interface, apiClients)
	for i := range clients {
		client, err := unlimited(n)
		if err != nil {
			return err
		}
		clients[i] = client
	}
	namespace := fmt.Sprintf("bench-api-%d", round)
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespace}}
	if _, err := clients[0].CoreV1().Namespaces().Create(ctx, ns, metav1.CreateOptions{}); err != nil {
		return err
	}
	name := func(client, i int) string { return fmt.Sprintf("object-%d-%d", client, i) }
	value := strings.Repeat("x", 1024)
	kinds := map[string]func(ctx context.Context, client, i int) error{
		"create": func(ctx context.Context, client, i int) error {
			object := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name(client, i)}, Data: map[string]string{"value": value}}
			_, err := clients[client].CoreV1().ConfigMaps(namespace).Create(ctx, object, metav1.CreateOptions{})
			return err
		},
		"get": func(ctx context.Context, client, i int) error {
			_, err := clients[client].CoreV1().ConfigMaps(namespace).Get(ctx, name(client, i%apiCreates), metav1.GetOptions{})
			return err
		},
		// Not decoded: that would be the client's time.
		"list": func(ctx context.Context, client, _ int) error {
			body, err := clients[client].CoreV1().RESTClient().Get().Namespace(namespace).Resource("configmaps").DoRaw(ctx)
			if err == nil && len(body) < apiClients*apiCreates*len(value) {
				err = fmt.Errorf("a list of %d bytes does not hold all objects", len(body))
			}
			return err
		},
	}
	most := 0.0
	for _, kind := range requestsOf {
		spent := cpuSeconds(n.PID())
		times, err := timeRequests(ctx, map[string]int{"create": apiCreates, "get": apiGets, "list": apiLists}[kind], kinds[kind])
		if err != nil {
			return fmt.Errorf("%s: %w", kind, err)
		}
		b.results.add(c.figure(kind+" p50"), quantile(times, 0.5))
		b.results.add(c.figure(kind+" p99"), quantile(times, 0.99))
		b.results.add(c.figure(kind+" CPU"), 1000*(cpuSeconds(n.PID())-spent)/float64(len(times)))
		_, anonymous, err := serverMemory(n)
		if err != nil {
			return err
		}
		most = max(most, anonymous)
	}
	b.results.add(c.figure("anonymous under load"), most)
	percent, err := gcPercent(ctx, clients[0])
	if err != nil {
		return err
	}
	b.results.add(c.figure("GOGC under load"), percent)
	if err := clients[0].CoreV1().ConfigMaps(namespace).DeleteCollection(ctx, metav1.DeleteOptions{}, metav1.ListOptions{}); err != nil {
		return err
	}
	return clients[0].CoreV1().Namespaces().Delete(ctx, namespace, metav1.DeleteOptions{})
}

// timeRequests lets every client send count requests, each when the one before it is answered. The times are in milliseconds,
// the shortest first.
func timeRequests(ctx context.Context, count int, request func(ctx context.Context, client, i int) error) ([]float64, error) {
	times := make([]float64, apiClients*count)
	g, ctx := errgroup.WithContext(ctx)
	for client := range apiClients {
		g.Go(func() error {
			for i := range count {
				begin := time.Now()
				if err := request(ctx, client, i); err != nil {
					return err
				}
				times[client*count+i] = time.Since(begin).Seconds() * 1000
			}
			return nil
		})
	}
	err := g.Wait()
	slices.Sort(times)
	return times, err
}

// quantile is the value that a share of the sorted values do not exceed.
func quantile(sorted []float64, share float64) float64 {
	return sorted[int(share*float64(len(sorted)-1)+0.5)]
}

// serverMemory is the server's RSS and anonymous memory, in MB.
func serverMemory(n *node.Node) (rss, anonymous float64, err error) {
	all, own := status.Memory(n.PID())
	if all == 0 {
		return 0, 0, errors.New("the server has ended")
	}
	return float64(all) / 1e6, float64(own) / 1e6, nil
}

// apiMatrix has a line for each collector: the times, in milliseconds.
func apiMatrix() matrix {
	m := matrix{heads: []string{"ms"}}
	for _, kind := range requestsOf {
		m.heads = append(m.heads, kind+": p50", "p99", "CPU")
	}
	for _, c := range collectors {
		l := line{name: c.name}
		for _, kind := range requestsOf {
			l.ids = append(l.ids, c.figure(kind+" p50"), c.figure(kind+" p99"), c.figure(kind+" CPU"))
		}
		m.lines = append(m.lines, l)
	}
	return m
}

// apiMemoryMatrix has what the servers take before, under and after the load.
func apiMemoryMatrix() matrix {
	m := matrix{heads: []string{"server, MB", "anonymous before", "under load", "after", "RSS before", "after", "CPU before, % of a core", "after", "GOGC before", "under load", "after"}}
	for _, c := range collectors {
		m.lines = append(m.lines, line{c.name, []figureID{c.figure("anonymous before"), c.figure("anonymous under load"), c.figure("anonymous after"),
			c.figure("RSS before"), c.figure("RSS after"), c.figure("CPU before"), c.figure("CPU after"), c.figure("GOGC before"), c.figure("GOGC under load"), c.figure("GOGC after")}})
	}
	return m
}

// apiRatios compare the server as it ships with the others, figure by figure.
func apiRatios() []ratio {
	var all []ratio
	for _, c := range collectors[1:] {
		for _, kind := range requestsOf {
			for _, share := range []string{"p50", "p99", "CPU"} {
				what := kind + " " + share
				all = append(all, ratio{"API, " + what + ", " + shippedGC.name + " to " + c.name, shippedGC.figure(what), c.figure(what)})
			}
		}
		for _, what := range []string{"anonymous before", "anonymous after"} {
			all = append(all, ratio{"API, " + what + " the load, " + shippedGC.name + " to " + c.name, shippedGC.figure(what), c.figure(what)})
		}
	}
	return all
}
