// The inventory program lists what really ships. It reads the modules out of the built Go programs, the packages out of
// the Debian locks and a page's package-lock.json and the wheel out of Envoy's, writes the bill of materials (CycloneDX 1.6) and collects the licence texts,
// and fails when a part has no licence text or one that is not allowed. The Makefile calls it.
package main

import (
	"cmp"
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strings"

	"github.com/google/licenseclassifier/v2/assets"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "inventory:", err)
		os.Exit(1)
	}
}

// component is one part that ships.
type component struct {
	kind     string // golang, npm, deb, pypi or generic: the type of its package URL
	name     string
	version  string
	purl     string
	sha256   string // of the file it came as; empty for Go modules, which have h1, and for npm's packages
	sha512   string // of an npm package's file
	h1       string // hash of a Go module as in go.sum
	users    []string
	licenses []string
	texts    []text
	note     string
}

// text is a licence or notice as it came with the component.
type text struct {
	name     string
	content  string
	licenses []string // those that it states, from classify
	words    int      // what it says next to them, from classify
}

func run(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("inventory", flag.ExitOnError)
	var (
		version   = flags.String("version", "", "version of the release")
		date      = flags.String("date", "", "time stamp of the bill of materials")
		lock      = flags.String("debian-lock", "", "the list of pinned Debian packages, where some ship")
		debs      = flags.String("debian", "", "directory of the Debian packages")
		sources   = flags.String("source-lock", "", "the list of pinned Debian source packages, where programs are built from them")
		unpacked  = flags.String("sources", "", "directory of the Debian source packages")
		wheels    = flags.String("wheel-lock", "", "the requirements file that pins the Envoy wheel, where it ships")
		modules   = flags.String("modules", "", "directories of the go.mod files, for the hashes in go.sum")
		npmLock   = flags.String("npm-lock", "", "the package-lock.json of a page, where one ships")
		npmDir    = flags.String("npm-packages", "", "directory of the packages that it names")
		npmUser   = flags.String("npm-user", "", "program that the page is in")
		fromC     = flags.String("c-programs", "", "programs in C, as <name>=<Go module that holds the source>")
		sbom      = flags.String("sbom", "", "write the bill of materials to this file")
		subject   = flags.String("subject", "", "the file that the bill of materials is about")
		directory = flags.String("licenses", "", "write the licence texts to this directory")
	)
	flags.Usage = func() {
		fmt.Fprintln(flags.Output(), "usage: inventory [flags] <program> ...")
		flags.PrintDefaults()
	}
	if err := flags.Parse(args); err != nil {
		return err
	}

	sums, err := readSums(strings.Fields(*modules))
	if err != nil {
		return err
	}
	var fromDebian []component
	if *sources != "" {
		if fromDebian, err = debianSources(ctx, *sources, *unpacked); err != nil {
			return err
		}
	}
	parts, err := goModules(flags.Args(), sums, *fromC, fromDebian)
	if err != nil {
		return err
	}
	parts = append(parts, fromDebian...)
	if *lock != "" {
		packages, err := debianPackages(ctx, *lock, *debs)
		if err != nil {
			return err
		}
		linked, err := linkedLibraries(ctx)
		if err != nil {
			return err
		}
		parts = slices.Concat(parts, packages, linked)
	}
	if *npmLock != "" {
		page, err := npmPackages(*npmLock, *npmDir, *npmUser)
		if err != nil {
			return err
		}
		parts = append(parts, page...)
	}
	if *wheels != "" {
		envoy, err := envoyWheel(*wheels)
		if err != nil {
			return err
		}
		parts = append(parts, envoy...)
	}
	slices.SortFunc(parts, func(a, b component) int {
		return cmp.Or(cmp.Compare(a.kind, b.kind), cmp.Compare(a.name, b.name), cmp.Compare(a.version, b.version))
	})

	known, err := assets.DefaultClassifier()
	if err != nil {
		return fmt.Errorf("load the known licences: %w", err)
	}
	if *directory != "" {
		if err := judge(known, parts); err != nil {
			return err
		}
		if err := writeLicenses(ctx, *directory, parts, *debs); err != nil {
			return err
		}
		fmt.Printf("%d parts, each with a licence text and an allowed licence\n", len(parts))
	}
	if *sbom != "" {
		classify(known, parts)
		if err := writeSBOM(*sbom, *subject, *version, *date, parts); err != nil {
			return err
		}
		fmt.Printf("%d parts in %s\n", len(parts), *sbom)
	}
	return nil
}
