package page

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	"polymesh.dev/polymesh/observe/document"
	"polymesh.dev/polymesh/observe/findings"
	"polymesh.dev/polymesh/observe/logstore"
)

// Documents of objects are log entries: package cluster appends one for a workload when it changes, and of all workloads every ten minutes. So the
// state at a time is what the quarter of an hour before has.
const (
	snapshotAge = 15 * time.Minute
	// maxSnapshots bounds what is read for one answer.
	maxSnapshots = 20_000
	// maxHistory is how many snapshots of one workload are read for its generations.
	maxHistory = 5_000
)

// label returns a label of an entry, and metadata what belongs to the entry alone.
func label(e logstore.Entry, name string) string    { return logstore.Value(e.Labels, name) }
func metadata(e logstore.Entry, name string) string { return logstore.Value(e.Metadata, name) }

func equal(name, value string) logstore.Matcher {
	return logstore.Matcher{Name: name, Type: logstore.Equal, Value: value}
}

// objectKey identifies a workload.
type objectKey struct{ namespace, kind, name string }

// latestWorkloads returns the workloads at a time, by namespace and name. Matchers can select some.
func (s *server) latestWorkloads(ctx context.Context, at time.Time, matchers ...logstore.Matcher) ([]document.Workload, error) {
	seen := map[objectKey]bool{}
	var list []document.Workload
	err := s.Logs.Select(ctx, logstore.Selector{
		Matchers: append([]logstore.Matcher{equal("job", document.Objects)}, matchers...),
		Start:    at.Add(-snapshotAge), End: at, Limit: maxSnapshots, Newest: true,
	}, func(e logstore.Entry) bool {
		key := objectKey{label(e, "namespace"), metadata(e, "kind"), label(e, "workload")}
		if seen[key] {
			return true
		}
		var w document.Workload
		if json.Unmarshal([]byte(e.Line), &w) != nil || w.Namespace != key.namespace || w.Name != key.name {
			return true // not by package cluster
		}
		seen[key] = true
		w.Pods = slices.DeleteFunc(w.Pods, func(p document.Pod) bool { return p.Deleted })
		if w.Deleted.IsZero() {
			list = append(list, w)
		}
		return true
	})
	if err != nil {
		return nil, err
	}
	slices.SortFunc(list, func(a, b document.Workload) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name), cmp.Compare(a.Kind, b.Kind))
	})
	return list, nil
}

// latestRollouts returns the newest state of each rollout that was under way or ended in the day before a time, the newest first.
func (s *server) latestRollouts(ctx context.Context, at time.Time) ([]document.Rollout, error) {
	return s.rolloutsIn(ctx, period{at.Add(-24 * time.Hour), at})
}

// rolloutsIn returns the newest state of each rollout in a period. The same Deployment can have had several.
func (s *server) rolloutsIn(ctx context.Context, p period, matchers ...logstore.Matcher) ([]document.Rollout, error) {
	type started struct {
		namespace, name string
		at              time.Time
	}
	seen := map[started]bool{}
	var list []document.Rollout
	err := s.Logs.Select(ctx, logstore.Selector{
		Matchers: append([]logstore.Matcher{equal("job", document.Rollouts)}, matchers...),
		Start:    p.start, End: p.end, Limit: maxSnapshots, Newest: true,
	}, func(e logstore.Entry) bool {
		var r document.Rollout
		if json.Unmarshal([]byte(e.Line), &r) != nil || r.Namespace != label(e, "namespace") || r.Name != label(e, "workload") {
			return true
		}
		key := started{r.Namespace, r.Name, r.Started.UTC()}
		if !seen[key] {
			seen[key] = true
			list = append(list, r)
		}
		return true
	})
	slices.SortFunc(list, func(a, b document.Rollout) int {
		return cmp.Or(b.Started.Compare(a.Started.Time), cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
	})
	return list, err
}

// explainRollouts adds why the canary's pods are not ready, as the server's diagnosis has found, to rollouts that have no reason of their own: those
// under way at a time, and those that ended while it was so.
func (s *server) explainRollouts(ctx context.Context, list []document.Rollout, at time.Time) error {
	var now *diagnosis
	for i := range list {
		r := &list[i]
		if r.Reason != "" || r.Phase == "Promoted" {
			continue
		}
		key := objectKey{r.Namespace, "Deployment", r.Name + "-canary"}
		if !r.Over() {
			var err error
			if now == nil {
				if now, err = s.diagnosisAt(ctx, at); err != nil {
					return err
				}
			}
			if found := now.of(key); len(found) > 0 {
				r.Reason = "The canary is not ready. " + now.why(found[0])
			}
			continue
		}
		start := r.Ended.Add(-diagnosisAge)
		if start.Before(r.Started.Time) {
			start = r.Started.Time
		}
		err := s.Logs.Select(ctx, logstore.Selector{
			Matchers: []logstore.Matcher{equal("job", findings.Job), equal("namespace", key.namespace), equal("workload", key.name)},
			Metadata: []logstore.Matcher{equal("kind", key.kind)}, Start: start, End: r.Ended.Add(time.Second), Limit: 1, Newest: true,
		}, func(e logstore.Entry) bool {
			var f findings.Finding
			if json.Unmarshal([]byte(e.Line), &f) == nil {
				r.Reason = "The canary was not ready. " + (&diagnosis{made: e.Time}).why(f)
			}
			return true
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// unready returns a sentence for each workload that has fewer ready pods than it should.
func (s *server) unready(ctx context.Context, at time.Time) (map[nodeKey]string, error) {
	list, err := s.latestWorkloads(ctx, at)
	if err != nil {
		return nil, err
	}
	found, err := s.diagnosisAt(ctx, at)
	if err != nil {
		return nil, err
	}
	problems := map[nodeKey]string{}
	for _, w := range list {
		if p := problemOf(&w, found); p != nil {
			problems[nodeKey{aWorkload, w.Namespace, w.Name}] = p.Text
		}
	}
	return problems, nil
}

// problem is why a workload is not ready.
type problem struct {
	Text  string    `json:"text"`          // "1 of 3 pods is ready: container api is killed at its memory limit"
	Why   string    `json:"why,omitempty"` // what the cluster reports
	Since time.Time `json:"since,omitzero"`
}

// isUnready reports whether fewer pods are ready than should be.
func isUnready(w *document.Workload) bool {
	done := func(p document.Pod) bool { return p.Phase == "Succeeded" }
	return w.Kind != "Job" && w.Ready < w.Replicas && !w.Paused && !(w.Kind == "Pod" && slices.ContainsFunc(w.Pods, done))
}

// keyOf returns the key of a workload.
func keyOf(w *document.Workload) objectKey { return objectKey{w.Namespace, w.Kind, w.Name} }

// problemOf returns why a workload is not ready, nil if it is. The number of ready pods comes from its document, the reason from the server's diagnosis.
func problemOf(w *document.Workload, d *diagnosis) *problem {
	if !isUnready(w) {
		return nil
	}
	p := &problem{Text: fmt.Sprintf("%d of %s ready", w.Ready, plural(int(w.Replicas), "pod is", "pods are"))}
	if list := d.of(keyOf(w)); len(list) > 0 {
		if what := phrase(list[0]); what != "" {
			p.Text += ": " + what
		}
		p.Why, p.Since = d.why(list[0]), list[0].Since
	}
	return p
}

// whyUnready returns why a pod is not ready, in the words of the diagnosis, or else in Kubernetes' own.
func whyUnready(p *document.Pod, found []findings.Finding) string {
	for _, f := range found {
		if f.Pod == p.Name {
			return cmp.Or(phrase(f), f.Message)
		}
	}
	for _, c := range p.Containers {
		if !c.Ready && c.Reason != "" {
			return c.Reason
		}
	}
	return ""
}
