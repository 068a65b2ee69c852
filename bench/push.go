package main

import (
	"context"
	"fmt"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
)

// pushID names a figure of the benchmark of pushes; name is what go test calls it.
func pushID(name string) figureID { return figureID("push " + name) }

// pushKinds are what BenchmarkPush tells apart: nothing has changed since the last push, or all has.
var pushKinds = []string{"cached", "changed"}

// pushes runs the dialect's benchmark of what one sidecar gets in a full push, with and without the translation.
func (b *bench) pushes(ctx context.Context) error {
	test := filepath.Join(b.top, ".build", "bench", "dialect.test")
	dir := filepath.Join(b.top, "pkg", "mesh", "dialect")
	compile := exec.CommandContext(ctx, "go", "test", "-tags", "netgo osusergo sqlite_omit_load_extension", "-c", "-o", test, ".")
	compile.Dir = dir
	if out, err := compile.CombinedOutput(); err != nil {
		return fmt.Errorf("compile the dialect's benchmark: %w: %s", err, out)
	}
	cmd := exec.CommandContext(ctx, test, "-test.run=^$", "-test.bench=Push", "-test.benchtime=5s")
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("the dialect's benchmark: %w: %s", err, out)
	}
	took, err := nanoseconds(string(out), "BenchmarkPush/")
	if err != nil {
		return err
	}
	for _, kind := range pushKinds {
		istiod, dialect := took[kind+"/istiod"], took[kind+"/dialect"]
		if istiod == 0 || dialect == 0 {
			return fmt.Errorf("the dialect's benchmark says nothing of %s pushes: %s", kind, out)
		}
		b.results.add(pushID(kind+"/istiod"), istiod/1e6)
		b.results.add(pushID(kind+"/dialect"), dialect/1e6)
		b.results.add(pushID(kind), 100*(dialect/istiod-1))
	}
	return nil
}

// nanoseconds reads the time of each operation from what a Go benchmark prints, by name without this prefix and the
// number of processors.
func nanoseconds(out, prefix string) (map[string]float64, error) {
	took := map[string]float64{}
	for text := range strings.Lines(out) {
		f := strings.Fields(text)
		if len(f) < 4 || !strings.HasPrefix(f[0], prefix) || f[3] != "ns/op" {
			continue
		}
		value, err := strconv.ParseFloat(f[2], 64)
		if err != nil {
			return nil, fmt.Errorf("read the benchmark's %q: %w", strings.TrimSpace(text), err)
		}
		name := strings.TrimPrefix(f[0], prefix)
		if at := strings.LastIndexByte(name, '-'); at > 0 {
			name = name[:at]
		}
		took[name] = value
	}
	return took, nil
}
