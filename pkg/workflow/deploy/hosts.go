package deploy

import (
	"slices"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

// hosts lists the names under which gateways serve the project.
func (d *deployment) hosts() {
	for _, o := range d.objects {
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
			if !slices.Contains(d.result.Hosts, host) {
				d.result.Hosts = append(d.result.Hosts, host)
			}
		}
	}
}
