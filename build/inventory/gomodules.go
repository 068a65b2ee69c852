package main

import (
	"bufio"
	"debug/buildinfo"
	"fmt"
	"maps"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"unicode"
)

// readSums reads the hashes of modules from the go.sum files.
func readSums(directories []string) (map[string]string, error) {
	sums := map[string]string{}
	for _, directory := range directories {
		file, err := os.Open(filepath.Join(directory, "go.sum"))
		if err != nil {
			return nil, fmt.Errorf("read the modules' hashes: %w", err)
		}
		lines := bufio.NewScanner(file)
		for lines.Scan() {
			fields := strings.Fields(lines.Text())
			if len(fields) == 3 && !strings.HasSuffix(fields[1], "/go.mod") {
				sums[fields[0]+"@"+fields[1]] = fields[2]
			}
		}
		file.Close()
		if err := lines.Err(); err != nil {
			return nil, fmt.Errorf("read the modules' hashes in %s: %w", directory, err)
		}
	}
	return sums, nil
}

// goModules reads which modules are linked into each program. A program without this information must be one of fromC or of
// fromDebian, or Envoy, which has an entry of its own.
func goModules(programs []string, sums map[string]string, fromC string, fromDebian []component) ([]component, error) {
	found := map[string]*component{}
	add := func(path, version, user string) error {
		key := path + "@" + version
		c, ok := found[key]
		if !ok {
			c = &component{kind: "golang", name: path, version: version, purl: "pkg:golang/" + path + "@" + url.QueryEscape(version), h1: sums[key]}
			if path != "std" && c.h1 == "" {
				return fmt.Errorf("%s in %s has no hash in any go.sum", key, user)
			}
			found[key] = c
		}
		c.users = append(c.users, user)
		return nil
	}
	sources := map[string]string{}
	for _, pair := range strings.Fields(fromC) {
		name, source, _ := strings.Cut(pair, "=")
		sources[name] = source
	}

	for _, program := range programs {
		name := filepath.Base(program)
		if name == "envoy" || slices.ContainsFunc(fromDebian, func(c component) bool { return slices.Contains(c.users, name) }) {
			continue
		}
		if source, ok := sources[name]; ok {
			path, version, _ := strings.Cut(source, "@")
			if err := add(path, version, name); err != nil {
				return nil, err
			}
			continue
		}
		info, err := buildinfo.ReadFile(program)
		if err != nil {
			return nil, fmt.Errorf("read the modules in %s: %w", program, err)
		}
		if err := add("std", strings.TrimPrefix(info.GoVersion, "go"), name); err != nil {
			return nil, err
		}
		for _, dependency := range info.Deps {
			if dependency.Replace != nil {
				dependency = dependency.Replace
			}
			if err := add(dependency.Path, dependency.Version, name); err != nil {
				return nil, err
			}
		}
	}

	cache, err := goEnv("GOMODCACHE")
	if err != nil {
		return nil, err
	}
	root, err := goEnv("GOROOT")
	if err != nil {
		return nil, err
	}
	var parts []component
	for _, key := range slices.Sorted(maps.Keys(found)) {
		c := found[key]
		directory := filepath.Join(cache, escape(c.name)+"@"+escape(c.version))
		if c.name == "std" {
			directory = root
		}
		if c.texts, err = licenseFiles(directory); err != nil {
			return nil, err
		}
		parts = append(parts, *c)
	}
	return parts, nil
}

// licenseName matches the files that state or complete a licence; Apache-2.0 wants NOTICE passed on too.
var licenseName = regexp.MustCompile(`(?i)^(licen[cs]e|copying|unlicense|notice|patents|copyright)([.-].*)?$`)

func licenseFiles(directory string) ([]text, error) {
	entries, err := os.ReadDir(directory)
	if err != nil {
		return nil, fmt.Errorf("look for a licence: %w", err)
	}
	var texts []text
	for _, entry := range entries {
		if !entry.Type().IsRegular() || !licenseName.MatchString(entry.Name()) || strings.HasSuffix(entry.Name(), ".go") {
			continue
		}
		// The licence of a module's documentation, of which nothing ships.
		if entry.Name() == "LICENSE.docs" {
			continue
		}
		content, err := os.ReadFile(filepath.Join(directory, entry.Name()))
		if err != nil {
			return nil, fmt.Errorf("read a licence: %w", err)
		}
		texts = append(texts, text{name: entry.Name(), content: string(content)})
	}
	return texts, nil
}

// escape writes a module's path as the module cache does: an exclamation mark before the lower-case form of each capital.
// See https://go.dev/ref/mod#module-cache.
func escape(path string) string {
	var b strings.Builder
	for _, r := range path {
		if unicode.IsUpper(r) {
			b.WriteByte('!')
			r = unicode.ToLower(r)
		}
		b.WriteRune(r)
	}
	return b.String()
}

func goEnv(name string) (string, error) {
	out, err := exec.Command("go", "env", name).Output()
	if err != nil {
		return "", fmt.Errorf("ask go for %s: %w", name, err)
	}
	return strings.TrimSpace(string(out)), nil
}
