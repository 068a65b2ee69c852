package addon

import (
	"context"
	"fmt"
	"slices"
	"strings"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/tools/cache"

	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/converge"
	"polymesh.dev/polymesh/pkg/ssa"
)

const (
	// nameLabel marks every object of an add-on with the add-on's name.
	nameLabel = "addon.polymesh.dev/name"
	// ignoreAnnotation is set to "true" by a user to keep an object from being changed or removed.
	ignoreAnnotation = "addon.polymesh.dev/ignore"
)

// manager returns the add-on's field manager.
func (a *Addon) manager() string {
	if a.yields() {
		return ssa.Observe
	}
	return ssa.Addon
}

// id identifies an object within a cluster.
type id struct {
	kind            schema.GroupVersionKind
	namespace, name string
}

func idOf(obj *unstructured.Unstructured) id {
	return id{obj.GroupVersionKind(), obj.GetNamespace(), obj.GetName()}
}

func (i id) String() string {
	if i.namespace == "" {
		return i.kind.Kind + " " + i.name
	}
	return i.kind.Kind + " " + i.namespace + "/" + i.name
}

// sync applies the add-on's objects to the cluster, and removes others that have its label. Fields in the manifests are set
// back; other fields belong to the user or program that sets them. Objects that are as this run applied them are only read.
func (a *Addon) sync(ctx context.Context) error {
	existing := make(map[id]*unstructured.Unstructured)
	for _, k := range kinds() {
		list, err := a.dynamic.Resource(k.gvr()).List(ctx, metav1.ListOptions{LabelSelector: fmt.Sprintf("%s in (%s)", nameLabel, strings.Join(a.names(), ","))})
		if err != nil {
			return fmt.Errorf("list %s: %w", k.resource, err)
		}
		for i := range list.Items {
			obj := &list.Items[i]
			obj.SetGroupVersionKind(k.GroupVersionKind)
			if obj, err = a.takeOver(ctx, obj); err != nil {
				return err
			}
			existing[idOf(obj)] = obj
		}
	}
	if a.nodesSynced != nil && !cache.WaitForCacheSync(ctx.Done(), a.nodesSynced) {
		return fmt.Errorf("list nodes: %w", ctx.Err())
	}
	in, err := a.current()
	if err != nil {
		return err
	}
	users, err := a.leaveToUsers(ctx, &in, existing)
	if err != nil {
		return err
	}
	if a.replicated() {
		if err := a.replicas(ctx, &in, existing); err != nil {
			return err
		}
	}
	if !in.equal(a.inputs) {
		if err := a.render(in); err != nil {
			return err
		}
		// What was applied is no longer the desired state.
		a.holding, a.settled = converge.Applied{}, false
	}
	apply, remove := plan(a.objects, existing, a.manager())
	for _, obj := range apply {
		id := idOf(obj)
		if users[id] {
			continue
		}
		if old := existing[id]; old != nil {
			if holds, err := a.holding.Holds(id.String(), old, a.manager()); err != nil || holds {
				if err != nil {
					return err
				}
				continue
			}
		}
		if _, has, _ := unstructured.NestedInt64(obj.Object, "spec", "replicas"); has && existing[id] != nil {
			// Whoever has scaled it since it was read is not overruled: the API server then responds with a conflict, and the next round reads it.
			obj = obj.DeepCopy()
			obj.SetResourceVersion(existing[id].GetResourceVersion())
		}
		live, err := ssa.Apply(ctx, a.resource(id), obj, ssa.Options{Manager: a.manager(), Force: !a.yieldsObject(id)})
		if a.yieldsObject(id) && apierrors.IsConflict(err) {
			if err := a.release(ctx, existing[id]); err != nil {
				return err
			}
			users[id] = true
			continue
		}
		if err != nil {
			return fmt.Errorf("apply %s: %w", id, err)
		}
		if err := a.holding.Note(id.String(), live, a.manager()); err != nil {
			return err
		}
		if a.settled {
			a.opts.Log.Warn("put back what was deleted or changed", "addon", a.Name(), "object", id.String())
		}
	}
	for _, obj := range remove {
		uid, propagation := obj.GetUID(), metav1.DeletePropagationBackground
		err := a.resource(idOf(obj)).Delete(ctx, obj.GetName(), metav1.DeleteOptions{
			Preconditions: &metav1.Preconditions{UID: &uid}, PropagationPolicy: &propagation,
		})
		if err != nil && !apierrors.IsNotFound(err) {
			return fmt.Errorf("remove %s: %w", idOf(obj), err)
		}
		a.opts.Log.Info("removed", "addon", a.Name(), "object", idOf(obj).String())
	}
	a.note(users)
	a.settled = true
	return nil
}

// names are the values of the label on objects that are this add-on's to remove: CoreDNS, which every version has, also removes those
// of add-ons that there were once. network-policy warned that NetworkPolicies were not enforced.
func (a *Addon) names() []string {
	if a.opts.Name == config.CoreDNS {
		return []string{a.Name(), "network-policy"}
	}
	return []string{a.Name()}
}

// takeOver takes over an object that an earlier version applied under another field manager. It returns the object as it is then.
func (a *Addon) takeOver(ctx context.Context, obj *unstructured.Unstructured) (*unstructured.Unstructured, error) {
	if ignored(obj) {
		return obj, nil
	}
	live, err := ssa.TakeOver(ctx, a.resource(idOf(obj)), obj, a.manager())
	if err != nil || live == nil {
		return obj, err
	}
	live.SetGroupVersionKind(obj.GroupVersionKind())
	return live, nil
}

// plan compares the desired objects with those that have the add-on's label. Objects are removed in the reverse order of
// applying, so that nothing runs without its permissions.
func plan(want []*unstructured.Unstructured, existing map[id]*unstructured.Unstructured, manager string) (apply, remove []*unstructured.Unstructured) {
	wanted := make(map[id]bool)
	for _, obj := range want {
		wanted[idOf(obj)] = true
		if old := existing[idOf(obj)]; old == nil || !ignored(old) {
			apply = append(apply, obj)
		}
	}
	for _, k := range slices.Backward(kinds()) {
		for i, obj := range existing {
			if i.kind == k.GroupVersionKind && !wanted[i] && !ignored(obj) && ssa.AppliedBy(obj, manager) && !ssa.Deployed(obj) {
				remove = append(remove, obj)
			}
		}
	}
	return apply, remove
}

func ignored(obj *unstructured.Unstructured) bool {
	return obj.GetAnnotations()[ignoreAnnotation] == "true"
}

// kindOf returns a known kind by its name.
func kindOf(name string) schema.GroupVersionKind {
	for _, k := range kinds() {
		if k.Kind == name {
			return k.GroupVersionKind
		}
	}
	panic("unknown kind " + name)
}

func (k kind) gvr() schema.GroupVersionResource { return k.GroupVersion().WithResource(k.resource) }

// resource returns the client for an object of a known kind.
func (a *Addon) resource(i id) dynamic.ResourceInterface {
	for _, k := range kinds() {
		if k.GroupVersionKind != i.kind {
			continue
		}
		if k.namespaced {
			return a.dynamic.Resource(k.gvr()).Namespace(i.namespace)
		}
		return a.dynamic.Resource(k.gvr())
	}
	panic("unknown kind " + i.kind.String()) // render and sync accept known kinds only
}
