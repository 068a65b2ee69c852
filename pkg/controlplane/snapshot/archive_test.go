package snapshot

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"filippo.io/age"
	"github.com/klauspost/compress/zstd"
)

func TestNames(t *testing.T) {
	at := time.Date(2026, 11, 29, 14, 6, 31, 123e6, time.UTC)
	for want, p := range map[string]parts{
		"before-upgrade_node-1.example_20261129T140631.123Z.tar.zst.age":              {"before-upgrade", "node-1.example", at, "", true}, // of an earlier version
		"before-upgrade_node-1.example_20261129T140631.123Z_0123456789ab.tar.zst.age": {"before-upgrade", "node-1.example", at, "0123456789ab", true},
		"on-demand_a_20261129T140631.123Z_0123456789ab.tar.zst":                       {"on-demand", "a", at, "0123456789ab", false},
	} {
		if got := p.String(); got != want {
			t.Errorf("%s, want %s", got, want)
		}
		if got, ok := parse(want); !ok || got != p {
			t.Errorf("%s is %+v, %v", want, got, ok)
		}
	}
	for _, file := range []string{
		"", "x.tar.zst", "a_b_20261129T140631.123Z.tar", "a_b_20261129T140631Z.tar.zst", "a_b_20261399T140631.123Z.tar.zst", "../a_b_20261129T140631.123Z.tar.zst",
		"a_b_c_20261129T140631.123Z.tar.zst", "_b_20261129T140631.123Z.tar.zst", "a__20261129T140631.123Z.tar.zst", "a_B_20261129T140631.123Z.tar.zst",
		"a_b_20261129T140631.123Z_0123456789a.tar.zst", "a_b_20261129T140631.123Z_0123456789AB.tar.zst", "a_b_20261129T140631.123Z_.tar.zst",
		"a_b_20261129T140631.123Z_0123456789ab_0123456789ab.tar.zst", ".new-0123456789ab_b_1",
		"a_b_20261129T140631.123Z.tar.zst\n", ".new-1", "a_b_20261129T140631.123Z.tar.zst.age.age",
	} {
		if p, ok := parse(file); ok {
			t.Errorf("%q is %+v", file, p)
		}
	}
	for name, ok := range map[string]bool{"on-demand": true, "v1.2": true, "": false, "a_b": false, "a/b": false, "-a": false, "scheduled": false, "before-restore": false, strings.Repeat("a", 64): false} {
		if err := CheckName(name); (err == nil) != ok {
			t.Errorf("%q: %v", name, err)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add("a_b_20261129T140631.123Z.tar.zst")
	f.Add("a_b_20261129T140631.123Z_0123456789ab.tar.zst.age")
	f.Fuzz(func(t *testing.T, file string) {
		p, ok := parse(file)
		if ok && (p.String() != file || filepath.Base(file) != file) {
			t.Errorf("%q is %+v", file, p)
		}
	})
}

// entry is one member of a made-up archive.
type entry struct {
	header tar.Header
	text   string
}

func file(name, text string) entry {
	return entry{tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o600, Size: int64(len(text))}, text}
}

// made returns a made-up archive.
func made(t testing.TB, entries ...entry) []byte {
	t.Helper()
	var packed bytes.Buffer
	z, err := zstd.NewWriter(&packed)
	if err != nil {
		t.Fatal(err)
	}
	w := tar.NewWriter(z)
	for _, e := range entries {
		if err := w.WriteHeader(&e.header); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, e.text); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(w.Close(), z.Close()); err != nil {
		t.Fatal(err)
	}
	return packed.Bytes()
}

func description(t testing.TB, files ...File) entry {
	t.Helper()
	text, err := json.Marshal(Metadata{Format: 1, Node: "n", Files: files})
	if err != nil {
		t.Fatal(err)
	}
	return file(metadataName, string(text))
}

// An archive may come from anywhere: what Polymesh does not write is rejected, nothing is written outside of the folder, and what is read is
// bounded.
func TestHostileArchives(t *testing.T) {
	ca, db := fileOf("server/tls/server-ca.crt", []byte("ca")), fileOf("datastore/state.db", []byte("db"))
	good := []entry{description(t, ca, db), file(ca.Path, "ca"), file(db.Path, "db")}
	link := func(kind byte, name, target string) entry {
		return entry{tar.Header{Name: name, Typeflag: kind, Linkname: target}, ""}
	}
	path := func(name string) []entry {
		return []entry{description(t, fileOf(name, []byte("x"))), file(name, "x")}
	}
	plain := func(text string) []byte {
		z, err := zstd.NewWriter(nil)
		if err != nil {
			t.Fatal(err)
		}
		return z.EncodeAll([]byte(text), nil)
	}
	noSum := ca
	noSum.SHA256 = ""
	huge := db
	huge.Size = 1 << 40
	many := make([]File, maxFiles+1)
	for name, c := range map[string]struct {
		archive []byte
		want    string
	}{
		"good":                   {made(t, good...), ""},
		"empty":                  {nil, "not a snapshot"},
		"text":                   {[]byte("a text that is no archive"), "not a snapshot"},
		"compressed text":        {plain("text"), "not a snapshot"},
		"no description":         {made(t, good[1:]...), "its first file is not"},
		"description later":      {made(t, good[1], good[0], good[2]), "its first file is not"},
		"damaged description":    {made(t, file(metadataName, "{")), "not a snapshot"},
		"no format":              {made(t, file(metadataName, "{}")), "its format is missing"},
		"newer format":           {made(t, file(metadataName, `{"format":2,"version":"9.0.0"}`)), "use the version that saved it (9.0.0)"},
		"huge description":       {made(t, file(metadataName, `{"format":1,"node":"`+strings.Repeat("x", maxMetadata)+`"}`)), "its first file is not"},
		"missing file":           {made(t, good[:2]...), "datastore/state.db is missing"},
		"file twice":             {made(t, append(good, good[1])...), "contains"},
		"described twice":        {made(t, description(t, ca, ca), good[1]), "twice"},
		"file not described":     {made(t, append(good, file("server/token", "x"))...), "contains"},
		"other content":          {made(t, good[0], file(ca.Path, "CA"), good[2]), "its sum is"},
		"other size":             {made(t, good[0], file(ca.Path, "cacaca"), good[2]), "contains"},
		"no sum":                 {made(t, description(t, noSum), good[1]), "the sum of server/tls/server-ca.crt is missing"},
		"path outside":           {made(t, path("../../etc/passwd")...), "cannot contain"},
		"path outside, inside":   {made(t, path("server/tls/../../../x")...), "cannot contain"},
		"absolute path":          {made(t, path("/etc/passwd")...), "cannot contain"},
		"hidden file":            {made(t, path("server/tls/.x")...), "cannot contain"},
		"kubeconfig":             {made(t, path("server/cred/polymesh.kubeconfig")...), "cannot contain"},
		"program":                {made(t, path("data/current/bin/polymesh")...), "cannot contain"},
		"plan of a restore":      {made(t, path("server/restore.json")...), "cannot contain"},
		"symbolic link":          {made(t, good[0], link(tar.TypeSymlink, ca.Path, "/etc/shadow"), good[2]), "contains"},
		"hard link":              {made(t, good[0], link(tar.TypeLink, ca.Path, "/etc/shadow"), good[2]), "contains"},
		"device":                 {made(t, good[0], link(tar.TypeChar, ca.Path, ""), good[2]), "contains"},
		"folder":                 {made(t, good[0], link(tar.TypeDir, "server/tls/", ""), good[1], good[2]), "contains"},
		"datastore without room": {made(t, description(t, huge)), "there is room for"},
		"large certificate":      {made(t, description(t, File{ca.Path, maxFile + 1, ca.SHA256})), "bytes"},
		"negative size":          {made(t, description(t, File{ca.Path, -1, ca.SHA256})), "bytes"},
		"many files":             {made(t, description(t, many...)), "1001 files"},
		"cut off":                {made(t, good...)[:60], "damaged"},
		"more behind it":         {append(made(t, good...), plain(strings.Repeat("x", maxFile+1))...), "after its last file"},
		"bomb":                   {append(made(t, good...), plain(strings.Repeat("\x00", 256<<20))...), "after its last file"},
	} {
		t.Run(name, func(t *testing.T) {
			for _, folder := range []string{"", filepath.Join(t.TempDir(), "a", "b")} {
				_, err := read(t.Context(), bytes.NewReader(c.archive), "", folder, 1<<30)
				if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
					t.Errorf("error is %v, want %q", err, c.want)
				}
				if folder == "" {
					continue
				}
				// Nothing outside of the folder, and no links in it.
				_ = filepath.WalkDir(filepath.Dir(filepath.Dir(folder)), func(path string, d os.DirEntry, err error) error {
					if err == nil && !d.IsDir() && (!strings.HasPrefix(path, folder+"/") || !d.Type().IsRegular()) {
						t.Errorf("%s was written", path)
					}
					return err
				})
			}
		})
	}
}

// A window that needs more memory than a server may have is rejected.
func TestLargeWindow(t *testing.T) {
	var packed bytes.Buffer
	z, err := zstd.NewWriter(&packed, zstd.WithWindowSize(512<<20))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := z.Write(make([]byte, 1<<20)); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(z.Flush(), z.Close()); err != nil {
		t.Fatal(err)
	}
	if _, err := read(t.Context(), &packed, "", "", 1<<30); !errors.Is(err, zstd.ErrWindowSizeExceeded) {
		t.Errorf("error is %v", err)
	}
}

// Each byte of an encrypted archive is protected, its end too, and nothing in it can be read without the passphrase.
func TestEncrypted(t *testing.T) {
	t.Parallel()
	m := &Metadata{Format: 1, Node: "n", Created: time.Now()}
	text := strings.Repeat("-----BEGIN EC PRIVATE KEY-----\n", 5000)
	f := source{File: fileOf("server/tls/server-ca.key", []byte(text)), content: []byte(text)}
	m.Files = []File{f.File}
	var packed bytes.Buffer
	if err := write(t.Context(), &packed, m, []source{f}, "correct horse"); err != nil {
		t.Fatal(err)
	}
	archive := packed.Bytes()
	if bytes.Contains(archive, []byte("PRIVATE")) || bytes.Contains(archive, []byte("server-ca")) {
		t.Error("it can be read without the passphrase")
	}
	check := func(what, passphrase string, archive []byte, ok bool) {
		t.Helper()
		if _, err := read(t.Context(), bytes.NewReader(archive), passphrase, "", 1<<30); (err == nil) != ok {
			t.Errorf("%s: %v", what, err)
		}
	}
	check("right passphrase", "correct horse", archive, true)
	check("cut off", "correct horse", archive[:len(archive)-1], false)
	changed := bytes.Clone(archive)
	changed[len(changed)-20] ^= 1
	check("changed byte", "correct horse", changed, false)
	for _, passphrase := range []string{"", "wrong horse"} {
		if _, err := read(t.Context(), bytes.NewReader(archive), passphrase, "", 1<<30); !errors.Is(err, ErrPassphrase) {
			t.Errorf("passphrase %q: %v", passphrase, err)
		}
	}
	// It is a file that age can open.
	identity, err := age.NewScryptIdentity("correct horse")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := age.Decrypt(bytes.NewReader(archive), identity); err != nil {
		t.Error(err)
	}
	// The memory that someone else's archive costs is bounded.
	var costly bytes.Buffer
	fmt.Fprintf(&costly, "age-encryption.org/v1\n-> scrypt %s 30\n%s\n--- %s\n", strings.Repeat("A", 22), strings.Repeat("A", 43), strings.Repeat("A", 43))
	if _, err := read(t.Context(), &costly, "x", "", 1<<30); err == nil || !strings.Contains(err.Error(), "work factor too large") {
		t.Errorf("a costly archive: %v", err)
	}
}

func TestReadEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := read(ctx, bytes.NewReader(made(t, description(t))), "", "", 1); !errors.Is(err, context.Canceled) {
		t.Errorf("error is %v", err)
	}
}

func FuzzRead(f *testing.F) {
	ca := fileOf("server/tls/server-ca.crt", []byte("ca"))
	f.Add(made(f, description(f, ca), file(ca.Path, "ca")))
	f.Add([]byte("age-encryption.org/v1\n"))
	f.Fuzz(func(t *testing.T, archive []byte) {
		folder := filepath.Join(t.TempDir(), "a")
		m, err := read(t.Context(), bytes.NewReader(archive), "", folder, 1<<20)
		if err == nil && m == nil {
			t.Error("neither a description nor an error")
		}
		if entries, err := os.ReadDir(filepath.Dir(folder)); err != nil || len(entries) > 1 {
			t.Errorf("written outside: %v %v", entries, err)
		}
	})
}
