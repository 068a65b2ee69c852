package project

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
	"k8s.io/cli-runtime/pkg/resource"
)

// kubectl reads a manifest with kubectl's own reader, as far as that works without a cluster.
func kubectl(t *testing.T, text string) ([]string, error) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "a.yaml")
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	infos, err := resource.NewLocalBuilder().Unstructured().
		FilenameParam(false, &resource.FilenameOptions{Filenames: []string{file}}).Flatten().Do().Infos()
	var objects []string
	for _, info := range infos {
		objects = append(objects, asJSON(t, info.Object))
	}
	slices.Sort(objects)
	return objects, err
}

func asJSON(t *testing.T, value any) string {
	t.Helper()
	text, err := json.Marshal(value)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func ours(t *testing.T, text string) ([]string, []Object, error) {
	t.Helper()
	found, err := Decode("a.yaml", []byte(text))
	var objects []string
	for _, o := range found {
		objects = append(objects, asJSON(t, o))
	}
	slices.Sort(objects)
	return objects, found, err
}

// manifests are features of YAML and of kubectl's reader, one by one. Both readers must accept or reject each.
var manifests = map[string]string{
	"merge key with an override": `apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  template:
    spec:
      containers:
      - &box
        name: web
        image: case/web:1.0.0
        resources: {requests: {cpu: 10m, memory: 16Mi}}
      initContainers:
      - <<: *box
        name: before
        args: [say, hello]
`,
	"override before the merge": "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\nx: &x {a: one, b: two}\ndata:\n  a: three\n  <<: *x\n",
	"list of merges":            "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\nx: &x {a: one}\ny: &y {a: two, b: two}\ndata:\n  <<: [*x, *y]\n  c: three\n",
	"merge of a merge":          "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\nx: &x {a: one, b: one}\ny: &y {<<: *x, a: two}\ndata: {<<: *y, b: three}\n",
	"anchor over items of a list": `apiVersion: v1
kind: List
items:
- apiVersion: v1
  kind: ConfigMap
  metadata: {name: one, labels: &labels {team: shop, tier: web}}
- apiVersion: v1
  kind: ConfigMap
  metadata: {name: two, labels: *labels}
`,
	"items that are an alias":     "apiVersion: v1\nkind: List\nx: &items\n- {apiVersion: v1, kind: ConfigMap, metadata: {name: a}}\nitems: *items\n",
	"list of lists":               "apiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  kind: List\n  items:\n  - {apiVersion: v1, kind: ConfigMap, metadata: {name: a}}\n- {apiVersion: v1, kind: ConfigMap, metadata: {name: b}}\n",
	"typed list":                  "apiVersion: v1\nkind: ConfigMapList\nitems:\n- metadata: {name: a}\n- metadata: {name: b}\n  data: {x: y}\n",
	"empty list":                  "apiVersion: v1\nkind: List\nitems: []\n",
	"list without items":          "apiVersion: v1\nkind: List\nmetadata: {name: a}\n",
	"several documents":           "---\n# only this\n--- # one\napiVersion: v1\nkind: ConfigMap\nmetadata: {name: one}\n---\r\napiVersion: v1\r\nkind: ConfigMap\r\nmetadata: {name: two}\r\n--- \t\napiVersion: v1\nkind: ConfigMap\nmetadata: {name: three}\n...\n",
	"text behind the separator":   "--- {a: b}\n",
	"separator in a block scalar": "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\ndata:\n  x: |\n    a\n    ---\n    b\n",
	"directive":                   "%YAML 1.1\n---\napiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\n",
	"byte order mark":             "\ufeffapiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\n",
	"truth values of YAML 1.1":    "apiVersion: v1\nkind: X\nmetadata: {name: a}\ndata: {a: yes, b: no, c: on, d: Off, e: y, f: N, g: 'yes', h: \"no\", yes: 1, off: 2}\n",
	"numbers":                     "apiVersion: v1\nkind: X\nmetadata: {name: a}\nn: [0777, 0o777, 0x1F, 0b11, 1e3, 1.10, 1_000, +1, -0, 12345678901234567890, 123456789012345678901234567890, 9007199254740993, 1.5e400, 1:30, 01, 08, 1., .5]\n",
	"not a number":                "apiVersion: v1\nkind: X\nmetadata: {name: a}\nn: .nan\n",
	"dates and nulls":             "apiVersion: v1\nkind: X\nmetadata: {name: a}\nn: [2021-01-02, 2021-01-02T03:04:05Z, ~, null, Null, '', , ]\n",
	"keys that are no text":       "apiVersion: v1\nkind: X\nmetadata: {name: a}\ndata: {1: a, 1.5: b, true: c, 0x10: d, 010: e}\n",
	"null as a key":               "apiVersion: v1\nkind: X\nmetadata: {name: a}\ndata: {~: a}\n",
	"explicit keys":               "apiVersion: v1\nkind: X\nmetadata: {name: &n two, annotations: {\"a/b\": *n}}\ndata: {\"1.0\": x, ? complex : y}\n",
	"a map as a key":              "apiVersion: v1\nkind: X\nmetadata: {name: a}\ndata: {? {a: b} : y}\n",
	"tags":                        "apiVersion: v1\nkind: X\nmetadata: {name: a}\ndata: {a: !!str 5, b: !!int \"5\", c: !!float 5, d: !!bool \"true\", e: !custom x, f: !!null x}\n",
	"binary":                      "apiVersion: v1\nkind: X\nmetadata: {name: a}\ndata: {a: !!binary aGVsbG8=}\n",
	"set and ordered map":         "apiVersion: v1\nkind: X\nmetadata: {name: a}\ndata: {a: !!set {x, y}, b: !!omap [x: 1]}\n",
	"block scalars":               "apiVersion: v1\nkind: X\nmetadata: {name: a}\ndata:\n  a: |\n    x\n\n    y\n\n  b: >-\n    x\n    y\n\n    z\n  c: |+\n    x\n\n  d: |2\n      x\n  e: >\n    x\n      y\n",
	"quotes":                      "apiVersion: v1\nkind: X\nmetadata: {name: a}\ndata: {a: \"\\u00e9\\n\\x41\", b: 'it''s', c: \"a\n  b\"}\n",
	"tab":                         "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\ndata:\n\ttab: x\n",
	"anchor that is not there":    "apiVersion: v1\nkind: X\nmetadata: {name: a}\ndata: *x\n",
	"anchor that contains itself": "apiVersion: v1\nkind: X\nmetadata: {name: a}\ndata: &x {a: *x}\n",
	"anchor of another document":  "apiVersion: v1\nkind: X\nmetadata: {name: &x a}\n---\napiVersion: v1\nkind: X\nmetadata: {name: *x}\n",
	"JSON":                        "{\"apiVersion\":\"v1\",\"kind\":\"X\",\"metadata\":{\"name\":\"a\"},\"n\":[1.0,1e2,12345678901234567890]}",
	"JSON values in a row":        "{\"apiVersion\":\"v1\",\"kind\":\"X\",\"metadata\":{\"name\":\"a\"}}\n\n{\"apiVersion\":\"v1\",\"kind\":\"X\",\"metadata\":{\"name\":\"b\"}} {\"apiVersion\":\"v1\",\"kind\":\"X\",\"metadata\":{\"name\":\"c\"}}\n",
	"JSON, then YAML":             "{\"apiVersion\":\"v1\",\"kind\":\"X\",\"metadata\":{\"name\":\"a\"}}\n---\napiVersion: v1\nkind: X\nmetadata: {name: b}\n",
	"JSON with separators":        "{\"apiVersion\":\"v1\",\"kind\":\"X\",\"metadata\":{\"name\":\"a\"}}\n---\n{\"apiVersion\":\"v1\",\"kind\":\"X\",\"metadata\":{\"name\":\"b\"}}\n",
	"JSON with an error":          "{\"apiVersion\":\"v1\",\n\"kind\":,}",
	"flow style":                  "{apiVersion: v1, kind: X, metadata: {name: a}}\n",
	"flow style with an error":    "{apiVersion: v1, kind: X, metadata: {name: a}\n",
	"nothing":                     "",
	"comments":                    "# a\n---\n# b\n",
	"bytes that are no text":      "apiVersion: v1\nkind: X\nmetadata: {name: a}\ndata: \xff\xfe\n",
	"UTF-16":                      "\xff\xfea\x00p\x00i\x00V\x00e\x00r\x00s\x00i\x00o\x00n\x00:\x00 \x00v\x001\x00\n\x00k\x00i\x00n\x00d\x00:\x00 \x00X\x00\n\x00m\x00e\x00t\x00a\x00d\x00a\x00t\x00a\x00:\x00 \x00{\x00n\x00a\x00m\x00e\x00:\x00 \x00a\x00}\x00\n\x00",
	"comment behind an anchor":    "apiVersion: v1\nkind: X\nmetadata: {name: a}\ndata: &x # why\n  - a\nmore: !!map # why\n  a: *x\n",
	"excessive aliases":           "apiVersion: v1\nkind: X\nmetadata: {name: a}\n" + laughs(9),
	"a value that is no map":      "- a\n- b\n",
	"a word":                      "hello\n",
	"name that is a number":       "apiVersion: v1\nkind: X\nmetadata: {name: 5}\n",
	"labels with a truth value":   "apiVersion: v1\nkind: X\nmetadata: {name: a, labels: {x: true}}\n",
}

func laughs(depth int) string {
	text := "l0: &l0 [x, x, x, x, x, x, x, x, x]\n"
	for i := 1; i <= depth; i++ {
		text += fmt.Sprintf("l%d: &l%d [%s*l%d]\n", i, i, strings.Repeat(fmt.Sprintf("*l%d, ", i-1), 8), i-1)
	}
	return text
}

// TestDecodeAsKubectl compares with kubectl's reader: both return the same objects, or an error.
func TestDecodeAsKubectl(t *testing.T) {
	for name, text := range manifests {
		t.Run(name, func(t *testing.T) { compare(t, text, false) })
	}
}

// stricter are errors that kubectl or the API server reports only at a later step.
var stricter = []string{"has no metadata.name", "not a Kubernetes object"}

// compare fails if the two readers differ. twice is set if a key is duplicated, which only our reader rejects.
func compare(t *testing.T, text string, twice bool) {
	t.Helper()
	want, wantErr := kubectl(t, text)
	got, objects, err := ours(t, text)
	switch {
	case twice && (err == nil || wantErr == nil && !strings.Contains(err.Error(), "is already at line")):
		t.Errorf("a duplicate key: %v", err)
	case twice, err != nil && wantErr != nil:
	case err != nil && slices.ContainsFunc(stricter, func(s string) bool { return strings.Contains(err.Error(), s) }):
	case err != nil || wantErr != nil:
		t.Errorf("kubectl: %v, we: %v", wantErr, err)
	case !slices.Equal(got, want):
		t.Errorf("kubectl has\n%s\nwe have\n%s", strings.Join(want, "\n"), strings.Join(got, "\n"))
	}
	if err != nil && !strings.HasPrefix(err.Error(), "a.yaml:") {
		t.Errorf("the error has no position: %v", err)
	}
	// The line is the one of the name.
	lines := strings.Split(text, "\n")
	for _, o := range objects {
		at := o.At("metadata", "name")
		var line int
		if _, scanErr := fmt.Sscanf(at, "a.yaml:%d", &line); scanErr != nil || line < 1 || line > len(lines) || !strings.Contains(strings.ReplaceAll(lines[line-1], "\x00", ""), "name") {
			t.Errorf("wrong position of the name of %s: %s", o.ID(), at)
			for _, c := range frame([]byte(text)) {
				t.Logf("line %d: %v", c.line, yaml.Unmarshal(c.text, &yaml.Node{}))
			}
		}
	}
	if t.Failed() {
		t.Logf("the text is\n%s", text)
	}
}

// generator writes random manifests that use all features of YAML.
type generator struct {
	*rand.Rand
	anchors []string // of this document
	maps    []string // those that are maps
	count   int
	twice   bool // a key is duplicated
}

var scalars = []string{"yes", "no", "on", "Off", "y", "N", "true", "FALSE", "~", "null", "", "0777", "0o17", "0x1F", "0b101", "1e3", "-1.5e-3", "1_000", "+12",
	"12345678901234567890", "9007199254740993", "1.10", "2021-01-02", "2021-01-02T03:04:05Z", "1:30", "plain text", "a#b", "'single ''quoted'''", `"double \"\u00e9\n"`,
	"!!str 5", "!!str yes", "!!int \"5\"", "!!float 1", "!local x", "-", "=", "a: b"[:1], "http://x/y:z", "\"8080\"", "8080", ".5", "08", "-0"}

var keys = []string{"a", "b", "c", "d", "yes", "1", "\"1.0\"", "'on'", "0x10", "with space", "app.kubernetes.io/name", "\"quoted\"", "true"}

func (g *generator) pick(list []string) string { return list[g.IntN(len(list))] }

func (g *generator) manifest() string {
	var text strings.Builder
	if g.IntN(20) == 0 {
		text.WriteString("\ufeff")
	}
	for i := range 1 + g.IntN(4) {
		if i > 0 || g.IntN(3) == 0 {
			text.WriteString(g.pick([]string{"---\n", "--- # a comment\n", "---\t\n", "---\n---\n", "# before\n---\n", "---\n\n# after\n"}))
		}
		g.anchors, g.maps = nil, nil
		switch g.IntN(8) {
		case 0:
			text.WriteString("# nothing\n")
			continue
		case 1:
			text.WriteString("apiVersion: v1\nkind: List\nitems:\n")
			for range 1 + g.IntN(3) {
				object := g.object("  ")
				text.WriteString("-" + object[1:])
			}
		default:
			text.WriteString(g.object(""))
		}
		if g.IntN(10) == 0 {
			text.WriteString("...\n")
		}
	}
	out := text.String()
	if g.IntN(5) == 0 {
		out = strings.ReplaceAll(out, "\n", "\r\n")
	}
	if g.IntN(5) == 0 {
		out = strings.TrimRight(out, "\r\n")
	}
	return out
}

func (g *generator) object(indent string) string {
	g.count++
	text := fmt.Sprintf("%sapiVersion: v1\n%skind: X\n%smetadata: {name: n%d}\n", indent, indent, indent, g.count)
	for _, field := range []string{"data", "spec", "more"} {
		text += indent + field + ":" + g.value(indent+"  ", 0) + "\n"
	}
	return text
}

// value returns the text that follows "key:", at the given indentation.
func (g *generator) value(indent string, depth int) string {
	kind := g.IntN(10)
	if depth > 3 {
		kind = 9
	}
	anchor := ""
	if g.IntN(4) == 0 && kind != 0 {
		anchor = fmt.Sprintf(" &x%d", len(g.anchors))
	}
	named := func(isMap bool) {
		if anchor != "" {
			g.anchors = append(g.anchors, anchor[2:])
			if isMap {
				g.maps = append(g.maps, anchor[2:])
			}
		}
	}
	comment := ""
	if g.IntN(6) == 0 {
		comment = " # " + g.pick(keys)
	}
	switch {
	case kind == 0 && len(g.anchors) > 0:
		return " *" + g.pick(g.anchors) + comment
	case kind <= 3:
		text := anchor + comment
		if anchor == "" && comment == "" {
			text = ""
		}
		seen := map[string]bool{}
		merges := slices.Clone(g.maps)
		merged := false
		for range 1 + g.IntN(4) {
			if len(merges) > 0 && !merged && g.IntN(3) == 0 {
				merged = true // a second merge key in one map would be a duplicate
				from := " *" + g.pick(merges)
				if g.IntN(3) == 0 {
					from = " [*" + g.pick(merges) + ", *" + g.pick(merges) + "]"
				}
				text += "\n" + indent + "<<:" + from
				continue
			}
			key := g.pick(keys)
			if seen[key] {
				if g.IntN(200) > 0 {
					continue
				}
				g.twice = true
			}
			seen[key] = true
			if key == "yes" || key == "true" { // both are the key "true"
				seen["yes"], seen["true"] = true, true
			}
			text += "\n" + indent + key + ":" + g.value(indent+"  ", depth+1)
		}
		if !merged && len(seen) == 0 {
			text += " {}"
		}
		named(true)
		return text
	case kind <= 5:
		text := anchor + comment
		for range 1 + g.IntN(3) {
			text += "\n" + indent + "-" + g.value(indent+"  ", depth+1)
		}
		named(false)
		return text
	case kind == 6:
		named(false)
		return anchor + " " + g.pick([]string{"|", "|-", "|+", ">", ">-", ">+"}) + "\n" + indent + "first # no comment\n" + g.pick([]string{"", "\n"}) + indent + "  second: x"
	case kind == 7:
		named(false)
		return anchor + " [a, 1, yes, {b: [c, ~]}, \"d\"]" + comment
	}
	named(false)
	scalar := g.pick(scalars)
	if scalar == "-" || scalar == "=" {
		scalar = "'" + scalar + "'"
	}
	return anchor + " " + scalar + comment
}

// TestDecodeGenerated compares the readers on random manifests. The message of a failure contains the seed.
func TestDecodeGenerated(t *testing.T) {
	refused, taken := 0, 0
	for seed := range uint64(1500) {
		g := &generator{Rand: rand.New(rand.NewPCG(seed, 1))}
		text := g.manifest()
		compare(t, text, g.twice)
		if t.Failed() {
			t.Fatalf("seed %d", seed)
		}
		if _, _, err := ours(t, text); err != nil {
			refused++
		} else {
			taken++
		}
	}
	if taken < 750 {
		t.Errorf("only %d of %d were valid: the test compares too little", taken, taken+refused)
	}
}

func TestDecodeSaysWhere(t *testing.T) {
	for want, text := range map[string]string{
		`a.yaml:17: the key "a" is already at line 14`:                                "# A comment at the top\n# of the file.\n\napiVersion: v1\nkind: ConfigMap\nmetadata: {name: one}\n---\n# second\napiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: two\ndata:\n  a: \"1\"\n\n  # why\n  a: \"2\"\n",
		`a.yaml:3: the key "a" is already at line 3`:                                  "apiVersion: v1\nkind: X\nmetadata: {name: x, a: 1, a: 2}\n",
		`a.yaml:5: the key "16" is already at line 4`:                                 "apiVersion: v1\nkind: X\nmetadata: {name: x}\n16: 1\n0x10: 2\n",
		`a.yaml:2: the key "kind" is already at`:                                      "{\"apiVersion\":\"v1\",\"kind\":\"X\",\"metadata\":{\"name\":\"a\"},\n\"kind\":\"Y\"}",
		"a.yaml:8: not valid YAML":                                                    "apiVersion: v1\nkind: X\nmetadata: {name: x}\n---\napiVersion: v1\nkind: X\ndata:\n\ttab: x\n",
		"a.yaml:7: not valid YAML":                                                    "apiVersion: v1\nkind: X\nmetadata: {name: b}\n---\napiVersion: v1\nkind: X\n - more: 1\n",
		"a.yaml:2: not valid YAML":                                                    "{\"apiVersion\":\"v1\",\n\"kind\": \"X\" \"metadata\": 1}",
		"a.yaml:4: metadata.labels.x: expected string, got bool (write it in quotes)": "apiVersion: v1\nkind: X\nmetadata:\n  labels: {a: b, x: true}\n  name: a\n",
		"a.yaml:3: not a Kubernetes object":                                           "\n\nresources: {}\n",
		"a.yaml:5: X has no metadata.name":                                            "apiVersion: v1\nkind: X\nmetadata: {name: x}\n---\napiVersion: v1\nkind: X\n",
	} {
		if _, err := Decode("a.yaml", []byte(text)); err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("error is %v, want %s", err, want)
		}
	}
	// The position of a merged value is where it is written.
	objects, err := Decode("a.yaml", []byte(manifests["merge key with an override"]))
	if err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{"initContainers.0.image": "a.yaml:10", "initContainers.0.name": "a.yaml:14", "initContainers.0.resources.requests.cpu": "a.yaml:11"} {
		if got := objects[0].At(append([]string{"spec", "template", "spec"}, strings.Split(path, ".")...)...); got != want {
			t.Errorf("%s is at %s, want %s", path, got, want)
		}
	}
}
