package install

import (
	"fmt"
	"strings"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"polymesh.dev/polymesh/pkg/ssa"
)

// fieldManager is under which name Istio's installer applies (operator/pkg/install). It is ours too, so that a user's
// own `istioctl install` takes our fields over, and drops those that it no longer has.
const fieldManager = "istio-operator"

// fingerprint is that of what fieldManager applied.
func fingerprint(obj *unstructured.Unstructured) (string, error) {
	return ssa.Fingerprint(obj, fieldManager)
}

// objectKey names an object in the record.
func objectKey(gvk schema.GroupVersionKind, namespace, name string) string {
	return strings.Join([]string{gvk.Group, gvk.Version, gvk.Kind, namespace, name}, "/")
}

// parseKey is the inverse of objectKey.
func parseKey(key string) (gvk schema.GroupVersionKind, namespace, name string, err error) {
	p := strings.Split(key, "/")
	if len(p) != 5 {
		return gvk, "", "", fmt.Errorf("%q is no object in a record", key)
	}
	return schema.GroupVersionKind{Group: p[0], Version: p[1], Kind: p[2]}, p[3], p[4], nil
}

// display is a key as people write it.
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
