// The payload program combines the launcher and everything that ships into one file: the launcher's ELF, then a ZIP whose
// offsets count from the start of the file, so that unzip can list it. Members are zstd frames (method 93), except images,
// whose layers are already compressed. The same input always gives the same bytes. The Makefile calls it; pkg/payload
// reads the result.
package main

import (
	"archive/tar"
	"archive/zip"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"os/signal"
	"path"
	"path/filepath"
	"strings"
	"time"

	"github.com/klauspost/compress/zstd"
	oci "github.com/opencontainers/image-spec/specs-go/v1"

	"polymesh.dev/polymesh/build/compress"
	"polymesh.dev/polymesh/pkg/payload"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "payload:", err)
		os.Exit(1)
	}
}

// assembly collects the ZIP and the contents of payload.json.
type assembly struct {
	writer *zip.Writer
	store  compress.Store
	stamp  time.Time
	files  map[string]string
	images []string
}

func run(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("payload", flag.ExitOnError)
	var (
		version  = flags.String("version", "", "version of the release")
		launcher = flags.String("launcher", "", "the launcher, a static program")
		epoch    = flags.Int64("epoch", 0, "time stamp of the members, in seconds since 1970")
		cache    = flags.String("cache", "", "directory that keeps compressed pieces")
		level    = flags.Int("level", compress.Shipped, "zstd level of what is not in the cache yet")
		output   = flags.String("o", "", "the file to write")
		check    = flags.String("verify", "", "write nothing, but check that the members of this file match its payload.json")
	)
	flags.Usage = func() {
		fmt.Fprintln(flags.Output(), "usage: payload [flags] <name in the payload>=<file or directory> ...")
		flags.PrintDefaults()
	}
	if err := flags.Parse(args); err != nil {
		return err
	}
	if *check != "" {
		return verify(*check)
	}
	start, err := os.ReadFile(*launcher)
	if err != nil {
		return fmt.Errorf("read the launcher: %w", err)
	}

	var appended bytes.Buffer
	a := &assembly{
		writer: zip.NewWriter(&appended),
		store:  compress.Store{Dir: *cache, Level: *level},
		stamp:  time.Unix(*epoch, 0).UTC(),
		files:  map[string]string{},
	}
	a.writer.SetOffset(int64(len(start)))
	fmt.Printf("%-44s %10s %10s\n", "member", "bytes", "in file")
	fmt.Printf("%-44s %10d %10d\n", "(launcher)", len(start), len(start))
	for _, argument := range flags.Args() {
		name, source, ok := strings.Cut(argument, "=")
		if !ok {
			return fmt.Errorf("%q is not <name>=<file>", argument)
		}
		if err := a.addAll(ctx, name, source); err != nil {
			return err
		}
	}
	// Last, because it lists all others.
	text, err := json.MarshalIndent(payload.Manifest{Version: *version, Files: a.files, Images: a.images}, "", "  ")
	if err != nil {
		return fmt.Errorf("encode payload.json: %w", err)
	}
	if err := a.add(ctx, "payload.json", append(text, '\n')); err != nil {
		return err
	}
	if err := a.writer.Close(); err != nil {
		return fmt.Errorf("end the ZIP: %w", err)
	}
	fmt.Printf("%-44s %10s %10d\n", *output, "", len(start)+appended.Len())
	return replace(*output, start, appended.Bytes())
}

// addAll adds a file, or each file below a directory.
func (a *assembly) addAll(ctx context.Context, name, source string) error {
	return filepath.WalkDir(source, func(file string, entry fs.DirEntry, err error) error {
		if err != nil {
			return fmt.Errorf("add %s: %w", source, err)
		}
		if entry.IsDir() {
			return nil
		}
		relative, err := filepath.Rel(source, file)
		if err != nil {
			return fmt.Errorf("add %s: %w", source, err)
		}
		content, err := os.ReadFile(file)
		if err != nil {
			return fmt.Errorf("add %s: %w", source, err)
		}
		return a.add(ctx, path.Join(name, filepath.ToSlash(relative)), content)
	})
}

func (a *assembly) add(ctx context.Context, name string, content []byte) error {
	header := &zip.FileHeader{
		Name:               name,
		Method:             zstd.ZipMethodWinZip,
		CRC32:              crc32.ChecksumIEEE(content),
		UncompressedSize64: uint64(len(content)),
	}
	//lint:ignore SA1019 CreateRaw writes these fields as they are and ignores Modified
	header.SetModTime(a.stamp)
	header.SetMode(0o644)
	if strings.HasPrefix(name, "bin/") {
		header.SetMode(0o755)
	}
	stored := content
	if strings.HasPrefix(name, "images/") {
		header.Method = zip.Store
		images, err := references(content)
		if err != nil {
			return fmt.Errorf("read %s: %w", name, err)
		}
		a.images = append(a.images, images...)
	} else {
		var err error
		if stored, err = a.store.Frame(ctx, content); err != nil {
			return fmt.Errorf("compress %s: %w", name, err)
		}
	}
	header.CompressedSize64 = uint64(len(stored))
	out, err := a.writer.CreateRaw(header)
	if err != nil {
		return fmt.Errorf("add %s: %w", name, err)
	}
	if _, err := out.Write(stored); err != nil {
		return fmt.Errorf("add %s: %w", name, err)
	}
	sum := sha256.Sum256(content)
	a.files[name] = "sha256:" + hex.EncodeToString(sum[:])
	if !strings.HasPrefix(name, "bin/lib/") && !strings.HasPrefix(name, "licenses/") {
		fmt.Printf("%-44s %10d %10d\n", name, len(content), len(stored))
	}
	return nil
}

// references returns the names of the images in an OCI archive.
func references(archive []byte) ([]string, error) {
	reader := tar.NewReader(bytes.NewReader(archive))
	for {
		header, err := reader.Next()
		if errors.Is(err, io.EOF) {
			return nil, errors.New("there is no index.json in it")
		}
		if err != nil {
			return nil, err
		}
		if header.Name != oci.ImageIndexFile {
			continue
		}
		var index oci.Index
		if err := json.NewDecoder(reader).Decode(&index); err != nil {
			return nil, fmt.Errorf("read index.json: %w", err)
		}
		var names []string
		for _, manifest := range index.Manifests {
			name := manifest.Annotations["io.containerd.image.name"]
			if name == "" {
				return nil, fmt.Errorf("index.json gives %s no name", manifest.Digest)
			}
			names = append(names, name)
		}
		return names, nil
	}
}

// replace writes a new file and renames it, because the old one may be running.
func replace(name string, parts ...[]byte) error {
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	file, err := os.CreateTemp(filepath.Dir(name), ".partial-")
	if err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	defer os.Remove(file.Name())
	for _, part := range parts {
		if _, err := file.Write(part); err != nil {
			file.Close()
			return fmt.Errorf("write %s: %w", name, err)
		}
	}
	if err := file.Chmod(0o755); err != nil {
		file.Close()
		return fmt.Errorf("write %s: %w", name, err)
	}
	if err := file.Close(); err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	if err := os.Rename(file.Name(), name); err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	return nil
}
