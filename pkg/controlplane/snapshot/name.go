package snapshot

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"regexp"
	"slices"
	"time"
)

// Names of snapshots that Polymesh saves by itself. A user cannot use them, because retention removes these.
const (
	Scheduled            = "scheduled"
	BeforeRestore        = "before-restore"
	BeforeUpgrade        = "before-upgrade"
	BeforeSecretsEncrypt = "before-secrets-encrypt"
	BeforeDatastoreMove  = "before-datastore-move"
	BeforeClusterReset   = "before-cluster-reset"
)

// OnDemand is the default name of a user's snapshot, as in K3s.
const OnDemand = "on-demand"

func automatic() []string {
	return []string{Scheduled, BeforeRestore, BeforeUpgrade, BeforeSecretsEncrypt, BeforeDatastoreMove, BeforeClusterReset}
}

// A file's name has three parts, and the id of the cluster, which those of earlier versions do not have. None of them can contain the separator:
// a node's name is a DNS name.
var (
	namePart  = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9.-]{0,61}[A-Za-z0-9])?$`)
	clusterID = regexp.MustCompile(`^[0-9a-f]{12}$`)
	fileName  = regexp.MustCompile(`^([A-Za-z0-9][A-Za-z0-9.-]{0,62})_([a-z0-9][a-z0-9.-]{0,252})_([0-9]{8}T[0-9]{6}\.[0-9]{3}Z)(?:_([0-9a-f]{12}))?\.tar\.zst(\.age)?$`)
)

const (
	timeFormat = "20060102T150405.000Z"
	// encryptedSuffix is age's own.
	encryptedSuffix = ".age"
)

// CheckName rejects a name that a snapshot of a user cannot have.
func CheckName(name string) error {
	if !namePart.MatchString(name) {
		return fmt.Errorf("--name %q is not a name of up to 63 letters, digits, '-' and '.'", name)
	}
	if slices.Contains(automatic(), name) {
		return fmt.Errorf("--name %s is the name of automatic snapshots, which are removed by themselves: choose another", name)
	}
	return nil
}

// parts are what a file's name contains about a snapshot.
type parts struct {
	name, node string
	created    time.Time
	cluster    string // empty in a name of an earlier version
	encrypted  bool
}

func (p parts) String() string {
	cluster, suffix := "", ""
	if p.cluster != "" {
		cluster = "_" + p.cluster
	}
	if p.encrypted {
		suffix = encryptedSuffix
	}
	return p.name + "_" + p.node + "_" + p.created.UTC().Format(timeFormat) + cluster + ".tar.zst" + suffix
}

// info returns what a snapshot's name says, with where it is.
func (p parts) info(at Location, path string, size int64) Info {
	return Info{File: p.String(), Name: p.name, Node: p.node, Cluster: p.cluster, Location: at, Path: path, Created: p.created, Size: size, Encrypted: p.encrypted}
}

// nodePart returns a node's name in a file's name: the name, or its beginning and a hash. A file's name has up to 255 bytes, and a
// node's up to 253.
func nodePart(node string) string {
	const most = 100
	if len(node) <= most {
		return node
	}
	sum := sha256.Sum256([]byte(node))
	return node[:most] + "-" + hex.EncodeToString(sum[:8])
}

// parse reports whether a file has the name of a snapshot. Other files are left alone.
func parse(file string) (parts, bool) {
	m := fileName.FindStringSubmatch(file)
	if m == nil {
		return parts{}, false
	}
	created, err := time.Parse(timeFormat, m[3])
	p := parts{m[1], m[2], created, m[4], m[5] != ""}
	return p, err == nil && p.String() == file
}
