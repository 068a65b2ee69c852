// Package cluster is the API server that a workflow command uses: its clients, the kinds that it serves, waiting for workloads to
// be ready, and deleting.
//
// It owns no objects and applies none: pkg/workflow/deploy and pkg/workflow/rollout do, with the clients that Connect returns.
package cluster

import (
	"context"
	"fmt"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/cli-runtime/pkg/genericclioptions"
	"k8s.io/cli-runtime/pkg/resource"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	cmdutil "k8s.io/kubectl/pkg/cmd/util"

	"polymesh.dev/polymesh/pkg/kubeconfig"
	"polymesh.dev/polymesh/pkg/workflow/project"
)

// Cluster is the API server of the target.
type Cluster struct {
	REST    *rest.Config
	Client  kubernetes.Interface
	Dynamic dynamic.Interface
	// Silent is Dynamic without the API server's warnings, for dry runs.
	Silent dynamic.Interface
	Mapper meta.RESTMapper
	// Istio is true if the API server serves Istio's types.
	Istio bool

	factory cmdutil.Factory
}

var virtualServices = schema.GroupVersionResource{Group: "networking.istio.io", Version: "v1", Resource: "virtualservices"}

// Connect connects to the API server that kubectl's flags select. warn is called with each of its warnings, whose text may come
// from a user's webhooks; nil drops them.
func Connect(flags *genericclioptions.ConfigFlags, warn func(text string)) (*Cluster, error) {
	c := &Cluster{factory: cmdutil.NewFactory(flags)}
	var err error
	if c.REST, err = flags.ToRESTConfig(); err != nil {
		return nil, kubeconfig.None(err)
	}
	c.REST.QPS, c.REST.Burst = 50, 100
	c.REST.WarningHandler = rest.NoWarnings{}
	if c.Silent, err = dynamic.NewForConfig(c.REST); err != nil {
		return nil, err
	}
	if warn != nil {
		c.REST.WarningHandler = Warnings(warn)
	}
	if c.Client, err = kubernetes.NewForConfig(c.REST); err != nil {
		return nil, err
	}
	if c.Dynamic, err = dynamic.NewForConfig(c.REST); err != nil {
		return nil, err
	}
	if _, err := c.Client.Discovery().ServerVersion(); err != nil {
		return nil, kubeconfig.Unreachable(c.REST.Host, err)
	}
	if c.Mapper, err = flags.ToRESTMapper(); err != nil {
		return nil, err
	}
	_, err = c.Mapper.KindsFor(virtualServices)
	c.Istio = err == nil
	return c, nil
}

// Warnings is called with each warning of an API server: a deprecated field, or a message of an admission policy.
type Warnings func(text string)

// HandleWarningHeader implements rest.WarningHandler. Code 299 is the one that the API server uses (RFC 7234, 5.5.7).
func (w Warnings) HandleWarningHeader(code int, _, text string) {
	if code == 299 && text != "" {
		w(text)
	}
}

// Mapping returns how the API server serves an object's kind. A kind that it does not know is an error that names the manifest.
func (c *Cluster) Mapping(o project.Object) (*meta.RESTMapping, error) {
	gvk := o.GroupVersionKind()
	m, err := c.Mapper.RESTMapping(gvk.GroupKind(), gvk.Version)
	if meta.IsNoMatchError(err) {
		meta.MaybeResetRESTMapper(c.Mapper) // for a type that was created just now
		m, err = c.Mapper.RESTMapping(gvk.GroupKind(), gvk.Version)
	}
	if meta.IsNoMatchError(err) {
		return nil, fmt.Errorf("%s: the cluster does not know the kind %s of %s: correct apiVersion and kind, or install what provides it", o.At("kind"), gvk.Kind, gvk.GroupVersion())
	}
	return m, err
}

// Namespaced reports whether objects of a kind are in namespaces.
func Namespaced(m *meta.RESTMapping) bool { return m.Scope.Name() != meta.RESTScopeNameRoot }

// Resource returns a client for the objects of a kind.
func Resource(client dynamic.Interface, m *meta.RESTMapping, namespace string) dynamic.ResourceInterface {
	if !Namespaced(m) {
		return client.Resource(m.Resource)
	}
	return client.Resource(m.Resource).Namespace(namespace)
}

// Resource returns a client for the objects of a kind, with warnings.
func (c *Cluster) Resource(m *meta.RESTMapping, namespace string) dynamic.ResourceInterface {
	return Resource(c.Dynamic, m, namespace)
}

// RESTClient returns a client for a kind, for kubectl's packages.
func (c *Cluster) RESTClient(m *meta.RESTMapping) (resource.RESTClient, error) {
	return c.factory.UnstructuredClientForMapping(m)
}

// Info returns an object in the form that kubectl's packages use.
func (c *Cluster) Info(m *meta.RESTMapping, u *unstructured.Unstructured) (*resource.Info, error) {
	client, err := c.RESTClient(m)
	if err != nil {
		return nil, err
	}
	return &resource.Info{Client: client, Mapping: m, Namespace: u.GetNamespace(), Name: u.GetName(), Object: u}, nil
}

// Remove deletes an object, if it still has that UID, and waits until it is gone.
func (c *Cluster) Remove(ctx context.Context, m *meta.RESTMapping, u *unstructured.Unstructured, uid types.UID) error {
	policy := metav1.DeletePropagationForeground
	err := c.Resource(m, u.GetNamespace()).Delete(ctx, u.GetName(), metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &uid}, PropagationPolicy: &policy})
	if err != nil && !apierrors.IsNotFound(err) {
		return err
	}
	return c.AwaitGone(ctx, m, u.GetNamespace(), u.GetName())
}

// RemoveNamespace deletes a namespace and waits until it is gone.
func (c *Cluster) RemoveNamespace(ctx context.Context, name string) error {
	m, err := c.Mapper.RESTMapping(schema.GroupKind{Kind: "Namespace"}, "v1")
	if err != nil {
		return err
	}
	policy := metav1.DeletePropagationForeground
	if err := c.Client.CoreV1().Namespaces().Delete(ctx, name, metav1.DeleteOptions{PropagationPolicy: &policy}); err != nil {
		return err
	}
	return c.AwaitGone(ctx, m, "", name)
}
