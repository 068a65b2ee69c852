//go:build integration

package image

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"
)

// TestReadBases has a base image that gets other content under the same name.
func TestReadBases(t *testing.T) {
	for _, name := range []string{"buildah", "podman"} {
		t.Run(name, func(t *testing.T) {
			storage := t.TempDir()
			conf := filepath.Join(storage, "storage.conf")
			if err := os.WriteFile(conf, fmt.Appendf(nil, "[storage]\ndriver = \"vfs\"\ngraphroot = %q\nrunroot = %q\n",
				filepath.Join(storage, "root"), filepath.Join(storage, "run")), 0o600); err != nil {
				t.Fatal(err)
			}
			t.Setenv("CONTAINERS_STORAGE_CONF", conf)
			e, err := Find(t.Context(), name)
			if err != nil {
				t.Fatal(err)
			}
			const base = "registry.example.com/base:1"
			build := func(text string) {
				t.Helper()
				s := source(t, map[string]string{"Dockerfile": "FROM scratch\nCOPY text /\n", "text": text})
				if err := e.Build(t.Context(), base, s, io.Discard); err != nil {
					t.Fatal(err)
				}
			}
			s := source(t, map[string]string{"Dockerfile": "ARG V=1\nFROM registry.example.com/base:${V} AS x\nFROM scratch\nCOPY --from=x /text /\n"})
			fingerprint := func() string {
				t.Helper()
				if err := s.ReadBases(t.Context(), e, nil, nil); err != nil {
					t.Fatal(err)
				}
				text, err := s.Fingerprint()
				if err != nil {
					t.Fatal(err)
				}
				return text
			}
			none := fingerprint()
			if len(s.BaseIDs) != 0 {
				t.Errorf("ids of a base that is not there: %q", s.BaseIDs)
			}
			build("one")
			one := fingerprint()
			if len(s.BaseIDs[base]) != 64 || one == none || fingerprint() != one {
				t.Errorf("ids of a base that is there: %q", s.BaseIDs)
			}
			build("two")
			if fingerprint() == one {
				t.Error("another base image under the same name changes nothing")
			}
		})
	}
}
