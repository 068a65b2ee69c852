package member

import (
	"errors"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"polymesh.dev/polymesh/pkg/controlplane/datastore/etcd"
	"polymesh.dev/polymesh/pkg/layout"
)

func TestRemovalIsDecided(t *testing.T) {
	node := func(name string, server, ready bool) corev1.Node {
		n := corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, UID: types.UID("uid-" + name)}}
		if server {
			n.Labels = map[string]string{layout.ServerLabel: "true"}
		}
		state := corev1.ConditionUnknown
		if ready {
			state = corev1.ConditionTrue
		}
		n.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: state}}
		return n
	}
	nodes := []corev1.Node{node("s1", true, true), node("s2", true, true), node("s3", true, false), node("w1", false, true), node("w2", false, false)}
	members := func(away ...string) (all []etcd.Member) {
		for i, name := range []string{"s1", "s2", "s3"} {
			m := etcd.Member{ID: uint64(i + 1), Name: name + "-01234567", URL: "https://" + name}
			for _, a := range away {
				if a == name {
					m.Problem = "no answer within 2s"
				}
			}
			all = append(all, m)
		}
		return all
	}
	records := []Record{{1, "s1", "uid-s1"}, {2, "s2", "uid-s2"}, {3, "s3", "uid-s3"}}
	full := view{self: "s1", nodes: nodes, records: records, members: members("s3")}
	with := func(change func(*view)) view {
		v := full
		change(&v)
		return v
	}
	unknown := errors.New("this node is an agent")
	for what, c := range map[string]struct {
		name    string
		view    view
		member  uint64
		refusal string
	}{
		"an agent that is off":      {name: "w2", view: full},
		"a server that is off":      {name: "s3", view: full, member: 3},
		"one without a record yet":  {name: "s3", view: with(func(v *view) { v.records = records[:2] }), member: 3},
		"an agent that runs":        {name: "w1", view: full, refusal: "node w1 is Ready, so its machine runs: move its pods away with `polymesh kubectl drain w1"},
		"an agent that runs, force": {name: "w1", view: with(func(v *view) { v.force = true })},
		"a server that runs": {name: "s2", view: with(func(v *view) { v.members = members() }),
			refusal: "node s2 is Ready"},
		"a server that runs, force": {name: "s2", view: with(func(v *view) { v.members, v.force = members(), true }), member: 2},
		"no majority would stay": {name: "s2", view: with(func(v *view) { v.force = true }),
			refusal: "node s2 stays: 2 of 3 members answer; removing s2 would leave 2 members of which 1 answers"},
		"itself":  {name: "s1", view: full, refusal: "s1 is this machine: `polymesh reset`"},
		"no node": {name: "w3", view: full, refusal: "there is no node w3: `polymesh node list`"},
		"only a member": {name: "s3", view: with(func(v *view) { v.nodes = nodes[:2] }),
			refusal: "there is no node s3, but etcd has a member of that name: remove it with `polymesh etcd remove s3`"},
		"from an agent": {name: "s3", view: with(func(v *view) { v.members, v.unknown, v.self = nil, unknown, "w1" }),
			refusal: "s3 is a server with a member of etcd: run this on another server, as root"},
		"an agent, from an agent": {name: "w2", view: with(func(v *view) { v.members, v.unknown, v.self = nil, unknown, "w1" })},
		"the only server": {name: "s1", view: view{self: "", nodes: []corev1.Node{nodes[0], nodes[3]}, unknown: unknown, force: true},
			refusal: "s1 is the only server"},
		"a server on a database outside": {name: "s3", view: view{self: "s1", nodes: nodes, unknown: unknown}},
	} {
		c.view.name = c.name
		n, m, err := c.view.decide()
		var id uint64
		if m != nil {
			id = m.ID
		}
		switch {
		case c.refusal != "" && (err == nil || !strings.Contains(err.Error(), c.refusal)):
			t.Errorf("%s: %v, want %q", what, err, c.refusal)
		case c.refusal == "" && (err != nil || n.Name != c.name || id != c.member):
			t.Errorf("%s: %v with member %d, %v", what, n, id, err)
		}
	}
}

func TestFindMember(t *testing.T) {
	members := []etcd.Member{{ID: 0xa1, Name: "a-00000001"}, {ID: 0xb1, Name: "b-00000001"}, {ID: 0xb2, Name: "b-00000002"}, {ID: 0xc1}}
	for name, want := range map[string]string{
		"a": "is this server's own member", "b": "etcd has 2 members of node b", "b-00000002": "b2", "b1": "b1", "c1": "c1",
		"": "etcd has no member", "d": "etcd has no member d",
	} {
		m, err := find(members, 0xa1, name)
		if err != nil && !strings.Contains(err.Error(), want) || err == nil && memberID(m.ID) != want {
			t.Errorf("%q: %v, %v", name, m, err)
		}
	}
}
