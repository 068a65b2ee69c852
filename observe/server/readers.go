package server

import (
	"context"
	"fmt"
	"time"

	"polymesh.dev/polymesh/observe/logstore"
	"polymesh.dev/polymesh/observe/loki"
	"polymesh.dev/polymesh/observe/metrics"
	"polymesh.dev/polymesh/observe/page"
	"polymesh.dev/polymesh/observe/rowstore"
)

// readers returns the parts of a read-only store, for the files of a store that does not run, perhaps of a deleted cluster.
func (p *parts) readers() []Component {
	return []Component{
		{Name: logStore, Start: p.readLogs},
		{Name: traceStore, Start: p.openTraces},
		{Name: metricsDB, Start: p.readMetrics},
		{Name: pageServer, After: []string{logStore, traceStore, metricsDB}, Start: p.showFiles},
	}
}

func (p *parts) readLogs(context.Context) (Running, error) {
	logs, err := logstore.Open(logstore.Options{
		Store: rowstore.Options{Dir: p.dir.Logs(), ReadOnly: true, Temp: p.temp, OnRemoved: p.removed(logStore)}, Log: p.log,
	})
	if err != nil {
		return Running{}, fmt.Errorf("open the logs: %w", err)
	}
	p.stores.logs = logs
	p.logs.set(loki.New(loki.Options{Store: logs, ReadOnly: true, Log: p.log}))
	return Running{Numbers: logs.Numbers, Stop: func(context.Context) error { return logs.Close() }}, nil
}

func (p *parts) readMetrics(ctx context.Context) (Running, error) {
	m, err := metrics.OpenReadOnly(ctx, p.dir.Metrics(), p.temp, p.log)
	if err != nil {
		return Running{}, err
	}
	p.stores.metrics = m
	p.metrics.set(m.Handler())
	return Running{Numbers: m.Numbers, Stop: func(context.Context) error { return m.Close() }}, nil
}

// showFiles serves the page as it was at the time of the last record.
func (p *parts) showFiles(context.Context) (Running, error) {
	last := lastRecord(p.stores.metrics.Newest(), p.stores.logs.Stats().Newest, p.stores.traces.Stats().Newest)
	if last.IsZero() {
		last = time.Now() // there is none
	}
	return p.showPage(files{p.o.NodeName, last}, func() time.Time { return last })
}

// ahead is how much later than the last sample a log line or a span may be to count: clients choose their times. There is a sample
// every 15 seconds.
const ahead = time.Minute

// lastRecord returns the time of the last record, zero if there is none.
func lastRecord(metrics, logs, traces time.Time) time.Time {
	last := logs
	if traces.After(last) {
		last = traces
	}
	switch {
	case metrics.IsZero() || metrics.Before(last) && last.Before(metrics.Add(ahead)):
		return last
	default:
		return metrics
	}
}

// files implements page.Cluster for files that no store writes.
type files struct {
	name string
	last time.Time
}

func (f files) State() page.ClusterState {
	return page.ClusterState{Name: f.name, Since: f.last, Offline: true}
}
