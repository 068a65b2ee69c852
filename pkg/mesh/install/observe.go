package install

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sync/errgroup"
	"istio.io/istio/pkg/kube"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// observe reads what the decision depends on.
func observe(ctx context.Context, client kube.CLIClient, want Identity) (Observed, error) {
	record, err := readRecord(ctx, client.Kube())
	if err != nil {
		return Observed{}, err
	}
	o := Observed{Record: record}
	if record != nil && record.Owner != Ours {
		return o, nil
	}

	planes, err := client.Kube().AppsV1().Deployments(metav1.NamespaceAll).List(ctx, metav1.ListOptions{LabelSelector: "app=istiod"})
	if err != nil {
		return Observed{}, fmt.Errorf("look for control planes of Istio: %w", err)
	}
	live := map[string]bool{}
	for _, d := range planes.Items {
		key := objectKey(deploymentKind, d.Namespace, d.Name)
		live[key] = true
		if record == nil {
			o.Present = append(o.Present, display(key))
			continue
		}
		_, known := record.Objects[key]
		// An interrupted installation has not recorded its control plane yet.
		if !known && (record.Phase == Installed || key != ownPlane) {
			o.Foreign = append(o.Foreign, display(key))
		}
	}
	if record == nil {
		rest, err := traces(ctx, client)
		o.Present = append(o.Present, rest...)
		return o, err
	}
	if _, had := record.Objects[ownPlane]; had && !live[ownPlane] {
		o.Gone = true
	}
	// Only an upgrade depends on what changed.
	if record.Phase == Installed && record.Identity != want && !o.Gone {
		o.Changed, err = changed(ctx, client, record)
		if err != nil {
			return Observed{}, err
		}
	}
	return o, nil
}

var deploymentKind = schema.GroupVersionKind{Group: "apps", Version: "v1", Kind: "Deployment"}

// istioNamespace and ownPlane are where all profiles install the control plane that has no revision.
const istioNamespace = "istio-system"

var ownPlane = objectKey(deploymentKind, istioNamespace, "istiod")

// traces returns parts of an Istio without a control plane in this cluster: injection webhooks of a remote one, and CRDs, which Helm
// installs first and an uninstall leaves behind.
func traces(ctx context.Context, client kube.CLIClient) ([]string, error) {
	var found []string
	hooks, err := client.Kube().AdmissionregistrationV1().MutatingWebhookConfigurations().List(ctx, metav1.ListOptions{LabelSelector: "app=sidecar-injector"})
	if err != nil {
		return nil, fmt.Errorf("look for injection webhooks of Istio: %w", err)
	}
	for _, h := range hooks.Items {
		found = append(found, "MutatingWebhookConfiguration "+h.Name)
	}
	crds, err := client.Metadata().Resource(schema.GroupVersionResource{
		Group: "apiextensions.k8s.io", Version: "v1", Resource: "customresourcedefinitions",
	}).List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, fmt.Errorf("look for CRDs of Istio: %w", err)
	}
	for _, c := range crds.Items {
		if strings.HasSuffix(c.Name, ".istio.io") {
			found = append(found, "CustomResourceDefinition "+c.Name)
		}
	}
	return found, nil
}

// changed returns the recorded objects that are not as they were applied.
func changed(ctx context.Context, client kube.CLIClient, record *Record) ([]string, error) {
	var (
		mu  sync.Mutex
		out []string
	)
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(parallel)
	for key, want := range record.Objects {
		g.Go(func() error {
			gvk, namespace, name, err := parseKey(key)
			if err != nil {
				return err
			}
			resource, err := client.DynamicClientFor(gvk, nil, namespace)
			if err != nil {
				return fmt.Errorf("read %s: %w", display(key), err)
			}
			got := "deleted"
			obj, err := resource.Get(ctx, name, metav1.GetOptions{})
			if err == nil {
				got, err = fingerprint(obj)
			} else if apierrors.IsNotFound(err) {
				err = nil
			}
			if err != nil {
				return fmt.Errorf("read %s: %w", display(key), err)
			}
			if got != want {
				mu.Lock()
				defer mu.Unlock()
				out = append(out, display(key))
			}
			return nil
		})
	}
	err := g.Wait()
	slices.Sort(out)
	return out, err
}
