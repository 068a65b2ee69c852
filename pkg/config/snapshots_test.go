package config

import (
	"slices"
	"strings"
	"testing"
)

// K3s's names work everywhere, and count as the same setting.
func TestK3sNamesOfSnapshots(t *testing.T) {
	path := file(t, "etcd-snapshot-schedule-cron: 0 3 * * *\netcd-disable-snapshots: true\n")
	s, err := Parse([]string{"-c", path}, []string{"POLYMESH_ETCD_SNAPSHOT_RETENTION=8"})
	if err != nil || s.Snapshots.Schedule != "0 3 * * *" || !s.Snapshots.Disabled || s.Snapshots.Retention != 8 {
		t.Errorf("%+v, %v", s, err)
	}
	_, err = Parse([]string{"-c", file(t, "etcd-snapshot-retention: 3\nsnapshot-retention: 4\n")}, nil)
	wantError(t, "one setting by two names", err, "snapshot-retention is set twice")
}

// The commands read the server's file and environment, have only the flags of snapshots, and these override.
func TestSnapshotFlags(t *testing.T) {
	path := file(t, "data-dir: /srv/a\nmesh-profile: demo\ncluster-cidr: 10.50.0.0/16\ndisable: [istio, coredns]\nsnapshot-dir: /srv/snapshots\ns3: true\ns3-bucket: backups\n")
	f := SnapshotFlags()
	if err := f.Parse([]string{"-c", path, "--dir", "/mnt/b", "--etcd-s3-folder=c"}); err != nil {
		t.Fatal(err)
	}
	s, err := f.Server([]string{"POLYMESH_NODE_NAME=n1", "POLYMESH_SNAPSHOT_PASSPHRASE=correct horse"})
	if err != nil {
		t.Fatal(err)
	}
	if s.DataDir != "/srv/a" || s.NodeName != "n1" || s.Snapshots.Dir != "/mnt/b" || s.Snapshots.S3.Bucket != "backups" || s.Snapshots.S3.Folder != "c" ||
		s.Snapshots.Passphrase != "correct horse" || s.ConfigFile != path {
		t.Errorf("%+v", s)
	}
	if want := []string{"cluster-cidr=10.50.0.0/16", "disable=istio", "disable=coredns", "mesh-profile=demo"}; !slices.Equal(s.ClusterFlags, want) {
		t.Errorf("the cluster's flags are %q, want %q", s.ClusterFlags, want)
	}
	f = SnapshotFlags()
	if err := f.Parse([]string{"--mesh-profile", "demo"}); err == nil || !strings.Contains(err.Error(), "unknown flag") {
		t.Errorf("a flag of something else: %v", err)
	}
}

// What starts the server later has its secrets in the environment, and none on its command line.
func TestSecretsOfAService(t *testing.T) {
	f := ServerFlags()
	if err := f.Parse([]string{"--s3", "--s3-secret-key", "hunter2"}); err != nil {
		t.Fatal(err)
	}
	got, err := f.Environment([]string{"POLYMESH_SNAPSHOT_PASSPHRASE=a", "POLYMESH_V=2", "POLYMESH_S3_SECRET_KEY=old", "HOME=/"})
	if want := []string{"POLYMESH_S3_SECRET_KEY=hunter2", "POLYMESH_SNAPSHOT_PASSPHRASE=a", "POLYMESH_V=2"}; err != nil || !slices.Equal(got, want) {
		t.Errorf("%q, %v", got, err)
	}
	if args, err := f.CommandLine(); err != nil || !slices.Equal(args, []string{"--s3=true"}) {
		t.Errorf("%q, %v", args, err)
	}
}
