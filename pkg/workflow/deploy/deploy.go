// Package deploy deploys a project to a cluster: it builds the services' images, applies the manifests with server-side apply in
// an order that works, removes what is no longer in them, and waits until the pods are ready or reports why they are not.
//
// The cluster may be any Kubernetes with Istio. The objects of a project are recorded as an ApplySet (KEP 3659), as kubectl does,
// so kubectl sees the same set. The steps are in the order of Run; each can be run again, and so can Run as a whole, wherever it
// was interrupted. pkg/command calls Run and Remove.
package deploy

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"maps"
	"path"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/cli-runtime/pkg/genericclioptions"

	"polymesh.dev/polymesh/pkg/diagnose"
	"polymesh.dev/polymesh/pkg/progress"
	"polymesh.dev/polymesh/pkg/signature"
	"polymesh.dev/polymesh/pkg/workflow/cluster"
	"polymesh.dev/polymesh/pkg/workflow/image"
	"polymesh.dev/polymesh/pkg/workflow/project"
	"polymesh.dev/polymesh/pkg/workflow/scanner"
)

// Options are the options of Run.
type Options struct {
	Project *project.Project
	// Cluster selects the cluster, by kubectl's flags.
	Cluster *genericclioptions.ConfigFlags
	// Engine builds images: one of image.EngineNames, or empty for the first that works.
	Engine string
	// ContainerdSocket is that of this machine's node, for images that are not pushed to a registry.
	ContainerdSocket string
	// Authorities are the files with the authorities of API servers that this machine's node has (layout.DataDir).
	Authorities []string
	// Rebuild builds images even if they exist.
	Rebuild bool
	// AllowLatest allows images without a version.
	AllowLatest bool
	// Signer signs the images that are built; nil leaves them unsigned.
	Signer *signature.Signer
	// SBOM is a folder for the bills of materials of the images that are built; empty for none. Scanner creates them.
	SBOM    string
	Scanner *scanner.Scanner
	// RegistryDir is containerd's folder with registry settings.
	RegistryDir string
	// DryRun builds nothing and applies as a dry run of the API server. Diff is a dry run that prints the changes to Out.
	DryRun, Diff bool
	// Adopt takes over a project of this name, or objects, that are deployed from elsewhere.
	Adopt bool
	// Volumes also deletes objects that hold data.
	Volumes bool
	// Wait waits until the pods are ready.
	Wait bool
	// Allowed is called before anything is built or changed, with the objects of the manifests; its error ends the deploy.
	Allowed func(context.Context, *cluster.Cluster, []project.Object) error

	Steps *progress.Steps
	Out   io.Writer
}

// Result is what was done, for programs.
type Result struct {
	Project   string   `json:"project"`
	Namespace string   `json:"namespace"`
	DryRun    bool     `json:"dryRun,omitempty"`
	Images    []Image  `json:"images,omitempty"`
	Objects   []Change `json:"objects"`
	// Left are members of the project that the manifests no longer have and that were not deleted.
	Left     []Left             `json:"left,omitempty"`
	Findings []diagnose.Finding `json:"findings,omitempty"`
	Hosts    []string           `json:"hosts,omitempty"`
}

// Image is the result for a service's image.
type Image struct {
	Service string `json:"service"`
	Ref     string `json:"ref"`
	Built   bool   `json:"built"`
	Moved   bool   `json:"moved"` // loaded into the node or pushed
	// Digest is what was signed; empty without a signature.
	Digest string `json:"digest,omitempty"`
	// SBOM is the file of its bill of materials.
	SBOM string `json:"sbom,omitempty"`
	// id is that of what this run has built.
	id digest.Digest
}

// Action is what happened to an object.
type Action string

// The actions.
const (
	Created   Action = "created"
	Changed   Action = "changed"
	Unchanged Action = "unchanged"
	// Replaced is a finished Job that was deleted and created again, because its template cannot be changed.
	Replaced Action = "replaced"
	Pruned   Action = "pruned"
)

// Change is what happened to one object.
type Change struct {
	ID     string `json:"object"`
	Action Action `json:"action"`
	At     string `json:"at,omitempty"`
}

// Run deploys. With an error, the result contains what was done until then. cluster.ErrNotReady means that everything was
// applied, but not every workload became ready; Result.Findings are the reasons.
func Run(ctx context.Context, o Options) (*Result, error) {
	d := newDeployment(o)
	defer d.close()
	for _, step := range []func(context.Context) error{
		d.read,
		d.connect,
		d.identify,
		d.complete,
		d.allowed,
		d.nameImages,
		d.analyze,
		d.check,
		d.buildImages,
		d.applyObjects,
		d.prune,
		d.awaitReady,
	} {
		if err := step(ctx); err != nil {
			return d.result, err
		}
	}
	d.result.Hosts = hostsOf(d.objects)
	return d.result, nil
}

// deployment is one call of Run.
type deployment struct {
	Options
	dry     bool
	cluster *cluster.Cluster
	origin  project.Origin
	adopted bool // taken over from another origin
	objects []project.Object
	images  []job // what is built
	mover   mover
	checks  checks
	set     *set
	result  *Result
	warnings
}

func newDeployment(o Options) *deployment {
	return &deployment{Options: o, dry: o.DryRun || o.Diff, result: &Result{},
		checks: checks{done: map[string]bool{}, replace: map[string]types.UID{}}}
}

// read reads the manifests and checks what can be checked without a cluster.
func (d *deployment) read(context.Context) error {
	objects, namespace, err := d.Project.Objects()
	if err != nil {
		return err
	}
	d.objects, d.Project = objects, inNamespace(d.Project, d.Cluster, namespace)
	d.result.Project, d.result.Namespace, d.result.DryRun = d.Project.Name, d.Project.Namespace, d.dry
	if d.AllowLatest {
		return nil
	}
	var found []string
	for _, c := range containers(d.objects) {
		if _, ok := d.serviceOf(c.image); ok {
			continue
		}
		if image.Floats(c.image) {
			found = append(found, fmt.Sprintf("%s: image %s", c.at(), c.image))
		}
	}
	if len(found) > 0 {
		return fmt.Errorf("images without a version: what runs would depend on the day it was pulled, and there would be no way back\n  %s\nGive each a version or a digest, or use --allow-latest", strings.Join(found, "\n  "))
	}
	return nil
}

// inNamespace returns a copy of the project with the namespace that it is deployed to: kubectl's flag has precedence.
func inNamespace(p *project.Project, flags *genericclioptions.ConfigFlags, own string) *project.Project {
	copied := *p
	copied.Namespace = cmp.Or(*flags.Namespace, own)
	return &copied
}

// connect connects to the cluster, whose warnings are shown.
func (d *deployment) connect(context.Context) (err error) {
	d.cluster, err = cluster.Connect(d.Cluster, d.warn)
	return err
}

// allowed checks whether the objects may be deployed now. A dry run always may: it changes nothing.
func (d *deployment) allowed(ctx context.Context) error {
	if d.Allowed == nil || d.dry {
		return nil
	}
	return d.Allowed(ctx, d.cluster, d.objects)
}

// serviceOf returns the service that an image in a manifest refers to.
func (d *deployment) serviceOf(ref string) (project.Service, bool) {
	name, _ := image.Cut(ref)
	for _, s := range d.Project.Services {
		if s.Image == name || s.Image == "" && path.Base(name) == s.Name {
			return s, true
		}
	}
	return project.Service{}, false
}

// container is one container of a workload in a manifest.
type container struct {
	object  project.Object
	path    []string // of the container in the object
	content map[string]any
	image   string
}

func (c container) at() string { return c.object.At(append(slices.Clone(c.path), "image")...) }

// containers returns all containers in the manifests, wherever a pod template is: also in CronJobs and custom kinds.
func containers(objects []project.Object) []container {
	var found []container
	for _, o := range objects {
		walkPods(o.Object, nil, func(path []string, content map[string]any) {
			if ref, ok := content["image"].(string); ok && ref != "" {
				found = append(found, container{o, path, content, ref})
			}
		})
	}
	return found
}

// walkPods visits the containers of every pod spec below a value.
func walkPods(value any, path []string, visit func([]string, map[string]any)) {
	switch value := value.(type) {
	case map[string]any:
		for _, key := range slices.Sorted(maps.Keys(value)) {
			field := value[key]
			list, ok := field.([]any)
			if !ok || key != "containers" && key != "initContainers" {
				walkPods(field, append(slices.Clone(path), key), visit)
				continue
			}
			for i, item := range list {
				if content, ok := item.(map[string]any); ok {
					visit(append(slices.Clone(path), key, fmt.Sprint(i)), content)
				}
			}
		}
	case []any:
		for i, item := range value {
			walkPods(item, append(slices.Clone(path), fmt.Sprint(i)), visit)
		}
	}
}
