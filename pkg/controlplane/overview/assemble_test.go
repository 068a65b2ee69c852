package overview

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"polymesh.dev/polymesh/pkg/certificate"
	"polymesh.dev/polymesh/pkg/controlplane/datastore"
	"polymesh.dev/polymesh/pkg/controlplane/datastore/etcd"
	"polymesh.dev/polymesh/pkg/controlplane/snapshot"
	"polymesh.dev/polymesh/pkg/layout"
	"polymesh.dev/polymesh/pkg/status"
)

var now = time.Date(2030, 1, 1, 12, 0, 0, 0, time.Local)

func options() Options {
	return Options{Node: "a", Version: "v1.36.3+polymesh1", Datastore: &etcd.Etcd{}}
}

// three are members of which those with these names are away.
func three(away ...string) (all []etcd.Member) {
	for i, name := range []string{"a", "b", "c"} {
		m := etcd.Member{ID: uint64(i + 1), Name: name + "-01234567", URL: "https://" + name, Leader: i == 0}
		if slices.Contains(away, name) {
			m.Problem = "no answer within 2s"
		}
		all = append(all, m)
	}
	return all
}

func TestProblems(t *testing.T) {
	since := now.Add(-5 * time.Minute)
	for what, c := range map[string]struct {
		facts            facts
		problem, warning string
	}{
		"all are there": {facts{members: result[[]etcd.Member]{value: three()}}, "", ""},
		"one is away": {facts{members: result[[]etcd.Member]{value: three("b")}}, "",
			"1 of 3 servers is away: b (no answer within 2s). The cluster works, and stops when one more is away"},
		"two are away": {facts{members: result[[]etcd.Member]{value: three("b", "c")}, leaderlessSince: since, nodes: result[[]corev1.Node]{err: errNoAnswer}},
			"2 of 3 servers are away since 2030-01-01 11:55:00 (5m ago): b (no answer within 2s), c (no answer within 2s). The cluster is read-only at best: nothing is scheduled or changed, and pods continue. If this machine is cut off from the others, they continue the cluster: check its network first. Otherwise start them. Only if their machines are lost, `polymesh server --cluster-reset` on this one alone", ""},
		"two have just gone": {facts{members: result[[]etcd.Member]{value: three("b", "c")}}, "2 of 3 servers are away: b", ""},
		"no leader": {facts{members: result[[]etcd.Member]{value: three()}, leaderlessSince: since},
			"etcd has no leader since 2030-01-01 11:55:00 (5m ago), although 3 of 3 members answer", ""},
		"two members": {facts{members: result[[]etcd.Member]{value: three()[:2]}}, "", "etcd has 2 members that vote, an even number: it survives the loss of 0, no more than with 1"},
		"a learner": {facts{members: result[[]etcd.Member]{value: append(three(), etcd.Member{ID: 4, URL: "https://d", Learner: true, Problem: "x"})}}, "",
			"server https://d is joining"},
		"members unknown": {facts{members: result[[]etcd.Member]{err: errors.New("etcd has not started")}}, "", ""},
		"snapshot":        {facts{members: result[[]etcd.Member]{value: three()}, snapshotFailure: errors.New("full")}, "", ""},
	} {
		got := assemble(options(), c.facts, now)
		if (got.Problem == "") != (c.problem == "") || !strings.Contains(got.Problem, c.problem) {
			t.Errorf("%s: the problem is %q", what, got.Problem)
		}
		if (len(got.Warnings) == 0) != (c.warning == "") || c.warning != "" && !strings.Contains(strings.Join(got.Warnings, "\n"), c.warning) {
			t.Errorf("%s: the warnings are %q", what, got.Warnings)
		}
		if !got.Several() && what != "members unknown" {
			t.Errorf("%s: it is one node", what)
		}
	}
	got := assemble(options(), facts{nodes: result[[]corev1.Node]{err: errNoAnswer}, members: result[[]etcd.Member]{err: errors.New("etcd has not started")}}, now)
	if want := "[nodes: no answer within 2s members of etcd: etcd has not started]"; fmt.Sprint(got.Unknown) != want {
		t.Errorf("unknown is %v", got.Unknown)
	}
}

func TestNodesAndSkew(t *testing.T) {
	node := func(name, version string, server bool, ready corev1.ConditionStatus) corev1.Node {
		n := corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}}
		n.Status.NodeInfo.KubeletVersion = version
		n.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: ready, Message: "why", LastTransitionTime: metav1.NewTime(now)}}
		n.Status.Addresses = []corev1.NodeAddress{{Type: corev1.NodeExternalIP, Address: "203.0.113.1"}, {Type: corev1.NodeInternalIP, Address: "192.0.2.1"}}
		if server {
			n.Labels = map[string]string{layout.ServerLabel: "true"}
		}
		return n
	}
	all := []corev1.Node{
		node("a1", "v1.36.3+polymesh2", false, corev1.ConditionUnknown), node("z", "v1.36.3+polymesh1", true, corev1.ConditionTrue),
		node("a2", "v1.35.9+polymesh1", false, corev1.ConditionTrue), node("a3", "v1.36.4", false, corev1.ConditionTrue), node("a4", "v1.37.0", false, corev1.ConditionTrue),
		node("a5", "v1.32.0", false, corev1.ConditionTrue), node("a6", "text\n", false, corev1.ConditionTrue), {ObjectMeta: metav1.ObjectMeta{Name: "a7"}},
	}
	c := assemble(options(), facts{nodes: result[[]corev1.Node]{value: all}}, now)
	var got []string
	for _, n := range c.Nodes {
		got = append(got, fmt.Sprintf("%s %s %v %q %q", n.Name, n.Role, n.Ready, n.Skew, n.Reason))
	}
	want := []string{
		`z server true "" ""`, `a1 agent false "another build" "why"`, `a2 agent true "1 minor older" ""`, `a3 agent true "a patch newer" ""`,
		`a4 agent true "1 minor newer" ""`, `a5 agent true "4 minor older" ""`, `a6 agent true "" ""`, `a7 agent false "" "it has not reported yet"`,
	}
	if !slices.Equal(got, want) {
		t.Errorf("nodes are %q, want %q", got, want)
	}
	if c.Nodes[0].Address != "192.0.2.1" || !c.Nodes[0].Since.Equal(now) {
		t.Errorf("%+v", c.Nodes[0])
	}
	if len(c.Warnings) != 2 || !strings.Contains(c.Warnings[0], "node a4 has Kubernetes v1.37.0") || !strings.Contains(c.Warnings[1], "upgrade it") {
		t.Errorf("warnings are %q", c.Warnings)
	}
}

func TestCertificatesLeadersAndSnapshot(t *testing.T) {
	day := 24 * time.Hour
	members := three()
	members[1].Expires = now.Add(-day)
	members[2].Expires = now.Add(300 * day)
	renewed := metav1.NewMicroTime(now.Add(-20 * time.Second))
	holder, seconds := "a_x", int32(15)
	f := facts{
		self: 1, members: result[[]etcd.Member]{value: members},
		certificates: result[[]certificate.Expiry]{value: []certificate.Expiry{
			{Name: "serving-kubelet", Expires: now.Add(59 * day)}, {Name: "client-admin", Expires: now.Add(200 * day)},
			{Name: "server-ca", Authority: true, Expires: now.Add(3000 * day)},
		}},
		leases: result[[]coordinationv1.Lease]{value: []coordinationv1.Lease{
			{ObjectMeta: metav1.ObjectMeta{Name: "polymesh"}, Spec: coordinationv1.LeaseSpec{HolderIdentity: &holder, RenewTime: &renewed, LeaseDurationSeconds: &seconds}},
			{ObjectMeta: metav1.ObjectMeta{Name: "kube-scheduler"}},
		}},
		snapshot: result[*snapshot.Info]{value: &snapshot.Info{File: "scheduled", Created: now}}, snapshotFailure: errors.New("the disk is full"),
		size: 5, revision: 7,
	}
	c := assemble(options(), f, now)
	var got []string
	for _, e := range c.Certificates {
		got = append(got, fmt.Sprintf("%s %s %v", e.Name, e.Node, e.Authority))
	}
	if want := []string{"serving-kubelet a false", "server-ca  true", "serving-etcd b false", "serving-etcd c false"}; !slices.Equal(got, want) {
		t.Errorf("certificates are %q, want %q", got, want)
	}
	for _, want := range []string{
		"the certificate serving-kubelet of node a expires in 59d", "the certificate serving-etcd of node b has expired",
		"no server holds the Lease polymesh", "no server holds the Lease kube-scheduler",
	} {
		if !slices.ContainsFunc(c.Warnings, func(w string) bool { return strings.Contains(w, want) }) {
			t.Errorf("warnings are %q, without %q", c.Warnings, want)
		}
	}
	if len(c.Warnings) != 4 || !c.Leaders[0].Expired || c.Leaders[0].Holder != "a_x" || c.Snapshot.Failure != "the disk is full" || c.Snapshot.File != "scheduled" {
		t.Errorf("%+v", c)
	}
	if d := c.Datastore; d.Kind != status.EmbeddedEtcd || d.Size != 5 || d.Revision != 7 || len(d.Members) != 3 || !d.Members[0].Self || d.Members[1].Self || !d.Members[0].Leader {
		t.Errorf("%+v", d)
	}
	o := options()
	o.Datastore = &datastore.Datastore{}
	if c := assemble(o, facts{usage: result[datastore.Usage]{value: datastore.Usage{Rows: 3, Size: 4, Revision: 5, Compacted: 2}}}, now); c.Datastore.Kind != status.SQLite || c.Datastore.Rows != 3 || c.Datastore.Compacted != 2 || c.Several() {
		t.Errorf("%+v", c.Datastore)
	}
}

// A query that never ends does not hold the others up, and one that has ended counts although the time is over.
func TestAwait(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	never := make(chan struct{})
	defer close(never)
	stuck := query(ctx, func(context.Context) (int, error) { <-never; return 1, nil })
	done := make(chan result[int], 1)
	done <- result[int]{value: 2}
	cancel()
	if r := await(ctx, stuck); r.err != errNoAnswer {
		t.Errorf("got %+v", r)
	}
	if r := await(ctx, done); r.err != nil || r.value != 2 {
		t.Errorf("got %+v", r)
	}
}
