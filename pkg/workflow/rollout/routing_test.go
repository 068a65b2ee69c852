package rollout

import (
	"maps"
	"slices"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	dynamicfake "k8s.io/client-go/dynamic/fake"
	"k8s.io/client-go/kubernetes/fake"

	"polymesh.dev/polymesh/pkg/workflow/cluster"
)

const serviceText = `
apiVersion: v1
kind: Service
metadata: {name: api, namespace: shop}
spec:
  selector: {app: api}
  ports: [{name: http, port: 80}, {name: tcp-raw, port: 9000}, {name: dns, port: 53, protocol: UDP, appProtocol: tcp}]
`

// istiodText is of a cluster whose domain is not the default one.
const istiodText = `
apiVersion: apps/v1
kind: Deployment
metadata: {name: istiod, namespace: istio-system, labels: {app: istiod}}
spec:
  selector: {matchLabels: {app: istiod}}
  template:
    metadata: {labels: {app: istiod}}
    spec:
      containers:
      - {name: discovery, image: pilot, args: [discovery, --domain, example.test]}
`

// readRouting reads how requests come to the Deployment of stableText, with a Service and these objects of Istio and of
// Gateway API.
func readRouting(t *testing.T, service, pods string, objects ...string) (*routing, error) {
	t.Helper()
	stable, s := &appsv1.Deployment{}, &corev1.Service{}
	decode(t, stableText, stable)
	decode(t, service, s)
	istiod := &appsv1.Deployment{}
	decode(t, istiodText, istiod)
	typed := []runtime.Object{stable, s, istiod}
	if pods != "" {
		pod := &corev1.Pod{}
		decode(t, pods, pod)
		typed = append(typed, pod)
	}
	var others []runtime.Object
	for _, o := range objects {
		others = append(others, route(t, o))
	}
	kinds := map[schema.GroupVersionResource]string{virtualServices: "VirtualServiceList", destinationRules: "DestinationRuleList",
		gatewayRoutes[0]: "HTTPRouteList", gatewayRoutes[1]: "GRPCRouteList"}
	c := &cluster.Cluster{Client: fake.NewClientset(typed...), Dynamic: dynamicfake.NewSimpleDynamicClientWithCustomListKinds(runtime.NewScheme(), kinds, others...)}
	d := &driver{Options: Options{Cluster: c, Namespace: "shop", Name: "api"}, state: state()}
	return d.checkedRouting(t.Context(), stable)
}

func virtualService(name, namespace, spec string) string {
	return "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {name: " + name + ", namespace: " + namespace + "}\nspec: " + spec
}

func destinationRule(name, namespace, spec string) string {
	return "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {name: " + name + ", namespace: " + namespace + "}\nspec: " + spec
}

func TestRouting(t *testing.T) {
	outside := virtualService("outside", "web", "{hosts: [x], gateways: [g], http: [{route: [{destination: {host: api.shop.svc.cluster.local, subset: v1}}]}]}")
	subsets := destinationRule("api", "shop", "{host: api, exportTo: [.], subsets: [{name: v1, labels: {version: v1}}, {name: v2, labels: {version: v2}}, {name: unused, labels: {app: api}}]}")
	wide := destinationRule("wide", "istio-system", "{host: '*.test', trafficPolicy: {tls: {mode: ISTIO_MUTUAL}}}")
	strange := destinationRule("strange", "istio-system", "{host: '*.svc.cluster.local', trafficPolicy: {tls: {mode: SIMPLE}}}")
	near := destinationRule("near", "shop", "{host: '*.shop.svc.example.test', trafficPolicy: {tls: {mode: DISABLE}}}")
	for _, c := range []struct {
		name    string
		objects []string
		subsets []string
		own     bool
		others  int
		policy  string
	}{
		{"nothing", nil, []string{""}, true, 0, ""},
		{"a gateway", []string{outside, subsets}, []string{"", "v1"}, true, 1, ""},
		{"the mesh", []string{subsets, virtualService("api", "shop", "{hosts: [api], http: [{route: [{destination: {host: api, subset: v1}}, {destination: {host: api, subset: v2}, weight: 0}]}]}")},
			[]string{"v1"}, false, 1, ""},
		{"under way", []string{subsets, virtualService("api", "shop", "{hosts: [api], http: [{route: [{destination: {host: api, subset: polymesh-stable-v1}, weight: 50}, {destination: {host: api, subset: polymesh-canary-v1}, weight: 50}]}]}")},
			[]string{"v1"}, false, 1, ""},
		{"another user's", []string{virtualService("api", "web", "{hosts: [api], http: [{route: [{destination: {host: api}}]}]}")}, []string{""}, true, 0, ""},
		{"a policy for another domain", []string{strange}, []string{""}, true, 0, ""},
		{"a policy for all", []string{wide, strange}, []string{""}, true, 0, "ISTIO_MUTUAL"},
		{"a nearer one", []string{wide, near}, []string{""}, true, 0, "DISABLE"},
		{"the Service's own", []string{wide, near, subsets}, []string{""}, true, 0, ""},
	} {
		r, err := readRouting(t, serviceText, "", c.objects...)
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		h := r.hosts[0]
		policy := ""
		if h.policy != nil {
			policy = h.policy["tls"].(map[string]any)["mode"].(string)
		}
		if got := slices.Sorted(maps.Keys(h.subsets)); !slices.Equal(got, c.subsets) || h.own != c.own || len(r.others) != c.others || policy != c.policy || !slices.Equal(h.tcp, []int32{9000}) {
			t.Errorf("%s: subsets %q, own %v, %d others, policy %q, tcp %v", c.name, got, h.own, len(r.others), policy, h.tcp)
		}
	}
}

// What weights could not be set for is refused before anything is changed.
func TestRefused(t *testing.T) {
	stranger := "apiVersion: v1\nkind: Pod\nmetadata: {name: api-v2-1, namespace: shop, labels: {app: api, version: v2}}"
	for want, c := range map[string]struct {
		service, pods string
		objects       []string
	}{
		"no Service in shop selects the pods of deployment.apps/api -n shop":   {service: strings.Replace(serviceText, "app: api", "app: other", 1)},
		"service/api -n shop selects pods by their label version":              {service: strings.Replace(serviceText, "app: api", "app: api, version: v1", 1)},
		"replaces, for the callers in web":                                     {objects: []string{destinationRule("api", "web", "{host: api.shop.svc.cluster.local}")}},
		"applies only to some callers of service/api":                          {objects: []string{destinationRule("api", "shop", "{host: api, workloadSelector: {matchLabels: {a: b}}}")}},
		"destinationrule/api-canary -n shop exists: a rollout needs this name": {objects: []string{destinationRule("api-canary", "shop", "{host: api}")}},
		"virtualservice/api-canary -n shop exists: a rollout needs this name":  {objects: []string{virtualService("api-canary", "shop", "{hosts: [x]}")}},
		"httproute/shop -n web leads to service/api": {objects: []string{
			"apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: shop, namespace: web}\nspec: {rules: [{backendRefs: [{name: api, namespace: shop}]}]}"}},
		"service/api has pods of another version, v2, such as pod api-v2-1": {pods: stranger},
		"name subsets with labels that the pods of api do not have": {objects: []string{
			virtualService("api", "shop", "{hosts: [api], http: [{route: [{destination: {host: api, subset: v2}}]}]}"), destinationRule("api", "shop", "{host: api, subsets: [{name: v2, labels: {version: v2}}]}")}},
	} {
		service := c.service
		if service == "" {
			service = serviceText
		}
		if _, err := readRouting(t, service, c.pods, c.objects...); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("want %q, got %v", want, err)
		}
	}
	named := []string{virtualService("api", "shop", "{hosts: [api], http: [{route: [{destination: {host: api, subset: v1}}]}]}"), destinationRule("api", "shop", "{host: api, subsets: [{name: v1, labels: {version: v1}}]}")}
	if _, err := readRouting(t, serviceText, stranger, named...); err != nil {
		t.Errorf("another version where every route names one: %v", err)
	}
}
