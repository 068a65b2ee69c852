package scaffold

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"

	"polymesh.dev/polymesh/pkg/workflow/project"
)

// describe adds a new service to polymesh.yaml if that lists services; without a list, deploy finds the folder. If it lists
// manifests, the service's must be among them.
func (p *Plan) describe(name string) error {
	text, err := os.ReadFile(filepath.Join(p.Dir, project.File))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var d struct{ Services, Manifests yaml.Node }
	if err := yaml.Unmarshal(text, &d); err != nil {
		return fmt.Errorf("%s: %w", project.File, err)
	}
	for _, f := range p.Files {
		if !strings.HasPrefix(f.Path, "services/") && !listed(d.Manifests, f.Path) {
			return fmt.Errorf("%s:%d: %s would not be deployed: add the folder %s to manifests", project.File, d.Manifests.Line, f.Path, f.Path[:strings.IndexByte(f.Path, '/')])
		}
	}
	changed, err := addTo(d.Services, text, name)
	if err != nil || changed == nil {
		return err
	}
	p.Files = append(p.Files, File{Path: project.File, text: changed, changes: true})
	return nil
}

// listed reports whether a list of files and folders covers a file. A missing list covers all.
func listed(list yaml.Node, file string) bool {
	return list.Kind != yaml.SequenceNode || slices.ContainsFunc(list.Content, func(item *yaml.Node) bool {
		rest, err := filepath.Rel(item.Value, filepath.FromSlash(file))
		return err == nil && filepath.IsLocal(rest)
	})
}

// addTo returns polymesh.yaml with one more service in its list, or nil if there is no list or it has the service. All other
// lines are unchanged.
func addTo(services yaml.Node, text []byte, name string) ([]byte, error) {
	if services.Kind != yaml.SequenceNode {
		return nil, nil
	}
	for _, item := range services.Content {
		var s struct{ Name string }
		if err := item.Decode(&s); err == nil && s.Name == name {
			return nil, nil
		}
	}
	if services.Style&yaml.FlowStyle != 0 {
		return nil, fmt.Errorf("%s:%d: services is written in brackets: write one item per line (- name: …), or remove the list", project.File, services.Line)
	}
	last := lastLine(&services)
	lines := bytes.SplitAfter(text, []byte("\n"))
	if !bytes.HasSuffix(lines[last-1], []byte("\n")) {
		lines[last-1] = append(bytes.Clone(lines[last-1]), '\n')
	}
	added := fmt.Sprintf("%s- name: %s\n", strings.Repeat(" ", services.Column-1), name)
	return bytes.Join(slices.Insert(lines, last, []byte(added)), nil), nil
}

// lastLine returns the line of the last value below a node.
func lastLine(node *yaml.Node) int {
	line := node.Line
	if node.Style&(yaml.LiteralStyle|yaml.FoldedStyle) != 0 {
		line += strings.Count(strings.TrimSuffix(node.Value, "\n"), "\n") + 1
	}
	for _, child := range node.Content {
		line = max(line, lastLine(child))
	}
	return line
}
