// Command gosum checks that the modules in Go's module cache are those of go.sum, for `make checksums`.
//
//	gosum DIR...
//
// The go command checks a module once, when it downloads it. `go mod verify` checks it again, but against a hash in the cache, each
// module as often as it is required, and also the archives, which are not compiled. gosum checks the folder of each module once. A
// module that was not downloaded is not compiled either, and is skipped.
package main

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"golang.org/x/mod/module"
	"golang.org/x/mod/sumdb/dirhash"
	"golang.org/x/sync/errgroup"
)

func main() {
	cache, err := exec.Command("go", "env", "GOMODCACHE").Output()
	if err == nil {
		err = check(strings.TrimSpace(string(cache)), os.Args[1:])
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "gosum:", err)
		os.Exit(1)
	}
}

// check compares the modules in the go.sum files of these folders with the cache.
func check(cache string, dirs []string) error {
	sums := map[module.Version]string{}
	for _, dir := range dirs {
		if err := read(filepath.Join(dir, "go.sum"), sums); err != nil {
			return err
		}
	}
	if len(sums) == 0 {
		return errors.New("there is no module to check")
	}
	var group errgroup.Group
	group.SetLimit(runtime.NumCPU())
	wrong := make([]error, len(sums))
	for i, m := range slices.SortedFunc(maps.Keys(sums), func(a, b module.Version) int { return strings.Compare(a.String(), b.String()) }) {
		group.Go(func() error {
			wrong[i] = checkOne(cache, m, sums[m])
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return err
	}
	return errors.Join(wrong...)
}

// read adds the modules of a go.sum to sums. Two files may not have different hashes for a module.
func read(file string, sums map[module.Version]string) error {
	f, err := os.Open(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // a module without requirements has none
	}
	if err != nil {
		return err
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) != 3 {
			return fmt.Errorf("%s: %q is not a line of a go.sum", file, lines.Text())
		}
		if strings.HasSuffix(fields[1], "/go.mod") {
			continue
		}
		m := module.Version{Path: fields[0], Version: fields[1]}
		if other, ok := sums[m]; ok && other != fields[2] {
			return fmt.Errorf("%s: %s has the hash %s, and %s in another go.sum", file, m, fields[2], other)
		}
		sums[m] = fields[2]
	}
	return lines.Err()
}

func checkOne(cache string, m module.Version, want string) error {
	path, err := module.EscapePath(m.Path)
	if err != nil {
		return err
	}
	version, err := module.EscapeVersion(m.Version)
	if err != nil {
		return err
	}
	dir := filepath.Join(cache, path+"@"+version)
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	got, err := dirhash.HashDir(dir, m.String(), dirhash.Hash1)
	if err != nil {
		return fmt.Errorf("%s: %w", m, err)
	}
	if got != want {
		return fmt.Errorf("%s in %s has the hash %s, and %s in go.sum: it was changed after the download (go clean -modcache removes it)", m, dir, got, want)
	}
	return nil
}
