package deploy

import (
	"slices"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"polymesh.dev/polymesh/pkg/workflow/project"
)

// hostsOf returns the names under which gateways serve the objects.
func hostsOf(objects []project.Object) (served []string) {
	for _, o := range objects {
		var hosts []string
		switch o.GetKind() {
		case "VirtualService":
			gateways, _, _ := unstructured.NestedStringSlice(o.Object, "spec", "gateways")
			if !slices.ContainsFunc(gateways, func(g string) bool { return g != "mesh" }) {
				continue
			}
			hosts, _, _ = unstructured.NestedStringSlice(o.Object, "spec", "hosts")
		case "HTTPRoute", "GRPCRoute":
			hosts, _, _ = unstructured.NestedStringSlice(o.Object, "spec", "hostnames")
		}
		for _, host := range hosts {
			if !slices.Contains(served, host) {
				served = append(served, host)
			}
		}
	}
	return served
}
