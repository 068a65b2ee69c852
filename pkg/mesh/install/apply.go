package install

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"istio.io/api/label"
	"istio.io/istio/operator/pkg/component"
	"istio.io/istio/operator/pkg/manifest"
	"istio.io/istio/operator/pkg/uninstall"
	"istio.io/istio/operator/pkg/util"
	"istio.io/istio/operator/pkg/values"
	"istio.io/istio/operator/pkg/webhook"
	"istio.io/istio/pkg/kube"
	"istio.io/istio/pkg/version"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
	watchtools "k8s.io/client-go/tools/watch"

	"polymesh.dev/polymesh/pkg/diagnose"
	"polymesh.dev/polymesh/pkg/ssa"
)

const (
	// parallel is how many requests run at once.
	parallel = 8
	// rootCertWait limits how long gateways are delayed on a first installation: the kubelet retries anyway.
	rootCertWait = 15 * time.Second
	// rolloutWait is the timeout of Istio's installer for a control plane (istioctl install --readiness-timeout).
	rolloutWait = 5 * time.Minute
	// rootCert is the ConfigMap in which istiod publishes its CA; every proxy mounts it.
	rootCert = "istio-ca-root-cert"

	ingressClass      = "istio"
	ingressController = "istio.io/ingress-controller"
	ownManager        = ssa.Mesh
)

// installer applies rendered manifests as Istio's does (operator/pkg/install), with the same labels, field manager,
// webhooks and pruning. It is faster: it applies in parallel, watches instead of polling every two seconds, and delays gateways only
// for what they need. It also ends with its context, and draws no progress bar.
type installer struct {
	client kube.CLIClient
	values values.Map
	log    *slog.Logger

	mu      sync.Mutex
	objects map[string]string // fingerprints of what was applied
	shared  []string          // keys of applied objects without one
}

// install applies the manifests to the cluster. first is true if there was no control plane before.
func (i *installer) install(ctx context.Context, sets []manifest.ManifestSet, first bool) error {
	i.objects = map[string]string{}
	if err := util.CreateNamespace(i.client.Kube(), istioNamespace, i.values.GetPathString("spec.values.global.network"), false); err != nil {
		return err
	}
	// Without an earlier Istio there is no webhook to conflict with, and the check, an analysis, is slow.
	if !first {
		if err := webhook.CheckWebhooks(sets, i.values, i.client, console{i.log}); err != nil {
			return fmt.Errorf("check the webhooks: %w", err)
		}
	}

	// What pods need comes before the pods, the control plane before the gateways. CRDs come late: istiod uses them when they appear,
	// and an API server is busy while it adds new types.
	var needs, planes, gateways, types, instances []object
	for _, set := range sets {
		for _, m := range set.Manifests {
			o := object{m.Unstructured, set.Component}
			gvk := m.GroupVersionKind()
			switch {
			case gvk.Kind == "CustomResourceDefinition":
				types = append(types, o)
			case strings.HasSuffix(gvk.Group, ".istio.io"):
				instances = append(instances, o)
			case gvk != deploymentKind:
				needs = append(needs, o)
			case isGateway(set.Component):
				gateways = append(gateways, o)
			default:
				planes = append(planes, o)
			}
		}
	}
	for _, wave := range [][]object{needs, planes, types, instances} {
		if err := i.apply(ctx, wave); err != nil {
			return err
		}
	}
	if err := i.applyWebhooks(ctx); err != nil {
		return err
	}
	if len(gateways) > 0 {
		if err := i.awaitControlPlane(ctx, first); err != nil {
			return err
		}
		if err := i.apply(ctx, gateways); err != nil {
			return err
		}
	}
	if first {
		return nil
	}
	return i.prune(ctx, sets)
}

// object is a manifest and the component of Istio that it belongs to.
type object struct {
	*unstructured.Unstructured
	component component.Name
}

func isGateway(c component.Name) bool {
	return c == component.IngressComponentName || c == component.EgressComponentName
}

// apply applies objects in parallel.
func (i *installer) apply(ctx context.Context, objects []object) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(parallel)
	for _, o := range objects {
		g.Go(func() error {
			obj := o.DeepCopy()
			l := obj.GetLabels()
			if l == nil {
				l = map[string]string{}
			}
			maps.Copy(l, i.ownerLabels(o.component))
			obj.SetLabels(l)
			return i.applyOne(ctx, obj, recorded(o))
		})
	}
	return g.Wait()
}

// recorded reports whether an object's fingerprint shows a user's changes. It does not for CRDs, which all revisions share, and
// webhooks, to which istiod itself writes (caBundle, failurePolicy).
func recorded(o object) bool {
	switch o.GetKind() {
	case "CustomResourceDefinition", "MutatingWebhookConfiguration", "ValidatingWebhookConfiguration":
		return false
	}
	return true
}

func (i *installer) applyOne(ctx context.Context, obj *unstructured.Unstructured, record bool) error {
	gvk := obj.GroupVersionKind()
	key := objectKey(gvk, obj.GetNamespace(), obj.GetName())
	resource, err := i.client.DynamicClientFor(gvk, obj, "")
	if err != nil {
		return fmt.Errorf("apply %s: %w", display(key), err)
	}
	live, err := ssa.Apply(ctx, resource, obj, ssa.Options{Manager: fieldManager, Force: true})
	if err != nil {
		return fmt.Errorf("apply %s: %w", display(key), err)
	}
	if !record {
		i.mu.Lock()
		defer i.mu.Unlock()
		i.shared = append(i.shared, key)
		return nil
	}
	print, err := fingerprint(live)
	if err != nil {
		return err
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	i.objects[key] = print
	return nil
}

// ownerLabels returns the labels of Istio's installer (operator/pkg/install, getOwnerLabels), by which uninstall and upgrade select.
func (i *installer) ownerLabels(c component.Name) map[string]string {
	l := map[string]string{
		manifest.OperatorManagedLabel: "Reconcile",
		manifest.OperatorVersionLabel: version.Info.Version,
		label.IoIstioRev.Name:         i.values.GetPathStringOr("spec.values.revision", "default"),
	}
	if n := i.values.GetPathString("metadata.name"); n != "" {
		l[manifest.OwningResourceName] = n
	}
	if n := i.values.GetPathString("metadata.namespace"); n != "" {
		l[manifest.OwningResourceNamespace] = n
	}
	if c != "" {
		l[manifest.IstioComponentLabel] = string(c)
	}
	return l
}

// applyWebhooks applies the webhooks of the default revision tag.
func (i *installer) applyWebhooks(ctx context.Context) error {
	hooks, err := webhook.WebhooksToDeploy(i.values, i.client, i.ownerLabels(""), false)
	if err != nil {
		return fmt.Errorf("render the webhooks of the default revision: %w", err)
	}
	for _, h := range hooks {
		if err := i.applyOne(ctx, h.Unstructured, false); err != nil {
			return err
		}
	}
	return nil
}

// awaitControlPlane waits for what gateways need. On a first installation that is the root certificate, without which their pods
// fail to mount; if istiod cannot be scheduled, waiting longer does not help. On an upgrade it is the new control plane, because a
// proxy must not be newer.
func (i *installer) awaitControlPlane(ctx context.Context, first bool) error {
	if first {
		ctx, cancel := context.WithTimeout(ctx, rootCertWait)
		defer cancel()
		err := awaitRootCert(ctx, i.client.Kube())
		if errors.Is(ctx.Err(), context.DeadlineExceeded) {
			return nil
		}
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, rolloutWait)
	defer cancel()
	return awaitRollout(ctx, i.client.Kube())
}

func awaitRootCert(ctx context.Context, client kubernetes.Interface) error {
	lw := cache.NewListWatchFromClient(client.CoreV1().RESTClient(), "configmaps", istioNamespace,
		fields.OneTermEqualSelector("metadata.name", rootCert))
	_, err := watchtools.UntilWithSync(ctx, lw, &corev1.ConfigMap{}, nil, func(e watch.Event) (bool, error) {
		return e.Type == watch.Added || e.Type == watch.Modified, nil
	})
	if err != nil {
		return fmt.Errorf("wait for istiod's root certificate: %w", err)
	}
	return nil
}

func awaitRollout(ctx context.Context, client kubernetes.Interface) error {
	lw := cache.NewListWatchFromClient(client.AppsV1().RESTClient(), "deployments", istioNamespace,
		fields.OneTermEqualSelector("metadata.name", "istiod"))
	_, err := watchtools.UntilWithSync(ctx, lw, &appsv1.Deployment{}, nil, func(e watch.Event) (bool, error) {
		d, ok := e.Object.(*appsv1.Deployment)
		if !ok || e.Type == watch.Deleted {
			return false, nil
		}
		return rolledOut(d)
	})
	if err != nil {
		return fmt.Errorf("wait for the new istiod: %w", err)
	}
	return nil
}

// rolledOut is kubectl's rule (kubectl rollout status).
func rolledOut(d *appsv1.Deployment) (bool, error) {
	content, err := runtime.DefaultUnstructuredConverter.ToUnstructured(d)
	if err != nil {
		return false, fmt.Errorf("read deployment %s: %w", d.Name, err)
	}
	u := &unstructured.Unstructured{Object: content}
	u.SetGroupVersionKind(deploymentKind) // typed objects of a watch have none
	_, done, err := diagnose.Rollout(u)
	return done && err == nil, nil
}

// prune removes what an earlier installation had and this one does not have, as Istio's installer does: by the owner labels of each
// component.
func (i *installer) prune(ctx context.Context, sets []manifest.ManifestSet) error {
	keep := map[string]bool{}
	for _, set := range sets {
		for _, m := range set.Manifests {
			keep[string(set.Component)+m.Hash()] = true
		}
	}
	selector := labels.SelectorFromSet(i.ownerLabels("")).String() + "," + manifest.IstioComponentLabel
	known := map[string]bool{}
	for _, c := range component.AllComponents {
		known[string(c.UserFacingName)] = true
	}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(parallel)
	for _, gvk := range uninstall.PrunedResourcesSchemas() {
		g.Go(func() error {
			resource, err := i.client.DynamicClientFor(gvk, nil, "")
			if err != nil {
				return fmt.Errorf("list %s to prune: %w", gvk.Kind, err)
			}
			objs, err := resource.List(ctx, metav1.ListOptions{LabelSelector: selector})
			if apierrors.IsNotFound(err) {
				return nil
			}
			if err != nil {
				return fmt.Errorf("list %s to prune: %w", gvk.Kind, err)
			}
			for _, obj := range objs.Items {
				l := obj.GetLabels()
				c := l[manifest.IstioComponentLabel]
				if !known[c] || keep[c+manifest.ObjectHash(&obj)] || l[manifest.OwningResourceNotPruned] == "true" {
					continue
				}
				if err := uninstall.DeleteResource(i.client, false, console{i.log}, &obj); err != nil {
					return fmt.Errorf("prune %s %s: %w", gvk.Kind, obj.GetName(), err)
				}
			}
			return nil
		})
	}
	return g.Wait()
}

// applyIngressClass creates the IngressClass of Istio's ingress controller (pilot/pkg/config/kube/ingress), as the default class if
// there is none. An existing one of that name is not changed.
func applyIngressClass(ctx context.Context, client kubernetes.Interface) error {
	classes := client.NetworkingV1().IngressClasses()
	have, err := classes.List(ctx, metav1.ListOptions{})
	if err != nil {
		return fmt.Errorf("look for ingress classes: %w", err)
	}
	class := &networkingv1.IngressClass{
		ObjectMeta: metav1.ObjectMeta{Name: ingressClass},
		Spec:       networkingv1.IngressClassSpec{Controller: ingressController},
	}
	if !hasDefault(have.Items) {
		class.Annotations = map[string]string{networkingv1.AnnotationIsDefaultIngressClass: "true"}
	}
	_, err = classes.Create(ctx, class, metav1.CreateOptions{FieldManager: ownManager})
	if err != nil && !apierrors.IsAlreadyExists(err) {
		return fmt.Errorf("create the ingress class %s: %w", ingressClass, err)
	}
	return nil
}

func hasDefault(classes []networkingv1.IngressClass) bool {
	for _, c := range classes {
		if c.Annotations[networkingv1.AnnotationIsDefaultIngressClass] == "true" {
			return true
		}
	}
	return false
}

// console is our log for Istio's installer. No method ends the process.
type console struct{ log *slog.Logger }

func (c console) write(level slog.Level, s string) {
	if s = strings.TrimSpace(s); s != "" {
		c.log.Log(context.Background(), level, s)
	}
}
func (c console) LogAndPrint(v ...any)            { c.write(slog.LevelInfo, fmt.Sprint(v...)) }
func (c console) LogAndError(v ...any)            { c.write(slog.LevelWarn, fmt.Sprint(v...)) }
func (c console) LogAndFatal(v ...any)            { c.write(slog.LevelError, fmt.Sprint(v...)) }
func (c console) LogAndPrintf(f string, v ...any) { c.write(slog.LevelInfo, fmt.Sprintf(f, v...)) }
func (c console) LogAndErrorf(f string, v ...any) { c.write(slog.LevelWarn, fmt.Sprintf(f, v...)) }
func (c console) LogAndFatalf(f string, v ...any) { c.write(slog.LevelError, fmt.Sprintf(f, v...)) }
func (c console) Print(s string)                  { c.write(slog.LevelInfo, s) }
func (c console) PrintErr(s string)               { c.write(slog.LevelWarn, s) }
