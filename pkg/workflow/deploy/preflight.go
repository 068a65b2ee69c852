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
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/kubectl/pkg/cmd/apply"

	"polymesh.dev/polymesh/pkg/diagnose"
	"polymesh.dev/polymesh/pkg/ssa"
	"polymesh.dev/polymesh/pkg/workflow/cluster"
	"polymesh.dev/polymesh/pkg/workflow/project"
)

// parallelChecks is how many requests run at once.
const parallelChecks = 8

// checks is what is known about the objects before anything is applied.
type checks struct {
	mu sync.Mutex
	// done are the objects that were checked, by ID.
	done map[string]bool
	// replace are finished Jobs whose template changed: they are deleted and created again.
	replace map[string]types.UID
}

// check applies every object as a dry run before any is applied, so that a deploy does not stop half-way: a definite rejection
// ends the deploy. Objects whose namespace or type does not exist yet are left to a second call.
func (d *deployment) check(ctx context.Context) error {
	set, err := newSet(d.cluster, d.Project)
	if err != nil {
		return err
	}
	missing := map[string]bool{}
	for _, o := range d.objects {
		if _, known := missing[o.GetNamespace()]; !known {
			missing[o.GetNamespace()] = d.isNew(ctx, o.GetNamespace())
		}
	}
	objects := slices.DeleteFunc(slices.Clone(d.objects), func(o project.Object) bool {
		return d.checks.done[o.ID()] || missing[o.GetNamespace()]
	})
	rejected := make([]error, len(objects))
	var g errgroup.Group
	g.SetLimit(parallelChecks)
	for i, o := range objects {
		g.Go(func() error {
			rejected[i] = d.checkOne(ctx, set.ID(), o)
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return errors.Join(rejected...)
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
	// Its warnings are shown when it is applied.
	_, rejection := ssa.Apply(ctx, cluster.Resource(d.cluster.Silent, m, o.GetNamespace()), o.Unstructured, ssa.Options{Manager: fieldManager, Force: true, DryRun: true})
	d.checks.mu.Lock()
	defer d.checks.mu.Unlock()
	d.checks.done[o.ID()] = true
	switch {
	case rejection == nil || !apierrors.IsInvalid(rejection) && !apierrors.IsBadRequest(rejection) && !strings.Contains(rejection.Error(), typedError):
		// Other errors may be about what an earlier object of the same deploy creates.
		return nil
	case err == nil && o.GroupVersionKind().GroupKind() == diagnose.JobKind && immutable(rejection):
		if !finished(live) {
			return fmt.Errorf("%s: %s is running, and what a Job runs cannot be changed: wait until it has finished, or delete it (kubectl delete %s), and deploy again", o.At(), o.ID(), o.ID())
		}
		d.checks.replace[o.ID()] = live.GetUID()
		return nil
	}
	return d.explainApply(o, rejection)
}

func immutable(err error) bool {
	return apierrors.IsInvalid(err) && strings.Contains(err.Error(), "field is immutable")
}

// finished reports whether a Job is complete or failed.
func finished(job *unstructured.Unstructured) bool {
	_, complete, failed := diagnose.Rollout(job)
	return complete || failed != nil
}

// ours returns an error if an object is a member of another set: both would change it at each deploy, and either would delete it.
func (d *deployment) ours(ctx context.Context, setID string, o project.Object, live *unstructured.Unstructured) error {
	owner := live.GetLabels()[apply.ApplysetPartOfLabel]
	if owner == "" || owner == setID || d.Adopt {
		return nil
	}
	return fmt.Errorf("%s: %s belongs to %s: remove it here or there, give it another name, or take it over (--adopt)", o.At(), o.ID(), d.ownerOf(ctx, owner))
}

// ownerOf describes the set with an id, as far as this user may read it.
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
