package tracestore

import (
	"hash/maphash"
	"math"
	"sync"
	"time"
)

const (
	// averaged is the time over which the limit on spans is averaged: a burst may have that many seconds' worth.
	averaged = 60
	// remembered is the shortest time for which the decision about a trace is remembered.
	remembered = time.Minute
	// maxRemembered is how many traces are remembered in that time. With more, decisions are forgotten earlier.
	maxRemembered = 32 << 10
	// unit is the size up to which a span counts as one.
	unit = 4 << 10
	// window is the time over which the present rate is measured.
	window = 5 * time.Second
)

// verdict is the decision about a span.
type verdict uint8

const (
	kept verdict = iota
	sampled
	tooLong
)

// sampler decides which traces are stored when more spans arrive than the limit allows. A trace is kept or dropped as a whole: the decision is made by a hash
// of its id when its first span arrives, and remembered. Each trace has the same chance, whatever service it starts at.
//
// It is a bucket with room for a minute of the limit, so that an average over a minute counts. While it is more than half full all traces are kept. Below
// that fewer are, down to the number with which a quarter stays in it.
type sampler struct {
	limit float64 // per second; 0 is no limit
	seed  maphash.Seed

	mu        sync.Mutex
	tokens    float64
	filled    time.Time
	recent    [2]float64 // what came in this window and in the one before
	began     time.Time  // of this window
	decisions [2]map[uint64]*decision
	turned    time.Time
}

type decision struct {
	keep  bool
	spans int
}

func newSampler(perSecond float64, now time.Time) *sampler {
	return &sampler{
		limit: perSecond, seed: maphash.MakeSeed(), tokens: perSecond * averaged, filled: now, began: now, turned: now,
		decisions: [2]map[uint64]*decision{{}, {}},
	}
}

// decide returns the decision about a span of this size.
func (s *sampler) decide(trace string, bytes int, now time.Time) verdict {
	// The seed is random, so that clients cannot choose ids that are kept.
	hash := maphash.String(s.seed, trace)
	cost := math.Ceil(float64(bytes) / unit)

	s.mu.Lock()
	defer s.mu.Unlock()
	s.advance(now)
	s.recent[0] += cost

	d := s.decisions[0][hash]
	if d == nil {
		if d = s.decisions[1][hash]; d == nil {
			d = &decision{keep: s.limit <= 0 || float64(hash) < s.share(now)*math.MaxUint64}
		}
		s.decisions[0][hash] = d
	}
	if !d.keep {
		return sampled
	}
	if d.spans++; d.spans > MaxTraceSpans {
		return tooLong
	}
	if s.limit > 0 {
		// Traces that have begun may exceed the limit, but not endlessly.
		if s.tokens < -s.limit*averaged/2 {
			return sampled
		}
		s.tokens -= cost
	}
	return kept
}

// advance fills the bucket and moves the windows. s.mu is held.
func (s *sampler) advance(now time.Time) {
	if passed := now.Sub(s.filled).Seconds(); passed > 0 {
		s.tokens = min(s.limit*averaged, s.tokens+passed*s.limit)
		s.filled = now
	}
	switch passed := now.Sub(s.began); {
	case passed >= 2*window:
		s.recent, s.began = [2]float64{}, now
	case passed >= window:
		s.recent, s.began = [2]float64{0, s.recent[0]}, s.began.Add(window)
	}
	if now.Sub(s.turned) >= remembered || len(s.decisions[0]) >= maxRemembered {
		s.decisions, s.turned = [2]map[uint64]*decision{{}, s.decisions[0]}, now
	}
}

// share returns the fraction of new traces that is kept now. s.mu is held.
func (s *sampler) share(now time.Time) float64 {
	level := s.tokens / (s.limit * averaged)
	if level >= 0.5 {
		return 1
	}
	// The rate over the last window: all of this one and as much of the one before as is missing.
	part := now.Sub(s.began).Seconds() / window.Seconds()
	rate := (s.recent[0] + s.recent[1]*(1-part)) / window.Seconds()
	steady := min(1, s.limit/max(rate, s.limit/2))
	if level >= 0.25 {
		return steady + (1-steady)*(level-0.25)/0.25
	}
	return steady * max(0, level) / 0.25
}
