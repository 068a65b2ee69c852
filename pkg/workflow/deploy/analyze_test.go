package deploy

import (
	"strings"
	"testing"

	"istio.io/istio/pkg/config/analysis/analyzers"
	"istio.io/istio/pkg/config/analysis/local"
	"istio.io/istio/pkg/config/resource"
)

// A DestinationRule that comes with its Deployment selects pods that are not there yet.
func TestSubsetsOfPodsToCome(t *testing.T) {
	p := written(t, `
apiVersion: v1
kind: Service
metadata: {name: api, namespace: shop}
spec: {selector: {app: api}, ports: [{name: http, port: 80}]}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: api, namespace: shop}
spec:
  selector: {matchLabels: {app: api}}
  template:
    metadata: {labels: {app: api, version: v1}}
    spec: {containers: [{name: api, image: "api:1"}]}
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: api, namespace: shop}
spec:
  host: api.shop.svc.cluster.local
  subsets:
  - {name: v1, labels: {version: v1}}
  - {name: v2, labels: {version: v2}}
`)
	d := newDeployment(Options{Project: p})
	var err error
	if d.objects, _, err = p.Objects(); err != nil {
		t.Fatal(err)
	}
	sources, err := d.sources()
	if err != nil {
		t.Fatal(err)
	}
	analyzer := local.NewIstiodAnalyzer(analyzers.AllCombined(), resource.Namespace("shop"), istioNamespace, nil)
	if err := d.analyzeSources(t.Context(), analyzer, sources); err != nil {
		t.Fatal(err)
	}
	var said []string
	for _, f := range d.result.Findings {
		if strings.Contains(f.Message, "ubset") {
			said = append(said, f.At+" "+f.Message)
		}
	}
	if len(said) != 1 || !strings.Contains(said[0], "v2") || !strings.HasPrefix(said[0], "k8s/all.yaml:") {
		t.Errorf("of the subsets it says %q", said)
	}
}
