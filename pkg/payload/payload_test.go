package payload

import (
	"archive/zip"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"
)

// content is the payload of the tests, large enough that a file is read in several steps.
func content() map[string][]byte {
	random := make([]byte, 3<<20)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(random)
	return map[string][]byte{
		Program: random, "bin/cni/bridge": []byte("bridge"), "images/polymesh.tar": bytes.Repeat([]byte("layer"), 1<<17), "licenses/a/LICENSE": []byte("MIT"),
	}
}

// build writes a launcher with a payload like build/payload: members compressed with zstd (method 93), images stored. change modifies
// the file's bytes.
func build(t *testing.T, files map[string][]byte, change func([]byte) []byte) string {
	t.Helper()
	manifest := Manifest{Version: "1.2.3", Files: map[string]string{}, Images: []string{"registry.example/pause:1"}}
	var out bytes.Buffer
	out.WriteString("\x7fELF the launcher")
	w := zip.NewWriter(&out)
	w.SetOffset(int64(out.Len()))
	w.RegisterCompressor(zstd.ZipMethodWinZip, zstd.ZipCompressor())
	add := func(name string, text []byte) {
		method := uint16(zstd.ZipMethodWinZip)
		if strings.HasPrefix(name, "images/") {
			method = zip.Store
		}
		m, err := w.CreateHeader(&zip.FileHeader{Name: name, Method: method})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := m.Write(text); err != nil {
			t.Fatal(err)
		}
	}
	for name, text := range files {
		sum := sha256.Sum256(text)
		manifest.Files[name] = "sha256:" + hex.EncodeToString(sum[:])
	}
	for name, text := range files {
		add(name, text)
	}
	text, err := json.Marshal(manifest)
	if err != nil {
		t.Fatal(err)
	}
	add(manifestName, text)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "polymesh")
	raw := out.Bytes()
	if change != nil {
		raw = change(raw)
	}
	if err := os.WriteFile(path, raw, 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

func open(t *testing.T, path string) *Payload {
	t.Helper()
	p, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return p
}

// same checks that dir contains exactly the files.
func same(t *testing.T, dir Dir, files map[string][]byte) {
	t.Helper()
	var have []string
	err := filepath.WalkDir(string(dir), func(path string, d os.DirEntry, err error) error {
		if err == nil && !d.IsDir() && d.Name() != lockName {
			name, _ := filepath.Rel(string(dir), path)
			have = append(have, name)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(have) != len(files)+1 || !slices.Contains(have, manifestName) {
		t.Errorf("files are %q", have)
	}
	for name, want := range files {
		got, err := os.ReadFile(dir.Path(name))
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %v, %d bytes, want %d", name, err, len(got), len(want))
		}
		info, err := os.Stat(dir.Path(name))
		if executable := strings.HasPrefix(name, "bin/"); err == nil && (info.Mode().Perm() == 0o755) != executable {
			t.Errorf("%s has mode %v", name, info.Mode())
		}
	}
}

func TestUnpack(t *testing.T) {
	files := content()
	p := open(t, build(t, files, nil))
	if p.Version != "1.2.3" || len(p.ID) != 16 {
		t.Errorf("version %q, id %q", p.Version, p.ID)
	}
	dir := In(t.TempDir(), p.ID)
	names, size := p.Missing(dir, false)
	if len(names) != len(files)+1 || size < 3<<20 {
		t.Errorf("missing %q, %d bytes", names, size)
	}
	if only, _ := p.Missing(dir, true); !slices.Equal(only, []string{Program}) {
		t.Errorf("of the program alone %q is missing", only)
	}
	if err := p.Unpack(dir, names); err != nil {
		t.Fatal(err)
	}
	same(t, dir, files)
	if names, size := p.Missing(dir, false); len(names) != 0 || size != 0 {
		t.Errorf("after that %q is missing, %d bytes", names, size)
	}
	m, err := dir.Manifest()
	if err != nil || !slices.Equal(m.Images, []string{"registry.example/pause:1"}) {
		t.Errorf("manifest %+v, %v", m, err)
	}
	if archives, err := dir.ImageArchives(); err != nil || len(archives) != 1 {
		t.Errorf("archives %q, %v", archives, err)
	}
}

// A start that was killed leaves a truncated file, one with its temporary name, and missing ones.
func TestUnpackGoesOnWhereItWasInterrupted(t *testing.T) {
	files := content()
	p := open(t, build(t, files, nil))
	dir := In(t.TempDir(), p.ID)
	if err := p.Unpack(dir, []string{Program, "bin/cni/bridge"}); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(dir.Path(Program), 1<<20); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(dir.Path("bin/.new-123"), []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	names, _ := p.Missing(dir, false)
	if !slices.Contains(names, Program) || slices.Contains(names, "bin/cni/bridge") {
		t.Errorf("missing is %q", names)
	}
	if err := p.Unpack(dir, names); err != nil {
		t.Fatal(err)
	}
	same(t, dir, files)
}

func TestUnpackByManyAtOnce(t *testing.T) {
	files := content()
	path := build(t, files, nil)
	base := t.TempDir()
	var wg sync.WaitGroup
	for range 8 {
		p := open(t, path)
		dir := In(base, p.ID)
		wg.Go(func() {
			names, _ := p.Missing(dir, false)
			if err := p.Unpack(dir, names); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	same(t, In(base, open(t, path).ID), files)
}

func TestDamagedFileIsRefused(t *testing.T) {
	files := content()
	flip := func(at int) func([]byte) []byte {
		return func(raw []byte) []byte { raw[at] ^= 0xff; return raw }
	}
	at := func(raw []byte, text string) int { return bytes.Index(raw, []byte(text)) }
	for name, change := range map[string]func([]byte) []byte{
		"a stored member":     func(raw []byte) []byte { return flip(at(raw, "layerlayer") + 1000)(raw) },
		"a compressed member": func(raw []byte) []byte { return flip(at(raw, string(files[Program][1<<20:1<<20+64])))(raw) },
	} {
		t.Run(name, func(t *testing.T) {
			p := open(t, build(t, files, change))
			dir := In(t.TempDir(), p.ID)
			names, _ := p.Missing(dir, false)
			err := p.Unpack(dir, names)
			if err == nil || !strings.Contains(err.Error(), "the polymesh file is damaged, copy it again") {
				t.Errorf("error is %v", err)
			}
			left, _ := p.Missing(dir, false)
			if len(left) == 0 {
				t.Error("the damaged file was unpacked")
			}
			if temp, _ := filepath.Glob(string(dir) + "/*/.new-*"); len(temp) > 0 {
				t.Errorf("left behind: %q", temp)
			}
		})
	}
}

// The manifest decides, even if the ZIP's own checksum matches.
func TestContentThatTheManifestDoesNotNameIsRefused(t *testing.T) {
	path := build(t, map[string][]byte{Program: []byte("the program")}, nil)
	p := open(t, path)
	p.Files[Program] = "sha256:00"
	err := p.Unpack(In(t.TempDir(), p.ID), []string{Program})
	if err == nil || !strings.Contains(err.Error(), `payload.json has "sha256:00"`) {
		t.Errorf("error is %v", err)
	}
	delete(p.Files, Program)
	if err := p.Unpack(In(t.TempDir(), p.ID), []string{Program}); err == nil {
		t.Error("a file without a checksum was unpacked")
	}
}

func TestFileWithoutPayload(t *testing.T) {
	cut := func(raw []byte) []byte { return raw[:len(raw)-100] }
	for _, path := range []string{build(t, content(), cut), os.Args[0]} {
		_, err := Open(path)
		if err == nil || !strings.Contains(err.Error(), "carries no payload (was it built with `make`, and copied completely?)") {
			t.Errorf("%s: error is %v", path, err)
		}
	}
	if _, err := Open("/no/such/file"); err == nil {
		t.Error("a nonexistent file was opened")
	}
}

func TestFullDisk(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting a small disk needs root")
	}
	disk := t.TempDir()
	if err := unix.Mount("small", disk, "tmpfs", 0, "size=1m"); err != nil {
		t.Skip("no tmpfs can be mounted here: ", err)
	}
	defer func() { _ = unix.Unmount(disk, unix.MNT_DETACH) }()
	p := open(t, build(t, content(), nil))
	dir := In(disk, p.ID)
	names, _ := p.Missing(dir, false)
	err := p.Unpack(dir, names)
	if err == nil || !strings.Contains(err.Error(), "no space left on the disk of "+string(dir)+"; free some, or choose another with --data-dir") {
		t.Errorf("error is %v", err)
	}
	if left, _ := p.Missing(dir, false); !slices.Contains(left, Program) {
		t.Error("a file that does not fit exists")
	}
}

func TestImage(t *testing.T) {
	m := Manifest{Images: []string{
		"registry.polymesh.dev/coredns:1.15.0", "registry.example:5000/istio/pilot:1.31.0-abc", "registry.example:5000/metrics-server",
		"a/twice:1", "b/twice:1", "registry.polymesh.dev/pause-extra:1",
	}}
	for name, want := range map[string]string{
		"coredns": "registry.polymesh.dev/coredns:1.15.0", "pilot": "registry.example:5000/istio/pilot:1.31.0-abc",
		"metrics-server": "registry.example:5000/metrics-server", "twice": "", "pause": "", "": "",
	} {
		got, err := m.Image(name)
		if got != want || (err == nil) != (want != "") {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
}

// Another user who can read the folder cannot block a server's start, and waiting for a held lock has a limit.
func TestLockOfTheFolder(t *testing.T) {
	dir := Dir(t.TempDir())
	folder, err := os.Open(string(dir))
	if err != nil {
		t.Fatal(err)
	}
	defer folder.Close()
	if err := unix.Flock(int(folder.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	unlock, err := lock(dir, 0)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(dir.Path(lockName)); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
	if _, err := lock(dir, 0); err == nil || !strings.Contains(err.Error(), "another process has held "+dir.Path(lockName)) {
		t.Errorf("a second one: %v", err)
	}
	unlock()
	unlock, err = lock(dir, 0)
	if err != nil {
		t.Fatal(err)
	}
	unlock()
}

// Of the programs in a user's cache, the one in use and the last one before it stay. Nothing else in the folder is touched.
func TestRemoveOld(t *testing.T) {
	cache := t.TempDir()
	put := func(id string, age time.Duration, files ...string) Dir {
		t.Helper()
		dir := In(cache, id)
		for _, name := range files {
			path := dir.Path(name)
			if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			if at := time.Now().Add(-age); os.Chtimes(path, at, at) != nil {
				t.Fatal("cannot change the time of ", path)
			}
		}
		return dir
	}
	stay := []Dir{
		put("0000000000000001", 9*time.Hour, lockName, Program),
		put("0000000000000002", time.Hour, lockName, Program),
		put("0000000000000003", 5*time.Hour, lockName, Program, "bin/mine"),
		put("notes-of-the-user", 5*time.Hour, Program),
		put("0000000000000004", 5*time.Hour, lockName),
		put("0000000000000005", 4*time.Hour, lockName, Program),
	}
	unlock, err := lock(stay[5], 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unlock()
	gone := []Dir{put("0000000000000006", 2*time.Hour, lockName, Program), put("0000000000000007", 3*time.Hour, Program)}
	elsewhere := filepath.Join(cache, "data", "0000000000000008")
	if err := os.Symlink(string(stay[0]), elsewhere); err != nil {
		t.Fatal(err)
	}
	if err := RemoveOld(cache, "0000000000000001"); err != nil {
		t.Fatal(err)
	}
	for _, dir := range append(stay, Dir(elsewhere)) {
		if _, err := os.Lstat(string(dir)); err != nil {
			t.Errorf("removed what must stay: %v", err)
		}
	}
	for _, dir := range gone {
		if _, err := os.Lstat(string(dir)); !os.IsNotExist(err) {
			t.Errorf("%s is still there (%v)", dir, err)
		}
	}
}
