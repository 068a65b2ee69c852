package command

import (
	"context"
	"encoding/json"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"polymesh.dev/polymesh/pkg/certificate"
	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/controlplane/datastore"
	"polymesh.dev/polymesh/pkg/controlplane/snapshot"
	"polymesh.dev/polymesh/pkg/datadir"
	"polymesh.dev/polymesh/pkg/layout"
)

// A stopped server's cluster is saved, listed, restored and removed by the commands, with the settings of the server's config file.
func TestSnapshotCommands(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	dir := layout.DataDir(filepath.Join(t.TempDir(), "data-dir"))
	t.Cleanup(func() { os.RemoveAll(dir.Run()) })
	if _, err := datadir.Claim(dir); err != nil {
		t.Fatal(err)
	}
	ip := netip.MustParseAddr("192.0.2.1")
	if _, err := certificate.Ensure(certificate.Options{Dir: dir.TLS(), NodeName: "n1", NodeIP: ip, ServiceIP: ip, ClusterDomain: "cluster.local", Now: time.Now()}); err != nil {
		t.Fatal(err)
	}
	d := datastore.New(datastore.Options{Dir: dir.Server("db"), Socket: filepath.Join(t.TempDir(), "kine.sock"), Sync: config.SyncFull})
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := d.Start(ctx); err != nil {
		t.Fatal(err)
	}
	if err := d.Stop(ctx); err != nil {
		t.Fatal(err)
	}
	snapshots := filepath.Join(t.TempDir(), "snapshots")
	file := filepath.Join(t.TempDir(), "config.yaml")
	if err := os.WriteFile(file, []byte("data-dir: "+string(dir)+"\nnode-name: n1\nmesh-profile: demo\nsnapshot-dir: "+snapshots+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	run := func(args ...string) string {
		t.Helper()
		out, errOut, err := call(append(args, "--config", file)...)
		if err != nil {
			t.Fatalf("%s: %v: %s", strings.Join(args, " "), err, errOut)
		}
		return out
	}
	fails := func(want string, args ...string) {
		t.Helper()
		if _, _, err := call(append(args, "--config", file)...); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: error is %v, want %s", strings.Join(args, " "), err, want)
		}
	}
	if out := run("snapshot", "ls", "-o", "json"); strings.TrimSpace(out) != "[]" {
		t.Errorf("no snapshots are %q", out)
	}
	out := run("snapshot", "save")
	if !strings.Contains(out, "is not encrypted") || !strings.Contains(out, "PersistentVolumes") || !strings.Contains(out, snapshots+"/on-demand_n1_") {
		t.Errorf("save prints %q", out)
	}
	var info snapshot.Info
	// K3s's name of the command.
	if err := json.Unmarshal([]byte(run("etcd-snapshot", "save", "--name", "mine", "-o", "json")), &info); err != nil || info.Name != "mine" || info.Revision == 0 {
		t.Errorf("%+v, %v", info, err)
	}
	if out := run("snapshot", "ls"); strings.Count(out, "_n1_") != 2 || !strings.HasPrefix(out, "FILE ") {
		t.Errorf("ls prints %q", out)
	}
	fails("--encrypt needs a passphrase", "snapshot", "save", "--encrypt")
	fails("choose another", "snapshot", "save", "--name", "scheduled")
	fails("give the name of a snapshot", "snapshot", "restore")
	fails("unknown flag: --mesh-profile", "snapshot", "save", "--mesh-profile", "demo")
	fails("nothing was changed", "snapshot", "restore", info.File)
	if out := run("snapshot", "restore", "--yes", info.File); !strings.Contains(out, "before-restore-") || !strings.Contains(out, "--mesh-profile=demo") ||
		!strings.Contains(out, "PersistentVolumes") || strings.Contains(out, "is removed") {
		t.Errorf("restore prints %q", out)
	}
	if out := run("snapshot", "restore", "--yes", "--node-name", "n2", info.File); !strings.Contains(out, "node n1 is removed") {
		t.Errorf("restore on another node prints %q", out)
	}
	if out, _, err := call("__complete", "snapshot", "restore", "--config", file, ""); err != nil || !strings.Contains(out, info.File+"\n") {
		t.Errorf("completion: %v: %s", err, out)
	}
	run("snapshot", "save")
	// Of each name one stays.
	if out := run("snapshot", "prune", "--keep", "1"); strings.Count(out, "removed ") != 1 || !strings.Contains(out, snapshot.OnDemand) {
		t.Errorf("prune prints %q", out)
	}
	if out := run("snapshot", "delete", info.File); out != "removed "+info.Path+"\n" {
		t.Errorf("delete prints %q", out)
	}
	fails("there is no snapshot", "snapshot", "delete", info.File)
}
