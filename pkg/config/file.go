package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"

	"github.com/spf13/pflag"
	"go.yaml.in/yaml/v3"
)

// readFile fills the flags that are not set yet from the config file.
func (f *Flags) readFile() error {
	path := f.raw.config
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) && !f.Changed("config") {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read config file: %w", err)
	}
	settings, err := parse(text)
	if err != nil {
		return fmt.Errorf("config file %s is not valid YAML with one key for each setting: %s", path, oneLine(err))
	}
	seen := map[string]bool{}
	for _, s := range settings {
		flag := f.Lookup(s.key)
		if flag == nil || s.key == "config" {
			return fmt.Errorf("config file %s, line %d: unknown key %q; valid keys: %s", path, s.line, s.key, strings.Join(f.keys(), ", "))
		}
		// A setting can have two names.
		if seen[flag.Name] {
			return fmt.Errorf("config file %s, line %d: %s is set twice", path, s.line, flag.Name)
		}
		seen[flag.Name] = true
		if s.err != nil {
			return fmt.Errorf("config file %s, line %d: %s %w", path, s.line, s.key, s.err)
		}
		if _, list := flag.Value.(pflag.SliceValue); !list && len(s.values) != 1 {
			return fmt.Errorf("config file %s, line %d: %s takes one value, not a list of %d", path, s.line, s.key, len(s.values))
		}
		if flag.Changed {
			continue
		}
		for _, value := range s.values {
			if err := f.Set(s.key, value); err != nil {
				return fmt.Errorf("config file %s, line %d: %w", path, s.line, plain(err))
			}
		}
	}
	return nil
}

// setting is one key of the config file with its values as written.
type setting struct {
	key    string
	line   int
	values []string
	err    error
}

// parse returns the file's keys in order. Values keep their text: decoding would turn the mode 0644 into the number 420,
// and the name 1.10 into the number 1.1.
func parse(text []byte) ([]setting, error) {
	dec := yaml.NewDecoder(bytes.NewReader(text))
	var doc yaml.Node
	if err := dec.Decode(&doc); errors.Is(err, io.EOF) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	if err := dec.Decode(new(yaml.Node)); !errors.Is(err, io.EOF) {
		return nil, errors.New("there is a second document after ---")
	}
	root := doc.Content[0]
	if root.Kind == yaml.ScalarNode && root.Tag == "!!null" {
		return nil, nil
	}
	if root.Kind != yaml.MappingNode {
		return nil, fmt.Errorf("line %d: not a map of keys and values", root.Line)
	}
	var settings []setting
	for i := 0; i+1 < len(root.Content); i += 2 {
		key := root.Content[i]
		values, err := scalars(root.Content[i+1])
		settings = append(settings, setting{key.Value, key.Line, values, err})
	}
	return settings, nil
}

func scalars(n *yaml.Node) ([]string, error) {
	if n.Kind == yaml.AliasNode {
		n = n.Alias
	}
	switch {
	case n.Kind == yaml.ScalarNode && n.Tag == "!!null":
		return nil, errors.New("has no value")
	case n.Kind == yaml.ScalarNode:
		return []string{n.Value}, nil
	case n.Kind == yaml.MappingNode:
		return nil, errors.New("takes a value or a list, not a map")
	}
	values := []string{}
	for _, item := range n.Content {
		if item.Kind != yaml.ScalarNode || item.Tag == "!!null" {
			return nil, errors.New("takes a list of plain values")
		}
		values = append(values, item.Value)
	}
	return values, nil
}
