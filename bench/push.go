package main

import (
	"context"
	"fmt"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
)

// pushID returns the id of a push benchmark's figure; name is the benchmark's name in go test.
func pushID(name string) figureID { return figureID("push " + name) }

// pushKinds are the variants of BenchmarkPush and BenchmarkGenerate.
var pushKinds = []struct{ name, text string }{
	{"Push/http/route", "HTTP, a route has changed, one sidecar"},
	{"Push/http/all", "HTTP, all has changed, one sidecar"},
	{"Push/http/ten", "HTTP, all has changed, each of ten"},
	{"Push/tcp/route", "TCP, a route has changed, one sidecar"},
	{"Push/tcp/all", "TCP, all has changed, one sidecar"},
	{"Push/tcp/ten", "TCP, all has changed, each of ten"},
	{"Generate/http/cached", "only generation, HTTP, all is cached"},
	{"Generate/http/changed", "only generation, HTTP, all has changed, one sidecar"},
	{"Generate/http/mesh", "only generation, HTTP, all has changed, each of ten"},
	{"Generate/tcp/cached", "only generation, TCP, all is cached"},
	{"Generate/tcp/changed", "only generation, TCP, all has changed, one sidecar"},
	{"Generate/tcp/mesh", "only generation, TCP, all has changed, each of ten"},
}

// pushRows are the rows of the report.
func pushRows() []row {
	var rows []row
	for _, kind := range pushKinds {
		rows = append(rows,
			row{pushID(kind.name + "/istiod"), kind.text + ": istiod", "ms", "", ""},
			row{pushID(kind.name), kind.text + ": more with the translation", "%", "10 %", ""})
	}
	return rows
}

// pushes runs the dialect's benchmarks of pushes, with and without the translation.
func (b *bench) pushes(ctx context.Context) error {
	test := filepath.Join(b.top, ".build", "bench", "dialect.test")
	dir := filepath.Join(b.top, "pkg", "mesh", "dialect")
	compile := exec.CommandContext(ctx, "go", "test", "-tags", "netgo osusergo sqlite_omit_load_extension", "-c", "-o", test, ".")
	compile.Dir = dir
	if out, err := compile.CombinedOutput(); err != nil {
		return fmt.Errorf("compile the dialect's benchmark: %w: %s", err, out)
	}
	cmd := exec.CommandContext(ctx, test, "-test.run=^$", "-test.bench=Push|Generate", "-test.benchtime=5x")
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("the dialect's benchmark: %w: %s", err, out)
	}
	for _, kind := range pushKinds {
		found := metrics(string(out), "Benchmark"+kind.name)
		istiod, ok := found["istiod-cpu-ns/push"]
		added, more := found["added-%"]
		if !ok || !more {
			return fmt.Errorf("the dialect's benchmark has no result for %s: %s", kind.name, out)
		}
		b.results.add(pushID(kind.name+"/istiod"), istiod/1e6)
		b.results.add(pushID(kind.name), added)
	}
	return nil
}

// metrics returns the values in one line of a Go benchmark's output, by unit. The number of processors follows the name.
func metrics(out, name string) map[string]float64 {
	values := map[string]float64{}
	for text := range strings.Lines(out) {
		f := strings.Fields(text)
		if len(f) < 4 || f[0] != name && !strings.HasPrefix(f[0], name+"-") {
			continue
		}
		for i := 2; i+1 < len(f); i += 2 {
			if value, err := strconv.ParseFloat(f[i], 64); err == nil {
				values[f[i+1]] = value
			}
		}
	}
	return values
}
