package page

import (
	"encoding/json"
	"net/http"
	"slices"
	"time"

	"polymesh.dev/polymesh/observe/document"
	"polymesh.dev/polymesh/observe/logstore"
)

// rollouts answers with the rollouts of a period, the newest first. Parameters: end, window, ns.
func (s *server) rollouts(r *http.Request) (any, error) {
	p, err := s.periodOf(r)
	if err != nil {
		return nil, err
	}
	namespaces, err := namesOf(r, "ns")
	if err != nil {
		return nil, err
	}
	list, err := s.rolloutsIn(r.Context(), p, inNamespaces(namespaces)...)
	if err != nil {
		return nil, err
	}
	if list == nil {
		list = []document.Rollout{}
	}
	if err := s.explainRollouts(r.Context(), list, p.end); err != nil {
		return nil, err
	}
	return map[string][]document.Rollout{"rollouts": list}, nil
}

// rolloutHistory is what became of a rollout over time.
type rolloutHistory struct {
	Time   int64  `json:"time"` // Unix milliseconds
	Phase  string `json:"phase"`
	Step   int    `json:"step"`
	Weight int    `json:"weight"`
	Reason string `json:"reason,omitempty"`
}

// rollout answers with a rollout and what its canary and the rest did meanwhile. Parameters: started (Unix milliseconds), end, window.
func (s *server) rollout(r *http.Request) (any, error) {
	namespace, err := pathOf(r, "namespace")
	if err != nil {
		return nil, err
	}
	name, err := pathOf(r, "name")
	if err != nil {
		return nil, err
	}
	p, err := s.periodOf(r)
	if err != nil {
		return nil, err
	}
	ctx := r.Context()
	matchers := []logstore.Matcher{equal("namespace", namespace), equal("workload", name)}
	list, err := s.rolloutsIn(ctx, p, matchers...)
	if err != nil {
		return nil, err
	}
	i := 0
	if text := r.URL.Query().Get("started"); text != "" {
		started, err := numberOf(r, "started", 0, 1, 1<<45)
		if err != nil {
			return nil, err
		}
		i = slices.IndexFunc(list, func(x document.Rollout) bool { return x.Started.UnixMilli() == int64(started) })
	}
	if i < 0 || i >= len(list) {
		return nil, missing("no rollout of %s in %s was recorded in this time", name, namespace)
	}
	if err := s.explainRollouts(ctx, list[i:i+1], p.end); err != nil {
		return nil, err
	}
	state := list[i]
	answer := struct {
		Rollout document.Rollout `json:"rollout"`
		History []rolloutHistory `json:"history"`
		Start   int64            `json:"start"`
		End     int64            `json:"end"`
		// Errors is the share of failed requests, P99 their 99th percentile in milliseconds, Rates requests per second; each by workload.
		Rates  []line `json:"rates"`
		Errors []line `json:"errors"`
		P99    []line `json:"p99"`
	}{Rollout: state, History: []rolloutHistory{}}

	err = s.Logs.Select(ctx, logstore.Selector{
		Matchers: append([]logstore.Matcher{equal("job", document.Rollouts)}, matchers...), Start: state.Started.Add(-time.Minute), End: p.end, Limit: maxHistory,
	}, func(e logstore.Entry) bool {
		var x document.Rollout
		if json.Unmarshal([]byte(e.Line), &x) != nil || !x.Started.Equal(state.Started.Time) {
			return true
		}
		h := rolloutHistory{e.Time.UnixMilli(), x.Phase, x.Step, x.Weight, x.Reason}
		if n := len(answer.History); n > 0 {
			last := answer.History[n-1]
			if last.Phase == h.Phase && last.Step == h.Step && last.Weight == h.Weight && last.Reason == h.Reason {
				return true // the same again
			}
		}
		answer.History = append(answer.History, h)
		return true
	})
	if err != nil {
		return nil, err
	}

	during := period{state.Started.Add(-2 * time.Minute), p.end}
	if state.Over() {
		during.end = state.Ended.Add(5 * time.Minute)
	}
	if during.end.After(p.end) {
		during.end = p.end
	}
	answer.Start, answer.End = during.start.UnixMilli(), during.end.UnixMilli()
	step := during.step(chartPoints)
	// The callers know requests that never arrived. Without a caller in the mesh, the called side's numbers are all there is.
	for _, reporter := range []string{"source", "destination"} {
		of := []string{
			ofProxies, is("reporter", reporter), is("destination_workload_namespace", namespace), oneOf("destination_workload", name, name+"-canary"),
		}
		rate := func(metric string, more ...string) string {
			return "rate(" + selector(metric, append(slices.Clone(of), more...)...) + "[" + duration(max(4*step, time.Minute)) + "])"
		}
		all := "sum by (destination_workload) (" + rate("istio_requests_total") + ")"
		if answer.Rates, err = s.over(ctx, all, during, step); err != nil {
			return nil, err
		}
		if len(answer.Rates) == 0 {
			continue
		}
		failing := "sum by (destination_workload) (" + rate("istio_requests_total", matches("response_code", failedCodes)) + ")"
		if answer.Errors, err = s.over(ctx, "("+failing+" or 0 * "+all+") / "+all, during, step); err != nil {
			return nil, err
		}
		answer.P99, err = s.over(ctx, "histogram_quantile(0.99, sum by (destination_workload, le) ("+rate("istio_request_duration_milliseconds_bucket")+"))", during, step)
		return answer, err
	}
	answer.Rates, answer.Errors, answer.P99 = []line{}, []line{}, []line{}
	return answer, nil
}
