package install

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"istio.io/istio/pkg/kube"
	appsv1 "k8s.io/api/apps/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"polymesh.dev/polymesh/pkg/converge"
)

// restorer restores deleted objects that our control plane needs: webhooks, without which policies and injection silently have no
// effect, CRDs, RBAC and settings. It does not change existing objects. Deployments, Services and their autoscalers are not restored:
// a user may remove a gateway, or everything with `istioctl uninstall`. Because that deletes one object after the other, an object
// must be missing in two rounds.
type restorer struct {
	*mesh
	client  kube.CLIClient
	missing []string // in the last round
}

// restorable reports whether objects of a kind are restored.
func restorable(kind string) bool {
	switch kind {
	case "MutatingWebhookConfiguration", "ValidatingWebhookConfiguration", "CustomResourceDefinition", "ClusterRole", "ClusterRoleBinding",
		"Role", "RoleBinding", "ServiceAccount", "ConfigMap":
		return true
	}
	return false
}

// sync runs one round. The error is what is missing.
func (r *restorer) sync(ctx context.Context) error {
	record, missing, err := r.look(ctx)
	if err != nil {
		return err
	}
	twice := slices.DeleteFunc(slices.Clone(missing), func(key string) bool { return !slices.Contains(r.missing, key) })
	r.missing = missing
	if len(missing) == 0 {
		return nil
	}
	if len(twice) > 0 {
		if err := r.put(ctx, record, twice); err != nil {
			return err
		}
		r.missing = nil
		return nil
	}
	var names []string
	for _, key := range missing {
		names = append(names, display(key))
	}
	return converge.Later(list(names) + " was deleted and will be put back")
}

// look returns the current record, and the keys of its missing objects; none if the user has uninstalled our control plane, or has
// installed another one, because then the user manages the tags of revisions.
func (r *restorer) look(ctx context.Context) (*Record, []string, error) {
	record, err := readRecord(ctx, r.client.Kube())
	if err != nil || record == nil || record.Owner != Ours || record.Phase != Installed {
		return nil, nil, err
	}
	planes, err := r.client.Kube().AppsV1().Deployments(metav1.NamespaceAll).List(ctx, metav1.ListOptions{LabelSelector: "app=istiod"})
	if err != nil {
		return nil, nil, fmt.Errorf("look for control planes of Istio: %w", err)
	}
	_, installed := record.Objects[ownPlane]
	if installed && len(planes.Items) == 0 || slices.ContainsFunc(planes.Items, func(d appsv1.Deployment) bool {
		return objectKey(deploymentKind, d.Namespace, d.Name) != ownPlane
	}) {
		return record, nil, nil
	}
	keys := slices.Clone(record.Shared)
	for key := range record.Objects {
		keys = append(keys, key)
	}
	slices.Sort(keys)
	var missing []string
	for _, key := range keys {
		gvk, namespace, name, err := parseKey(key)
		if err != nil {
			return nil, nil, err
		}
		if !restorable(gvk.Kind) {
			continue
		}
		resource, err := r.client.DynamicClientFor(gvk, nil, namespace)
		if err != nil {
			return nil, nil, fmt.Errorf("look for %s: %w", display(key), err)
		}
		_, err = resource.Get(ctx, name, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			missing = append(missing, key)
		} else if err != nil {
			return nil, nil, fmt.Errorf("look for %s: %w", display(key), err)
		}
	}
	return record, missing, nil
}

// put applies the missing objects, and records their new fingerprints.
func (r *restorer) put(ctx context.Context, record *Record, missing []string) error {
	sets, values, err := r.settings.manifests(r.client, console{r.log})
	if err != nil {
		return err
	}
	i := &installer{client: r.client, values: values, log: r.log, objects: map[string]string{}}
	var objects []object
	for _, set := range sets {
		for _, m := range set.Manifests {
			if slices.Contains(missing, objectKey(m.GroupVersionKind(), m.GetNamespace(), m.GetName())) {
				objects = append(objects, object{m.Unstructured, set.Component})
			}
		}
	}
	if err := i.apply(ctx, objects); err != nil {
		return err
	}
	// The webhooks of the default revision are derived from the injector's, and are in no manifest.
	if slices.ContainsFunc(missing, func(key string) bool { return strings.Contains(key, "WebhookConfiguration/") }) {
		if err := i.applyWebhooks(ctx); err != nil {
			return err
		}
	}
	for key, print := range i.objects {
		record.Objects[key] = print
	}
	if err := writeRecord(ctx, r.client.Kube(), record); err != nil {
		return err
	}
	for _, key := range missing {
		r.log.Warn("put back what was deleted", "object", display(key))
	}
	return nil
}
