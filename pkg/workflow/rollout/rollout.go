// Package rollout rolls out a new image of a Deployment step by step: a second Deployment, the canary, gets a growing share of the
// requests while its error rate and its 99th percentile stay within limits; otherwise it is rolled back. pkg/command calls Canary,
// Promote, Abort, Get and List, and Refuse before a deploy.
//
// It owns the Deployment NAME-canary, a DestinationRule SERVICE-canary and, if the mesh has no route to the Service, a
// VirtualService SERVICE-canary. In the user's VirtualServices it splits the routes that lead to the Service, and joins them again
// at the end. Its state is the ConfigMap polymesh-rollout-NAME; the holder of the Lease of that name drives it. There is no other
// state, so any machine can continue or end it.
//
// # Why no existing engine
//
// Two were considered, Flagger 1.44 and Argo Rollouts 1.9, as Go modules. Both are controllers: they start from a custom resource
// and run in a process that must be operated and upgraded in the cluster, and both query a Prometheus for measurements, which
// Polymesh does not ship and a small cluster does not have. Argo's Istio package only sets weights, on a VirtualService and two
// Services or subsets that the user has prepared, for a resource Rollout that replaces the Deployment; its module pins Kubernetes
// 1.34, and this one is 1.36. Flagger takes over the Deployment: it copies it to NAME-primary, scales the original to zero, and
// then owns the Service and the VirtualService of that name, so a project's manifests no longer describe what runs. Either would
// also add the clients of a dozen vendors' metric services to the binary. Without controller, custom resource and Prometheus, what
// remains is a state machine of a few steps on plain objects. The ideas come from Flagger: the two measurements, a minimum number
// of requests, a step that waits for traffic.
package rollout

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"

	"polymesh.dev/polymesh/pkg/diagnose"
	"polymesh.dev/polymesh/pkg/progress"
	"polymesh.dev/polymesh/pkg/workflow/cluster"
	"polymesh.dev/polymesh/pkg/workflow/project"
)

// Options select the rollout and the cluster.
type Options struct {
	Cluster   *cluster.Cluster
	Namespace string
	// Name is the Deployment's.
	Name  string
	Steps *progress.Steps
	// Settle is how long proxies may take to get a change before the next change depends on it; 0 is three seconds. Istio pushes a
	// tenth of a second after a change, later if there are more changes, and does not report when the last proxy has it.
	Settle time.Duration
	// ReadTimeout is how long reading one proxy may take; 0 is ten seconds.
	ReadTimeout time.Duration
	// Unread is how long the canary's proxies may be unreadable in a step; 0 is the plan's Timeout.
	Unread time.Duration
}

const defaultSettle = 3 * time.Second

// Result is the state of a rollout when a command ends.
type Result struct {
	*State
	// Findings are why pods are not ready.
	Findings []diagnose.Finding `json:"findings,omitempty"`
}

// Canary starts the rollout of an image, or continues the one that is under way: if another machine drives it, this one shows what
// happens and takes over when the other stops. It returns when the rollout has ended. An empty image means the one under way.
func Canary(ctx context.Context, o Options, image, container string, plan Plan) (*Result, error) {
	state, err := load(ctx, o.Cluster.Client, o.Namespace, o.Name)
	switch {
	case err != nil && !apierrors.IsNotFound(err):
		return nil, err
	case err == nil && !state.Phase.Ended():
		if image != "" && image != state.Image {
			return &Result{State: state}, fmt.Errorf("a rollout of %s is under way, of image %s: %s", state.ID(), state.Image, state.Ways())
		}
		return join(ctx, o)
	case image == "":
		return nil, fmt.Errorf("no rollout of %s is under way: start one with --image", deploymentID(o.Namespace, o.Name))
	}
	if err := plan.check(); err != nil {
		return nil, err
	}
	if err := checkImage(image); err != nil {
		return nil, fmt.Errorf("--image: %w", err)
	}
	if err := begin(ctx, o, image, container, plan); err != nil {
		return nil, err
	}
	return join(ctx, o)
}

// Promote makes a rollout skip its remaining steps.
func Promote(ctx context.Context, o Options) (*Result, error) { return request(ctx, o, RequestPromote) }

// Abort rolls back a rollout.
func Abort(ctx context.Context, o Options) (*Result, error) { return request(ctx, o, RequestAbort) }

// request records a request in the state, which the driver of the rollout polls, and drives the rollout if no other process does.
func request(ctx context.Context, o Options, r Request) (*Result, error) {
	state, err := change(ctx, o.Cluster.Client, o.Namespace, o.Name, func(s *State) error {
		switch {
		case s.Phase.Ended():
			return fmt.Errorf("the rollout of %s has ended: %s", s.ID(), s.Outcome())
		case r == RequestPromote && s.Phase == RollingBack:
			return fmt.Errorf("the rollout of %s is being rolled back: %s", s.ID(), s.Reason)
		}
		s.Request = r
		return nil
	})
	if apierrors.IsNotFound(err) {
		return nil, fmt.Errorf("no rollout of %s is under way in namespace %s (polymesh rollout status lists them)", o.Name, o.Namespace)
	}
	if err != nil {
		return &Result{State: state}, err
	}
	return join(ctx, o)
}

// Get returns the state of a Deployment's rollout, or its last state if it has ended.
func Get(ctx context.Context, c *cluster.Cluster, namespace, name string) (*State, error) {
	state, err := load(ctx, c.Client, namespace, name)
	if apierrors.IsNotFound(err) {
		return nil, fmt.Errorf("no rollout of %s in namespace %s", name, namespace)
	}
	if err != nil {
		return nil, err
	}
	return state, state.addDriver(ctx, c.Client)
}

// Names returns the Deployments in a namespace that have a rollout, under way or ended.
func Names(ctx context.Context, client kubernetes.Interface, namespace string) ([]string, error) {
	found, err := client.CoreV1().ConfigMaps(namespace).List(ctx, metav1.ListOptions{LabelSelector: rolloutLabel})
	if err != nil {
		return nil, fmt.Errorf("list the rollouts in %s: %w", namespace, err)
	}
	var names []string
	for _, m := range found.Items {
		if name := m.Labels[rolloutLabel]; m.Name == recordName(name) {
			names = append(names, name)
		}
	}
	return names, nil
}

// List returns the states of all rollouts in a namespace.
func List(ctx context.Context, c *cluster.Cluster, namespace string) ([]*State, error) {
	names, err := Names(ctx, c.Client, namespace)
	if err != nil {
		return nil, err
	}
	states := []*State{}
	for _, name := range names {
		state, err := Get(ctx, c, namespace, name)
		if err != nil {
			return nil, err
		}
		states = append(states, state)
	}
	return states, nil
}

// Refuse returns an error if a rollout needs one of the objects to stay as it is: a deploy would reset its weights and image. The
// rollout's own objects belong to no project and are not pruned.
func Refuse(ctx context.Context, c *cluster.Cluster, objects []project.Object) error {
	states := map[string][]*State{}
	for _, o := range objects {
		namespace := o.GetNamespace()
		if _, known := states[namespace]; !known && namespace != "" {
			found, err := List(ctx, c, namespace)
			if err != nil && !apierrors.IsForbidden(err) { // a user who may not read them deploys without this check
				return err
			}
			states[namespace] = found
		}
	}
	for _, found := range states {
		for _, s := range found {
			if s.Phase.Ended() {
				continue
			}
			for _, o := range objects {
				if s.holds(o) {
					return fmt.Errorf("%s: a rollout of %s is under way, at %d %%: %s", o.At(), s.ID(), s.Weight, s.Ways())
				}
			}
		}
	}
	return nil
}

func deploymentID(namespace, name string) string {
	return "deployment.apps/" + name + " -n " + namespace
}

// begin checks everything that can be checked, and then records the rollout. It changes nothing else.
func begin(ctx context.Context, o Options, image, container string, plan Plan) error {
	if !o.Cluster.Istio {
		return errors.New("the cluster has no Istio, whose weights and metrics a rollout needs: see docs/mesh/install.md")
	}
	deployment, err := o.Cluster.Client.AppsV1().Deployments(o.Namespace).Get(ctx, o.Name, metav1.GetOptions{})
	if err != nil {
		return fmt.Errorf("read %s: %w", deploymentID(o.Namespace, o.Name), err)
	}
	index, err := containerOf(deployment, container)
	if err != nil {
		return err
	}
	chosen := deployment.Spec.Template.Spec.Containers[index]
	if chosen.Image == image {
		return fmt.Errorf("%s runs image %s already", deploymentID(o.Namespace, o.Name), image)
	}
	s := &State{
		Name: o.Name, Namespace: o.Namespace, Phase: Starting, Step: -1,
		Spec: Spec{Container: chosen.Name, Image: image, Previous: chosen.Image, Plan: plan, Started: metav1.Now()},
	}
	if s.VersionLabel, s.Version, err = versionOf(deployment); err != nil {
		return err
	}
	other, err := o.Cluster.Client.AppsV1().Deployments(o.Namespace).Get(ctx, s.canary(), metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
	case err != nil:
		return fmt.Errorf("read %s: %w", deploymentID(o.Namespace, s.canary()), err)
	case other.Labels[rolloutLabel] != o.Name:
		return fmt.Errorf("%s exists: the canary needs this name", deploymentID(o.Namespace, s.canary()))
	}
	d := &driver{Options: o, state: s}
	if _, err := d.checkedRouting(ctx, deployment); err != nil {
		return err
	}
	if err := create(ctx, o.Cluster.Client, s, ownerOf(deployment)); err != nil {
		return err
	}
	return annotate(ctx, o.Cluster.Client, s, &s.Spec)
}

// annotate records the rollout's spec on the Deployment, or removes it.
func annotate(ctx context.Context, client kubernetes.Interface, s *State, spec *Spec) error {
	var value any
	if spec != nil {
		text, err := json.Marshal(spec)
		if err != nil {
			return err
		}
		value = string(text)
	}
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"annotations": map[string]any{specAnnotation: value}}})
	if err != nil {
		return err
	}
	_, err = client.AppsV1().Deployments(s.Namespace).Patch(ctx, s.Name, types.MergePatchType, patch, metav1.PatchOptions{FieldManager: fieldManager})
	if err != nil {
		return fmt.Errorf("record the rollout on %s: %w", s.ID(), err)
	}
	return nil
}

// create records a rollout. It replaces the record of one that has ended.
func create(ctx context.Context, client kubernetes.Interface, s *State, owner metav1.OwnerReference) error {
	maps := client.CoreV1().ConfigMaps(s.Namespace)
	m := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{
		Name: recordName(s.Name), Namespace: s.Namespace, Labels: map[string]string{rolloutLabel: s.Name}, OwnerReferences: []metav1.OwnerReference{owner},
	}}
	if err := s.write(m); err != nil {
		return err
	}
	_, err := maps.Create(ctx, m, metav1.CreateOptions{FieldManager: fieldManager})
	if !apierrors.IsAlreadyExists(err) {
		return err
	}
	old, err := maps.Get(ctx, m.Name, metav1.GetOptions{})
	if err != nil {
		return err
	}
	ended, err := parseState(old)
	if err != nil {
		return err
	}
	if !ended.Phase.Ended() {
		return fmt.Errorf("a rollout of %s has just begun on another machine: %s", s.ID(), ended.Ways())
	}
	m.ResourceVersion = old.ResourceVersion
	_, err = maps.Update(ctx, m, metav1.UpdateOptions{FieldManager: fieldManager})
	return err
}
