// Package scanner lists the contents of an image, and their known vulnerabilities.
//
// Upstream programs do the work, unmodified: Syft and Grype. They are combined in one file, polymesh-scanner, shipped
// next to polymesh and not inside it, because it is large and not every machine needs it (build/upstream/scanner). The
// package owns how they are called: never with network access for a database or updates, and never silently with a
// missing or outdated database. pkg/command and pkg/workflow/deploy call it.
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

// Program is the file name.
const Program = "polymesh-scanner"

// MaxDatabaseAge is the default maximum age of a database: Grype's own limit.
const MaxDatabaseAge = 5 * 24 * time.Hour

// Severities returns the severities that a scan can fail on, in Grype's terms, from the lowest.
func Severities() []string { return []string{"negligible", "low", "medium", "high", "critical"} }

// ReportFormats returns the formats of a scan. The first is the default.
func ReportFormats() []string { return []string{"table", "json", "sarif", "cyclonedx-json"} }

// SBOMFormats returns the formats of a bill of materials. The first is the default.
func SBOMFormats() []string { return []string{"cyclonedx-json", "spdx-json", "syft-json", "table"} }

// Scanner is the program and its database.
type Scanner struct {
	path string
	// database is the folder of the vulnerability database.
	database string
}

// Find finds the program: next to the file that self names, or else in PATH. self is os.Args[0]. database is the folder
// of the vulnerability database, or empty for the user's cache.
func Find(self, database string) (*Scanner, error) {
	path, err := find(self)
	if err != nil {
		return nil, err
	}
	if database == "" {
		cache, err := os.UserCacheDir()
		if err != nil {
			return nil, fmt.Errorf("find a folder for the vulnerability database: %w. Set one with --db", err)
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
		return "", fmt.Errorf("%s is not in %s: it is a separate file that ships with polymesh; put it there (to build it: make scanner)", Program, dir)
	}
	return filepath.Abs(path)
}

// Image is an image in a place that the programs can read.
type Image struct {
	// Name is the image's name in reports.
	Name string
	// Location is Syft's: a scheme such as "oci-archive" followed by a path or reference.
	Location string
}

// ErrFound means that a scan has found what it should fail on. The report lists it.
var ErrFound = errors.New("vulnerabilities found")

// Scan writes a report on an image in one of ReportFormats. With failOn, one of Severities, it returns ErrFound for findings
// of that severity or higher. onlyFixed leaves out vulnerabilities without a fixed version.
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
	// Grype's exit code for this case alone.
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
		return fmt.Errorf("list the contents of %s: %w", image.Name, err)
	}
	return nil
}

// Database is the status of the vulnerability database.
type Database struct {
	Path   string    `json:"path"`
	Schema string    `json:"schema"`
	Built  time.Time `json:"built"`
	// From is the file that it was imported from.
	From string `json:"from,omitempty"`
}

// Age is the time since it was built.
func (d Database) Age(now time.Time) time.Duration { return now.Sub(d.Built) }

// ErrNoDatabase means that none has been imported yet.
var ErrNoDatabase = errors.New("there is no vulnerability database")

// Status reads the status of the database. Its error wraps ErrNoDatabase if there is none.
func (s *Scanner) Status(ctx context.Context) (Database, error) {
	if entries, err := os.ReadDir(s.database); errors.Is(err, fs.ErrNotExist) || err == nil && len(entries) == 0 {
		return Database{}, fmt.Errorf("%w in %s: import one with `polymesh image db import FILE`; FILE comes from %s", ErrNoDatabase, s.database, source)
	}
	var out bytes.Buffer
	if err := s.run(ctx, &out, "grype", "db", "status", "--output", "json", "--quiet"); err != nil {
		return Database{}, fmt.Errorf("the vulnerability database in %s cannot be used: %w. Import a new one with `polymesh image db import FILE`", s.database, err)
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

// CheckAge returns an error if a database is older than max; 0 disables the check.
func CheckAge(d Database, max time.Duration, now time.Time) error {
	if age := d.Age(now); max > 0 && age > max {
		return fmt.Errorf("the vulnerability database is of %s, %s old, and lacks newer vulnerabilities: import a newer one (`polymesh image db import FILE`), or allow an older one with --max-db-age",
			d.Built.Format(time.DateOnly), Days(age))
	}
	return nil
}

// Days formats an age.
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

// Import makes scans use a published database file. checksum, if not empty, is "sha256:" and 64 hex digits, as published
// with the file.
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

// run runs the program; its standard error becomes part of the error.
func (s *Scanner) run(ctx context.Context, out io.Writer, args ...string) error {
	var errOut bytes.Buffer
	cmd := exec.CommandContext(ctx, s.path, args...)
	cmd.Stdout, cmd.Stderr = out, &errOut
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 10 * time.Second
	// The age is checked in CheckAge, so that the message can give advice, and a scan's result does not depend on
	// network access.
	cmd.Env = append(os.Environ(),
		"GRYPE_DB_CACHE_DIR="+s.database, "GRYPE_DB_AUTO_UPDATE=false", "GRYPE_DB_VALIDATE_AGE=false",
		"GRYPE_CHECK_FOR_APP_UPDATE=false", "SYFT_CHECK_FOR_APP_UPDATE=false")
	err := cmd.Run()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if text := strings.TrimSpace(errOut.String()); err != nil && text != "" {
		return fmt.Errorf("%w: %s", err, text)
	}
	return err
}
