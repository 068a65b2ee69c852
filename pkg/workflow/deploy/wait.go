package deploy

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/kubectl/pkg/cmd/apply"

	"polymesh.dev/polymesh/pkg/diagnose"
	"polymesh.dev/polymesh/pkg/progress"
	"polymesh.dev/polymesh/pkg/workflow/project"
)

const (
	pollEvery = 500 * time.Millisecond
	// lookEvery is how often a workload that is not ready is looked into.
	lookEvery = 3 * time.Second
	// lastingLimit is how long a reason that waiting does not mend is watched before the wait ends: a Secret or an image may
	// still come from elsewhere.
	lastingLimit = 20 * time.Second
	// lastLook bounds the look into what is not ready when the wait is over.
	lastLook = 10 * time.Second
	// removed bounds the wait for objects that are being deleted; pods get 30 s to end, as Kubernetes gives them.
	removed = 3 * time.Minute
)

// awaitReady waits for all workloads side by side. When that does not end well, it says why for each.
func (d *deployment) awaitReady(ctx context.Context) error {
	if d.dry || !d.Wait {
		return nil
	}
	ctx, cancel := context.WithTimeoutCause(ctx, d.Project.Timeout, fmt.Errorf("not within %s", d.Project.Timeout))
	defer cancel()
	type ended struct {
		findings []diagnose.Finding
		err      error
	}
	var waits []chan ended
	for _, o := range d.objects {
		if !diagnose.IsWorkload(o.GroupVersionKind().GroupKind()) {
			continue
		}
		done := make(chan ended, 1)
		waits = append(waits, done)
		go func() {
			findings, err := d.awaitWorkload(ctx, o)
			done <- ended{findings, err}
		}()
	}
	var failed error
	for _, done := range waits {
		e := <-done
		d.result.Findings = append(d.result.Findings, e.findings...)
		switch {
		case e.err == nil:
		case errors.Is(e.err, ErrNotReady) && failed == nil:
			failed = ErrNotReady
		case !errors.Is(e.err, ErrNotReady):
			failed = e.err
		}
	}
	return failed
}

// Await waits until a workload is ready, as a step of its own. When it does not become ready, the error is ErrNotReady and the
// findings say why. A workload without a namespace is looked for in the cluster's default one, as kubectl does.
func (c *Cluster) Await(ctx context.Context, steps *progress.Steps, workload project.Object) ([]diagnose.Finding, error) {
	d := newDeployment(Options{Project: &project.Project{Namespace: metav1.NamespaceDefault}, Steps: steps})
	d.cluster = c
	return d.awaitWorkload(ctx, workload)
}

func (d *deployment) awaitWorkload(ctx context.Context, o project.Object) ([]diagnose.Finding, error) {
	m, err := d.mapping(o)
	if err != nil {
		return nil, err
	}
	step := d.Steps.Start("%s", o.ID())
	var looked time.Time
	var latest *unstructured.Unstructured
	var findings []diagnose.Finding
	finalSince := map[diagnose.Reason]time.Time{}
	for {
		live, err := d.cluster.resource(m, o.GetNamespace()).Get(ctx, o.GetName(), metav1.GetOptions{})
		if err == nil {
			latest = live
			said, done, statusErr := diagnose.Rollout(live)
			if done {
				// It is ready, also where a look cannot say whether a sidecar is missing.
				findings, _ := d.look(ctx, o, live)
				step.Done("%s", said)
				return findings, nil
			}
			if statusErr != nil {
				step.Fail()
				return orSaid(d.lookLast(ctx, o, live, findings), o, statusErr.Error()), ErrNotReady
			}
			if time.Since(looked) > lookEvery {
				looked = time.Now()
				// What cannot be read does not decide whether the workload gets ready.
				if found, err := d.look(ctx, o, live); err == nil || len(found) > 0 {
					findings = found
				}
				if len(findings) > 0 {
					said = string(findings[0].Reason) + ": " + findings[0].Message
				}
				step.Note("%s", said)
				if isHopeless(findings, finalSince) {
					step.Fail()
					return findings, ErrNotReady
				}
			}
		} else if !apierrors.IsNotFound(err) && ctx.Err() == nil {
			step.Note("%v", err) // an API server that restarts
		}
		select {
		case <-ctx.Done():
			step.Fail()
			if errors.Is(ctx.Err(), context.Canceled) {
				return findings, context.Cause(ctx)
			}
			said := "it did not become ready"
			if latest != nil {
				said, _, _ = diagnose.Rollout(latest)
				findings = d.lookLast(ctx, o, latest, findings)
			}
			return orSaid(findings, o, fmt.Sprintf("%s (%v)", said, context.Cause(ctx))), ErrNotReady
		case <-time.After(pollEvery):
		}
	}
}

// isHopeless reports whether a final finding has been there for a while. since is kept from look to look.
func isHopeless(findings []diagnose.Finding, since map[diagnose.Reason]time.Time) bool {
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
		if time.Since(since[f.Reason]) > lastingLimit {
			return true
		}
	}
	return false
}

// orSaid is what was found, or else what the workload's own status says.
func orSaid(findings []diagnose.Finding, o project.Object, said string) []diagnose.Finding {
	if len(findings) > 0 {
		return findings
	}
	return []diagnose.Finding{{Reason: diagnose.NotReady, Object: o.ID(), Message: said, At: o.At(),
		Advice: fmt.Sprintf("look at `kubectl describe %s` and at its pods", o.ID())}}
}

// look asks why a workload is not ready, and adds the lines of its manifest. With an error the findings are what could be read.
func (d *deployment) look(ctx context.Context, o project.Object, live *unstructured.Unstructured) ([]diagnose.Finding, error) {
	findings, err := diagnose.Workload(ctx, d.cluster.Client, o.ID(), live)
	for i := range findings {
		findings[i].At = d.at(o, findings[i].Places)
	}
	return findings, err
}

// lookLast looks once more, also when the time is over: on a busy machine the reason may be there only now. What was found
// before holds where nothing is found.
func (d *deployment) lookLast(ctx context.Context, o project.Object, live *unstructured.Unstructured, before []diagnose.Finding) []diagnose.Finding {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), lastLook)
	defer cancel()
	if found, _ := d.look(ctx, o, live); len(found) > 0 {
		return found
	}
	return before
}

// at is the file and line of the first place that a manifest has, or of the workload.
func (d *deployment) at(workload project.Object, places []diagnose.Place) string {
	for _, place := range places {
		if place.Object == "" && workload.File != "" {
			return workload.At(place.Path...)
		}
		for _, o := range d.objects {
			if o.File != "" && o.ID() == place.Object {
				return o.At(place.Path...)
			}
		}
	}
	return workload.At()
}

// awaitGone waits until objects are gone, pods and all.
func (c *Cluster) awaitGone(ctx context.Context, objects []apply.PruneObject) error {
	for _, o := range objects {
		err := wait.PollUntilContextTimeout(ctx, pollEvery, removed, true, func(ctx context.Context) (bool, error) {
			_, err := c.resource(o.Mapping, o.Namespace).Get(ctx, o.Name, metav1.GetOptions{})
			return apierrors.IsNotFound(err), nil
		})
		if err != nil {
			return fmt.Errorf("%s is still there: %w", idOf(o), err)
		}
	}
	return nil
}
