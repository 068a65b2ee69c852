package lanes

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestMain makes this program one that can be run in lanes, as package e2e is: its tests are those called TestLane…
func TestMain(m *testing.M) {
	flag.Parse()
	if !InLane() {
		os.Exit(m.Run())
	}
	code := 0
	for {
		name, err := Next(context.Background(), NoNode)
		if err != nil || name == "" {
			os.Exit(code)
		}
		if err := flag.Set("test.run", "^"+name+"$"); err != nil {
			os.Exit(1)
		}
		code = max(code, m.Run())
	}
}

func inLane(t *testing.T) {
	t.Helper()
	if file := os.Getenv(PlanEnv); file != "" {
		if err := Declare(file, Test{Name: t.Name(), Nodes: 1}); err != nil {
			t.Fatal(err)
		}
		t.SkipNow()
	}
	if !InLane() {
		t.Skip("it is run by TestRun")
	}
}

func TestLaneGood(t *testing.T) {
	inLane(t)
	t.Run("part", func(t *testing.T) { t.Log("said in a part") })
}
func TestLaneGoodAgain(t *testing.T) { inLane(t); fmt.Println("said aloud") }
func TestLaneBad(t *testing.T)       { inLane(t); t.Error("this is wrong") }
func TestLaneDies(t *testing.T) {
	inLane(t)
	fmt.Println("the last words")
	os.Exit(3)
}
func TestLaneSkipped(t *testing.T) { inLane(t); t.Skip("not here") }
func TestLaneSilent(t *testing.T) {
	if os.Getenv("LANES_SILENT") == "" {
		inLane(t)
	}
}

func options(t *testing.T, run string) (Options, *strings.Builder) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	var out strings.Builder
	return Options{
		Program: self, Dir: dir, Package: "lanes", Lanes: 2, Run: run, Timeout: time.Minute, Out: &out,
		Events: filepath.Join(dir, "events.json"), Durations: filepath.Join(dir, "durations.json"),
	}, &out
}

// A lane whose process dies goes on with another one, and says which test died of what.
func TestRun(t *testing.T) {
	o, out := options(t, "^TestLane")
	err := Run(t.Context(), o)
	if want := "failed: TestLaneBad, TestLaneDies"; fmt.Sprint(err) != want {
		t.Errorf("got %v, want %s", err, want)
	}
	for _, want := range []string{
		"said in a part", "said aloud", "=== failed: TestLaneBad\n", "this is wrong", "=== failed: TestLaneDies\n", "the last words",
		"3 end-to-end tests passed, 2 failed, 1 were skipped, 0 did not run",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("it does not say %q", want)
		}
	}
	if t.Failed() {
		t.Logf("it says\n%s", out)
	}
	known := readDurations(o.Durations)
	if len(known) != 3 {
		t.Errorf("what took how long: %v", known)
	}
	text, err := os.ReadFile(o.Events)
	if err != nil {
		t.Fatal(err)
	}
	passed := 0
	for line := range strings.Lines(string(text)) {
		var e event
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			t.Errorf("%s: %v", line, err)
		}
		if e.Action == "pass" && e.Test != "" {
			passed++
		}
	}
	if passed != 4 {
		t.Errorf("%d events of tests and parts that passed, want 4", passed)
	}
}

func TestPlanRefusesSilence(t *testing.T) {
	t.Setenv("LANES_SILENT", "1")
	o, _ := options(t, "^TestLane(Good|Silent)$")
	if tests, err := o.Plan(t.Context()); err == nil || !strings.Contains(err.Error(), "TestLaneSilent does not say what it needs") {
		t.Errorf("got %v, %v", tests, err)
	}
}

// When the run is ended, so are the lanes, and what did not run is said.
func TestRunEnds(t *testing.T) {
	o, out := options(t, "^TestLaneGood")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(fmt.Errorf("interrupted"))
	if _, err := o.Plan(ctx); err == nil {
		t.Error("a plan was made after the end")
	}
	tests := []Test{{Name: "TestLaneGood", Nodes: 1}}
	r := &run{Options: o, queue: newQueue(tests, nil, 1)}
	r.queue.close()
	if _, ok := r.queue.next(0, NoNode); ok {
		t.Error("a test was handed out after the end")
	}
	if err := r.report(ctx, tests); err == nil || !strings.Contains(err.Error(), "did not run: TestLaneGood") || !strings.Contains(err.Error(), "interrupted") {
		t.Errorf("got %v: %s", err, out)
	}
}

// take plays a whole run: whoever is free first takes the next test. It returns what each lane has run, and until when.
func take(q *queue, broken int) (runs [][]string, ends []time.Duration) {
	runs, ends = make([][]string, q.lanes), make([]time.Duration, q.lanes)
	states := make([]SharedNode, q.lanes)
	open := make([]bool, q.lanes)
	for i := range open {
		open[i] = true
	}
	for {
		lane := -1
		for i := range ends {
			if open[i] && (lane < 0 || ends[i] < ends[lane]) {
				lane = i
			}
		}
		if lane < 0 {
			return runs, ends
		}
		t, ok := q.next(lane, states[lane])
		if !ok {
			open[lane] = false
			continue
		}
		if t.Shared && states[lane] == NoNode {
			states[lane] = NodeUp
			ends[lane] += bringUp
			if lane == broken {
				states[lane] = NodeBroken
			}
		}
		runs[lane] = append(runs[lane], t.Name)
		ends[lane] += q.duration(t)
	}
}

func many(name string, count int, t Test) (tests []Test) {
	for i := range count {
		t.Name = fmt.Sprintf("%s%d", name, i)
		tests = append(tests, t)
	}
	return tests
}

func TestOrder(t *testing.T) {
	all := slices.Concat(many("Shared", 40, Test{Shared: true}), many("Own", 12, Test{Nodes: 1}))
	known := map[string]time.Duration{"Shared7": 6 * time.Minute, "Own3": 4 * time.Minute}
	for lanes := 1; lanes <= 4; lanes++ {
		runs, ends := take(newQueue(all, known, lanes), -1)
		seen := map[string]bool{}
		for _, name := range slices.Concat(runs...) {
			if seen[name] {
				t.Errorf("%d lanes: %s ran twice", lanes, name)
			}
			seen[name] = true
		}
		if len(seen) != len(all) {
			t.Errorf("%d lanes: %d of %d tests ran", lanes, len(seen), len(all))
		}
		if apart := slices.Max(ends) - slices.Min(ends); apart > 2*time.Minute {
			t.Errorf("%d lanes end at %v: %v", lanes, ends, runs)
		}
		if runs[0][0] != "Shared7" || lanes > 1 && runs[lanes-1][0] != "Own3" {
			t.Errorf("%d lanes do not begin with the longest ones: %v", lanes, runs)
		}
	}
}

// A lane whose shared node is broken leaves the tests that need one to the others.
func TestBrokenNode(t *testing.T) {
	runs, _ := take(newQueue(many("Shared", 10, Test{Shared: true}), nil, 2), 0)
	if len(runs[0]) != 1 || len(runs[1]) != 9 {
		t.Errorf("the lanes ran %v", runs)
	}
	q := newQueue(many("Shared", 3, Test{Shared: true}), nil, 1)
	if runs, _ := take(q, 0); len(runs[0]) != 1 || len(q.rest()) != 2 {
		t.Errorf("the only lane ran %v, and %v are left", runs, q.rest())
	}
}

// A second shared node is not made for the last minute.
func TestOneSharedNodeIsEnough(t *testing.T) {
	runs, _ := take(newQueue(slices.Concat(many("Shared", 2, Test{Shared: true}), many("Own", 1, Test{Nodes: 1})), nil, 2), -1)
	if len(runs[0]) != 2 {
		t.Errorf("the lanes ran %v", runs)
	}
}

// A test with many nodes waits until it is alone, and the others wait for it.
func TestManyNodes(t *testing.T) {
	five := Test{Name: "Five", Nodes: 5}
	q := newQueue([]Test{five, {Name: "One", Nodes: 1}}, nil, 2)
	q.running[0] = Test{Name: "Other", Nodes: 1}
	if next, _ := q.next(1, NoNode); next.Name != "One" {
		t.Fatalf("got %v", next)
	}
	delete(q.running, 1)
	if i, wait := q.choose(1, NoNode); i >= 0 || !wait {
		t.Errorf("beside another test, lane 2 gets test %d, wait %v", i, wait)
	}
	delete(q.running, 0)
	if next, _ := q.next(0, NoNode); next != five {
		t.Errorf("got %v", next)
	}
	q.left = []Test{{Name: "Last", Nodes: 1}}
	if i, wait := q.choose(1, NoNode); i >= 0 || !wait {
		t.Errorf("beside the test with five nodes, lane 2 gets test %d, wait %v", i, wait)
	}
}
