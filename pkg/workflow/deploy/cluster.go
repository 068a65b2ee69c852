package deploy

import (
	"context"
	"fmt"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/cli-runtime/pkg/genericclioptions"
	"k8s.io/cli-runtime/pkg/resource"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/kubectl/pkg/cmd/apply"
	cmdutil "k8s.io/kubectl/pkg/cmd/util"

	"polymesh.dev/polymesh/pkg/kubeconfig"
	"polymesh.dev/polymesh/pkg/ssa"
	"polymesh.dev/polymesh/pkg/workflow/project"
)

// fieldManager is who Polymesh is to the API server.
const fieldManager = ssa.Deploy

// Cluster is the API server of the target.
type Cluster struct {
	rest    *rest.Config
	Client  kubernetes.Interface
	Dynamic dynamic.Interface
	// silent is Dynamic without the API server's warnings, for what is asked before it is done.
	silent  dynamic.Interface
	mapper  meta.RESTMapper
	factory cmdutil.Factory
	Istio   bool
	// warned is called with each warning of the API server; nil drops them.
	warned func(text string)
}

func (d *deployment) connect(ctx context.Context) (err error) {
	if d.cluster, err = Connect(d.Cluster); err != nil {
		return err
	}
	d.cluster.warned = d.warn
	return nil
}

// Connect reaches the API server that kubectl's flags mean.
func Connect(flags *genericclioptions.ConfigFlags) (*Cluster, error) {
	c := &Cluster{factory: cmdutil.NewFactory(flags)}
	var err error
	if c.rest, err = flags.ToRESTConfig(); err != nil {
		return nil, kubeconfig.None(err)
	}
	c.rest.QPS, c.rest.Burst = 50, 100
	c.rest.WarningHandler = c
	if c.Client, err = kubernetes.NewForConfig(c.rest); err != nil {
		return nil, err
	}
	if c.Dynamic, err = dynamic.NewForConfig(c.rest); err != nil {
		return nil, err
	}
	silent := rest.CopyConfig(c.rest)
	silent.WarningHandler = rest.NoWarnings{}
	if c.silent, err = dynamic.NewForConfig(silent); err != nil {
		return nil, err
	}
	if _, err := c.Client.Discovery().ServerVersion(); err != nil {
		return nil, kubeconfig.Unreachable(c.rest.Host, err)
	}
	if c.mapper, err = flags.ToRESTMapper(); err != nil {
		return nil, err
	}
	_, err = c.mapper.KindsFor(virtualService)
	c.Istio = err == nil
	return c, nil
}

// mapping says how the API server calls an object's kind.
func (c *Cluster) mapping(o project.Object) (*meta.RESTMapping, error) {
	gvk := o.GroupVersionKind()
	m, err := c.mapper.RESTMapping(gvk.GroupKind(), gvk.Version)
	if meta.IsNoMatchError(err) {
		meta.MaybeResetRESTMapper(c.mapper) // a type that was made a moment ago
		m, err = c.mapper.RESTMapping(gvk.GroupKind(), gvk.Version)
	}
	if meta.IsNoMatchError(err) {
		return nil, fmt.Errorf("%s: the cluster does not know the kind %s of %s: correct apiVersion and kind, or install what brings it", o.At("kind"), gvk.Kind, gvk.GroupVersion())
	}
	return m, err
}

func (c *Cluster) resource(m *meta.RESTMapping, namespace string) dynamic.ResourceInterface {
	return resourceOf(c.Dynamic, m, namespace)
}

func resourceOf(client dynamic.Interface, m *meta.RESTMapping, namespace string) dynamic.ResourceInterface {
	if !scoped(m) {
		return client.Resource(m.Resource)
	}
	return client.Resource(m.Resource).Namespace(namespace)
}

// apply is a server-side apply. The manifests are the truth: a field that someone else set meanwhile (kubectl edit, kubectl
// set image) is taken back, as with every deploy command of this kind.
func (c *Cluster) apply(ctx context.Context, m *meta.RESTMapping, u *unstructured.Unstructured, dry bool) (*unstructured.Unstructured, error) {
	return ssa.Apply(ctx, c.resource(m, u.GetNamespace()), u, ssa.Options{Manager: fieldManager, Force: true, DryRun: dry, WebhookWait: webhookWait})
}

// wouldApply is a dry run of apply that shows no warnings.
func (c *Cluster) wouldApply(ctx context.Context, m *meta.RESTMapping, u *unstructured.Unstructured) error {
	_, err := ssa.Apply(ctx, resourceOf(c.silent, m, u.GetNamespace()), u, ssa.Options{Manager: fieldManager, Force: true, DryRun: true})
	return err
}

// remove deletes an object and waits until it is gone. It must still be the one of that UID.
func (c *Cluster) remove(ctx context.Context, m *meta.RESTMapping, u *unstructured.Unstructured, uid types.UID) error {
	policy := metav1.DeletePropagationForeground
	err := c.resource(m, u.GetNamespace()).Delete(ctx, u.GetName(), metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &uid}, PropagationPolicy: &policy})
	if err != nil && !apierrors.IsNotFound(err) {
		return err
	}
	return c.awaitGone(ctx, []apply.PruneObject{{Name: u.GetName(), Namespace: u.GetNamespace(), Mapping: m}})
}

// info is an object in the form that kubectl's packages take.
func (c *Cluster) info(m *meta.RESTMapping, u *unstructured.Unstructured) (*resource.Info, error) {
	client, err := c.factory.UnstructuredClientForMapping(m)
	if err != nil {
		return nil, err
	}
	return &resource.Info{Client: client, Mapping: m, Namespace: u.GetNamespace(), Name: u.GetName(), Object: u}, nil
}
