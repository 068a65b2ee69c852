package main

import (
	"cmp"
	"context"
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"sort"
	"strings"

	classifier "github.com/google/licenseclassifier/v2"
)

// allowed are the licences under which a Go module, or a Debian source package, may be linked into our programs, by their SPDX
// names.
var allowed = []string{
	"0BSD", "Apache-2.0", "BSD-2-Clause", "BSD-2-Clause-FreeBSD", "BSD-3-Clause", "BSL-1.0", "CC-BY-3.0", "CC-BY-4.0", "CC0-1.0", "curl", "ISC", "MIT", "MIT-0",
	"MPL-2.0", "MPL-2.0-no-copyleft-exception", "OpenSSL", "PostgreSQL", "Unicode-DFS-2015", "Unicode-DFS-2016", "Unicode-TOU", "Unlicense", publicDomain, "Zlib",
}

// publicDomain is for authors who have given up their rights, which SPDX has no name for.
const publicDomain = "public domain"

// spdx has the names of the classifier that differ from SPDX's. XZ is how XZ Embedded calls its own.
var spdx = map[string]string{"BSD-0-Clause": "0BSD", "XZ": publicDomain}

// ownWords is how many words a licence file may hold next to the licences that are recognised in it: titles, names of files, the end of
// a known text. With more, a person must read it: words can take back what the licence gives.
const ownWords = 100

// read are the SHA-256 sums of texts that a person has read, because the classifier cannot tell all that they say. When one changes,
// it has to be read again.
var read = map[string][]string{
	"83e36e42b3dacc3d447eca3049848b3e2ff66b6e1768a6a3cf3f27a57079bda4": {"BSD-3-Clause", "MPL-2.0"},                                    // github.com/cyphar/filepath-securejoin COPYING.md
	"8438c9c89b849131ead81d5435cb97fcf052df5b0b286dda8a2d4c29e6cb3fd0": {publicDomain},                                                 // modernc.org/sqlite LICENSE-SQLITE
	"4194f8e7119be72babd499db4f6f1f7547e36e8a7bffcb2b9c8df241b8f1576a": {"Apache-2.0", "BSD-3-Clause", "MIT", "MPL-2.0", publicDomain}, // modernc.org/sqlite LICENSE-3RD-PARTY.md
	"f597097efe3d97021f89170746bd3a0fb9a8b6fb26b82043ed68a4e0283bee6c": {"BSD-3-Clause", "MIT"},                                        // modernc.org/libc LICENSE-3RD-PARTY.md
	"5ae5bee3072a841376451b48d8cfcec7188e10543926d5870828d36c8a750dc5": nil,                                                            // modernc.org/memory LICENSE-LOGO: where a picture comes from, which is not linked
	"89aa7b27868669299bd8a6c53b72ec4beadce42dad6c8336797cc26e1e8df98d": {"Apache-2.0"},                                                 // github.com/apache/thrift LICENSE: the others are of files in other languages and of its compiler, none of which is linked
}

func sumOf(content string) string { return fmt.Sprintf("%x", sha256.Sum256([]byte(content))) }

// wasRead reports whether a person has read a text.
func wasRead(content string) bool {
	_, ok := read[sumOf(content)]
	return ok
}

// refused are licences that not even a program next to ours may have. SSPL is found by refusedField alone: its text is so like that
// of the GPL that the classifier finds it in both.
var refused = []string{"AGPL-1.0", "AGPL-3.0", "Business-Source-License-1.1", "Elastic-2.0", "Commons-Clause"}

// refusedField finds such licences in the fields of a machine-readable copyright file, which has no text where it refers to another file
// (https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/).
var refusedField = regexp.MustCompile(`(?im)^License:.*\b(AGPL|SSPL|BUSL|Elastic|Commons-Clause)`)

// chosen are modules that leave the choice between licences, with the one under which they ship here.
var chosen = map[string]string{"github.com/spdx/tools-golang": "Apache-2.0"}

// debianNote stands in the index: Debian's programs run next to ours as programs of their own (GPL, LGPL and others).
const debianNote = "see DEBIAN.txt"

// completesLicense matches the files that need not state a licence themselves.
var completesLicense = regexp.MustCompile(`(?i)^(notice|patents|copyright)([.-].*)?$`)

// linked reports whether a part is linked into our programs from its module or package, which states its licence.
func (c *component) linked() bool { return c.kind == "golang" || c.kind == "npm" }

// classify finds the SPDX names of the licences in the texts, and from them those of the Go modules and the packages of npm.
func classify(known *classifier.Classifier, parts []component) {
	found := map[string]text{}
	for i := range parts {
		p := &parts[i]
		for j := range p.texts {
			t := &p.texts[j]
			same, ok := found[t.content]
			if !ok {
				same.licenses, same.words = identify(known, t.content)
				found[t.content] = same
			}
			t.licenses, t.words = same.licenses, same.words
			if !p.linked() {
				continue
			}
			for _, name := range t.licenses {
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
}

// identify finds the licences that a text states: whole ones, and for some files another one by the notice that refers to it. It counts
// the words that belong to none.
func identify(known *classifier.Classifier, content string) (licenses []string, words int) {
	if licenses, ok := read[sumOf(content)]; ok {
		return licenses, 0
	}
	covered := map[int]bool{}
	for _, match := range known.Match([]byte(content)).Matches {
		for line := match.StartLine; line <= match.EndLine; line++ {
			covered[line] = true
		}
		name := cmp.Or(spdx[match.Name], match.Name)
		if (match.MatchType == "License" || match.MatchType == "Header") && !slices.Contains(licenses, name) {
			licenses = append(licenses, name)
		}
	}
	number := 0
	for line := range strings.Lines(content) {
		if number++; !covered[number] && !strings.HasPrefix(strings.ToLower(strings.TrimSpace(line)), "copyright") {
			words += len(strings.Fields(line))
		}
	}
	return licenses, words
}

// judge fails with the whole list of parts that lack a text or have a licence that is not allowed.
func judge(known *classifier.Classifier, parts []component) error {
	classify(known, parts)
	var complaints []string
	for _, p := range parts {
		complain := func(format string, args ...any) {
			complaints = append(complaints, fmt.Sprintf("%s %s: %s (in %s)", p.name, p.version, fmt.Sprintf(format, args...), strings.Join(p.users, ", ")))
		}
		if len(p.texts) == 0 && len(p.licenses) == 0 {
			complain("no licence file")
		}
		for _, t := range p.texts {
			if p.linked() {
				switch {
				case completesLicense.MatchString(t.name):
				case wasRead(t.content):
				case len(t.licenses) == 0:
					complain("the licence in %s is not recognised", t.name)
				case t.words > ownWords:
					complain("%s has %d words beside %s: read them, and add the text to those that were read in build/inventory/licenses.go",
						t.name, t.words, strings.Join(t.licenses, " and "))
				}
				continue
			}
			// Debian's programs run next to ours, each under its own licence, but not under these.
			if field := refusedField.FindString(t.content); field != "" {
				complain("%s is not allowed", field)
			}
			for _, name := range t.licenses {
				if slices.Contains(refused, name) {
					complain("%s is not allowed", name)
				}
			}
		}
		if p.kind == "deb" && len(p.licenses) == 0 {
			continue // a program of its own, with Debian's copyright file
		}
		if len(p.texts) > 0 && len(p.licenses) == 0 {
			complain("no file states a licence")
		}
		for _, name := range p.licenses {
			if !slices.Contains(allowed, name) {
				complain("%s is not allowed", name)
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
func writeLicenses(ctx context.Context, directory string, parts []component, debs string) error {
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
