// Command database makes a vulnerability database out of a few advisories, with Grype's own builder and in the form in
// which its databases are published. The end-to-end tests scan with it, because the published ones are on the internet.
//
//	database <folder of advisories> <new folder>
//
// The advisories are files of GitHub's advisory database as Vunnel, Grype's collector, writes them.
package main

import (
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/anchore/grype/grype/db"
	"github.com/anchore/grype/grype/db/provider"
	"github.com/anchore/grype/grype/db/v6"
	_ "github.com/glebarez/sqlite" // the driver of the database
)

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: database <folder of advisories> <new folder>")
		os.Exit(2)
	}
	if err := run(os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, "database:", err)
		os.Exit(1)
	}
}

func run(advisories, out string) error {
	now := time.Now()
	state, err := collect(advisories, now, filepath.Join(out, "collected"))
	if err != nil {
		return err
	}
	folder := filepath.Join(out, "database")
	if err := os.MkdirAll(folder, 0o755); err != nil {
		return err
	}
	if err := db.Build(db.BuildConfig{
		SchemaVersion: v6.ModelVersion, Directory: folder, States: provider.States{*state}, Timestamp: now, SQLiteCacheSizeKiB: 1 << 10,
	}); err != nil {
		return fmt.Errorf("build: %w", err)
	}
	// It writes the file's name, which has the time in it, and "latest.json" next to it, with the checksum.
	return db.Package(folder, "", "tar.gz", nil)
}

// collect lays the advisories out as Vunnel leaves them.
func collect(advisories string, at time.Time, out string) (*provider.State, error) {
	files, err := filepath.Glob(filepath.Join(advisories, "*.json"))
	if err != nil || len(files) == 0 {
		return nil, fmt.Errorf("no advisories in %s (%v)", advisories, err)
	}
	w := provider.NewWorkspaceWriter(out, "github")
	var results []provider.File
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			return nil, err
		}
		result, err := w.WriteResult(filepath.Base(file), text)
		if err != nil {
			return nil, err
		}
		results = append(results, *result)
	}
	if err := w.WriteListing(results); err != nil {
		return nil, err
	}
	if err := w.WriteState(provider.State{
		Provider: "github", Version: 2, Processor: "polymesh", Timestamp: at, Listing: &provider.File{Path: "results/listing.xxh64"}, Store: "flat-file",
		Schema: provider.Schema{Version: "1.0.3", URL: "https://raw.githubusercontent.com/anchore/vunnel/main/schema/provider-workspace-state/schema-1.0.3.json"},
	}); err != nil {
		return nil, err
	}
	return provider.ReadState(filepath.Join(out, "github", "metadata.json"))
}
