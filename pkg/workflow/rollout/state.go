package rollout

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/distribution/reference"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/util/retry"

	"polymesh.dev/polymesh/pkg/ssa"
	"polymesh.dev/polymesh/pkg/workflow/project"
)

const (
	// rolloutLabel is on every object that a rollout creates; its value is the Deployment's name.
	rolloutLabel = "polymesh.dev/rollout"
	fieldManager = ssa.Rollout
	stateKey     = "state"
	// specAnnotation is on the Deployment while its rollout is under way, with the Spec as JSON.
	specAnnotation = "polymesh.dev/rollout"
)

// Phase is the phase of a rollout.
type Phase string

// The phases.
const (
	Starting    Phase = "Starting"    // the canary is created
	Running     Phase = "Running"     // it gets its share of the requests
	Promoting   Phase = "Promoting"   // the Deployment gets the new image
	RollingBack Phase = "RollingBack" // the canary is removed
	Promoted    Phase = "Promoted"    // ended: the Deployment has the new image
	RolledBack  Phase = "RolledBack"  // ended: the canary was not within limits, or not ready
	Aborted     Phase = "Aborted"     // ended: an abort was requested
)

// Ended reports whether the rollout has ended.
func (p Phase) Ended() bool { return p == Promoted || p == RolledBack || p == Aborted }

// Request is a request to a rollout that is under way.
type Request string

// The requests.
const (
	RequestPromote Request = "promote"
	RequestAbort   Request = "abort"
)

// Plan is the plan of a rollout.
type Plan struct {
	// Steps are the canary's shares of the requests in percent, ascending. A last 100 may be omitted: it is always added.
	Steps []int `json:"steps"`
	// Interval is how long each step lasts.
	Interval metav1.Duration `json:"interval"`
	// MaxErrorRate is in percent of the requests, MaxP99 the 99th percentile of their durations.
	MaxErrorRate float64         `json:"maxErrorRate"`
	MaxP99       metav1.Duration `json:"maxP99"`
	// MinRequests is how many requests a step needs for a result.
	MinRequests int `json:"minRequests"`
	// Timeout is how long pods may take to become ready, and a step to get MinRequests.
	Timeout metav1.Duration `json:"timeout"`
}

// check returns an error if the plan is not valid, and adds the last step.
func (p *Plan) check() error {
	if len(p.Steps) == 0 {
		return fmt.Errorf("--steps has no step: specify for example 10,50,100")
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
		return fmt.Errorf("--interval %s is too short for a measurement: at least 1s", p.Interval.Duration)
	case math.IsNaN(p.MaxErrorRate) || p.MaxErrorRate < 0 || p.MaxErrorRate > 100:
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

// Spec is what the user who started a rollout requested. It is in the State, in a ConfigMap, and on the Deployment: a rollout acts
// with the permissions of the user who continues it, so only a user who may change the Deployment anyway may decide which image it
// gets. A user who may only write ConfigMaps can promote or abort a rollout, but no more.
type Spec struct {
	// Container gets Image; it had Previous.
	Container string `json:"container"`
	Image     string `json:"image"`
	Previous  string `json:"previous"`
	// VersionLabel distinguishes the canary's pods from the others, whose value of it is Version.
	VersionLabel string      `json:"versionLabel"`
	Version      string      `json:"version"`
	Plan         Plan        `json:"plan"`
	Started      metav1.Time `json:"started"`
}

func (s Spec) equal(other Spec) bool { return equality.Semantic.DeepEqual(s, other) }

// State is the recorded state of a rollout.
type State struct {
	Name      string `json:"name"`
	Namespace string `json:"namespace"`
	Spec

	Phase Phase `json:"phase"`
	// Step is the index of the step in Plan.Steps, -1 before the first.
	Step int `json:"step"`
	// Weight is the canary's share of the requests in percent.
	Weight int `json:"weight"`
	// Request has the key of earlier versions.
	Request Request    `json:"wish,omitempty"`
	Reason  string     `json:"reason,omitempty"`
	Done    []StepDone `json:"done,omitempty"`
	Routes  []string   `json:"virtualServices,omitempty"` // of others that were changed, "namespace/name"

	Ended *metav1.Time `json:"ended,omitempty"`
	// Final is the image that the Deployment had at the end.
	Final string `json:"final,omitempty"`

	// Driver is the process that drives it, empty if none currently does. It is read from the Lease and not recorded.
	Driver string `json:"driver,omitempty"`
}

// StepDone is the measurement of a step.
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

// Ways returns what the user can do about a rollout that is under way.
func (s *State) Ways() string {
	of := fmt.Sprintf("%s -n %s", s.Name, s.Namespace)
	return fmt.Sprintf("`polymesh rollout canary %s` continues it, `polymesh rollout promote %s` and `polymesh rollout abort %s` end it", of, of, of)
}

// Outcome returns how a rollout ended.
func (s *State) Outcome() string {
	switch s.Phase {
	case Promoted:
		return "promoted to " + s.Image
	case RolledBack:
		return "rolled back to " + cmp.Or(s.Final, s.Previous) + ": " + s.Reason
	default:
		return "aborted, back to " + cmp.Or(s.Final, s.Previous)
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
	err := json.Unmarshal([]byte(m.Data[stateKey]), s)
	if err == nil {
		err = s.check(m.Namespace, m.Name)
	}
	if err != nil {
		return nil, fmt.Errorf("configmap/%s -n %s is not a valid record of a rollout: %w (delete it if none is under way)", m.Name, m.Namespace, err)
	}
	return s, nil
}

// Limits of a recorded state.
const (
	maxReason = 4 << 10
	maxRoutes = 1000
)

// check returns an error for a state that no rollout can have written: other users may write ConfigMaps.
func (s *State) check(namespace, record string) error {
	switch {
	case s.Namespace != namespace || recordName(s.Name) != record:
		return fmt.Errorf("it is about %q in the namespace %q", s.Name, s.Namespace)
	case len(validation.IsDNS1123Subdomain(s.Name)) > 0 || len(validation.IsDNS1123Label(s.Container)) > 0:
		return fmt.Errorf("%q or %q is not a name", s.Name, s.Container)
	case !slices.Contains(versionLabels, s.VersionLabel) || s.Version == "" || len(validation.IsValidLabelValue(s.Version)) > 0:
		return fmt.Errorf("%s=%q is not a version label", s.VersionLabel, s.Version)
	case s.Previous == "":
		return fmt.Errorf("it has no image to roll back to")
	case !slices.Contains([]Phase{Starting, Running, Promoting, RollingBack, Promoted, RolledBack, Aborted}, s.Phase):
		return fmt.Errorf("this version of Polymesh does not know the phase %q", s.Phase)
	case s.Request != "" && s.Request != RequestPromote && s.Request != RequestAbort:
		return fmt.Errorf("this version of Polymesh does not know the request %q", s.Request)
	}
	if err := checkImage(s.Image); err != nil {
		return err
	}
	steps := len(s.Plan.Steps)
	if err := s.Plan.check(); err != nil {
		return err
	}
	switch {
	case steps != len(s.Plan.Steps):
		return fmt.Errorf("the steps %v do not end with 100", s.Plan.Steps[:steps])
	case s.Step < -1 || s.Step >= steps || s.Step < 0 && s.Phase == Running:
		return fmt.Errorf("it has no step %d", s.Step)
	case s.Weight < 0 || s.Weight > 100:
		return fmt.Errorf("a weight of %d is not a percentage", s.Weight)
	case len(s.Done) > steps || len(s.Reason) > maxReason || len(s.Routes) > maxRoutes:
		return fmt.Errorf("it is too long")
	}
	for _, route := range s.Routes {
		of, name, ok := strings.Cut(route, "/")
		if !ok || len(validation.IsDNS1123Label(of)) > 0 || len(validation.IsDNS1123Subdomain(name)) > 0 {
			return fmt.Errorf("%q is not a VirtualService", route)
		}
	}
	return nil
}

// checkImage returns an error if a kubelet could not pull the image.
func checkImage(image string) error {
	if _, err := reference.ParseNormalizedNamed(image); err != nil {
		return fmt.Errorf("image %q: %w", image, err)
	}
	return nil
}

// confirmed reports whether the Deployment's annotation names this rollout.
func (s *State) confirmed(d *appsv1.Deployment) bool {
	var spec Spec
	return json.Unmarshal([]byte(d.Annotations[specAnnotation]), &spec) == nil && spec.equal(s.Spec)
}

func (s *State) write(m *corev1.ConfigMap) error {
	recorded := *s
	recorded.Driver = ""
	// JSON encodes half a character as more bytes, and a reason that is too long would not be read again.
	recorded.Reason = strings.ToValidUTF8(recorded.Reason[:min(len(recorded.Reason), maxReason)], "")
	recorded.Routes = recorded.Routes[:min(len(recorded.Routes), maxRoutes)]
	text, err := json.MarshalIndent(&recorded, "", "  ")
	if err == nil {
		m.Data = map[string]string{stateKey: string(text)}
	}
	return err
}

// change reads the state, changes it and writes it, again if another process wrote it in the meantime.
func change(ctx context.Context, client kubernetes.Interface, namespace, name string, edit func(*State) error) (*State, error) {
	var state *State
	err := onConflict(ctx, func() error {
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

// onConflict repeats a change if another process wrote in the meantime. retry.RetryOnConflict alone mistakes the error of a context
// that has ended for the end of its own retries, and returns nil although nothing was written.
func onConflict(ctx context.Context, change func() error) error {
	var last error
	err := retry.RetryOnConflict(retry.DefaultBackoff, func() error {
		last = change()
		return last
	})
	if err == nil && last != nil {
		err = last
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
	}
	return err
}

// addDriver reads which process drives the rollout.
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
