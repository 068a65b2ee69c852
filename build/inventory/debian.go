package main

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
)

// debianPackages lists the packages whose files ship. Version and hash are those of the files that were used.
func debianPackages(ctx context.Context, lock, directory string) ([]component, error) {
	file, err := os.Open(lock)
	if err != nil {
		return nil, fmt.Errorf("read the Debian lock: %w", err)
	}
	defer file.Close()
	var parts []component
	lines := bufio.NewScanner(file)
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) < 4 || fields[0] == "#" {
			continue
		}
		release := "bookworm"
		if len(fields) > 4 {
			release = fields[4]
		}
		deb := filepath.Join(directory, fields[0]+".deb")
		content, err := os.ReadFile(deb)
		if err != nil {
			return nil, fmt.Errorf("read a Debian package: %w", err)
		}
		out, err := exec.CommandContext(ctx, "dpkg-deb", "--show", "--showformat=${Version}\t${Architecture}\t${source:Package}\t${source:Version}", deb).Output()
		if err != nil {
			return nil, fmt.Errorf("read %s: %w", deb, err)
		}
		about := strings.Split(string(out), "\t")
		sum := sha256.Sum256(content)
		copyright, err := copyrightOf(ctx, deb, fields[0])
		if err != nil {
			return nil, err
		}
		parts = append(parts, component{
			kind: "deb", name: fields[0], version: about[0],
			purl:   debianURL(fields[0], about[0], about[1], release),
			sha256: hex.EncodeToString(sum[:]),
			users:  strings.Split(fields[3], ","),
			texts:  []text{{name: "copyright", content: copyright}},
			note:   "source: Debian source package " + about[2] + " " + about[3],
		})
	}
	return parts, lines.Err()
}

// debianSources lists the source packages that programs are built from. Version and hash are those of the .dsc that was used.
func debianSources(ctx context.Context, lock, directory string) ([]component, error) {
	file, err := os.Open(lock)
	if err != nil {
		return nil, fmt.Errorf("read the lock of Debian sources: %w", err)
	}
	defer file.Close()
	var parts []component
	lines := bufio.NewScanner(file)
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) != 6 || fields[0] == "#" {
			continue
		}
		name, release, license, users := fields[0], fields[1], fields[4], fields[5]
		dsc, err := os.ReadFile(filepath.Join(directory, name, "source.dsc"))
		if err != nil {
			return nil, fmt.Errorf("read a Debian source package: %w", err)
		}
		version := dscVersion.FindSubmatch(dsc)
		if version == nil {
			return nil, fmt.Errorf("the .dsc of %s has no version", name)
		}
		sum := sha256.Sum256(dsc)
		copyright, err := sourceCopyright(ctx, filepath.Join(directory, name))
		if err != nil {
			return nil, err
		}
		parts = append(parts, component{
			kind: "deb", name: name, version: string(version[1]),
			purl:     debianURL(name, string(version[1]), "source", release),
			sha256:   hex.EncodeToString(sum[:]),
			users:    strings.Split(users, ","),
			licenses: []string{license},
			texts:    []text{{name: "copyright", content: copyright}},
			note:     "built from the Debian source package " + name + " " + string(version[1]) + "; the hash is that of its .dsc",
		})
	}
	return parts, lines.Err()
}

var dscVersion = regexp.MustCompile(`(?m)^Version: (\S+)$`)

// sourceCopyright reads debian/copyright out of a source package (format 3.0).
func sourceCopyright(ctx context.Context, directory string) (string, error) {
	archives, err := filepath.Glob(filepath.Join(directory, "*.debian.tar.*"))
	if err != nil || len(archives) != 1 {
		return "", fmt.Errorf("%s has %d archives of Debian's files, not one", directory, len(archives))
	}
	var complaint bytes.Buffer
	command := exec.CommandContext(ctx, "tar", "--extract", "--to-stdout", "--file", archives[0], "debian/copyright")
	command.Stderr = &complaint
	content, err := command.Output()
	if err != nil {
		return "", fmt.Errorf("read the licence in %s: %w: %s", archives[0], err, complaint.String())
	}
	return string(content), nil
}

// linkedLibraries are Debian's static libraries inside our C and cgo programs.
func linkedLibraries(ctx context.Context) ([]component, error) {
	var parts []component
	for _, library := range []struct {
		name  string
		users []string
	}{
		{"libc6-dev", []string{"polymesh", "runc"}},
		{"libseccomp-dev", []string{"runc"}},
		{"musl-dev", []string{"pause", "curl", "nft", "iptables"}},
	} {
		out, err := exec.CommandContext(ctx, "dpkg-query", "--show", "--showformat=${Version}\t${Architecture}\t${source:Package}\t${source:Version}", library.name).Output()
		if err != nil {
			return nil, fmt.Errorf("ask dpkg for the version of %s: %w", library.name, err)
		}
		about := strings.Split(string(out), "\t")
		content, err := os.ReadFile(filepath.Join("/usr/share/doc", library.name, "copyright"))
		if err != nil {
			return nil, fmt.Errorf("read the licence of %s: %w", library.name, err)
		}
		parts = append(parts, component{
			kind: "deb", name: library.name, version: about[0], purl: debianURL(library.name, about[0], about[1], "bookworm"), users: library.users,
			texts: []text{{name: "copyright", content: string(content)}},
			note:  "statically linked; source: Debian source package " + about[2] + " " + about[3],
		})
	}
	return parts, nil
}

// debianURL writes the distribution as scanners do, with its number.
func debianURL(name, version, architecture, release string) string {
	distro := map[string]string{"bookworm": "debian-12", "trixie": "debian-13"}[release]
	if distro == "" {
		distro = release
	}
	return "pkg:deb/debian/" + url.QueryEscape(name) + "@" + url.QueryEscape(version) + "?arch=" + architecture + "&distro=" + distro
}

// copyrightOf reads the package's copyright file; a link leads to that of another package of the same source, which
// is in the lock too.
func copyrightOf(ctx context.Context, deb, name string) (string, error) {
	want := "./usr/share/doc/" + name + "/copyright"
	content, err := fileIn(ctx, deb, want)
	if errors.Is(err, os.ErrNotExist) {
		return "", fmt.Errorf("%s has no copyright file", deb)
	}
	return content, err
}

func fileIn(ctx context.Context, deb, name string) (string, error) {
	var complaint bytes.Buffer
	command := exec.CommandContext(ctx, "dpkg-deb", "--fsys-tarfile", deb)
	command.Stderr = &complaint
	content, err := command.Output()
	if err != nil {
		return "", fmt.Errorf("read %s: %w: %s", deb, err, complaint.String())
	}
	reader := tar.NewReader(bytes.NewReader(content))
	for {
		header, err := reader.Next()
		if errors.Is(err, io.EOF) {
			return "", fmt.Errorf("find %s in %s: %w", name, deb, os.ErrNotExist)
		}
		if err != nil {
			return "", fmt.Errorf("read %s: %w", deb, err)
		}
		if header.Name == name && header.Typeflag == tar.TypeReg {
			data, err := io.ReadAll(reader)
			return string(data), err
		}
	}
}
