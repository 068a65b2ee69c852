package node

import (
	"os"
	"path/filepath"
	"testing"

	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/layout"
)

func TestMakeStorage(t *testing.T) {
	for name, tt := range map[string]struct {
		storage string
		before  os.FileMode // of the folder; 0 if there is none
		mode    os.FileMode
		open    bool
	}{
		"in the data dir, missing":       {storage: "data/storage", mode: 0o700},
		"in the data dir, open":          {storage: "data/storage", before: 0o755, mode: 0o700},
		"elsewhere, missing":             {storage: "server/storage", mode: 0o700},
		"elsewhere, someone's":           {storage: "server/storage", before: 0o755, mode: 0o755, open: true},
		"elsewhere, closed":              {storage: "server/storage", before: 0o700, mode: 0o700},
		"a data dir with a similar name": {storage: "data2/storage", before: 0o755, mode: 0o755, open: true},
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			o := Options{Settings: config.Node{DataDir: layout.DataDir(filepath.Join(root, "data"))}, StorageDir: filepath.Join(root, tt.storage)}
			if tt.before != 0 {
				if err := os.MkdirAll(o.StorageDir, tt.before); err != nil {
					t.Fatal(err)
				}
			}
			for range 2 {
				open, err := o.makeStorage()
				if err != nil || open != tt.open {
					t.Fatalf("open: %t, %v; want %t", open, err, tt.open)
				}
				if info, err := os.Stat(o.StorageDir); err != nil || info.Mode().Perm() != tt.mode {
					t.Fatalf("%v %v, want mode %o", info, err, tt.mode)
				}
			}
		})
	}
	if open, err := (Options{}).makeStorage(); open || err != nil {
		t.Errorf("without volumes: %t %v", open, err)
	}
}
