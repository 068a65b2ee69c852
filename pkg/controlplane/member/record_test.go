package member

import (
	"fmt"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"polymesh.dev/polymesh/pkg/controlplane/datastore/etcd"
)

// A member is removed for the node object that its server has recorded, whatever the names are.
func TestCompare(t *testing.T) {
	members := []etcd.Member{{ID: 1, Name: "a-00000001"}, {ID: 2, Name: "b-00000002"}, {ID: 3, Name: "a-00000003"}, {ID: 4, Name: "joining-00000004"}}
	records := []Record{{1, "a", "u1"}, {2, "b", "u2"}, {3, "c", "u3"}, {9, "gone", "u9"}}
	for _, c := range []struct {
		nodes          map[string]types.UID
		orphans, stale string
	}{
		{map[string]types.UID{"a": "u1", "b": "u2", "c": "u3"}, "[]", "[{9 gone u9}]"},
		{map[string]types.UID{"a": "u1", "b": "u2"}, "[{3 c u3}]", "[{9 gone u9}]"}, // its member claims to be of a
		{map[string]types.UID{"b": "u2", "c": "u3", "gone": "u9"}, "[{1 a u1}]", "[{9 gone u9}]"},
		{map[string]types.UID{"a": "other", "b": "u2", "c": "u3"}, "[{1 a u1}]", "[{9 gone u9}]"}, // another machine has the name
	} {
		orphans, stale := compare(members, records, c.nodes)
		if fmt.Sprint(orphans) != c.orphans || fmt.Sprint(stale) != c.stale {
			t.Errorf("%v: %v and %v, want %s and %s", c.nodes, orphans, stale, c.orphans, c.stale)
		}
	}
	node := func(name string, uid types.UID) *corev1.Node {
		return &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, UID: uid}}
	}
	if m, ok := Of(members, records, node("c", "u3")); !ok || m.ID != 3 {
		t.Errorf("c has %v", m)
	}
	for _, n := range []*corev1.Node{node("c", "u4"), node("joining", "u5"), node("gone", "u9")} {
		if m, ok := Of(members, records, n); ok {
			t.Errorf("%s has %v", n.Name, m)
		}
	}
}
