package converge

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"sync"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
)

// Field managers of the server's parts. Server-side apply knows owners by these names only, so each part has one of its
// own; `polymesh deploy` is "polymesh", which the parts were too in earlier versions.
const (
	Addon       = "polymesh-addon"
	Mesh        = "polymesh-mesh"
	ImagePolicy = "polymesh-image-policy"

	shared = "polymesh"
)

// partOf is the label of what `polymesh deploy` has applied (k8s.io/kubectl/pkg/cmd/apply, ApplysetPartOfLabel).
const partOf = "applyset.kubernetes.io/part-of"

// Deployed reports whether an object is a member of a project that someone deploys: whatever else it says, it is a user's.
func Deployed(obj metav1.Object) bool { return obj.GetLabels()[partOf] != "" }

// Fingerprint is a hash of the fields of a live object that a field manager applied, and of the object's UID. Exactly what
// another apply would overwrite goes in: defaults that a newer API server adds do not, nor do fields of other owners. A
// field that someone else changes leaves the manager's set (Kubernetes: server-side apply, conflicts), so that shows.
func Fingerprint(obj *unstructured.Unstructured, manager string) (string, error) {
	owned := map[string]any{}
	for _, m := range obj.GetManagedFields() {
		if m.Manager != manager || m.Operation != metav1.ManagedFieldsOperationApply || m.FieldsV1 == nil {
			continue
		}
		var fields map[string]any
		if err := json.Unmarshal(m.FieldsV1.GetRawBytes(), &fields); err != nil {
			return "", fmt.Errorf("read the managed fields of %s %s: %w", obj.GetKind(), obj.GetName(), err)
		}
		for k, v := range extract(fields, obj.Object).(map[string]any) {
			owned[k] = v
		}
	}
	b, err := json.Marshal(owned) // sorts the keys
	if err != nil {
		return "", fmt.Errorf("hash %s %s: %w", obj.GetKind(), obj.GetName(), err)
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

// Applied remembers what was applied in this run, by a key of the caller's, so that only what has changed since is applied
// again. The zero value is empty.
type Applied struct {
	mu     sync.Mutex
	prints map[string]string
}

// Note remembers an object as the API server returned it from an apply.
func (a *Applied) Note(key string, live any, manager string) error {
	print, err := fingerprintOf(live, manager)
	if err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.prints == nil {
		a.prints = map[string]string{}
	}
	a.prints[key] = print
	return nil
}

// Holds reports whether a live object is as it was applied. One that was not applied in this run is not.
func (a *Applied) Holds(key string, live any, manager string) (bool, error) {
	print, err := fingerprintOf(live, manager)
	if err != nil {
		return false, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.prints[key] == print, nil
}

func fingerprintOf(live any, manager string) (string, error) {
	if obj, ok := live.(*unstructured.Unstructured); ok {
		return Fingerprint(obj, manager)
	}
	content, err := runtime.DefaultUnstructuredConverter.ToUnstructured(live)
	if err != nil {
		return "", err
	}
	return Fingerprint(&unstructured.Unstructured{Object: content}, manager)
}

// Disown is the JSON patch that gives what an object has from an earlier version of the server, under the manager that all
// its parts shared, to the part of today; nil where there is nothing of it. Without it the old manager would own every field
// for ever, and one that is dropped would stay. What a user has deployed stays the user's: it is part of a project, or it was
// deployed after the part took the object over. The patch fails if the object has changed meanwhile. It does for applied
// fields what client-go's csaupgrade does for others.
func Disown(obj metav1.Object, manager string) ([]byte, error) {
	managed := slices.Clone(obj.GetManagedFields())
	at := slices.IndexFunc(managed, func(m metav1.ManagedFieldsEntry) bool { return isApply(m, shared) })
	if at < 0 || Deployed(obj) || slices.ContainsFunc(managed, func(m metav1.ManagedFieldsEntry) bool { return isApply(m, manager) }) {
		return nil, nil
	}
	managed[at].Manager = manager
	return json.Marshal([]map[string]any{
		{"op": "replace", "path": "/metadata/managedFields", "value": managed},
		{"op": "replace", "path": "/metadata/resourceVersion", "value": obj.GetResourceVersion()},
	})
}

func isApply(m metav1.ManagedFieldsEntry, manager string) bool {
	return m.Manager == manager && m.Operation == metav1.ManagedFieldsOperationApply && m.Subresource == ""
}
