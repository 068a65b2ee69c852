package deploy

import (
	"context"
	"fmt"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/cli-runtime/pkg/genericclioptions"
	"k8s.io/cli-runtime/pkg/resource"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	cmdutil "k8s.io/kubectl/pkg/cmd/util"

	"polymesh.dev/polymesh/pkg/project"
)

// fieldManager is who Polymesh is to the API server.
const fieldManager = "polymesh"

// cluster is the API server of the target.
type cluster struct {
	rest    *rest.Config
	client  kubernetes.Interface
	dynamic dynamic.Interface
	mapper  meta.RESTMapper
	factory cmdutil.Factory
	istio   bool
}

func (d *deployment) connect(ctx context.Context) (err error) {
	d.cluster, err = connect(d.Cluster)
	return err
}

// connect reaches the API server that kubectl's flags mean.
func connect(flags *genericclioptions.ConfigFlags) (*cluster, error) {
	c := &cluster{factory: cmdutil.NewFactory(flags)}
	var err error
	if c.rest, err = flags.ToRESTConfig(); err != nil {
		return nil, fmt.Errorf("no cluster: %w (start one with `polymesh server`, or name one with --kubeconfig)", err)
	}
	c.rest.QPS, c.rest.Burst = 50, 100
	if c.client, err = kubernetes.NewForConfig(c.rest); err != nil {
		return nil, err
	}
	if c.dynamic, err = dynamic.NewForConfig(c.rest); err != nil {
		return nil, err
	}
	if _, err := c.client.Discovery().ServerVersion(); err != nil {
		return nil, fmt.Errorf("the cluster at %s does not answer: %w (is `polymesh server` running? `polymesh status` says so)", c.rest.Host, err)
	}
	if c.mapper, err = flags.ToRESTMapper(); err != nil {
		return nil, err
	}
	_, err = c.mapper.KindsFor(virtualService)
	c.istio = err == nil
	return c, nil
}

// mapping says how the API server calls an object's kind.
func (c *cluster) mapping(o project.Object) (*meta.RESTMapping, error) {
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

func (c *cluster) resource(m *meta.RESTMapping, namespace string) dynamic.ResourceInterface {
	if !scoped(m) {
		return c.dynamic.Resource(m.Resource)
	}
	return c.dynamic.Resource(m.Resource).Namespace(namespace)
}

// apply is a server-side apply. The manifests are the truth: a field that somebody else set meanwhile (kubectl edit, kubectl
// set image) is taken back, as with every deploy command of this kind.
func (c *cluster) apply(ctx context.Context, m *meta.RESTMapping, u *unstructured.Unstructured, dry bool) (*unstructured.Unstructured, error) {
	data, err := u.MarshalJSON()
	if err != nil {
		return nil, err
	}
	force := true
	options := metav1.PatchOptions{FieldManager: fieldManager, Force: &force}
	if dry {
		options.DryRun = []string{metav1.DryRunAll}
	}
	return c.resource(m, u.GetNamespace()).Patch(ctx, u.GetName(), types.ApplyPatchType, data, options)
}

// info is an object in the form that kubectl's packages take.
func (c *cluster) info(m *meta.RESTMapping, u *unstructured.Unstructured) (*resource.Info, error) {
	client, err := c.factory.UnstructuredClientForMapping(m)
	if err != nil {
		return nil, err
	}
	return &resource.Info{Client: client, Mapping: m, Namespace: u.GetNamespace(), Name: u.GetName(), Object: u}, nil
}
