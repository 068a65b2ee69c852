package main

import (
	"flag"
	"os"
	"path/filepath"
	"testing"
	"time"
)

var update = flag.Bool("update", false, "write the golden file")

func TestReport(t *testing.T) {
	first, second := newResults(), newResults()
	first.add(fileSize, 158.4)
	for _, v := range []float64{21.04, 18.9, 19.97} {
		first.add(meshIngress, v)
		first.add(meshAll, v+1)
		first.add(meshAllAgain, v/3)
		second.add(two.figure(topRate, "p99"), v/10)
		second.add(two.figure(topRate, "client CPU"), v/100)
	}
	first.add("bare server RSS", 251.3)
	first.addProcesses(bareIdle, []process{
		{Name: serverProcess, RSS: 251.3, Anonymous: 140.2, CPU: 2.5},
		{Name: shimProcess, RSS: 12, Anonymous: 4, CPU: 0}, {Name: shimProcess, RSS: 14, Anonymous: 6, CPU: 0.04},
	})
	for i, c := range collectors {
		for _, v := range []float64{7, 7.5, 6.8} {
			first.add(c.figure("create p50"), v+float64(i))
			first.add(c.figure("anonymous after"), 20*v)
		}
	}
	first.verdict(smallBare, "yes")
	first.verdict(smallBare, "yes")
	first.verdict(smallMesh, "yes")
	first.verdict(smallMesh, "no: the server has ended")
	second.add(direct.figure(topRate, "p99"), 0.5)
	second.add(pushID("Push/http/route"), 8.25)
	m := machine{Date: "2026-01-02", CPU: "Some CPU", Kernel: "6.1.0", System: "Debian", Polymesh: "polymesh 1.0", Cores: 2, Memory: 25.2}
	later := m
	later.Date, later.Polymesh = "2026-02-03", "polymesh 1.1"
	o := options{settle: time.Minute, idle: time.Minute, load: 20 * time.Second}

	// Two parts measured at different times; the file keeps both.
	file := filepath.Join(t.TempDir(), "results.json")
	err := records{
		"first":  {Machine: m, Settings: o.settings(), Runs: 3, Load: []float64{0.21, 0.19, 0.2}, Results: first},
		"second": {Machine: later, Settings: o.settings(), Runs: 1, Load: []float64{1.5}, Results: second},
	}.write(file)
	if err != nil {
		t.Fatal(err)
	}
	kept, err := readRecords(file)
	if err != nil {
		t.Fatal(err)
	}
	got := report([]part{{name: "first"}, {name: "second"}, {name: "third"}}, kept)
	golden := filepath.Join("testdata", "report.md")
	if *update {
		if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("the report differs from %s (go test -update writes it):\n%s", golden, got)
	}
}

func TestMedian(t *testing.T) {
	for want, values := range map[float64][]float64{3: {3}, 2: {3, 1}, 5: {9, 5, 1}, 2.5: {4, 1, 3, 2}} {
		if got := median(values); got != want {
			t.Errorf("median of %v is %v, want %v", values, got, want)
		}
	}
}

func TestNumber(t *testing.T) {
	for v, want := range map[float64]string{0: "0", 0.034: "0.03", 1.5: "1.50", 20: "20", 20.04: "20.0", 251.6: "252"} {
		if got := number(v); got != want {
			t.Errorf("%v is formatted as %s, want %s", v, got, want)
		}
	}
}

func TestMetrics(t *testing.T) {
	const out = "goos: linux\nBenchmarkPush/http/cached-2   \t       5\t   8.25 added-%\t  11048573 istiod-cpu-ns/push\nBenchmarkPush/http/cached/x\t 3\t 2.5 ns/op\nPASS\n"
	got := metrics(out, "BenchmarkPush/http/cached")
	if len(got) != 2 || got["added-%"] != 8.25 || got["istiod-cpu-ns/push"] != 11048573 {
		t.Errorf("got %v", got)
	}
}
