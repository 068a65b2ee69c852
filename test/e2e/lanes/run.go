package lanes

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Options define what to run.
type Options struct {
	// Program is the compiled test program, Dir the folder of its sources, in which it runs, and Package its import path.
	Program, Dir, Package string
	// Lanes is how many tests run at a time.
	Lanes int
	// Run selects tests by a regular expression on their names; empty for all.
	Run string
	// Args are further flags of the test program.
	Args []string
	// Timeout is for a single test.
	Timeout time.Duration
	// Repeat is how many failed tests at most run once more, one at a time: a run of an hour is not lost to a test that fails
	// by chance. What passes then is reported as flaky. With more failures none is repeated.
	Repeat int
	// Events is the file to which the events of all tests are written, as `go test -json` has them.
	Events string
	// Durations is the file with the last durations of the tests that passed, which is read and written. Hints has those of other
	// tests.
	Durations, Hints string
	// Out gets the output of each test when it ends, and a summary of the failed ones at the end.
	Out io.Writer
}

// Plan returns the tests of the test program, with what each one needs. It fails if a test does not declare that.
func (o Options) Plan(ctx context.Context) ([]Test, error) {
	pattern := o.Run
	if pattern == "" {
		pattern = "."
	}
	out, err := o.command(ctx, "-test.list="+pattern).Output()
	if err != nil {
		return nil, fmt.Errorf("list the tests of %s: %w: %s", o.Program, err, stderr(err))
	}
	names := strings.Fields(string(out))
	dir, err := os.MkdirTemp("", "e2e-plan-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	file := filepath.Join(dir, "needs")
	cmd := o.command(ctx, "-test.run="+pattern, "-test.timeout=2m")
	// A test that continues without declaring its needs finds no program to run.
	cmd.Env = append(os.Environ(), PlanEnv+"="+file, "POLYMESH_BIN="+filepath.Join(dir, "none"))
	output, failed := cmd.CombinedOutput()
	needs := map[string]Test{}
	text, err := os.ReadFile(file)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	for line := range bytes.Lines(text) {
		var t Test
		if err := json.Unmarshal(line, &t); err != nil {
			return nil, fmt.Errorf("read what the tests need: %w", err)
		}
		needs[t.Name] = t
	}
	var tests []Test
	for _, name := range names {
		t, ok := needs[name]
		if !ok {
			return nil, fmt.Errorf("%s does not declare what it needs: its first statement must call app, newScenario or ownNodes\n%s", name, output)
		}
		tests = append(tests, t)
	}
	if failed != nil {
		return nil, fmt.Errorf("read what the tests need: %w\n%s", failed, output)
	}
	return tests, nil
}

func (o Options) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, o.Program, args...)
	cmd.Dir = o.Dir
	return cmd
}

func stderr(err error) string {
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return strings.TrimSpace(string(exit.Stderr))
	}
	return ""
}

// outcome is the result of a test, and the output of it and its subtests.
type outcome struct {
	lane    int
	action  string // pass, fail or skip
	elapsed time.Duration
	output  string
}

// event is one of test2json's.
type event struct {
	Time    time.Time
	Action  string
	Package string
	Test    string  `json:",omitempty"`
	Elapsed float64 `json:",omitempty"` // seconds
	Output  string  `json:",omitempty"`
}

// run is one run of all tests.
type run struct {
	Options
	queue  *queue
	socket string
	begin  time.Time

	mu     sync.Mutex // for all below, and for Out
	events *bufio.Writer
	ended  map[string]outcome
	// first are the tests that brought up their lane's shared node: that is not part of their duration.
	first   map[string]bool
	brought map[int]bool
	lanes   []string // errors of the lanes themselves
}

// Run runs all tests and prints a report. It returns an error if one has failed, also when repeated, or did not run. When ctx ends, so do
// the tests.
func Run(ctx context.Context, o Options) error {
	err := o.once(ctx)
	var failure *failure
	if !errors.As(err, &failure) || failure.other != nil || len(failure.tests) > o.Repeat {
		return err
	}
	fmt.Fprintf(o.Out, "\n=== once more: %s\n", strings.Join(failure.tests, ", "))
	again := o
	again.Run, again.Lanes = "^("+strings.Join(failure.tests, "|")+")$", 1
	again.Events = strings.TrimSuffix(o.Events, ".json") + "-repeated.json"
	if err := again.once(ctx); err != nil {
		return fmt.Errorf("twice: %w", err)
	}
	fmt.Fprintf(o.Out, "\n=== FLAKY, failed and then passed; the first output is above: %s\n", strings.Join(failure.tests, ", "))
	return nil
}

// failure is a run's result if something failed: the tests that failed, and what else went wrong.
type failure struct {
	tests []string
	other error
}

func (f *failure) Error() string {
	var failed error
	if len(f.tests) > 0 {
		failed = fmt.Errorf("failed: %s", strings.Join(f.tests, ", "))
	}
	return errors.Join(failed, f.other).Error()
}

func (f *failure) Unwrap() error { return f.other }

// once runs all tests, and returns a failure if they did not all pass.
func (o Options) once(ctx context.Context) error {
	tests, err := o.Plan(ctx)
	if err != nil {
		return err
	}
	if len(tests) == 0 {
		return fmt.Errorf("no test matches %s", o.Run)
	}
	known := readDurations(o.Hints)
	maps.Copy(known, readDurations(o.Durations))
	if err := os.MkdirAll(filepath.Dir(o.Events), 0o755); err != nil {
		return err
	}
	events, err := os.Create(o.Events)
	if err != nil {
		return err
	}
	defer events.Close()
	dir, err := os.MkdirTemp("", "e2e-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	socket := filepath.Join(dir, "lanes")
	listener, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	r := &run{
		Options: o, queue: newQueue(tests, known, o.Lanes), socket: socket, begin: time.Now(),
		events: bufio.NewWriter(events), ended: map[string]outcome{}, first: map[string]bool{}, brought: map[int]bool{},
	}
	go r.queue.serve(listener, r.taken)
	defer listener.Close()
	stop := context.AfterFunc(ctx, r.queue.close)
	defer stop()
	var lanes sync.WaitGroup
	for lane := range o.Lanes {
		lanes.Go(func() { r.lane(ctx, lane) })
	}
	lanes.Wait()
	if err := errors.Join(r.events.Flush(), events.Close()); err != nil {
		r.lanes = append(r.lanes, "the events are incomplete: "+err.Error())
	}
	for name, e := range r.ended {
		if e.action == "pass" && !r.first[name] {
			known[name] = e.elapsed
		}
	}
	if err := writeDurations(o.Durations, known); err != nil {
		r.lanes = append(r.lanes, err.Error())
	}
	return r.report(ctx, tests)
}

func (r *run) taken(lane int, t Test) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if t.Shared && !r.brought[lane] {
		r.brought[lane], r.first[t.Name] = true, true
	}
}

// lane runs the test program until no test is left for the lane: one process, unless it dies.
func (r *run) lane(ctx context.Context, lane int) {
	defer r.queue.leave(lane)
	temporary := os.TempDir()
	if lane > 0 {
		// A separate folder: at their start, tests remove what dead ones left in it.
		var err error
		if temporary, err = os.MkdirTemp("", "e2e-"); err == nil {
			err = os.Chmod(temporary, 0o755) // a test runs the program there as the user nobody
		}
		if err != nil {
			r.complain(lane, err.Error())
			return
		}
		defer removeEmpty(temporary)
	}
	for ctx.Err() == nil {
		before := r.count(lane)
		finished := r.process(ctx, lane, temporary)
		if finished || r.count(lane) == before {
			return
		}
	}
}

// removeEmpty removes a lane's folder when it is empty: after an interruption, watchdogs remove what the tests left in it.
func removeEmpty(dir string) {
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
		if err := os.Remove(dir); err == nil || errors.Is(err, os.ErrNotExist) {
			return
		}
	}
}

// count returns how many tests of a lane have ended.
func (r *run) count(lane int) (n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, e := range r.ended {
		if e.lane == lane {
			n++
		}
	}
	return n
}

func (r *run) complain(lane int, what string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.lanes = append(r.lanes, fmt.Sprintf("lane %d: %s", lane+1, what))
}

// process runs the test program once, and reports whether it ended because no test was left for it.
func (r *run) process(ctx context.Context, lane int, temporary string) (finished bool) {
	args := append([]string{"tool", "test2json", "-t", "-p", r.Package, r.Program, "-test.v=test2json", "-test.timeout=" + r.Timeout.String()}, r.Args...)
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = r.Dir
	cmd.Env = append(os.Environ(), "TMPDIR="+temporary, socketEnv+"="+r.socket, laneEnv+"="+strconv.Itoa(lane))
	// All processes of the lane get the signal. A test that is interrupted removes its nodes.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) }
	cmd.WaitDelay = time.Minute
	var errOut bytes.Buffer
	cmd.Stderr = &errOut
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		r.complain(lane, err.Error())
		return true
	}
	open := map[string]*strings.Builder{} // the running tests
	var own strings.Builder               // output of no test
	lines := bufio.NewScanner(out)
	lines.Buffer(nil, 64<<20)
	for lines.Scan() {
		r.read(lane, lines.Bytes(), open, &own)
	}
	err = errors.Join(lines.Err(), cmd.Wait())
	if ctx.Err() != nil {
		return true
	}
	// Without the "PASS" of each test, it is the output of TestMain, and the panic of a test that has died.
	output := strings.TrimSpace(strings.ReplaceAll("\n"+own.String(), "\nPASS", "") + errOut.String())
	r.mu.Lock()
	for name, test := range open {
		r.finish(lane, name, outcome{action: "fail", output: test.String() + output})
	}
	failed := slices.ContainsFunc(slices.Collect(maps.Values(r.ended)), func(e outcome) bool { return e.lane == lane && e.action == "fail" })
	r.mu.Unlock()
	if err != nil && (len(open) == 0 && !failed || strings.Contains(output, "FAIL: ")) {
		r.complain(lane, fmt.Sprintf("%v\n%s", err, output))
	} else if output != "" {
		r.print(output + "\n")
	}
	return len(open) == 0
}

// read handles one event.
func (r *run) read(lane int, line []byte, open map[string]*strings.Builder, own *strings.Builder) {
	var e event
	if err := json.Unmarshal(line, &e); err != nil {
		own.Write(line) // not from test2json
		own.WriteByte('\n')
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if e.Test != "" || e.Action == "output" {
		r.events.Write(line)
		r.events.WriteByte('\n')
	}
	name, part, _ := strings.Cut(e.Test, "/")
	switch {
	case e.Action == "output" && open[name] == nil:
		own.WriteString(e.Output)
	case e.Action == "output":
		if !strings.HasPrefix(e.Output, "=== ") {
			open[name].WriteString(e.Output)
		}
	case part != "" || name == "":
	case e.Action == "run":
		open[name] = &strings.Builder{}
		fmt.Fprintf(r.Out, "=== lane %d, %s: %s\n", lane+1, time.Since(r.begin).Round(time.Second), name)
	case e.Action == "pass", e.Action == "fail", e.Action == "skip":
		if open[name] != nil {
			r.finish(lane, name, outcome{action: e.Action, elapsed: time.Duration(e.Elapsed * float64(time.Second)), output: open[name].String()})
			delete(open, name)
		}
	}
}

// finish records a test's end and prints its whole output. The lock is held.
func (r *run) finish(lane int, name string, e outcome) {
	e.lane = lane
	r.ended[name] = e
	fmt.Fprint(r.Out, e.output)
}

func (r *run) print(text string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	fmt.Fprint(r.Out, text)
}

// report compares the tests that ran with the list, and prints the output of failed ones again.
func (r *run) report(ctx context.Context, tests []Test) error {
	counts := map[string]int{}
	busy := make([]time.Duration, r.Lanes)
	var missing, failed []string
	for _, t := range tests {
		e, ok := r.ended[t.Name]
		if !ok {
			missing = append(missing, t.Name)
			continue
		}
		counts[e.action]++
		busy[e.lane] += e.elapsed
		if e.action == "fail" {
			failed = append(failed, t.Name)
		}
	}
	for _, name := range failed {
		fmt.Fprintf(r.Out, "\n=== failed: %s\n%s", name, r.ended[name].output)
	}
	for _, what := range r.lanes {
		fmt.Fprintf(r.Out, "\n=== %s\n", what)
	}
	fmt.Fprintf(r.Out, "\n%d end-to-end tests passed, %d failed, %d were skipped, %d did not run, in %s; the lanes worked for %v\n",
		counts["pass"], counts["fail"], counts["skip"], len(missing), time.Since(r.begin).Round(time.Second), busy)
	var errs []error
	if len(missing) > 0 {
		errs = append(errs, fmt.Errorf("did not run: %s", strings.Join(missing, ", ")))
	}
	if len(r.lanes) > 0 {
		errs = append(errs, errors.New(strings.Join(r.lanes, "; ")))
	}
	if ctx.Err() != nil {
		errs = append(errs, context.Cause(ctx))
	}
	if len(failed) == 0 && len(errs) == 0 {
		return nil
	}
	return &failure{failed, errors.Join(errs...)}
}

// readDurations reads the durations of tests, in seconds by name. Without them only the order is worse.
func readDurations(file string) map[string]time.Duration {
	known := map[string]time.Duration{}
	text, err := os.ReadFile(file)
	if err != nil {
		return known
	}
	var seconds map[string]float64
	if json.Unmarshal(text, &seconds) != nil {
		return known
	}
	for name, s := range seconds {
		known[name] = time.Duration(s * float64(time.Second))
	}
	return known
}

func writeDurations(file string, known map[string]time.Duration) error {
	seconds := map[string]float64{}
	for name, d := range known {
		seconds[name] = d.Round(time.Second).Seconds()
	}
	text, err := json.MarshalIndent(seconds, "", "  ")
	if err == nil {
		err = os.WriteFile(file, append(text, '\n'), 0o644)
	}
	if err != nil {
		return fmt.Errorf("write the durations: %w", err)
	}
	return nil
}
