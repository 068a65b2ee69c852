package deploy

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"polymesh.dev/polymesh/pkg/diagnose"
	"polymesh.dev/polymesh/pkg/workflow/project"
)

var (
	serviceKind             = schema.GroupKind{Kind: "Service"}
	destinationRuleKind     = schema.GroupKind{Group: "networking.istio.io", Kind: "DestinationRule"}
	peerAuthenticationKind  = schema.GroupKind{Group: "security.istio.io", Kind: "PeerAuthentication"}
	peerAuthenticationsType = schema.GroupVersionResource{Group: "security.istio.io", Version: "v1", Resource: "peerauthentications"}
)

// plainText finds DestinationRules of the project that disable mTLS to a service that requires it. Istio's analyzers do not check
// that. A rule for many hosts (*.example.com) is ignored: it may be for others.
func (d *deployment) plainText(ctx context.Context) ([]diagnose.Finding, error) {
	rules := slices.DeleteFunc(slices.Clone(d.objects), func(o project.Object) bool {
		return o.GroupVersionKind().GroupKind() != destinationRuleKind || len(noMTLS(o.Object)) == 0
	})
	if len(rules) == 0 {
		return nil, nil
	}
	policies, err := d.policies(ctx)
	if err != nil {
		return nil, err
	}
	var found []diagnose.Finding
	for _, rule := range rules {
		host, _, _ := unstructured.NestedString(rule.Object, "spec", "host")
		name, namespace := serviceOfHost(host, rule.GetNamespace())
		selector, err := d.selector(ctx, name, namespace)
		if err != nil {
			return nil, err
		}
		policy := strict(policies, namespace, selector)
		if len(selector) == 0 || policy == "" {
			continue
		}
		path := noMTLS(rule.Object)
		found = append(found, diagnose.Finding{Reason: diagnose.MTLSMismatch, Object: rule.ID(), At: rule.At(path...),
			Message: fmt.Sprintf("clients of %s send with TLS mode %v, but its pods accept only mTLS (STRICT, by %s): requests fail with 503", host, valueAt(rule.Object, path), policy),
			Advice:  "use mode ISTIO_MUTUAL, or omit tls, which does the same; or set the PeerAuthentication to PERMISSIVE"})
	}
	return found, nil
}

// noMTLS returns the path of the first TLS mode in a DestinationRule that is not Istio's mTLS.
func noMTLS(rule map[string]any) []string {
	policies := [][]string{{"spec", "trafficPolicy"}}
	ports, _, _ := unstructured.NestedSlice(rule, "spec", "trafficPolicy", "portLevelSettings")
	for i := range ports {
		policies = append(policies, []string{"spec", "trafficPolicy", "portLevelSettings", strconv.Itoa(i)})
	}
	subsets, _, _ := unstructured.NestedSlice(rule, "spec", "subsets")
	for i := range subsets {
		policies = append(policies, []string{"spec", "subsets", strconv.Itoa(i), "trafficPolicy"})
	}
	for _, path := range policies {
		path = append(path, "tls", "mode")
		if mode, _ := valueAt(rule, path).(string); mode == "DISABLE" || mode == "SIMPLE" {
			return path
		}
	}
	return nil
}

// valueAt returns the value at a path, which may lead through lists.
func valueAt(value any, path []string) any {
	for _, part := range path {
		switch at := value.(type) {
		case map[string]any:
			value = at[part]
		case []any:
			i, err := strconv.Atoi(part)
			if err != nil || i < 0 || i >= len(at) {
				return nil
			}
			value = at[i]
		default:
			return nil
		}
	}
	return value
}

// serviceOfHost returns the service that a host in Istio's configuration of a namespace refers to: "api", "api.shop", "api.shop.svc.cluster.local".
func serviceOfHost(host, namespace string) (name, in string) {
	parts := strings.Split(host, ".")
	switch {
	case len(parts) == 1:
		return host, namespace
	case parts[0] != "*" && (len(parts) == 2 || parts[2] == "svc"):
		return parts[0], parts[1]
	}
	return "", ""
}

// policies returns the PeerAuthentications as they will be: those of the cluster, with those of the project in their place.
func (d *deployment) policies(ctx context.Context) ([]*unstructured.Unstructured, error) {
	live, err := d.cluster.Dynamic.Resource(peerAuthenticationsType).List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, fmt.Errorf("list the PeerAuthentications: %w", err)
	}
	var out []*unstructured.Unstructured
	own := map[string]bool{}
	for _, o := range d.objects {
		if o.GroupVersionKind().GroupKind() == peerAuthenticationKind {
			out = append(out, o.Unstructured)
			own[o.ID()] = true
		}
	}
	for i := range live.Items {
		u := &live.Items[i]
		if !own[project.ID(peerAuthenticationKind, u.GetNamespace(), u.GetName())] {
			out = append(out, u)
		}
	}
	return out, nil
}

// strict returns the policy that requires mTLS for the pods of a namespace with these labels; empty if there is none. The most
// specific policy decides: that with a selector, then the namespace's, then the mesh's.
func strict(policies []*unstructured.Unstructured, namespace string, pod map[string]string) string {
	for _, level := range []func(ns string, selector map[string]string) bool{
		func(ns string, selector map[string]string) bool {
			return ns == namespace && len(selector) > 0 && labels.SelectorFromSet(selector).Matches(labels.Set(pod))
		},
		func(ns string, selector map[string]string) bool { return ns == namespace && len(selector) == 0 },
		func(ns string, selector map[string]string) bool { return ns == istioNamespace && len(selector) == 0 },
	} {
		for _, p := range policies {
			selector, _, _ := unstructured.NestedStringMap(p.Object, "spec", "selector", "matchLabels")
			mode, _, _ := unstructured.NestedString(p.Object, "spec", "mtls", "mode")
			if !level(p.GetNamespace(), selector) || mode == "" || mode == "UNSET" {
				continue
			}
			if mode != "STRICT" {
				return ""
			}
			return project.ID(peerAuthenticationKind, p.GetNamespace(), p.GetName())
		}
	}
	return ""
}

// selector returns that of a service, from the manifests or the cluster. It is empty if the service does not exist, or its
// namespace gets no sidecars: a PeerAuthentication has no effect on a pod without one.
func (d *deployment) selector(ctx context.Context, name, namespace string) (map[string]string, error) {
	if name == "" {
		return nil, nil
	}
	if namespace != d.Project.Namespace {
		live, err := d.cluster.Client.CoreV1().Namespaces().Get(ctx, namespace, metav1.GetOptions{})
		if err != nil || live.Labels["istio-injection"] != "enabled" && live.Labels["istio.io/rev"] == "" {
			return nil, ignoreNotFound(err)
		}
	}
	for _, o := range d.objects {
		if o.GroupVersionKind().GroupKind() == namespaceKind && o.GetName() == namespace && o.GetLabels()["istio-injection"] == "disabled" {
			return nil, nil
		}
		if o.GroupVersionKind().GroupKind() == serviceKind && o.GetName() == name && o.GetNamespace() == namespace {
			selector, _, err := unstructured.NestedStringMap(o.Object, "spec", "selector")
			return selector, err
		}
	}
	live, err := d.cluster.Client.CoreV1().Services(namespace).Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return nil, ignoreNotFound(err)
	}
	return live.Spec.Selector, nil
}

func ignoreNotFound(err error) error {
	if apierrors.IsNotFound(err) {
		return nil
	}
	return err
}
