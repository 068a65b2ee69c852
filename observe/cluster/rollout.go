package cluster

import (
	"encoding/json"
	"fmt"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"polymesh.dev/polymesh/observe/document"
	"polymesh.dev/polymesh/observe/logstore"
)

const (
	rolloutPrefix   = "polymesh-rollout-"
	rolloutStateKey = "state"
	maxRollout      = 64 << 10 // bytes of its state
	maxSteps        = 100
)

// rollout is what `polymesh rollout` has recorded about a Deployment. Anyone who may write ConfigMaps in its namespace can forge it.
type rollout struct {
	state   document.Rollout
	uid     types.UID
	changed bool      // since it was last written
	written time.Time // the state of a rollout in progress is written repeatedly
}

// readRollout returns nil if the object is not a rollout's state.
func readRollout(object any) *rollout {
	m, ok := object.(*corev1.ConfigMap)
	if !ok || len(m.Data[rolloutStateKey]) > maxRollout {
		return nil
	}
	r := &rollout{uid: m.UID, changed: true}
	s := &r.state
	if json.Unmarshal([]byte(m.Data[rolloutStateKey]), s) != nil || s.Namespace != m.Namespace || rolloutPrefix+s.Name != m.Name || s.Phase == "" {
		return nil
	}
	for _, text := range []*string{&s.Container, &s.Phase} {
		clipAt(text, maxShort)
	}
	for _, text := range []*string{&s.Image, &s.Previous, &s.Final} {
		clipAt(text, maxMessage)
	}
	clipAt(&s.Reason, maxLine)
	s.Plan.Steps, s.Done = head(s.Plan.Steps, maxSteps), head(s.Done, maxSteps)
	return r
}

// rolloutChanged marks the start, the steps and the end of a rollout.
func (c *Cluster) rolloutChanged(old, now *rollout) {
	if now == nil {
		return
	}
	s := &now.state
	subject := ref{kindDeployment, s.Namespace, s.Name, ""}
	if d := c.deployments.get(s.Namespace, s.Name); d != nil {
		subject.uid = d.UID
	}
	// Successive rollouts use the same ConfigMap.
	mark := func(reason, kind, line string, happened time.Time, more ...string) {
		id := identify(append([]string{reason, string(now.uid), s.Started.UTC().Format(time.RFC3339)}, more...)...)
		c.mark(subject, reason, kind, fmt.Sprintf("rollout of %s: %s", s.Name, line), happened, id, field("image", s.Image))
	}
	mark(RolloutStarted, normal, fmt.Sprintf("canary with %s beside %s", s.Image, s.Previous), s.Started.Time)
	switch {
	case now.state.Over():
		kind, line := normal, "promoted to "+s.Image
		if s.Phase != "Promoted" {
			line = fmt.Sprintf("%s, back to %s", strings.ToLower(s.Phase), s.Previous)
		}
		if s.Phase == "RolledBack" {
			kind, line = warning, fmt.Sprintf("rolled back to %s: %s", s.Previous, s.Reason)
		}
		mark(RolloutEnded, kind, line, s.Ended.Time)
	case s.Step >= 0 && (old == nil || old.state.Step != s.Step || old.state.Weight != s.Weight):
		at := time.Time{}
		if old == nil {
			// The start of the step is not recorded; it is after the start of the rollout.
			at = s.Started.Time
		}
		mark(RolloutStep, normal, fmt.Sprintf("the canary gets %d %% of the requests", s.Weight), at, fmt.Sprint(s.Step), fmt.Sprint(s.Weight))
	}
}

// dueRollouts returns the states that have changed, and every ten minutes those of rollouts in progress.
func (c *Cluster) dueRollouts(now time.Time) []logstore.Entry {
	var entries []logstore.Entry
	for _, r := range c.rollouts.items {
		if !r.changed && (r.state.Over() || now.Sub(r.written) < snapshotEvery) {
			continue
		}
		r.changed, r.written = false, now
		s := &r.state
		if r.state.Over() && s.Ended.Before(c.marks.since) {
			continue
		}
		line := encode(s)
		if line == "" {
			continue
		}
		entries = append(entries, logstore.Entry{
			Time:     now,
			Labels:   []logstore.Field{field("job", document.Rollouts), field("namespace", s.Namespace), field("workload", s.Name)},
			Line:     line,
			Metadata: []logstore.Field{field("kind", "Rollout"), field("name", s.Name), field("uid", string(r.uid))},
		})
	}
	return entries
}
