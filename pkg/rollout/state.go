package rollout

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/util/retry"

	"polymesh.dev/polymesh/pkg/project"
)

const (
	// rolloutLabel is on everything that a rollout makes; its value is the Deployment's name.
	rolloutLabel = "polymesh.dev/rollout"
	fieldManager = "polymesh-rollout"
	stateKey     = "state"
)

// Phase is what a rollout is at.
type Phase string

// The phases.
const (
	Starting    Phase = "Starting"    // the canary is made
	Running     Phase = "Running"     // it gets its share of the requests
	Promoting   Phase = "Promoting"   // the Deployment gets the new image
	RollingBack Phase = "RollingBack" // the canary goes
	Promoted    Phase = "Promoted"    // ended: the Deployment has the new image
	RolledBack  Phase = "RolledBack"  // ended: the canary was not within bounds, or not ready
	Aborted     Phase = "Aborted"     // ended: somebody wanted so
)

// Ended reports whether nothing is left to do.
func (p Phase) Ended() bool { return p == Promoted || p == RolledBack || p == Aborted }

// Wish is what somebody wants of a rollout that is under way.
type Wish string

// The wishes.
const (
	WishPromote Wish = "promote"
	WishAbort   Wish = "abort"
)

// Plan is how a rollout is to go.
type Plan struct {
	// Steps are the canary's shares of the requests in percent, rising. A last 100 may be left out: it always comes.
	Steps []int `json:"steps"`
	// Interval is how long each step lasts.
	Interval metav1.Duration `json:"interval"`
	// MaxErrorRate is in percent of the requests, MaxP99 the 99th percentile of their durations.
	MaxErrorRate float64         `json:"maxErrorRate"`
	MaxP99       metav1.Duration `json:"maxP99"`
	// MinRequests is how many requests a step has to see before anything is said of it.
	MinRequests int `json:"minRequests"`
	// Timeout is how long pods may take to become ready, and a step to see MinRequests.
	Timeout metav1.Duration `json:"timeout"`
}

// check refuses what cannot be done.
func (p *Plan) check() error {
	if len(p.Steps) == 0 {
		return fmt.Errorf("--steps names no step: say for example 10,50,100")
	}
	last := 0
	for _, step := range p.Steps {
		if step <= last || step > 100 {
			return fmt.Errorf("--steps %v: each step is a percentage, above the one before it and at most 100", p.Steps)
		}
		last = step
	}
	if last < 100 {
		p.Steps = append(slices.Clone(p.Steps), 100)
	}
	switch {
	case p.Interval.Duration < time.Second:
		return fmt.Errorf("--interval %s is too short to measure in: at least 1s", p.Interval.Duration)
	case p.MaxErrorRate < 0 || p.MaxErrorRate > 100:
		return fmt.Errorf("--max-error-rate %v is not a percentage", p.MaxErrorRate)
	case p.MaxP99.Duration <= 0:
		return fmt.Errorf("--max-p99 %s is not a duration above 0", p.MaxP99.Duration)
	case p.MinRequests < 1:
		return fmt.Errorf("--min-requests %d: at least 1", p.MinRequests)
	case p.Timeout.Duration < p.Interval.Duration:
		return fmt.Errorf("--timeout %s is shorter than --interval %s", p.Timeout.Duration, p.Interval.Duration)
	}
	return nil
}

// State is a rollout as the cluster remembers it.
type State struct {
	Name      string `json:"name"`
	Namespace string `json:"namespace"`
	// Container gets Image; it had Previous.
	Container string `json:"container"`
	Image     string `json:"image"`
	Previous  string `json:"previous"`
	// VersionLabel tells the canary's pods from the others, whose value of it is Version.
	VersionLabel string `json:"versionLabel"`
	Version      string `json:"version"`
	Plan         Plan   `json:"plan"`

	Phase Phase `json:"phase"`
	// Step is the index of the step in Plan.Steps, -1 before the first.
	Step int `json:"step"`
	// Weight is the canary's share of the requests in percent.
	Weight int        `json:"weight"`
	Wish   Wish       `json:"wish,omitempty"`
	Reason string     `json:"reason,omitempty"`
	Done   []StepDone `json:"done,omitempty"`
	Routes []string   `json:"virtualServices,omitempty"` // of others that were changed, "namespace/name"

	Started metav1.Time  `json:"started"`
	Ended   *metav1.Time `json:"ended,omitempty"`

	// Driver is who does it, empty if nobody does at the moment. It is read from the Lease and not recorded.
	Driver string `json:"driver,omitempty"`
}

// StepDone is what a step has measured.
type StepDone struct {
	Weight int     `json:"weight"`
	Canary Measure `json:"canary"`
	Stable Measure `json:"stable"`
}

// ID names the Deployment as kubectl does.
func (s *State) ID() string         { return deploymentID(s.Namespace, s.Name) }
func (s *State) canary() string     { return canaryName(s.Name) }
func (s *State) canaryMark() string { return canaryMark(s.Version) }

func canaryName(name string) string { return name + "-canary" }
func recordName(name string) string { return "polymesh-rollout-" + name }

// Ways says what can be done about a rollout that is under way.
func (s *State) Ways() string {
	of := fmt.Sprintf("%s -n %s", s.Name, s.Namespace)
	return fmt.Sprintf("`polymesh rollout canary %s` goes on with it, `polymesh rollout promote %s` and `polymesh rollout abort %s` end it", of, of, of)
}

// Outcome says how a rollout ended.
func (s *State) Outcome() string {
	switch s.Phase {
	case Promoted:
		return "promoted to " + s.Image
	case RolledBack:
		return "rolled back to " + s.Previous + ": " + s.Reason
	default:
		return "aborted, back to " + s.Previous
	}
}

// holds reports whether a rollout needs an object to stay as it is.
func (s *State) holds(o project.Object) bool {
	gk := o.GroupVersionKind().GroupKind()
	switch gk.String() {
	case "Deployment.apps":
		return o.GetNamespace() == s.Namespace && o.GetName() == s.Name
	case "VirtualService.networking.istio.io":
		return slices.Contains(s.Routes, o.GetNamespace()+"/"+o.GetName())
	}
	return false
}

func load(ctx context.Context, client kubernetes.Interface, namespace, name string) (*State, error) {
	m, err := client.CoreV1().ConfigMaps(namespace).Get(ctx, recordName(name), metav1.GetOptions{})
	if err != nil {
		return nil, err
	}
	return parseState(m)
}

func parseState(m *corev1.ConfigMap) (*State, error) {
	s := &State{}
	if err := json.Unmarshal([]byte(m.Data[stateKey]), s); err != nil {
		return nil, fmt.Errorf("configmap/%s -n %s holds no rollout: %w", m.Name, m.Namespace, err)
	}
	return s, nil
}

func (s *State) write(m *corev1.ConfigMap) error {
	recorded := *s
	recorded.Driver = ""
	text, err := json.MarshalIndent(&recorded, "", "  ")
	if err == nil {
		m.Data = map[string]string{stateKey: string(text)}
	}
	return err
}

// change reads the state, changes it and writes it, again if somebody else has written meanwhile.
func change(ctx context.Context, client kubernetes.Interface, namespace, name string, edit func(*State) error) (*State, error) {
	var state *State
	err := retry.RetryOnConflict(retry.DefaultBackoff, func() error {
		m, err := client.CoreV1().ConfigMaps(namespace).Get(ctx, recordName(name), metav1.GetOptions{})
		if err != nil {
			return err
		}
		if state, err = parseState(m); err != nil {
			return err
		}
		if err := edit(state); err != nil {
			return err
		}
		if err := state.write(m); err != nil {
			return err
		}
		_, err = client.CoreV1().ConfigMaps(namespace).Update(ctx, m, metav1.UpdateOptions{FieldManager: fieldManager})
		return err
	})
	return state, err
}

// addDriver reads who drives the rollout.
func (s *State) addDriver(ctx context.Context, client kubernetes.Interface) error {
	lease, err := client.CoordinationV1().Leases(s.Namespace).Get(ctx, recordName(s.Name), metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read who drives the rollout of %s: %w", s.ID(), err)
	}
	if holder, renewed := lease.Spec.HolderIdentity, lease.Spec.RenewTime; holder != nil && renewed != nil && time.Since(renewed.Time) < 2*leaseTime {
		s.Driver = *holder
	}
	return nil
}
