package server

import (
	"context"
	"fmt"
	"path/filepath"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"polymesh.dev/polymesh/observe/cluster"
	"polymesh.dev/polymesh/observe/ingest"
	"polymesh.dev/polymesh/observe/jaeger"
	"polymesh.dev/polymesh/observe/kubestate"
	"polymesh.dev/polymesh/observe/logstore"
	"polymesh.dev/polymesh/observe/loki"
	"polymesh.dev/polymesh/observe/metrics"
	"polymesh.dev/polymesh/observe/nodemetrics"
	"polymesh.dev/polymesh/observe/page"
	"polymesh.dev/polymesh/observe/receive"
	"polymesh.dev/polymesh/observe/rowstore"
	"polymesh.dev/polymesh/observe/scrapeconfig"
	"polymesh.dev/polymesh/observe/tracestore"
)

// The names of the components in the status and the log.
const (
	logStore   = "logs"
	traceStore = "traces"
	metricsDB  = "metrics"
	objects    = "cluster"
	podTailer  = "pod-logs"
	platform   = "platform-logs"
	receivers  = "receivers"
	pageServer = "page"
	otherNodes = "nodes"
)

// stores are opened by components and used by later ones.
type stores struct {
	logs     *logstore.Store
	traces   *tracestore.Store
	metrics  *metrics.Metrics
	cluster  *cluster.Cluster
	receiver *receive.Receiver
	nodes    atomic.Pointer[ingest.Ingest]
}

// components returns the parts in the order in which they start. Stores come first, so that they are closed last.
func (p *parts) components() []Component {
	all := []Component{
		{Name: logStore, Start: p.openLogs},
		{Name: traceStore, Start: p.openTraces},
		{Name: metricsDB, After: []string{logStore}, Start: p.openMetrics},
		{Name: receivers, After: []string{logStore, traceStore, metricsDB}, Start: p.receive},
		{Name: pageServer, After: []string{logStore, traceStore, metricsDB, receivers}, Start: p.serve},
	}
	if p.o.Kubeconfig != "" {
		all = append(all, Component{Name: objects, After: []string{logStore, metricsDB}, Start: p.watchCluster},
			Component{Name: otherNodes, After: []string{logStore, metricsDB}, Start: p.acceptNodes})
	}
	if p.o.PodLogDir != "" {
		all = append(all, Component{Name: podTailer, After: []string{logStore, metricsDB}, Start: p.tailPods})
	}
	if p.o.ServerSocket != "" {
		all = append(all, Component{Name: diagnoses, After: []string{logStore}, Start: p.keepFindings})
	}
	return append(all, Component{Name: platform, After: []string{logStore}, Start: p.tailPlatform})
}

func (p *parts) openLogs(context.Context) (Running, error) {
	logs, err := logstore.Open(logstore.Options{
		Store: rowstore.Options{
			Dir: p.dir.Logs(), Retention: p.o.Retention, MaxBytes: int64(p.budget.Logs), MinFreeBytes: int64(p.budget.MinFree), OnRemoved: p.removed(logStore),
		},
		Log: p.log,
	})
	if err != nil {
		return Running{}, fmt.Errorf("open the logs: %w", err)
	}
	p.stores.logs = logs
	p.stores.cluster = cluster.New(cluster.Options{Kubeconfig: p.o.Kubeconfig, Store: logs, Configs: p.configure, Log: p.log})
	return Running{Problem: logs.Problem, Numbers: logs.Numbers, Stop: func(context.Context) error { return logs.Close() }}, nil
}

func (p *parts) openTraces(context.Context) (Running, error) {
	traces, err := tracestore.Open(tracestore.Options{
		Dir: p.dir.Traces(), Retention: p.o.Retention, MaxBytes: int64(p.budget.Traces), MinFreeBytes: int64(p.budget.MinFree),
		SpansPerSecond: p.o.SpansPerSecond, ReadOnly: p.o.ReadOnly, Temp: p.temp, OnRemoved: p.removed(traceStore), Log: p.log,
	})
	if err != nil {
		return Running{}, fmt.Errorf("open the traces: %w", err)
	}
	p.stores.traces = traces
	p.traces.set(jaeger.New(jaeger.Options{Store: traces, Log: p.log}))
	return Running{
		Problem: func() string {
			s := traces.Stats()
			switch {
			case p.o.ReadOnly:
				return ""
			case s.Short:
				return "the disk is nearly full: no spans are stored"
			case s.Sampled > 0:
				return fmt.Sprintf("%d spans of whole traces were left out: there are more than %d a second", s.Sampled, p.o.SpansPerSecond)
			}
			return ""
		},
		Numbers: func() map[string]int64 {
			s := traces.Stats()
			return map[string]int64{"spans": s.Rows, "bytes": s.Bytes, "stored": s.Stored, "sampled": s.Sampled, "refused": s.Refused}
		},
		Stop: func(context.Context) error { return traces.Close() },
	}, nil
}

// removed logs what was removed because of the limit on bytes.
func (p *parts) removed(name string) func(rowstore.Removed) {
	log := p.log.With("component", name)
	return func(r rowstore.Removed) {
		if r.Err != nil {
			log.Error("rows cannot be removed, or read", "err", r.Err)
			return
		}
		log.Info("the limit is reached: the oldest part was removed", "until", r.Until, "bytes", r.Bytes)
	}
}

func (p *parts) openMetrics(ctx context.Context) (Running, error) {
	host, err := nodemetrics.New(p.log)
	if err != nil {
		return Running{}, fmt.Errorf("read the machine's numbers: %w", err)
	}
	hosts := prometheus.NewRegistry()
	if err := hosts.Register(host); err != nil {
		return Running{}, fmt.Errorf("read the machine's numbers: %w", err)
	}
	sources := map[string]prometheus.Gatherer{scrapeconfig.JobNode: hosts}
	local := []string{scrapeconfig.JobNode, scrapeconfig.JobSelf}
	if p.o.Kubeconfig != "" {
		sources[scrapeconfig.JobState] = kubestate.New(p.stores.cluster, p.o.MaxSeries()/2)
		local = append(local, scrapeconfig.JobState)
	}
	var sockets map[string]string
	if p.o.ServerSocket != "" {
		sockets = map[string]string{scrapeconfig.JobServer: p.o.ServerSocket}
		local = append(local, scrapeconfig.JobServer)
	}
	base, err := scrapeconfig.Base(scrapeconfig.Options{
		Node: p.o.NodeName, Series: p.o.MaxSeries(), Kubeconfig: p.o.Kubeconfig, Local: local,
		Kubelets: scrapeconfig.TLSFiles{CA: p.o.KubeletCA, Cert: p.o.KubeletCert, Key: p.o.KubeletKey},
	})
	if err != nil {
		return Running{}, fmt.Errorf("make the scrape jobs: %w", err)
	}
	m, err := metrics.Open(ctx, metrics.Options{
		Dir: p.dir.Metrics(), Retention: p.o.Retention, MaxBytes: int64(p.budget.Metrics), MinFreeBytes: int64(p.budget.MinFree), MaxSeries: p.o.MaxSeries(), Base: base, Kubeconfig: p.o.Kubeconfig,
		Sources: sources, Sockets: sockets, ReservedPorts: p.o.ReservedPorts, RemoteWrite: p.o.RemoteWrite, Log: p.log,
	})
	if err != nil {
		return Running{}, fmt.Errorf("open the metrics: %w", err)
	}
	p.stores.metrics = m
	p.metrics.set(m.Handler())
	p.written.set(m.IngestHandler())
	return Running{Problem: m.Problem, Numbers: m.Numbers, Stop: func(context.Context) error { return m.Close() }}, nil
}

// configure passes users' scrape jobs and rules to the metrics, and reports problems where the user looks.
func (p *parts) configure(ctx context.Context, configs []cluster.Config) {
	users := make([]metrics.UserConfig, 0, len(configs))
	for _, c := range configs {
		user := metrics.UserConfig{Namespace: c.Namespace, Name: c.Name}
		switch c.Kind {
		case cluster.Scrape:
			user.Prometheus = []byte(c.Data["prometheus.yml"])
		case cluster.Rules:
			user.Rules = make(map[string][]byte, len(c.Data))
			for key, text := range c.Data {
				user.Rules[key] = []byte(text)
			}
		}
		users = append(users, user)
	}
	problems, err := p.stores.metrics.Apply(ctx, users)
	if err != nil {
		p.log.Error("users' jobs and rules cannot be applied", "err", err)
	}
	for _, problem := range problems {
		text := problem.Message
		if problem.Where != "" {
			text = fmt.Sprintf("%q: %s", problem.Where, problem.Message)
		}
		if err := p.stores.cluster.Report(ctx, problem.Namespace, problem.Name, text); err != nil {
			p.log.Warn("a problem cannot be reported", "namespace", problem.Namespace, "configmap", problem.Name, "problem", text, "err", err)
		}
	}
}

func (p *parts) receive(context.Context) (Running, error) {
	p.stores.receiver = receive.New(receive.Options{
		Spans: p.stores.traces.Append, Logs: p.stores.logs.Append, Metrics: p.stores.metrics.IngestHandler(), Log: p.log,
	})
	otlp := p.stores.receiver.HTTP()
	p.otlp.set(otlp)
	p.zipkin.set(p.stores.receiver.Zipkin())
	p.thrift.set(p.stores.receiver.Jaeger())
	p.logs.set(loki.New(loki.Options{Store: p.stores.logs, OTLP: otlp, Log: p.log}))
	return Running{}, nil
}

func (p *parts) serve(context.Context) (Running, error) {
	return p.showPage(reach{p.stores.cluster, p.o.NodeName}, time.Now)
}

// showPage serves the page as it is at a time.
func (p *parts) showPage(state page.Cluster, now func() time.Time) (Running, error) {
	h, err := page.New(page.Options{
		Engine: p.stores.metrics.Engine(), Queryable: p.stores.metrics.Queryable(), Logs: p.stores.logs, Traces: p.stores.traces,
		Cluster: state, Prometheus: &p.metrics, Loki: &p.logs, Now: now, Log: p.log,
	})
	if err != nil {
		return Running{}, fmt.Errorf("make the page: %w", err)
	}
	p.page.set(h)
	return Running{}, nil
}

// reach implements page.Cluster.
type reach struct {
	cluster *cluster.Cluster
	name    string
}

func (r reach) State() page.ClusterState {
	s := r.cluster.State()
	return page.ClusterState{Name: r.name, Reachable: s.Reachable, Since: s.Since}
}

func (p *parts) watchCluster(context.Context) (Running, error) {
	c := p.stores.cluster
	return Running{Run: c.Run, Problem: c.Problem, Numbers: c.Numbers}, nil
}

func (p *parts) tailPods(context.Context) (Running, error) {
	return podLogs(p.o, p.dir, p.stores.logs, func(namespace, pod, _ string) (string, bool) {
		w, ok := p.stores.cluster.Workload(namespace, pod)
		return w.Name, ok
	}, p.log)
}

func (p *parts) tailPlatform(context.Context) (Running, error) {
	return platformLogs(p.o, p.dir, p.stores.logs, p.log)
}

// acceptNodes accepts what the collectors of other machines send.
func (p *parts) acceptNodes(context.Context) (Running, error) {
	c := p.stores.cluster
	in, err := ingest.New(ingest.Options{
		Node: p.o.NodeName, Logs: p.stores.logs, Samples: p.stores.metrics.Appendable(), Families: nodemetrics.Families(), Job: scrapeconfig.JobNode,
		Pod: func(uid string) (ingest.Pod, bool, bool) {
			place, known, final := c.Place(uid)
			return ingest.Pod(place), known, final
		},
		Workload: func(namespace, pod string) (string, bool) {
			w, ok := c.Workload(namespace, pod)
			return w.Name, ok
		},
		State: filepath.Join(p.dir.Meta(), "nodes.json"), Retention: p.o.Retention, Log: p.log.With("component", otherNodes),
	})
	if err != nil {
		return Running{}, fmt.Errorf("accept what other nodes send: %w", err)
	}
	p.stores.nodes.Store(in)
	p.ingest.set(in)
	return Running{Run: in.Run, Problem: in.Problem, Numbers: in.Numbers}, nil
}

// nodes returns the nodes that send something, for the status.
func (p *parts) nodes() []ingest.NodeStatus {
	if in := p.stores.nodes.Load(); in != nil {
		return in.Nodes()
	}
	return nil
}
