package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strings"

	"github.com/google/licenseclassifier/v2/assets"
)

// allowed are the licences under which a Go module, or a Debian source package, may be linked into our programs, as the
// classifier names them: BSD-0-Clause is 0BSD too, and XZ is the dedication of XZ Embedded to the public domain.
var allowed = []string{
	"0BSD", "Apache-2.0", "BSD-0-Clause", "BSD-2-Clause", "BSD-2-Clause-FreeBSD", "BSD-3-Clause", "BSL-1.0", "CC-BY-3.0", "CC-BY-4.0", "CC0-1.0", "curl", "ISC", "MIT", "MIT-0",
	"MPL-2.0", "MPL-2.0-no-copyleft-exception", "OpenSSL", "PostgreSQL", "Unicode-DFS-2015", "Unicode-DFS-2016", "Unicode-TOU", "Unlicense", "XZ", "Zlib",
}

// chosen are modules that leave the choice between licences, with the one under which they ship here.
var chosen = map[string]string{"github.com/spdx/tools-golang": "Apache-2.0"}

// debianNote stands in the index: Debian's programs run beside ours as programs of their own (GPL, LGPL and others).
const debianNote = "see DEBIAN.txt"

// classify finds the SPDX names of the licences from their texts.
func classify(parts []component) error {
	texts, err := assets.DefaultClassifier()
	if err != nil {
		return fmt.Errorf("load the known licences: %w", err)
	}
	known := map[string][]string{}
	for i := range parts {
		p := &parts[i]
		if p.kind != "golang" {
			continue
		}
		for _, t := range p.texts {
			names, ok := known[t.content]
			if !ok {
				matches := texts.Match([]byte(t.content)).Matches
				// Some state only the notice that refers to the licence.
				for _, kind := range []string{"License", "Header"} {
					for _, match := range matches {
						if match.MatchType == kind && !slices.Contains(names, match.Name) {
							names = append(names, match.Name)
						}
					}
					if len(names) > 0 {
						break
					}
				}
				known[t.content] = names
			}
			for _, name := range names {
				if !slices.Contains(p.licenses, name) {
					p.licenses = append(p.licenses, name)
				}
			}
		}
		if name, ok := chosen[p.name]; ok && slices.Contains(p.licenses, name) {
			p.licenses = []string{name}
		}
		sort.Strings(p.licenses)
	}
	return nil
}

// judge fails with the whole list of parts that lack a text or have a licence that is not allowed.
func judge(parts []component, debs string) error {
	if err := classify(parts); err != nil {
		return err
	}
	var complaints []string
	for _, p := range parts {
		switch {
		case p.kind != "golang" && len(p.texts) == 0 && len(p.licenses) == 0:
			complaints = append(complaints, fmt.Sprintf("%s %s: no licence", p.name, p.version))
		case p.kind != "golang" && len(p.licenses) == 0:
			// A program of its own, with Debian's copyright file.
		case p.kind == "golang" && len(p.texts) == 0:
			complaints = append(complaints, fmt.Sprintf("%s %s: no licence file (in %s)", p.name, p.version, strings.Join(p.users, ", ")))
		case len(p.licenses) == 0:
			complaints = append(complaints, fmt.Sprintf("%s %s: the licence is not recognised (in %s)", p.name, p.version, strings.Join(p.users, ", ")))
		default:
			for _, name := range p.licenses {
				if !slices.Contains(allowed, name) {
					complaints = append(complaints, fmt.Sprintf("%s %s: %s is not allowed (in %s)", p.name, p.version, name, strings.Join(p.users, ", ")))
				}
			}
		}
	}
	if len(complaints) > 0 {
		return fmt.Errorf("licences:\n  %s", strings.Join(complaints, "\n  "))
	}
	return nil
}

// writeLicenses writes an index and the texts. Equal texts are written once, before them the parts that they belong to:
// some five hundred Go modules share a few dozen texts.
func writeLicenses(directory string, parts []component, ctx context.Context, debs string) error {
	var index, modules, debian strings.Builder
	index.WriteString("What ships in this file, and under which licence. The texts are in the files beside this one.\n\n")
	owners := map[string][]string{}
	var order []string
	for _, p := range parts {
		license := strings.Join(p.licenses, " AND ")
		if p.kind == "deb" {
			license = strings.TrimPrefix(license+", "+debianNote, ", ")
		}
		fmt.Fprintf(&index, "%-8s %-72s %-44s %s\n", p.kind, p.name, p.version, license)
		for _, t := range p.texts {
			if p.kind == "deb" {
				fmt.Fprintf(&debian, "==== %s %s (%s) ====\n\n%s\n\n", p.name, p.version, p.note, t.content)
				continue
			}
			if _, ok := owners[t.content]; !ok {
				order = append(order, t.content)
			}
			owners[t.content] = append(owners[t.content], p.name+" "+p.version+" "+t.name)
		}
	}
	for _, content := range order {
		fmt.Fprintf(&modules, "==== %s ====\n\n%s\n\n", strings.Join(owners[content], "\n     "), strings.TrimSpace(content))
	}
	files := map[string]string{"index.txt": index.String(), "GO-MODULES.txt": modules.String()}
	// The texts that copyright files of Debian packages and Envoy's licence refer to.
	var referred []string
	if debs != "" {
		files["DEBIAN.txt"] = debian.String()
		referred = []string{"Apache-2.0", "Artistic", "GFDL-1.3", "GPL-1", "GPL-2", "GPL-3", "LGPL-2", "LGPL-2.1", "LGPL-3", "MPL-2.0"}
	}
	for _, name := range referred {
		content, err := fileIn(ctx, filepath.Join(debs, "base-files.deb"), "./usr/share/common-licenses/"+name)
		if err != nil {
			return err
		}
		files[name+".txt"] = content
	}
	if err := os.MkdirAll(directory, 0o755); err != nil {
		return fmt.Errorf("write the licence texts: %w", err)
	}
	for name, content := range files {
		if err := os.WriteFile(filepath.Join(directory, name), []byte(content), 0o644); err != nil {
			return fmt.Errorf("write the licence texts: %w", err)
		}
	}
	return nil
}
