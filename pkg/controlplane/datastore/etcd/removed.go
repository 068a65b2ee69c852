package etcd

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"polymesh.dev/polymesh/pkg/atomicfile"
)

// errRemoved is what a server does not start with after the cluster has removed its member.
var errRemoved = errors.New("this server was removed from the cluster: start it with --server https://HOST:6443, the address of another server, to join again, or remove it with `polymesh reset`")

const (
	// asideInfix separates the name of a member's folder from the time, as asideTime, at which it was put aside.
	asideInfix, asideTime = "-old-", "20060102T150405.000Z"
	// asideKept is how many folders stay, as with K3s (pkg/etcd/etcd.go).
	asideKept = 5
)

// SetAside renames the data in dir of a member that the cluster has removed, which no member uses any more, so that the server can join
// as a new one. It returns the data's new name, which is empty if the member was not removed: then nothing is changed. The newest five
// stay. Call it before a join: without one, a server must not start with no data, and so begin a cluster of its own.
func SetAside(dir string, now time.Time) (aside string, err error) {
	removed, err := wasRemoved(dir)
	if err != nil || !removed {
		return "", err
	}
	aside = dir + asideInfix + now.UTC().Format(asideTime)
	if err := atomicfile.Rename(dir, aside); err != nil {
		return "", fmt.Errorf("put the data of a removed member of etcd aside: %w", err)
	}
	entries, err := os.ReadDir(filepath.Dir(dir))
	if err != nil {
		return aside, err
	}
	var old []string
	for _, entry := range entries {
		stamp, ok := strings.CutPrefix(entry.Name(), filepath.Base(dir)+asideInfix)
		if _, err := time.Parse(asideTime, stamp); !ok || err != nil || !entry.IsDir() {
			continue
		}
		path := filepath.Join(filepath.Dir(dir), entry.Name())
		if removed, err := wasRemoved(path); err == nil && removed {
			old = append(old, path)
		}
	}
	slices.Sort(old)
	for _, path := range old[:max(0, len(old)-asideKept)] {
		if err := os.RemoveAll(path); err != nil {
			return aside, fmt.Errorf("remove the data of an earlier member of etcd: %w", err)
		}
	}
	return aside, nil
}

// wasRemoved reports whether dir has the data of a member that the cluster has removed.
func wasRemoved(dir string) (bool, error) {
	m, err := ReadMembership(dir)
	return m.Removed, err
}

// Membership is what is known on disk of a member that need not run.
type Membership struct {
	// Shared is set once the cluster has had other members.
	Shared bool `json:"shared,omitempty"`
	// Removed is set when the cluster has removed this one: its data is useless then.
	Removed bool `json:"removed,omitempty"`
}

// ReadMembership reads the membership of the member with its data in dir. It is empty if there is none.
func ReadMembership(dir string) (Membership, error) {
	id, err := readIdentity(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return Membership{}, nil
	}
	if err != nil {
		return Membership{}, fmt.Errorf("read the identity of this member of etcd: %w", err)
	}
	return id.Membership, nil
}
