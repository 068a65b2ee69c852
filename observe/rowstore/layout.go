package rowstore

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"polymesh.dev/polymesh/observe/atomicfile"
)

// The library's layout of a directory, as far as readers and the limit on bytes need it:
//
//	flock.lock
//	partitions/20060102/{indexdb,datadb}/parts.json   the names of the parts that count
//	partitions/20060102/{indexdb,datadb}/<part>/…     files that never change
//	partitions/20060102/datadb/<part>/metadata.json   what is in the part
const (
	lockName      = "flock.lock"
	partitionsDir = "partitions"
	indexDir      = "indexdb"
	dataDir       = "datadb"
	partsFile     = "parts.json"
	metadataFile  = "metadata.json"
	// damagedDir is ours: unreadable days are moved there.
	damagedDir = "damaged"
)

// partName is what the library calls its parts; a name from a file is not followed anywhere else.
var partName = regexp.MustCompile(`^[0-9A-F]{16}$`)

// partitions gives the names of the days in a store's directory, the oldest first.
func partitions(dir string) ([]string, error) {
	entries, err := os.ReadDir(filepath.Join(dir, partitionsDir))
	if err != nil {
		return nil, fmt.Errorf("listing the days: %w", err)
	}
	var names []string
	for _, e := range entries {
		if _, err := time.Parse("20060102", e.Name()); err == nil && e.IsDir() {
			names = append(names, e.Name())
		}
	}
	slices.Sort(names)
	return names, nil
}

// errDamaged means that a file does not contain what the library writes into it.
var errDamaged = errors.New("it is damaged")

// parts gives the names of the parts that count in a table, none when the day is just being made.
func parts(table string) ([]string, error) {
	b, err := os.ReadFile(filepath.Join(table, partsFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("listing the parts: %w", err)
	}
	var names []string
	if err := json.Unmarshal(b, &names); err != nil {
		return nil, fmt.Errorf("listing the parts in %s: %w: %w", table, errDamaged, err)
	}
	for _, name := range names {
		if !partName.MatchString(name) {
			return nil, fmt.Errorf("listing the parts in %s: %w: %.40q is not the name of a part", table, errDamaged, name)
		}
	}
	return names, nil
}

// writeParts replaces the list of parts.
func writeParts(table string, names []string) error {
	if names == nil {
		names = []string{}
	}
	b, err := json.Marshal(names)
	if err != nil {
		return fmt.Errorf("writing the list of parts: %w", err)
	}
	return atomicfile.Write(filepath.Join(table, partsFile), b)
}

// checkPartition returns errors for which the library would end the process when it opens a day: in the lists of parts, the parts and their metadata.
// A day that was just being created or removed is incomplete, but not damaged.
func checkPartition(partition string) error {
	for _, table := range []string{filepath.Join(partition, indexDir), filepath.Join(partition, dataDir)} {
		names, err := parts(table)
		if err != nil {
			return err
		}
		for _, name := range names {
			b, err := os.ReadFile(filepath.Join(table, name, metadataFile))
			if err != nil {
				return fmt.Errorf("reading about a part: %w", err)
			}
			if !json.Valid(b) {
				return fmt.Errorf("reading about the part %s: it is not JSON", name)
			}
		}
	}
	return nil
}

// setAside moves a day out of the library's way.
func setAside(dir, day string) (string, error) {
	if err := os.MkdirAll(filepath.Join(dir, damagedDir), 0o700); err != nil {
		return "", fmt.Errorf("setting aside damaged rows: %w", err)
	}
	tmp, err := os.MkdirTemp(filepath.Join(dir, damagedDir), "")
	if err != nil {
		return "", fmt.Errorf("setting aside damaged rows: %w", err)
	}
	to := filepath.Join(tmp, day)
	if err := os.Rename(filepath.Join(dir, partitionsDir, day), to); err != nil {
		return "", fmt.Errorf("setting aside damaged rows: %w", err)
	}
	return to, nil
}

// part is a part of a day's rows.
type part struct {
	name   string
	bytes  int64
	newest time.Time
}

// dataParts describes the parts of a day's rows, those with the oldest rows first.
func dataParts(partition string) ([]part, error) {
	table := filepath.Join(partition, dataDir)
	names, err := parts(table)
	if err != nil {
		return nil, err
	}
	out := make([]part, 0, len(names))
	for _, name := range names {
		b, err := os.ReadFile(filepath.Join(table, name, metadataFile))
		if err != nil {
			return nil, fmt.Errorf("reading about a part: %w", err)
		}
		var meta struct{ MaxTimestamp int64 }
		if err := json.Unmarshal(b, &meta); err != nil {
			return nil, fmt.Errorf("reading about the part %s: %w", name, err)
		}
		size, err := diskUsage(filepath.Join(table, name))
		if err != nil {
			return nil, err
		}
		out = append(out, part{name: name, bytes: size, newest: time.Unix(0, meta.MaxTimestamp).UTC()})
	}
	slices.SortFunc(out, func(a, b part) int { return a.newest.Compare(b.newest) })
	return out, nil
}

// diskUsage is what a directory takes on disk. Files that go while it looks do not count.
func diskUsage(dir string) (int64, error) {
	var total int64
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err == nil {
			total += st.Blocks * 512
		}
		return nil
	})
	if err != nil {
		return 0, fmt.Errorf("measuring %s: %w", dir, err)
	}
	return total, nil
}
