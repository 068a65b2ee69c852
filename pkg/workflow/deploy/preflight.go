package deploy

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sync/errgroup"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/kubectl/pkg/cmd/apply"

	"polymesh.dev/polymesh/pkg/condition"
	"polymesh.dev/polymesh/pkg/diagnose"
	"polymesh.dev/polymesh/pkg/ssa"
	"polymesh.dev/polymesh/pkg/workflow/cluster"
	"polymesh.dev/polymesh/pkg/workflow/project"
)

// parallelChecks is how many requests are under way at once.
const parallelChecks = 8

// checks is what is known of the objects before anything is applied.
type checks struct {
	mu sync.Mutex
	// done are the objects that were checked, by ID.
	done map[string]bool
	// replace are Jobs that have ended and whose template changed: they are deleted and made again.
	replace map[string]types.UID
}

// check asks the API server about every object before any is applied, so that a deploy is not broken off half-way: it is a
// dry run, and a refusal that is certain ends the deploy. Objects whose namespace or type is still to be made wait for a
// second call.
func (d *deployment) check(ctx context.Context) error {
	set, err := newSet(d.cluster, d.Project)
	if err != nil {
		return err
	}
	missing := map[string]bool{}
	for _, o := range d.objects {
		if _, asked := missing[o.GetNamespace()]; !asked {
			missing[o.GetNamespace()] = d.isNew(ctx, o.GetNamespace())
		}
	}
	objects := slices.DeleteFunc(slices.Clone(d.objects), func(o project.Object) bool {
		return d.checks.done[o.ID()] || missing[o.GetNamespace()]
	})
	refused := make([]error, len(objects))
	var g errgroup.Group
	g.SetLimit(parallelChecks)
	for i, o := range objects {
		g.Go(func() error {
			refused[i] = d.checkOne(ctx, set.ID(), o)
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return errors.Join(refused...)
}

func (d *deployment) checkOne(ctx context.Context, setID string, o project.Object) error {
	m, err := d.cluster.Mapping(o)
	if err != nil {
		if definition(d.objects, o) != nil {
			return nil
		}
		return err
	}
	live, err := d.cluster.Resource(m, o.GetNamespace()).Get(ctx, o.GetName(), metav1.GetOptions{})
	if err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("%s: read %s: %w", o.At(), o.ID(), err)
	}
	if err == nil {
		if err := d.ours(ctx, setID, o, live); err != nil {
			return err
		}
	}
	// What it warns of is shown when it is applied.
	_, refused := ssa.Apply(ctx, cluster.Resource(d.cluster.Silent, m, o.GetNamespace()), o.Unstructured, ssa.Options{Manager: fieldManager, Force: true, DryRun: true})
	d.checks.mu.Lock()
	defer d.checks.mu.Unlock()
	d.checks.done[o.ID()] = true
	switch {
	case refused == nil || !apierrors.IsInvalid(refused) && !apierrors.IsBadRequest(refused) && !strings.Contains(refused.Error(), typedError):
		// Other refusals may be of what an object before it in the same deploy creates.
		return nil
	case err == nil && o.GroupVersionKind().GroupKind() == diagnose.JobKind && immutable(refused):
		if !ended(live) {
			return fmt.Errorf("%s: %s is running, and what a Job runs cannot be changed: wait until it has ended, or delete it (kubectl delete %s), and deploy again", o.At(), o.ID(), o.ID())
		}
		d.checks.replace[o.ID()] = live.GetUID()
		return nil
	}
	return d.explainApply(o, refused)
}

func immutable(err error) bool {
	return apierrors.IsInvalid(err) && strings.Contains(err.Error(), "field is immutable")
}

// ended reports whether a Job is complete or failed.
func ended(job *unstructured.Unstructured) bool {
	conditions := condition.OfObject(job)
	return meta.IsStatusConditionTrue(conditions, "Complete") || meta.IsStatusConditionTrue(conditions, "Failed")
}

// ours refuses an object that is another set's member: both would change it at each deploy, and either would delete it.
func (d *deployment) ours(ctx context.Context, setID string, o project.Object, live *unstructured.Unstructured) error {
	owner := live.GetLabels()[apply.ApplysetPartOfLabel]
	if owner == "" || owner == setID || d.Adopt {
		return nil
	}
	return fmt.Errorf("%s: %s belongs to %s: remove it here or there, give it another name, or take it over (--adopt)", o.At(), o.ID(), d.ownerOf(ctx, owner))
}

// ownerOf names the set of an id, as far as this user may see it.
func (d *deployment) ownerOf(ctx context.Context, setID string) string {
	parents, err := d.cluster.Client.CoreV1().Secrets(metav1.NamespaceAll).List(ctx, metav1.ListOptions{LabelSelector: apply.ApplySetParentIDLabel + "=" + setID})
	if err != nil || len(parents.Items) != 1 {
		return "another project or ApplySet (" + setID + ")"
	}
	parent := parents.Items[0]
	name, isProject := strings.CutPrefix(parent.Name, parentPrefix)
	if !isProject {
		return fmt.Sprintf("the ApplySet %s in namespace %s", parent.Name, parent.Namespace)
	}
	if origin, ok := originOf(&parent); ok {
		return fmt.Sprintf("project %s in namespace %s (%s)", name, parent.Namespace, origin)
	}
	return fmt.Sprintf("project %s in namespace %s", name, parent.Namespace)
}
