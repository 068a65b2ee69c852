// Package metrics is the Prometheus part of the store: Prometheus' own packages for discovery, scraping, storage, PromQL, rules,
// notifications and the HTTP API, wired as in its main program, but with little memory.
//
// It owns the folder with the series and everything that runs on it. The scraped jobs come from package scrapeconfig, rules from package
// rulefiles, and metrics of this process from the given gatherers. It never listens: package server serves its handlers.
package metrics

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net/url"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/config"
	"github.com/prometheus/prometheus/discovery"
	"github.com/prometheus/prometheus/notifier"
	"github.com/prometheus/prometheus/promql"
	"github.com/prometheus/prometheus/promql/parser"
	"github.com/prometheus/prometheus/rules"
	"github.com/prometheus/prometheus/storage"
	"github.com/prometheus/prometheus/tsdb"
	"github.com/prometheus/prometheus/tsdb/chunks"
	"github.com/prometheus/prometheus/util/compression"

	"polymesh.dev/polymesh/observe/rulefiles"
	"polymesh.dev/polymesh/observe/scrapeconfig"
)

// Options of the store of metrics.
type Options struct {
	// Dir is the folder of the series. It is created if it does not exist.
	Dir string
	// Retention and MaxBytes both bound what is kept. A block has two hours, so up to two hours more may be kept.
	Retention time.Duration
	MaxBytes  int64
	// MinFreeBytes stay free on the disk: with less, samples are refused.
	MinFreeBytes int64
	// MaxSeries bounds the series in memory: those that have a target now, and for some time those that had one. Samples of new ones beyond it are refused and counted.
	// 0 means 20,000. The store's own series may be a tenth, or 1,000, more. Series beyond 16 MiB of labels are refused, too. With more than 20,000
	// series, the limit on labels, and that on the samples of a query, rise in proportion.
	MaxSeries int
	// Base has the store's own jobs, see scrapeconfig.Base. nil means none.
	Base *config.Config
	// Kubeconfig is for the discovery in users' jobs. It may not exist yet.
	Kubeconfig string
	// Sources are gatherers in this process, by the name of their job.
	Sources map[string]prometheus.Gatherer
	// Sockets are UNIX sockets of programs on this machine that serve /metrics, by the name of their job.
	Sockets map[string]string
	// ReservedPorts are ports of this machine, such as those of the API server and the kubelet, to which no user's job connects.
	ReservedPorts []uint16
	// RemoteWrite accepts samples that others send in Prometheus' protocol.
	RemoteWrite bool
	// Registry has the metrics of this process. nil means one with only those of this package.
	Registry *prometheus.Registry
	Log      *slog.Logger
	// reload is how often the storage looks for work, a minute if it is zero.
	reload time.Duration
}

const (
	// A query holds at most this many samples, of 16 bytes, with scrapeconfig.DefaultSeries series, and takes at most this long.
	maxSamples   = 1_000_000
	queryTimeout = 30 * time.Second
	// Pods' queries and privileged queries have separate slots, so that no pod keeps an administrator waiting.
	maxQueries    = 2
	maxPrivileged = 2
	// A rule has less time, and rules are evaluated one at a time, so that they do not take the slots of people's queries.
	ruleTimeout = 10 * time.Second

	lookback = 5 * time.Minute
	// clockAhead is how far the newest sample may be from now. Others' samples are at most ten minutes ahead.
	clockAhead = time.Hour
	// late is how old a sample of others may be.
	late         = 5 * time.Minute
	minBlock     = 2 * time.Hour
	maxBlock     = 24 * time.Hour
	maxExemplars = 2000
	// staleShare is the share of series without a target from which on they leave the memory.
	staleShare = 0.2
)

// Metrics is the open store.
type Metrics struct {
	opts     Options
	log      *slog.Logger
	registry *prometheus.Registry
	born     time.Time

	db        *tsdb.DB
	dbStats   *tsdb.DBStats
	queryable storage.SampleAndChunkQueryable
	blocks    func() []tsdb.BlockMeta
	series    *bounded
	engine    *promql.Engine
	parser    parser.Parser

	targets  *targets
	notifier *notifier.Manager
	notifySD *discovery.Manager
	notify   func() // starts the discovery of Alertmanagers. It wakes up ten times a second, so it only starts once there are any
	rules    *rules.Manager
	files    *ruleFiles
	local    *localTargets

	handlers handlers

	applying sync.Mutex // one Apply at a time
	current  current

	cancel context.CancelFunc
	wait   sync.WaitGroup
	closed sync.Once
	// release frees everything except the storage.
	release func() error
}

// Open opens the store and starts to scrape. It first reads the log of the last hours, which takes seconds.
// The targets and the kubeconfig need not exist yet. It runs until Close.
func Open(ctx context.Context, o Options) (*Metrics, error) {
	if o.MaxSeries == 0 {
		o.MaxSeries = scrapeconfig.DefaultSeries
	}
	if o.Base == nil {
		base, err := config.Load("", slog.New(slog.DiscardHandler))
		if err != nil {
			return nil, err
		}
		o.Base = base
	}
	m := &Metrics{opts: o, log: o.Log, registry: o.Registry, born: time.Now(), dbStats: tsdb.NewDBStats(), parser: parser.NewParser(parser.Options{})}
	if m.registry == nil {
		m.registry = prometheus.NewRegistry()
	}
	for _, c := range []prometheus.Collector{collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{})} {
		if err := m.registry.Register(c); err != nil && !errors.As(err, &prometheus.AlreadyRegisteredError{}) {
			return nil, err
		}
	}

	bytes, options := &labelBytes{}, tsdbOptions(o)
	options.SeriesLifecycleCallback = bytes
	db, err := tsdb.Open(o.Dir, m.log.With("part", "tsdb"), m.registry, options, m.dbStats)
	if err != nil {
		return nil, fmt.Errorf("open the metrics in %s: %w (if no other store runs and this remains, move the folder away: the store then starts without metrics)", o.Dir, err)
	}
	m.db, m.queryable = db, db
	m.blocks = db.BlockMetas
	m.series = newBounded(db, o, bytes, m.registry)

	// Close ends this context. The one passed to Open does not end it.
	run, cancel := context.WithCancel(context.WithoutCancel(ctx))
	m.cancel = cancel
	if err := m.start(run); err != nil {
		cancel()
		return nil, errors.Join(err, db.Close())
	}
	return m, nil
}

func tsdbOptions(o Options) *tsdb.Options {
	t := tsdb.DefaultOptions()
	t.RetentionDuration = o.Retention.Milliseconds()
	t.MaxBytes = o.MaxBytes
	t.MinBlockDuration = minBlock.Milliseconds()
	// Retention drops whole blocks.
	t.MaxBlockDuration = min(max(o.Retention/10, minBlock), maxBlock).Milliseconds()
	t.WALCompression = compression.Snappy
	t.WALSegmentSize = 16 << 20
	// Tables for a small head: 16,384 stripes take 5 MB.
	t.StripeSize = 512
	t.HeadChunksWriteBufferSize = chunks.MinWriteBufferSize
	t.OutOfOrderTimeWindow = late.Milliseconds()
	// Series whose target has gone, such as pods after a deploy, go from memory to the disk within minutes once they are a fifth of all, and not only after
	// hours. Without that, a hundred new pods with a sidecar in that time take all of MaxSeries.
	t.StaleSeriesCompactionThreshold = staleShare
	if o.reload > 0 {
		t.BlockReloadInterval = o.reload
	}
	t.EnableExemplarStorage, t.MaxExemplars = true, maxExemplars
	return t
}

// start wires what runs on the opened storage.
func (m *Metrics) start(ctx context.Context) error {
	o := m.opts
	var err error
	// Its file names the queries that were running when the store was killed. It is never closed, because a query may still end.
	tracker, err := promql.NewActiveQueryTracker(o.Dir, maxQueries, m.log.With("part", "queries"))
	if err != nil {
		return err
	}
	m.engine = m.newEngine(seats{tracker, make(slots, maxPrivileged)}, queryTimeout, m.registry)
	ruleEngine := checked{m.newEngine(make(slots, 1), ruleTimeout, nil), m.parser}

	// There are two scrapers: one connects to any address of the store's own jobs, the other refuses this machine's addresses.
	others := newWary(o.ReservedPorts)
	m.local = newLocalTargets(o.Sources, o.Sockets, m.registry)
	sd, err := discovery.CreateAndRegisterSDMetrics(m.registry)
	if err != nil {
		return fmt.Errorf("register the numbers of discovery: %w", err)
	}
	found := discovery.NewManager(ctx, m.log.With("part", "discovery"), m.registry, sd, discovery.Name("scrape"))
	m.notifySD = discovery.NewManager(ctx, m.log.With("part", "discovery of Alertmanagers"), m.registry, sd, discovery.Name("notify"))
	if found == nil || m.notifySD == nil {
		return errors.New("discovery cannot be set up: its numbers are registered already")
	}
	if m.targets, err = newTargets(found, m.series, m.registry, m.log, m.local.dial, others.dial); err != nil {
		return err
	}

	m.notify = sync.OnceFunc(func() { m.wait.Go(func() { _ = m.notifySD.Run() }) })
	m.notifier = notifier.NewManager(&notifier.Options{QueueCapacity: 1000, Registerer: m.registry, Do: others.post()}, model.UTF8Validation, m.log.With("part", "notifier"))
	m.files = &ruleFiles{parser: m.parser}
	m.rules = rules.NewManager(&rules.ManagerOptions{
		NameValidationScheme: model.UTF8Validation,
		AppendableV2:         m.series.own(),
		Queryable:            m.db,
		QueryFunc:            rules.EngineQueryFunc(ruleEngine, m.db),
		NotifyFunc:           rules.SendAlerts(m.notifier, externalURL.String()),
		Context:              ctx,
		ExternalURL:          &externalURL,
		Registerer:           m.registry,
		Logger:               m.log.With("part", "rules"),
		// As Prometheus' defaults.
		OutageTolerance: time.Hour, ForGracePeriod: 10 * time.Minute, ResendDelay: time.Minute,
		GroupLoader:            m.files,
		DefaultRuleQueryOffset: func() time.Duration { return 0 },
		Parser:                 m.parser,
	})
	m.handlers = m.newHandlers()
	m.current.register(m.registry)
	if _, err := m.Apply(ctx, nil); err != nil {
		return err
	}

	m.wait.Go(func() { m.targets.run(ctx) })
	m.wait.Go(func() { m.notifier.Run(m.notifySD.SyncCh()) })
	m.wait.Go(m.rules.Run)
	m.wait.Go(func() { m.followKubeconfig(ctx) })
	return nil
}

// externalURL is the address in alerts at which their expression can be viewed: the Service in the cluster.
var externalURL = url.URL{Scheme: "http", Host: "prometheus.istio-system:9090"}

func (m *Metrics) newEngine(tracker promql.QueryTracker, timeout time.Duration, reg prometheus.Registerer) *promql.Engine {
	return promql.NewEngine(promql.EngineOpts{
		Logger: m.log.With("part", "engine"), Reg: reg, MaxSamples: int(scrapeconfig.Scaled(int64(maxSamples), m.opts.MaxSeries)), Timeout: timeout, ActiveQueryTracker: tracker, LookbackDelta: lookback,
		NoStepSubqueryIntervalFn: func(int64) int64 { return rulefiles.SubqueryStep.Milliseconds() },
		EnableAtModifier:         true, EnableNegativeOffset: true, Parser: m.parser,
	})
}

// slots bounds how many queries are evaluated at a time.
type slots chan struct{}

// GetMaxConcurrent implements promql.QueryTracker.
func (s slots) GetMaxConcurrent() int { return cap(s) }

// Insert implements promql.QueryTracker. It waits for a place.
func (s slots) Insert(ctx context.Context, _ string) (int, error) {
	select {
	case s <- struct{}{}:
		return 0, nil
	case <-ctx.Done():
		return 0, ctx.Err()
	}
}

// Delete implements promql.QueryTracker.
func (s slots) Delete(int) { <-s }

// Close implements promql.QueryTracker.
func (slots) Close() error { return nil }

// Close ends scraping and rules, and closes the storage.
func (m *Metrics) Close() error {
	var err error
	m.closed.Do(func() {
		// Rules end first, so that absent() does not fire when scraping ends.
		if m.rules != nil {
			m.rules.Stop()
			m.notifier.Stop()
			m.targets.stop()
		}
		if m.cancel != nil {
			m.cancel()
		}
		m.wait.Wait()
		if m.local != nil {
			m.local.close()
		}
		if m.db != nil {
			err = m.db.Close()
		}
		if m.release != nil {
			err = errors.Join(err, m.release())
		}
	})
	return err
}

// Queryable returns the stored series.
func (m *Metrics) Queryable() storage.SampleAndChunkQueryable { return m.queryable }

// Engine evaluates PromQL, with the store's bounds on samples, time and number of queries.
func (m *Metrics) Engine() *promql.Engine { return m.engine }

// Appendable is for the other parts of the store that write samples. A new series beyond Options.MaxSeries is an error.
func (m *Metrics) Appendable() storage.AppendableV2 {
	return boundedAppendable{bounded: m.series, most: m.series.max, bytes: m.series.maxLabels, tell: true}
}

// Problem returns what does not work, for the status, empty if everything does.
func (m *Metrics) Problem() string {
	if m.series == nil {
		return ""
	}
	if p := m.series.problem(); p != "" {
		return p
	}
	if newest := m.Newest(); newest.After(time.Now().Add(clockAhead)) {
		return fmt.Sprintf("the newest sample is of %s, so the clock was ahead when it was stored, and samples of now are too old to be stored: "+
			"stop the store, set the folder %s aside, and start it again (or wait until then)", newest.UTC().Format(time.RFC3339), m.opts.Dir)
	}
	return m.current.problem()
}

// Numbers returns numbers for the status.
func (m *Metrics) Numbers() map[string]int64 {
	n := map[string]int64{}
	if m.series != nil {
		n["series"] = int64(m.db.Head().NumSeries())
		n["series_refused"] = m.series.refused.Load()
		n["commits_refused"] = m.series.space.refused.Load()
		up, all := m.targets.counts()
		n["targets"], n["targets_up"] = int64(all), int64(up)
	}
	if oldest := m.oldest(); oldest != math.MaxInt64 {
		n["oldest_ms"] = oldest
	}
	return n
}

// Newest returns the time of the last sample, zero if there is none.
func (m *Metrics) Newest() time.Time {
	newest := m.db.Head().MaxTime() // the smallest number if there are no samples
	for _, b := range m.blocks() {
		// A block of gone series, or of late samples, ends with its range, which may be hours ahead. What it has is older than what is in memory.
		if !b.Compaction.FromStaleSeries() && !b.Compaction.FromOutOfOrder() {
			newest = max(newest, b.MaxTime-1)
		}
	}
	if newest == math.MinInt64 {
		return time.Time{}
	}
	return time.UnixMilli(newest)
}

// oldest returns the time of the first sample, in milliseconds.
func (m *Metrics) oldest() int64 {
	oldest := int64(math.MaxInt64)
	if m.db.Head().MinTime() > 0 {
		oldest = m.db.Head().MinTime()
	}
	for _, b := range m.blocks() {
		oldest = min(oldest, b.MinTime)
	}
	return oldest
}
