package main

import (
	"archive/zip"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"

	"github.com/klauspost/compress/zstd"

	"polymesh.dev/polymesh/pkg/payload"
)

// verify reads the whole file back and compares each member with payload.json, and the names in both directions.
func verify(name string) error {
	archive, err := zip.OpenReader(name)
	if err != nil {
		return fmt.Errorf("open %s: %w", name, err)
	}
	defer archive.Close()
	archive.RegisterDecompressor(zstd.ZipMethodWinZip, zstd.ZipDecompressor())
	text, err := fs.ReadFile(archive, "payload.json")
	if err != nil {
		return fmt.Errorf("read payload.json in %s: %w", name, err)
	}
	var manifest payload.Manifest
	if err := json.Unmarshal(text, &manifest); err != nil {
		return fmt.Errorf("read payload.json in %s: %w", name, err)
	}
	for _, member := range archive.File {
		if member.Name == "payload.json" {
			continue
		}
		got, err := digest(member)
		if err != nil {
			return fmt.Errorf("read %s in %s: %w", member.Name, name, err)
		}
		want, ok := manifest.Files[member.Name]
		if !ok {
			return fmt.Errorf("%s holds %s, which payload.json does not name", name, member.Name)
		}
		if got != want {
			return fmt.Errorf("%s in %s is %s, payload.json says %s", member.Name, name, got, want)
		}
		delete(manifest.Files, member.Name)
	}
	for missing := range manifest.Files {
		return fmt.Errorf("payload.json names %s, which %s does not hold", missing, name)
	}
	fmt.Printf("%d members of %s match payload.json\n", len(archive.File)-1, name)
	return nil
}

func digest(member *zip.File) (string, error) {
	file, err := member.Open()
	if err != nil {
		return "", err
	}
	defer file.Close()
	sum := sha256.New()
	if _, err := io.Copy(sum, file); err != nil {
		return "", err
	}
	return "sha256:" + hex.EncodeToString(sum.Sum(nil)), nil
}
