package node

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"polymesh.dev/polymesh/pkg/cgroup"
)

// makeCgroup creates the cgroup that holds all pods, in every hierarchy; the kubelet expects its root to exist.
func makeCgroup(name string) error {
	if !cgroup.Unified() {
		hierarchies, err := os.ReadDir(cgroup.Mount)
		if err != nil {
			return fmt.Errorf("list cgroup hierarchies: %w", err)
		}
		for _, h := range hierarchies {
			// A link is an alias of a hierarchy, such as cpu for cpu,cpuacct.
			if !h.IsDir() || h.Name() == "unified" {
				continue
			}
			err := os.Mkdir(filepath.Join(cgroup.Mount, h.Name(), name), 0o755)
			if err != nil && !errors.Is(err, fs.ErrExist) {
				return fmt.Errorf("create cgroup: %w", err)
			}
		}
		return nil
	}
	dir := filepath.Join(cgroup.Mount, name)
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("create cgroup: %w", err)
	}
	for _, parent := range []string{cgroup.Mount, dir} {
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
