package project

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
	"golang.org/x/text/encoding/unicode"
	"golang.org/x/text/transform"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	utiljson "k8s.io/apimachinery/pkg/util/json"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
)

// Object is one object of a manifest, and its position.
type Object struct {
	*unstructured.Unstructured
	// File is relative to the project's folder; empty for objects that are not from a manifest.
	File string
	// node is nil if the text has no tree; line is the number of lines before its first line in the file.
	node *yaml.Node
	line int
}

// NewObject returns an object that Polymesh adds itself.
func NewObject(content map[string]any) Object {
	return Object{Unstructured: &unstructured.Unstructured{Object: content}}
}

// ID identifies the object as kubectl does: "deployment.apps/x", followed by "-n namespace".
func (o Object) ID() string {
	return ID(o.GroupVersionKind().GroupKind(), o.GetNamespace(), o.GetName())
}

// ID names an object as kubectl does.
func ID(gk schema.GroupKind, namespace, name string) string {
	kind := strings.ToLower(gk.Kind)
	if gk.Group != "" {
		kind += "." + gk.Group
	}
	id := kind + "/" + name
	if namespace != "" {
		id += " -n " + namespace
	}
	return id
}

// At returns "file:line" of a field, such as "spec", "template", "spec", "containers", "0", "image". If the manifest does
// not have it, the position is that of its nearest existing parent. It is empty for an object without a file.
func (o Object) At(path ...string) string {
	switch {
	case o.File == "":
		return ""
	case o.node == nil:
		return fmt.Sprintf("%s:%d", o.File, o.line+1)
	}
	node, line := o.node, o.node.Line
	for _, part := range path {
		key, next := entry(node, part)
		if next == nil {
			break
		}
		node, line = next, key.Line
	}
	return fmt.Sprintf("%s:%d", o.File, o.line+line)
}

// Objects reads the manifests, and returns the namespace of the project: its own, or else that of the one Namespace in the
// manifests, or its name. Objects without a namespace get it from pkg/workflow/deploy, because only the cluster knows which kinds
// have one.
func (p *Project) Objects() (objects []Object, namespace string, err error) {
	var files []string
	err = p.WalkManifests(func(path string, folder bool) {
		if !folder {
			files = append(files, path)
		}
	})
	if err != nil {
		return nil, "", err
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			return nil, "", err
		}
		name, err := filepath.Rel(p.Dir, file)
		if err != nil {
			return nil, "", err
		}
		found, err := Decode(name, text)
		if err != nil {
			return nil, "", err
		}
		objects = append(objects, found...)
	}
	if err := Unique(objects); err != nil {
		return nil, "", err
	}
	if p.Namespace != "" {
		return objects, p.Namespace, nil
	}
	var namespaces []string
	for _, o := range objects {
		if o.GroupVersionKind().GroupKind() == (schema.GroupKind{Kind: "Namespace"}) {
			namespaces = append(namespaces, o.GetName())
		}
	}
	switch len(namespaces) {
	case 0:
		return objects, p.Name, nil
	case 1:
		return objects, namespaces[0], nil
	}
	return nil, "", fmt.Errorf("%s: the manifests have the namespaces %s: set the project's in %s (namespace:)", p.Dir, strings.Join(namespaces, ", "), File)
}

// WalkManifests visits the files that Objects reads, in order, and their folders, each before its contents. Paths are
// absolute.
func (p *Project) WalkManifests(visit func(path string, folder bool)) error {
	for _, path := range p.Manifests {
		if err := walkManifests(p.Path(path), nil, visit); err != nil {
			return err
		}
	}
	return nil
}

// walkManifests visits the YAML and JSON files at or below a path, in order of their names, like kubectl apply -R -f. Unlike
// kubectl, it also follows links to folders. above are the folders on the way here.
func walkManifests(path string, above []string, visit func(path string, folder bool)) error {
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist) && above == nil:
		return fmt.Errorf("%s does not exist: correct manifests in %s", path, File)
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%s is a broken link: correct or remove it", path)
	case err != nil:
		return fmt.Errorf("read the manifests: %w", err)
	case info.Mode().IsRegular():
		visit(path, false)
		return nil
	case !info.IsDir():
		return fmt.Errorf("%s is neither a file nor a folder (%s): remove it from the manifests", path, info.Mode().Type())
	}
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return fmt.Errorf("read the manifests: %w", err)
	}
	if slices.Contains(above, real) {
		return fmt.Errorf("%s is a link to a folder that contains it: remove it", path)
	}
	visit(path, true)
	above = append(slices.Clone(above), real)
	entries, err := os.ReadDir(path)
	if err != nil {
		return fmt.Errorf("read the manifests: %w", err)
	}
	for _, entry := range entries {
		at := filepath.Join(path, entry.Name())
		if !isManifest(at) {
			// Other files next to the manifests are ignored, including broken links.
			if info, err := os.Stat(at); err != nil || !info.IsDir() {
				continue
			}
		}
		if err := walkManifests(at, above, visit); err != nil {
			return err
		}
	}
	return nil
}

func isManifest(file string) bool {
	return slices.Contains([]string{".yaml", ".yml", ".json"}, filepath.Ext(file))
}

// Decode reads the objects of a manifest as kubectl does: with its decoder, so that every object is exactly the one that kubectl
// would send, for all features of YAML. It is stricter in one point: a duplicate key in a map is an error, where kubectl
// silently uses the last one. file is the name used in positions.
func Decode(file string, text []byte) ([]Object, error) {
	// Files from Windows may be in UTF-16; like cli-runtime's FileVisitor.
	text, _, err := transform.Bytes(unicode.BOMOverride(unicode.UTF8.NewDecoder()), text)
	if err != nil {
		return nil, fmt.Errorf("%s:1: %w", file, err)
	}
	var objects []Object
	chunks := frame(text)
	decoder := utilyaml.NewYAMLOrJSONDecoder(bytes.NewReader(text), 4096) // like cli-runtime's StreamVisitor
	for i := 0; ; i++ {
		var ext runtime.RawExtension
		err := decoder.Decode(&ext)
		if errors.Is(err, io.EOF) {
			return objects, nil
		}
		// Both readers find the same documents. If they ever differ, positions are left out rather than wrong.
		var at document
		if i < len(chunks) {
			at = newDocument(file, chunks[i])
		} else {
			at = document{file: file}
		}
		if err != nil {
			return nil, at.explain(err, text)
		}
		raw := bytes.TrimSpace(ext.Raw)
		if len(raw) == 0 || bytes.Equal(raw, []byte("null")) {
			continue
		}
		if err := at.duplicates(); err != nil {
			return nil, err
		}
		found, err := at.objects(raw)
		if err != nil {
			return nil, err
		}
		objects = append(objects, found...)
	}
}

// objects returns the objects of one document: the object itself, or the items of a list, flattened as in kubectl.
func (d document) objects(raw []byte) ([]Object, error) {
	decoded, _, err := unstructured.UnstructuredJSONScheme.Decode(raw, nil, nil)
	if err != nil {
		return nil, notAnObject(d.at(d.node))
	}
	return d.flatten(decoded, d.node)
}

func notAnObject(at string) error {
	return fmt.Errorf("%s: not a Kubernetes object: it needs apiVersion, kind and metadata (is a line with --- missing before it?)", at)
}

func (d document) flatten(decoded runtime.Object, node *yaml.Node) ([]Object, error) {
	at := d.at(node)
	if meta.IsListType(decoded) {
		items, err := meta.ExtractList(decoded)
		if err != nil {
			return nil, fmt.Errorf("%s: items: %w", at, err)
		}
		var objects []Object
		list := child(node, "items")
		for i, item := range items {
			of := child(list, strconv.Itoa(i))
			if of == nil {
				of = node
			}
			found, err := d.flatten(item, of)
			if err != nil {
				return nil, err
			}
			objects = append(objects, found...)
		}
		return objects, nil
	}
	u, ok := decoded.(*unstructured.Unstructured)
	if !ok || u.GetKind() == "" || u.GetAPIVersion() == "" {
		return nil, notAnObject(at)
	}
	o := Object{Unstructured: u, File: d.file, node: node, line: d.line}
	if err := o.checkMetadata(); err != nil {
		return nil, err
	}
	if u.GetName() == "" {
		return nil, fmt.Errorf("%s: %s has no metadata.name", at, u.GetKind())
	}
	return []Object{o}, nil
}

// checkMetadata rejects metadata of the wrong types, like cli-runtime's decoder.
func (o Object) checkMetadata() error {
	text, err := o.MarshalJSON()
	if err != nil {
		return fmt.Errorf("%s: %w", o.At(), err)
	}
	var typed struct {
		Metadata metav1.ObjectMeta `json:"metadata"`
	}
	err = utiljson.Unmarshal(text, &typed)
	var wrong *json.UnmarshalTypeError
	if !errors.As(err, &wrong) {
		if err != nil {
			return fmt.Errorf("%s: metadata: %w", o.At("metadata"), err)
		}
		return nil
	}
	path := strings.Split(wrong.Field, ".")
	// For a map, the error names the field but not the key.
	if fields, found, err := unstructured.NestedMap(o.Object, path...); found && err == nil {
		for _, key := range slices.Sorted(maps.Keys(fields)) {
			if _, ok := fields[key].(string); !ok && wrong.Type.Kind() == reflect.String {
				path = append(path, key)
				break
			}
		}
	}
	advice := ""
	if wrong.Type.Kind() == reflect.String {
		advice = " (write it in quotes)"
	}
	return fmt.Errorf("%s: %s: expected %s, got %s%s", o.At(path...), strings.Join(path, "."), wrong.Type, wrong.Value, advice)
}

// Unique rejects two objects with the same ID, because the second would silently replace the first. It is called again when
// every object has its namespace.
func Unique(objects []Object) error {
	seen := map[string]Object{}
	for _, o := range objects {
		if first, ok := seen[o.ID()]; ok {
			return fmt.Errorf("%s: %s is already at %s: rename or remove one of them", o.At(), o.ID(), first.At())
		}
		seen[o.ID()] = o
	}
	return nil
}
