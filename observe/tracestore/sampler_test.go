package tracestore

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// offered is what came to a sampler and what it kept.
type offered struct {
	spans, kept   int
	whole, broken int // traces
	none          int
}

// offer sends traces for a time: so many spans a second, of 1 to 15 spans each, over two seconds, mixed with others.
func offer(s *sampler, at time.Time, took time.Duration, perSecond int) (offered, time.Time) {
	random := rand.New(rand.NewPCG(1, uint64(at.UnixNano())))
	type running struct{ sent, kept int }
	traces := map[string]*running{}
	var sum offered
	queue := map[int][]string{} // by tick
	const ticks = 50            // a second
	owed := 0.0
	for tick := range int(took.Seconds()) * ticks {
		now := at.Add(time.Duration(tick) * time.Second / ticks)
		for owed += float64(perSecond) / ticks; owed > 0; {
			id := fmt.Sprintf("%016x%016x", random.Uint64(), random.Uint64())
			length := 1 + random.IntN(15)
			for range length {
				later := tick + random.IntN(2*ticks)
				queue[later] = append(queue[later], id)
			}
			traces[id] = &running{}
			owed -= float64(length)
		}
		for _, id := range queue[tick] {
			sum.spans++
			traces[id].sent++
			if s.decide(id, 1000, now) == kept {
				sum.kept++
				traces[id].kept++
			}
		}
		delete(queue, tick)
	}
	for _, r := range traces {
		switch {
		case r.sent == 0:
			continue
		case r.kept == 0:
			sum.none++
		case r.kept == r.sent:
			sum.whole++
		default:
			sum.broken++
		}
	}
	return sum, at.Add(took)
}

func TestSampler(t *testing.T) {
	start := time.Unix(1700000000, 0)
	for name, test := range map[string]struct {
		perSecond int
		took      time.Duration
		min, max  int // kept
		broken    int // traces
	}{
		"below the limit":     {190, 5 * time.Minute, 190 * 295, 190 * 305, 0},
		"a burst":             {1900, 4 * time.Second, 5000, 6000, 0}, // fits into a minute's average
		"twice the limit":     {400, 10 * time.Minute, 200 * 595, 200 * 700, 0},
		"ten times the limit": {2000, 5 * time.Minute, 200 * 290, 200 * 370, 0},
		"much too much":       {100_000, 10 * time.Second, 5000, 30_000, 5000}, // what has begun when it begins is more than the credit
	} {
		t.Run(name, func(t *testing.T) {
			s := newSampler(200, start)
			got, end := offer(s, start, test.took, test.perSecond)
			t.Logf("%+v", got)
			require.GreaterOrEqual(t, got.kept, test.min)
			require.LessOrEqual(t, got.kept, test.max)
			require.LessOrEqual(t, got.broken, test.broken, "a trace is kept or left off as a whole")
			// After a quiet minute all is as it was.
			got, _ = offer(s, end.Add(2*time.Minute), 10*time.Second, 190)
			require.Zero(t, got.none)
		})
	}
}

func TestSamplerIsFair(t *testing.T) {
	start := time.Unix(1700000000, 0)
	s := newSampler(200, start)
	_, at := offer(s, start, 2*time.Minute, 2000)
	// While much comes, each trace has the same chance, short or long.
	random := rand.New(rand.NewPCG(1, 2))
	kept := map[int]int{}
	for i := range 20_000 {
		now := at.Add(time.Duration(i) * time.Millisecond)
		length := []int{1, 10}[i%2]
		id := fmt.Sprintf("%016x%016x", random.Uint64(), random.Uint64())
		for range length {
			if s.decide(id, 100, now) == 0 {
				kept[length]++
			}
		}
	}
	t.Logf("%v", kept)
	require.InEpsilon(t, kept[1], kept[10]/10, 0.3)
}

func TestSamplerBounds(t *testing.T) {
	now := time.Unix(1700000000, 0)
	s := newSampler(200, now)
	count := map[verdict]int{}
	for range 3 * MaxTraceSpans {
		count[s.decide("one", 100, now)]++
	}
	require.Equal(t, map[verdict]int{kept: MaxTraceSpans, tooLong: 2 * MaxTraceSpans}, count)

	// Large spans count for more.
	s = newSampler(200, now)
	clear(count)
	for i := range 10_000 {
		count[s.decide(fmt.Sprint(i/10), MaxSpanBytes, now)]++
	}
	require.Less(t, count[kept], 200*averaged*unit*2/MaxSpanBytes)

	// What is remembered is bounded.
	for i := range 10 * maxRemembered {
		s.decide(fmt.Sprint("other", i), 100, now)
	}
	require.LessOrEqual(t, len(s.decisions[0])+len(s.decisions[1]), 2*maxRemembered)

	// Without a limit all are kept.
	s = newSampler(0, now)
	for i := range 100_000 {
		require.Equal(t, kept, s.decide(fmt.Sprint(i), 100, now))
	}
}
