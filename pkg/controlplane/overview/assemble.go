package overview

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/duration"
	"k8s.io/apimachinery/pkg/util/version"

	"polymesh.dev/polymesh/pkg/certificate"
	"polymesh.dev/polymesh/pkg/condition"
	"polymesh.dev/polymesh/pkg/controlplane/datastore"
	"polymesh.dev/polymesh/pkg/controlplane/datastore/etcd"
	"polymesh.dev/polymesh/pkg/join"
	"polymesh.dev/polymesh/pkg/layout"
	"polymesh.dev/polymesh/pkg/status"
)

const (
	// expiresSoon is how long before its expiry a certificate is reported.
	expiresSoon = 60 * 24 * time.Hour
)

// assemble judges what was found out.
func assemble(o Options, f facts, now time.Time) *status.Cluster {
	c := &status.Cluster{Datastore: status.Datastore{Kind: Kind(o)}}
	unknown := func(what string, err error) {
		if err != nil {
			c.Unknown = append(c.Unknown, fmt.Sprintf("%s: %v", what, err))
		}
	}
	unknown("nodes", f.nodes.err)
	unknown("leaders", f.leases.err)
	unknown("members of etcd", f.members.err)
	unknown("size of the datastore", f.usage.err)
	unknown("certificates", f.certificates.err)
	unknown("snapshots", f.snapshot.err)

	c.Nodes = Nodes(f.nodes.value, o.Version)
	for _, n := range c.Nodes {
		if why := unsupported(n.Version, o.Version); why != "" {
			c.Warnings = append(c.Warnings, fmt.Sprintf("node %s has Kubernetes %s, and this server %s: %s", n.Name, n.Version, o.Version, why))
		}
	}
	members(c, f, now)
	c.Leaders = leaders(f.leases.value, now)
	for _, l := range c.Leaders {
		if c.Problem == "" && (l.Expired || l.Holder == "") {
			c.Warnings = append(c.Warnings, fmt.Sprintf("no server holds the Lease %s: what runs on one server at a time stands still until one does", l.Lease))
		}
	}
	certificates(c, o, f, now)
	if last := f.snapshot.value; last != nil || f.snapshotFailure != nil {
		c.Snapshot = &status.Snapshot{}
		if last != nil {
			c.Snapshot.File, c.Snapshot.Created, c.Snapshot.Size = last.File, last.Created, last.Size
		}
		if f.snapshotFailure != nil {
			c.Snapshot.Failure = f.snapshotFailure.Error()
		}
	}
	return c
}

// Kind returns the kind of the datastore, one of status' kinds or the name of a database.
func Kind(o Options) string {
	switch o.Datastore.(type) {
	case *etcd.Etcd:
		return status.EmbeddedEtcd
	case *datastore.External:
		return status.ExternalEtcd
	case *datastore.Datastore:
		return status.SQLite
	}
	return string(o.Kind)
}

// Nodes returns nodes for a user, servers first. own is the version of Kubernetes of a server.
func Nodes(all []corev1.Node, own string) []status.Node {
	var list []status.Node
	for _, n := range all {
		node := status.Node{Name: n.Name, Role: status.RoleAgent, Version: n.Status.NodeInfo.KubeletVersion, Unschedulable: n.Spec.Unschedulable}
		// NodeRestriction forbids a node to set it.
		if _, ok := n.Labels[layout.ServerLabel]; ok {
			node.Role = status.RoleServer
		}
		node.Reason = "it has not reported yet"
		if ready := condition.NodeReady(&n); ready != nil {
			node.Ready, node.Since, node.Reason = ready.Status == corev1.ConditionTrue, ready.LastTransitionTime.Time, ""
			if !node.Ready {
				node.Reason = cmp.Or(ready.Message, ready.Reason)
			}
		}
		for _, a := range n.Status.Addresses {
			if a.Type == corev1.NodeInternalIP {
				node.Address = a.Address
				break
			}
		}
		node.Skew = skew(node.Version, own)
		list = append(list, node)
	}
	slices.SortFunc(list, func(a, b status.Node) int {
		return cmp.Or(-cmp.Compare(a.Role, b.Role), cmp.Compare(a.Name, b.Name)) // servers first
	})
	return list
}

// skew is how a node's version differs from this server's, empty if it does not or is not known.
func skew(node, own string) string {
	if node == own {
		return ""
	}
	a, errA := version.ParseSemantic(node)
	b, errB := version.ParseSemantic(own)
	if errA != nil || errB != nil {
		return ""
	}
	older := func(n int) string {
		if n < 0 {
			return "older"
		}
		return "newer"
	}
	minors := int(a.Minor()) - int(b.Minor())
	patches := int(a.Patch()) - int(b.Patch())
	switch {
	case a.Major() != b.Major():
		return "another major version"
	case minors != 0:
		return fmt.Sprintf("%d minor %s", max(minors, -minors), older(minors))
	case patches != 0:
		return "a patch " + older(patches)
	}
	return "another build"
}

// unsupported describes what is wrong with a node's version next to a server's, and what to do.
func unsupported(node, own string) string {
	a, errA := version.ParseSemantic(node)
	b, errB := version.ParseSemantic(own)
	if errA != nil || errB != nil || a.Major() != b.Major() {
		return ""
	}
	switch minors := int(a.Minor()) - int(b.Minor()); {
	case minors > 0:
		return "a node must not be newer than a server: upgrade the servers"
	case minors < -join.OlderMinors:
		return fmt.Sprintf("a node may be %d minor versions older: upgrade it", join.OlderMinors)
	}
	return ""
}

// members sets the members of etcd, or the size of another datastore, and judges whether the cluster works.
func members(c *status.Cluster, f facts, now time.Time) {
	d := &c.Datastore
	u := f.usage.value
	d.Rows, d.Compacted, d.LastCompaction = u.Rows, u.Compacted, u.LastCompaction
	d.Size, d.Revision = max(u.Size, f.size), max(u.Revision, f.revision)
	if d.Kind != status.EmbeddedEtcd {
		return
	}
	for _, m := range f.members.value {
		d.Members = append(d.Members, Member(m, f.self))
	}
	d.LeaderlessSince = f.leaderlessSince
	q := etcd.QuorumOf(f.members.value)
	since := ""
	if !f.leaderlessSince.IsZero() {
		since = fmt.Sprintf(" since %s (%s ago)", f.leaderlessSince.Local().Format(time.DateTime), duration.HumanDuration(now.Sub(f.leaderlessSince)))
	}
	switch {
	case len(f.members.value) == 0:
	case !q.Has():
		c.Problem = fmt.Sprintf("%d of %d servers %s away%s: %s. The cluster is read-only at best: nothing is scheduled or changed, and pods continue. If this machine is cut off from the others, they continue the cluster: check its network first. Otherwise start them. Only if their machines are lost, `polymesh server --cluster-reset` on this one alone makes a cluster of it",
			len(q.Away), q.Voters, isAre(len(q.Away)), since, q.Missing())
	case since != "":
		c.Problem = fmt.Sprintf("etcd has no leader%s, although %d of %d members answer: they elect one, or cannot reach each other on port 2380 of each server", since, q.Answering, q.Voters)
	case len(q.Away) > 0:
		more := q.Answering - q.Majority()
		c.Warnings = append(c.Warnings, fmt.Sprintf("%d of %d servers %s away: %s. The cluster works, and stops when %s", len(q.Away), q.Voters, isAre(len(q.Away)), q.Missing(), beyond(more)))
	}
	if q.Voters > 0 && q.Voters%2 == 0 {
		c.Warnings = append(c.Warnings, fmt.Sprintf("etcd has %d members that vote, an even number: it survives the loss of %d, no more than with %d. Add a server, or remove one", q.Voters, q.Voters-q.Majority(), q.Voters-1))
	}
	for _, m := range f.members.value {
		if m.Learner {
			c.Warnings = append(c.Warnings, fmt.Sprintf("server %s is joining: its member of etcd receives the data, and has no vote yet", m))
		}
	}
}

// beyond is what stops a cluster that can lose n more servers.
func beyond(n int) string {
	if n == 0 {
		return "one more is away"
	}
	return strconv.Itoa(n+1) + " more are away"
}

func isAre(n int) string {
	if n == 1 {
		return "is"
	}
	return "are"
}

// Member is a member of etcd for a user. self is the id of this server's.
func Member(m etcd.Member, self uint64) status.Member {
	return status.Member{
		ID: strconv.FormatUint(m.ID, 16), Name: m.Name, Node: m.Node(), URL: m.URL, Learner: m.Learner, Leader: m.Leader,
		Self: m.ID == self, Version: m.Version, Problem: m.Problem,
	}
}

func leaders(leases []coordinationv1.Lease, now time.Time) []status.Leader {
	var all []status.Leader
	for _, l := range leases {
		leader := status.Leader{Lease: l.Name}
		if l.Spec.HolderIdentity != nil {
			leader.Holder = *l.Spec.HolderIdentity
		}
		if l.Spec.RenewTime != nil {
			leader.Renewed = l.Spec.RenewTime.Time
			if s := l.Spec.LeaseDurationSeconds; s != nil {
				leader.Expired = now.After(leader.Renewed.Add(time.Duration(*s) * time.Second))
			}
		}
		all = append(all, leader)
	}
	return all
}

// certificates sets the next of this server's, of the authorities, and of each other member of etcd, and warns of those that expire soon.
func certificates(c *status.Cluster, o Options, f facts, now time.Time) {
	add := func(e certificate.Expiry, node string) {
		c.Certificates = append(c.Certificates, status.Certificate{Name: e.Name, Node: node, Authority: e.Authority, Expires: e.Expires})
	}
	warn := func(e certificate.Expiry, whose string) {
		if e.Expires.Sub(now) >= expiresSoon {
			return
		}
		when := "expires in " + duration.HumanDuration(e.Expires.Sub(now))
		if !e.Expires.After(now) {
			when = "has expired"
		}
		what := "its server renews it 120 days before, so its log has the reason why it did not"
		if e.Authority {
			what = "everything that it has signed ends with it"
		}
		c.Warnings = append(c.Warnings, fmt.Sprintf("the certificate %s of %s %s, on %s: %s", e.Name, whose, when, e.Expires.Local().Format(time.DateOnly), what))
	}
	var own, authority bool
	for _, e := range f.certificates.value {
		first := &own
		whose, node := "node "+o.Node, o.Node
		if e.Authority {
			first, whose, node = &authority, "the cluster", ""
		}
		if !*first {
			add(e, node)
		}
		*first = true
		warn(e, whose)
	}
	for _, m := range f.members.value {
		if m.ID == f.self || m.Expires.IsZero() {
			continue
		}
		e := certificate.Expiry{Name: certificate.EtcdServing, Expires: m.Expires}
		add(e, m.Node())
		warn(e, "node "+m.Node())
	}
}
