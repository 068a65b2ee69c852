package status

import "time"

// Cluster is the state of the cluster as one server sees it. Each part is what could be found out within seconds: Unknown has the rest.
type Cluster struct {
	// Problem is why the cluster does not work, and what to do. It is empty if it works.
	Problem string `json:"problem,omitempty"`
	// Warnings are what needs attention: a line each.
	Warnings []string `json:"warnings,omitempty"`
	// Unknown is what could not be found out, and why: a line each.
	Unknown      []string      `json:"unknown,omitempty"`
	Nodes        []Node        `json:"nodes,omitempty"`
	Datastore    Datastore     `json:"datastore"`
	Leaders      []Leader      `json:"leaders,omitempty"`
	Certificates []Certificate `json:"certificates,omitempty"`
	// Snapshot is the newest one in this server's folder.
	Snapshot *Snapshot `json:"snapshot,omitempty"`
}

// Several reports whether the cluster has more than one node, as far as is known.
func (c *Cluster) Several() bool { return len(c.Nodes) > 1 || len(c.Datastore.Members) > 1 }

// Node is a node of the cluster.
type Node struct {
	Name string `json:"name"`
	// Role is "server" or "agent".
	Role string `json:"role"`
	// Ready is the node's condition; Since is when it became so, and Reason why it is not ready.
	Ready         bool      `json:"ready"`
	Since         time.Time `json:"since,omitzero"`
	Reason        string    `json:"reason,omitempty"`
	Unschedulable bool      `json:"unschedulable,omitempty"`
	// Version is the kubelet's. Skew is how it differs from this server's, if it does: "1 minor older".
	Version string `json:"version"`
	Skew    string `json:"skew,omitempty"`
	Address string `json:"address,omitempty"`
}

// Datastore is the state of the cluster's datastore.
type Datastore struct {
	// Kind is SQLite, EmbeddedEtcd, ExternalEtcd, or the name of a database: "PostgreSQL", "MySQL".
	Kind string `json:"kind"`
	// Members are those of etcd on the servers.
	Members []Member `json:"members,omitempty"`
	// LeaderlessSince is since when this server's member of etcd knows no leader.
	LeaderlessSince time.Time `json:"leaderlessSince,omitzero"`
	// Size is in bytes: of the database's files here, or of the table in a database server. 0 if it is not known.
	Size int64 `json:"sizeBytes,omitempty"`
	// Revision is the newest.
	Revision int64 `json:"revision,omitempty"`
	// Rows of an SQL database contain all revisions since the last compaction, which was to the revision Compacted.
	Rows      int64 `json:"rows,omitempty"`
	Compacted int64 `json:"compactedRevision,omitempty"`
	// LastCompaction is the time of the last compaction that this server has done since its start.
	LastCompaction time.Time `json:"lastCompaction,omitzero"`
}

// Kinds of datastores.
const (
	SQLite       = "SQLite"
	EmbeddedEtcd = "etcd"
	ExternalEtcd = "external etcd"
)

// Member is a member of etcd.
type Member struct {
	// ID is in hexadecimal form, as etcdctl shows it.
	ID   string `json:"id"`
	Name string `json:"name,omitempty"`
	// Node is the name of its node, by the member's name; empty until it has started.
	Node    string `json:"node,omitempty"`
	URL     string `json:"url"`
	Learner bool   `json:"learner,omitempty"`
	Leader  bool   `json:"leader,omitempty"`
	// Self is set for this server's.
	Self    bool   `json:"self,omitempty"`
	Version string `json:"version,omitempty"`
	// Problem is why it does not answer; empty if it does.
	Problem string `json:"problem,omitempty"`
}

// Leader is which server does what runs only once.
type Leader struct {
	// Lease is the name of the Lease in kube-system.
	Lease string `json:"lease"`
	// Holder is its holder, empty if no one holds it.
	Holder string `json:"holder,omitempty"`
	// Renewed is when the holder renewed it last. Expired is set if the holder is late.
	Renewed time.Time `json:"renewed,omitzero"`
	Expired bool      `json:"expired,omitempty"`
}

// Certificate is one that expires next: of this server's, of its authorities, and of each other member of etcd.
type Certificate struct {
	Name string `json:"name"`
	// Node is the node that has it; empty for an authority, which all servers share.
	Node      string    `json:"node,omitempty"`
	Authority bool      `json:"authority,omitempty"`
	Expires   time.Time `json:"expires"`
}

// Snapshot is the newest snapshot, and whether a later scheduled one failed.
type Snapshot struct {
	File    string    `json:"file,omitempty"`
	Created time.Time `json:"created,omitzero"`
	Size    int64     `json:"sizeBytes,omitempty"`
	// Failure is why the last scheduled one failed.
	Failure string `json:"failure,omitempty"`
}
