package install

import (
	"fmt"
	"strings"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"polymesh.dev/polymesh/pkg/ssa"
)

// fieldManager is that of Istio's installer (operator/pkg/install). We use it too, so that a user's own `istioctl install` takes
// over our fields, and removes those that it no longer has.
const fieldManager = "istio-operator"

// fingerprint returns the fingerprint of what fieldManager applied.
func fingerprint(obj *unstructured.Unstructured) (string, error) {
	return ssa.Fingerprint(obj, fieldManager)
}

// objectKey returns the key of an object in the record.
func objectKey(gvk schema.GroupVersionKind, namespace, name string) string {
	return strings.Join([]string{gvk.Group, gvk.Version, gvk.Kind, namespace, name}, "/")
}

// parseKey is the inverse of objectKey.
func parseKey(key string) (gvk schema.GroupVersionKind, namespace, name string, err error) {
	p := strings.Split(key, "/")
	if len(p) != 5 {
		return gvk, "", "", fmt.Errorf("%q is not the key of an object", key)
	}
	return schema.GroupVersionKind{Group: p[0], Version: p[1], Kind: p[2]}, p[3], p[4], nil
}

// display returns a key in readable form.
func display(key string) string {
	gvk, namespace, name, err := parseKey(key)
	if err != nil {
		return key
	}
	if namespace == "" {
		return gvk.Kind + " " + name
	}
	return gvk.Kind + " " + namespace + "/" + name
}
