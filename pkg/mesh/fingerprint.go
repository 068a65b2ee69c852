package mesh

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// fieldManager is under which name Istio's installer applies (operator/pkg/install). It is ours too, so that a user's
// own `istioctl install` takes our fields over, and drops those that it no longer has.
const fieldManager = "istio-operator"

// fingerprint is a hash of the fields of a live object that were applied by fieldManager, and of its UID. Exactly what
// another apply would overwrite goes in: defaults that a newer API server adds do not, nor do fields of other owners. A
// field that somebody else changes leaves the manager's set (Kubernetes: server-side apply, conflicts), so that shows.
func fingerprint(obj *unstructured.Unstructured) (string, error) {
	owned := map[string]any{}
	for _, m := range obj.GetManagedFields() {
		if m.Manager != fieldManager || m.Operation != metav1.ManagedFieldsOperationApply || m.FieldsV1 == nil {
			continue
		}
		var fields map[string]any
		if err := json.Unmarshal(m.FieldsV1.GetRawBytes(), &fields); err != nil {
			return "", fmt.Errorf("read the managed fields of %s: %w", objectKey(obj.GroupVersionKind(), obj.GetNamespace(), obj.GetName()), err)
		}
		for k, v := range extract(fields, obj.Object).(map[string]any) {
			owned[k] = v
		}
	}
	b, err := json.Marshal(owned) // sorts the keys
	if err != nil {
		return "", fmt.Errorf("hash %s: %w", obj.GetName(), err)
	}
	sum := sha256.Sum256(append([]byte(obj.GetUID()), b...))
	return hex.EncodeToString(sum[:8]), nil
}

// extract returns the part of value that fields, a FieldsV1 tree, names. The format is that of
// sigs.k8s.io/structured-merge-diff/fieldpath: "f:name" is a field, `k:{"name":"x"}` the list item with these keys,
// "v:value" a member of a set, "." the thing itself; an empty tree is a leaf and owns its whole value.
func extract(fields map[string]any, value any) any {
	if len(fields) == 0 {
		return value
	}
	out := map[string]any{}
	for path, sub := range fields {
		tree, _ := sub.(map[string]any)
		kind, name, _ := strings.Cut(path, ":")
		switch kind {
		case "f":
			if m, ok := value.(map[string]any); ok {
				if v, ok := m[name]; ok {
					out[path] = extract(tree, v)
				}
			}
		case "k":
			if item := itemWith(value, name); item != nil {
				out[path] = extract(tree, item)
			}
		case "v":
			out[path] = true
		}
	}
	return out
}

// itemWith finds the item of a list that has the keys given as a JSON object.
func itemWith(list any, keys string) any {
	var want map[string]any
	if err := json.Unmarshal([]byte(keys), &want); err != nil {
		return nil
	}
	items, _ := list.([]any)
	for _, item := range items {
		m, ok := item.(map[string]any)
		if !ok {
			continue
		}
		found := true
		for k, v := range want {
			// A key that the object leaves out has its default (port and protocol of a Service), so it cannot differ.
			if got, ok := m[k]; ok && !sameJSON(got, v) {
				found = false
			}
		}
		if found {
			return item
		}
	}
	return nil
}

func sameJSON(a, b any) bool {
	x, errX := json.Marshal(a)
	y, errY := json.Marshal(b)
	return errX == nil && errY == nil && bytes.Equal(x, y)
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
