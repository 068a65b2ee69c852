package deploy

import (
	"context"
	"fmt"
	"maps"
	"time"

	"github.com/pmezard/go-difflib/difflib"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/util/wait"
	"sigs.k8s.io/yaml"

	"polymesh.dev/polymesh/pkg/condition"
	"polymesh.dev/polymesh/pkg/progress"
	"polymesh.dev/polymesh/pkg/ssa"
	"polymesh.dev/polymesh/pkg/workflow/project"
)

// fieldManager is the owner of the fields that are deployed.
const fieldManager = ssa.Deploy

// webhookWait is how long an admission webhook may be unavailable, such as that of a control plane that starts.
const webhookWait = time.Minute

// applyObjects applies everything in order.
func (d *deployment) applyObjects(ctx context.Context) error {
	title := "apply to " + d.Project.Namespace
	if d.dry {
		title += " (dry run)"
	}
	return d.Steps.Do(title, func(*progress.Step) (string, error) {
		counts := map[Action]int{}
		// Types and namespaces come before the objects that need them.
		first := 0
		for first < len(d.objects) && rank(d.objects[first]) == 0 {
			if err := d.applyOne(ctx, d.objects[first], counts); err != nil {
				return "", err
			}
			first++
		}
		if !d.dry {
			if err := d.awaitTypes(ctx, d.objects[:first]); err != nil {
				return "", err
			}
		}
		// The namespaces and types of all objects exist now.
		if err := d.check(ctx); err != nil {
			return "", err
		}
		if err := d.openSet(ctx, d.objects[first:]); err != nil {
			return "", err
		}
		for _, o := range d.objects[first:] {
			if err := d.applyOne(ctx, o, counts); err != nil {
				return "", err
			}
		}
		summary := fmt.Sprintf("%d created, %d changed, %d unchanged", counts[Created], counts[Changed], counts[Unchanged])
		if n := counts[Replaced]; n > 0 {
			summary += fmt.Sprintf(", %d replaced", n)
		}
		return summary, nil
	})
}

func (d *deployment) applyOne(ctx context.Context, o project.Object, counts map[Action]int) error {
	defer d.applying(o.At())()
	m, err := d.cluster.Mapping(o)
	if err != nil {
		// A dry run does not create the type that another manifest defines.
		if d.dry && definition(d.objects, o) != nil {
			d.note(o, Created, counts)
			return nil
		}
		return err
	}
	live, err := d.cluster.Resource(m, o.GetNamespace()).Get(ctx, o.GetName(), metav1.GetOptions{})
	if err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("%s: read %s: %w", o.At(), o.ID(), err)
	}
	if err != nil {
		live = nil
	}
	if d.dry && live == nil && d.isNew(ctx, o.GetNamespace()) {
		d.note(o, Created, counts)
		return d.showDiff(o, nil, o.Unstructured)
	}
	uid, replace := d.checks.replace[o.ID()]
	if replace && d.dry {
		if d.set != nil && live != nil {
			d.set.visited.Insert(live.GetUID()) // it is in the manifests
		}
		d.note(o, Replaced, counts)
		return d.showDiff(o, live, o.Unstructured)
	}
	if replace && live != nil {
		if err := d.cluster.Remove(ctx, m, live, uid); err != nil {
			return fmt.Errorf("%s: replace %s: %w", o.At(), o.ID(), err)
		}
	}
	applied, err := d.apply(ctx, m, o.Unstructured)
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case err != nil:
		return d.explainApply(o, err)
	}
	if d.set != nil {
		d.set.visited.Insert(applied.GetUID())
	}
	action := Unchanged
	switch {
	case replace:
		action = Replaced
	case live == nil:
		action = Created
	case changed(live, applied):
		action = Changed
	}
	d.note(o, action, counts)
	if action != Unchanged {
		return d.showDiff(o, live, applied)
	}
	return nil
}

// apply applies an object with server-side apply. The manifests are the source of truth: a field that was set since the last
// deploy (kubectl edit, kubectl set image) is set back, as with every deploy command of this kind.
func (d *deployment) apply(ctx context.Context, m *meta.RESTMapping, u *unstructured.Unstructured) (*unstructured.Unstructured, error) {
	return ssa.Apply(ctx, d.cluster.Resource(m, u.GetNamespace()), u, ssa.Options{Manager: fieldManager, Force: true, DryRun: d.dry, WebhookWait: webhookWait})
}

func (d *deployment) note(o project.Object, action Action, counts map[Action]int) {
	counts[action]++
	change := Change{ID: o.ID(), Action: action}
	if o.File != "" {
		change.At = o.At()
	}
	d.result.Objects = append(d.result.Objects, change)
}

// changed reports whether an object differs from what it was, except for what the API server counts.
func changed(before, after *unstructured.Unstructured) bool {
	return text(before) != text(after)
}

// awaitTypes waits until the API server serves the types that the manifests define.
func (d *deployment) awaitTypes(ctx context.Context, objects []project.Object) error {
	for _, o := range objects {
		if o.GroupVersionKind().GroupKind() != definitionKind {
			continue
		}
		m, err := d.cluster.Mapping(o)
		if err != nil {
			return err
		}
		err = wait.PollUntilContextTimeout(ctx, 200*time.Millisecond, time.Minute, true, func(ctx context.Context) (bool, error) {
			live, err := d.cluster.Resource(m, "").Get(ctx, o.GetName(), metav1.GetOptions{})
			if err != nil {
				return false, err
			}
			return meta.IsStatusConditionTrue(condition.OfObject(live), "Established"), nil
		})
		if err != nil {
			return fmt.Errorf("%s: the API server does not serve %s: %w", o.At(), o.GetName(), err)
		}
	}
	return nil
}

// isNew reports whether a namespace does not exist yet: the API server cannot dry-run into it.
func (d *deployment) isNew(ctx context.Context, namespace string) bool {
	if namespace == "" {
		return false
	}
	_, err := d.cluster.Client.CoreV1().Namespaces().Get(ctx, namespace, metav1.GetOptions{})
	return apierrors.IsNotFound(err)
}

// showDiff prints how an object changes, as `kubectl diff` does.
func (d *deployment) showDiff(o project.Object, before, after *unstructured.Unstructured) error {
	if !d.Diff {
		return nil
	}
	diff, err := difflib.GetUnifiedDiffString(difflib.UnifiedDiff{
		A: difflib.SplitLines(text(masked(before, after))), B: difflib.SplitLines(text(masked(after, before))),
		FromFile: "cluster: " + o.ID(), ToFile: "here: " + o.At(), Context: 3,
	})
	if err != nil {
		return err
	}
	_, err = fmt.Fprint(d.Out, diff)
	return err
}

// text returns an object as YAML, without the fields that the API server maintains.
func text(u *unstructured.Unstructured) string {
	if u == nil {
		return ""
	}
	u = u.DeepCopy()
	u.SetManagedFields(nil)
	u.SetResourceVersion("")
	u.SetGeneration(0)
	unstructured.RemoveNestedField(u.Object, "status")
	out, err := yaml.Marshal(u.Object)
	if err != nil {
		return err.Error()
	}
	return string(out)
}

// masked hides the values of a Secret, as kubectl diff does: it shows only whether they differ from the other's.
func masked(u, other *unstructured.Unstructured) *unstructured.Unstructured {
	if u == nil || u.GroupVersionKind().GroupKind() != secretKind {
		return u
	}
	u = u.DeepCopy()
	// It contains the values too, if the Secret was applied with `kubectl apply`.
	unstructured.RemoveNestedField(u.Object, "metadata", "annotations", corev1.LastAppliedConfigAnnotation)
	for _, field := range []string{"data", "stringData"} {
		data, found, _ := unstructured.NestedMap(u.Object, field)
		if !found {
			continue
		}
		for key := range maps.Keys(data) {
			same := false
			if other != nil {
				value, ok, _ := unstructured.NestedString(other.Object, field, key)
				same = ok && value == data[key]
			}
			data[key] = "***"
			if !same {
				data[key] = "*** (differs)"
			}
		}
		if err := unstructured.SetNestedMap(u.Object, data, field); err != nil {
			u.Object[field] = "***"
		}
	}
	return u
}
