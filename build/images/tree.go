package main

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"slices"
	"strings"
	"time"
)

// tree is the contents of one layer, by clean relative path ("usr/bin/envoy").
type tree map[string]*node

type node struct {
	header  tar.Header
	content []byte
}

// put adds an entry and missing parent directories.
func (t tree) put(header tar.Header, content []byte) {
	name := clean(header.Name)
	if name == "" {
		return
	}
	if parent := path.Dir(name); parent != "." {
		if _, ok := t[parent]; !ok {
			t.put(tar.Header{Typeflag: tar.TypeDir, Name: parent, Mode: 0o755}, nil)
		}
	}
	header.Name = name
	t[name] = &node{header: header, content: content}
}

func (t tree) directory(name string, mode int64) {
	t.put(tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: mode}, nil)
}

func (t tree) text(name, content string) {
	t.put(tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644}, []byte(content))
}

func (t tree) link(name, target string) {
	t.put(tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target, Mode: 0o777}, nil)
}

// copy adds a file of the build machine.
func (t tree) copy(name, source string, mode int64) error {
	content, err := os.ReadFile(source)
	if err != nil {
		return fmt.Errorf("put /%s into an image: %w", name, err)
	}
	t.put(tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: mode}, content)
	return nil
}

// drop removes every entry for which the function returns true.
func (t tree) drop(unwanted func(name string, directory bool) bool) {
	maps.DeleteFunc(t, func(name string, n *node) bool { return unwanted(name, n.header.Typeflag == tar.TypeDir) })
}

// archive writes the tree as a tar file that depends on nothing but the tree: sorted, one time stamp, no user names.
func (t tree) archive(stamp time.Time) ([]byte, error) {
	var buffer bytes.Buffer
	writer := tar.NewWriter(&buffer)
	for _, name := range slices.Sorted(maps.Keys(t)) {
		n := t[name]
		header := tar.Header{
			Typeflag: n.header.Typeflag,
			Name:     name,
			Linkname: n.header.Linkname,
			Size:     int64(len(n.content)),
			Mode:     n.header.Mode & int64(fs.ModePerm|0o7000),
			Uid:      n.header.Uid,
			Gid:      n.header.Gid,
			ModTime:  stamp,
			Format:   tar.FormatPAX,
		}
		if header.Typeflag == tar.TypeDir {
			header.Name += "/"
		}
		if err := writer.WriteHeader(&header); err != nil {
			return nil, fmt.Errorf("write %s: %w", name, err)
		}
		if _, err := writer.Write(n.content); err != nil {
			return nil, fmt.Errorf("write %s: %w", name, err)
		}
	}
	if err := writer.Close(); err != nil {
		return nil, fmt.Errorf("end a layer: %w", err)
	}
	return buffer.Bytes(), nil
}

func clean(name string) string {
	return strings.TrimPrefix(path.Clean("/"+name), "/")
}
