package controlplane

import (
	"os"
	"slices"
	"testing"

	rbacv1 "k8s.io/api/rbac/v1"
	"sigs.k8s.io/yaml"

	"polymesh.dev/polymesh/pkg/certificate"
)

// permission is a verb on a resource.
type permission struct{ group, resource, verb string }

// permissions returns all that rules allow.
func permissions(t *testing.T, rules []rbacv1.PolicyRule) map[permission]bool {
	t.Helper()
	all := map[permission]bool{}
	for _, r := range rules {
		if len(r.NonResourceURLs)+len(r.ResourceNames) > 0 || slices.Contains(slices.Concat(r.APIGroups, r.Resources, r.Verbs), "*") {
			t.Errorf("this rule is not one for resources by their names: %+v", r)
		}
		for _, group := range r.APIGroups {
			for _, resource := range r.Resources {
				for _, verb := range r.Verbs {
					all[permission{group, resource, verb}] = true
				}
			}
		}
	}
	return all
}

// The store may do what its code asks for, which is in observe/cluster/rbac.yaml (a test there runs it with exactly that), what Prometheus'
// discovery asks for on behalf of users, and read the kubelets' metrics.
func TestObserveRoleIsWhatTheStoreNeeds(t *testing.T) {
	text, err := os.ReadFile("../../observe/cluster/rbac.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var needed rbacv1.ClusterRole
	if err := yaml.UnmarshalStrict(text, &needed); err != nil {
		t.Fatal(err)
	}
	want := permissions(t, needed.Rules)
	if len(want) < 20 {
		t.Fatalf("observe/cluster/rbac.yaml has only %d permissions", len(want))
	}
	for _, verb := range []string{"list", "watch"} {
		for _, p := range []permission{
			{"", "endpoints", verb}, {"", "nodes", verb}, {"", "pods", verb}, {"", "services", verb}, {"", "namespaces", verb},
			{"discovery.k8s.io", "endpointslices", verb}, {"networking.k8s.io", "ingresses", verb},
		} {
			want[p] = true
		}
	}
	want[permission{"", "nodes/metrics", "get"}] = true
	i := slices.IndexFunc(observeRoles(), func(r rbacv1.ClusterRole) bool { return r.Name == certificate.ObserveUser })
	if i < 0 || needed.Name != certificate.ObserveUser {
		t.Fatalf("no role %s here, or not that one there: %s", certificate.ObserveUser, needed.Name)
	}
	have := permissions(t, observeRoles()[i].Rules)
	for p := range have {
		if !want[p] {
			t.Errorf("the role allows what the store does not need: %+v", p)
		}
	}
	for p := range want {
		if !have[p] {
			t.Errorf("the role lacks what the store needs: %+v", p)
		}
	}
}
