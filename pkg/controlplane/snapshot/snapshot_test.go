package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"polymesh.dev/polymesh/pkg/certificate"
	"polymesh.dev/polymesh/pkg/controlplane/datastore"
	"polymesh.dev/polymesh/pkg/controlplane/datastore/datastoretest"
	"polymesh.dev/polymesh/pkg/datadir"
	"polymesh.dev/polymesh/pkg/layout"
	"polymesh.dev/polymesh/pkg/version"
)

// machine is a data dir, and a folder for snapshots outside of it.
type machine struct {
	*Snapshots
	dir layout.DataDir
}

// newMachine returns a machine without a cluster.
func newMachine(t *testing.T, node string) machine {
	t.Helper()
	dir := layout.DataDir(filepath.Join(t.TempDir(), "data-dir"))
	t.Cleanup(func() { os.RemoveAll(dir.Run()) })
	return machine{New(Options{
		DataDir: dir, Dir: filepath.Join(t.TempDir(), "snapshots"), Node: node, Datastore: datastore.New(datastore.Options{Dir: dir.Server("db")}),
		ConfigFile: filepath.Join(t.TempDir(), "config.yaml"),
	}), dir}
}

// newCluster returns a machine with a cluster whose server is stopped.
func newCluster(t *testing.T, node string) machine {
	t.Helper()
	m := newMachine(t, node)
	if _, err := datadir.Claim(m.dir); err != nil {
		t.Fatal(err)
	}
	ip := netip.MustParseAddr("192.0.2.1")
	if _, err := certificate.Ensure(certificate.Options{Dir: m.dir.TLS(), NodeName: node, NodeIP: ip, ServiceIP: ip, ClusterDomain: "cluster.local", Now: time.Now()}); err != nil {
		t.Fatal(err)
	}
	m.write(t, `{"keys":"of Secrets"}`, m.dir.EncryptionFile())
	m.write(t, "a kubeconfig", m.dir.Kubeconfig("polymesh"))
	m.write(t, "a token", m.dir.Server("token"))
	m.write(t, "mesh-profile: demo\n", m.o.ConfigFile)
	m.put(t, "a", "1")
	return m
}

func (m machine) write(t *testing.T, text, path string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// damage replaces the datastore's file, and its log, by something else.
func (m machine) damage(t *testing.T) {
	t.Helper()
	for _, suffix := range []string{"-wal", "-shm"} {
		if err := os.Remove(m.dir.Server("db", "state.db"+suffix)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
	}
	m.write(t, strings.Repeat("x", 9000), m.dir.Server("db", "state.db"))
}

// client starts the datastore until stop is called.
func (m machine) client(t *testing.T) (client *clientv3.Client, stop func()) {
	t.Helper()
	d := datastoretest.Start(t, m.dir.Server("db"))
	return d.Client, d.Halt
}

// put writes a key and returns the revision.
func (m machine) put(t *testing.T, key, value string) int64 {
	t.Helper()
	client, stop := m.client(t)
	defer stop()
	key = prefix + key
	have, err := client.Get(t.Context(), key)
	if err != nil {
		t.Fatal(err)
	}
	revision := int64(0)
	if len(have.Kvs) > 0 {
		revision = have.Kvs[0].ModRevision
	}
	resp, err := client.Txn(t.Context()).If(clientv3.Compare(clientv3.ModRevision(key), "=", revision)).Then(clientv3.OpPut(key, value)).Else(clientv3.OpGet(key)).Commit()
	if err != nil || !resp.Succeeded {
		t.Fatalf("put %s: %v %v", key, resp, err)
	}
	return resp.Header.Revision
}

// values returns the keys and values, and the revision.
func (m machine) values(t *testing.T) (string, int64) {
	t.Helper()
	client, stop := m.client(t)
	defer stop()
	return valuesOf(t, client)
}

// prefix is that of the keys that the tests write.
const prefix = "/registry/configmaps/default/"

func valuesOf(t *testing.T, client *clientv3.Client) (string, int64) {
	t.Helper()
	all, err := client.Get(t.Context(), prefix, clientv3.WithPrefix())
	if err != nil {
		t.Fatal(err)
	}
	text := ""
	for _, kv := range all.Kvs {
		text += filepath.Base(string(kv.Key)) + "=" + string(kv.Value) + " "
	}
	return text, all.Header.Revision
}

func (m machine) save(t *testing.T, name string) *Info {
	t.Helper()
	info, err := m.Save(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	return info
}

// files returns the files of the cluster in a folder, with their contents and modes.
func files(t *testing.T, server string) map[string]string {
	t.Helper()
	found := map[string]string{}
	for _, folder := range []string{"tls", "cred", "token"} {
		err := filepath.WalkDir(filepath.Join(server, folder), func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() || filepath.Ext(path) == ".kubeconfig" {
				return err
			}
			text, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			info, err := d.Info()
			rel, _ := filepath.Rel(server, path)
			found[rel] = fmt.Sprintf("%v %s", info.Mode(), text)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return found
}

func equal(t *testing.T, what string, got, want map[string]string) {
	t.Helper()
	for name := range want {
		if got[name] != want[name] {
			t.Errorf("%s: %s is %.200q, want %.200q", what, name, got[name], want[name])
		}
	}
	for name := range got {
		if _, ok := want[name]; !ok {
			t.Errorf("%s: %s was not there before", what, name)
		}
	}
}

func TestSaveAndRestoreOnAnEmptyMachine(t *testing.T) {
	for _, passphrase := range []string{"", "correct horse"} {
		t.Run("passphrase "+passphrase, func(t *testing.T) {
			old := newCluster(t, "old")
			old.o.Passphrase = passphrase
			old.o.Settings = []string{"cluster-cidr=10.1.0.0/16"}
			old.o.Images = func(context.Context) ([]string, error) { return []string{"registry.example.com/a:1"}, nil }
			revision := old.put(t, "b", "2")
			info := old.save(t, "on-demand")
			if info.Revision != revision || info.Node != "old" || info.Encrypted != (passphrase != "") || info.Version != version.Version {
				t.Errorf("%+v", info)
			}
			if st, err := os.Stat(info.Path); err != nil || st.Mode().Perm() != 0o600 || st.Size() != info.Size {
				t.Errorf("the file is %v, %v", st, err)
			}
			if st, err := os.Stat(old.o.Dir); err != nil || st.Mode().Perm() != 0o700 {
				t.Errorf("the folder is %v, %v", st, err)
			}
			if entries, err := os.ReadDir(old.o.Dir); err != nil || len(entries) != 1 {
				t.Errorf("the folder contains %v, %v", entries, err)
			}
			seen := old.put(t, "c", "lost")

			fresh := newMachine(t, "new")
			fresh.o.Passphrase = passphrase
			r, err := fresh.Restore(t.Context(), info.Path)
			if err != nil {
				t.Fatal(err)
			}
			if r.Node != "old" || r.Aside != "" || r.Saved != nil || r.Next <= seen || r.ConfigFile != "" || !r.ConfigDiffers ||
				!slices.Equal(r.Settings, old.o.Settings) || !slices.Equal(r.Images, []string{"registry.example.com/a:1"}) {
				t.Errorf("%+v", r)
			}
			if text, revision := fresh.values(t); text != "a=1 b=2 " || revision < r.Next {
				t.Errorf("restored %q at revision %d, next %d", text, revision, r.Next)
			}
			equal(t, "restored", files(t, fresh.dir.Server()), files(t, old.dir.Server()))
			if _, err := os.Stat(fresh.dir.Kubeconfig("polymesh")); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("a kubeconfig with paths of the other machine was restored: %v", err)
			}
			if text, err := os.ReadFile(RestoredConfig(fresh.dir)); err != nil || string(text) != "mesh-profile: demo\n" {
				t.Errorf("the config file is %q, %v", text, err)
			}
			// A server can be started: the data dir is one, and the authorities are accepted.
			if err := datadir.Check(fresh.dir); err != nil {
				t.Error(err)
			}
			if _, err := certificate.EnsureAuthorities(certificate.Store(fresh.dir.TLS()), time.Now()); err != nil {
				t.Error(err)
			}
			left, err := filepath.Glob(fresh.dir.Server("restore*"))
			if err != nil || len(left) != 2 { // the note and the config file
				t.Errorf("left behind: %q, %v", left, err)
			}
		})
	}
}

func TestRestoreOnTheSameMachine(t *testing.T) {
	m := newCluster(t, "n1")
	info := m.save(t, "on-demand")
	m.put(t, "a", "changed")
	seen := m.put(t, "b", "new")
	m.write(t, "a new token", m.dir.Server("token"))
	m.write(t, "another kind of token", m.dir.Server("agent-token"))
	before := files(t, m.dir.Server())
	r, err := m.Restore(t.Context(), info.File)
	if err != nil {
		t.Fatal(err)
	}
	if r.Next <= seen || r.Saved == nil || r.Saved.Name != BeforeRestore || r.SaveError != "" || r.ConfigDiffers {
		t.Errorf("%+v", r)
	}
	if text, _ := m.values(t); text != "a=1 " {
		t.Errorf("restored %q", text)
	}
	if text, err := os.ReadFile(m.dir.Server("token")); err != nil || string(text) != "a token" {
		t.Errorf("the token is %q, %v", text, err)
	}
	// Nothing is lost: the state before is aside, complete, and in a snapshot.
	equal(t, "put aside", files(t, r.Aside), before)
	if _, err := os.Stat(filepath.Join(r.Aside, "agent-token")); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(m.dir.Server("agent-token")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a token that the snapshot does not have: %v", err)
	}
	// The next start is of the version that saved the snapshot, and so no upgrade.
	if err := m.BeforeStart(t.Context(), true, slog.New(slog.DiscardHandler)); err != nil {
		t.Error(err)
	}
	if all, err := m.List(t.Context()); err != nil || slices.ContainsFunc(all, func(i Info) bool { return i.Name == BeforeUpgrade }) {
		t.Errorf("after the first start there are the snapshots %+v, %v", all, err)
	}
	back, err := m.Restore(t.Context(), r.Saved.File)
	if err != nil {
		t.Fatal(err)
	}
	if text, revision := m.values(t); text != "a=changed b=new " || revision < back.Next || back.Next <= r.Next {
		t.Errorf("back to %q at revision %d, %d after %d", text, revision, back.Next, r.Next)
	}
}

// A datastore that cannot be read is a reason to restore, not one against it.
func TestRestoreOverADamagedDatastore(t *testing.T) {
	m := newCluster(t, "n1")
	info := m.save(t, "on-demand")
	m.damage(t)
	r, err := m.Restore(t.Context(), info.File)
	if err != nil || r.SaveError == "" || r.Saved != nil {
		t.Fatalf("%+v, %v", r, err)
	}
	if text, _ := m.values(t); text != "a=1 " {
		t.Errorf("restored %q", text)
	}
	if text, err := os.ReadFile(filepath.Join(r.Aside, "db", "state.db")); err != nil || len(text) != 9000 {
		t.Errorf("the damaged datastore is not aside: %v", err)
	}
}

func TestRestoreRefuses(t *testing.T) {
	m := newCluster(t, "n1")
	release := version.Version
	t.Cleanup(func() { version.Version = release })
	version.Version = "1.2.0"
	good := m.save(t, "on-demand")
	altered := func(name string, change func(*Metadata)) string {
		t.Helper()
		path := filepath.Join(t.TempDir(), name+".tar.zst")
		f, err := os.Create(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		meta := Metadata{Format: 1, Name: "x", Node: "n1", Created: time.Now(), Version: "1.2.0", Kubernetes: "v1.36.3", Platform: "linux/amd64", Datastore: "sqlite"}
		var sources []source
		for _, name := range []string{"server/tls/server-ca.crt", "datastore/state.db"} {
			sources = append(sources, source{File: fileOf(name, []byte("x")), content: []byte("x")})
			meta.Files = append(meta.Files, sources[len(sources)-1].File)
		}
		change(&meta)
		sources = slices.DeleteFunc(sources, func(s source) bool { return !slices.Contains(meta.Files, s.File) })
		if err := write(t.Context(), f, &meta, sources, ""); err != nil {
			t.Fatal(err)
		}
		return path
	}
	other := newCluster(t, "n2")
	foreign := newMachine(t, "n1")
	foreign.write(t, "a letter", foreign.dir.Server("letter.txt"))
	for name, c := range map[string]struct {
		machine
		from string
		want string
	}{
		"newer version":     {m, altered("a", func(m *Metadata) { m.Version = "1.10.0" }), "from a newer version, with Polymesh 1.10.0, and this one has 1.2.0"},
		"other platform":    {m, altered("b", func(m *Metadata) { m.Platform = "linux/s390x" }), "linux/s390x"},
		"other datastore":   {m, altered("c", func(m *Metadata) { m.Datastore = "other" }), `kind "other"`},
		"from the future":   {m, altered("d", func(m *Metadata) { m.Created = time.Now().Add(48 * time.Hour) }), "set the clock"},
		"no node":           {m, altered("n", func(m *Metadata) { m.Node = "../secrets" }), `"../secrets" is not the name of a node`},
		"no datastore":      {m, altered("e", func(m *Metadata) { m.Files = m.Files[:1] }), "the datastore is not in it"},
		"no authorities":    {m, altered("f", func(m *Metadata) { m.Files = m.Files[1:] }), "the certificate authorities are not in it"},
		"no version":        {m, altered("g", func(m *Metadata) { m.Version = "" }), "names no version of Polymesh"},
		"damaged datastore": {newMachine(t, "n3"), altered("h", func(*Metadata) {}), "the database in the snapshot is damaged"},
		"another cluster":   {other, good.Path, "has another cluster than the snapshot"},
		"foreign folder":    {foreign, good.Path, "is no data dir of Polymesh"},
		"no such snapshot":  {m, "on-demand_n1_20200101T000000.000Z.tar.zst", "there is no snapshot"},
		"no such file":      {m, "/nonexistent/file", "no such file"},
		"a folder":          {m, t.TempDir() + "/", "not a regular file"},
	} {
		t.Run(name, func(t *testing.T) {
			before := tree(t, string(c.dir))
			_, err := c.Restore(t.Context(), c.from)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error is %v, want %q", err, c.want)
			}
			after := tree(t, string(c.dir))
			// An empty machine has a data dir now, but nothing in it.
			if len(before) > 1 && !slices.Equal(before, after) {
				t.Errorf("%q became %q", before, after)
			}
			if _, err := os.Stat(c.dir.Server("db")); len(before) <= 1 && !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("there is a datastore: %v", err)
			}
		})
	}
	t.Run("server runs", func(t *testing.T) {
		lock, err := datadir.Acquire(m.dir)
		if err != nil {
			t.Fatal(err)
		}
		defer lock.Release()
		for what, do := range map[string]func() error{
			"asked whether it may": func() error { return m.MayRestore(t.Context(), good.Path) },
			"restored":             func() error { _, err := m.Restore(t.Context(), good.Path); return err },
		} {
			if err := do(); err == nil || !strings.Contains(err.Error(), "a server is running on "+string(m.dir)+": stop it first") {
				t.Errorf("%s: error is %v", what, err)
			}
		}
	})
	t.Run("before it asks", func(t *testing.T) {
		if err := m.MayRestore(t.Context(), "nope"); err == nil || !strings.Contains(err.Error(), `there is no snapshot "nope"`) {
			t.Errorf("error is %v", err)
		}
		if err := m.MayRestore(t.Context(), good.Path); err != nil {
			t.Error(err)
		}
	})
}

func tree(t *testing.T, dir string) (paths []string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err == nil && !strings.HasSuffix(path, "-wal") && !strings.HasSuffix(path, "-shm") {
			paths = append(paths, path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return paths
}

// A restore that is interrupted at any step is completed by the next start.
func TestInterruptedRestore(t *testing.T) {
	m := newCluster(t, "n1")
	info := m.save(t, "on-demand")
	want := files(t, m.dir.Server())
	m.put(t, "b", "2")
	m.write(t, "a new token", m.dir.Server("token"))
	complete := false
	for step := 0; !complete; step++ {
		copied := newMachine(t, "n1")
		if err := os.CopyFS(string(copied.dir), os.DirFS(string(m.dir))); err != nil {
			t.Fatal(err)
		}
		r := &Restored{Path: info.Path}
		if err := copied.stage(t.Context(), r, change{before: BeforeRestore}); err != nil {
			t.Fatal(err)
		}
		// Before its first step nothing is replaced.
		if text, err := os.ReadFile(copied.dir.Server("token")); err != nil || string(text) != "a new token" {
			t.Fatalf("the token is %q, %v", text, err)
		}
		complete = steps(t, copied.dir, step)
		if err := copied.BeforeStart(t.Context(), false, slog.New(slog.DiscardHandler)); err != nil {
			t.Fatalf("after %d steps: %v", step, err)
		}
		equal(t, fmt.Sprintf("after %d steps", step), files(t, copied.dir.Server()), want)
		if text, _ := copied.values(t); text != "a=1 " {
			t.Errorf("after %d steps: restored %q", step, text)
		}
		if text, err := os.ReadFile(copied.dir.Server("token")); err != nil || string(text) != "a token" {
			t.Errorf("after %d steps: the token is %q, %v", step, text, err)
		}
		if text, err := os.ReadFile(filepath.Join(r.Aside, "token")); err != nil || string(text) != "a new token" {
			t.Errorf("after %d steps: the token aside is %q, %v", step, text, err)
		}
		if again, err := Recover(copied.dir); again || err != nil {
			t.Errorf("after %d steps: completed twice, %v", step, err)
		}
	}
}

// steps does the first steps of a planned restore, and reports whether these were all.
func steps(t *testing.T, dir layout.DataDir, n int) bool {
	t.Helper()
	count := 0
	limited := func(from, to string) error {
		if count == n {
			return errInterrupted
		}
		count++
		return os.Rename(from, to)
	}
	_, err := recoverWith(dir, limited)
	if err != nil && !errors.Is(err, errInterrupted) {
		t.Fatal(err)
	}
	return err == nil
}

var errInterrupted = errors.New("interrupted")

func TestListPruneDelete(t *testing.T) {
	m := newCluster(t, "n1")
	other := machine{New(m.o), m.dir}
	other.o.Node = "n2"
	var mine []*Info
	for range 4 {
		mine = append(mine, m.save(t, Scheduled))
	}
	demand, theirs := m.save(t, "on-demand"), other.save(t, Scheduled)
	m.write(t, "a letter", filepath.Join(m.o.Dir, "letter.txt"))
	broken := strings.Replace(mine[0].File, Scheduled, "broken", 1)
	m.write(t, "no archive", filepath.Join(m.o.Dir, broken))
	if err := os.Symlink("/etc/passwd", filepath.Join(m.o.Dir, strings.Replace(mine[0].File, Scheduled, "link", 1))); err != nil {
		t.Fatal(err)
	}
	list := func() (names []string) {
		t.Helper()
		all, err := m.List(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, i := range all {
			names = append(names, i.File)
			if (i.Problem != "") != (i.Name == "broken") || (i.Revision == 0) != (i.Name == "broken") || i.Location != Local {
				t.Errorf("%+v", i)
			}
		}
		return names
	}
	if got, want := list(), []string{theirs.File, demand.File, mine[3].File, mine[2].File, mine[1].File, broken, mine[0].File}; !slices.Equal(got, want) {
		t.Errorf("listed %q, want %q", got, want)
	}
	done, err := m.Prune(t.Context(), 2, automatic()...)
	if err != nil || len(done.Removed) != 2 || len(done.Unknown) != 0 {
		t.Errorf("%+v, %v", done, err)
	}
	if got, want := list(), []string{theirs.File, demand.File, mine[3].File, mine[2].File, broken}; !slices.Equal(got, want) {
		t.Errorf("after pruning %q, want %q", got, want)
	}
	if _, err := m.Prune(t.Context(), 0); err == nil {
		t.Error("all snapshots would be removed")
	}
	if removed, err := m.Delete(t.Context(), broken); err != nil || len(removed) != 1 {
		t.Errorf("deleted %v, %v", removed, err)
	}
	for _, name := range []string{broken, "letter.txt", "../x"} {
		if removed, err := m.Delete(t.Context(), name); err == nil {
			t.Errorf("deleted %v", removed)
		}
	}
	m.save(t, "on-demand")
	if _, err := os.Stat(filepath.Join(m.o.Dir, "letter.txt")); err != nil {
		t.Error(err)
	}
}

func TestSaveRefuses(t *testing.T) {
	m := newCluster(t, "n1")
	unlock, err := m.lock()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.Save(t.Context(), "x"); err == nil || !strings.Contains(err.Error(), "is in use") {
		t.Errorf("while another one is saved: %v", err)
	}
	unlock()
	if err := os.Chmod(m.o.Dir, 0o777); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Save(t.Context(), "x"); err == nil || !strings.Contains(err.Error(), "other users can write") {
		t.Errorf("in a folder of everyone: %v", err)
	}
	if err := os.Chmod(m.o.Dir, 0o700); err != nil {
		t.Fatal(err)
	}
	m.damage(t)
	if _, err := m.Save(t.Context(), "x"); err == nil {
		t.Error("a damaged datastore was saved")
	}
	if entries, err := os.ReadDir(m.o.Dir); err != nil || len(entries) != 0 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
}

// Whatever was restored when, no client has seen a revision above the floor: a cluster writes less than marginPerSecond.
func TestFloor(t *testing.T) {
	saved := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	const revision, perSecond = 5000, 2000
	// The cluster runs on after the snapshot, and is restored from it again and again, each time on an empty machine.
	newest, at := int64(revision), saved
	for _, after := range []time.Duration{time.Second, time.Minute, time.Hour, time.Hour + 5*time.Minute, 240 * time.Hour, 8760 * time.Hour} {
		newest += int64(saved.Add(after).Sub(at)/time.Second) * perSecond
		at = saved.Add(after)
		next := floor(revision, saved, at, 0)
		if next <= newest {
			t.Errorf("restored after %v at %d, and clients have seen %d", after, next, newest)
		}
		newest = next
	}
	if got := floor(revision, saved, saved.Add(-time.Hour), 7_000_000); got <= 7_000_000 {
		t.Errorf("with a clock that went back, and a newer state on the machine: %d", got)
	}
}

func TestIsNewer(t *testing.T) {
	for _, c := range []struct {
		theirs, ours string
		newer, ok    bool
	}{
		{"1.2.0", "1.2.0", false, true}, {"1.10.0", "1.9.0", true, true}, {"1.2.0", "1.10.0", false, true}, {"v1.37.0", "v1.36.3", true, true},
		{"1.2.0", "1.2.0-rc.1", true, true}, {"dev", "1.2.0", false, true}, {"1.2.0", "dev", false, true}, {"", "1.2.0", false, false}, {"\x1b[2J", "1.2.0", false, false},
	} {
		if newer, err := isNewer(c.theirs, c.ours); newer != c.newer || (err == nil) != c.ok {
			t.Errorf("%q and %q: %v, %v", c.theirs, c.ours, newer, err)
		}
	}
}

// A new version saves the state of the old one before it starts, and once.
func TestBeforeStartOfAnotherVersion(t *testing.T) {
	release := version.Version
	t.Cleanup(func() { version.Version = release })
	log := slog.New(slog.DiscardHandler)
	fresh := newMachine(t, "n1")
	if err := fresh.BeforeStart(t.Context(), true, log); err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(fresh.dir.Server()); err != nil || st.Mode().Perm() != 0o700 {
		t.Errorf("the server's folder is %v, %v", st, err)
	}
	m := newCluster(t, "n1")
	for _, c := range []struct {
		version string
		save    bool
		want    int
	}{{"1.0.0", true, 1}, {"1.0.0", true, 1}, {"1.1.0", true, 2}, {"1.2.0", false, 2}, {"1.2.0", true, 2}} {
		version.Version = c.version
		if err := m.BeforeStart(t.Context(), c.save, log); err != nil {
			t.Fatal(err)
		}
		all, err := m.List(t.Context())
		if err != nil || len(all) != c.want || all[0].Name != BeforeUpgrade {
			t.Errorf("%+v: %v, %v", c, all, err)
		}
	}
	// A state that cannot be saved is not changed by the new version, and the next start tries again.
	version.Version = "1.3.0"
	m.damage(t)
	for range 2 {
		if err := m.BeforeStart(t.Context(), true, log); err == nil || !strings.Contains(err.Error(), "--disable-snapshots") {
			t.Errorf("error is %v", err)
		}
	}
	if err := m.BeforeStart(t.Context(), false, log); err != nil {
		t.Error(err)
	}
}

// A scheduled snapshot that fails is a note in the status until one is saved.
func TestScheduledSnapshotThatFails(t *testing.T) {
	m := newCluster(t, "n1")
	c := NewComponent(m.Snapshots, Schedule{Cron: "0 */12 * * *", Retention: 2}, "", slog.New(slog.DiscardHandler))
	if err := c.Init(t.Context()); err != nil {
		t.Fatal(err)
	}
	unlock, err := m.lock()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { c.scheduled(ctx); close(done) }()
	for len(c.Notes(ctx)) == 0 {
		time.Sleep(time.Millisecond)
	}
	if note := c.Notes(ctx)[0]; !strings.HasPrefix(note, "the last scheduled snapshot failed: ") || !strings.Contains(note, "is in use") {
		t.Errorf("the note is %q", note)
	}
	if err := c.Ready(ctx); err != nil {
		t.Error(err)
	}
	cancel()
	<-done
	unlock()
	for range 4 {
		c.scheduled(t.Context())
	}
	if note := c.Notes(t.Context()); len(note) > 0 {
		t.Errorf("the note is %q", note)
	}
	if all, err := m.List(t.Context()); err != nil || len(all) != 2 {
		t.Errorf("%v, %v", all, err)
	}
}

// Commands on a machine without a cluster do not make its data dir look like another program's.
func TestWithoutACluster(t *testing.T) {
	m := newMachine(t, "n1")
	m.o.Dir = DefaultDir(m.dir)
	if _, err := m.Save(t.Context(), "x"); err == nil || !strings.Contains(err.Error(), "there is no cluster in "+string(m.dir)) {
		t.Errorf("save: %v", err)
	}
	agent := newMachine(t, "n2")
	if err := errors.Join(os.MkdirAll(agent.dir.Agent(), 0o755), os.WriteFile(agent.dir.Membership(), []byte("{}"), 0o600)); err != nil {
		t.Fatal(err)
	}
	if _, err := agent.Save(t.Context(), "x"); err == nil || !strings.Contains(err.Error(), "it is an agent's") {
		t.Errorf("save on an agent: %v", err)
	}
	if all, err := m.List(t.Context()); err != nil || all == nil || len(all) != 0 {
		t.Errorf("list: %v, %v", all, err)
	}
	if done, err := m.Prune(t.Context(), 1); err != nil || len(done.Removed) != 0 {
		t.Errorf("prune: %+v, %v", done, err)
	}
	if _, err := m.Delete(t.Context(), "a_b_20261129T140631.123Z.tar.zst"); err == nil {
		t.Error("deleted what is not there")
	}
	if paths := tree(t, string(m.dir)); len(paths) != 0 {
		t.Errorf("created %q", paths)
	}
	unlock, err := m.lock()
	if err != nil {
		t.Fatal(err)
	}
	unlock()
	if err := datadir.Check(m.dir); err != nil {
		t.Error(err)
	}
}

// What others choose does not prevent a snapshot: names of nodes and images.
func TestLongNames(t *testing.T) {
	m := newCluster(t, strings.Repeat("a.", 126)+"b")
	var images []string
	for i := range 10_000 {
		images = append(images, fmt.Sprintf("registry.example.com/%s:%d", strings.Repeat("x", 450), i))
	}
	m.o.Images = func(context.Context) ([]string, error) { return append(images, strings.Repeat("x", 5<<20)), nil }
	first, second := m.save(t, "on-demand"), m.save(t, "on-demand")
	if done, err := m.Prune(t.Context(), 1); err != nil || len(done.Removed) != 1 || done.Removed[0].File != first.File {
		t.Errorf("%+v, %v", done, err)
	}
	r, err := m.Restore(t.Context(), second.File)
	if err != nil || r.Node != m.o.Node || len(r.Images) != maxImages {
		t.Errorf("%v, %v", r, err)
	}
}

// A snapshot of a server with a datastore outside has all the rest, and is restored on a server of that kind only.
func TestDatastoreOutside(t *testing.T) {
	own := newCluster(t, "n1")
	outside := newCluster(t, "n1")
	if err := os.RemoveAll(outside.dir.Server("db")); err != nil {
		t.Fatal(err)
	}
	outside.o.Datastore, outside.o.Outside = datastore.Outside{}, true
	outside.write(t, "{}", outside.dir.DatastoreEndpoint())
	info := outside.save(t, OnDemand)
	if info.Datastore != datastore.KindOutside || info.Revision != 0 {
		t.Errorf("the snapshot is %+v", info)
	}
	want := files(t, outside.dir.Server())
	// Where the datastore is, the server writes down at its start.
	delete(want, "cred/"+filepath.Base(outside.dir.DatastoreEndpoint()))
	fresh := newMachine(t, "n2")
	fresh.o.Datastore = datastore.Outside{}
	r, err := fresh.Restore(t.Context(), info.Path)
	if err != nil {
		t.Fatal(err)
	}
	equal(t, "restored", files(t, fresh.dir.Server()), want)
	// The snapshot's config file is for another data dir.
	if !r.ConfigDiffers || r.Next != 0 {
		t.Errorf("restored: config differs %v, next revision %d", r.ConfigDiffers, r.Next)
	}
	if _, err := os.Stat(fresh.dir.Server("db")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a datastore was made: %v", err)
	}
	if _, err := own.Restore(t.Context(), info.Path); err == nil || !strings.Contains(err.Error(), "has one of its own") {
		t.Errorf("over a datastore: %v", err)
	}
	if _, err := outside.Restore(t.Context(), own.save(t, OnDemand).Path); err == nil || !strings.Contains(err.Error(), "--datastore-endpoint") {
		t.Errorf("a datastore that would not be used: %v", err)
	}
	// Its keys are saved before an upgrade too.
	if err := outside.BeforeStart(t.Context(), true, slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}
	if all, err := outside.List(t.Context()); err != nil || len(all) != 2 {
		t.Errorf("%v, %v", all, err)
	}
}

// There is no scheduled snapshot of a datastore that is not complete.
func TestScheduledOnlyWhileHealthy(t *testing.T) {
	m := newCluster(t, "n1")
	healthy := errors.New("etcd has no leader")
	c := NewComponent(m.Snapshots, Schedule{Cron: "0 */12 * * *", Retention: 2, Healthy: func(context.Context) error { return healthy }}, "", slog.New(slog.DiscardHandler))
	if err := c.once(t.Context()); err == nil || !strings.Contains(err.Error(), "etcd has no leader") {
		t.Errorf("error is %v", err)
	}
	healthy = nil
	if err := c.once(t.Context()); err != nil {
		t.Error(err)
	}
	if all, err := m.List(t.Context()); err != nil || len(all) != 1 {
		t.Errorf("%v, %v", all, err)
	}
}
