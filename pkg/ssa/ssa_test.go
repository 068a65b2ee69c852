package ssa

import (
	"context"
	"encoding/json"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic/fake"
	clienttesting "k8s.io/client-go/testing"
	"sigs.k8s.io/structured-merge-diff/v6/fieldpath"
)

func entry(manager string, operation metav1.ManagedFieldsOperationType) metav1.ManagedFieldsEntry {
	return metav1.ManagedFieldsEntry{Manager: manager, Operation: operation, APIVersion: "v1", FieldsType: "FieldsV1", FieldsV1: metav1.NewFieldsV1(`{"f:data":{"f:a":{}}}`)}
}

func TestTakeOver(t *testing.T) {
	const apply, update = metav1.ManagedFieldsOperationApply, metav1.ManagedFieldsOperationUpdate
	status := entry(Deploy, apply)
	status.Subresource = "status"
	for what, c := range map[string]struct {
		managed []metav1.ManagedFieldsEntry
		labels  map[string]string
		taken   bool
	}{
		"an earlier version's":          {[]metav1.ManagedFieldsEntry{entry("kubectl", update), entry(Deploy, apply)}, nil, true},
		"what a user deploys":           {[]metav1.ManagedFieldsEntry{entry(Deploy, apply)}, map[string]string{partOf: "applyset-x-v1"}, false},
		"deployed after it was taken":   {[]metav1.ManagedFieldsEntry{entry(Addon, apply), entry(Deploy, apply)}, nil, false},
		"an update under the name":      {[]metav1.ManagedFieldsEntry{entry(Deploy, update)}, nil, false},
		"a status":                      {[]metav1.ManagedFieldsEntry{status}, nil, false},
		"another part's":                {[]metav1.ManagedFieldsEntry{entry(Mesh, apply)}, nil, false},
		"an object without any manager": {},
	} {
		obj := &unstructured.Unstructured{}
		obj.SetName("x")
		obj.SetResourceVersion("7")
		obj.SetLabels(c.labels)
		obj.SetManagedFields(c.managed)
		patch, err := takeOverPatch(obj, Addon)
		if err != nil || (patch != nil) != c.taken {
			t.Errorf("%s: %s, %v", what, patch, err)
			continue
		}
		if patch == nil {
			continue
		}
		var ops []struct {
			Path  string
			Value json.RawMessage
		}
		if err := json.Unmarshal(patch, &ops); err != nil {
			t.Fatal(err)
		}
		var managed []metav1.ManagedFieldsEntry
		if err := json.Unmarshal(ops[0].Value, &managed); err != nil {
			t.Fatal(err)
		}
		if len(managed) != 2 || managed[0].Manager != "kubectl" || managed[1].Manager != Addon || string(ops[1].Value) != `"7"` {
			t.Errorf("%s: %s", what, patch)
		}
	}
}

// TestApply has an API server that refuses the first requests. Whether it stores what is applied, and for whom, the tests of
// those who apply show on a real one.
func TestApply(t *testing.T) {
	resource := schema.GroupVersionResource{Version: "v1", Resource: "configmaps"}
	conflict := apierrors.NewConflict(resource.GroupResource(), "x", errors.New("written meanwhile"))
	unavailable := apierrors.NewInternalError(errors.New(`failed calling webhook "a.example.com": connection refused`))
	denied := apierrors.NewInternalError(errors.New(`failed calling webhook "a.example.com": admission webhook denied the request`))
	for name, c := range map[string]struct {
		options Options
		refuse  error
		times   int // that it is refused
		want    error
		asked   int
		took    time.Duration
	}{
		"at once":                        {Options{}, nil, 0, nil, 1, 0},
		"written meanwhile":              {Options{Force: true}, conflict, 2, nil, 3, 2 * conflictPause},
		"written all the time":           {Options{Force: true}, conflict, 100, conflict, conflictTries + 1, conflictTries * conflictPause},
		"another's fields without force": {Options{}, conflict, 1, conflict, 1, 0},
		"a webhook that starts":          {Options{WebhookWait: time.Minute}, unavailable, 10, nil, 11, 10 * webhookPause},
		"a webhook that never answers":   {Options{WebhookWait: time.Minute}, unavailable, 1000, unavailable, 61, time.Minute},
		"a webhook, without waiting":     {Options{}, unavailable, 1, unavailable, 1, 0},
		"a webhook that refuses":         {Options{WebhookWait: time.Minute}, denied, 1, denied, 1, 0},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				client := fake.NewSimpleDynamicClient(runtime.NewScheme())
				asked := 0
				client.PrependReactor("patch", "configmaps", func(action clienttesting.Action) (bool, runtime.Object, error) {
					patch, ok := action.(clienttesting.PatchActionImpl)
					if !ok || patch.PatchType != types.ApplyPatchType || *patch.PatchOptions.Force != c.options.Force || patch.PatchOptions.FieldManager != "m" {
						t.Errorf("the request is %+v", action)
					}
					if asked++; asked <= c.times {
						return true, nil, c.refuse
					}
					return true, &unstructured.Unstructured{}, nil
				})
				obj := &unstructured.Unstructured{Object: map[string]any{"apiVersion": "v1", "kind": "ConfigMap", "metadata": map[string]any{"name": "x"}}}
				c.options.Manager = "m"
				begin := time.Now()
				_, err := Apply(t.Context(), client.Resource(resource).Namespace("n"), obj, c.options)
				if !errors.Is(err, c.want) || asked != c.asked || time.Since(begin) != c.took {
					t.Errorf("%v after %d requests in %s", err, asked, time.Since(begin))
				}
			})
		})
	}
}

// What is given up ends the wait for a webhook.
func TestApplyEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := fake.NewSimpleDynamicClient(runtime.NewScheme())
		client.PrependReactor("patch", "configmaps", func(clienttesting.Action) (bool, runtime.Object, error) {
			return true, nil, apierrors.NewInternalError(errors.New("failed calling webhook: connection refused"))
		})
		enough := errors.New("enough")
		ctx, cancel := context.WithTimeoutCause(t.Context(), 3*time.Second, enough)
		defer cancel()
		obj := &unstructured.Unstructured{Object: map[string]any{"apiVersion": "v1", "kind": "ConfigMap", "metadata": map[string]any{"name": "x"}}}
		_, err := Apply(ctx, client.Resource(schema.GroupVersionResource{Version: "v1", Resource: "configmaps"}), obj, Options{Manager: "m", WebhookWait: time.Hour})
		if !errors.Is(err, enough) {
			t.Errorf("it ends with %v", err)
		}
	})
}

func TestOwns(t *testing.T) {
	spec, note := fieldpath.MakePathOrDie("spec"), fieldpath.MakePathOrDie("metadata", "annotations", "a/b")
	for fields, want := range map[string]bool{
		`{"f:spec":{"f:replicas":{}}}`: true,
		`{"f:spec":{}}`:                true,
		`{"f:spec":{"f:list":{"k:{\"name\":\"x\"}":{".":{}}}}}`:  true,
		`{"f:metadata":{"f:annotations":{".":{},"f:a/b":{}}}}`:   true,
		`{"f:metadata":{"f:annotations":{".":{},"f:other":{}}}}`: false,
		`{"f:status":{"f:spec":{}}}`:                             false,
		`{}`:                                                     false,
	} {
		owns, err := Owns(metav1.ManagedFieldsEntry{FieldsV1: metav1.NewFieldsV1(fields)}, spec, note)
		if err != nil || owns != want {
			t.Errorf("%s: %v, %v", fields, owns, err)
		}
	}
	if owns, err := Owns(metav1.ManagedFieldsEntry{}, spec); owns || err != nil {
		t.Errorf("no fields: %v, %v", owns, err)
	}
	if _, err := Owns(metav1.ManagedFieldsEntry{FieldsV1: metav1.NewFieldsV1("x")}, spec); err == nil {
		t.Error("what is no field set is taken for one")
	}
}
