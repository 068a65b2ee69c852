package main

import (
	"bytes"
	"encoding/json"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	cdx "github.com/CycloneDX/cyclonedx-go"
	"github.com/xeipuuv/gojsonschema"
)

// schema is that of CycloneDX 1.6, from the library's module.
func schema(t *testing.T) *gojsonschema.Schema {
	t.Helper()
	out, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "github.com/CycloneDX/cyclonedx-go").Output()
	if err != nil {
		t.Fatal(err)
	}
	load := func(name string) gojsonschema.JSONLoader {
		content, err := os.ReadFile(filepath.Join(strings.TrimSpace(string(out)), "schema", name))
		if err != nil {
			t.Fatal(err)
		}
		return gojsonschema.NewBytesLoader(content)
	}
	loader := gojsonschema.NewSchemaLoader()
	// The library misspells the name of the second file; its $id is right.
	if err := loader.AddSchemas(load("spdx.schema.json"), load("jsf-0.82.schemax.json")); err != nil {
		t.Fatal(err)
	}
	compiled, err := loader.Compile(load("bom-1.6.schema.json"))
	if err != nil {
		t.Fatal(err)
	}
	return compiled
}

func TestSBOM(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	sums, err := readSums([]string{"."})
	if err != nil {
		t.Fatal(err)
	}
	parts, err := goModules([]string{self}, sums, "", nil)
	if err != nil {
		t.Fatal(err)
	}
	classify(known(), parts)
	count := len(parts)
	hash := strings.Repeat("0a", 32)
	parts = append(parts,
		// Every licence that may ship must have a name that the format knows.
		component{kind: "golang", name: "example.com/all", version: "v2.0.0+incompatible", purl: "pkg:golang/example.com/all@v2.0.0%2Bincompatible", h1: "h1:aaa=", users: []string{"polymesh", "runc"}, licenses: allowed},
		component{kind: "deb", name: "libc6", version: "2.36-9+deb12u10", purl: debianURL("libc6", "2.36-9+deb12u10", "amd64", "bookworm"), sha256: hash, users: []string{"nft"}, note: "source: glibc"},
		component{kind: "generic", name: "envoy", version: "1.36.2", purl: "pkg:github/envoyproxy/envoy@v1.36.2", users: []string{"istio/proxyv2"}, licenses: []string{"Apache-2.0"}},
	)
	dir := t.TempDir()
	subject := filepath.Join(dir, "polymesh")
	if err := os.WriteFile(subject, []byte("x"), 0o755); err != nil {
		t.Fatal(err)
	}
	write := func() []byte {
		file := filepath.Join(dir, "bom.json")
		if err := writeSBOM(file, subject, "1.2.3", "2026-01-02T03:04:05Z", parts); err != nil {
			t.Fatal(err)
		}
		content, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		return content
	}
	content := write()
	if !bytes.Equal(content, write()) {
		t.Error("the same parts give another bill of materials")
	}
	result, err := schema(t).Validate(gojsonschema.NewBytesLoader(content))
	if err != nil {
		t.Fatal(err)
	}
	for _, problem := range result.Errors() {
		t.Errorf("not valid as CycloneDX 1.6: %s", problem)
	}

	bom := new(cdx.BOM)
	if err := json.Unmarshal(content, bom); err != nil {
		t.Fatal(err)
	}
	about := bom.Metadata.Component
	if about.Name != "polymesh" || about.Version != "1.2.3" || (*about.Hashes)[0].Value != "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881" {
		t.Errorf("the subject is %+v", about)
	}
	if len(*bom.Components) != count+3 {
		t.Errorf("there are %d components, want %d", len(*bom.Components), count+3)
	}
	references := map[string]bool{}
	for _, c := range *bom.Components {
		if references[c.BOMRef] {
			t.Errorf("two components are called %s", c.BOMRef)
		}
		references[c.BOMRef] = true
		if parsed, err := url.Parse(c.PackageURL); err != nil || parsed.Scheme != "pkg" || strings.Contains(c.PackageURL, "+") {
			t.Errorf("%s is no package URL: %v", c.PackageURL, err)
		}
	}
	for _, reference := range *(*bom.Dependencies)[0].Dependencies {
		if !references[reference] {
			t.Errorf("the file depends on %s, which is no component", reference)
		}
	}
}

// The schema would not notice if it were not applied.
func TestSchemaRefuses(t *testing.T) {
	compiled := schema(t)
	for what, document := range map[string]string{
		"a licence that SPDX does not know": `{"bomFormat":"CycloneDX","specVersion":"1.6","components":[{"type":"library","name":"a","licenses":[{"license":{"id":"BSD-0-Clause"}}]}]}`,
		"another format":                    `{"bomFormat":"other","specVersion":"1.6"}`,
	} {
		if result, err := compiled.Validate(gojsonschema.NewStringLoader(document)); err != nil || result.Valid() {
			t.Errorf("%s is taken: %v", what, err)
		}
	}
}
