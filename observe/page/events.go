package page

import (
	"context"
	"net/http"
	"strconv"

	"polymesh.dev/polymesh/observe/document"
	"polymesh.dev/polymesh/observe/excerpt"
	"polymesh.dev/polymesh/observe/logstore"
)

const (
	maxEvents = 500
	maxMarks  = 400
)

// event is an event of Kubernetes, or a change that package cluster saw.
type event struct {
	Time      int64  `json:"time"` // Unix milliseconds
	Namespace string `json:"namespace,omitempty"`
	Workload  string `json:"workload,omitempty"`
	Kind      string `json:"kind,omitempty"`
	Name      string `json:"name,omitempty"`
	Reason    string `json:"reason,omitempty"`
	Warning   bool   `json:"warning,omitempty"`
	Count     int    `json:"count,omitempty"`
	Source    string `json:"source,omitempty"`
	Text      string `json:"text"`
}

func eventOf(e logstore.Entry) event {
	count, _ := strconv.Atoi(metadata(e, "count")) // 0 is left out
	return event{
		Time: e.Time.UnixMilli(), Namespace: label(e, "namespace"), Workload: label(e, "workload"), Kind: metadata(e, "kind"), Name: metadata(e, "name"),
		Reason: metadata(e, "reason"), Warning: metadata(e, "type") == "Warning", Count: count, Source: metadata(e, "source"), Text: e.Line,
	}
}

// events answers with the newest events of a period. Parameters: end, window; ns and workload; warning=1; kind, reason, text.
func (s *server) events(r *http.Request) (any, error) {
	p, err := s.periodOf(r)
	if err != nil {
		return nil, err
	}
	sel := logstore.Selector{Matchers: []logstore.Matcher{equal("job", document.Events)}, Start: p.start, End: p.end, Limit: maxEvents, Newest: true}
	namespaces, err := namesOf(r, "ns")
	if err != nil {
		return nil, err
	}
	sel.Matchers = append(sel.Matchers, inNamespaces(namespaces)...)
	for parameter, add := range map[string]func(string){
		"workload": func(v string) { sel.Matchers = append(sel.Matchers, equal("workload", v)) },
		"kind":     func(v string) { sel.Metadata = append(sel.Metadata, equal("kind", v)) },
		"reason":   func(v string) { sel.Metadata = append(sel.Metadata, equal("reason", v)) },
		"text":     func(v string) { sel.Filters = append(sel.Filters, logstore.Filter{Text: v}) },
	} {
		value, err := nameOf(r, parameter)
		if err != nil {
			return nil, err
		}
		if value != "" {
			add(value)
		}
	}
	if r.URL.Query().Get("warning") == "1" {
		sel.Metadata = append(sel.Metadata, equal("type", "Warning"))
	}
	list, err := s.selectEvents(r.Context(), sel)
	if err != nil {
		return nil, err
	}
	return struct {
		Start  int64   `json:"start"`
		End    int64   `json:"end"`
		Events []event `json:"events"`
		More   bool    `json:"more"`
	}{p.start.UnixMilli(), p.end.UnixMilli(), list, len(list) == maxEvents}, nil
}

func (s *server) selectEvents(ctx context.Context, sel logstore.Selector) ([]event, error) {
	list := []event{}
	err := s.Logs.Select(ctx, sel, func(e logstore.Entry) bool {
		list = append(list, eventOf(e))
		return true
	})
	return list, err
}

// inNamespaces returns a matcher for namespaces, nothing for all.
func inNamespaces(names []string) []logstore.Matcher {
	switch len(names) {
	case 0:
		return nil
	case 1:
		return []logstore.Matcher{equal("namespace", names[0])}
	}
	return []logstore.Matcher{{Name: "namespace", Type: logstore.Regexp, Value: anyOf(names)}}
}

// mark is a change that every chart shows.
type mark struct {
	Time      int64  `json:"time"` // Unix milliseconds
	Kind      string `json:"kind"` // deploy, rollout, restart, oom, evict, node
	Namespace string `json:"namespace,omitempty"`
	Workload  string `json:"workload,omitempty"`
	Text      string `json:"text"`
}

// markKinds are the reasons of events that are marks.
var markKinds = map[string]string{
	"Deployed": "deploy", "RolloutStarted": "rollout", "RolloutStep": "rollout", "RolloutEnded": "rollout",
	"ContainerRestarted": "restart", "OOMKilled": "oom", "Evicted": "evict",
	"NodeNotReady": "node", "NodeReady": "node", "ClusterGone": "node", "ClusterBack": "node",
}

// marks answers with the changes in a period. Parameters: end, window, ns, workload.
func (s *server) marks(r *http.Request) (any, error) {
	p, err := s.periodOf(r)
	if err != nil {
		return nil, err
	}
	namespaces, err := namesOf(r, "ns")
	if err != nil {
		return nil, err
	}
	workload, err := nameOf(r, "workload")
	if err != nil {
		return nil, err
	}
	list, err := s.marksIn(r.Context(), p, namespaces, workload)
	if err != nil {
		return nil, err
	}
	return struct {
		Marks []mark `json:"marks"`
		More  bool   `json:"more"`
	}{list, len(list) == maxMarks}, nil
}

func (s *server) marksIn(ctx context.Context, p period, namespaces []string, workload string) ([]mark, error) {
	reasons := make([]string, 0, len(markKinds))
	for reason := range markKinds {
		reasons = append(reasons, reason)
	}
	// What happens to a node, which has no namespace, concerns all.
	if len(namespaces) > 0 {
		namespaces = append([]string{""}, namespaces...)
	}
	matchers := append([]logstore.Matcher{equal("job", document.Events)}, inNamespaces(namespaces)...)
	list := []mark{}
	err := s.Logs.Select(ctx, logstore.Selector{
		// Anyone who may create events can choose such a reason, but not this source.
		Matchers: matchers, Metadata: []logstore.Matcher{equal("source", document.Polymesh), {Name: "reason", Type: logstore.Regexp, Value: anyOf(reasons)}},
		Start: p.start, End: p.end, Limit: maxMarks, Newest: true,
	}, func(e logstore.Entry) bool {
		x := eventOf(e)
		if workload == "" || x.Workload == workload || x.Namespace == "" {
			list = append(list, mark{x.Time, markKinds[x.Reason], x.Namespace, x.Workload, excerpt.Marked(x.Text, 300)})
		}
		return true
	})
	return list, err
}
