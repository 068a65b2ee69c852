// Package scanner says what an image is made of, and which known vulnerabilities that has.
//
// Both are the work of upstream programs, unmodified: Syft and Grype. They are one file, polymesh-scanner, that ships beside
// polymesh and not in it, because it is large and not every machine scans (build/upstream/scanner). The package owns how
// they are called: never over the network for a database or a newer version of themselves, and never silently with a
// database that is missing or old. pkg/command and pkg/workflow/deploy call it.
package scanner

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// Program is the file's name.
const Program = "polymesh-scanner"

// MaxDatabaseAge is how old a database may be unless the user says otherwise: Grype's own limit.
const MaxDatabaseAge = 5 * 24 * time.Hour

// Severities are what a scan can fail on, in Grype's words, from the lowest.
func Severities() []string { return []string{"negligible", "low", "medium", "high", "critical"} }

// ReportFormats are those of a scan. The first is the default.
func ReportFormats() []string { return []string{"table", "json", "sarif", "cyclonedx-json"} }

// SBOMFormats are those of a bill of materials. The first is the default.
func SBOMFormats() []string { return []string{"cyclonedx-json", "spdx-json", "syft-json", "table"} }

// Scanner is the program and its database.
type Scanner struct {
	path string
	// database is the folder of the vulnerability database.
	database string
}

// Find finds the program: beside the file that self names, or else in PATH. self is polymesh as it was called, os.Args[0].
// database is the folder of the vulnerability database, or empty for the user's cache.
func Find(self, database string) (*Scanner, error) {
	path, err := find(self)
	if err != nil {
		return nil, err
	}
	if database == "" {
		cache, err := os.UserCacheDir()
		if err != nil {
			return nil, fmt.Errorf("find a folder for the vulnerability database: %w. Name one with --db", err)
		}
		database = filepath.Join(cache, "polymesh", "vulnerabilities")
	}
	if database, err = filepath.Abs(database); err != nil {
		return nil, err
	}
	return &Scanner{path: path, database: database}, nil
}

func find(self string) (string, error) {
	dir := "PATH"
	if here, err := exec.LookPath(self); err == nil {
		if here, err = filepath.EvalSymlinks(here); err != nil {
			return "", err
		}
		if here, err = filepath.Abs(here); err != nil {
			return "", err
		}
		beside := filepath.Join(filepath.Dir(here), Program)
		if _, err := exec.LookPath(beside); err == nil {
			return beside, nil
		}
		dir = filepath.Dir(here) + " or in PATH"
	}
	path, err := exec.LookPath(Program)
	if err != nil {
		return "", fmt.Errorf("%s is not in %s: it is a file of its own that ships beside polymesh; put it there (to build it: make scanner)", Program, dir)
	}
	return filepath.Abs(path)
}

// Image is an image where the programs can read it.
type Image struct {
	// Name is what reports call it.
	Name string
	// Location is Syft's: a scheme such as "oci-archive" with a path or reference behind it.
	Location string
}

// ErrFound says that a scan has found what it was told to fail on. The report names it.
var ErrFound = errors.New("vulnerabilities found")

// Scan writes a report on an image in one of ReportFormats. With failOn, one of Severities, it returns ErrFound if
// something of that severity or worse is in it. onlyFixed leaves out what no newer version mends.
func (s *Scanner) Scan(ctx context.Context, image Image, format, failOn string, onlyFixed bool, report io.Writer) error {
	args := []string{"grype", image.Location, "--name", image.Name, "--output", format, "--quiet"}
	if failOn != "" {
		args = append(args, "--fail-on", failOn)
	}
	if onlyFixed {
		args = append(args, "--only-fixed")
	}
	err := s.run(ctx, report, args...)
	var exit *exec.ExitError
	// Grype's exit code for this alone.
	if errors.As(err, &exit) && exit.ExitCode() == 2 {
		return ErrFound
	}
	if err != nil {
		return fmt.Errorf("scan %s: %w", image.Name, err)
	}
	return nil
}

// SBOM writes the bill of materials of an image, in one of SBOMFormats.
func (s *Scanner) SBOM(ctx context.Context, image Image, format string, w io.Writer) error {
	err := s.run(ctx, w, "syft", "scan", image.Location, "--source-name", image.Name, "--output", format, "--quiet")
	if err != nil {
		return fmt.Errorf("list what %s is made of: %w", image.Name, err)
	}
	return nil
}

// Database is what is known of the vulnerability database.
type Database struct {
	Path   string    `json:"path"`
	Schema string    `json:"schema"`
	Built  time.Time `json:"built"`
	// From is where it was imported from.
	From string `json:"from,omitempty"`
}

// Age is the time since it was built.
func (d Database) Age(now time.Time) time.Duration { return now.Sub(d.Built) }

// ErrNoDatabase says that none was imported yet.
var ErrNoDatabase = errors.New("there is no vulnerability database")

// Status reads what is known of the database. Its error wraps ErrNoDatabase when there is none.
func (s *Scanner) Status(ctx context.Context) (Database, error) {
	if entries, err := os.ReadDir(s.database); errors.Is(err, fs.ErrNotExist) || err == nil && len(entries) == 0 {
		return Database{}, fmt.Errorf("%w in %s: `polymesh image db import FILE` brings one; FILE comes from %s", ErrNoDatabase, s.database, source)
	}
	var out bytes.Buffer
	if err := s.run(ctx, &out, "grype", "db", "status", "--output", "json", "--quiet"); err != nil {
		return Database{}, fmt.Errorf("the vulnerability database in %s cannot be used: %w. `polymesh image db import FILE` brings a new one", s.database, err)
	}
	var status struct {
		SchemaVersion, From, Path string
		Built                     time.Time
	}
	if err := json.Unmarshal(out.Bytes(), &status); err != nil {
		return Database{}, fmt.Errorf("read the database's status: %w", err)
	}
	return Database{Path: status.Path, Schema: status.SchemaVersion, Built: status.Built, From: status.From}, nil
}

// source is where databases are published; its latest.json names the newest one, with its checksum.
const source = "https://grype.anchore.io/databases/v6/latest.json"

// CheckAge refuses a database that is older than max; 0 lets any through.
func CheckAge(d Database, max time.Duration, now time.Time) error {
	if age := d.Age(now); max > 0 && age > max {
		return fmt.Errorf("the vulnerability database is of %s, %s old, and what became known since is not in it: import a newer one (`polymesh image db import FILE`), or let it be older with --max-db-age",
			d.Built.Format(time.DateOnly), Days(age))
	}
	return nil
}

// Days words an age.
func Days(age time.Duration) string {
	switch days := int(age / (24 * time.Hour)); days {
	case 0:
		return "less than a day"
	case 1:
		return "1 day"
	default:
		return fmt.Sprintf("%d days", days)
	}
}

// Import makes a published database file the one that scans use. checksum, if it is not empty, is "sha256:" and 64 hex
// digits: the one that was published with the file.
func (s *Scanner) Import(ctx context.Context, file, checksum string) error {
	if err := check(file, checksum); err != nil {
		return err
	}
	if err := os.MkdirAll(s.database, 0o755); err != nil {
		return err
	}
	if err := s.run(ctx, io.Discard, "grype", "db", "import", file, "--quiet"); err != nil {
		return fmt.Errorf("import %s: %w", file, err)
	}
	return nil
}

func check(file, checksum string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	if checksum == "" {
		return nil
	}
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return fmt.Errorf("read %s: %w", file, err)
	}
	if got := "sha256:" + hex.EncodeToString(h.Sum(nil)); got != strings.ToLower(checksum) {
		return fmt.Errorf("%s has the checksum %s, not %s: it is damaged, or not the file that was published", file, got, checksum)
	}
	return nil
}

// run runs the program; what it says on standard error becomes part of the error.
func (s *Scanner) run(ctx context.Context, out io.Writer, args ...string) error {
	var said bytes.Buffer
	cmd := exec.CommandContext(ctx, s.path, args...)
	cmd.Stdout, cmd.Stderr = out, &said
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 10 * time.Second
	// The age is judged here, once, so that the message can say what to do; and what a scan reads does not depend on
	// whether the machine is online.
	cmd.Env = append(os.Environ(),
		"GRYPE_DB_CACHE_DIR="+s.database, "GRYPE_DB_AUTO_UPDATE=false", "GRYPE_DB_VALIDATE_AGE=false",
		"GRYPE_CHECK_FOR_APP_UPDATE=false", "SYFT_CHECK_FOR_APP_UPDATE=false")
	err := cmd.Run()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if text := strings.TrimSpace(said.String()); err != nil && text != "" {
		return fmt.Errorf("%w: %s", err, text)
	}
	return err
}
