package install

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"

	"istio.io/istio/manifests"
	"istio.io/istio/operator/pkg/values"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"polymesh.dev/polymesh/pkg/ssa"
)

// The provider of traces: the store of metrics, logs and traces, by the Service of the add-on observe-access (pkg/controlplane/addon). Istio's
// profile demo has the same one, for the default domain of a cluster.
const (
	traceProvider = "jaeger"
	traceService  = "jaeger-collector.istio-system.svc."
	tracePort     = 4317
	defaultDomain = "cluster.local"
)

// traceProviders returns the list of providers with that of traces, nil if Istio's settings have it, or have a list that is a user's. It is part of
// the settings also where there is no store: without a Telemetry resource that names it, a provider has no effect, and Istio is not
// installed anew when the store is turned on.
func traceProviders(merged values.Map) ([]any, error) {
	const path = "meshConfig.extensionProviders"
	if _, users := merged.GetPath("spec.values." + path); users {
		return nil, nil
	}
	var providers []any
	// Lists replace each other, and those of a profile of values are added by the chart.
	if name := cmp.Or(merged.GetPathString("spec.values.profile"), merged.GetPathString("spec.values.global.profile")); name != "" {
		file := "charts/istio-control/istio-discovery/files/profile-" + name + ".yaml"
		text, err := fs.ReadFile(manifests.BuiltinOrDir(merged.GetPathString("spec.installPackagePath")), file)
		if err != nil {
			return nil, nil // which the chart reports
		}
		profile, err := values.MapFromYaml(text)
		if err != nil {
			return nil, fmt.Errorf("read Istio's profile %s: %w", name, err)
		}
		list, _ := profile.GetPath(path)
		providers, _ = list.([]any)
	}
	service := traceService + cmp.Or(merged.GetPathString("spec.values.global.proxy.clusterDomain"), defaultDomain)
	for _, p := range providers {
		if p, ok := p.(map[string]any); !ok || p["name"] != traceProvider {
			continue
		} else if o, ok := p["opentelemetry"].(map[string]any); ok && o["service"] == traceService+defaultDomain && o["service"] != service {
			o["service"] = service
			return providers, nil
		}
		return nil, nil
	}
	return append(providers, map[string]any{"name": traceProvider, "opentelemetry": map[string]any{"service": service, "port": tracePort}}), nil
}

// telemetryName is the Telemetry resource in istioNamespace by which the whole mesh is traced and logs its requests.
const telemetryName = "polymesh-tracing"

var telemetryKind = schema.GroupVersionKind{Group: "telemetry.istio.io", Version: "v1", Kind: "Telemetry"}

// Telemetry is what the store gets from the proxies without a line of configuration.
type Telemetry struct {
	// Traces are spans of each request. The proxies sample all of them, and the store drops whole traces above its limit: what a proxy
	// does not sample is lost also where there is little traffic, which is most of the time.
	Traces bool
	// AccessLogs are lines on the proxies' standard output, also with profiles that have none.
	AccessLogs bool
}

// spec returns the resource's spec; nil if there is nothing in it.
func (t Telemetry) spec() map[string]any {
	spec := map[string]any{}
	if t.Traces {
		spec["tracing"] = []any{map[string]any{
			"providers": []any{map[string]any{"name": traceProvider}}, "randomSamplingPercentage": int64(100),
		}}
	}
	if t.AccessLogs {
		// The provider that every mesh has: its format is that of the mesh configuration.
		spec["accessLogging"] = []any{map[string]any{"providers": []any{map[string]any{"name": "envoy"}}}}
	}
	if len(spec) == 0 {
		return nil
	}
	return spec
}

// TelemetryRecord is what the server remembers of the resource.
type TelemetryRecord struct {
	// Spec is the hash of the spec that was applied; empty if it was never applied, or was removed by the server.
	Spec string `json:"spec,omitempty"`
	// Print is the fingerprint of the object.
	Print string `json:"print,omitempty"`
}

// ObservedTelemetry is the state of the cluster that the decision depends on.
type ObservedTelemetry struct {
	// Print is the fingerprint of the live object, Live whether there is one, and Ours whether the server has applied it.
	Print string
	Live  bool
	Ours  bool
	// Others are Telemetry resources for the whole mesh: without a selector, in istioNamespace.
	Others []string
}

// Remove is the action on what is no longer wanted.
const Remove Action = "remove"

// DecideTelemetry is the complete rule of when the server changes the resource: it creates it once, and changes and removes what no one else
// has changed. Istio uses the oldest of several resources for the whole mesh, so it makes way for a user's.
func DecideTelemetry(record TelemetryRecord, o ObservedTelemetry, want string) Decision {
	untouched := o.Live && o.Ours && (record.Spec == "" || record.Print == o.Print)
	switch {
	case o.Live && !untouched:
		return Decision{Leave, "the user created or changed it"}
	case o.Live && want == "":
		return Decision{Remove, "the store is off"}
	case o.Live && len(o.Others) > 0:
		return Decision{Remove, fmt.Sprintf("the user has another one for the whole mesh (%s)", list(o.Others))}
	case o.Live && record.Spec == "":
		return Decision{Finish, "it was created, and not recorded"}
	case o.Live && record.Spec != want:
		return Decision{Upgrade, "its settings differ"}
	case o.Live:
		return Decision{Keep, "it is as applied"}
	case want == "":
		return Decision{Keep, "the store is off"}
	case record.Spec != "":
		return Decision{Leave, "the user removed it"}
	case len(o.Others) > 0:
		return Decision{Leave, fmt.Sprintf("the user has one for the whole mesh (%s)", list(o.Others))}
	default:
		return Decision{Install, "there is none"}
	}
}

// telemetry brings the resource to the desired state, and records that.
func (r *restorer) telemetry(ctx context.Context) error {
	record, err := readRecord(ctx, r.client.Kube())
	if err != nil || record == nil || record.Owner != Ours || record.Phase != Installed || record.Objects[ownPlane] == "" {
		return err
	}
	spec := r.mesh.wanted.spec()
	if spec == nil && record.Telemetry == (TelemetryRecord{}) {
		return nil
	}
	resource, err := r.client.DynamicClientFor(telemetryKind, nil, istioNamespace)
	if err != nil {
		return fmt.Errorf("look for Telemetry resources: %w", err)
	}
	all, err := resource.List(ctx, metav1.ListOptions{})
	if apierrors.IsNotFound(err) {
		return nil // the user removed the type
	}
	if err != nil {
		return fmt.Errorf("look for Telemetry resources: %w", err)
	}
	var live *unstructured.Unstructured
	var o ObservedTelemetry
	for i := range all.Items {
		switch obj := &all.Items[i]; {
		case obj.GetName() == telemetryName:
			live = obj
		case meshWide(obj) && obj.GetDeletionTimestamp() == nil:
			o.Others = append(o.Others, obj.GetName())
		}
	}
	slices.Sort(o.Others)
	if live != nil {
		o.Live, o.Ours = true, ssa.AppliedBy(live, ssa.Observe)
		if o.Print, err = ssa.Fingerprint(live, ssa.Observe); err != nil {
			return err
		}
	}
	want, err := hashOf(spec)
	if err != nil {
		return err
	}
	d := DecideTelemetry(record.Telemetry, o, want)
	r.noteTelemetry(d, o, spec != nil)
	log := r.log.With("object", "Telemetry "+istioNamespace+"/"+telemetryName, "reason", d.Reason)
	switch d.Action {
	case Install, Upgrade, Finish:
		obj := &unstructured.Unstructured{Object: map[string]any{"spec": spec}}
		obj.SetGroupVersionKind(telemetryKind)
		obj.SetNamespace(istioNamespace)
		obj.SetName(telemetryName)
		if live != nil {
			obj.SetUID(live.GetUID())
			obj.SetResourceVersion(live.GetResourceVersion())
		}
		// Without force: a field that a user has just set is a conflict.
		applied, err := ssa.Apply(ctx, resource, obj, ssa.Options{Manager: ssa.Observe})
		if err != nil {
			return fmt.Errorf("apply Telemetry %s/%s: %w", istioNamespace, telemetryName, err)
		}
		print, err := ssa.Fingerprint(applied, ssa.Observe)
		if err != nil {
			return err
		}
		record.Telemetry = TelemetryRecord{Spec: want, Print: print}
		log.Info("applied")
	case Remove:
		uid, version := live.GetUID(), live.GetResourceVersion()
		err := resource.Delete(ctx, telemetryName, metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &uid, ResourceVersion: &version}})
		if err != nil && !apierrors.IsNotFound(err) {
			return fmt.Errorf("remove Telemetry %s/%s: %w", istioNamespace, telemetryName, err)
		}
		// It comes back when there is no reason any more.
		record.Telemetry = TelemetryRecord{}
		log.Info("removed")
	default:
		return nil
	}
	return writeRecord(ctx, r.client.Kube(), record)
}

// meshWide reports whether a Telemetry resource of the root namespace applies to the whole mesh.
func meshWide(obj *unstructured.Unstructured) bool {
	labels, _, _ := unstructured.NestedMap(obj.Object, "spec", "selector", "matchLabels")
	_, one, _ := unstructured.NestedFieldNoCopy(obj.Object, "spec", "targetRef")
	_, several, _ := unstructured.NestedFieldNoCopy(obj.Object, "spec", "targetRefs")
	return len(labels) == 0 && !one && !several
}

// hashOf is empty without a spec.
func hashOf(spec map[string]any) (string, error) {
	if spec == nil {
		return "", nil
	}
	text, err := json.Marshal(spec) // sorts the keys
	if err != nil {
		return "", fmt.Errorf("encode Telemetry %s: %w", telemetryName, err)
	}
	sum := sha256.Sum256(text)
	return hex.EncodeToString(sum[:8]), nil
}

// noteTelemetry tells what a user's resource means for the store.
func (m *mesh) noteTelemetry(d Decision, o ObservedTelemetry, wanted bool) {
	note := ""
	if wanted && len(o.Others) > 0 && (d.Action == Leave || d.Action == Remove) {
		note = fmt.Sprintf("traces and access logs are those of Telemetry %s/%s, which is a user's", istioNamespace, strings.Join(o.Others, ", "))
	}
	m.note.Store(&note)
}

// round is one round of the loop: the record has one writer.
func (r *restorer) round(ctx context.Context) error {
	return errors.Join(r.sync(ctx), r.telemetry(ctx))
}
