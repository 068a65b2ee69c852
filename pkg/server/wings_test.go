package server

import (
	"go/build"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// The platform does not import the workflow, nor the workflow the platform: both use pkg/imagestore and what has no wing.
func TestWings(t *testing.T) {
	const module = "polymesh.dev/polymesh/"
	platform := []string{"pkg/controlplane", "pkg/node", "pkg/mesh", "pkg/server", "pkg/agent", "pkg/worker", "pkg/process", "pkg/join", "pkg/bootstrap", "pkg/reset", "pkg/preflight", "pkg/payload", "pkg/datadir", "pkg/observe"}
	in := func(path string, wings ...string) bool {
		for _, wing := range wings {
			if path == wing || strings.HasPrefix(path, wing+"/") {
				return true
			}
		}
		return false
	}
	seen := 0
	err := filepath.WalkDir("..", func(dir string, d os.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return err
		}
		if d.Name() == "testdata" || d.Name() == "templates" {
			return filepath.SkipDir
		}
		from := filepath.Join("pkg", strings.TrimPrefix(dir, ".."))
		own, err := build.Default.ImportDir(dir, 0)
		if err != nil {
			return nil // a folder without a package
		}
		seen++
		for _, path := range own.Imports {
			to, ours := strings.CutPrefix(path, module)
			if !ours {
				continue
			}
			if in(from, platform...) && in(to, "pkg/workflow") || in(from, "pkg/workflow") && in(to, platform...) {
				t.Errorf("%s imports %s", from, to)
			}
			if in(from, "pkg/workflow", "pkg/imagestore") && to == "pkg/config" {
				t.Errorf("%s imports the configuration of a server", from)
			}
		}
		return nil
	})
	if err != nil || seen < 40 {
		t.Errorf("%d packages: %v", seen, err)
	}
}
