package main

import (
	"encoding/base64"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestNPMPackages(t *testing.T) {
	dir := t.TempDir()
	put := func(content string, elem ...string) string {
		t.Helper()
		path := filepath.Join(append([]string{dir}, elem...)...)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
		return path
	}
	sum := "sha512-" + base64.StdEncoding.EncodeToString([]byte(strings.Repeat("\x0a", 64)))
	lock := func(packages string) string {
		return put(`{"lockfileVersion":3,"packages":{"":{"name":"page"}`+packages+`}}`, "package-lock.json")
	}
	scoped := fmt.Sprintf(`,"node_modules/@a/graph":{"version":"3.1.3","integrity":%q},"node_modules/@a/graph/node_modules/list":{"version":"1.0.0","integrity":%q}`, sum, sum)
	builds := fmt.Sprintf(`,"node_modules/compiler":{"version":"1.0.0","integrity":%q,"dev":true}`, sum)
	mit, err := os.ReadFile(filepath.Join("testdata", "go.uber.org-zap.txt"))
	if err != nil {
		t.Fatal(err)
	}
	put(`{"version":"3.1.3"}`, "node_modules", "@a", "graph", "package.json")
	put(string(mit), "node_modules", "@a", "graph", "LICENSE")
	put(`{"version":"1.0.0"}`, "node_modules", "@a", "graph", "node_modules", "list", "package.json")

	parts, err := npmPackages(lock(scoped+builds), filepath.Join(dir, "node_modules"), "program")
	if err != nil || len(parts) != 2 {
		t.Fatalf("%+v, %v", parts, err)
	}
	graph := parts[0]
	if graph.name != "@a/graph" || graph.purl != "pkg:npm/%40a/graph@3.1.3" || graph.sha512 != strings.Repeat("0a", 64) || len(graph.texts) != 1 || graph.users[0] != "program" {
		t.Errorf("%+v", graph)
	}
	if list := parts[1]; list.name != "list" || list.version != "1.0.0" {
		t.Errorf("%+v", list)
	}
	// One without a licence is refused, as a Go module is.
	if err := judge(known(), parts); err == nil || !strings.Contains(err.Error(), "list 1.0.0: no licence file (in program)") || strings.Contains(err.Error(), "@a/graph") {
		t.Errorf("the judgement is %v", err)
	}

	for packages, want := range map[string]string{
		"":     "lists no package",
		builds: "lists no package",
		strings.Replace(scoped, "3.1.3", "3.1.4", 1):                                  "has 3.1.3, and",
		fmt.Sprintf(`,"node_modules/absent":{"version":"1.0.0","integrity":%q}`, sum): "find the licence of absent",
		`,"node_modules/@a/graph":{"version":"3.1.3","integrity":"sha1-abc"}`:         "is not a SHA-512",
		`,"node_modules/@a/graph":{"version":"3.1.3"}`:                                "is not a SHA-512",
		`,"node_modules/@a/graph":{"link":true}`:                                      "is not a package of the registry",
	} {
		if _, err := npmPackages(lock(packages), filepath.Join(dir, "node_modules"), "program"); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", packages, err, want)
		}
	}
	if _, err := npmPackages(put(`{"lockfileVersion":1}`, "old.json"), dir, "program"); err == nil || !strings.Contains(err.Error(), "has format 1") {
		t.Errorf("an old format: %v", err)
	}
}
