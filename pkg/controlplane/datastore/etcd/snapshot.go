package etcd

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"go.etcd.io/bbolt"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/etcdutl/v3/snapshot"
	"go.etcd.io/etcd/server/v3/etcdserver/api/membership"
	"go.etcd.io/etcd/server/v3/storage/mvcc"
	"go.etcd.io/etcd/server/v3/storage/schema"
	"google.golang.org/grpc/status"

	"polymesh.dev/polymesh/pkg/atomicfile"
	"polymesh.dev/polymesh/pkg/controlplane/datastore"
)

const (
	// Kind is the kind of a snapshot's datastore.
	Kind = "etcd"
	// CopyName is the name of the file that Save writes, and Prepare and ToSQLite read: etcd's own format of a snapshot.
	CopyName = "etcd.db"
	// Folder is the name of a member's folder in the folder of databases.
	Folder = "etcd"
)

// Kind implements snapshot.Source.
func (e *Etcd) Kind() string {
	if old := e.notMoved(); old != nil {
		return old.Kind()
	}
	return Kind
}

// Moving implements snapshot.Clustered.
func (e *Etcd) Moving() bool { return e.notMoved() != nil }

// Nodes implements snapshot.Clustered. A copy of a stopped member has no other members, but its data have.
func (e *Etcd) Nodes(dir string) ([]string, error) {
	nodes, err := nodesIn(filepath.Join(dir, CopyName))
	if err != nil {
		return nil, err
	}
	lock, err := lockDatabase(e.opts.Dir)
	if err != nil || lock == nil {
		return nodes, err
	}
	lock.Close()
	return MemberNodes(e.opts.Dir)
}

// notMoved returns the SQLite database whose state moves to this member at its next start; nil if there is none.
func (e *Etcd) notMoved() *datastore.Datastore {
	if exists, err := Exists(e.opts.Dir); e.opts.SQLite == "" || exists || err != nil {
		return nil
	}
	if _, err := os.Stat(e.opts.SQLite); err != nil {
		return nil
	}
	return datastore.New(datastore.Options{Dir: filepath.Dir(e.opts.SQLite)})
}

// Save implements snapshot.Source: it writes a snapshot of this member into the folder dir, as CopyName with mode 0600, and returns its
// revision. A member that runs, in whatever process, is queried for it, and must have a majority: only then does it know every write
// that was acknowledged before. One that does not run is read, without changing it, with all writes that it knows.
func (e *Etcd) Save(ctx context.Context, dir string) (revision int64, err error) {
	if old := e.notMoved(); old != nil {
		return old.Save(ctx, dir)
	}
	ctx, cancel := context.WithTimeout(ctx, migrateTimeout)
	defer cancel()
	file := filepath.Join(dir, CopyName)
	defer func() {
		if err != nil {
			_ = os.Remove(file)
		}
	}()
	lock, err := lockDatabase(e.opts.Dir)
	switch {
	case err != nil:
		err = fmt.Errorf("open the data of etcd: %w", err)
	case lock == nil:
		err = e.saveRunning(ctx, file)
	default:
		err = e.saveStopped(ctx, lock, file)
	}
	if err != nil {
		return 0, err
	}
	checked, err := e.checked(file)
	if err != nil {
		return 0, fmt.Errorf("the new snapshot of etcd is damaged: %w", err)
	}
	return checked.Revision, nil
}

// saveRunning writes a snapshot of the running member of this machine.
func (e *Etcd) saveRunning(ctx context.Context, file string) error {
	client, err := e.Endpoint().Client()
	if err != nil {
		return err
	}
	defer client.Close()
	// A read that needs a majority returns when this member has all that was acknowledged before.
	read, cancel := context.WithTimeout(ctx, 2*requestTimeout)
	defer cancel()
	if _, err := client.Get(read, "/registry/health"); err != nil {
		if status.Convert(err).Message() == status.Convert(rpctypes.ErrGRPCNotSupportedForLearner).Message() {
			return errors.New("this server's member of etcd is still receiving the cluster's data: try again when `polymesh status` shows datastore as Ready, or on another server")
		}
		return fmt.Errorf("etcd has no majority that responds, so this server may not have the last writes: start the other servers; or stop this one, and save what it has: %w", err)
	}
	return save(ctx, client, file)
}

// save writes a snapshot, with its checksum, to a file.
func save(ctx context.Context, client *clientv3.Client, file string) (err error) {
	stream, err := client.Snapshot(ctx)
	if err != nil {
		return fmt.Errorf("read a snapshot of etcd: %w", err)
	}
	defer stream.Close()
	f, err := os.OpenFile(file, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, stream)
	return errors.Join(err, f.Sync(), f.Close())
}

// checked checks a whole snapshot: its checksum, and the structure of its database.
func (e *Etcd) checked(file string) (s snapshot.Status, err error) {
	if err := checkSum(file); err != nil {
		return s, err
	}
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%v", p)
		}
	}()
	return snapshot.NewV3(e.zap()).Status(file)
}

// checkSum compares the checksum at the end of a snapshot with the rest of it (sendSnapshot in etcd's api/v3rpc/maintenance.go).
func checkSum(file string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	// A database has whole pages.
	if size := info.Size(); size < 1024 || size%512 != sha256.Size {
		return fmt.Errorf("it has %d bytes, and is no snapshot of etcd with a checksum", size)
	}
	sum, want := sha256.New(), make([]byte, sha256.Size)
	if _, err := io.CopyN(sum, f, info.Size()-sha256.Size); err != nil {
		return err
	}
	if _, err := io.ReadFull(f, want); err != nil {
		return err
	}
	if !bytes.Equal(sum.Sum(nil), want) {
		return errors.New("its checksum is wrong")
	}
	return nil
}

// restore turns a snapshot into the data of the only member of a new cluster, in dir, which does not exist. Its revision is floor or above,
// and all earlier ones count as compacted: clients that know one list their objects again, as after any compaction.
func (e *Etcd) restore(file, dir string, floor int64) error {
	checked, err := e.checked(file)
	if err != nil {
		return err
	}
	// No member of a former cluster can take this one for its own: the ids depend on the token.
	config := snapshot.RestoreConfig{
		SnapshotPath: file, OutputDataDir: dir, Name: offlineName, PeerURLs: []string{offlineURL},
		InitialCluster: offlineName + "=" + offlineURL, InitialClusterToken: rand.Text(),
	}
	if bump := floor - checked.Revision; bump > 0 {
		config.RevisionBump, config.MarkCompacted = uint64(bump), true
	}
	if err := snapshot.NewV3(e.zap()).Restore(config); err != nil {
		return fmt.Errorf("write the data of etcd: %w", err)
	}
	return atomicfile.SyncFilesystem(dir)
}

// Revision returns the newest revision in the database of a member that does not run; its log may have more.
func Revision(dir string) (revision int64, err error) {
	err = view(database(dir), func(tx *bbolt.Tx) error {
		keys := tx.Bucket(schema.Key.Name())
		if keys == nil {
			return errors.New("it has no keys")
		}
		last, _ := keys.Cursor().Last()
		if len(last) < 17 {
			return nil
		}
		revision = mvcc.BytesToRev(last).Main
		return nil
	})
	return revision, err
}

// nodesIn returns the nodes of the members in a database: of a member that does not run, or a snapshot.
func nodesIn(file string) (nodes []string, err error) {
	members, err := membersIn(file)
	for _, m := range members {
		// Until its first start a restored member has no node.
		if m.Name != "" && m.Name != offlineName {
			nodes = append(nodes, m.Node())
		}
	}
	slices.Sort(nodes)
	return nodes, err
}

// membersIn reads the members in a database (membershipBackend in etcd's storage/schema/membership.go), in the order of byNode.
func membersIn(file string) (all []Member, err error) {
	err = view(file, func(tx *bbolt.Tx) error {
		members := tx.Bucket(schema.Members.Name())
		if members == nil {
			return nil
		}
		return members.ForEach(func(_, value []byte) error {
			var m membership.Member
			if err := json.Unmarshal(value, &m); err != nil {
				return fmt.Errorf("read a member: %w", err)
			}
			all = append(all, memberOf(m))
			return nil
		})
	})
	slices.SortFunc(all, byNode)
	return all, err
}

// view reads a database that no etcd uses.
func view(file string, read func(*bbolt.Tx) error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("read %s: %v", file, p)
		}
	}()
	if _, err := os.Stat(file); err != nil {
		return err
	}
	db, err := bbolt.Open(file, 0o400, &bbolt.Options{ReadOnly: true, Timeout: time.Second})
	if err != nil {
		return fmt.Errorf("read %s: %w", file, err)
	}
	defer db.Close()
	return db.View(read)
}

// MemberNodes returns the nodes of the members of the cluster, as the data of one that does not run has them.
func MemberNodes(dir string) ([]string, error) { return nodesIn(database(dir)) }

// Prepare turns a snapshot in the folder dir into the data of a restored cluster's only member, in Folder, and returns its new current
// revision, which is above floor. The member gets its name and address when it starts.
func Prepare(dir string, floor int64, log *slog.Logger) (revision int64, err error) {
	e := New(Options{Log: log})
	file, work := filepath.Join(dir, CopyName), filepath.Join(dir, "restored")
	checked, err := e.checked(file)
	if err != nil {
		return 0, fmt.Errorf("the snapshot of etcd is damaged: %w", err)
	}
	revision = max(checked.Revision, floor) + 1
	if err := e.restore(file, work, revision); err != nil {
		return 0, err
	}
	if err := os.MkdirAll(filepath.Join(dir, Folder), 0o700); err != nil {
		return 0, err
	}
	if err := atomicfile.Rename(filepath.Join(work, "member"), filepath.Join(dir, Folder, "member")); err != nil {
		return 0, err
	}
	return revision, errors.Join(os.RemoveAll(work), os.Remove(file))
}

// ToSQLite replaces a snapshot in the folder dir by a SQLite database of kine's, datastore.CopyName, with the same keys and values, and
// returns its current revision. All its revisions are above floor, and earlier ones count as compacted. The socket is used meanwhile.
func ToSQLite(ctx context.Context, dir, socket string, floor int64, log *slog.Logger) (revision int64, err error) {
	ctx, cancel := context.WithTimeout(ctx, migrateTimeout)
	defer cancel()
	e := New(Options{Log: log})
	file, work := filepath.Join(dir, CopyName), filepath.Join(dir, "converted")
	checked, err := e.checked(file)
	if err != nil {
		return 0, fmt.Errorf("the snapshot of etcd is damaged: %w", err)
	}
	member, database := filepath.Join(work, "etcd"), filepath.Join(work, "sqlite")
	if err := os.MkdirAll(work, 0o700); err != nil {
		return 0, err
	}
	if err := e.restore(file, member, 0); err != nil {
		return 0, err
	}
	o, err := e.offline(ctx, member, false)
	if err != nil {
		return 0, err
	}
	stop := sync.OnceFunc(o.close)
	defer stop()
	// The database begins above all revisions that a client can know, so that none of them means something else now.
	if err := sqlite(ctx, database, socket, func(*clientv3.Client) error { return nil }); err != nil {
		return 0, err
	}
	if _, err := datastore.Prepare(ctx, database, max(floor, checked.Revision)+revisionGap); err != nil {
		return 0, err
	}
	if err := sqlite(ctx, database, socket, func(client *clientv3.Client) error { return copyKeys(ctx, o.client, client) }); err != nil {
		return 0, err
	}
	if revision, err = datastore.New(datastore.Options{Dir: database}).Save(ctx, dir); err != nil {
		return 0, err
	}
	stop()
	return revision, errors.Join(os.RemoveAll(work), os.Remove(file))
}

// sqlite calls a function with a client of the SQLite database in dir.
func sqlite(ctx context.Context, dir, socket string, use func(*clientv3.Client) error) (err error) {
	// What it writes is synced when it is complete.
	d := datastore.New(datastore.Options{Dir: dir, Socket: socket, Sync: "normal"})
	if err := d.Start(ctx); err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, d.Stop(context.WithoutCancel(ctx)))
		if removed := os.Remove(socket); removed != nil && !errors.Is(removed, fs.ErrNotExist) {
			err = errors.Join(err, removed)
		}
	}()
	client, err := d.Endpoint().Client()
	if err != nil {
		return err
	}
	defer client.Close()
	return use(client)
}

// copyKeys copies the newest value of each key, with the life that its lease gives it. Keys without a slash are notes of the API server
// about etcd itself.
func copyKeys(ctx context.Context, from, to *clientv3.Client) error {
	const page = 500
	leases := map[int64]clientv3.LeaseID{}
	want, next := int64(0), "/"
	for {
		got, err := from.Get(ctx, next, clientv3.WithRange(clientv3.GetPrefixRangeEnd("/")), clientv3.WithLimit(page))
		if err != nil {
			return fmt.Errorf("read etcd: %w", err)
		}
		for _, kv := range got.Kvs {
			var options []clientv3.OpOption
			if kv.Lease != 0 {
				if leases[kv.Lease] == 0 {
					life, err := from.TimeToLive(ctx, clientv3.LeaseID(kv.Lease))
					if err != nil {
						return fmt.Errorf("read the lease of %q: %w", kv.Key, err)
					}
					granted, err := to.Grant(ctx, max(life.GrantedTTL, 1))
					if err != nil {
						return fmt.Errorf("create a lease: %w", err)
					}
					leases[kv.Lease] = granted.ID
				}
				options = append(options, clientv3.WithLease(leases[kv.Lease]))
			}
			key := string(kv.Key)
			// kine creates this one itself.
			if _, err := to.Txn(ctx).If(clientv3.Compare(clientv3.ModRevision(key), "=", 0)).Then(clientv3.OpPut(key, string(kv.Value), options...)).Commit(); err != nil {
				return fmt.Errorf("write %q: %w", key, err)
			}
			want++
			next = key + "\x00"
		}
		if !got.More {
			break
		}
	}
	have, err := to.Get(ctx, "/", clientv3.WithPrefix(), clientv3.WithCountOnly())
	if err != nil {
		return fmt.Errorf("check the copy: %w", err)
	}
	if have.Count < want {
		return fmt.Errorf("check the copy: %d keys were written, and %d are there", want, have.Count)
	}
	return nil
}
