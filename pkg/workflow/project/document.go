package project

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	sigsyaml "sigs.k8s.io/yaml"
)

// document is one document of a manifest and its position. It only provides line numbers: the objects themselves are read by
// Kubernetes' decoder, which has none.
type document struct {
	file string
	// line is the number of lines before the document's first line.
	line int
	text []byte
	// node is the document's tree; nil if it has none.
	node *yaml.Node
}

// chunk is the text of a document, and the number of lines before it.
type chunk struct {
	text []byte
	line int
}

// frame splits a manifest into documents as Kubernetes' decoder does (utilyaml.YAMLOrJSONDecoder): JSON values one after
// another as far as the text is JSON, and from there YAML documents, separated by lines that begin with "---".
func frame(text []byte) []chunk {
	var chunks []chunk
	rest, line := text, 0
	if _, _, mightBeJSON := utilyaml.GuessJSONStream(bytes.NewReader(text), 4096); mightBeJSON {
		decoder := json.NewDecoder(bytes.NewReader(text))
		for {
			from := decoder.InputOffset()
			var value json.RawMessage
			if err := decoder.Decode(&value); err != nil {
				rest = text[from:]
				break
			}
			// Leading white space does not belong to the value.
			begin := decoder.InputOffset() - int64(len(value))
			chunks = append(chunks, chunk{value, bytes.Count(text[:begin], []byte("\n"))})
		}
		if len(bytes.TrimSpace(rest)) == 0 {
			return chunks
		}
		line = bytes.Count(text[:len(text)-len(rest)], []byte("\n"))
		// The decoder drops the rest of the line after the last value.
		if i := bytes.IndexByte(rest, '\n'); len(chunks) > 0 && i >= 0 && len(bytes.TrimSpace(rest[:i])) == 0 {
			rest, line = rest[i+1:], line+1
		}
	}
	var now []byte
	from := line
	scanner := bufio.NewReader(bytes.NewReader(rest))
	for {
		text, err := scanner.ReadBytes('\n')
		// A separator before any text belongs to the document that it begins.
		if bytes.HasPrefix(text, []byte("---")) && len(now) > 0 {
			chunks = append(chunks, chunk{now, from})
			now, from = nil, line+1
			text = nil
		}
		now = append(now, text...)
		line++
		if err != nil {
			if len(now) > 0 {
				chunks = append(chunks, chunk{now, from})
			}
			return chunks
		}
	}
}

func newDocument(file string, c chunk) document {
	d := document{file: file, line: c.line, text: c.text}
	var root yaml.Node
	if err := yaml.Unmarshal(c.text, &root); err == nil && len(root.Content) > 0 {
		d.node = root.Content[0]
	}
	return d
}

// at returns "file:line" of a node, or of the document.
func (d document) at(node *yaml.Node) string {
	if node == nil {
		return fmt.Sprintf("%s:%d", d.file, d.line+1)
	}
	return fmt.Sprintf("%s:%d", d.file, d.line+node.Line)
}

var lineInError = regexp.MustCompile(`line (\d+)`)

// fromParser matches errors of the YAML library's parser, which counts lines from 0; its scanner counts from 1
// (go.yaml.in/yaml/v2, parser.fail).
var fromParser = regexp.MustCompile(`did not find expected (key|node content|<|',' or|'-' indicator|the )`)

// explain converts the line in a decoder error, which is relative to the document, to a line of the file.
func (d document) explain(err error, file []byte) error {
	message := err.Error()
	var asJSON utilyaml.JSONSyntaxError
	if errors.As(err, &asJSON) {
		// The document begins with a brace, so the decoder tried JSON first. JSON is valid YAML, and the YAML parser's error is more helpful.
		if _, yamlErr := sigsyaml.YAMLToJSON(d.text); yamlErr != nil {
			message = yamlErr.Error()
		} else {
			line := 1 + bytes.Count(file[:min(int(asJSON.Offset), len(file))], []byte("\n"))
			return fmt.Errorf("%s:%d: not valid JSON: %w", d.file, line, asJSON.Err)
		}
	}
	message = strings.TrimPrefix(message, "error converting YAML to JSON: ")
	at := fmt.Sprintf("%s:%d", d.file, d.line+1)
	parser := fromParser.MatchString(message)
	message = lineInError.ReplaceAllStringFunc(message, func(message string) string {
		n, convErr := strconv.Atoi(message[len("line "):])
		if convErr != nil {
			return message
		}
		if parser {
			n++
		}
		at = fmt.Sprintf("%s:%d", d.file, d.line+n)
		return fmt.Sprintf("line %d", d.line+n)
	})
	return fmt.Errorf("%s: not valid YAML: %s", at, strings.TrimPrefix(message, "yaml: "))
}

// duplicates rejects a key that occurs twice in one map. An override of a merged key (<<) is not a duplicate.
func (d document) duplicates() error {
	if d.node != nil {
		return d.duplicatesIn(d.node)
	}
	// Without a tree, use Kubernetes' strict reader, which also reports overrides of merged keys.
	if _, err := sigsyaml.YAMLToJSONStrict(d.text); err != nil && !bytes.Contains(d.text, []byte("<<")) {
		return d.explain(err, d.text)
	}
	return nil
}

func (d document) duplicatesIn(node *yaml.Node) error {
	if node.Kind == yaml.MappingNode {
		seen := map[string]*yaml.Node{}
		for i := 0; i+1 < len(node.Content); i += 2 {
			key := resolved(node.Content[i])
			if key == nil || key.Kind != yaml.ScalarNode || isMerge(key) {
				continue
			}
			name := keyText(key)
			if first := seen[name]; first != nil {
				return fmt.Errorf("%s: the key %q is already at line %d: remove one of them", d.at(node.Content[i]), name, d.line+first.Line)
			}
			seen[name] = node.Content[i]
		}
	}
	for _, content := range node.Content { // an alias has none: its anchor is visited at its definition
		if err := d.duplicatesIn(content); err != nil {
			return err
		}
	}
	return nil
}

// keyText returns a key as the API server receives it: 0x10 and 16 are the same key.
func keyText(key *yaml.Node) string {
	if key.Style&(yaml.DoubleQuotedStyle|yaml.SingleQuotedStyle|yaml.LiteralStyle|yaml.FoldedStyle) != 0 || key.Tag == "!!str" && !yaml11Bool[key.Value] {
		return key.Value
	}
	if text, err := utilyaml.ToJSON([]byte("? " + key.Value + "\n: 0\n")); err == nil {
		var value map[string]any
		if json.Unmarshal(text, &value) == nil && len(value) == 1 {
			for name := range value {
				return name
			}
		}
	}
	return key.Value
}

// yaml11Bool are the words besides true and false that YAML 1.1, which Kubernetes uses, parses as booleans.
var yaml11Bool = map[string]bool{"yes": true, "Yes": true, "YES": true, "no": true, "No": true, "NO": true, "on": true, "On": true, "ON": true, "off": true, "Off": true, "OFF": true, "y": true, "Y": true, "n": true, "N": true}

func isMerge(key *yaml.Node) bool {
	return key.Tag == "!!merge"
}

// resolved returns the node that an alias refers to.
func resolved(node *yaml.Node) *yaml.Node {
	for depth := 0; node != nil && node.Kind == yaml.AliasNode && depth < 100; depth++ {
		node = node.Alias
	}
	return node
}

// deepest limits how far nested merges are followed; the decoder has already rejected cycles.
const deepest = 100

// entry finds a field of a map, including merged ones, or an item of a list by its index. key is its position.
func entry(node *yaml.Node, name string) (key, value *yaml.Node) {
	return entryBelow(node, name, 0)
}

func entryBelow(node *yaml.Node, name string, depth int) (key, value *yaml.Node) {
	if node = resolved(node); node == nil || depth > deepest {
		return nil, nil
	}
	switch node.Kind {
	case yaml.SequenceNode:
		if i, err := strconv.Atoi(name); err == nil && i >= 0 && i < len(node.Content) {
			return node.Content[i], node.Content[i]
		}
	case yaml.MappingNode:
		var merged []*yaml.Node
		for i := 0; i+1 < len(node.Content); i += 2 {
			at := resolved(node.Content[i])
			switch {
			case at == nil || at.Kind != yaml.ScalarNode:
			case isMerge(at):
				merged = append(merged, node.Content[i+1])
			case at.Value == name:
				return node.Content[i], node.Content[i+1]
			}
		}
		for _, from := range merged {
			if list := resolved(from); list != nil && list.Kind == yaml.SequenceNode {
				for _, one := range list.Content {
					if key, value = entryBelow(one, name, depth+1); value != nil {
						return key, value
					}
				}
				continue
			}
			if key, value = entryBelow(from, name, depth+1); value != nil {
				return key, value
			}
		}
	}
	return nil, nil
}

// child returns the value of entry.
func child(node *yaml.Node, name string) *yaml.Node {
	_, value := entry(node, name)
	return value
}
