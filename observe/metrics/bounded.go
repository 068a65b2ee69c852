package metrics

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/exemplar"
	"github.com/prometheus/prometheus/model/histogram"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/value"
	"github.com/prometheus/prometheus/storage"
	"github.com/prometheus/prometheus/tsdb"
	"github.com/prometheus/prometheus/tsdb/chunks"
	"golang.org/x/time/rate"

	"polymesh.dev/polymesh/observe/rulefiles"
	"polymesh.dev/polymesh/observe/scrapeconfig"
)

// The size of a series' labels, and of those of all series in memory if these are at most scrapeconfig.DefaultSeries.
const (
	maxLabels        = 100
	maxLabelBytes    = 2 << 10
	maxAllLabelBytes = 16 << 20
)

// bounded limits the number of series in memory, and the bytes of their labels. Limits of targets do not: a target may
// have different series each time, and each stays in memory for hours, and returns after each start. The store itself (its own
// jobs, rules) may use a tenth more, so that it can still report that the rest is full.
//
// A new series above the limit is left out without an error, so that the rest of its target, which may be a gateway, is stored. It is counted, a
// rule fires, and the status reports it.
type bounded struct {
	db     *tsdb.DB
	max    uint64
	fresh  *freshSeries
	labels *labelBytes
	// maxLabels is the most of labels, in bytes.
	maxLabels int64
	space     *space
	refused   atomic.Int64
	// misplaced counts samples of kubelets about pods that are not on their node. A few are normal when a pod starts or ends.
	misplaced prometheus.Counter
	log       *slog.Logger
	logged    atomic.Int64 // when, in seconds
}

func newBounded(db *tsdb.DB, o Options, bytes *labelBytes, reg prometheus.Registerer) *bounded {
	b := &bounded{db: db, max: uint64(o.MaxSeries), fresh: newFreshSeries(o.MaxSeries), labels: bytes, maxLabels: scrapeconfig.Scaled(int64(maxAllLabelBytes), o.MaxSeries), space: newSpace(o.Dir, o.MinFreeBytes, reg), log: o.Log}
	reg.MustRegister(counter(&b.refused, prometheus.CounterOpts{
		Name: "polymesh_observe_series_refused_total", Help: "Samples of new series that were refused because there are too many series, or because labels are too long.",
	}))
	b.misplaced = prometheus.NewCounter(prometheus.CounterOpts{
		Name: "polymesh_observe_kubelet_samples_refused_total", Help: "Samples of kubelets that were refused because the cluster has no such pod on their node.",
	})
	reg.MustRegister(b.misplaced)
	return b
}

// counter is a number of the status in /metrics.
func counter(n *atomic.Int64, opts prometheus.CounterOpts) prometheus.CounterFunc {
	return prometheus.NewCounterFunc(opts, func() float64 { return float64(n.Load()) })
}

// problem reports that nothing is stored, or that new series of others are refused.
func (b *bounded) problem() string {
	if err := b.space.short(); err != nil {
		return err.Error()
	}
	const look = "new ones are refused (see /api/v1/status/tsdb for the metrics with the most, or raise --observe-memory)"
	switch {
	case b.db.Head().NumSeries() >= b.max:
		return fmt.Sprintf("there are %d series, the highest number: %s", b.max, look)
	case b.fresh.used():
		return fmt.Sprintf("there are more than %d new series in an hour: %s", freshPerHour*b.max, look)
	case b.labels.Load() >= b.maxLabels:
		return fmt.Sprintf("the labels of all series have %d MiB, the highest number: %s", b.maxLabels>>20, look)
	}
	return ""
}

// guests is for targets of others, and own for the store's own series.
func (b *bounded) guests() storage.AppendableV2 {
	return boundedAppendable{bounded: b, most: b.max, bytes: b.maxLabels}
}
func (b *bounded) own() boundedAppendable {
	return boundedAppendable{bounded: b, most: b.max + ownMore(b.max), bytes: b.maxLabels + b.maxLabels/10}
}

// scraped is for the store's own scraper: kubelets count as others, too.
func (b *bounded) scraped(p *places) storage.AppendableV2 {
	a := b.own()
	a.places = p
	return a
}

// writers is for clients that send. They get an error for what is refused, and cannot use the names of the store's own jobs.
func (b *bounded) writers() storage.AppendableV2 {
	return boundedAppendable{bounded: b, most: b.max, bytes: b.maxLabels, tell: true, foreign: true}
}

// boundedAppendable implements storage.AppendableV2.
type boundedAppendable struct {
	*bounded
	most  uint64 // series
	bytes int64  // of their labels
	// tell returns an error for a refusal.
	tell bool
	// foreign refuses samples of the store's own jobs.
	foreign bool
	// places checks kubelets' samples; nil for no check.
	places *places
}

// AppenderV2 implements storage.AppendableV2.
func (b boundedAppendable) AppenderV2(ctx context.Context) storage.AppenderV2 {
	return &boundedAppender{AppenderV2: b.db.AppenderV2(ctx), boundedAppendable: b}
}

// room reports whether a sample may be stored. It always may for an existing series.
func (b boundedAppendable) room(app storage.AppenderV2, ref storage.SeriesRef, ls labels.Labels) bool {
	most, bytes := b.most, b.bytes
	if kubelet(ls) {
		most, bytes = b.max, b.maxLabels
	}
	full := b.db.Head().NumSeries() >= most || b.labels.Load() >= bytes
	if ref != 0 && !full {
		return true
	}
	if g, ok := app.(storage.GetRef); ok {
		if known, _ := g.GetRef(ls, ls.Hash()); known != 0 {
			return true
		}
	}
	if !full && short(ls) && b.fresh.take(most > b.max) {
		return true
	}
	b.refused.Add(1)
	now := time.Now().Unix()
	if last := b.logged.Load(); now-last >= 60 && b.logged.CompareAndSwap(last, now) {
		b.log.Warn("a new series is refused", "series", fmt.Sprintf("%.300s", ls.String()), "highest_number", most, "number", b.db.Head().NumSeries(),
			"label_bytes", b.labels.Load())
	}
	return false
}

// freshPerHour is how many times the largest number of series may be new in an hour. Series leave the memory soon after their target has gone, so
// without this limit a target that has other series each time would fill the disk, and displace what is older.
const freshPerHour = 2

// freshSeries limits how many series are new: as many at once as there may be in all, and then freshPerHour.
type freshSeries struct {
	mu      sync.Mutex // the store's own series have a reserve, which a look and a take one after the other would not keep
	limit   *rate.Limiter
	reserve float64
}

func newFreshSeries(series int) *freshSeries {
	reserve := ownMore(uint64(series))
	return &freshSeries{limit: rate.NewLimiter(rate.Limit(float64(freshPerHour*series)/time.Hour.Seconds()), series+int(reserve)), reserve: float64(reserve)}
}

// take reports whether a series may be new now. The store's own may also use a reserve.
func (f *freshSeries) take(own bool) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return (own || !f.used()) && f.limit.Allow()
}

// used reports whether no series of others may be new.
func (f *freshSeries) used() bool { return f.limit.Tokens() < f.reserve+1 }

// ownMore is how many series the store may have itself beyond the largest number.
func ownMore(most uint64) uint64 { return max(most/10, 1000) }

func short(ls labels.Labels) bool {
	return ls.Len() <= maxLabels && rulefiles.Length(ls) <= maxLabelBytes
}

// labelBytes counts the bytes of the labels of the series in memory, also of those that are read from the log at the start. It
// implements tsdb.SeriesLifecycleCallback.
type labelBytes struct{ atomic.Int64 }

// PreCreation implements tsdb.SeriesLifecycleCallback.
func (*labelBytes) PreCreation(labels.Labels) error { return nil }

// PostCreation implements tsdb.SeriesLifecycleCallback.
func (b *labelBytes) PostCreation(ls labels.Labels) { b.Add(int64(rulefiles.Length(ls))) }

// PostDeletion implements tsdb.SeriesLifecycleCallback.
func (b *labelBytes) PostDeletion(deleted map[chunks.HeadSeriesRef]labels.Labels) {
	for _, ls := range deleted {
		b.Add(-int64(rulefiles.Length(ls)))
	}
}

type boundedAppender struct {
	storage.AppenderV2
	boundedAppendable
}

// Append implements storage.AppenderV2.
func (a *boundedAppender) Append(ref storage.SeriesRef, ls labels.Labels, st, t int64, v float64, h *histogram.Histogram, fh *histogram.FloatHistogram, opts storage.AOptions) (storage.SeriesRef, error) {
	if a.foreign && scrapeconfig.Reserved(ls.Get(model.JobLabel)) {
		return 0, fmt.Errorf("the job %q is one of the store's own: %w", ls.Get(model.JobLabel), storage.ErrOutOfBounds)
	}
	// The end of a series is accepted, as the cluster may have forgotten its pod already.
	if a.places != nil && kubelet(ls) && !value.IsStaleNaN(v) && !a.places.allow(ls) {
		a.misplaced.Inc()
		return 0, nil
	}
	if !a.room(a.AppenderV2, ref, ls) {
		if a.tell {
			// Clients do not retry after this error.
			return 0, fmt.Errorf("the store has its highest number of series (%d) or bytes of labels (%d), or these labels are too long: %w", a.most, a.bytes, storage.ErrOutOfBounds)
		}
		return 0, nil
	}
	return a.AppenderV2.Append(ref, ls, st, t, v, h, fh, opts)
}

// Commit implements storage.AppenderTransaction. On a disk that is nearly full it stores nothing: those who send samples send them again.
func (a *boundedAppender) Commit() error {
	if err := a.space.short(); err != nil {
		a.space.refused.Add(1)
		return errors.Join(err, a.Rollback())
	}
	return a.AppenderV2.Commit()
}

// AppendExemplars implements storage.ExemplarAppenderV2. Exemplars make no series.
func (a *boundedAppender) AppendExemplars(ref storage.SeriesRef, ls labels.Labels, es []exemplar.Exemplar) (storage.SeriesRef, error) {
	e, ok := a.AppenderV2.(storage.ExemplarAppenderV2)
	if !ok {
		return 0, storage.ErrNotFound
	}
	return e.AppendExemplars(ref, ls, es)
}
