package snapshot

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// names returns the files of the snapshots in a location, newest first.
func (m machine) names(t *testing.T, at Location) (names []string) {
	t.Helper()
	all, err := m.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range all {
		if i.Location == at {
			names = append(names, i.File)
		}
	}
	return names
}

// prune prunes the automatic snapshots, and returns the files that were removed and those that may be another cluster's.
func (m machine) prune(t *testing.T, keep int) (removed, unknown []string) {
	t.Helper()
	done, err := m.Prune(t.Context(), keep, automatic()...)
	if err != nil {
		t.Fatal(err)
	}
	file := func(all []Info) (files []string) {
		for _, i := range all {
			files = append(files, i.File)
		}
		return files
	}
	return file(done.Removed), file(done.Unknown)
}

// earlier gives a snapshot the name that an earlier version would have given it.
func (m machine) earlier(t *testing.T, i *Info) string {
	t.Helper()
	p, ok := parse(i.File)
	if !ok || p.cluster == "" {
		t.Fatalf("%s does not say which cluster it is of", i.File)
	}
	p.cluster = ""
	if err := os.Rename(i.Path, filepath.Join(m.o.Dir, p.String())); err != nil {
		t.Fatal(err)
	}
	return p.String()
}

// Two clusters with nodes of one name keep their snapshots in one folder. Neither removes the other's, however often it saves.
func TestClustersShareAFolder(t *testing.T) {
	a, b := newCluster(t, "n1"), newCluster(t, "n1")
	b.o.Dir = a.o.Dir
	theirs := []string{b.save(t, Scheduled).File, b.save(t, Scheduled).File}
	// Of an earlier version: what is in a readable one shows whose it is.
	ourOld, theirOld := a.earlier(t, a.save(t, Scheduled)), b.earlier(t, b.save(t, Scheduled))
	a.o.Passphrase = "correct horse"
	sealedOld := a.earlier(t, a.save(t, Scheduled))
	sealed := a.save(t, Scheduled).File
	a.o.Passphrase = ""
	newest := []string{a.save(t, Scheduled).File, a.save(t, Scheduled).File}
	half := func(name string) string {
		path := filepath.Join(a.o.Dir, name)
		a.write(t, "half", filepath.Join(path, "state.db"))
		return path
	}
	ids := map[string]string{}
	for name, m := range map[string]machine{"a": a, "b": b} {
		id, err := m.cluster()
		if err != nil || !clusterID.MatchString(id) {
			t.Fatalf("the id is %q, %v", id, err)
		}
		ids[name] = id
	}
	if ids["a"] == ids["b"] {
		t.Fatal("two clusters have one id")
	}
	removed, unknown := a.prune(t, 2)
	if want := []string{sealed, ourOld}; !slices.Equal(removed, want) {
		t.Errorf("removed %q, want %q", removed, want)
	}
	if want := []string{sealedOld}; !slices.Equal(unknown, want) {
		t.Errorf("unknown are %q, want %q", unknown, want)
	}
	all := a.names(t, Local)
	for _, file := range slices.Concat(theirs, newest, []string{theirOld, sealedOld}) {
		if !slices.Contains(all, file) {
			t.Errorf("%s is gone", file)
		}
	}
	// Both names can be restored, and deleted.
	if _, err := b.Restore(t.Context(), theirOld); err != nil {
		t.Error(err)
	}
	if _, err := a.Delete(t.Context(), sealedOld); err != nil {
		t.Error(err)
	}
	mine := half(".new-" + ids["a"] + "_n1_123")
	stay := []string{half(".new-123"), half(".new-" + ids["b"] + "_n1_123"), half(".new-" + ids["a"] + "_n1-b_123"), half(".new-" + ids["a"])}
	a.save(t, OnDemand)
	if _, err := os.Stat(mine); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("what an interrupted save of this server has left stays: %v", err)
	}
	for _, path := range stay {
		if _, err := os.Stat(path); err != nil {
			t.Errorf("it is not shown to be this server's: %v", err)
		}
	}

	// A cluster that was restored is the one that was saved, and another on the same machine is not.
	again := newMachine(t, "n1")
	again.o.Dir = a.o.Dir
	if _, err := again.Prune(t.Context(), 1); err == nil || !strings.Contains(err.Error(), "there is no cluster in "+string(again.dir)) {
		t.Errorf("without a cluster: %v", err)
	}
	if _, err := again.Restore(t.Context(), newest[1]); err != nil {
		t.Fatal(err)
	}
	if removed, _ := again.prune(t, 1); !slices.Contains(removed, newest[0]) {
		t.Errorf("after a restore it removed %q", removed)
	}
	for _, file := range theirs {
		if !slices.Contains(again.names(t, Local), file) {
			t.Errorf("%s is gone", file)
		}
	}
}

// interrupted makes what a process leaves in a folder that is killed while it downloads.
func (m machine) interrupted(t *testing.T, dir string) string {
	t.Helper()
	prefix, err := m.downloads()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, prefix+"123")
	m.write(t, "half", filepath.Join(path, ".new-456"))
	return path
}

// Every command of a server that changes the folder removes what its own interrupted downloads have left, and nothing of other servers.
func TestInterruptedDownload(t *testing.T) {
	a := newCluster(t, "n1")
	i := a.save(t, OnDemand)
	elsewhere, other := newCluster(t, "n1"), machine{New(a.o), a.dir}
	other.o.Node = "n2"
	stay := []string{elsewhere.interrupted(t, a.o.Dir), other.interrupted(t, a.o.Dir)}
	for what, run := range map[string]func() error{
		"save":   func() error { _, err := a.Save(t.Context(), OnDemand); return err },
		"prune":  func() error { _, err := a.Prune(t.Context(), 1); return err },
		"delete": func() error { _, err := a.Delete(t.Context(), i.File); return err },
	} {
		mine := a.interrupted(t, a.o.Dir)
		if err := run(); err != nil && what != "delete" { // it may be pruned
			t.Errorf("%s: %v", what, err)
		}
		if _, err := os.Stat(mine); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: what an interrupted download has left stays: %v", what, err)
		}
	}
	for _, path := range stay {
		if _, err := os.Stat(path); err != nil {
			t.Errorf("of another server: %v", err)
		}
	}
}

// A name alone is no proof if the content says otherwise.
func TestContentShowsTheCluster(t *testing.T) {
	a, b := newCluster(t, "n1"), newCluster(t, "n1")
	b.o.Dir = a.o.Dir
	a.save(t, Scheduled)
	i := b.save(t, Scheduled)
	id, err := a.cluster()
	if err != nil {
		t.Fatal(err)
	}
	forged := strings.Replace(i.File, i.Cluster, id, 1)
	if err := os.Rename(i.Path, filepath.Join(a.o.Dir, forged)); err != nil {
		t.Fatal(err)
	}
	a.save(t, Scheduled)
	a.prune(t, 1)
	if !slices.Contains(a.names(t, Local), forged) {
		t.Error("the snapshot of another cluster is gone")
	}
}

// The same in a real S3 server, where the clusters have one folder.
func TestClustersShareABucket(t *testing.T) {
	t.Parallel()
	settings := s3Server(t)
	settings.Folder = ""
	a, b := newCluster(t, "n1"), newCluster(t, "n1")
	for _, m := range []machine{a, b} {
		m.o.Bucket = bucketOf(t, settings)
	}
	old := b.save(t, Scheduled)
	// Of an earlier version: a bucket does not show which cluster it is of.
	p, _ := parse(old.File)
	p.cluster = ""
	if err := b.o.Bucket.upload(t.Context(), old.Path, p.String()); err != nil {
		t.Fatal(err)
	}
	var ours []string
	for range 3 {
		ours = append(ours, a.save(t, Scheduled).File)
	}
	removed, unknown := a.prune(t, 2)
	if want := []string{ours[0], ours[0]}; !slices.Equal(removed, want) {
		t.Errorf("removed %q, want %q", removed, want)
	}
	if !slices.Equal(unknown, []string{p.String()}) {
		t.Fatalf("unknown are %q", unknown)
	}
	if got, want := a.names(t, S3), []string{ours[2], ours[1], unknown[0], old.File}; !slices.Equal(got, want) {
		t.Errorf("in S3 are %q, want %q", got, want)
	}
	fresh := newMachine(t, "n2")
	fresh.o.Bucket = bucketOf(t, settings)
	fresh.interrupted(t, fresh.o.Dir)
	if _, err := fresh.Restore(t.Context(), unknown[0]); err != nil {
		t.Errorf("one of an earlier version: %v", err)
	}
	if left, err := filepath.Glob(filepath.Join(fresh.o.Dir, ".new-*")); err != nil || len(left) > 0 {
		t.Errorf("left behind: %q, %v", left, err)
	}
}
