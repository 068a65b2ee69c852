package datastore

import (
	"path/filepath"
	"strings"
	"testing"
)

// The first cluster has the datastore, and keeps it.
func TestClaim(t *testing.T) {
	dir := t.TempDir()
	d := New(Options{Dir: filepath.Join(dir, "db"), Socket: filepath.Join(dir, "kine.sock"), Sync: "full"})
	start(t, d)
	for _, cluster := range []string{"a", "a"} {
		if err := d.Endpoint().Claim(t.Context(), cluster); err != nil {
			t.Errorf("its own cluster: %v", err)
		}
	}
	if err := d.Endpoint().Claim(t.Context(), "b"); err == nil || !strings.Contains(err.Error(), "the datastore holds another cluster") {
		t.Errorf("another cluster: %v", err)
	}
	if err := d.Endpoint().Claim(t.Context(), "a"); err != nil {
		t.Errorf("its own cluster, after another has tried: %v", err)
	}
}
