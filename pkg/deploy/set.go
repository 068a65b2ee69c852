package deploy

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/sets"
	"k8s.io/cli-runtime/pkg/genericiooptions"
	"k8s.io/cli-runtime/pkg/printers"
	"k8s.io/cli-runtime/pkg/resource"
	"k8s.io/kubectl/pkg/cmd/apply"
	"k8s.io/kubectl/pkg/cmd/delete"
	cmdutil "k8s.io/kubectl/pkg/cmd/util"

	"polymesh.dev/polymesh/pkg/progress"
	"polymesh.dev/polymesh/pkg/project"
	"polymesh.dev/polymesh/pkg/version"
)

// set is what the project has in the cluster, as kubectl keeps it: a Secret "polymesh-<project>" in the project's
// namespace lists the kinds and namespaces, and each member has a label with the set's id. Namespaces and CRDs are never
// members: pruning one would take with it what others put there.
type set struct {
	*apply.ApplySet
	visited sets.Set[types.UID]
}

// parentName is the name of the Secret that holds the set.
func parentName(p *project.Project) string { return "polymesh-" + p.Name }

func newSet(c *Cluster, p *project.Project) (*set, error) {
	m, err := c.mapper.RESTMapping(secretKind, "v1")
	if err != nil {
		return nil, err
	}
	client, err := c.factory.UnstructuredClientForMapping(m)
	if err != nil {
		return nil, err
	}
	parent := &apply.ApplySetParentRef{Name: parentName(p), Namespace: p.Namespace, RESTMapping: m}
	return &set{
		ApplySet: apply.NewApplySet(parent, apply.ApplySetTooling{Name: fieldManager, Version: version.Version}, c.mapper, client),
		visited:  sets.New[types.UID](),
	}, nil
}

func (d *deployment) strategy() cmdutil.DryRunStrategy {
	if d.dry {
		return cmdutil.DryRunServer
	}
	return cmdutil.DryRunNone
}

// openSet widens the set in the cluster to what will be applied, so that nothing is lost if this is broken off, and labels
// the objects.
func (d *deployment) openSet(ctx context.Context, objects []project.Object) error {
	if d.dry && d.isNew(ctx, d.Project.Namespace) {
		return nil // there is no set, and nothing to prune
	}
	s, err := newSet(d.cluster, d.Project)
	if err != nil {
		return err
	}
	var infos []*resource.Info
	for _, o := range objects {
		m, err := d.mapping(o)
		if err != nil {
			if d.dry && d.defines(o) {
				continue
			}
			return err
		}
		info, err := d.cluster.info(m, o.Unstructured)
		if err != nil {
			return err
		}
		infos = append(infos, info)
	}
	if err := s.AddLabels(infos...); err != nil {
		return err
	}
	if err := s.BeforeApply(infos, d.strategy(), metav1.FieldValidationStrict); err != nil {
		return fmt.Errorf("record the project in %s: %w", d.Project.Namespace, err)
	}
	d.set = s
	return nil
}

// prune removes what the project had and the manifests no longer have.
func (d *deployment) prune(ctx context.Context) error {
	if d.set == nil {
		return nil
	}
	gone, err := d.set.FindAllObjectsToPrune(ctx, d.cluster.Dynamic, d.set.visited)
	if err != nil {
		return fmt.Errorf("look for what is no longer in the manifests: %w", err)
	}
	if len(gone) == 0 && d.dry {
		return nil
	}
	if len(gone) == 0 {
		return d.set.close(ctx, d.cluster, d.strategy())
	}
	names := idsOf(gone)
	for _, name := range names {
		d.result.Objects = append(d.result.Objects, Change{ID: name, Action: Pruned})
	}
	return d.Steps.Do("remove what is no longer in the manifests", func(*progress.Step) (string, error) {
		return strings.Join(names, ", "), d.set.close(ctx, d.cluster, d.strategy())
	})
}

func idOf(o apply.PruneObject) string {
	return project.ID(o.Mapping.GroupVersionKind.GroupKind(), o.Namespace, o.Name)
}

// idsOf names objects, in order.
func idsOf(objects []apply.PruneObject) []string {
	names := make([]string, len(objects))
	for i, o := range objects {
		names[i] = idOf(o)
	}
	slices.Sort(names)
	return names
}

// close removes every member that was not visited, and narrows the set to the others.
func (s *set) close(ctx context.Context, c *Cluster, strategy cmdutil.DryRunStrategy) error {
	err := s.Prune(ctx, &apply.ApplyOptions{
		ToPrinter:           func(string) (printers.ResourcePrinter, error) { return printers.NewDiscardingPrinter(), nil },
		DeleteOptions:       &delete.DeleteOptions{CascadingStrategy: metav1.DeletePropagationBackground, GracePeriod: -1},
		DryRunStrategy:      strategy,
		DynamicClient:       c.Dynamic,
		VisitedUids:         s.visited,
		ValidationDirective: metav1.FieldValidationStrict,
		IOStreams:           genericiooptions.NewTestIOStreamsDiscard(),
	})
	if err != nil {
		return fmt.Errorf("remove what is no longer in the manifests: %w", err)
	}
	return nil
}

// Removal is what Remove did.
type Removal struct {
	Project   string   `json:"project"`
	Namespace string   `json:"namespace"`
	Objects   []string `json:"objects"`
}

// Remove takes away what Run has brought to the cluster, whatever the manifests say now. The namespace goes only if the
// caller wants it, because others may have put things there.
func Remove(ctx context.Context, o Options, namespace bool) (*Removal, error) {
	if _, err := o.Project.Objects(); err != nil { // it knows the namespace
		return nil, err
	}
	if n := *o.Cluster.Namespace; n != "" {
		o.Project.Namespace = n
	}
	out := &Removal{Project: o.Project.Name, Namespace: o.Project.Namespace, Objects: []string{}}
	c, err := Connect(o.Cluster)
	if err != nil {
		return out, err
	}
	parent := c.Client.CoreV1().Secrets(o.Project.Namespace)
	if _, err := parent.Get(ctx, parentName(o.Project), metav1.GetOptions{}); err != nil {
		return out, fmt.Errorf("project %s is not deployed in namespace %s: %w", o.Project.Name, o.Project.Namespace, err)
	}
	s, err := newSet(c, o.Project)
	if err != nil {
		return out, err
	}
	// Reads what the set holds.
	if err := s.BeforeApply(nil, cmdutil.DryRunServer, metav1.FieldValidationStrict); err != nil {
		return out, err
	}
	members, err := s.FindAllObjectsToPrune(ctx, c.Dynamic, nil)
	if err != nil {
		return out, err
	}
	out.Objects = idsOf(members)
	return out, o.Steps.Do(fmt.Sprintf("remove %s from %s", o.Project.Name, o.Project.Namespace), func(*progress.Step) (string, error) {
		if o.DryRun {
			return fmt.Sprintf("%d objects would go", len(members)), nil
		}
		if err := s.close(ctx, c, cmdutil.DryRunNone); err != nil {
			return "", err
		}
		if err := parent.Delete(ctx, parentName(o.Project), metav1.DeleteOptions{}); err != nil {
			return "", err
		}
		if err := c.awaitGone(ctx, members); err != nil {
			return "", err
		}
		if namespace {
			if err := c.removeNamespace(ctx, o.Project.Namespace); err != nil {
				return "", err
			}
			out.Objects = append(out.Objects, "namespace/"+o.Project.Namespace)
		}
		return fmt.Sprintf("%d objects", len(out.Objects)), nil
	})
}

// removeNamespace deletes a namespace and waits until it is gone.
func (c *Cluster) removeNamespace(ctx context.Context, name string) error {
	m, err := c.mapper.RESTMapping(namespaceKind, "v1")
	if err != nil {
		return err
	}
	policy := metav1.DeletePropagationForeground
	if err := c.Client.CoreV1().Namespaces().Delete(ctx, name, metav1.DeleteOptions{PropagationPolicy: &policy}); err != nil {
		return err
	}
	return c.awaitGone(ctx, []apply.PruneObject{{Name: name, Mapping: m}})
}

// scoped reports whether a kind has namespaces.
func scoped(m *meta.RESTMapping) bool { return m.Scope.Name() != meta.RESTScopeNameRoot }
