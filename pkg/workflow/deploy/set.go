package deploy

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/sets"
	"k8s.io/cli-runtime/pkg/genericclioptions"
	"k8s.io/cli-runtime/pkg/genericiooptions"
	"k8s.io/cli-runtime/pkg/printers"
	"k8s.io/cli-runtime/pkg/resource"
	"k8s.io/kubectl/pkg/cmd/apply"
	"k8s.io/kubectl/pkg/cmd/delete"
	cmdutil "k8s.io/kubectl/pkg/cmd/util"

	"polymesh.dev/polymesh/pkg/progress"
	"polymesh.dev/polymesh/pkg/ssa"
	"polymesh.dev/polymesh/pkg/version"
	"polymesh.dev/polymesh/pkg/workflow/cluster"
	"polymesh.dev/polymesh/pkg/workflow/project"
)

// set is the project's ApplySet, as kubectl stores it: a Secret "polymesh-<project>" in the project's namespace lists the kinds
// and namespaces, and each member has a label with the set's id. Namespaces and CRDs are never members: pruning one would
// delete what others created in it.
type set struct {
	*apply.ApplySet
	parent  *apply.ApplySetParentRef
	visited sets.Set[types.UID]
}

// parentPrefix comes before the project's name in the name of the Secret that holds the set.
const parentPrefix = "polymesh-"

// parentName is the name of the Secret that holds the set.
func parentName(p *project.Project) string { return parentPrefix + p.Name }

func newSet(c *cluster.Cluster, p *project.Project) (*set, error) {
	m, err := c.Mapper.RESTMapping(secretKind, "v1")
	if err != nil {
		return nil, err
	}
	client, err := c.RESTClient(m)
	if err != nil {
		return nil, err
	}
	parent := &apply.ApplySetParentRef{Name: parentName(p), Namespace: p.Namespace, RESTMapping: m}
	return &set{
		parent:   parent,
		ApplySet: apply.NewApplySet(parent, apply.ApplySetTooling{Name: fieldManager, Version: version.Version}, c.Mapper, client),
		visited:  sets.New[types.UID](),
	}, nil
}

func (d *deployment) strategy() cmdutil.DryRunStrategy {
	if d.dry {
		return cmdutil.DryRunServer
	}
	return cmdutil.DryRunNone
}

// openSet adds what will be applied to the set in the cluster, so that no object is lost if this is interrupted, and labels the
// objects.
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
		m, err := d.cluster.Mapping(o)
		if err != nil {
			if d.dry && definition(d.objects, o) != nil {
				continue
			}
			return err
		}
		info, err := d.cluster.Info(m, o.Unstructured)
		if err != nil {
			return err
		}
		infos = append(infos, info)
	}
	if err := s.AddLabels(infos...); err != nil {
		return err
	}
	if !d.dry {
		if err := d.claim(ctx, s); err != nil {
			return err
		}
	}
	if err := s.BeforeApply(infos, d.strategy(), metav1.FieldValidationStrict); err != nil {
		return fmt.Errorf("record the project in %s: %w", d.Project.Namespace, err)
	}
	d.set = s
	return nil
}

// Left is a member of the set that was not deleted although it is not in the manifests, and why.
type Left struct {
	ID  string `json:"object"`
	Why string `json:"why"`
}

// Reasons why something is left.
const (
	holdsData   = "it holds data"
	notApplied  = "it has the project's label, but deploy did not create it"
	justAdopted = "the project was taken over just now"
)

// prune removes what the project had and the manifests no longer have.
func (d *deployment) prune(ctx context.Context) error {
	if d.set == nil {
		return nil
	}
	gone, left, err := d.set.members(ctx, d.cluster, d.Volumes)
	if err != nil {
		return fmt.Errorf("find what is no longer in the manifests: %w", err)
	}
	if d.adopted {
		// They may belong to another project, and the user has not seen them yet. The next deploy removes them.
		for _, o := range gone {
			left = append(left, leftObject{o, justAdopted})
		}
		gone = nil
	}
	if err := d.set.keep(d.cluster, left, d.strategy()); err != nil {
		return err
	}
	d.result.Left = leftOf(left)
	if len(left) > 0 {
		if err := d.Steps.Do("left, though no longer in the manifests", func(*progress.Step) (string, error) { return leftText(d.result.Left), nil }); err != nil {
			return err
		}
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
	title := "remove what is no longer in the manifests"
	if d.dry {
		title += " (dry run)"
	}
	return d.Steps.Do(title, func(*progress.Step) (string, error) {
		return strings.Join(names, ", "), d.set.close(ctx, d.cluster, d.strategy())
	})
}

// leftObject is an object with the reason why it is left.
type leftObject struct {
	apply.PruneObject
	why string
}

func leftOf(objects []leftObject) []Left {
	var out []Left
	for _, o := range objects {
		out = append(out, Left{ID: idOf(o.PruneObject), Why: o.why})
	}
	slices.SortFunc(out, func(a, b Left) int { return strings.Compare(a.ID, b.ID) })
	return out
}

func leftText(left []Left) string {
	var parts []string
	for _, l := range left {
		parts = append(parts, l.ID+" ("+l.Why+")")
	}
	text := strings.Join(parts, ", ")
	if slices.ContainsFunc(left, func(l Left) bool { return l.Why == holdsData }) {
		text += "; --prune-volumes deletes what holds data"
	}
	return text
}

// members returns the members of the set in the cluster that were not visited: what may be deleted, and what must stay. Objects
// that a controller created, with labels that it copied, are neither: they are deleted with their owner.
func (s *set) members(ctx context.Context, c *cluster.Cluster, volumes bool) (gone []apply.PruneObject, left []leftObject, err error) {
	found, err := s.FindAllObjectsToPrune(ctx, c.Dynamic, s.visited)
	if err != nil {
		return nil, nil, err
	}
	for _, o := range found {
		u, err := meta.Accessor(o.Object)
		if err != nil {
			return nil, nil, err
		}
		switch {
		case metav1.GetControllerOf(u) != nil:
			s.visited.Insert(u.GetUID())
		case !ssa.AppliedBy(u, fieldManager): // a label alone is no proof
			left = append(left, leftObject{o, notApplied})
		case !volumes && hasData(o):
			left = append(left, leftObject{o, holdsData})
		default:
			gone = append(gone, o)
		}
	}
	return gone, left, nil
}

// hasData reports whether data is deleted with an object: a volume or a claim, or a StatefulSet that deletes its claims.
func hasData(o apply.PruneObject) bool {
	switch o.Mapping.GroupVersionKind.GroupKind() {
	case claimKind, volumeKind:
		return true
	case statefulSetKind:
		u, ok := o.Object.(*unstructured.Unstructured)
		if !ok {
			return true
		}
		policy, _, _ := unstructured.NestedString(u.Object, "spec", "persistentVolumeClaimRetentionPolicy", "whenDeleted")
		return policy == "Delete"
	}
	return false
}

// keep makes sure that close does not delete these objects, and that the set still lists their kinds and namespaces.
func (s *set) keep(c *cluster.Cluster, left []leftObject, strategy cmdutil.DryRunStrategy) error {
	if len(left) == 0 {
		return nil
	}
	var infos []*resource.Info
	for _, o := range left {
		u, ok := o.Object.(*unstructured.Unstructured)
		if !ok {
			return fmt.Errorf("%s is a %T", idOf(o.PruneObject), o.Object)
		}
		s.visited.Insert(u.GetUID())
		info, err := c.Info(o.Mapping, u)
		if err != nil {
			return err
		}
		infos = append(infos, info)
	}
	if err := s.BeforeApply(infos, strategy, metav1.FieldValidationStrict); err != nil {
		return fmt.Errorf("record what is left: %w", err)
	}
	return nil
}

func idOf(o apply.PruneObject) string {
	return project.ID(o.Mapping.GroupVersionKind.GroupKind(), o.Namespace, o.Name)
}

// idsOf returns the sorted names of objects.
func idsOf(objects []apply.PruneObject) []string {
	names := make([]string, len(objects))
	for i, o := range objects {
		names[i] = idOf(o)
	}
	slices.Sort(names)
	return names
}

// close deletes every member that was not visited, and reduces the set to the others.
func (s *set) close(ctx context.Context, c *cluster.Cluster, strategy cmdutil.DryRunStrategy) error {
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
	// Left are objects of the project that were not deleted.
	Left []Left `json:"left,omitempty"`
}

// RemoveOptions are the options of Remove.
type RemoveOptions struct {
	Project *project.Project
	// Cluster selects the cluster, by kubectl's flags.
	Cluster *genericclioptions.ConfigFlags
	// DryRun only lists what would be removed.
	DryRun bool
	// Adopt removes a project of this name that was deployed from elsewhere.
	Adopt bool
	// Volumes also deletes objects that hold data.
	Volumes bool
	// Namespace also deletes the namespace, in which others may have created objects.
	Namespace bool
	Steps     *progress.Steps
}

// Remove deletes what Run has applied to the cluster, whatever is in the manifests now. While something is left, the set stays, so
// that a second call can remove it.
func Remove(ctx context.Context, o RemoveOptions) (*Removal, error) {
	_, namespace, err := o.Project.Objects()
	if err != nil {
		return nil, err
	}
	o.Project = inNamespace(o.Project, o.Cluster, namespace)
	out := &Removal{Project: o.Project.Name, Namespace: o.Project.Namespace, Objects: []string{}}
	d := newDeployment(Options{Project: o.Project, Cluster: o.Cluster, Adopt: o.Adopt, Steps: o.Steps})
	if err := d.connect(ctx); err != nil {
		return out, err
	}
	c := d.cluster
	parent := c.Client.CoreV1().Secrets(o.Project.Namespace)
	if _, err := parent.Get(ctx, parentName(o.Project), metav1.GetOptions{}); err != nil {
		return out, fmt.Errorf("project %s is not deployed in namespace %s: %w", o.Project.Name, o.Project.Namespace, err)
	}
	if err := d.identify(ctx); err != nil {
		return out, err
	}
	s, err := newSet(c, o.Project)
	if err != nil {
		return out, err
	}
	if o.Namespace {
		if err := onlyOurs(ctx, c, s, o.Volumes); err != nil {
			return out, err
		}
	}
	// It reads the members of the set.
	if err := s.BeforeApply(nil, cmdutil.DryRunServer, metav1.FieldValidationStrict); err != nil {
		return out, err
	}
	members, left, err := s.members(ctx, c, o.Volumes)
	if err != nil {
		return out, err
	}
	out.Objects, out.Left = idsOf(members), leftOf(left)
	return out, o.Steps.Do(fmt.Sprintf("remove %s from %s", o.Project.Name, o.Project.Namespace), func(*progress.Step) (string, error) {
		if o.DryRun {
			return fmt.Sprintf("%d objects would be removed", len(members)), nil
		}
		if err := s.keep(c, left, cmdutil.DryRunNone); err != nil {
			return "", err
		}
		if err := s.close(ctx, c, cmdutil.DryRunNone); err != nil {
			return "", err
		}
		if len(left) == 0 {
			if err := parent.Delete(ctx, parentName(o.Project), metav1.DeleteOptions{}); err != nil {
				return "", err
			}
		}
		for _, m := range members {
			if err := c.AwaitGone(ctx, m.Mapping, m.Namespace, m.Name); err != nil {
				return "", err
			}
		}
		if o.Namespace {
			if err := c.RemoveNamespace(ctx, o.Project.Namespace); err != nil {
				return "", err
			}
			out.Objects = append(out.Objects, "namespace/"+o.Project.Namespace)
		}
		summary := fmt.Sprintf("%d objects", len(out.Objects))
		if len(left) > 0 && !o.Namespace {
			summary += "; left: " + leftText(out.Left)
		}
		return summary, nil
	})
}

// onlyOurs returns an error if a namespace contains other projects, or volumes that may not be deleted.
func onlyOurs(ctx context.Context, c *cluster.Cluster, s *set, volumes bool) error {
	parents, err := c.Client.CoreV1().Secrets(s.parent.Namespace).List(ctx, metav1.ListOptions{LabelSelector: apply.ApplySetParentIDLabel})
	if err != nil {
		return fmt.Errorf("look for other projects in namespace %s: %w", s.parent.Namespace, err)
	}
	for _, p := range parents.Items {
		if p.Name != s.parent.Name {
			return fmt.Errorf("namespace %s also holds %s: undeploy it first, or omit --delete-namespace", s.parent.Namespace, strings.TrimPrefix(p.Name, parentPrefix))
		}
	}
	if volumes {
		return nil
	}
	claims, err := c.Client.CoreV1().PersistentVolumeClaims(s.parent.Namespace).List(ctx, metav1.ListOptions{})
	if err != nil {
		return fmt.Errorf("look for volumes in namespace %s: %w", s.parent.Namespace, err)
	}
	if len(claims.Items) > 0 {
		var names []string
		for _, claim := range claims.Items {
			names = append(names, claim.Name)
		}
		return fmt.Errorf("namespace %s holds data, in the persistent volume claims %s: use --prune-volumes to delete them too, or omit --delete-namespace", s.parent.Namespace, strings.Join(names, ", "))
	}
	return nil
}
