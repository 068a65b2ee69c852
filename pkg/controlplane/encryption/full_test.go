//go:build integration

package encryption_test

import (
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.etcd.io/etcd/api/v3/etcdserverpb"

	"polymesh.dev/polymesh/pkg/controlplane/datastore/etcd/etcdtest"
	"polymesh.dev/polymesh/pkg/controlplane/encryption"
)

// A server of the cluster starts while etcd takes no writes: whoever deletes what fills it needs an API server.
func TestStartOnAFullDatastore(t *testing.T) {
	ctx, dir := t.Context(), t.TempDir()
	endpoint := etcdtest.Cluster(t, slog.New(slog.DiscardHandler), "outside")[0].Endpoint()
	endpoint.LeaderElect = true
	p := encryption.Place{File: filepath.Join(dir, "encryption-config.json"), Datastore: endpoint, BootstrapKey: filepath.Join(dir, "bootstrap.key")}
	one := encryption.Self{Name: "one", Address: netip.MustParseAddr("192.0.2.1")}
	start := func(self encryption.Self) error {
		if err := endpoint.Claim(ctx, "cluster"); err != nil {
			return err
		}
		return p.Ensure(ctx, self, "")
	}
	if err := start(one); err != nil {
		t.Fatal(err)
	}
	client, err := endpoint.Client()
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	full := &etcdserverpb.AlarmRequest{Action: etcdserverpb.AlarmRequest_ACTIVATE, Alarm: etcdserverpb.AlarmType_NOSPACE}
	if _, err := etcdserverpb.NewMaintenanceClient(client.ActiveConnection()).Alarm(ctx, full); err != nil {
		t.Fatal(err)
	}
	if _, err := client.Put(ctx, "/x", "y"); err == nil {
		t.Fatal("etcd still takes writes")
	}
	if err := os.Remove(p.File); err != nil {
		t.Fatal(err)
	}
	if err := start(one); err != nil {
		t.Errorf("a server that has a record: %v", err)
	}
	if _, err := os.Stat(p.File); err != nil {
		t.Error(err)
	}
	// The others would not wait for these.
	for _, self := range []encryption.Self{{Name: "two", Address: netip.MustParseAddr("192.0.2.2")}, {Name: "one", Address: netip.MustParseAddr("192.0.2.3")}} {
		if err := start(self); err == nil || !strings.Contains(err.Error(), "write the record of server "+self.Name) {
			t.Errorf("%+v, which has no record: %v", self, err)
		}
	}
}
