package install

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	"istio.io/istio/pkg/kube"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/version"
	"k8s.io/apimachinery/pkg/util/wait"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	"sigs.k8s.io/gateway-api/pkg/consts"
	"sigs.k8s.io/structured-merge-diff/v6/fieldpath"
	"sigs.k8s.io/yaml"

	"polymesh.dev/polymesh/pkg/condition"
	"polymesh.dev/polymesh/pkg/ssa"
)

// Bundle names a release of Gateway API's CRDs, as their annotations do.
type Bundle struct{ Version, Channel string }

func (b Bundle) String() string { return strings.TrimSpace(b.Version + " " + b.Channel) }

// gatewayAPI is the bundle that the build ships: of the version that Istio is built with, in the channel that has the fields of
// every feature that Istio supports (docs/mesh/gateway-api.md).
var gatewayAPI = Bundle{consts.BundleVersion, "experimental"}

// bundleOf reads a CRD's annotations.
func bundleOf(annotations map[string]string) Bundle {
	return Bundle{annotations[consts.BundleVersionAnnotation], annotations[consts.ChannelAnnotation]}
}

// GatewayCRD is a CRD of Gateway API in the cluster.
type GatewayCRD struct {
	Name string
	Bundle
	// Ours is true if the server applied it, and no one else owns a part of it.
	Ours bool
}

// DecideGatewayAPI is the complete rule of when the server changes the CRDs of Gateway API: all of them or none. It applies them if
// there are none, and replaces older ones if all are its own. recorded is what it applied before.
func DecideGatewayAPI(recorded string, live []GatewayCRD, want Bundle) Decision {
	if recorded == want.String() {
		return Decision{Keep, "they are as applied"}
	}
	var foreign, newer []string
	for _, crd := range live {
		switch {
		case !crd.Ours:
			foreign = append(foreign, crd.Name+" "+crd.Bundle.String())
		case newerThan(crd.Version, want.Version):
			newer = append(newer, crd.Name+" "+crd.Bundle.String())
		}
	}
	slices.Sort(foreign)
	slices.Sort(newer)
	switch {
	case len(foreign) > 0:
		return Decision{Leave, fmt.Sprintf("the user installed or changed them (%s)", list(foreign))}
	case len(newer) > 0:
		return Decision{Leave, fmt.Sprintf("those in the cluster are newer than %s (%s)", want, list(newer))}
	case len(live) == 0 && recorded != "":
		return Decision{Leave, "the user removed them"}
	case len(live) == 0:
		return Decision{Install, "there are none"}
	case recorded == "":
		return Decision{Finish, "their installation was interrupted"}
	default:
		return Decision{Upgrade, fmt.Sprintf("from %s to %s", recorded, want)}
	}
}

// newerThan returns false if one of them is not a version: then only the field managers decide.
func newerThan(have, want string) bool {
	h, errHave := version.ParseSemantic(have)
	w, errWant := version.ParseSemantic(want)
	return errHave == nil && errWant == nil && w.LessThan(h)
}

var crdResource = schema.GroupVersionResource{Group: apiextensionsv1.GroupName, Version: "v1", Resource: "customresourcedefinitions"}

// applyGatewayAPI applies the CRDs of Gateway API if the rule requires it, and records that.
func (m *mesh) applyGatewayAPI(ctx context.Context, client kube.CLIClient, record *Record) error {
	if m.crds == "" {
		return nil
	}
	if err := takeOverGatewayCRDs(ctx, client, record.GatewayAPI); err != nil {
		return err
	}
	if record.GatewayAPI == gatewayAPI.String() {
		return nil
	}
	live, err := gatewayCRDs(ctx, client)
	if err != nil {
		return err
	}
	d := DecideGatewayAPI(record.GatewayAPI, live, gatewayAPI)
	log := m.log.With("action", string(d.Action), "reason", d.Reason)
	if d.Action == Leave {
		log.Info("leaving the CRDs of Gateway API alone")
		return nil
	}
	begin := time.Now()
	objects, err := readGatewayAPI(m.crds)
	if err != nil {
		return err
	}
	g, applying := errgroup.WithContext(ctx)
	g.SetLimit(parallel)
	for _, obj := range objects {
		g.Go(func() error {
			// Without force: a field that a user has just taken over is a conflict.
			_, err := ssa.Apply(applying, client.Dynamic().Resource(crdResource), obj, ssa.Options{Manager: ownManager})
			if err != nil {
				return fmt.Errorf("apply CustomResourceDefinition %s: %w", obj.GetName(), err)
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	if err := awaitEstablished(ctx, client, objects); err != nil {
		return err
	}
	record.GatewayAPI = gatewayAPI.String()
	if err := writeRecord(ctx, client.Kube(), record); err != nil {
		return err
	}
	log.Info("applied the CRDs of Gateway API", "version", gatewayAPI.String(), "took", time.Since(begin).Round(time.Millisecond).String())
	return nil
}

// listGatewayCRDs returns all CRDs of Gateway API in the cluster.
func listGatewayCRDs(ctx context.Context, client kube.CLIClient) ([]metav1.PartialObjectMetadata, error) {
	crds, err := client.Metadata().Resource(crdResource).List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, fmt.Errorf("look for CRDs of Gateway API: %w", err)
	}
	return slices.DeleteFunc(crds.Items, func(crd metav1.PartialObjectMetadata) bool {
		_, group, _ := strings.Cut(crd.Name, ".")
		return group != "gateway.networking.k8s.io" && group != "gateway.networking.x-k8s.io"
	}), nil
}

// takeOverGatewayCRDs takes over the CRDs that an earlier version applied with the field manager of `polymesh deploy`: those of the
// recorded bundle.
func takeOverGatewayCRDs(ctx context.Context, client kube.CLIClient, recorded string) error {
	if recorded == "" {
		return nil
	}
	crds, err := listGatewayCRDs(ctx, client)
	if err != nil {
		return err
	}
	for _, crd := range crds {
		if bundleOf(crd.Annotations).String() != recorded {
			continue
		}
		if _, err := ssa.TakeOver(ctx, client.Dynamic().Resource(crdResource), &crd, ownManager); err != nil {
			return fmt.Errorf("CustomResourceDefinition %s: %w", crd.Name, err)
		}
	}
	return nil
}

// gatewayCRDs returns all CRDs of Gateway API in the cluster, and whether they are ours.
func gatewayCRDs(ctx context.Context, client kube.CLIClient) ([]GatewayCRD, error) {
	crds, err := listGatewayCRDs(ctx, client)
	if err != nil {
		return nil, err
	}
	var found []GatewayCRD
	for _, crd := range crds {
		ours, err := onlyOurs(crd.ManagedFields)
		if err != nil {
			return nil, fmt.Errorf("read the managed fields of CustomResourceDefinition %s: %w", crd.Name, err)
		}
		found = append(found, GatewayCRD{Name: crd.Name, Bundle: bundleOf(crd.Annotations), Ours: ours})
	}
	return found, nil
}

// onlyOurs reports whether the server applied a CRD, and no one else owns a part of its spec or of the annotations with its version.
// Other labels and annotations do not count, nor does the status.
func onlyOurs(managed []metav1.ManagedFieldsEntry) (bool, error) {
	specification := []fieldpath.Path{fieldpath.MakePathOrDie("spec"),
		fieldpath.MakePathOrDie("metadata", "annotations", consts.BundleVersionAnnotation), fieldpath.MakePathOrDie("metadata", "annotations", consts.ChannelAnnotation)}
	applied := false
	for _, m := range managed {
		if m.Manager == ownManager && m.Operation == metav1.ManagedFieldsOperationApply {
			applied = true
			continue
		}
		if others, err := ssa.Owns(m, specification...); err != nil || others {
			return false, err
		}
	}
	return applied, nil
}

// readGatewayAPI reads the shipped file, which contains only CRDs of one bundle.
func readGatewayAPI(file string) ([]*unstructured.Unstructured, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, fmt.Errorf("read the CRDs of Gateway API: %w", err)
	}
	defer f.Close()
	var objects []*unstructured.Unstructured
	for docs := utilyaml.NewYAMLReader(bufio.NewReader(f)); ; {
		doc, err := docs.Read()
		if errors.Is(err, io.EOF) {
			return objects, nil
		}
		obj := &unstructured.Unstructured{}
		if err == nil {
			err = yaml.Unmarshal(doc, &obj.Object)
		}
		if err != nil {
			return nil, fmt.Errorf("read the CRDs of Gateway API in %s: %w", file, err)
		}
		if len(obj.Object) == 0 {
			continue // comments
		}
		if have := bundleOf(obj.GetAnnotations()); obj.GetKind() != "CustomResourceDefinition" || have != gatewayAPI {
			return nil, fmt.Errorf("%s contains %s %s of %q, which is not a CRD of Gateway API %s", file, obj.GetKind(), obj.GetName(), have, gatewayAPI)
		}
		objects = append(objects, obj)
	}
}

// awaitEstablished waits until the API server serves the new types, so that a Gateway can be created once the server is ready.
func awaitEstablished(ctx context.Context, client kube.CLIClient, objects []*unstructured.Unstructured) error {
	missing := ""
	err := wait.PollUntilContextTimeout(ctx, 200*time.Millisecond, time.Minute, true, func(ctx context.Context) (bool, error) {
		for _, obj := range objects {
			crd, err := client.Ext().ApiextensionsV1().CustomResourceDefinitions().Get(ctx, obj.GetName(), metav1.GetOptions{})
			if err != nil {
				return false, fmt.Errorf("read CustomResourceDefinition %s: %w", obj.GetName(), err)
			}
			if !established(crd) {
				missing = obj.GetName()
				return false, nil
			}
		}
		return true, nil
	})
	if wait.Interrupted(err) {
		return fmt.Errorf("the API server does not serve CustomResourceDefinition %s: %w", missing, err)
	}
	return err
}

func established(crd *apiextensionsv1.CustomResourceDefinition) bool {
	return meta.IsStatusConditionTrue(condition.Of(crd.Status.Conditions), string(apiextensionsv1.Established))
}
