package ssa

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"
	"sigs.k8s.io/structured-merge-diff/v6/fieldpath"
)

// partOf is the label of what `polymesh deploy` has applied (k8s.io/kubectl/pkg/cmd/apply, ApplysetPartOfLabel).
const partOf = "applyset.kubernetes.io/part-of"

// Deployed reports whether an object is a member of a project that is deployed: whatever else its metadata says, it is a user's.
func Deployed(obj metav1.Object) bool { return obj.GetLabels()[partOf] != "" }

// AppliedBy reports whether a field manager has applied an object. Labels alone prove nothing: `kubectl get -o yaml` and
// `kubectl apply` copy them with the rest of an object, and so do controllers.
func AppliedBy(obj metav1.Object, manager string) bool {
	return slices.ContainsFunc(obj.GetManagedFields(), func(m metav1.ManagedFieldsEntry) bool { return isApply(m, manager) })
}

func isApply(m metav1.ManagedFieldsEntry, manager string) bool {
	return m.Manager == manager && m.Operation == metav1.ManagedFieldsOperationApply && m.Subresource == ""
}

// Owns reports whether a manager's entry has a field at or below one of the paths.
func Owns(m metav1.ManagedFieldsEntry, paths ...fieldpath.Path) (bool, error) {
	if m.FieldsV1 == nil {
		return false, nil
	}
	var fields fieldpath.Set
	if err := fields.FromJSON(bytes.NewReader(m.FieldsV1.GetRawBytes())); err != nil {
		return false, fmt.Errorf("read the fields of manager %s: %w", m.Manager, err)
	}
	return slices.ContainsFunc(paths, func(path fieldpath.Path) bool {
		below := &fields
		for _, part := range path {
			below = below.WithPrefix(part)
		}
		return fields.Has(path) || !below.Empty()
	}), nil
}

// Fingerprint is a hash of the fields of a live object that a field manager applied, and of the object's UID. Exactly what
// another apply would overwrite goes in: defaults that a newer API server adds do not, nor do fields of other owners. A
// field that someone else changes leaves the manager's set (Kubernetes: server-side apply, conflicts), so that shows. The mesh
// records fingerprints in the cluster: another way to compute them makes every object look changed.
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

// TakeOver gives what an object has from an earlier version of the server, under the manager that all its parts shared, to the
// part of today. It returns the object as it is then, or nil where there is nothing to take. Without it the old manager would
// own every field forever, and one that is dropped would stay. What a user has deployed stays the user's: it is part of a
// project, or it was deployed after the part took the object over. It fails if the object has changed meanwhile.
//
// client-go's csaupgrade does the same for fields of updates (client-side apply), but not for applied ones.
func TakeOver(ctx context.Context, r dynamic.ResourceInterface, obj metav1.Object, manager string) (*unstructured.Unstructured, error) {
	patch, err := takeOverPatch(obj, manager)
	if err != nil || patch == nil {
		return nil, err
	}
	live, err := r.Patch(ctx, obj.GetName(), types.JSONPatchType, patch, metav1.PatchOptions{FieldManager: manager})
	if err != nil {
		return nil, fmt.Errorf("take over the fields of %s: %w", obj.GetName(), err)
	}
	return live, nil
}

// takeOverPatch is nil where there is nothing to take.
func takeOverPatch(obj metav1.Object, manager string) ([]byte, error) {
	managed := slices.Clone(obj.GetManagedFields())
	at := slices.IndexFunc(managed, func(m metav1.ManagedFieldsEntry) bool { return isApply(m, Deploy) })
	if at < 0 || Deployed(obj) || AppliedBy(obj, manager) {
		return nil, nil
	}
	managed[at].Manager = manager
	return json.Marshal([]map[string]any{
		{"op": "replace", "path": "/metadata/managedFields", "value": managed},
		{"op": "replace", "path": "/metadata/resourceVersion", "value": obj.GetResourceVersion()},
	})
}
