package node

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

const cgroupMount = "/sys/fs/cgroup"

// systemdCgroups reports whether systemd manages the cgroups, in which case containers' cgroups are created through it
// (https://kubernetes.io/docs/setup/production-environment/container-runtimes/#cgroup-drivers). With cgroup v1
// and without systemd the node creates them itself.
func systemdCgroups() bool {
	_, err := os.Stat("/run/systemd/system")
	return err == nil && unifiedCgroups()
}

func unifiedCgroups() bool {
	_, err := os.Stat(filepath.Join(cgroupMount, "cgroup.controllers"))
	return err == nil
}

// makeCgroup creates the cgroup that holds all pods, in every hierarchy; the kubelet expects its root to exist.
func makeCgroup(name string) error {
	if !unifiedCgroups() {
		hierarchies, err := os.ReadDir(cgroupMount)
		if err != nil {
			return fmt.Errorf("list cgroup hierarchies: %w", err)
		}
		for _, h := range hierarchies {
			// A link is an alias of a hierarchy, such as cpu for cpu,cpuacct.
			if !h.IsDir() || h.Name() == "unified" {
				continue
			}
			err := os.Mkdir(filepath.Join(cgroupMount, h.Name(), name), 0o755)
			if err != nil && !errors.Is(err, fs.ErrExist) {
				return fmt.Errorf("create cgroup: %w", err)
			}
		}
		return nil
	}
	dir := filepath.Join(cgroupMount, name)
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("create cgroup: %w", err)
	}
	for _, parent := range []string{cgroupMount, dir} {
		have, err := os.ReadFile(filepath.Join(parent, "cgroup.controllers"))
		if err != nil {
			return fmt.Errorf("list cgroup controllers: %w", err)
		}
		for _, controller := range strings.Fields(string(have)) {
			// If a controller cannot be delegated (realtime tasks in the root, for example), the kubelet reports it as missing.
			_ = os.WriteFile(filepath.Join(parent, "cgroup.subtree_control"), []byte("+"+controller), 0o644)
		}
	}
	return nil
}
