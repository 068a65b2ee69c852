package lanes

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// TestMain lets this program run in lanes, as package e2e does: its tests are those called TestLane…
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

// TestLaneFlaky fails the first time.
func TestLaneFlaky(t *testing.T) {
	inLane(t)
	file := os.Getenv("LANES_FLAKY")
	if _, err := os.Stat(file); file != "" && err != nil {
		if err := os.WriteFile(file, nil, 0o600); err != nil {
			t.Error(err)
		}
		t.Error("it fails the first time")
	}
}
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

// A lane whose process dies continues with another one, and reports which test died of what.
func TestRun(t *testing.T) {
	o, out := options(t, "^TestLane")
	err := Run(t.Context(), o)
	if want := "failed: TestLaneBad, TestLaneDies"; fmt.Sprint(err) != want {
		t.Errorf("got %v, want %s", err, want)
	}
	for _, want := range []string{
		"said in a part", "said aloud", "=== failed: TestLaneBad\n", "this is wrong", "=== failed: TestLaneDies\n", "the last words",
		"4 end-to-end tests passed, 2 failed, 1 were skipped, 0 did not run",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("it does not print %q", want)
		}
	}
	if t.Failed() {
		t.Logf("it prints\n%s", out)
	}
	known := readDurations(o.Durations)
	if len(known) != 4 {
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
	if passed != 5 {
		t.Errorf("%d events of tests and parts that passed, want 5", passed)
	}
}

// A test that fails once is repeated, if that is wanted and few failed, and reported.
func TestRepeat(t *testing.T) {
	for _, c := range []struct {
		run    string
		repeat int
		want   string
		says   []string
		not    string
	}{
		{"^TestLane(Good|Flaky)$", 1, "<nil>", []string{"=== failed: TestLaneFlaky\n", "=== once more: TestLaneFlaky\n", "=== FLAKY, failed and then passed; the first output is above: TestLaneFlaky\n"}, ""},
		{"^TestLane(Good|Flaky)$", 0, "failed: TestLaneFlaky", nil, "once more"},
		{"^TestLaneBad$", 1, "twice: failed: TestLaneBad", []string{"=== once more: TestLaneBad\n"}, "FLAKY"},
		{"^TestLane(Bad|Flaky)$", 1, "failed: TestLaneBad, TestLaneFlaky", nil, "once more"},
	} {
		t.Run(fmt.Sprint(c.run, c.repeat), func(t *testing.T) {
			o, out := options(t, c.run)
			o.Repeat = c.repeat
			t.Setenv("LANES_FLAKY", filepath.Join(t.TempDir(), "failed"))
			if err := Run(t.Context(), o); fmt.Sprint(err) != c.want {
				t.Errorf("got %v, want %s", err, c.want)
			}
			for _, says := range c.says {
				if !strings.Contains(out.String(), says) {
					t.Errorf("it does not print %q: %s", says, out)
				}
			}
			if c.not != "" && strings.Contains(out.String(), c.not) {
				t.Errorf("it prints %q: %s", c.not, out)
			}
		})
	}
}

func TestPlanRefusesSilence(t *testing.T) {
	t.Setenv("LANES_SILENT", "1")
	o, _ := options(t, "^TestLane(Good|Silent)$")
	if tests, err := o.Plan(t.Context()); err == nil || !strings.Contains(err.Error(), "TestLaneSilent does not declare what it needs") {
		t.Errorf("got %v, %v", tests, err)
	}
}

// When the run is ended, so are the lanes, and the tests that did not run are reported.
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

// play plays a whole run: the lane that is free first takes the next test. It returns which tests each lane has run, and until
// when. A lane that waits requests again when another one has finished a test.
func play(t *testing.T, q *queue, broken int) (runs [][]string, ends []time.Duration) {
	t.Helper()
	runs, ends = make([][]string, q.lanes), make([]time.Duration, q.lanes)
	states := make([]SharedNode, q.lanes)
	ended, waiting := make([]bool, q.lanes), make([]bool, q.lanes)
	first := func(but []bool) int {
		lane := -1
		for i := range ends {
			if !ended[i] && !but[i] && (lane < 0 || ends[i] < ends[lane]) {
				lane = i
			}
		}
		return lane
	}
	for {
		lane := first(ended)
		if lane < 0 {
			return runs, ends
		}
		q.finished(lane, states[lane])
		next, ok, wait := q.take(lane, states[lane])
		if wait {
			waiting[lane] = true
			busy := first(waiting)
			if busy < 0 {
				t.Fatalf("all lanes wait: %v are left", q.left)
			}
			ends[lane] = ends[busy] + 1
			continue
		}
		clear(waiting)
		if !ok {
			ended[lane] = true
			q.leave(lane)
			continue
		}
		if next.Shared && states[lane] == NoNode {
			states[lane] = NodeUp
			ends[lane] += bringUp
			if lane == broken {
				states[lane] = NodeBroken
			}
		}
		runs[lane] = append(runs[lane], next.Name)
		ends[lane] += q.duration(next)
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
		runs, ends := play(t, newQueue(all, known, lanes), -1)
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
	runs, _ := play(t, newQueue(many("Shared", 10, Test{Shared: true}), nil, 2), 0)
	if len(runs[0]) != 1 || len(runs[1]) != 9 {
		t.Errorf("the lanes ran %v", runs)
	}
	q := newQueue(many("Shared", 3, Test{Shared: true}), nil, 1)
	if runs, _ := play(t, q, 0); len(runs[0]) != 1 || len(q.rest()) != 2 {
		t.Errorf("the only lane ran %v, and %v are left", runs, q.rest())
	}
}

// A second shared node is not brought up for the last minute.
func TestOneSharedNodeIsEnough(t *testing.T) {
	runs, _ := play(t, newQueue(slices.Concat(many("Shared", 2, Test{Shared: true}), many("Own", 1, Test{Nodes: 1})), nil, 2), -1)
	if len(runs[0]) != 2 {
		t.Errorf("the lanes ran %v", runs)
	}
}

// Every test runs, whatever is known of the durations and whichever lane has no node: no lane ends while a test is left that
// only it can run.
func TestEveryTestRuns(t *testing.T) {
	durations := []time.Duration{0, time.Second, time.Minute, 5 * time.Minute}
	for seed := range uint64(2000) {
		random := rand.New(rand.NewPCG(seed, 0))
		var tests []Test
		known := map[string]time.Duration{}
		for i := range 1 + random.IntN(8) {
			test := Test{Name: fmt.Sprintf("Test%d", i), Nodes: random.IntN(4)}
			test.Shared = test.Nodes == 0 && random.IntN(4) > 0
			tests, known[test.Name] = append(tests, test), durations[random.IntN(len(durations))]
		}
		lanes := 1 + random.IntN(3)
		broken := random.IntN(lanes+1) - 1
		if lanes == 1 {
			broken = -1 // nothing could run the tests that share a node
		}
		q := newQueue(tests, known, lanes)
		runs, _ := play(t, q, broken)
		if names := slices.Concat(runs...); len(names) != len(tests) || len(q.rest()) > 0 {
			t.Fatalf("seed %d: %d lanes, the node of lane %d is broken: %v of %v ran, with durations %v", seed, lanes, broken, runs, tests, known)
		}
	}
}

// Tests that share a node also run if their recorded duration is 0, and if a lane requests the last one while another lane's node may
// be meant for it.
func TestSharedTestIsNotForgotten(t *testing.T) {
	ready := Test{Name: "Ready", Shared: true}
	q := newQueue([]Test{{Name: "Own", Nodes: 1}, ready}, map[string]time.Duration{"Own": time.Minute, "Ready": 0}, 2)
	if runs, _ := play(t, q, -1); len(slices.Concat(runs...)) != 2 {
		t.Errorf("the lanes ran %v", runs)
	}
	q = newQueue([]Test{ready}, nil, 2)
	q.running[0], q.up[0] = Test{Name: "Other", Shared: true}, true
	if i, wait := q.choose(1, NoNode); i >= 0 || !wait {
		t.Errorf("beside another lane's node, the lane without one gets test %d, wait %v", i, wait)
	}
}

// A lane that has ended does not keep others waiting, and gets no test.
func TestEndedLane(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		large := Test{Name: "Large", Nodes: 3}
		q := newQueue([]Test{large}, nil, 3)
		q.running[0] = Test{Name: "Other", Nodes: 3}
		var got [3]string
		for lane := 1; lane < 3; lane++ {
			go func() {
				next, _ := q.next(lane, NoNode)
				got[lane] = next.Name
			}()
		}
		synctest.Wait()
		q.leave(1)
		synctest.Wait()
		q.leave(0)
		synctest.Wait()
		if got[1] != "" || got[2] != "Large" {
			t.Errorf("lane 1 has got %q, and lane 2 %q", got[1], got[2])
		}
	})
}

// A cluster of three nodes or more runs beside tests with one node, and waits until no other cluster runs.
func TestManyNodes(t *testing.T) {
	for _, c := range []struct {
		running, next Test
		fits          bool
	}{
		{Test{Nodes: 1}, Test{Nodes: 5}, true},
		{Test{Nodes: 5}, Test{Nodes: 1}, true},
		{Test{Nodes: 5}, Test{Shared: true}, true},
		{Test{Nodes: 5}, Test{}, true},
		{Test{Nodes: 2}, Test{Nodes: 2}, true},
		{Test{Nodes: 2}, Test{Nodes: 3}, false},
		{Test{Nodes: 3}, Test{Nodes: 2}, false},
		{Test{Nodes: 5}, Test{Nodes: 3}, false},
	} {
		c.running.Name, c.next.Name = "Running", "Next"
		q := newQueue([]Test{c.next}, nil, 2)
		q.running[0] = c.running
		i, wait := q.choose(1, NoNode)
		if fits := i == 0; fits != c.fits || wait == fits {
			t.Errorf("beside %s, %s: got test %d, wait %v", c.running, c.next, i, wait)
		}
		delete(q.running, 0)
		if i, _ := q.choose(1, NoNode); i != 0 {
			t.Errorf("%s does not run alone", c.next)
		}
	}
}
