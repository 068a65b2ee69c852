package config

import (
	"strings"
	"testing"
)

func TestEtcdArgs(t *testing.T) {
	s, err := Parse([]string{"--cluster-init", "--etcd-arg", "quota-backend-bytes=4294967296", "--etcd-arg", "--heartbeat-interval=500", "--etcd-arg", "election-timeout=5000", "--etcd-arg=snapshot-count=20000"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if want := (EtcdArgs{Quota: 4 << 30, Heartbeat: 500, Election: 5000, SnapshotCount: 20000}); s.EtcdArgs != want {
		t.Errorf("%+v, want %+v", s.EtcdArgs, want)
	}
	for _, c := range []struct {
		args string
		want string
	}{
		{"--etcd-arg data-dir=/tmp", "is not name=value with one of the names quota-backend-bytes"},
		{"--etcd-arg quota-backend-bytes", "is not name=value"},
		{"--etcd-arg quota-backend-bytes=8GiB", "is not a whole number from 67108864 to 8589934592"},
		{"--etcd-arg quota-backend-bytes=0", "is not a whole number"},
		{"--etcd-arg quota-backend-bytes=8589934593", "is not a whole number"},
		{"--etcd-arg heartbeat-interval=500", "belong together"},
		{"--etcd-arg heartbeat-interval=500 --etcd-arg election-timeout=1000", "less than five times"},
		{"--etcd-arg quota-backend-bytes=4294967296 --datastore-endpoint etcd://a", "--etcd-arg is for etcd on the servers"},
		{"--cluster-reset --datastore-endpoint etcd://a", "--cluster-reset is for etcd on the servers"},
		{"--cluster-reset-restore-path x", "needs --cluster-reset"},
		{"--cluster-reset-force", "needs --cluster-reset"},
	} {
		if _, err := Parse(strings.Fields(c.args), nil); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: error is %v, want %q", c.args, err, c.want)
		}
	}
	if s, err := Parse([]string{"--cluster-reset", "--cluster-reset-restore-path", "x"}, nil); err != nil || !s.ClusterReset || s.ClusterResetRestorePath != "x" {
		t.Errorf("%+v, %v", s, err)
	}
}
