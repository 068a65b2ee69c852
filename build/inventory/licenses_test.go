package main

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	classifier "github.com/google/licenseclassifier/v2"
	"github.com/google/licenseclassifier/v2/assets"
)

// known is what the program knows licences by; loading it takes a second.
var known = sync.OnceValue(func() *classifier.Classifier {
	c, err := assets.DefaultClassifier()
	if err != nil {
		panic(err)
	}
	return c
})

// asShipped is a licence file as it lies in a module.
func asShipped(t *testing.T, name string) string {
	t.Helper()
	content, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	return string(content)
}

// whole is a licence's text or notice, with the lines that its author is to fill in.
func whole(t *testing.T, name string) string {
	t.Helper()
	content, err := assets.ReadLicenseFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(content)
}

// module writes a module's files and reads its licences as the program does.
func module(t *testing.T, files map[string]string) component {
	t.Helper()
	dir := t.TempDir()
	for name, content := range files {
		name = filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	texts, err := licenseFiles(dir)
	if err != nil {
		t.Fatal(err)
	}
	return component{kind: "golang", name: "example.com/module", version: "v1.0.0", users: []string{"polymesh"}, texts: texts}
}

func TestLicencesOfModules(t *testing.T) {
	mit, apache := asShipped(t, "go.uber.org-zap.txt"), whole(t, "License/Apache-2.0/pristine.txt")
	agpl, agplNotice := whole(t, "License/AGPL-3.0/license.txt"), whole(t, "Header/AGPL-3.0/header.txt")
	for _, c := range []struct {
		what    string
		files   map[string]string
		want    []string
		refused string
	}{
		{"MIT", map[string]string{"LICENSE": mit}, []string{"MIT"}, ""},
		{"MIT, British", map[string]string{"LICENCE.txt": mit}, []string{"MIT"}, ""},
		{"BSD with two clauses", map[string]string{"LICENSE": asShipped(t, "github.com-pkg-errors.txt")}, []string{"BSD-2-Clause"}, ""},
		{"BSD with three clauses, and a grant of patents", map[string]string{"LICENSE": asShipped(t, "golang.org-x-sys.txt"), "PATENTS": asShipped(t, "golang.org-x-sys-PATENTS.txt")}, []string{"BSD-3-Clause"}, ""},
		{"0BSD by its SPDX name", map[string]string{"LICENSE": asShipped(t, "github.com-mikelolasagasti-xz.txt")}, []string{"0BSD"}, ""},
		{"a dedication to the public domain", map[string]string{"LICENSE": asShipped(t, "github.com-xi2-xz.txt")}, []string{publicDomain}, ""},
		{"Apache", map[string]string{"LICENSE": apache, "NOTICE": "This product includes software of Example Inc.\n"}, []string{"Apache-2.0"}, ""},
		{"MPL", map[string]string{"LICENSE": whole(t, "License/MPL-2.0/pristine.txt")}, []string{"MPL-2.0"}, ""},
		{"two licences, one as a notice", map[string]string{"LICENSE": asShipped(t, "gopkg.in-yaml.v3.txt"), "NOTICE": asShipped(t, "gopkg.in-yaml.v3-NOTICE.txt")}, []string{"Apache-2.0", "MIT"}, ""},
		{"two files", map[string]string{"LICENSE": apache, "LICENSE.third-party": mit}, []string{"Apache-2.0", "MIT"}, ""},
		{"the licence of the documentation, which does not ship", map[string]string{"LICENSE": mit, "LICENSE.docs": whole(t, "License/CC-BY-NC-4.0/license.txt")}, []string{"MIT"}, ""},
		{"code with the name of a licence", map[string]string{"LICENSE": mit, "license.go": "package module\n"}, []string{"MIT"}, ""},

		{"LGPL", map[string]string{"LICENSE": whole(t, "License/LGPL-3.0/pristine.txt")}, nil, "LGPL-3.0 is not allowed"},
		{"GPL 2", map[string]string{"COPYING": whole(t, "License/GPL-2.0/license.txt")}, nil, "GPL-2.0 is not allowed"},
		{"GPL 3", map[string]string{"LICENSE.md": whole(t, "License/GPL-3.0/license.txt")}, nil, "GPL-3.0 is not allowed"},
		{"AGPL", map[string]string{"LICENSE": agpl}, nil, "AGPL-3.0 is not allowed"},
		{"SSPL", map[string]string{"LICENSE": whole(t, "License/SSPL-1.0/license.txt")}, nil, "SSPL-1.0 is not allowed"},
		{"BUSL", map[string]string{"LICENSE": whole(t, "License/Business-Source-License-1.1/license.txt")}, nil, "Business-Source-License-1.1 is not allowed"},
		{"MIT but not for sale", map[string]string{"LICENSE": whole(t, "License/Commons-Clause/license.txt") + "\n\n" + mit}, nil, "Commons-Clause is not allowed"},
		{"AGPL in a second file", map[string]string{"LICENSE": apache, "LICENSE.enterprise": agpl}, nil, "AGPL-3.0 is not allowed"},
		{"AGPL below MIT in one file", map[string]string{"LICENSE": mit + "\n\nThe folder server/ has another licence:\n\n" + agpl}, nil, "AGPL-3.0 is not allowed"},
		{"AGPL below MIT, as the notice of source files alone", map[string]string{"LICENSE": mit + "\n\nThe folder server/ has another licence:\n\n" + agplNotice}, nil, "AGPL-3.0 is not allowed"},
		{"AGPL as a notice alone", map[string]string{"LICENSE": agplNotice}, nil, "AGPL-3.0 is not allowed"},
		{"the choice between Apache and GPL, by a module that is not in the list", map[string]string{"LICENSE": apache + "\n\nor, at your option,\n\n" + whole(t, "License/GPL-2.0/license.txt")}, nil, "GPL-2.0 is not allowed"},
		{"no licence", map[string]string{"README.md": "Take it.\n"}, nil, "no licence file"},
		{"no licence but below", map[string]string{"internal/LICENSE": mit}, nil, "no licence file"},
		{"only a notice", map[string]string{"NOTICE": "Copyright 2020 Example Inc.\n"}, nil, "no file states a licence"},
		{"an empty file", map[string]string{"LICENSE": ""}, nil, "the licence in LICENSE is not recognised"},
		{"words of their own", map[string]string{"LICENSE": "You may look at this code, but not use it. Ask sales@example.com for more.\n"}, nil, "the licence in LICENSE is not recognised"},
		{"words of their own in a second file", map[string]string{"LICENSE": mit, "LICENSE.enterprise": "The folder ee/ needs a contract with Example Inc.\n"}, nil, "the licence in LICENSE.enterprise is not recognised"},
		{"a text that was changed: conditions of their own are added", map[string]string{"LICENSE": mit + "\n" + strings.Repeat("The Software must not be used to make money with it. ", 10)}, nil, "LICENSE has 110 words beside MIT: read them, and add the text to those that were read in build/inventory/licenses.go"},
		{"a text that was changed: half of it is gone", map[string]string{"LICENSE": mit[:len(mit)/2]}, nil, "the licence in LICENSE is not recognised"},
	} {
		t.Run(c.what, func(t *testing.T) {
			parts := []component{module(t, c.files)}
			err := judge(known(), parts)
			switch {
			case c.refused == "" && err != nil:
				t.Errorf("it is refused: %v", err)
			case c.refused == "" && !slices.Equal(parts[0].licenses, c.want):
				t.Errorf("the licences are %q, want %q", parts[0].licenses, c.want)
			case c.refused != "" && err == nil:
				t.Errorf("it is taken as %q", parts[0].licenses)
			case c.refused != "" && !strings.Contains(err.Error(), "example.com/module v1.0.0: "+c.refused+" (in polymesh)"):
				t.Errorf("it is refused with %q, want %q", err, c.refused)
			}
		})
	}
}

// A text that a person has read counts as it is, and not when a word of it changes.
func TestTextsThatWereRead(t *testing.T) {
	content := asShipped(t, "modernc.org-sqlite-LICENSE-SQLITE.txt")
	parts := []component{module(t, map[string]string{"LICENSE-SQLITE": content})}
	if err := judge(known(), parts); err != nil || !slices.Equal(parts[0].licenses, []string{publicDomain}) {
		t.Errorf("the licences are %q, %v", parts[0].licenses, err)
	}
	changed := strings.Replace(content, "commercial or non-commercial", "but not commercial", 1)
	if err := judge(known(), []component{module(t, map[string]string{"LICENSE-SQLITE": changed})}); changed == content || err == nil {
		t.Errorf("a changed text is taken: %v", err)
	}
	for sum, names := range read {
		for _, name := range names {
			if !slices.Contains(allowed, name) {
				t.Errorf("%s was read as %s, which is not allowed", sum, name)
			}
		}
	}
}

func TestChosenLicence(t *testing.T) {
	choice := whole(t, "License/Apache-2.0/pristine.txt") + "\n\nor, at your option,\n\n" + whole(t, "License/GPL-2.0/license.txt")
	for name, want := range chosen {
		p := module(t, map[string]string{"LICENSE.code": choice})
		p.name = name
		parts := []component{p}
		if err := judge(known(), parts); err != nil || !slices.Equal(parts[0].licenses, []string{want}) {
			t.Errorf("%s: %q, %v", name, parts[0].licenses, err)
		}
		// The choice ends with the licence that was chosen.
		p = module(t, map[string]string{"LICENSE": whole(t, "License/GPL-2.0/license.txt")})
		p.name = name
		if err := judge(known(), []component{p}); err == nil {
			t.Errorf("%s is taken though it offers %s no more", name, want)
		}
	}
}

func TestEveryComplaintIsListed(t *testing.T) {
	good := module(t, map[string]string{"LICENSE": asShipped(t, "go.uber.org-zap.txt")})
	gpl := module(t, map[string]string{"LICENSE": whole(t, "License/GPL-3.0/license.txt")})
	gpl.name = "example.com/gpl"
	none := module(t, nil)
	none.name = "example.com/none"
	err := judge(known(), []component{gpl, good, none, {kind: "pypi", name: "wheel", version: "1"}})
	if err == nil {
		t.Fatal("nothing is refused")
	}
	for _, want := range []string{"example.com/gpl v1.0.0: GPL-3.0 is not allowed", "example.com/none v1.0.0: no licence file", "wheel 1: no licence"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q is missing in: %v", want, err)
		}
	}
	if strings.Contains(err.Error(), good.name) {
		t.Errorf("a good module is named: %v", err)
	}
}

// Debian's programs may be GPL: they run next to ours.
func TestLicencesOfDebianPackages(t *testing.T) {
	for _, c := range []struct {
		what, copyright, refused string
	}{
		{"GPL", "Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/\n\nFiles: *\nCopyright: 2020 A\nLicense: GPL-2+\n On Debian systems, see /usr/share/common-licenses/GPL-2.\n", ""},
		{"a text that speaks of the AGPL", "This program is free software.\n\n" + whole(t, "License/GPL-3.0/license.txt"), ""},
		{"AGPL by its field", "Files: *\nCopyright: 2020 A\nLicense: GPL-3+\n\nFiles: server/*\nLicense: AGPL-3+\n", "AGPL"},
		{"AGPL in a choice", "Files: *\nLicense: GPL-2 or AGPL-3\n", "AGPL"},
		{"AGPL by its text", "It was packaged by A.\n\n" + whole(t, "Header/AGPL-3.0/header.txt"), "AGPL-3.0 is not allowed"},
	} {
		t.Run(c.what, func(t *testing.T) {
			err := judge(known(), []component{{kind: "deb", name: "package", version: "1", texts: []text{{name: "copyright", content: c.copyright}}}})
			if c.refused == "" && err != nil || c.refused != "" && (err == nil || !strings.Contains(err.Error(), c.refused)) {
				t.Errorf("got %v, want %q", err, c.refused)
			}
		})
	}
	if err := judge(known(), []component{{kind: "deb", name: "package", version: "1"}}); err == nil {
		t.Error("a package without a copyright file is taken")
	}
}

func TestWriteLicenses(t *testing.T) {
	mit := asShipped(t, "go.uber.org-zap.txt")
	one, two := module(t, map[string]string{"LICENSE": mit}), module(t, map[string]string{"LICENSE": mit})
	one.name, two.name = "example.com/one", "example.com/two"
	parts := []component{one, two, {kind: "deb", name: "libc6", version: "2.36", note: "source: glibc", texts: []text{{name: "copyright", content: "GNU C Library"}}}}
	if err := judge(known(), parts); err != nil {
		t.Fatal(err)
	}
	debs, dir := t.TempDir(), filepath.Join(t.TempDir(), "licenses")
	common := map[string]string{}
	for _, name := range []string{"Apache-2.0", "Artistic", "GFDL-1.3", "GPL-1", "GPL-2", "GPL-3", "LGPL-2", "LGPL-2.1", "LGPL-3", "MPL-2.0"} {
		common["usr/share/common-licenses/"+name] = "the text of " + name
	}
	pack(t, filepath.Join(debs, "base-files.deb"), "base-files", common)
	if err := writeLicenses(t.Context(), dir, parts, debs); err != nil {
		t.Fatal(err)
	}
	read := func(name string) string {
		content, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		return string(content)
	}
	modules := read("GO-MODULES.txt")
	if strings.Count(modules, "Permission is hereby granted") != 1 || !strings.Contains(modules, "example.com/one v1.0.0 LICENSE\n     example.com/two v1.0.0 LICENSE") {
		t.Errorf("the text of two modules should stand there once, below both names:\n%s", modules)
	}
	for name, want := range map[string]string{"index.txt": debianNote, "DEBIAN.txt": "==== libc6 2.36 (source: glibc) ====\n\nGNU C Library", "GPL-2.txt": "the text of GPL-2", "MPL-2.0.txt": "the text of MPL-2.0"} {
		if !strings.Contains(read(name), want) {
			t.Errorf("%s does not hold %q:\n%s", name, want, read(name))
		}
	}
	// The texts that DEBIAN.txt refers to are part of it.
	pack(t, filepath.Join(debs, "base-files.deb"), "base-files", map[string]string{"usr/share/common-licenses/GPL-2": "text"})
	if err := writeLicenses(t.Context(), dir, parts, debs); err == nil {
		t.Error("a missing text of Debian's is not noticed")
	}
}
