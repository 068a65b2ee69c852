package main

import (
	"archive/tar"
	"archive/zip"
	"bytes"
	"encoding/json"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	oci "github.com/opencontainers/image-spec/specs-go/v1"

	"polymesh.dev/polymesh/pkg/payload"
)

// archiveOf is an OCI archive as build/images writes it, as far as the payload program looks into it.
func archiveOf(t *testing.T, members map[string][]byte) []byte {
	t.Helper()
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, name := range slices.Sorted(maps.Keys(members)) {
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(members[name]))}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(members[name]); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func indexOf(t *testing.T, names ...string) []byte {
	t.Helper()
	var index oci.Index
	for _, name := range names {
		index.Manifests = append(index.Manifests, oci.Descriptor{Annotations: map[string]string{"io.containerd.image.name": name}})
	}
	text, err := json.Marshal(index)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// content has one of each kind of member.
func content(t *testing.T) map[string][]byte {
	return map[string][]byte{
		"launcher":                    []byte("\x7fELF and what else makes a launcher"),
		"bin/polymesh":                bytes.Repeat([]byte("a large program "), 50_000),
		"bin/lib/libc.so.6":           []byte("a library"),
		"images/polymesh.tar":         archiveOf(t, map[string][]byte{"blobs/sha256/1": bytes.Repeat([]byte("layer"), 1000), "index.json": indexOf(t, "registry.polymesh.dev/pause:1", "registry.polymesh.dev/istio/pilot:2")}),
		"licenses/index.txt":          []byte("what ships\n"),
		"manifests/gateway-api.yaml":  []byte("kind: CustomResourceDefinition\n"),
		"manifests/deeper/empty.yaml": nil,
	}
}

// assemble writes the content into a new folder and lets the program build a file of it.
func assemble(t *testing.T, files map[string][]byte, cache string) (string, error) {
	t.Helper()
	top := t.TempDir()
	for name, data := range files {
		name = filepath.Join(top, name)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	out := filepath.Join(top, "dist", "polymesh")
	args := []string{"-version", "1.2.3", "-launcher", filepath.Join(top, "launcher"), "-epoch", "1700000000", "-cache", cache, "-level", "3", "-o", out}
	for _, name := range []string{"bin/polymesh=bin/polymesh", "bin/lib=bin/lib", "images=images", "manifests=manifests", "licenses=licenses"} {
		name, source, _ := strings.Cut(name, "=")
		args = append(args, name+"="+filepath.Join(top, source))
	}
	return out, run(t.Context(), args)
}

func mustAssemble(t *testing.T, files map[string][]byte) string {
	t.Helper()
	out, err := assemble(t, files, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func mustRead(t *testing.T, name string) []byte {
	t.Helper()
	data, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func TestTheSameInputGivesTheSameBytes(t *testing.T) {
	cache := t.TempDir()
	first, err := assemble(t, content(t), cache)
	if err != nil {
		t.Fatal(err)
	}
	want := mustRead(t, first)
	warm, err := assemble(t, content(t), cache)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(mustRead(t, warm), want) {
		t.Error("with a warm cache the file is another")
	}
	if !bytes.Equal(mustRead(t, mustAssemble(t, content(t))), want) {
		t.Error("with an empty cache, from another folder, the file is another")
	}
	changed := content(t)
	changed["licenses/index.txt"] = []byte("something else ships\n")
	if bytes.Equal(mustRead(t, mustAssemble(t, changed)), want) {
		t.Error("another licence text gives the same file")
	}
}

func TestWhatTheFileHolds(t *testing.T) {
	files := content(t)
	out := mustAssemble(t, files)
	if !bytes.HasPrefix(mustRead(t, out), files["launcher"]) {
		t.Error("the file does not begin with the launcher: the kernel could not run it")
	}
	if info, err := os.Stat(out); err != nil || info.Mode().Perm() != 0o755 {
		t.Errorf("the file has mode %v, %v", info.Mode(), err)
	}
	// What the product does with it.
	shipped, err := payload.Open(out)
	if err != nil {
		t.Fatal(err)
	}
	defer shipped.Close()
	dir := payload.Dir(filepath.Join(t.TempDir(), "unpacked"))
	missing, _ := shipped.Missing(dir, false)
	if err := shipped.Unpack(dir, missing); err != nil {
		t.Fatal(err)
	}
	delete(files, "launcher")
	for name, want := range files {
		// Licences are for people: the product does not unpack what it does not need.
		if !slices.Contains(missing, name) {
			continue
		}
		if got := mustRead(t, dir.Path(name)); !bytes.Equal(got, want) {
			t.Errorf("%s has changed on its way: %d bytes, were %d", name, len(got), len(want))
		}
	}
	if !slices.Contains(missing, "bin/polymesh") || !slices.Contains(missing, "images/polymesh.tar") {
		t.Errorf("only %q are unpacked", missing)
	}
	manifest, err := dir.Manifest()
	if err != nil {
		t.Fatal(err)
	}
	if want := []string{"registry.polymesh.dev/pause:1", "registry.polymesh.dev/istio/pilot:2"}; !slices.Equal(manifest.Images, want) {
		t.Errorf("the images are %q, want %q", manifest.Images, want)
	}
	if manifest.Version != "1.2.3" {
		t.Errorf("the version is %q", manifest.Version)
	}
	archive, err := zip.OpenReader(out)
	if err != nil {
		t.Fatal(err)
	}
	defer archive.Close()
	for _, member := range archive.File {
		wantMode := os.FileMode(0o644)
		if strings.HasPrefix(member.Name, "bin/") {
			wantMode = 0o755
		}
		if member.Mode().Perm() != wantMode || !member.Modified.Equal(time.Unix(1700000000, 0)) {
			t.Errorf("%s has mode %v and time %v", member.Name, member.Mode(), member.Modified)
		}
	}
}

func TestVerify(t *testing.T) {
	out := mustAssemble(t, content(t))
	if err := run(t.Context(), []string{"-verify", out}); err != nil {
		t.Fatalf("an untouched file is refused: %v", err)
	}
	archive, err := zip.OpenReader(out)
	if err != nil {
		t.Fatal(err)
	}
	defer archive.Close()
	whole := mustRead(t, out)
	for _, member := range archive.File {
		offset, err := member.DataOffset()
		if err != nil {
			t.Fatal(err)
		}
		for _, at := range []uint64{0, member.CompressedSize64 / 2, member.CompressedSize64 - 1} {
			if at >= member.CompressedSize64 {
				continue // an empty member
			}
			damaged := bytes.Clone(whole)
			damaged[offset+int64(at)] ^= 1
			name := filepath.Join(t.TempDir(), "damaged")
			if err := os.WriteFile(name, damaged, 0o644); err != nil {
				t.Fatal(err)
			}
			if err := verify(name); err == nil {
				t.Errorf("byte %d of %s is another, and that is not found", at, member.Name)
			}
		}
	}
	for _, cut := range []int{1, 100, len(whole) / 2} {
		name := filepath.Join(t.TempDir(), "cut")
		if err := os.WriteFile(name, whole[:len(whole)-cut], 0o644); err != nil {
			t.Fatal(err)
		}
		if err := verify(name); err == nil {
			t.Errorf("the last %d bytes are gone, and that is not found", cut)
		}
	}
}

func TestVerifyComparesTheNamesBothWays(t *testing.T) {
	const digestOfX = "sha256:2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"
	for _, c := range []struct {
		name     string
		manifest payload.Manifest
		members  []string
		want     string
	}{
		{"all is well", payload.Manifest{Files: map[string]string{"bin/a": digestOfX}}, []string{"bin/a"}, ""},
		{"a member too many", payload.Manifest{Files: map[string]string{"bin/a": digestOfX}}, []string{"bin/a", "bin/b"}, "holds bin/b, which payload.json does not name"},
		{"a member too few", payload.Manifest{Files: map[string]string{"bin/a": digestOfX, "bin/b": digestOfX}}, []string{"bin/a"}, "names bin/b, which"},
		{"a member twice", payload.Manifest{Files: map[string]string{"bin/a": digestOfX}}, []string{"bin/a", "bin/a"}, "holds bin/a, which payload.json does not name"},
		{"another member in its place", payload.Manifest{Files: map[string]string{"bin/a": "sha256:" + strings.Repeat("0", 64)}}, []string{"bin/a"}, "payload.json says"},
	} {
		t.Run(c.name, func(t *testing.T) {
			name := filepath.Join(t.TempDir(), "file")
			file, err := os.Create(name)
			if err != nil {
				t.Fatal(err)
			}
			w := zip.NewWriter(file)
			text, err := json.Marshal(c.manifest)
			if err != nil {
				t.Fatal(err)
			}
			for _, member := range append(c.members, "payload.json") {
				out, err := w.Create(member)
				if err != nil {
					t.Fatal(err)
				}
				data := []byte("x")
				if member == "payload.json" {
					data = text
				}
				if _, err := out.Write(data); err != nil {
					t.Fatal(err)
				}
			}
			if err := w.Close(); err != nil {
				t.Fatal(err)
			}
			if err := file.Close(); err != nil {
				t.Fatal(err)
			}
			err = verify(name)
			if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
	if err := verify(filepath.Join(t.TempDir(), "absent")); err == nil {
		t.Error("a file that is not there is verified")
	}
}

func TestInputThatIsRefused(t *testing.T) {
	broken := content(t)
	broken["images/polymesh.tar"] = archiveOf(t, map[string][]byte{"blobs/sha256/1": []byte("layer")})
	out, err := assemble(t, broken, t.TempDir())
	if err == nil || !strings.Contains(err.Error(), "images/polymesh.tar") {
		t.Errorf("an archive without index.json: %v", err)
	}
	if _, err := os.Stat(out); err == nil {
		t.Error("a file was written all the same")
	}
	broken["images/polymesh.tar"] = archiveOf(t, map[string][]byte{"index.json": []byte("{")})
	if _, err := assemble(t, broken, t.TempDir()); err == nil {
		t.Error("an index.json that is no JSON is taken")
	}
	gone := content(t)
	delete(gone, "launcher")
	if _, err := assemble(t, gone, t.TempDir()); err == nil {
		t.Error("a missing launcher is taken")
	}
	if err := run(t.Context(), []string{"-launcher", os.Args[0], "-o", filepath.Join(t.TempDir(), "x"), "no-equals-sign"}); err == nil {
		t.Error("an argument without = is taken")
	}
}

// An image without a name could never be found in containerd.
func TestReferences(t *testing.T) {
	names, err := references(archiveOf(t, map[string][]byte{"index.json": indexOf(t, "a:1", "b:2")}))
	if err != nil || !slices.Equal(names, []string{"a:1", "b:2"}) {
		t.Errorf("got %q, %v", names, err)
	}
	if names, err := references(archiveOf(t, map[string][]byte{"index.json": indexOf(t, "a:1", "")})); err == nil {
		t.Errorf("an image without a name gives %q", names)
	}
}
