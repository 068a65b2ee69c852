package dialect_test

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/pmezard/go-difflib/difflib"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/anypb"
	"istio.io/istio/pilot/pkg/model"
	"sigs.k8s.io/yaml"
)

// TestGolden compares the dialect's changes to generated resources with testdata/<scene>.diff. The files hold only
// the differences, so that they show the translation and not Istio's output.
func TestGolden(t *testing.T) {
	for _, s := range scenes() {
		t.Run(s.name, func(t *testing.T) {
			f, _ := newIstiod(t, s)
			before := generate(t, f, s.proxy)
			wrap(t, f)
			got := diffOf(t, before, generate(t, f, s.proxy))
			if got == "" {
				t.Fatal("nothing was translated")
			}
			file := filepath.Join("testdata", s.name+".diff")
			if *update {
				if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if got != string(want) {
				d, _ := difflib.GetUnifiedDiffString(difflib.UnifiedDiff{
					A: difflib.SplitLines(string(want)), B: difflib.SplitLines(got), FromFile: file, ToFile: "now", Context: 3,
				})
				t.Errorf("the translation changed; run with -update if this is intended:\n%s", d)
			}
		})
	}
}

func diffOf(t *testing.T, before, after map[string]model.Resources) string {
	t.Helper()
	var out strings.Builder
	loggers := statsLoggers{}
	for _, typ := range generatedTypes {
		was, is := byName(before[typ]), byName(after[typ])
		if !slices.Equal(slices.Sorted(maps.Keys(was)), slices.Sorted(maps.Keys(is))) {
			t.Fatalf("%s: the set of resources changed", typ)
		}
		for _, name := range slices.Sorted(maps.Keys(is)) {
			kind := typ[strings.LastIndexByte(typ, '.')+1:]
			d, err := difflib.GetUnifiedDiffString(difflib.UnifiedDiff{
				A: difflib.SplitLines(asYAML(t, was[name].Resource, &loggers)), B: difflib.SplitLines(asYAML(t, is[name].Resource, &loggers)),
				FromFile: kind + "/" + name + " (Istio)", ToFile: kind + "/" + name + " (upstream)", Context: 2,
			})
			if err != nil {
				t.Fatal(err)
			}
			out.WriteString(d)
		}
	}
	if out.Len() > 0 {
		out.WriteString(string(toYAML(t, map[string]any{"stats loggers": loggers})))
	}
	return out.String()
}

// statsLoggers are the distinct configurations of the metrics loggers. They are long and often repeated, so golden files refer
// to them by number.
type statsLoggers []map[string]any

func (l *statsLoggers) replace(tree any) any {
	switch node := tree.(type) {
	case []any:
		for i := range node {
			node[i] = l.replace(node[i])
		}
	case map[string]any:
		if node["@type"] == "type.googleapis.com/envoy.extensions.access_loggers.stats.v3.Config" || toAgent(node) {
			n := slices.IndexFunc(*l, func(known map[string]any) bool { return reflect.DeepEqual(known, node) })
			if n < 0 {
				n = len(*l)
				*l = append(*l, node)
			}
			return fmt.Sprintf("stats logger %d", n)
		}
		for k := range node {
			node[k] = l.replace(node[k])
		}
	}
	return tree
}

// toAgent reports whether a logger sends its entries to the agent.
func toAgent(logger map[string]any) bool {
	service, _ := logger["httpService"].(map[string]any)
	uri, _ := service["httpUri"].(map[string]any)
	return uri["cluster"] == "prometheus_stats"
}

func toYAML(t *testing.T, tree any) []byte {
	t.Helper()
	out, err := yaml.Marshal(tree)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func asYAML(t *testing.T, a *anypb.Any, loggers *statsLoggers) string {
	t.Helper()
	m, err := a.UnmarshalNew()
	if err != nil {
		t.Fatal(err)
	}
	js, err := protojson.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	// protojson varies its white space on purpose; a round trip normalizes it.
	var tree any
	if err := json.Unmarshal(js, &tree); err != nil {
		t.Fatal(err)
	}
	return string(toYAML(t, loggers.replace(tree)))
}
