package rollout

import (
	"context"
	"errors"
	"fmt"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/wait"

	"polymesh.dev/polymesh/pkg/deploy"
	"polymesh.dev/polymesh/pkg/diagnose"
	"polymesh.dev/polymesh/pkg/progress"
	"polymesh.dev/polymesh/pkg/project"
)

const (
	// pollEvery is how often the cluster is asked whether something has happened.
	pollEvery = time.Second
	// readEvery bounds how often metrics are read in a step.
	readEvery = 10 * time.Second
	// unwell is how long pods of the canary may be unavailable during a step.
	unwell = 20 * time.Second
	// drained bounds the wait for the last requests of a canary that gets none any more.
	drained = time.Minute
)

// driver does what is next. Each phase can be begun again wherever it was broken off.
type driver struct {
	Options
	state    *State
	findings []diagnose.Finding
}

// unfit is why a canary is rolled back.
type unfit string

func (u unfit) Error() string { return string(u) }

// errWished says that somebody wants something else than what is being done.
var errWished = errors.New("somebody wants it otherwise")

// run drives the rollout to its end, or until ctx ends.
func (d *driver) run(ctx context.Context) error {
	if err := d.save(ctx, func(*State) {}); err != nil {
		return err
	}
	for !d.state.Phase.Ended() {
		phase := map[Phase]func(context.Context) error{Starting: d.start, Running: d.step, Promoting: d.promote, RollingBack: d.rollBack}[d.state.Phase]
		if phase == nil {
			return fmt.Errorf("the rollout of %s is in a phase %q that this version of Polymesh does not know", d.state.ID(), d.state.Phase)
		}
		watched, stop := d.untilWished(ctx)
		err := phase(watched)
		stop()
		var why unfit
		switch {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case errors.Is(context.Cause(watched), errWished):
			if err := d.grant(ctx); err != nil {
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

// save changes the state in the cluster, and takes over what others have changed in it.
func (d *driver) save(ctx context.Context, edit func(*State)) error {
	state, err := change(ctx, d.Cluster.Client, d.Namespace, d.Name, func(s *State) error {
		edit(s)
		return nil
	})
	if err != nil {
		return fmt.Errorf("record the rollout of %s: %w", deploymentID(d.Namespace, d.Name), err)
	}
	d.state = state
	return nil
}

// untilWished is ctx until somebody wishes for something. Whoever is rolling back goes on with that.
func (d *driver) untilWished(ctx context.Context) (context.Context, func()) {
	watched, cancel := context.WithCancelCause(ctx)
	if d.state.Phase == RollingBack {
		return watched, func() { cancel(nil) }
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = wait.PollUntilContextCancel(watched, pollEvery, true, func(ctx context.Context) (bool, error) {
			if state, err := load(ctx, d.Cluster.Client, d.Namespace, d.Name); err == nil && state.Wish != "" {
				cancel(errWished)
			}
			return false, nil
		})
	}()
	return watched, func() {
		cancel(nil)
		<-done
	}
}

// grant does as somebody wished.
func (d *driver) grant(ctx context.Context) error {
	return d.save(ctx, func(s *State) {
		switch s.Wish {
		case WishAbort:
			s.Phase = RollingBack
		case WishPromote:
			s.Phase = Promoting
		}
		s.Wish = ""
	})
}

// prepare makes sure of what the other phases build on: both sides have names, requests go by weights, and the canary has
// the pods for its share. Until the proxies know the weights there must be no pod of the canary, because a route without
// them leads to every pod of the Service.
func (d *driver) prepare(ctx context.Context, weight int) (*appsv1.Deployment, *routing, error) {
	stable, err := d.Cluster.Client.AppsV1().Deployments(d.Namespace).Get(ctx, d.Name, metav1.GetOptions{})
	if err != nil {
		return nil, nil, fmt.Errorf("read %s: %w", d.state.ID(), err)
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
			if err := pause(ctx, settle); err != nil {
				return "", err
			}
			if err := d.weigh(ctx, r, ownerOf(stable), 0); err != nil {
				return "", err
			}
			if err := pause(ctx, settle); err != nil {
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

// canaryReady makes the canary have at least this many pods, and waits for them where they are not there.
func (d *driver) canaryReady(ctx context.Context, stable *appsv1.Deployment, replicas int32) error {
	deployments := d.Cluster.Client.AppsV1().Deployments(d.Namespace)
	live, err := deployments.Get(ctx, d.state.canary(), metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		live, err = deployments.Create(ctx, canaryDeployment(stable, d.state, replicas), metav1.CreateOptions{FieldManager: fieldManager})
	case err != nil:
	case live.Spec.Replicas != nil && *live.Spec.Replicas >= replicas && live.Status.AvailableReplicas >= *live.Spec.Replicas:
		return nil
	case live.Spec.Replicas == nil || *live.Spec.Replicas < replicas:
		live, err = deployments.Patch(ctx, live.Name, types.MergePatchType, fmt.Appendf(nil, `{"spec":{"replicas":%d}}`, replicas), metav1.PatchOptions{FieldManager: fieldManager})
	}
	if err != nil {
		return fmt.Errorf("make %s: %w", deploymentID(d.Namespace, d.state.canary()), err)
	}
	return d.await(ctx, live.Name)
}

// await waits until a Deployment is ready. One that does not become ready is unfit.
func (d *driver) await(ctx context.Context, name string) error {
	limit := d.state.Plan.Timeout.Duration
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("not within %s", limit))
	defer cancel()
	u := &unstructured.Unstructured{}
	u.SetAPIVersion("apps/v1")
	u.SetKind("Deployment")
	u.SetNamespace(d.Namespace)
	u.SetName(name)
	findings, err := d.Cluster.Await(ctx, d.Steps, project.Object{Unstructured: u})
	if errors.Is(err, deploy.ErrNotReady) {
		d.findings = findings
		return unfit(notReady(name, findings))
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

// start makes the canary, which gets no requests yet.
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

// measure watches one step. Its error is unfit when the canary was not within bounds.
func (d *driver) measure(ctx context.Context, r *routing, weight int) (StepDone, error) {
	plan := d.state.Plan
	step := d.Steps.Start("%d %%", weight)
	done, err := func() (StepDone, error) {
		m := newMeter(d.Cluster.Client, d.state, r.services())
		if err := m.read(ctx); err != nil {
			return StepDone{}, err
		}
		began := time.Now()
		every := min(max(plan.Interval.Duration/5, pollEvery), readEvery)
		var unwellSince time.Time
		for {
			if err := pause(ctx, every); err != nil {
				return StepDone{}, err
			}
			err := m.read(ctx)
			if err == nil {
				err = d.canaryWell(ctx, &unwellSince)
			}
			var why unfit
			switch {
			case ctx.Err() != nil:
				return StepDone{}, context.Cause(ctx)
			case errors.As(err, &why):
				return StepDone{}, err
			case err != nil:
				step.Note("%v", err) // an API server that restarts; the lease says for how long that is well
				continue
			}
			done := StepDone{Weight: weight, Canary: m.measure(m.canary), Stable: m.measure(m.stable)}
			step.Note("%s (stable: %s)", done.Canary, done.Stable)
			enough := plan.enough(done.Canary)
			over := time.Since(began) >= plan.Interval.Duration
			if enough && (over || m.certain(plan)) {
				if why := plan.judge(done.Canary, done.Stable); why != "" {
					return done, unfit(fmt.Sprintf("at %d %%: %s", weight, why))
				}
			}
			if enough && over {
				return done, nil
			}
			if !enough && time.Since(began) > plan.Timeout.Duration {
				return done, unfit(fmt.Sprintf("at %d %%: %d requests in %s, fewer than --min-requests %d", weight, done.Canary.Requests, plan.Timeout.Duration, plan.MinRequests))
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

// canaryWell refuses a canary whose pods are not available any more.
func (d *driver) canaryWell(ctx context.Context, since *time.Time) error {
	live, err := d.Cluster.Dynamic.Resource(appsv1.SchemeGroupVersion.WithResource("deployments")).Namespace(d.Namespace).Get(ctx, d.state.canary(), metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		return unfit(deploymentID(d.Namespace, d.state.canary()) + " was removed by somebody")
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
	case time.Since(*since) < unwell:
		return nil
	}
	findings, err := diagnose.Workload(ctx, d.Cluster.Client, deploymentID(d.Namespace, live.GetName()), live)
	if err != nil {
		return err
	}
	d.findings = findings
	return unfit(notReady(live.GetName(), findings))
}

// promote sends everything to the canary, gives the Deployment the new image, and sends everything back to it. When the
// Deployment's pods do not become ready, the canary goes on serving.
func (d *driver) promote(ctx context.Context) error {
	if d.state.Weight != 0 || !d.hasImage(ctx, d.state.Image) {
		stable, r, err := d.prepare(ctx, 100)
		if err != nil {
			return err
		}
		if d.state.Weight < 100 {
			if err := d.weigh(ctx, r, ownerOf(stable), 100); err != nil {
				return err
			}
			if err := pause(ctx, settle); err != nil {
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
	return d.finish(ctx, Promoted, "all requests to "+d.Name+" again, with "+d.state.Image)
}

// rollBack sends everything to the Deployment, with its own image.
func (d *driver) rollBack(ctx context.Context) error {
	if d.hasImage(ctx, d.state.Image) {
		if err := d.setImage(ctx, d.state.Previous); err != nil {
			return err
		}
		if err := d.await(ctx, d.Name); err != nil {
			return d.stays(err)
		}
	}
	end := RolledBack
	if d.state.Reason == "" {
		end = Aborted
	}
	return d.finish(ctx, end, "all requests to "+d.Name+" again, with "+d.state.Previous)
}

// stays says that requests stay where they are because the Deployment's own pods are not ready.
func (d *driver) stays(err error) error {
	var why unfit
	if errors.As(err, &why) {
		return fmt.Errorf("%s; the canary goes on with %d %% of the requests: %s", why, d.state.Weight, d.state.Ways())
	}
	return err
}

// hasImage reports whether the Deployment has an image. If it cannot be read, what follows says so.
func (d *driver) hasImage(ctx context.Context, image string) bool {
	stable, err := d.Cluster.Client.AppsV1().Deployments(d.Namespace).Get(ctx, d.Name, metav1.GetOptions{})
	if err != nil {
		return false
	}
	i, err := containerOf(stable, d.state.Container)
	return err == nil && stable.Spec.Template.Spec.Containers[i].Image == image
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

// finish sends everything to the Deployment, and then removes what the rollout has made, in the order in which nothing of it
// is used any more.
func (d *driver) finish(ctx context.Context, end Phase, title string) error {
	return d.Steps.Do(title, func(step *progress.Step) (string, error) {
		stable, err := d.Cluster.Client.AppsV1().Deployments(d.Namespace).Get(ctx, d.Name, metav1.GetOptions{})
		if err != nil {
			return "", fmt.Errorf("read %s: %w", d.state.ID(), err)
		}
		r, err := d.routing(ctx, stable)
		if err != nil {
			return "", err
		}
		// Without a canary nobody needs weights any more; this is then the rest of what was broken off.
		if found, err := d.hasCanary(ctx); err != nil {
			return "", err
		} else if found {
			if err := d.weigh(ctx, r, ownerOf(stable), 0); err != nil {
				return "", err
			}
			if err := pause(ctx, settle); err != nil {
				return "", err
			}
			step.Note("wait for the last requests of %s", d.state.canary())
			if err := d.drain(ctx, r); err != nil {
				return "", err
			}
		}
		if err := d.removeCanary(ctx); err != nil {
			return "", err
		}
		if err := pause(ctx, settle); err != nil {
			return "", err
		}
		if err := d.unweigh(ctx, r); err != nil {
			return "", err
		}
		if err := pause(ctx, settle); err != nil {
			return "", err
		}
		if err := d.removeOwn(ctx, destinationRules); err != nil {
			return "", err
		}
		return "", d.save(ctx, func(s *State) {
			now := metav1.Now()
			s.Phase, s.Ended, s.Wish, s.Routes = end, &now, "", nil
		})
	})
}

// drain waits until the canary gets no more requests.
func (d *driver) drain(ctx context.Context, r *routing) error {
	m := newMeter(d.Cluster.Client, d.state, r.services())
	if err := m.read(ctx); err != nil {
		return err
	}
	seen := 0.0
	err := wait.PollUntilContextTimeout(ctx, pollEvery, drained, false, func(ctx context.Context) (bool, error) {
		before := seen
		if err := m.read(ctx); err != nil {
			return false, err
		}
		seen = m.received[m.canary].requests
		return seen == before, nil
	})
	if wait.Interrupted(err) && ctx.Err() == nil {
		return nil // its pods end as pods do, after the requests that they have
	}
	return err
}

// hasCanary reports whether the canary is there.
func (d *driver) hasCanary(ctx context.Context) (bool, error) {
	_, err := d.Cluster.Client.AppsV1().Deployments(d.Namespace).Get(ctx, d.state.canary(), metav1.GetOptions{})
	if err != nil && !apierrors.IsNotFound(err) {
		return false, fmt.Errorf("read %s: %w", deploymentID(d.Namespace, d.state.canary()), err)
	}
	return err == nil, nil
}

// removeCanary removes the canary and waits until no Service has a pod of it.
func (d *driver) removeCanary(ctx context.Context) error {
	policy := metav1.DeletePropagationBackground
	err := d.Cluster.Client.AppsV1().Deployments(d.Namespace).Delete(ctx, d.state.canary(), metav1.DeleteOptions{PropagationPolicy: &policy})
	if err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("remove %s: %w", deploymentID(d.Namespace, d.state.canary()), err)
	}
	err = wait.PollUntilContextTimeout(ctx, pollEvery, d.state.Plan.Timeout.Duration, true, func(ctx context.Context) (bool, error) {
		pods, err := d.Cluster.Client.CoreV1().Pods(d.Namespace).List(ctx, metav1.ListOptions{LabelSelector: labels.Set{rolloutLabel: d.Name}.String()})
		if err != nil {
			return false, err
		}
		for _, pod := range pods.Items {
			if pod.DeletionTimestamp == nil {
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

// pause waits for this long.
func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(d):
		return nil
	}
}
