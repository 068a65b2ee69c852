package addon

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"polymesh.dev/polymesh/pkg/config"
)

// scripts returns what the provisioner's helper pods run.
func scripts(t *testing.T) (setup, teardown string) {
	t.Helper()
	objects, err := render(testOptions(config.LocalStorage), inputs{})
	if err != nil {
		t.Fatal(err)
	}
	for _, obj := range objects {
		if obj.GetKind() == "ConfigMap" {
			data := obj.Object["data"].(map[string]any)
			return data["setup"].(string), data["teardown"].(string)
		}
	}
	t.Fatal("no ConfigMap")
	return "", ""
}

// A volume is made and removed strictly below the storage folder, whatever the path, its links and its neighbours are.
func TestLocalStorageScripts(t *testing.T) {
	setup, teardown := scripts(t)
	const storage = "/srv/storage" // the host's name of the folder, which a container has at another place
	for _, tt := range []struct {
		name, path string
		refused    string
		before     func(t *testing.T, mount, outside string)
	}{
		{name: "a volume", path: storage + "/pvc-1_shop_data"},
		{name: "a volume in a folder", path: storage + "/shop/data"},
		{name: "odd names", path: storage + "/a b;$(touch x)'\"*"},
		{name: "the folder itself", path: storage, refused: "not below"},
		{name: "the folder itself, with a slash", path: storage + "/", refused: "not below"},
		{name: "another folder that begins like it", path: storage + "2/x", refused: "not below"},
		{name: "outside", path: "/srv/outside/precious", refused: "not below"},
		{name: "upwards", path: storage + "/../outside/precious", refused: "not a plain path"},
		{name: "upwards at the end", path: storage + "/a/..", refused: "not a plain path"},
		{name: "a link", path: storage + "/link", refused: "a link", before: func(t *testing.T, mount, outside string) {
			link(t, outside, filepath.Join(mount, "link"))
		}},
		{name: "behind a link", path: storage + "/shop/link/precious", refused: "a link", before: func(t *testing.T, mount, outside string) {
			makeFolder(t, filepath.Join(mount, "shop"), 0o755)
			link(t, outside, filepath.Join(mount, "shop", "link"))
		}},
		{name: "in another volume", path: storage + "/volume/deep", refused: "anybody may write", before: func(t *testing.T, mount, outside string) {
			makeFolder(t, filepath.Join(mount, "volume"), 0o777)
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			mount, outside := filepath.Join(dir, "storage"), filepath.Join(dir, "outside")
			makeFolder(t, mount, 0o700)
			makeFolder(t, outside, 0o755)
			keep := filepath.Join(outside, "precious")
			makeFolder(t, keep, 0o755)
			if tt.before != nil {
				tt.before(t, mount, outside)
			}
			run := func(script string) (string, error) {
				cmd := exec.Command("sh", "-c", script)
				cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "VOL_DIR=" + tt.path, "STORAGE_DIR=" + storage, "STORAGE_MOUNT=" + mount}
				out, err := cmd.CombinedOutput()
				return string(out), err
			}
			for _, script := range []string{setup, teardown} {
				out, err := run(script)
				if (err != nil) != (tt.refused != "") || !strings.Contains(out, tt.refused) {
					t.Fatalf("%v: %s; want it refused with %q", err, out, tt.refused)
				}
				made := filepath.Join(mount, strings.TrimPrefix(tt.path, storage))
				info, err := os.Lstat(made)
				switch {
				case tt.refused != "":
				case script == setup && (err != nil || info.Mode().Perm() != 0o777):
					t.Errorf("the volume is not there, open to every user: %v %v", info, err)
				case script == setup:
					if err := os.WriteFile(filepath.Join(made, "f"), nil, 0o600); err != nil {
						t.Error(err)
					}
				case !os.IsNotExist(err):
					t.Errorf("the volume is still there: %v", err)
				}
			}
			for path, mode := range map[string]os.FileMode{mount: 0o700, outside: 0o755, keep: 0o755} {
				if info, err := os.Stat(path); err != nil || info.Mode().Perm() != mode {
					t.Errorf("%s: %v %v, want mode %o", path, info, err, mode)
				}
			}
		})
	}
}

func makeFolder(t *testing.T, path string, mode os.FileMode) {
	t.Helper()
	if err := os.MkdirAll(path, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
}

func link(t *testing.T, target, path string) {
	t.Helper()
	if err := os.Symlink(target, path); err != nil {
		t.Fatal(err)
	}
}
