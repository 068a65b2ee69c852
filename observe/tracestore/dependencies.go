package tracestore

import (
	"maps"
	"strconv"
	"sync"
	"time"

	"polymesh.dev/polymesh/observe/rowstore"
)

// A row of the stream rows="calls" says how often a service called another one within a minute.
const (
	streamRows   = "rows"
	streamCalls  = "calls"
	columnCaller = "link_parent"
	columnCallee = "link_child"
	columnCalls  = "calls"
	columnErrors = "errors"
)

const (
	// rememberedSpans is the shortest time for which a span is remembered for its children. A parent ends after its children, and each client
	// sends what it has every few seconds.
	rememberedSpans = time.Minute
	// maxSpans is how many are remembered in that time, and how many wait for a parent. Of more, only some calls are counted.
	maxSpans = 20_000
	// maxPairs is how many pairs of services are counted in a minute.
	maxPairs = 2_000
)

// key identifies a span.
type key struct{ trace, span string }

// child is a span without its parent yet.
type child struct {
	service string
	failed  bool
}

type pair struct{ parent, child string }

type count struct{ calls, errors uint64 }

// dependencies counts calls between services as spans arrive: joining parents and children later would need all spans in memory.
type dependencies struct {
	mu      sync.Mutex
	spans   [2]map[key]string // services, of this time and of the one before
	waiting [2]map[key][]child
	waits   int // in waiting[0]
	counts  map[pair]count
	turned  time.Time
	since   time.Time // when the first of counts was counted
}

func newDependencies(now time.Time) *dependencies {
	return &dependencies{
		spans: [2]map[key]string{{}, {}}, waiting: [2]map[key][]child{{}, {}}, counts: map[pair]count{}, turned: now,
	}
}

// add adds a stored span.
func (d *dependencies) add(s *Span, now time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if now.Sub(d.turned) >= rememberedSpans {
		d.spans, d.waiting = [2]map[key]string{{}, d.spans[0]}, [2]map[key][]child{{}, d.waiting[0]}
		d.waits, d.turned = 0, now
	}
	own := key{s.TraceID, s.SpanID}
	failed := s.Status == StatusError
	if s.Shared {
		// The client's span has the same id.
		d.child(own, child{s.Service, failed}, now)
		return
	}
	if len(d.spans[0]) < maxSpans {
		d.spans[0][own] = s.Service
	}
	for i := range d.waiting {
		for _, c := range d.waiting[i][own] {
			d.count(s.Service, c, now)
		}
		delete(d.waiting[i], own)
	}
	if s.ParentID != "" {
		d.child(key{s.TraceID, s.ParentID}, child{s.Service, failed}, now)
	}
}

// child counts a call, now or when the parent arrives. d.mu is held.
func (d *dependencies) child(parent key, c child, now time.Time) {
	for i := range d.spans {
		if service, ok := d.spans[i][parent]; ok {
			d.count(service, c, now)
			return
		}
	}
	if d.waits < maxSpans {
		d.waiting[0][parent] = append(d.waiting[0][parent], c)
		d.waits++
	}
}

func (d *dependencies) count(parent string, c child, now time.Time) {
	if parent == c.service {
		return
	}
	p := pair{parent, c.service}
	n, ok := d.counts[p]
	if !ok && len(d.counts) >= maxPairs {
		return
	}
	if len(d.counts) == 0 {
		d.since = now
	}
	n.calls++
	if c.failed {
		n.errors++
	}
	d.counts[p] = n
}

// take returns the counts as rows and resets them.
func (d *dependencies) take() []rowstore.Row {
	d.mu.Lock()
	defer d.mu.Unlock()
	rows := make([]rowstore.Row, 0, len(d.counts))
	for p, n := range d.counts {
		rows = append(rows, rowstore.Row{Time: d.since, Stream: []rowstore.Field{{Name: streamRows, Value: streamCalls}}, Fields: []rowstore.Field{
			{Name: columnCaller, Value: p.parent},
			{Name: columnCallee, Value: p.child},
			{Name: columnCalls, Value: strconv.FormatUint(n.calls, 10)},
			{Name: columnErrors, Value: strconv.FormatUint(n.errors, 10)},
		}})
	}
	clear(d.counts)
	return rows
}

// pending returns the counts since the last take, if they are from this time. A zero time is no limit.
func (d *dependencies) pending(start, end time.Time) map[pair]count {
	d.mu.Lock()
	defer d.mu.Unlock()
	out := make(map[pair]count, len(d.counts))
	if d.since.Before(start) || !end.IsZero() && end.Before(d.since) {
		return out
	}
	maps.Copy(out, d.counts)
	return out
}
