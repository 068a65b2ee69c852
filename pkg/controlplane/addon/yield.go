package addon

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/tools/cache"

	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/placement"
)

// ObserveAccess is the add-on of the pods by which the cluster reaches the store of metrics, logs and traces, and of their Services. These
// have the names of Istio's samples (samples/addons), of which users may have their own: those stay, and what users apply on top of ours is
// theirs from then on. --disable observe removes it.
const ObserveAccess config.Addon = "observe-access"

const (
	// observeNamespace is where `istioctl dashboard` and Istio's samples have such programs.
	observeNamespace = "istio-system"
	// accessLabel is on the pods of ObserveAccess, and selects them.
	accessLabel = "polymesh.dev/observe-access"
)

// dashboards are the labels by which `istioctl dashboard` finds a pod (istioctl/pkg/dashboard). It takes the first one.
func dashboards() map[string]string {
	return map[string]string{"prometheus": "app.kubernetes.io/name=prometheus", "kiali": "app=kiali", "jaeger": "app=jaeger"}
}

// yields reports whether users may replace objects of the add-on.
func (a *Addon) yields() bool { return a.opts.Name == ObserveAccess }

// yieldsObject reports whether users may replace an object. The Deployments have names of our own.
func (a *Addon) yieldsObject(i id) bool { return a.yields() && i.kind == kindOf("Service") }

// leaveToUsers returns the objects that are users' now, and sets what else depends on users. Of ours, those that a user has applied something
// else on top are given up, and are no longer in existing.
func (a *Addon) leaveToUsers(ctx context.Context, in *inputs, existing map[id]*unstructured.Unstructured) (users map[id]bool, err error) {
	if !a.yields() {
		return nil, nil
	}
	users = map[id]bool{}
	for i, obj := range existing {
		if !a.yieldsObject(i) || ignored(obj) {
			continue
		}
		// Where a Service leads is what it is.
		if taken, err := placement.Others(obj, a.manager(), "spec", "selector"); err != nil {
			return nil, fmt.Errorf("read who owns %s: %w", i, err)
		} else if !taken {
			continue
		}
		if err := a.release(ctx, obj); err != nil {
			return nil, err
		}
		users[i] = true
		delete(existing, i)
	}
	if a.opts.Disabled {
		return users, nil
	}
	if err := a.ensureNamespace(ctx); err != nil {
		return nil, err
	}
	for _, obj := range a.objects {
		i := idOf(obj)
		if !a.yieldsObject(i) || existing[i] != nil || users[i] {
			continue
		}
		if _, err := a.resource(i).Get(ctx, obj.GetName(), metav1.GetOptions{}); err == nil {
			users[i] = true
		} else if !apierrors.IsNotFound(err) {
			return nil, fmt.Errorf("look for %s: %w", i, err)
		}
	}
	in.Rivals, err = a.rivals(ctx)
	return users, err
}

// ensureNamespace creates the namespace as Istio's installer does, with which it may be in a race. It is never removed.
func (a *Addon) ensureNamespace(ctx context.Context) error {
	namespaces := a.clientset.CoreV1().Namespaces()
	_, err := namespaces.Get(ctx, observeNamespace, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		_, err = namespaces.Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: observeNamespace}}, metav1.CreateOptions{FieldManager: a.manager()})
		if apierrors.IsAlreadyExists(err) {
			err = nil
		}
	}
	if err != nil {
		return fmt.Errorf("create the namespace %s: %w", observeNamespace, err)
	}
	return nil
}

// rivals returns the names of dashboards() of which users have pods.
func (a *Addon) rivals(ctx context.Context) ([]string, error) {
	var found []string
	for name, label := range dashboards() {
		pods, err := a.clientset.CoreV1().Pods(observeNamespace).List(ctx, metav1.ListOptions{LabelSelector: label + ",!" + accessLabel, Limit: 1})
		if err != nil {
			return nil, fmt.Errorf("list the pods of %s: %w", name, err)
		}
		if len(pods.Items) > 0 {
			found = append(found, name)
		}
	}
	slices.Sort(found)
	return found, nil
}

// release gives up a Service on which a user has applied another one: our key of its selector, our label, and the ownership of what is left.
// `kubectl apply` has merged both, so it leads nowhere until then. Giving up our fields by server-side apply would also remove what is the
// same in both: kubectl does not send that.
func (a *Addon) release(ctx context.Context, obj *unstructured.Unstructured) error {
	if obj == nil {
		return nil
	}
	labels := maps.Clone(obj.GetLabels())
	delete(labels, nameLabel)
	selector, _, err := unstructured.NestedStringMap(obj.Object, "spec", "selector")
	if err != nil {
		return fmt.Errorf("read %s: %w", idOf(obj), err)
	}
	delete(selector, accessLabel)
	live, err := a.patch(ctx, obj, []map[string]any{
		{"op": "add", "path": "/metadata/labels", "value": labels},
		{"op": "add", "path": "/spec/selector", "value": selector},
	})
	if err != nil {
		return err
	}
	// A change of the selector, which is one value, makes it ours again.
	managed := slices.DeleteFunc(live.GetManagedFields(), func(m metav1.ManagedFieldsEntry) bool { return m.Manager == a.manager() })
	if _, err := a.patch(ctx, live, []map[string]any{{"op": "replace", "path": "/metadata/managedFields", "value": managed}}); err != nil {
		return err
	}
	a.opts.Log.Info("left to its user", "addon", a.Name(), "object", idOf(obj).String())
	return nil
}

// patch changes a live object, unless it has changed meanwhile.
func (a *Addon) patch(ctx context.Context, obj *unstructured.Unstructured, changes []map[string]any) (*unstructured.Unstructured, error) {
	text, err := json.Marshal(append(changes, map[string]any{"op": "replace", "path": "/metadata/resourceVersion", "value": obj.GetResourceVersion()}))
	if err != nil {
		return nil, err
	}
	live, err := a.resource(idOf(obj)).Patch(ctx, obj.GetName(), types.JSONPatchType, text, metav1.PatchOptions{FieldManager: a.manager()})
	if err != nil {
		return nil, fmt.Errorf("leave %s to its user: %w", idOf(obj), err)
	}
	live.SetGroupVersionKind(obj.GroupVersionKind())
	return live, nil
}

// note sets the Notes.
func (a *Addon) note(users map[id]bool) {
	var notes []string
	for i := range users {
		notes = append(notes, i.String()+" is a user's: it leads to another program than the store")
	}
	slices.Sort(notes)
	a.mu.Lock()
	defer a.mu.Unlock()
	a.notes = notes
}

// followUsers starts a round when a Service, or a pod with one of the labels, comes or goes or changes in the namespace: what a user applies
// works after seconds.
func (a *Addon) followUsers(ctx context.Context) error {
	factory := informers.NewSharedInformerFactoryWithOptions(a.clientset, 0, informers.WithNamespace(observeNamespace), informers.WithTransform(identified))
	kick := func(any) { a.loop.Kick() }
	services := cache.ResourceEventHandlerFuncs{AddFunc: kick, DeleteFunc: kick, UpdateFunc: func(_, obj any) { kick(obj) }}
	// A pod's labels hardly change, and its status does all the time.
	pods := cache.ResourceEventHandlerFuncs{AddFunc: kick, DeleteFunc: kick}
	if _, err := factory.Core().V1().Services().Informer().AddEventHandler(services); err != nil {
		return fmt.Errorf("watch Services: %w", err)
	}
	if _, err := factory.Core().V1().Pods().Informer().AddEventHandler(pods); err != nil {
		return fmt.Errorf("watch pods: %w", err)
	}
	a.watching.Go(ctx, func(ctx context.Context) {
		factory.StartWithContext(ctx)
		<-ctx.Done()
		factory.Shutdown()
	})
	return nil
}

// identified leaves what identifies an object: rounds read the rest.
func identified(obj any) (any, error) {
	keep := func(m metav1.ObjectMeta) metav1.ObjectMeta {
		return metav1.ObjectMeta{Namespace: m.Namespace, Name: m.Name, UID: m.UID, ResourceVersion: m.ResourceVersion}
	}
	switch o := obj.(type) {
	case *corev1.Service:
		return &corev1.Service{ObjectMeta: keep(o.ObjectMeta)}, nil
	case *corev1.Pod:
		return &corev1.Pod{ObjectMeta: keep(o.ObjectMeta)}, nil
	}
	return obj, nil
}
