package baseimage

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// Make provides every image that a template or a service of the example starts from.
func TestEveryBaseIsMade(t *testing.T) {
	script, err := os.ReadFile("build.sh")
	if err != nil {
		t.Fatal(err)
	}
	from := regexp.MustCompile(`(?m)^(?:FROM|ARG [A-Z_]+_IMAGE=|ARG BASE_IMAGE=)\s*(\S+?)(?: AS .*)?$`)
	seen := 0
	for _, pattern := range []string{"../scaffold/templates/services/*/Dockerfile", "../../../examples/polyglot/services/*/Dockerfile"} {
		dockerfiles, err := filepath.Glob(pattern)
		if err != nil || len(dockerfiles) != len(languages) {
			t.Fatalf("%s: %v, %v", pattern, dockerfiles, err)
		}
		for _, dockerfile := range dockerfiles {
			text, err := os.ReadFile(dockerfile)
			if err != nil {
				t.Fatal(err)
			}
			for _, match := range from.FindAllStringSubmatch(string(text), -1) {
				image := strings.TrimPrefix(match[1], "=")
				if strings.HasPrefix(image, "$") {
					continue
				}
				if !strings.Contains(image, "/") {
					image = "docker.io/library/" + image
				}
				if !strings.Contains(filepath.Base(image), ":") {
					image += ":latest"
				}
				if Lang(image) == "" {
					t.Errorf("%s starts from %s, which belongs to no language", dockerfile, image)
				}
				if !strings.Contains(string(script), image) {
					t.Errorf("%s starts from %s, which build.sh does not build", dockerfile, image)
				}
				seen++
			}
		}
	}
	if seen < 2*len(languages) {
		t.Errorf("only %d images were found", seen)
	}
}

// The embedded files are all that the script needs.
func TestFilesAreCarried(t *testing.T) {
	dir := t.TempDir()
	if err := os.CopyFS(dir, files); err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{"build.sh", "maven/mvn", "static/Containerfile"} {
		if _, err := os.Stat(filepath.Join(dir, file)); err != nil {
			t.Error(err)
		}
	}
	if out, err := exec.Command("bash", "-n", filepath.Join(dir, "build.sh")).CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
}

func TestUnknownLanguage(t *testing.T) {
	_, err := Make(t.Context(), []string{"go", "cobol"}, false, func(string) {})
	if err == nil || !strings.Contains(err.Error(), `--lang "cobol" is not one of go, java, node, python, rust`) {
		t.Errorf("got %v", err)
	}
	if !slices.Contains(Images("rust"), "docker.io/library/rust:1.95-slim") || Lang("docker.io/library/mysql:8") != "" {
		t.Error("the list is wrong")
	}
}
