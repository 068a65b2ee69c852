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
	r := newResults()
	r.add(fileSize, 158.4)
	for _, v := range []float64{21.04, 18.9, 19.97} {
		r.add(meshIngress, v)
		r.add(meshAll, v+1)
		r.add(meshAllAgain, v/3)
		r.add(loadBefore, v/100)
	}
	r.add("bare server RSS", 251.3)
	r.addProcesses(bareIdle, []process{
		{Name: serverProcess, RSS: 251.3, Anonymous: 140.2, CPU: 2.5},
		{Name: shimProcess, RSS: 12, Anonymous: 4, CPU: 0}, {Name: shimProcess, RSS: 14, Anonymous: 6, CPU: 0.04},
	})
	r.verdict(smallBare, "yes")
	r.verdict(smallBare, "yes")
	r.verdict(smallMesh, "yes")
	r.verdict(smallMesh, "no: the server has ended")
	got := report(machine{Date: "2026-01-02", CPU: "Some CPU", Kernel: "6.1.0", System: "Debian", Polymesh: "polymesh 1.0", Cores: 2, Memory: 25.2},
		options{runs: 3, settle: time.Minute, idle: time.Minute}, r)
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
			t.Errorf("%v is given as %s, want %s", v, got, want)
		}
	}
}
