package cluster

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/dynamic"

	"polymesh.dev/polymesh/pkg/diagnose"
	"polymesh.dev/polymesh/pkg/progress"
	"polymesh.dev/polymesh/pkg/workflow/project"
)

const (
	// retryEvery is the pause before a watch is opened again. A user who may not watch polls with it.
	retryEvery = 500 * time.Millisecond
	// diagnoseEvery is how often a workload that is not ready is diagnosed: its own status does not show its pods' state.
	diagnoseEvery = 3 * time.Second
	// permanentFailureGrace is how long a failure that waiting does not fix may last before the wait ends: a Secret or an image
	// may still be created by another user.
	permanentFailureGrace = 20 * time.Second
	// lastDiagnosis is the timeout of the diagnosis after the wait.
	lastDiagnosis = 10 * time.Second
	// removalTimeout limits the wait for an object that is being deleted; by Kubernetes' default, pods have 30 s to terminate.
	removalTimeout = 3 * time.Minute
)

// ErrNotReady is the error of Await when a workload did not become ready.
var ErrNotReady = errors.New("not every workload is ready")

// Locate returns the file and line of the first of the fields that a manifest has.
type Locate func([]diagnose.Place) string

// Await waits until a workload is ready, as a separate step. If it does not become ready, the error is ErrNotReady and the
// findings are the reasons, each with its place in the manifests; locate may be nil. A workload without a namespace is in the
// cluster's default one, as for kubectl.
func (c *Cluster) Await(ctx context.Context, steps *progress.Steps, workload project.Object, locate Locate) ([]diagnose.Finding, error) {
	m, err := c.Mapping(workload)
	if err != nil {
		return nil, err
	}
	w := &wait{cluster: c, workload: workload, locate: locate, step: steps.Start("%s", workload.ID()), finalSince: map[diagnose.Reason]time.Time{}}
	watching, stop := context.WithCancel(ctx)
	defer stop()
	states := follow(watching, c.Resource(m, cmp.Or(workload.GetNamespace(), metav1.NamespaceDefault)), workload.GetName())
	tick := time.NewTicker(diagnoseEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return w.expired(ctx)
		case <-tick.C:
			if w.latest == nil {
				continue
			}
		case s := <-states:
			if s.err != nil {
				w.step.Note("%v", s.err) // an API server that restarts
			}
			if s.live == nil {
				continue
			}
			w.latest = s.live
			status, done, err := diagnose.Rollout(s.live)
			switch {
			case done:
				// It is ready, even if the diagnosis cannot determine whether a sidecar is missing.
				findings, _ := w.diagnose(ctx)
				w.step.Done("%s", status)
				return findings, nil
			case err != nil:
				w.step.Fail()
				return w.orStatus(w.diagnoseLast(ctx), err.Error()), ErrNotReady
			case time.Since(w.diagnosed) < diagnoseEvery:
				continue
			}
		}
		if w.examine(ctx) {
			w.step.Fail()
			return w.findings, ErrNotReady
		}
	}
}

// wait is one call of Await.
type wait struct {
	cluster  *Cluster
	workload project.Object
	locate   Locate
	step     *progress.Step

	latest     *unstructured.Unstructured // nil while it does not exist
	diagnosed  time.Time
	findings   []diagnose.Finding
	finalSince map[diagnose.Reason]time.Time
}

// examine diagnoses the workload and reports whether waiting longer is pointless.
func (w *wait) examine(ctx context.Context) bool {
	w.diagnosed = time.Now()
	// An error in reading does not mean that the workload does not become ready.
	if found, err := w.diagnose(ctx); err == nil || len(found) > 0 {
		w.findings = found
	}
	note, _, _ := diagnose.Rollout(w.latest)
	if len(w.findings) > 0 {
		note = string(w.findings[0].Reason) + ": " + w.findings[0].Message
	}
	w.step.Note("%s", note)
	return failsForGood(w.findings, w.finalSince)
}

// failsForGood reports whether a final finding has lasted for the grace period. since is kept from one diagnosis to the next.
func failsForGood(findings []diagnose.Finding, since map[diagnose.Reason]time.Time) bool {
	for reason := range since {
		if !slices.ContainsFunc(findings, func(f diagnose.Finding) bool { return f.Final && f.Reason == reason }) {
			delete(since, reason)
		}
	}
	for _, f := range findings {
		if !f.Final {
			continue
		}
		if since[f.Reason].IsZero() {
			since[f.Reason] = time.Now()
		}
		if time.Since(since[f.Reason]) > permanentFailureGrace {
			return true
		}
	}
	return false
}

// expired ends a wait whose context is done.
func (w *wait) expired(ctx context.Context) ([]diagnose.Finding, error) {
	w.step.Fail()
	if errors.Is(ctx.Err(), context.Canceled) {
		return w.findings, context.Cause(ctx)
	}
	status, findings := "it did not become ready", w.findings
	if w.latest != nil {
		status, _, _ = diagnose.Rollout(w.latest)
		findings = w.diagnoseLast(ctx)
	}
	return w.orStatus(findings, fmt.Sprintf("%s (%v)", status, context.Cause(ctx))), ErrNotReady
}

// orStatus returns what was found, or else a finding with the workload's own status.
func (w *wait) orStatus(findings []diagnose.Finding, status string) []diagnose.Finding {
	if len(findings) > 0 {
		return findings
	}
	return []diagnose.Finding{{Reason: diagnose.NotReady, Object: w.workload.ID(), Message: diagnose.Line(status), At: w.workload.At(),
		Advice: fmt.Sprintf("see `kubectl describe %s`, and its pods", w.workload.ID())}}
}

// diagnose returns why the workload is not ready, and where in the manifests. With an error the findings are about what could be
// read.
func (w *wait) diagnose(ctx context.Context) ([]diagnose.Finding, error) {
	findings, err := diagnose.Workload(ctx, w.cluster.Client, w.workload.ID(), w.latest)
	for i := range findings {
		if w.locate != nil {
			findings[i].At = w.locate(findings[i].Places)
		}
	}
	return findings, err
}

// diagnoseLast diagnoses once more, even after the timeout: on a busy machine the reason may be visible only now. If it finds
// nothing, it returns what was found before.
func (w *wait) diagnoseLast(ctx context.Context) []diagnose.Finding {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), lastDiagnosis)
	defer cancel()
	if found, _ := w.diagnose(ctx); len(found) > 0 {
		return found
	}
	return w.findings
}

// AwaitGone waits until an object no longer exists.
func (c *Cluster) AwaitGone(ctx context.Context, m *meta.RESTMapping, namespace, name string) error {
	ctx, cancel := context.WithTimeout(ctx, removalTimeout)
	defer cancel()
	states := follow(ctx, c.Resource(m, namespace), name)
	for {
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s is still there: %w", project.ID(m.GroupVersionKind.GroupKind(), namespace, name), context.Cause(ctx))
		case s := <-states:
			if s.live == nil && s.err == nil {
				return nil
			}
		}
	}
}

// state is the current state of an object; without live and err, it does not exist.
type state struct {
	live *unstructured.Unstructured
	err  error
}

// follow sends an object's state, and again whenever it changes, until ctx ends. If the API server does not respond, or the user
// may not watch, it reads the object again after a pause.
func follow(ctx context.Context, r dynamic.ResourceInterface, name string) <-chan state {
	states := make(chan state)
	send := func(s state) {
		select {
		case states <- s:
		case <-ctx.Done():
		}
	}
	go func() {
		for ctx.Err() == nil {
			live, err := r.Get(ctx, name, metav1.GetOptions{})
			options := metav1.ListOptions{FieldSelector: "metadata.name=" + name}
			switch {
			case apierrors.IsNotFound(err):
				send(state{})
			case err != nil:
				send(state{err: err})
			default:
				options.ResourceVersion = live.GetResourceVersion()
				send(state{live: live})
			}
			if watcher, watchErr := r.Watch(ctx, options); watchErr == nil {
				sendEvents(ctx, watcher, send)
			}
			select {
			case <-ctx.Done():
			case <-time.After(retryEvery):
			}
		}
	}()
	return states
}

// sendEvents sends what a watch reports, until it or ctx ends.
func sendEvents(ctx context.Context, watcher watch.Interface, send func(state)) {
	defer watcher.Stop()
	for {
		var event watch.Event // of no type when the watch has ended
		select {
		case <-ctx.Done():
			return
		case event = <-watcher.ResultChan():
		}
		live, ok := event.Object.(*unstructured.Unstructured)
		switch {
		case ok && event.Type == watch.Deleted:
			send(state{})
		case ok && (event.Type == watch.Added || event.Type == watch.Modified):
			send(state{live: live})
		default:
			return // an error, such as a version that is too old
		}
	}
}
