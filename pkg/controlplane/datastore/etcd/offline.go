package etcd

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3client"
	"go.etcd.io/etcd/server/v3/storage/wal"
	"go.etcd.io/etcd/server/v3/storage/wal/walpb"
	"golang.org/x/sys/unix"

	"polymesh.dev/polymesh/pkg/atomicfile"
)

// offline is an etcd of one member that listens nowhere, on data that may be lost: a work copy.
type offline struct {
	etcd   *Etcd
	server *embed.Etcd
	client *clientv3.Client
}

// The addresses of a member that is restored or works offline. It listens on none of them, and gets its own with its first start (updateURL).
const (
	offlineName = "restored"
	offlineURL  = "https://127.0.0.1:2380"
)

// offline starts an etcd on the data in dir, which may be empty. With force it is one that was a member of a cluster, and becomes the
// only member.
func (e *Etcd) offline(ctx context.Context, dir string, force bool) (*offline, error) {
	cfg := embed.NewConfig()
	cfg.Name, cfg.Dir, cfg.InitialCluster = offlineName, dir, offlineName+"="+offlineURL
	advertised := []url.URL{{Scheme: "https", Host: strings.TrimPrefix(offlineURL, "https://")}}
	cfg.AdvertisePeerUrls, cfg.AdvertiseClientUrls = advertised, advertised
	cfg.ListenPeerUrls, cfg.ListenClientUrls = nil, nil
	// It is alone, so the election can be short.
	cfg.TickMs, cfg.ElectionMs = 10, 100
	cfg.ForceNewCluster, cfg.UnsafeNoFsync = force, true
	// What it contains must fit, whatever the quota is.
	cfg.QuotaBackendBytes = maxQuota
	cfg.AuthToken = ""
	cfg.WarningUnaryRequestDuration = embed.DefaultWarningUnaryRequestDuration
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(e.zapAbove(zapErrors))
	server, err := e.startEtcd(cfg)
	if err != nil {
		return nil, fmt.Errorf("start an etcd on a copy of the data: %w", err)
	}
	o := &offline{etcd: e, server: server, client: v3client.New(server.Server)}
	select {
	case <-server.Server.ReadyNotify():
		return o, nil
	case <-server.Server.StopNotify():
		err = errors.New("it has ended by itself")
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	o.close()
	return nil, fmt.Errorf("start an etcd on a copy of the data: %w", err)
}

func (o *offline) close() {
	_ = o.client.Close()
	o.etcd.close(o.server)
}

// lockDatabase locks the database of a member in dir as etcd does, so that no etcd uses it meanwhile. If one does, the result is nil.
func lockDatabase(dir string) (*os.File, error) {
	f, err := os.OpenFile(database(dir), os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, nil
		}
		return nil, err
	}
	return f, nil
}

// database returns the file of a member's database.
func database(dir string) string { return filepath.Join(dir, "member", "snap", "db") }

// copyMember copies the data of a member that does not run. Its log is part of it: the database is written later.
func copyMember(dir, to string) error {
	for _, folder := range []string{filepath.Join("member", "snap"), filepath.Join("member", "wal")} {
		entries, err := os.ReadDir(filepath.Join(dir, folder))
		if err != nil {
			return err
		}
		if err := os.MkdirAll(filepath.Join(to, folder), 0o700); err != nil {
			return err
		}
		for _, entry := range entries {
			// Temporary files are space that etcd has reserved.
			if !entry.Type().IsRegular() || strings.HasSuffix(entry.Name(), ".tmp") {
				continue
			}
			if err := copyFile(filepath.Join(dir, folder, entry.Name()), filepath.Join(to, folder, entry.Name())); err != nil {
				return err
			}
		}
	}
	return nil
}

func copyFile(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}

// commitAll marks every entry of a log as committed. A member learns that a write is committed only with the next message of its leader,
// and need not have written that down: the last acknowledged writes may look as if they were not. etcd's force-new-cluster would drop them.
// It returns the member's id.
func (e *Etcd) commitAll(dir string) (id uint64, err error) {
	log, folder := e.zapAbove(zapErrors), filepath.Join(dir, "member", "wal")
	snapshots, err := wal.ValidSnapshotEntries(log, folder)
	if err != nil {
		return 0, fmt.Errorf("read etcd's log: %w", err)
	}
	last := walpb.Snapshot{}
	if len(snapshots) > 0 {
		last = snapshots[len(snapshots)-1]
	}
	for repaired := false; ; repaired = true {
		w, err := wal.Open(log, folder, last)
		if err != nil {
			return 0, fmt.Errorf("read etcd's log: %w", err)
		}
		text, state, entries, err := w.ReadAll()
		if err == nil {
			var metadata etcdserverpb.Metadata
			err = metadata.Unmarshal(text)
			id = metadata.NodeID
		}
		if err == nil && len(entries) > 0 && entries[len(entries)-1].Index > state.Commit {
			state.Commit = entries[len(entries)-1].Index
			err = w.Save(state, nil)
		}
		err = errors.Join(err, w.Close())
		// As etcd does at a start: a power failure may leave half an entry at the end.
		if err == nil || repaired || !errors.Is(err, io.ErrUnexpectedEOF) || !wal.Repair(log, folder) {
			if err != nil {
				return 0, fmt.Errorf("read etcd's log: %w", err)
			}
			return id, nil
		}
	}
}

// saveStopped writes a snapshot of a member that does not run into file, with every write that it knows. It works on a copy.
func (e *Etcd) saveStopped(ctx context.Context, lock *os.File, file string) error {
	defer lock.Close()
	work, err := os.MkdirTemp(filepath.Dir(file), atomicfile.Prefix)
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	if err := copyMember(e.opts.Dir, work); err != nil {
		return fmt.Errorf("copy the data of etcd: %w", err)
	}
	id, err := e.commitAll(work)
	if err != nil {
		return err
	}
	members, err := membersIn(database(work))
	if err != nil {
		return err
	}
	if slices.ContainsFunc(members, func(m Member) bool { return m.ID == id && m.Learner }) {
		return errors.New("this server's member of etcd has not received all of the cluster's data: use another server")
	}
	o, err := e.offline(ctx, work, true)
	if err != nil {
		return err
	}
	defer o.close()
	return o.save(file)
}

// save writes a snapshot, with its checksum, to a file: the format of etcd's own (sendSnapshot in its api/v3rpc/maintenance.go), whose
// stream the client inside the process does not end properly.
func (o *offline) save(file string) (err error) {
	state := o.server.Server.Backend().Snapshot()
	defer state.Close()
	f, err := os.OpenFile(file, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Sync(), f.Close()) }()
	sum := sha256.New()
	if _, err := state.WriteTo(io.MultiWriter(f, sum)); err != nil {
		return fmt.Errorf("write a snapshot of etcd: %w", err)
	}
	_, err = f.Write(sum.Sum(nil))
	return err
}
