package node

import (
	"bytes"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	bolt "go.etcd.io/bbolt"
	"k8s.io/kubernetes/pkg/kubelet/allocation/state"
	drastate "k8s.io/kubernetes/pkg/kubelet/cm/dra/state"
)

// kubeletState returns the state files as written by the kubelet.
func kubeletState(t *testing.T) map[string][]byte {
	t.Helper()
	pods, err := state.NewCheckpoint(&state.PodResourceCheckpointInfo{})
	ok(t, err)
	podsText, err := pods.MarshalCheckpoint()
	ok(t, err)
	claims, err := drastate.NewCheckpoint(nil)
	ok(t, err)
	claimsText, err := claims.MarshalCheckpoint()
	ok(t, err)
	return map[string][]byte{
		"allocated_pods_state":         podsText,
		"actuated_pods_state":          podsText,
		"dra_manager_state":            claimsText,
		"dra_health_state":             []byte(`{}`),
		"cpu_manager_state":            []byte(`{"policyName":"none","defaultCpuSet":"","checksum":1353318690}`),
		"memory_manager_state":         []byte(`{"policyName":"None","machineState":{},"checksum":4236770233}`),
		"graceful_node_shutdown_state": []byte(`{"startTime":"2026-01-01T00:00:00Z","endTime":"2026-01-01T00:00:01Z"}`),
		deviceCheckpoint:               []byte(`{"Data":{"PodDeviceEntries":null,"RegisteredDevices":{}},"Checksum":0}`),
	}
}

func writeState(t *testing.T, dir string, files map[string][]byte) {
	t.Helper()
	for name, text := range files {
		path := filepath.Join(dir, name)
		ok(t, os.MkdirAll(filepath.Dir(path), 0o755))
		ok(t, os.WriteFile(path, text, 0o600))
	}
}

// Any damaged state file of the kubelet is renamed, with its contents, and intact ones stay.
func TestTornCheckpointsAreSetAside(t *testing.T) {
	whole := kubeletState(t)
	torn := map[string]func([]byte) []byte{
		"NULs":      func(text []byte) []byte { return make([]byte, len(text)) },
		"empty":     func([]byte) []byte { return nil },
		"shortened": func(text []byte) []byte { return text[:len(text)-1] },
	}
	for how, tear := range torn {
		for name := range whole {
			t.Run(how+" "+name, func(t *testing.T) {
				dir := t.TempDir()
				writeState(t, dir, whole)
				bad := tear(whole[name])
				ok(t, os.WriteFile(filepath.Join(dir, name), bad, 0o600))
				var log bytes.Buffer
				for range 2 { // the second time there is nothing to do
					ok(t, setTornCheckpointsAside(dir, slog.New(slog.NewTextHandler(&log, nil))))
				}
				aside, err := filepath.Glob(filepath.Join(dir, name+".broken-*"))
				if err != nil || len(aside) != 1 {
					t.Fatalf("renamed: %q %v", aside, err)
				}
				if have, err := os.ReadFile(aside[0]); err != nil || !bytes.Equal(have, bad) {
					t.Errorf("the renamed file contains %q (%v)", have, err)
				}
				if n := strings.Count(log.String(), "\n"); n != 1 || !strings.Contains(log.String(), filepath.Join(dir, name)) {
					t.Errorf("the log is %s", log.String())
				}
				for other := range whole {
					if _, err := os.Stat(filepath.Join(dir, other)); (err == nil) != (other != name) {
						t.Errorf("%s: %v", other, err)
					}
				}
			})
		}
	}
}

// A file that is still valid JSON, but with other contents, has a wrong checksum.
func TestCheckpointWithAWrongSumIsSetAside(t *testing.T) {
	dir := t.TempDir()
	files := kubeletState(t)
	for _, name := range []string{"allocated_pods_state", "dra_manager_state"} {
		files[name] = bytes.Replace(files[name], []byte("{"), []byte(`{"checksum":1,`), 1)
		files[name] = bytes.Replace(files[name], []byte(`"data":"`), []byte(`"data":" `), 1)
		files[name] = bytes.Replace(files[name], []byte(`"Data":"`), []byte(`"Data":" `), 1)
	}
	writeState(t, dir, files)
	ok(t, setTornCheckpointsAside(dir, slog.New(slog.DiscardHandler)))
	aside, err := filepath.Glob(filepath.Join(dir, "*.broken-*"))
	if err != nil || len(aside) != 2 {
		t.Errorf("renamed: %q %v", aside, err)
	}
}

// makeBolt writes a database of several hundred pages.
func makeBolt(t *testing.T, path string) {
	t.Helper()
	ok(t, os.MkdirAll(filepath.Dir(path), 0o755))
	db, err := bolt.Open(path, 0o600, nil)
	ok(t, err)
	ok(t, db.Update(func(tx *bolt.Tx) error {
		for i := range 20 {
			b, err := tx.CreateBucket(fmt.Appendf(nil, "bucket-%d", i))
			if err != nil {
				return err
			}
			nested, err := b.CreateBucket([]byte("nested"))
			if err != nil {
				return err
			}
			for k := range 100 {
				if err := nested.Put(fmt.Appendf(nil, "key-%d", k), bytes.Repeat([]byte{byte(k)}, 700)); err != nil {
					return err
				}
			}
		}
		return nil
	}))
	ok(t, db.Close())
}

func TestTornMetadataIsSetAside(t *testing.T) {
	const other = "io.containerd.mount-manager.v1.bolt/mounts.db"
	for how, tear := range map[string]func([]byte) []byte{
		"NULs":        func(b []byte) []byte { return make([]byte, len(b)) },
		"shortened":   func(b []byte) []byte { return b[:len(b)/2] },
		"page of 0s":  func(b []byte) []byte { clear(b[20*4096 : 40*4096]); return b },
		"other bytes": func(b []byte) []byte { copy(b[16*4096:], bytes.Repeat([]byte{0xff}, 64*4096)); return b },
	} {
		for i, name := range append([]string{other}, metadata...) {
			t.Run(how+" "+name, func(t *testing.T) {
				parent := t.TempDir()
				dir := filepath.Join(parent, "containerd")
				for _, file := range append([]string{other}, metadata...) {
					makeBolt(t, filepath.Join(dir, file))
				}
				log := slog.New(slog.DiscardHandler)
				ok(t, setTornMetadataAside(dir, log))
				if entries, err := os.ReadDir(parent); err != nil || len(entries) != 1 {
					t.Fatalf("intact databases were renamed: %v %v", entries, err)
				}
				path := filepath.Join(dir, name)
				text, err := os.ReadFile(path)
				ok(t, err)
				ok(t, os.WriteFile(path, tear(text), 0o600))
				for range 2 {
					ok(t, setTornMetadataAside(dir, log))
				}
				pattern := filepath.Join(parent, "containerd.broken-*")
				if i == 0 { // the layers are usable without it
					pattern = filepath.Join(dir, filepath.FromSlash(other)+".broken-*")
				}
				if aside, err := filepath.Glob(pattern); err != nil || len(aside) != 1 {
					t.Errorf("renamed: %q %v", aside, err)
				}
			})
		}
	}
}

// At the first start none of the files exist.
func TestNothingToSetAside(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "none")
	ok(t, setTornCheckpointsAside(dir, slog.New(slog.DiscardHandler)))
	ok(t, setTornMetadataAside(dir, slog.New(slog.DiscardHandler)))
}
