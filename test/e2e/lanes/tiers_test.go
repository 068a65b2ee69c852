package lanes

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// The page lists exactly the tests that do less with -short, with what is omitted.
func TestTiersAreDocumented(t *testing.T) {
	text, err := os.ReadFile(filepath.FromSlash("../../../docs/understand/build.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, table, found := strings.Cut(string(text), "\n### Tiers\n")
	if !found {
		t.Fatal("the page has no part about tiers")
	}
	table, _, _ = strings.Cut(table, "\n## ")
	var documented []string
	for _, row := range regexp.MustCompile(`(?m)^\| (Test\w+) \|`).FindAllStringSubmatch(table, -1) {
		documented = append(documented, row[1])
	}
	slices.Sort(documented)
	if shorter := shorterTests(t); !slices.Equal(documented, shorter) {
		t.Errorf("the table has %v, and the sources %v", documented, shorter)
	}
}

// shorterTests are the end-to-end tests that come to a call of long or of testing.Short.
func shorterTests(t *testing.T) []string {
	t.Helper()
	files, err := filepath.Glob("../*_test.go")
	if err != nil {
		t.Fatal(err)
	}
	uses := map[string][]string{} // the names in each function
	for _, file := range files {
		parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range parsed.Decls {
			f, ok := d.(*ast.FuncDecl)
			if !ok || f.Body == nil {
				continue
			}
			ast.Inspect(f.Body, func(n ast.Node) bool {
				if name, ok := n.(*ast.Ident); ok {
					uses[f.Name.Name] = append(uses[f.Name.Name], name.Name)
				}
				return true
			})
		}
	}
	reached := []string{"long", "Short"}
	for i := 0; i < len(reached); i++ {
		for name, used := range uses {
			if slices.Contains(used, reached[i]) && !slices.Contains(reached, name) {
				reached = append(reached, name)
			}
		}
	}
	tests := slices.DeleteFunc(reached, func(name string) bool { return !strings.HasPrefix(name, "Test") || name == "TestMain" })
	slices.Sort(tests)
	return tests
}
