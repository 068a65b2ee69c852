package rollout

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/wait"

	"polymesh.dev/polymesh/pkg/diagnose"
	"polymesh.dev/polymesh/pkg/progress"
	"polymesh.dev/polymesh/pkg/workflow/cluster"
	"polymesh.dev/polymesh/pkg/workflow/project"
)

const (
	// pollEvery is how often the cluster is polled.
	pollEvery = time.Second
	// readEvery is the longest interval between two reads of the metrics in a step.
	readEvery = 10 * time.Second
	// unavailableGrace is how long pods of the canary may be unavailable during a step.
	unavailableGrace = 20 * time.Second
	// drained limits the wait for the last requests of a canary that gets no new ones.
	drained = time.Minute
)

// driver drives a rollout. Each phase can be started again wherever it was interrupted.
type driver struct {
	Options
	state    *State
	spec     Spec // as the Deployment has confirmed it; the state may not differ later
	findings []diagnose.Finding
}

// rejected is the error of a canary that is rolled back: the reason.
type rejected string

func (r rejected) Error() string { return string(r) }

// errRequested means that a promotion or an abort was requested, which ends the current phase.
var errRequested = errors.New("a promotion or an abort was requested")

// run drives the rollout to its end, or until ctx ends.
func (d *driver) run(ctx context.Context) error {
	if err := d.takeOver(ctx); err != nil {
		return err
	}
	for !d.state.Phase.Ended() {
		if d.state.Request != "" && d.state.Phase != RollingBack {
			if err := d.carryOut(ctx); err != nil {
				return err
			}
			continue
		}
		phase := d.phase()
		if phase == nil {
			return fmt.Errorf("the rollout of %s is in a phase %q that this version of Polymesh does not know", d.state.ID(), d.state.Phase)
		}
		watched, stop := d.untilRequested(ctx)
		err := phase(watched)
		stop()
		var why rejected
		switch {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case errors.Is(context.Cause(watched), errRequested):
			if err := d.carryOut(ctx); err != nil {
				return err
			}
		case errors.As(err, &why):
			if err := d.save(ctx, func(s *State) { s.Phase, s.Reason = RollingBack, string(why) }); err != nil {
				return err
			}
		case err != nil:
			return err
		}
	}
	return nil
}

// phase returns the function for the rollout's phase; nil for one that this version does not know.
func (d *driver) phase() func(context.Context) error {
	switch d.state.Phase {
	case Starting:
		return d.start
	case Running:
		return d.step
	case Promoting:
		return d.promote
	case RollingBack:
		return d.rollBack
	}
	return nil
}

// takeOver reads the state, and checks that it is what the user who started the rollout requested. If the Deployment does not
// confirm that, the rollout can only be aborted: requests go back to the Deployment, which keeps its image.
func (d *driver) takeOver(ctx context.Context) error {
	stable, err := d.stable(ctx)
	if err != nil {
		return err
	}
	state, err := load(ctx, d.Cluster.Client, d.Namespace, d.Name)
	if err != nil {
		return err
	}
	d.state, d.spec = state, state.Spec
	if state.confirmed(stable) || state.Phase.Ended() {
		return nil
	}
	if state.Request != RequestAbort && state.Phase != RollingBack {
		return fmt.Errorf("%s does not confirm (annotation %s) what configmap/%s records about its rollout, so nothing is changed: `polymesh rollout abort %s -n %s` sends all requests to it with the image that it has",
			state.ID(), specAnnotation, recordName(d.Name), d.Name, d.Namespace)
	}
	d.Steps.Print("%s does not confirm what configmap/%s records about its rollout: it keeps its image", state.ID(), recordName(d.Name))
	observed := state.Spec
	i, err := containerOf(stable, observed.Container)
	if err != nil {
		i, observed.Container = 0, stable.Spec.Template.Spec.Containers[0].Name
	}
	observed.Previous = stable.Spec.Template.Spec.Containers[i].Image
	if observed.VersionLabel, observed.Version, err = versionOf(stable); err != nil {
		return err
	}
	d.state, err = change(ctx, d.Cluster.Client, d.Namespace, d.Name, func(s *State) error {
		s.Spec, s.Phase, s.Request = observed, RollingBack, ""
		return nil
	})
	d.spec = observed
	return err
}

// save changes the state in the cluster, and reads what others have changed in it.
func (d *driver) save(ctx context.Context, edit func(*State)) error {
	state, err := change(ctx, d.Cluster.Client, d.Namespace, d.Name, func(s *State) error {
		if !s.Spec.equal(d.spec) {
			return errors.New("the ConfigMap describes another rollout than before: it was changed")
		}
		edit(s)
		return nil
	})
	if err != nil {
		return fmt.Errorf("record the rollout of %s: %w", deploymentID(d.Namespace, d.Name), err)
	}
	d.state = state
	return nil
}

// untilRequested returns a context that ends when a promotion or an abort is requested, except during a rollback.
func (d *driver) untilRequested(ctx context.Context) (context.Context, func()) {
	watched, cancel := context.WithCancelCause(ctx)
	if d.state.Phase == RollingBack {
		return watched, func() { cancel(nil) }
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = wait.PollUntilContextCancel(watched, pollEvery, true, func(ctx context.Context) (bool, error) {
			if state, err := load(ctx, d.Cluster.Client, d.Namespace, d.Name); err == nil && state.Request != "" {
				cancel(errRequested)
			}
			return false, nil
		})
	}()
	return watched, func() {
		cancel(nil)
		<-done
	}
}

// carryOut changes the phase to what was requested.
func (d *driver) carryOut(ctx context.Context) error {
	return d.save(ctx, func(s *State) {
		switch s.Request {
		case RequestAbort:
			s.Phase = RollingBack
		case RequestPromote:
			s.Phase = Promoting
		}
		s.Request = ""
	})
}

// prepare does what all phases require: subsets for both versions, routes with weights, and enough pods of the canary for its
// share. Until the proxies have the weights there must be no pod of the canary, because a route without them leads to every pod
// of the Service.
func (d *driver) prepare(ctx context.Context, weight int) (*appsv1.Deployment, *routing, error) {
	stable, err := d.stable(ctx)
	if err != nil {
		return nil, nil, err
	}
	r, err := d.routing(ctx, stable)
	if err != nil {
		return nil, nil, err
	}
	if err := d.applyRules(ctx, r, ownerOf(stable)); err != nil {
		return nil, nil, err
	}
	if d.state.Step < 0 {
		if err := d.Steps.Do("split the requests to "+d.Name, func(*progress.Step) (string, error) {
			if err := d.settle(ctx); err != nil {
				return "", err
			}
			if err := d.weigh(ctx, r, ownerOf(stable), 0); err != nil {
				return "", err
			}
			if err := d.settle(ctx); err != nil {
				return "", err
			}
			return "", d.save(ctx, func(s *State) { s.Step = 0 })
		}); err != nil {
			return nil, nil, err
		}
	}
	all := int32(1)
	if stable.Spec.Replicas != nil {
		all = *stable.Spec.Replicas
	}
	return stable, r, d.canaryReady(ctx, stable, replicasFor(all, weight))
}

// canaryReady scales the canary to at least this many pods, and waits until they are ready.
func (d *driver) canaryReady(ctx context.Context, stable *appsv1.Deployment, replicas int32) error {
	deployments := d.Cluster.Client.AppsV1().Deployments(d.Namespace)
	live, err := d.readCanary(ctx, stable)
	switch {
	case err == nil && live == nil:
		live, err = deployments.Create(ctx, canaryDeployment(stable, d.state, replicas), metav1.CreateOptions{FieldManager: fieldManager})
	case err != nil:
	case live.Spec.Replicas != nil && *live.Spec.Replicas >= replicas && live.Status.AvailableReplicas >= *live.Spec.Replicas:
		return nil
	case live.Spec.Replicas == nil || *live.Spec.Replicas < replicas:
		live, err = deployments.Patch(ctx, live.Name, types.MergePatchType, fmt.Appendf(nil, `{"spec":{"replicas":%d}}`, replicas), metav1.PatchOptions{FieldManager: fieldManager})
	}
	if err != nil {
		return fmt.Errorf("create or scale %s: %w", deploymentID(d.Namespace, d.state.canary()), err)
	}
	return d.await(ctx, live.Name)
}

// await waits until a Deployment is ready. One that does not become ready is rejected.
func (d *driver) await(ctx context.Context, name string) error {
	limit := d.state.Plan.Timeout.Duration
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("not within %s", limit))
	defer cancel()
	u := &unstructured.Unstructured{}
	u.SetAPIVersion("apps/v1")
	u.SetKind("Deployment")
	u.SetNamespace(d.Namespace)
	u.SetName(name)
	findings, err := d.Cluster.Await(ctx, d.Steps, project.Object{Unstructured: u}, nil)
	if errors.Is(err, cluster.ErrNotReady) {
		d.findings = findings
		return rejected(notReady(name, findings))
	}
	return err
}

func notReady(name string, findings []diagnose.Finding) string {
	why := "the pods of " + name + " did not become ready"
	if len(findings) > 0 {
		why += fmt.Sprintf(": %s, %s", findings[0].Reason, findings[0].Message)
	}
	return why
}

// start creates the canary, which gets no requests yet.
func (d *driver) start(ctx context.Context) error {
	if _, _, err := d.prepare(ctx, d.state.Plan.Steps[0]); err != nil {
		return err
	}
	return d.save(ctx, func(s *State) { s.Phase = Running })
}

// step gives the canary its next share and measures it.
func (d *driver) step(ctx context.Context) error {
	weight := d.state.Plan.Steps[d.state.Step]
	stable, r, err := d.prepare(ctx, weight)
	if err != nil {
		return err
	}
	if err := d.weigh(ctx, r, ownerOf(stable), weight); err != nil {
		return err
	}
	done, err := d.measure(ctx, r, weight)
	if err != nil {
		return err
	}
	return d.save(ctx, func(s *State) {
		s.Done = append(s.Done, done)
		s.Step++
		if s.Step == len(s.Plan.Steps) {
			s.Step--
			s.Phase = Promoting
		}
	})
}

// measure measures one step. Its error is rejected if the canary was not within limits.
func (d *driver) measure(ctx context.Context, r *routing, weight int) (StepDone, error) {
	plan := d.state.Plan
	step := d.Steps.Start("%d %%", weight)
	done, err := func() (StepDone, error) {
		m := d.meter(r)
		every := min(max(plan.Interval.Duration/5, pollEvery), readEvery)
		unread := cmp.Or(d.Unread, plan.Timeout.Duration)
		var began, unavailableSince, unreadSince time.Time
		for first := true; ; first = false {
			if !first {
				if err := pause(ctx, every); err != nil {
					return StepDone{}, err
				}
			}
			err := d.canaryAvailable(ctx, &unavailableSince)
			if err == nil {
				err = m.read(ctx)
			}
			var why rejected
			switch {
			case ctx.Err() != nil:
				return StepDone{}, context.Cause(ctx)
			case errors.As(err, &why):
				return StepDone{}, err
			case errors.Is(err, errForbidden) || apierrors.IsForbidden(err):
				return StepDone{}, fmt.Errorf("at %d %%, which stays so: %w: %s", weight, err, d.state.Ways())
			case err != nil: // an API server that restarts, proxies that do not respond
				if unreadSince.IsZero() {
					unreadSince = time.Now()
				}
				if time.Since(unreadSince) > unread {
					return StepDone{}, fmt.Errorf("at %d %%, which stays so: %w, for %s; the canary's state is unknown: %s", weight, err, unread, d.state.Ways())
				}
				step.Note("%v", err)
				continue
			case began.IsZero(): // the first read, which later ones are compared with
				began, unreadSince = time.Now(), time.Time{}
				continue
			}
			unreadSince = time.Time{}
			done := StepDone{Weight: weight, Canary: m.measure(m.canary), Stable: m.measure(m.stable)}
			note := fmt.Sprintf("%s (stable: %s)", done.Canary, done.Stable)
			if m.unread != "" {
				note += "; " + m.unread
			}
			step.Note("%s", note)
			enough := plan.enough(done.Canary)
			over := time.Since(began) >= plan.Interval.Duration
			if enough && (over || m.certain(plan)) {
				if why := plan.judge(done.Canary, done.Stable); why != "" {
					return done, rejected(fmt.Sprintf("at %d %%: %s", weight, why))
				}
			}
			if enough && over {
				return done, nil
			}
			if !enough && time.Since(began) > plan.Timeout.Duration {
				why := fmt.Sprintf("at %d %%: %d requests in %s, fewer than --min-requests %d", weight, done.Canary.Requests, plan.Timeout.Duration, plan.MinRequests)
				if m.unread != "" {
					why += " (" + m.unread + ")"
				}
				return done, rejected(why)
			}
		}
	}()
	if err != nil {
		step.Fail()
		return done, err
	}
	step.Done("%s (stable: %s)", done.Canary, done.Stable)
	return done, nil
}

// canaryAvailable rejects a canary whose pods are no longer available.
func (d *driver) canaryAvailable(ctx context.Context, since *time.Time) error {
	live, err := d.Cluster.Dynamic.Resource(appsv1.SchemeGroupVersion.WithResource("deployments")).Namespace(d.Namespace).Get(ctx, d.state.canary(), metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		return rejected(deploymentID(d.Namespace, d.state.canary()) + " was removed during the rollout")
	case err != nil:
		return fmt.Errorf("read %s: %w", deploymentID(d.Namespace, d.state.canary()), err)
	}
	unavailable, _, _ := unstructured.NestedInt64(live.Object, "status", "unavailableReplicas")
	switch {
	case unavailable == 0:
		*since = time.Time{}
		return nil
	case since.IsZero():
		*since = time.Now()
		return nil
	case time.Since(*since) < unavailableGrace:
		return nil
	}
	// Its pods are not available, even if this user may not read why.
	d.findings, _ = diagnose.Workload(ctx, d.Cluster.Client, deploymentID(d.Namespace, live.GetName()), live)
	return rejected(notReady(live.GetName(), d.findings))
}

// promote sends all requests to the canary, gives the Deployment the new image, and sends all requests back to it. If the
// Deployment's pods do not become ready, the canary continues to serve.
func (d *driver) promote(ctx context.Context) error {
	image, err := d.image(ctx)
	if err != nil {
		return err
	}
	if d.state.Weight != 0 || image != d.state.Image {
		stable, r, err := d.prepare(ctx, 100)
		if err != nil {
			return err
		}
		if d.state.Weight < 100 {
			if err := d.weigh(ctx, r, ownerOf(stable), 100); err != nil {
				return err
			}
			if err := d.settle(ctx); err != nil {
				return err
			}
		}
		if err := d.setImage(ctx, d.state.Image); err != nil {
			return err
		}
		if err := d.await(ctx, d.Name); err != nil {
			return d.stays(err)
		}
	}
	return d.finish(ctx, Promoted)
}

// rollBack sends all requests to the Deployment, with its previous image.
func (d *driver) rollBack(ctx context.Context) error {
	image, err := d.image(ctx)
	if err != nil {
		return err
	}
	if image == d.state.Image && image != d.state.Previous {
		if err := d.setImage(ctx, d.state.Previous); err != nil {
			return err
		}
		if err := d.await(ctx, d.Name); err != nil {
			return d.stays(err)
		}
	}
	if d.state.Reason == "" {
		return d.finish(ctx, Aborted)
	}
	return d.finish(ctx, RolledBack)
}

// stays returns the error that requests stay where they are because the Deployment's own pods are not ready.
func (d *driver) stays(err error) error {
	var why rejected
	if errors.As(err, &why) {
		return fmt.Errorf("%s; the canary keeps %d %% of the requests: %s", why, d.state.Weight, d.state.Ways())
	}
	return err
}

// stable reads the Deployment.
func (d *driver) stable(ctx context.Context) (*appsv1.Deployment, error) {
	stable, err := d.Cluster.Client.AppsV1().Deployments(d.Namespace).Get(ctx, d.Name, metav1.GetOptions{})
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", deploymentID(d.Namespace, d.Name), err)
	}
	return stable, nil
}

// image returns the current image of the Deployment's container.
func (d *driver) image(ctx context.Context) (string, error) {
	stable, err := d.stable(ctx)
	if err != nil {
		return "", err
	}
	i, err := containerOf(stable, d.state.Container)
	if err != nil {
		return "", err
	}
	return stable.Spec.Template.Spec.Containers[i].Image, nil
}

// setImage gives the Deployment's container an image.
func (d *driver) setImage(ctx context.Context, image string) error {
	patch := fmt.Appendf(nil, `{"spec":{"template":{"spec":{"containers":[{"name":%q,"image":%q}]}}}}`, d.state.Container, image)
	_, err := d.Cluster.Client.AppsV1().Deployments(d.Namespace).Patch(ctx, d.Name, types.StrategicMergePatchType, patch, metav1.PatchOptions{FieldManager: fieldManager})
	if err != nil {
		return fmt.Errorf("set the image of %s: %w", d.state.ID(), err)
	}
	return nil
}

// finish sends all requests to the Deployment, and then removes what the rollout created, each object when it is no longer used.
func (d *driver) finish(ctx context.Context, end Phase) error {
	final, err := d.image(ctx)
	if err != nil {
		return err
	}
	switch {
	case end == Promoted && final != d.state.Image:
		return fmt.Errorf("%s has the image %s and not %s: someone has changed it; the canary keeps %d %% of the requests: %s", d.state.ID(), final, d.state.Image, d.state.Weight, d.state.Ways())
	case end != Promoted && final == d.state.Image && final != d.state.Previous:
		return fmt.Errorf("%s has the image %s again: someone has set it; run `polymesh rollout abort %s -n %s` once more", d.state.ID(), final, d.Name, d.Namespace)
	}
	err = d.Steps.Do("all requests to "+d.Name+" again, with "+final, func(step *progress.Step) (string, error) {
		stable, err := d.stable(ctx)
		if err != nil {
			return "", err
		}
		r, err := d.routing(ctx, stable)
		if err != nil {
			return "", err
		}
		// Without a canary the weights are no longer needed: an interrupted finish continues here.
		if canary, err := d.readCanary(ctx, stable); err != nil {
			return "", err
		} else if canary != nil {
			if err := d.weigh(ctx, r, ownerOf(stable), 0); err != nil {
				return "", err
			}
			if err := d.settle(ctx); err != nil {
				return "", err
			}
			step.Note("wait for the last requests of %s", d.state.canary())
			if err := d.drain(ctx, r); err != nil {
				return "", err
			}
		}
		if err := d.removeCanary(ctx, stable); err != nil {
			return "", err
		}
		if err := d.settle(ctx); err != nil {
			return "", err
		}
		if err := d.unweigh(ctx, stable, r); err != nil {
			return "", err
		}
		if err := d.settle(ctx); err != nil {
			return "", err
		}
		if err := d.removeOwn(ctx, stable, destinationRules); err != nil {
			return "", err
		}
		return "", d.save(ctx, func(s *State) {
			now := metav1.Now()
			s.Phase, s.Ended, s.Request, s.Routes, s.Final = end, &now, "", nil, final
		})
	})
	if err != nil {
		return err
	}
	return annotate(ctx, d.Cluster.Client, d.state, nil)
}

// drain waits until the canary gets no more requests. If the proxies cannot be read it waits until its timeout, which is not a
// reason to keep the canary.
func (d *driver) drain(ctx context.Context, r *routing) error {
	m := d.meter(r)
	seen, read := 0.0, false
	err := wait.PollUntilContextTimeout(ctx, pollEvery, drained, true, func(ctx context.Context) (bool, error) {
		if _, _, err := m.readServers(ctx); err != nil {
			return false, nil
		}
		before, again := seen, read
		seen, read = m.received[m.canary].requests, true
		return again && seen == before, nil
	})
	if wait.Interrupted(err) && ctx.Err() == nil {
		return nil // its pods complete their requests when they terminate
	}
	return err
}

// readCanary returns the canary, nil if there is none, and an error if the rollout did not create it.
func (d *driver) readCanary(ctx context.Context, stable *appsv1.Deployment) (*appsv1.Deployment, error) {
	id := deploymentID(d.Namespace, d.state.canary())
	canary, err := d.Cluster.Client.AppsV1().Deployments(d.Namespace).Get(ctx, d.state.canary(), metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("read %s: %w", id, err)
	case !d.owns(canary, stable):
		return nil, fmt.Errorf("%s exists: the canary needs this name, and the rollout did not create this one", id)
	}
	return canary, nil
}

// owns reports whether a rollout of the Deployment created an object.
func (d *driver) owns(o metav1.Object, stable *appsv1.Deployment) bool {
	return o.GetLabels()[rolloutLabel] == d.Name && slices.ContainsFunc(o.GetOwnerReferences(), func(r metav1.OwnerReference) bool { return r.UID == stable.UID })
}

// removeCanary removes the canary and waits until no Service has a pod of it.
func (d *driver) removeCanary(ctx context.Context, stable *appsv1.Deployment) error {
	canary, err := d.readCanary(ctx, stable)
	if err != nil {
		return err
	}
	if canary != nil {
		policy := metav1.DeletePropagationBackground
		err := d.Cluster.Client.AppsV1().Deployments(d.Namespace).Delete(ctx, canary.Name, metav1.DeleteOptions{PropagationPolicy: &policy, Preconditions: &metav1.Preconditions{UID: &canary.UID}})
		if err != nil && !apierrors.IsNotFound(err) {
			return fmt.Errorf("remove %s: %w", deploymentID(d.Namespace, canary.Name), err)
		}
	}
	err = wait.PollUntilContextTimeout(ctx, pollEvery, d.state.Plan.Timeout.Duration, true, func(ctx context.Context) (bool, error) {
		pods, err := d.Cluster.Client.CoreV1().Pods(d.Namespace).List(ctx, metav1.ListOptions{LabelSelector: labels.Set{rolloutLabel: d.Name}.String()})
		if err != nil {
			return false, err
		}
		for _, pod := range pods.Items {
			if pod.DeletionTimestamp == nil && workloadOf(&pod) == d.state.canary() {
				return false, nil
			}
		}
		return true, nil
	})
	if err != nil {
		return fmt.Errorf("wait until the pods of %s end: %w", d.state.canary(), err)
	}
	return nil
}

// meter returns a meter of the rollout's requests, which has read nothing yet.
func (d *driver) meter(r *routing) *meter {
	return newMeter(d.Cluster.Client, d.state, r.services(), cmp.Or(d.ReadTimeout, readTimeout))
}

// settle waits until the proxies have a change.
func (d *driver) settle(ctx context.Context) error {
	return pause(ctx, cmp.Or(d.Settle, defaultSettle))
}

// pause waits for a duration.
func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(d):
		return nil
	}
}
