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

// Object is one object of a manifest, and where it stands.
type Object struct {
	*unstructured.Unstructured
	// File is relative to the project's folder; empty for what no manifest holds.
	File string
	// node is nil where the text has no tree; line is what comes before its first line in the file.
	node *yaml.Node
	line int
}

// NewObject is an object that Polymesh adds by itself.
func NewObject(content map[string]any) Object {
	return Object{Unstructured: &unstructured.Unstructured{Object: content}}
}

// ID names the object as kubectl does: "deployment.apps/x", with "-n namespace" behind it.
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

// At is "file:line" of a field, such as "spec", "template", "spec", "containers", "0", "image". Where the manifest does
// not have it, it is that of the last part which it has. It is empty for an object without a file.
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
	return nil, "", fmt.Errorf("%s: the manifests have the namespaces %s: say in %s which one is the project's (namespace:)", p.Dir, strings.Join(namespaces, ", "), File)
}

// WalkManifests visits the files that Objects reads, in their order, and the folders that they are in, each before what is in
// it. Paths are absolute.
func (p *Project) WalkManifests(visit func(path string, folder bool)) error {
	for _, path := range p.Manifests {
		if err := walkManifests(p.Path(path), nil, visit); err != nil {
			return err
		}
	}
	return nil
}

// walkManifests visits the YAML and JSON files at or below a path, in the order of their names, as kubectl apply -R -f; links
// to folders are followed, too, which kubectl silently skips. above are the folders that led here.
func walkManifests(path string, above []string, visit func(path string, folder bool)) error {
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist) && above == nil:
		return fmt.Errorf("%s does not exist: correct manifests in %s", path, File)
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%s is a link to what does not exist: correct or remove it", path)
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
		return fmt.Errorf("%s is a link to a folder that it is in: remove it", path)
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
			// Whatever else lies beside the manifests is not theirs, also a link that leads nowhere.
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

// Decode reads the objects of a manifest as kubectl does: with its decoder, so that an object is the one which kubectl
// would send, for every feature of YAML. One thing is stricter: a key that stands twice in one map is refused, where kubectl
// silently takes the last one. file is the name under which the objects stand.
func Decode(file string, text []byte) ([]Object, error) {
	// A file of Windows may be in UTF-16; as cli-runtime's FileVisitor.
	text, _, err := transform.Bytes(unicode.BOMOverride(unicode.UTF8.NewDecoder()), text)
	if err != nil {
		return nil, fmt.Errorf("%s:1: %w", file, err)
	}
	var objects []Object
	chunks := frame(text)
	decoder := utilyaml.NewYAMLOrJSONDecoder(bytes.NewReader(text), 4096) // as cli-runtime's StreamVisitor
	for i := 0; ; i++ {
		var ext runtime.RawExtension
		err := decoder.Decode(&ext)
		if errors.Is(err, io.EOF) {
			return objects, nil
		}
		// Both readers count the same documents; if they did not, lines would be left out rather than wrong.
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

// objects are those of one document: itself, or the items of a list, as kubectl flattens them.
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

// checkMetadata refuses metadata that does not fit its types, as cli-runtime's decoder does.
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
	// A map's field is named, and not which of its keys.
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

// Unique refuses two objects of one name: the second would silently replace the first. It is asked again when every object
// has its namespace.
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
