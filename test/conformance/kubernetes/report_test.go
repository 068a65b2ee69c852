//go:build e2e

package kubernetes

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"time"
)

// Suite and Spec are the parts of Ginkgo's JSON report in use (github.com/onsi/ginkgo/v2/types, Report and SpecReport).
type Suite struct {
	SpecReports []Spec
}

type Spec struct {
	ContainerHierarchyTexts []string
	LeafNodeType            string
	LeafNodeText            string
	State                   string
	Failure                 struct{ Message string }
}

// Outcome is the result of a spec.
type Outcome string

const (
	Passed   Outcome = "passed"
	Failed   Outcome = "failed"
	Skipped  Outcome = "skipped"  // by the spec itself, after its start
	Excluded Outcome = "excluded" // by specs.yaml
	NotRun   Outcome = "not run"  // out of time
)

// Result is the result of one spec on upstream's list.
type Result struct {
	Name    string
	Outcome Outcome
	Message string // why it failed or skipped itself
	Before  string // why it failed in an earlier run, which this one resumed

	reason   string // why specs.yaml expects it not to pass; empty otherwise
	expected Outcome
}

// read extracts the specs on upstream's list from the report. Every spec that ran must be on the list.
func read(suite Suite, all []string) ([]Result, error) {
	ran := map[string]Spec{}
	for _, s := range suite.SpecReports {
		if s.LeafNodeType != "It" {
			if s.State != "passed" && s.State != "skipped" {
				return nil, fmt.Errorf("%s: %s: %s", s.LeafNodeType, s.State, s.Failure.Message)
			}
			continue
		}
		name := strings.Join(append(slices.Clone(s.ContainerHierarchyTexts), s.LeafNodeText), " ")
		if !slices.Contains(all, name) {
			if s.State != "skipped" || s.Failure.Message != "" {
				return nil, fmt.Errorf("%q ran, but is not on upstream's list of conformance specs", name)
			}
			continue
		}
		ran[name] = s
	}
	var results []Result
	for _, name := range all {
		s, ok := ran[name]
		if !ok {
			return nil, fmt.Errorf("spec %q is on upstream's list of conformance specs, but not in its program", name)
		}
		r := Result{Name: name, Message: s.Failure.Message}
		switch {
		case s.State == "passed":
			r.Outcome = Passed
		case s.State == "skipped" && s.Failure.Message != "":
			r.Outcome = Skipped
		case s.State == "skipped" || s.State == "pending" || s.State == "interrupted",
			s.State == "timedout" && s.Failure.Message == "A suite timeout occurred": // Ginkgo's message for the time limit of the run
			r.Outcome, r.Message = NotRun, ""
		default:
			r.Outcome = Failed
		}
		results = append(results, r)
	}
	return results, nil
}

// judge sets what specs.yaml expects of each result.
func judge(results []Result, specs Specs) {
	for i := range results {
		r := &results[i]
		r.reason, r.expected = "", Passed
		for outcome, groups := range map[Outcome][]Group{Excluded: specs.Excluded, Skipped: specs.Skipped, Failed: specs.Failing} {
			if why := reason(groups, r.Name); why != "" {
				r.reason, r.expected = why, outcome
			}
		}
		switch {
		case r.Outcome == NotRun && r.expected == Excluded:
			r.Outcome = Excluded
		case r.Outcome == Excluded && r.expected != Excluded:
			r.Outcome = NotRun
		}
	}
}

// Record is a run on disk that can be resumed.
type Record struct {
	Program string // SHA-256 of the program under test
	Run     Run
	Results []Result
}

// open reports whether a later run repeats the spec: it did not run, or failed for a reason that is not in specs.yaml.
func (r Result) open() bool {
	return r.Outcome == NotRun || r.Outcome == Failed && r.expected != Failed
}

// add merges the results of a later run for the open specs.
func (r *Record) add(run Run, results []Result) {
	later := map[string]Result{}
	for _, result := range results {
		later[result.Name] = result
	}
	for i, result := range r.Results {
		if next := later[result.Name]; result.open() && next.Outcome != NotRun {
			if result.Outcome == Failed {
				next.Before = result.Message
			}
			r.Results[i] = next
		}
	}
	run.Took += r.Run.Took
	r.Run = run
}

// left returns Ginkgo's regular expression for the open specs; empty if there are none.
func (r *Record) left() string {
	var left []string
	for _, result := range r.Results {
		if result.open() {
			left = append(left, regexp.QuoteMeta(result.Name)+"$") // Ginkgo prepends the suite's name
		}
	}
	return strings.Join(left, "|")
}

// problem describes an unexpected result; empty if it is what specs.yaml expects.
func (r Result) problem() string {
	switch {
	case r.Outcome == r.expected:
		return ""
	case r.Outcome == NotRun:
		return "did not run within the time"
	case r.Outcome == Passed:
		return fmt.Sprintf("passed, but specs.yaml lists it as %s: remove it there", r.expected)
	}
	return fmt.Sprintf("%s, but specs.yaml does not expect it: %s", r.Outcome, r.Message)
}

// Counts are numbers of specs.
type Counts map[Outcome]int

func count(results []Result) Counts {
	c := Counts{}
	for _, r := range results {
		c[r.Outcome]++
	}
	return c
}

var outcomes = []Outcome{Passed, Failed, Skipped, Excluded, NotRun}

func (c Counts) String() string {
	var parts []string
	for _, o := range outcomes {
		if c[o] > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", c[o], o))
		}
	}
	return strings.Join(parts, ", ")
}

// Run is the circumstances of a run.
type Run struct {
	Polymesh, Kubernetes, Date string
	Procs, CPUs                int
	Took                       time.Duration
}

// page renders the report.
func page(run Run, results []Result) string {
	var b strings.Builder
	fmt.Fprintf(&b, `# Kubernetes conformance

<!-- Written by `+"`make conformance-kubernetes`"+`. -->

Upstream's conformance suite, the specs of Kubernetes' own end-to-end tests with the label Conformance, on one node with default
settings, including Istio: Polymesh %s, Kubernetes %s. The tests are built from the pinned module, and their images from that
module and from Debian packages, because nothing is pulled ([how](build.md#the-conformance-suites)); kubectl is
`+"`polymesh kubectl`"+`. The run of %s took %s, %d specs at a time on %d processors, the serial ones alone.

It is the suite's result on one node, not a certification: for that all specs must pass, and some of them require two nodes.

**%d specs: %s.**

`, run.Polymesh, run.Kubernetes, run.Date, strings.TrimSuffix(run.Took.String(), "0s"), run.Procs, run.CPUs, len(results), count(results))
	areas := map[string][]Result{}
	for _, r := range results {
		area, _, _ := strings.Cut(strings.TrimPrefix(r.Name, "["), "]")
		areas[area] = append(areas[area], r)
	}
	row := func(title string, results []Result) {
		fmt.Fprintf(&b, "| %s | %d |", title, len(results))
		c := count(results)
		for _, o := range outcomes {
			fmt.Fprintf(&b, " %d |", c[o])
		}
		b.WriteString("\n")
	}
	b.WriteString("| area | specs | passed | failed | skipped | excluded | not run |\n| --- | --- | --- | --- | --- | --- | --- |\n")
	for _, area := range slices.Sorted(maps.Keys(areas)) {
		row(area, areas[area])
	}
	row("**all**", results)
	table := func(title, text string, wanted func(Result) bool, why func(Result) string) {
		var rows []Result
		for _, r := range results {
			if wanted(r) {
				rows = append(rows, r)
			}
		}
		if len(rows) == 0 {
			return
		}
		fmt.Fprintf(&b, "\n## %s\n\n%s\n\n", title, text)
		if why == nil {
			for _, r := range rows {
				fmt.Fprintf(&b, "- %s\n", r.Name)
			}
			return
		}
		b.WriteString("| spec | why |\n| --- | --- |\n")
		for _, r := range rows {
			fmt.Fprintf(&b, "| %s | %s |\n", r.Name, strings.ReplaceAll(strings.TrimSpace(why(r)), "|", `\|`))
		}
	}
	first := func(text string) string {
		line, _, _ := strings.Cut(text, "\n")
		return line
	}
	why := func(r Result) string {
		if r.reason != "" {
			return r.reason
		}
		return first(r.Message)
	}
	is := func(o Outcome) func(Result) bool { return func(r Result) bool { return r.Outcome == o } }
	table("Failed", "If the reason is not known, the first line of the spec's message.", is(Failed), why)
	table("Passed when they were run again", "With their first failure.",
		func(r Result) bool { return r.Outcome == Passed && r.Before != "" }, func(r Result) string { return first(r.Before) })
	table("Skipped", "By the specs themselves, on a cluster like this.", is(Skipped), why)
	table("Excluded", "Not started, because they cannot pass here.", is(Excluded), why)
	table("Not run", "The time that the run was given ended before these.", is(NotRun), nil)
	return b.String()
}
