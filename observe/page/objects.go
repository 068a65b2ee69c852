package page

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	"polymesh.dev/polymesh/observe/findings"
	"polymesh.dev/polymesh/observe/logstore"
)

// Snapshots of objects are log entries: package cluster appends one for a workload when it changes, and of all workloads every ten minutes. So the
// state at a time is what the quarter of an hour before has.
const (
	snapshotAge = 15 * time.Minute
	// maxSnapshots bounds what is read for one answer.
	maxSnapshots = 20_000
	// maxHistory is how many snapshots of one workload are read for its generations.
	maxHistory = 5_000
)

// workloadState is a snapshot of a workload, as package cluster writes it.
type workloadState struct {
	Kind       string          `json:"kind"`
	Namespace  string          `json:"namespace"`
	Name       string          `json:"name"`
	UID        string          `json:"uid"`
	Created    time.Time       `json:"created,omitzero"`
	Deleted    time.Time       `json:"deleted,omitzero"`
	Generation int64           `json:"generation,omitempty"`
	Revision   string          `json:"revision,omitempty"`
	Replicas   int             `json:"replicas"`
	Ready      int             `json:"ready"`
	Updated    int             `json:"updated"`
	Available  int             `json:"available"`
	Paused     bool            `json:"paused,omitempty"`
	Conditions []condition     `json:"conditions,omitempty"`
	Containers []containerSpec `json:"containers,omitempty"`
	Pods       []podState      `json:"pods,omitempty"`
	More       int             `json:"more,omitempty"` // pods for which the snapshot had no room
}

type condition struct {
	Type    string    `json:"type"`
	Status  string    `json:"status"`
	Reason  string    `json:"reason,omitempty"`
	Message string    `json:"message,omitempty"`
	Since   time.Time `json:"since,omitzero"`
}

type containerSpec struct {
	Name     string            `json:"name"`
	Image    string            `json:"image"`
	Requests map[string]string `json:"requests,omitempty"`
	Limits   map[string]string `json:"limits,omitempty"`
}

type podState struct {
	Name       string           `json:"name"`
	UID        string           `json:"uid"`
	Node       string           `json:"node,omitempty"`
	IP         string           `json:"ip,omitempty"`
	Phase      string           `json:"phase"`
	Reason     string           `json:"reason,omitempty"`
	Message    string           `json:"message,omitempty"`
	Created    time.Time        `json:"created,omitzero"`
	Started    time.Time        `json:"started,omitzero"`
	Deleting   time.Time        `json:"deleting,omitzero"`
	Deleted    bool             `json:"deleted,omitempty"` // it is gone
	Owner      string           `json:"owner,omitempty"`
	Template   string           `json:"template,omitempty"`
	Revision   string           `json:"revision,omitempty"`
	Ready      bool             `json:"ready"`
	Containers []containerState `json:"containers,omitempty"`
}

type containerState struct {
	Name     string     `json:"name"`
	Image    string     `json:"image,omitempty"`
	Ready    bool       `json:"ready"`
	Restarts int        `json:"restarts"`
	State    string     `json:"state"` // running, waiting, terminated
	Reason   string     `json:"reason,omitempty"`
	Message  string     `json:"message,omitempty"`
	ExitCode int        `json:"exitCode,omitempty"`
	Since    time.Time  `json:"since,omitzero"`
	Last     *lastState `json:"last,omitempty"`
}

// lastState is how a container ended before it was started again.
type lastState struct {
	Reason   string    `json:"reason,omitempty"`
	ExitCode int       `json:"exitCode"`
	Finished time.Time `json:"finished,omitzero"`
}

// rolloutState is what `polymesh rollout` records, as far as the page shows it.
type rolloutState struct {
	Name      string        `json:"name"`
	Namespace string        `json:"namespace"`
	Container string        `json:"container"`
	Image     string        `json:"image"`
	Previous  string        `json:"previous"`
	Plan      rolloutPlan   `json:"plan"`
	Started   time.Time     `json:"started"`
	Phase     string        `json:"phase"`
	Step      int           `json:"step"`
	Weight    int           `json:"weight"`
	Reason    string        `json:"reason,omitempty"`
	Done      []rolloutStep `json:"done,omitempty"`
	Ended     time.Time     `json:"ended,omitzero"`
	Final     string        `json:"final,omitempty"`
}

type rolloutPlan struct {
	Steps        []int   `json:"steps"`
	Interval     string  `json:"interval"`
	MaxErrorRate float64 `json:"maxErrorRate"`
	MaxP99       string  `json:"maxP99"`
	MinRequests  int     `json:"minRequests"`
	Timeout      string  `json:"timeout"`
}

type rolloutStep struct {
	Weight int             `json:"weight"`
	Canary json.RawMessage `json:"canary"` // a measurement; package rollout may add to it
	Stable json.RawMessage `json:"stable"`
}

// ended reports whether the rollout is over.
func (r *rolloutState) ended() bool { return !r.Ended.IsZero() }

// label returns a label of an entry, and metadata what belongs to the entry alone.
func label(e logstore.Entry, name string) string    { return logstore.Value(e.Labels, name) }
func metadata(e logstore.Entry, name string) string { return logstore.Value(e.Metadata, name) }

func equal(name, value string) logstore.Matcher {
	return logstore.Matcher{Name: name, Type: logstore.Equal, Value: value}
}

// objectKey identifies a workload.
type objectKey struct{ namespace, kind, name string }

// latestWorkloads returns the workloads at a time, by namespace and name. Matchers can select some.
func (s *server) latestWorkloads(ctx context.Context, at time.Time, matchers ...logstore.Matcher) ([]workloadState, error) {
	seen := map[objectKey]bool{}
	var list []workloadState
	err := s.Logs.Select(ctx, logstore.Selector{
		Matchers: append([]logstore.Matcher{equal("job", "objects")}, matchers...),
		Start:    at.Add(-snapshotAge), End: at, Limit: maxSnapshots, Newest: true,
	}, func(e logstore.Entry) bool {
		key := objectKey{label(e, "namespace"), metadata(e, "kind"), label(e, "workload")}
		if seen[key] {
			return true
		}
		var w workloadState
		if json.Unmarshal([]byte(e.Line), &w) != nil || w.Namespace != key.namespace || w.Name != key.name {
			return true // not by kubestate
		}
		seen[key] = true
		w.Pods = slices.DeleteFunc(w.Pods, func(p podState) bool { return p.Deleted })
		if w.Deleted.IsZero() {
			list = append(list, w)
		}
		return true
	})
	if err != nil {
		return nil, err
	}
	slices.SortFunc(list, func(a, b workloadState) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name), cmp.Compare(a.Kind, b.Kind))
	})
	return list, nil
}

// latestRollouts returns the newest state of each rollout that was under way or ended in the day before a time, the newest first.
func (s *server) latestRollouts(ctx context.Context, at time.Time) ([]rolloutState, error) {
	return s.rolloutsIn(ctx, period{at.Add(-24 * time.Hour), at})
}

// rolloutsIn returns the newest state of each rollout in a period. The same Deployment can have had several.
func (s *server) rolloutsIn(ctx context.Context, p period, matchers ...logstore.Matcher) ([]rolloutState, error) {
	type started struct {
		namespace, name string
		at              time.Time
	}
	seen := map[started]bool{}
	var list []rolloutState
	err := s.Logs.Select(ctx, logstore.Selector{
		Matchers: append([]logstore.Matcher{equal("job", "rollouts")}, matchers...),
		Start:    p.start, End: p.end, Limit: maxSnapshots, Newest: true,
	}, func(e logstore.Entry) bool {
		var r rolloutState
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
	slices.SortFunc(list, func(a, b rolloutState) int {
		return cmp.Or(b.Started.Compare(a.Started), cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
	})
	return list, err
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
		if p := w.problem(found); p != nil {
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

// unready reports whether fewer pods are ready than should be.
func (w *workloadState) unready() bool {
	done := func(p podState) bool { return p.Phase == "Succeeded" }
	return w.Kind != "Job" && w.Ready < w.Replicas && !w.Paused && !(w.Kind == "Pod" && slices.ContainsFunc(w.Pods, done))
}

// key is what the workload is found by.
func (w *workloadState) key() objectKey { return objectKey{w.Namespace, w.Kind, w.Name} }

// problem returns why a workload is not ready, nothing if it is. How much of it is ready is its own snapshot's, why is the server's diagnosis.
func (w *workloadState) problem(d *diagnosis) *problem {
	if !w.unready() {
		return nil
	}
	p := &problem{Text: fmt.Sprintf("%d of %s ready", w.Ready, plural(w.Replicas, "pod is", "pods are"))}
	if list := d.of(w.key()); len(list) > 0 {
		if what := phrase(list[0]); what != "" {
			p.Text += ": " + what
		}
		p.Why, p.Since = why(list[0]), list[0].Since
	}
	return p
}

// why returns why a pod is not ready, in the words of the diagnosis, or else in Kubernetes' own.
func (p *podState) why(found []findings.Finding) string {
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
