package page

import (
	"context"
	"net/http"
	"sync"
	"time"
)

const (
	// extentPoints is how many points the time slider has.
	extentPoints = 150
	// extentAge is how long the slider's points are kept: the same for all who look.
	extentAge = time.Minute
	// extentTime is how long they may take. The slider also works without.
	extentTime = 5 * time.Second
)

// extentAnswer is everything that was recorded, as the time slider shows it.
type extentAnswer struct {
	Start int64 `json:"start"`
	End   int64 `json:"end"`
	// Requests and Errors are per second.
	Requests []line `json:"requests"`
	Errors   []line `json:"errors"`
	// Unknown says why there are none.
	Unknown string `json:"unknown,omitempty"`
}

type extentCache struct {
	mu     sync.Mutex
	at     time.Time
	answer *extentAnswer
}

// extentOf answers with the time over which something was recorded.
func (s *server) extentOf(r *http.Request) (any, error) {
	s.extent.mu.Lock()
	defer s.extent.mu.Unlock()
	now := s.Now()
	if s.extent.answer != nil && now.Sub(s.extent.at) < extentAge {
		return s.extent.answer, nil
	}
	// Other browsers wait for the result of the first one's request, so it does not end with that request.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(r.Context()), extentTime)
	defer cancel()
	answer := &extentAnswer{End: now.UnixMilli(), Start: now.Add(-defaultWindow).UnixMilli(), Requests: []line{}, Errors: []line{}}
	// The store's start is not what counts, but the first sample: hours first, then minutes.
	p := period{now.Add(-maxWindow), now}
	for _, step := range []time.Duration{time.Hour, time.Minute} {
		lines, err := s.over(ctx, "count("+selector("up")+")", p, step)
		if err != nil {
			return nil, err
		}
		if len(lines) == 0 || len(lines[0].Points) == 0 {
			p.start = p.end.Add(-time.Hour)
			continue
		}
		p.start = time.UnixMilli(int64(lines[0].Points[0][0])).Add(-step)
		answer.Start = p.start.UnixMilli()
	}
	p.start = time.UnixMilli(answer.Start)
	step := p.step(extentPoints)
	rate := "rate(" + selector("istio_requests_total", ofProxies, is("reporter", "destination")) + "[" + duration(max(step, time.Minute)) + "])"
	var err error
	if answer.Requests, err = s.over(ctx, "sum("+rate+")", p, step); err == nil {
		failing := "rate(" + selector("istio_requests_total", ofProxies, is("reporter", "destination"), matches("response_code", failedCodes)) + "[" + duration(max(step, time.Minute)) + "])"
		answer.Errors, err = s.over(ctx, "sum("+failing+")", p, step)
	}
	if err != nil {
		answer.Unknown = "there are too many series to draw the requests here"
	}
	s.extent.at, s.extent.answer = now, answer
	return answer, nil
}
