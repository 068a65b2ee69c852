// Package cgroup knows which kind of control groups this machine has, and who owns them. pkg/node and pkg/observe create some.
package cgroup

import (
	"os"
	"path/filepath"
)

// Mount is where the control groups are.
const Mount = "/sys/fs/cgroup"

// Unified reports whether the machine has cgroup v2 alone.
func Unified() bool {
	_, err := os.Stat(filepath.Join(Mount, "cgroup.controllers"))
	return err == nil
}

// BySystemd reports whether systemd owns the tree, in which no one else may create cgroups outside of what it has delegated
// (https://systemd.io/CGROUP_DELEGATION/). With cgroup v1 it tolerates others.
func BySystemd() bool {
	_, err := os.Stat("/run/systemd/system")
	return err == nil && Unified()
}
