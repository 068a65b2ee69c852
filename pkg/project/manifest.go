package project

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	sigsyaml "sigs.k8s.io/yaml"
)

// Object is one object of a manifest, and where it stands.
type Object struct {
	*unstructured.Unstructured
	// File is relative to the project's folder; empty for what no manifest holds.
	File string
	node *yaml.Node
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
	if o.node == nil {
		return o.File
	}
	node, line := o.node, o.node.Line
	for _, part := range path {
		var next *yaml.Node
		switch node.Kind {
		case yaml.MappingNode:
			for i := 0; i+1 < len(node.Content); i += 2 {
				if node.Content[i].Value == part {
					line, next = node.Content[i].Line, node.Content[i+1]
				}
			}
		case yaml.SequenceNode:
			if i, err := strconv.Atoi(part); err == nil && i >= 0 && i < len(node.Content) {
				next = node.Content[i]
				line = next.Line
			}
		}
		if next == nil {
			break
		}
		node = next
		if node.Kind == yaml.AliasNode {
			node = node.Alias
		}
	}
	return fmt.Sprintf("%s:%d", o.File, line)
}

// Objects reads the manifests. Objects without a namespace get the project's, except those of kinds that have none, which
// only the cluster knows: pkg/deploy does that. The namespace of the project is set here if nothing else said it.
func (p *Project) Objects() ([]Object, error) {
	var objects []Object
	for _, path := range p.Manifests {
		files, err := manifestFiles(filepath.Join(p.Dir, path))
		if err != nil {
			return nil, err
		}
		for _, file := range files {
			text, err := os.ReadFile(file)
			if err != nil {
				return nil, err
			}
			name, err := filepath.Rel(p.Dir, file)
			if err != nil {
				return nil, err
			}
			found, err := Decode(name, text)
			if err != nil {
				return nil, err
			}
			objects = append(objects, found...)
		}
	}
	if err := unique(objects); err != nil {
		return nil, err
	}
	if p.Namespace == "" {
		p.Namespace = p.Name
		var namespaces []string
		for _, o := range objects {
			if o.GroupVersionKind().GroupKind() == (schema.GroupKind{Kind: "Namespace"}) {
				namespaces = append(namespaces, o.GetName())
			}
		}
		if len(namespaces) > 1 {
			return nil, fmt.Errorf("%s: the manifests have the namespaces %s: say in %s which one is the project's (namespace:)", p.Dir, strings.Join(namespaces, ", "), File)
		}
		if len(namespaces) == 1 {
			p.Namespace = namespaces[0]
		}
	}
	return objects, nil
}

// manifestFiles are the YAML and JSON files at or below a path, in the order of their names, as kubectl apply -R -f.
func manifestFiles(path string) ([]string, error) {
	var files []string
	err := filepath.WalkDir(path, func(file string, entry fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case entry.IsDir():
			return nil
		case file == path, slices.Contains([]string{".yaml", ".yml", ".json"}, filepath.Ext(file)):
			files = append(files, file)
		}
		return nil
	})
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%s does not exist: correct manifests in %s", path, File)
	}
	return files, err
}

// Decode reads the objects of a manifest. file is the name under which they stand.
func Decode(file string, text []byte) ([]Object, error) {
	var objects []Object
	decoder := yaml.NewDecoder(bytes.NewReader(text))
	for {
		var doc yaml.Node
		err := decoder.Decode(&doc)
		if errors.Is(err, io.EOF) {
			return objects, nil
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		if len(doc.Content) == 0 || doc.Content[0].Tag == "!!null" {
			continue
		}
		found, err := toObjects(file, doc.Content[0])
		if err != nil {
			return nil, err
		}
		objects = append(objects, found...)
	}
}

func toObjects(file string, node *yaml.Node) ([]Object, error) {
	at := fmt.Sprintf("%s:%d", file, node.Line)
	text, err := yaml.Marshal(node)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", at, err)
	}
	// Kubernetes' own reader: what it takes for a number or a truth value is what the API server would get from kubectl.
	var content map[string]any
	json, err := sigsyaml.YAMLToJSONStrict(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", at, err)
	}
	if err := sigsyaml.Unmarshal(json, &content); err != nil || content["kind"] == nil || content["apiVersion"] == nil {
		return nil, fmt.Errorf("%s: not a Kubernetes object: it needs apiVersion, kind and metadata (is a line with --- missing before it?)", at)
	}
	if content["kind"] == "List" {
		var objects []Object
		for i := 0; i+1 < len(node.Content); i += 2 {
			if node.Content[i].Value != "items" {
				continue
			}
			for _, item := range node.Content[i+1].Content {
				found, err := toObjects(file, item)
				if err != nil {
					return nil, err
				}
				objects = append(objects, found...)
			}
		}
		return objects, nil
	}
	u := &unstructured.Unstructured{}
	if err := u.UnmarshalJSON(json); err != nil {
		return nil, fmt.Errorf("%s: %w", at, err)
	}
	if u.GetName() == "" {
		return nil, fmt.Errorf("%s: %s has no metadata.name", at, u.GetKind())
	}
	return []Object{{Unstructured: u, File: file, node: node}}, nil
}

// unique refuses two objects of one name: the second would silently replace the first.
func unique(objects []Object) error {
	seen := map[string]Object{}
	for _, o := range objects {
		if first, ok := seen[o.ID()]; ok {
			return fmt.Errorf("%s: %s is already at %s: rename or remove one of them", o.At(), o.ID(), first.At())
		}
		seen[o.ID()] = o
	}
	return nil
}
