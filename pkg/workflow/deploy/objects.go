package deploy

import (
	"context"
	"encoding/base64"
	"fmt"
	"os"
	"slices"
	"strings"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/kubectl/pkg/cmd/apply"

	"polymesh.dev/polymesh/pkg/workflow/cluster"
	"polymesh.dev/polymesh/pkg/workflow/project"
)

var (
	namespaceKind   = schema.GroupKind{Kind: "Namespace"}
	secretKind      = schema.GroupKind{Kind: "Secret"}
	claimKind       = schema.GroupKind{Kind: "PersistentVolumeClaim"}
	volumeKind      = schema.GroupKind{Kind: "PersistentVolume"}
	definitionKind  = schema.GroupKind{Group: "apiextensions.k8s.io", Kind: "CustomResourceDefinition"}
	autoscalerKind  = schema.GroupKind{Group: "autoscaling", Kind: "HorizontalPodAutoscaler"}
	statefulSetKind = schema.GroupKind{Group: "apps", Kind: "StatefulSet"}
)

// order is the order in which kinds are applied. A kind that is not listed comes with the workloads. Routes come last, so that
// they never name a subset or a service that proxies do not know yet.
var order = [][]string{
	{"Namespace", "CustomResourceDefinition"},
	{"ResourceQuota", "LimitRange", "PriorityClass", "StorageClass", "ServiceAccount", "Role", "ClusterRole", "RoleBinding", "ClusterRoleBinding"},
	{"Secret", "ConfigMap", "PersistentVolume", "PersistentVolumeClaim"},
	{"Service", "EndpointSlice", "Endpoints", "ServiceEntry", "WorkloadEntry"},
	{"DestinationRule", "Sidecar", "EnvoyFilter", "Telemetry", "PeerAuthentication", "RequestAuthentication", "AuthorizationPolicy"},
	{"Deployment", "StatefulSet", "DaemonSet", "ReplicaSet", "Job", "CronJob", "Pod"},
	{"HorizontalPodAutoscaler", "PodDisruptionBudget"},
	{"Gateway", "ReferenceGrant"},
	{"VirtualService", "HTTPRoute", "GRPCRoute", "TLSRoute", "TCPRoute", "Ingress"},
}

func rank(o project.Object) int {
	at := func(kind string) int {
		return slices.IndexFunc(order, func(kinds []string) bool { return slices.Contains(kinds, kind) })
	}
	if i := at(o.GetKind()); i >= 0 {
		return i
	}
	return at("Deployment")
}

// complete adds to the manifests what they omit: the namespace, its label, the Secrets, and the namespace of each object.
func (d *deployment) complete(ctx context.Context) error {
	slices.SortStableFunc(d.objects, func(a, b project.Object) int { return rank(a) - rank(b) })
	if err := d.addNamespace(ctx); err != nil {
		return err
	}
	secrets, err := d.secrets(ctx)
	if err != nil {
		return err
	}
	at := slices.IndexFunc(d.objects, func(o project.Object) bool { return rank(o) > 0 })
	if at < 0 {
		at = len(d.objects)
	}
	d.objects = slices.Insert(d.objects, at, secrets...)
	for _, o := range d.objects {
		if err := d.setNamespace(o); err != nil {
			return err
		}
	}
	if err := project.Unique(d.objects); err != nil {
		return err
	}
	dropReplicas(d.objects)
	return nil
}

// addNamespace adds the project's namespace and its label for injection. A namespace that names a revision, or opts out, is left
// as it is.
func (d *deployment) addNamespace(ctx context.Context) error {
	name := d.Project.Namespace
	if at := slices.IndexFunc(d.objects, func(o project.Object) bool {
		return o.GroupVersionKind().GroupKind() == namespaceKind && o.GetName() == name
	}); at >= 0 {
		o := d.objects[at]
		if !injects(o.GetLabels()) && d.cluster.Istio {
			return unstructured.SetNestedField(o.Object, "enabled", "metadata", "labels", "istio-injection")
		}
		return nil
	}
	labels := map[string]any{}
	live, err := d.cluster.Client.CoreV1().Namespaces().Get(ctx, name, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
	case err != nil:
		return fmt.Errorf("read namespace %s: %w", name, err)
	case live.DeletionTimestamp != nil:
		return fmt.Errorf("namespace %s is being deleted: wait until it is gone (kubectl get namespace %s), then deploy again", name, name)
	}
	if d.cluster.Istio && (err != nil || !injects(live.Labels) || live.Labels["istio-injection"] == "enabled") {
		labels["istio-injection"] = "enabled"
	}
	d.objects = slices.Insert(d.objects, 0, project.NewObject(map[string]any{
		"apiVersion": "v1", "kind": "Namespace", "metadata": map[string]any{"name": name, "labels": labels},
	}))
	return nil
}

// injects reports whether a namespace has a label about injection.
func injects(labels map[string]string) bool {
	return labels["istio-injection"] != "" || labels["istio.io/rev"] != "" || labels["istio.io/dataplane-mode"] != ""
}

// secrets returns the Secrets of polymesh.yaml. A value that is not available here is not an error if the cluster already has it:
// not every user who deploys needs to know every password.
func (d *deployment) secrets(ctx context.Context) ([]project.Object, error) {
	set, err := newSet(d.cluster, d.Project)
	if err != nil {
		return nil, err
	}
	var out []project.Object
	for _, s := range d.Project.Secrets {
		data := map[string]any{}
		var missing []string
		for key, from := range s.Data {
			value, ok, err := secretValue(d.Project, from)
			if err != nil {
				return nil, fmt.Errorf("secret %s, %s: %w", s.Name, key, err)
			}
			if !ok {
				missing = append(missing, key+" from "+from.Env+from.File)
				continue
			}
			data[key] = base64.StdEncoding.EncodeToString(value)
		}
		content := map[string]any{"apiVersion": "v1", "kind": "Secret", "type": s.Type, "data": data,
			"metadata": map[string]any{"name": s.Name, "namespace": d.Project.Namespace}}
		if s.Type == "" {
			content["type"] = "Opaque"
		}
		if len(missing) > 0 {
			live, err := d.cluster.Client.CoreV1().Secrets(d.Project.Namespace).Get(ctx, s.Name, metav1.GetOptions{})
			if apierrors.IsNotFound(err) {
				slices.Sort(missing)
				return nil, fmt.Errorf("secret %s has no value for %s: set the variable or create the file, or create the Secret yourself (kubectl create secret generic %s -n %s --from-file=…)",
					s.Name, strings.Join(missing, ", "), s.Name, d.Project.Namespace)
			}
			if err != nil {
				return nil, fmt.Errorf("read secret %s: %w", s.Name, err)
			}
			if len(missing) == len(s.Data) && live.Labels[apply.ApplysetPartOfLabel] != set.ID() {
				continue // a user created it: it is not ours to keep or remove
			}
			// A value that is not applied again would be removed.
			for key := range s.Data {
				if value, ok := live.Data[key]; ok && data[key] == nil {
					data[key] = base64.StdEncoding.EncodeToString(value)
				}
			}
		}
		out = append(out, project.NewObject(content))
	}
	return out, nil
}

func secretValue(p *project.Project, from project.SecretValue) (value []byte, ok bool, err error) {
	if from.Env != "" {
		text, ok := os.LookupEnv(from.Env)
		return []byte(text), ok && text != "", nil
	}
	value, err = os.ReadFile(p.Path(from.File))
	if os.IsNotExist(err) {
		return nil, false, nil
	}
	return value, err == nil, err
}

// dropReplicas removes the number of replicas from workloads that an autoscaler of the project scales: each deploy would undo the
// autoscaler's change.
func dropReplicas(objects []project.Object) {
	for _, hpa := range objects {
		if hpa.GroupVersionKind().GroupKind() != autoscalerKind {
			continue
		}
		kind, _, _ := unstructured.NestedString(hpa.Object, "spec", "scaleTargetRef", "kind")
		name, _, _ := unstructured.NestedString(hpa.Object, "spec", "scaleTargetRef", "name")
		for _, o := range objects {
			if o.GetKind() == kind && o.GetName() == name && o.GetNamespace() == hpa.GetNamespace() {
				unstructured.RemoveNestedField(o.Object, "spec", "replicas")
			}
		}
	}
}

// setNamespace gives an object the project's namespace if its kind has namespaces and it names none.
func (d *deployment) setNamespace(o project.Object) error {
	namespaced, err := d.namespaced(o)
	switch {
	case err != nil:
		return err
	case !namespaced && o.GetNamespace() != "":
		return fmt.Errorf("%s: a %s has no namespace: remove metadata.namespace", o.At("metadata", "namespace"), o.GetKind())
	case namespaced && o.GetNamespace() == "":
		o.SetNamespace(d.Project.Namespace)
	}
	return nil
}

// namespaced reports whether objects of a kind are in namespaces. The type of a kind that the project defines itself may not
// exist yet; then its definition decides.
func (d *deployment) namespaced(o project.Object) (bool, error) {
	m, err := d.cluster.Mapping(o)
	if err == nil {
		return cluster.Namespaced(m), nil
	}
	if crd := definition(d.objects, o); crd != nil {
		scope, _, _ := unstructured.NestedString(crd.Object, "spec", "scope")
		return scope == "Namespaced", nil
	}
	return false, err
}

// definition returns the manifest that defines the type of an object, nil if there is none.
func definition(objects []project.Object, o project.Object) *unstructured.Unstructured {
	for _, crd := range objects {
		group, _, _ := unstructured.NestedString(crd.Object, "spec", "group")
		kind, _, _ := unstructured.NestedString(crd.Object, "spec", "names", "kind")
		if crd.GroupVersionKind().GroupKind() == definitionKind && group == o.GroupVersionKind().Group && kind == o.GetKind() {
			return crd.Unstructured
		}
	}
	return nil
}
