package install

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"istio.io/istio/operator/pkg/manifest"
	"istio.io/istio/pkg/kube"
	appsv1 "k8s.io/api/apps/v1"
	autoscalingv2 "k8s.io/api/autoscaling/v2"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/informers"
	corelisters "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/tools/cache"

	"polymesh.dev/polymesh/pkg/component"
	"polymesh.dev/polymesh/pkg/condition"
	"polymesh.dev/polymesh/pkg/converge"
	"polymesh.dev/polymesh/pkg/placement"
	"polymesh.dev/polymesh/pkg/ssa"
)

var (
	autoscalerKind = schema.GroupVersionKind{Group: "autoscaling", Version: "v2", Kind: "HorizontalPodAutoscaler"}
	budgetKind     = schema.GroupVersionKind{Group: "policy", Version: "v1", Kind: "PodDisruptionBudget"}
)

// scaler gives the Deployments of our installation a second replica and a PodDisruptionBudget while two nodes can run them. Istio's charts
// set neither: what it writes has another field manager, so it is no change of what was installed. A number that someone else has set,
// by `kubectl scale` or by Istio's values, stays; of an autoscaler it sets the minimum. A budget of someone else's for the same pods is
// enough: with two, Kubernetes evicts none of them.
type scaler struct {
	client      kube.CLIClient
	deployments []string // in istioNamespace
	log         *slog.Logger

	watching component.Background
	loop     *converge.Loop
	nodes    corelisters.NodeLister
	synced   cache.InformerSynced
}

// newScaler returns nil if the record has no Deployment.
func newScaler(client kube.CLIClient, record *Record, log *slog.Logger) *scaler {
	s := &scaler{client: client, log: log, deployments: deploymentsOf(record)}
	if len(s.deployments) == 0 {
		return nil
	}
	s.loop = converge.NewLoop(log, converge.Interval, s.sync)
	return s
}

// start follows the nodes in the background.
func (s *scaler) start(ctx context.Context) error {
	factory := informers.NewSharedInformerFactoryWithOptions(s.client.Kube(), 0, informers.WithTransform(placement.Trimmed))
	nodes := factory.Core().V1().Nodes()
	s.nodes, s.synced = nodes.Lister(), nodes.Informer().HasSynced
	last := ""
	changed := func(any) {
		// The kubelets write their nodes' statuses all the time.
		if now := s.places(); now != last {
			last = now
			s.loop.Kick()
		}
	}
	if _, err := nodes.Informer().AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc: changed, UpdateFunc: func(_, obj any) { changed(obj) }, DeleteFunc: changed,
	}); err != nil {
		return fmt.Errorf("watch nodes: %w", err)
	}
	s.watching.Go(ctx, func(ctx context.Context) {
		factory.StartWithContext(ctx)
		<-ctx.Done()
		factory.Shutdown()
	})
	s.loop.Start(ctx)
	return nil
}

func (s *scaler) stop(ctx context.Context) error {
	return errors.Join(s.loop.Stop(ctx), s.watching.Stop(ctx))
}

// places describes what the nodes' part in the decision is.
func (s *scaler) places() string {
	nodes, err := s.nodes.List(labels.Everything())
	if err != nil {
		return err.Error()
	}
	var out []string
	for _, n := range nodes {
		out = append(out, fmt.Sprintf("%q %t %t %v %q", n.Name, condition.IsNodeReady(n), n.Spec.Unschedulable, n.Spec.Taints, n.Labels))
	}
	slices.Sort(out)
	return strings.Join(out, "\n")
}

func (s *scaler) sync(ctx context.Context) error {
	if !cache.WaitForCacheSync(ctx.Done(), s.synced) {
		return fmt.Errorf("list nodes: %w", ctx.Err())
	}
	nodes, err := s.nodes.List(labels.Everything())
	if err != nil {
		return fmt.Errorf("list nodes: %w", err)
	}
	autoscalers, err := s.list(ctx, autoscalerKind)
	if err != nil {
		return err
	}
	budgets, err := s.list(ctx, budgetKind)
	if err != nil {
		return err
	}
	var errs []error
	for _, name := range s.deployments {
		live, err := s.client.Kube().AppsV1().Deployments(istioNamespace).Get(ctx, name, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			continue // a user may remove a gateway
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("read Deployment %s/%s: %w", istioNamespace, name, err))
			continue
		}
		errs = append(errs, s.scale(ctx, live, nodes, autoscalers, budgets))
	}
	return errors.Join(errs...)
}

func (s *scaler) list(ctx context.Context, kind schema.GroupVersionKind) ([]unstructured.Unstructured, error) {
	r, err := s.client.DynamicClientFor(kind, nil, istioNamespace)
	if err != nil {
		return nil, fmt.Errorf("list %s: %w", kind.Kind, err)
	}
	list, err := r.List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, fmt.Errorf("list %s: %w", kind.Kind, err)
	}
	return list.Items, nil
}

// scale brings one Deployment to the number of replicas that its nodes are for.
func (s *scaler) scale(ctx context.Context, d *appsv1.Deployment, nodes []*corev1.Node, autoscalers, budgets []unstructured.Unstructured) error {
	spread, err := placement.Spread(ctx, s.client.Kube(), d, nodes, time.Now())
	if err != nil {
		return err
	}
	target, path, err := s.target(d, autoscalers)
	if err != nil {
		return err
	}
	replicas := int64(1)
	if spread {
		replicas = 2
	}
	users, err := placement.Others(target, ownManager, "spec", path)
	if err != nil {
		return err
	}
	have, _, err := unstructured.NestedInt64(target.Object, "spec", path)
	if err != nil {
		return fmt.Errorf("read %s %s: %w", target.GetKind(), target.GetName(), err)
	}
	switch {
	case users:
		replicas = have
	case have != replicas && (spread || ssa.AppliedBy(target, ownManager)):
		if err := s.apply(ctx, target, map[string]any{path: replicas}); err != nil {
			return err
		}
		s.log.Info("changed the number of replicas", "deployment", d.Name, "replicas", replicas)
	}
	return s.budget(ctx, d, budgets, spread && replicas > 1)
}

// target returns the object and the field of its spec in which the number of replicas is set: of an autoscaler the minimum.
func (s *scaler) target(d *appsv1.Deployment, autoscalers []unstructured.Unstructured) (*unstructured.Unstructured, string, error) {
	for i := range autoscalers {
		var a autoscalingv2.HorizontalPodAutoscaler
		if err := runtime.DefaultUnstructuredConverter.FromUnstructured(autoscalers[i].Object, &a); err != nil {
			return nil, "", fmt.Errorf("read HorizontalPodAutoscaler %s: %w", autoscalers[i].GetName(), err)
		}
		if ref := a.Spec.ScaleTargetRef; ref.Kind == deploymentKind.Kind && ref.Name == d.Name && a.DeletionTimestamp == nil {
			return &autoscalers[i], "minReplicas", nil
		}
	}
	content, err := runtime.DefaultUnstructuredConverter.ToUnstructured(d)
	if err != nil {
		return nil, "", fmt.Errorf("read Deployment %s: %w", d.Name, err)
	}
	u := &unstructured.Unstructured{Object: content}
	u.SetGroupVersionKind(deploymentKind)
	return u, "replicas", nil
}

// apply sets fields of the spec of a live object, unless it has changed since.
func (s *scaler) apply(ctx context.Context, live *unstructured.Unstructured, spec map[string]any) error {
	r, err := s.client.DynamicClientFor(live.GroupVersionKind(), nil, istioNamespace)
	if err != nil {
		return fmt.Errorf("apply %s %s: %w", live.GetKind(), live.GetName(), err)
	}
	obj := &unstructured.Unstructured{Object: map[string]any{"spec": spec}}
	obj.SetGroupVersionKind(live.GroupVersionKind())
	obj.SetNamespace(live.GetNamespace())
	obj.SetName(live.GetName())
	obj.SetUID(live.GetUID())
	obj.SetResourceVersion(live.GetResourceVersion())
	if _, err := ssa.Apply(ctx, r, obj, ssa.Options{Manager: ownManager}); err != nil {
		return fmt.Errorf("set the replicas of %s %s: %w", live.GetKind(), live.GetName(), err)
	}
	return nil
}

// budget makes or removes our PodDisruptionBudget of a Deployment. It has the name that Istio's charts give theirs, and goes with the
// Deployment.
func (s *scaler) budget(ctx context.Context, d *appsv1.Deployment, budgets []unstructured.Unstructured, wanted bool) error {
	var ours *unstructured.Unstructured
	for i := range budgets {
		b := &budgets[i]
		if b.GetName() == d.Name && ssa.AppliedBy(b, ownManager) && !ssa.AppliedBy(b, fieldManager) {
			ours = b
			continue
		}
		var other policyv1.PodDisruptionBudget
		if err := runtime.DefaultUnstructuredConverter.FromUnstructured(b.Object, &other); err != nil {
			return fmt.Errorf("read PodDisruptionBudget %s: %w", b.GetName(), err)
		}
		selector, err := metav1.LabelSelectorAsSelector(other.Spec.Selector)
		if err != nil || b.GetName() == d.Name || selector.Matches(labels.Set(d.Spec.Template.Labels)) {
			wanted = false
		}
	}
	switch client := s.client.Kube().PolicyV1().PodDisruptionBudgets(istioNamespace); {
	case wanted && ours == nil:
		r, err := s.client.DynamicClientFor(budgetKind, nil, istioNamespace)
		if err != nil {
			return fmt.Errorf("apply PodDisruptionBudget %s: %w", d.Name, err)
		}
		if _, err := ssa.Apply(ctx, r, budgetOf(d), ssa.Options{Manager: ownManager}); err != nil {
			return fmt.Errorf("apply PodDisruptionBudget %s: %w", d.Name, err)
		}
	case !wanted && ours != nil:
		uid, version := ours.GetUID(), ours.GetResourceVersion()
		err := client.Delete(ctx, d.Name, metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &uid, ResourceVersion: &version}})
		if err != nil && !apierrors.IsNotFound(err) {
			return fmt.Errorf("remove PodDisruptionBudget %s: %w", d.Name, err)
		}
	}
	return nil
}

func budgetOf(d *appsv1.Deployment) *unstructured.Unstructured {
	selector := map[string]any{}
	for k, v := range d.Spec.Selector.MatchLabels {
		selector[k] = v
	}
	b := &unstructured.Unstructured{Object: map[string]any{"spec": map[string]any{
		"maxUnavailable": int64(1), "unhealthyPodEvictionPolicy": string(policyv1.AlwaysAllow),
		"selector": map[string]any{"matchLabels": selector},
	}}}
	b.SetGroupVersionKind(budgetKind)
	b.SetNamespace(d.Namespace)
	b.SetName(d.Name)
	b.SetOwnerReferences([]metav1.OwnerReference{{APIVersion: "apps/v1", Kind: deploymentKind.Kind, Name: d.Name, UID: d.UID}})
	return b
}

// deploymentsOf returns the names of the Deployments in a record, sorted.
func deploymentsOf(record *Record) []string {
	var names []string
	for key := range record.Objects {
		if gvk, namespace, name, err := parseKey(key); err == nil && gvk == deploymentKind && namespace == istioNamespace {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// adapt prepares rendered charts for scaler. The minimum of an autoscaler is left out where it is Kubernetes' default of one, so that scaler
// can set it. The replicas of a Deployment run on different nodes where that is possible: values could report it, but their schema rejects it
// for gateways (podAntiAffinityTermLabelSelector).
func adapt(sets []manifest.ManifestSet) error {
	for _, set := range sets {
		for _, m := range set.Manifests {
			switch m.GroupVersionKind() {
			case autoscalerKind:
				if n, _, err := unstructured.NestedInt64(m.Object, "spec", "minReplicas"); err == nil && n == 1 {
					unstructured.RemoveNestedField(m.Object, "spec", "minReplicas")
				}
			case deploymentKind:
				if err := apart(m.Object); err != nil {
					return fmt.Errorf("%s: %w", m.GetName(), err)
				}
			}
		}
	}
	return nil
}

// apart adds a preference for different nodes to a Deployment that has no other rule about its own pods.
func apart(deployment map[string]any) error {
	selector, found, err := unstructured.NestedMap(deployment, "spec", "selector")
	if err != nil || !found {
		return fmt.Errorf("a Deployment without a selector: %v", err)
	}
	pod := []string{"spec", "template", "spec"}
	for _, rule := range [][]string{{"topologySpreadConstraints"}, {"affinity", "podAntiAffinity"}} {
		if _, found, err := unstructured.NestedFieldNoCopy(deployment, append(slices.Clone(pod), rule...)...); err != nil || found {
			return err
		}
	}
	return unstructured.SetNestedField(deployment, map[string]any{"preferredDuringSchedulingIgnoredDuringExecution": []any{map[string]any{
		"weight": int64(100), "podAffinityTerm": map[string]any{"topologyKey": corev1.LabelHostname, "labelSelector": selector},
	}}}, append(pod, "affinity", "podAntiAffinity")...)
}
