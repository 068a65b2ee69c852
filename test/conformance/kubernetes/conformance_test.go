//go:build e2e

// Package kubernetes runs Kubernetes' own conformance suite, the specs of test/e2e with its label, on its own node
// like those of the end-to-end tests, and keeps the report in docs/understand. It needs root.
//
//	make conformance-kubernetes                     # all of it, and the report
//	make conformance-kubernetes FOCUS='\[sig-cli\]' # the specs whose names match, no report
//	make conformance-kubernetes PROCS=8 LIMIT=30m   # eight at a time, for half an hour; the report lists what did not run
//	make conformance-kubernetes RESUME=1            # what did not run or failed, added to the report
//	make conformance-kubernetes RESUME=1 LIMIT=0s   # nothing; the report again, after an edit of specs.yaml
//	make conformance-network-policy FOCUS='egress'  # the specs of NetworkPolicies, which are no part of conformance
//
// Ginkgo runs the specs in parallel, and those that upstream marks as serial one by one at the end. specs.yaml lists
// what is run and what is not, with reasons. images.sh builds the images.
package kubernetes

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"polymesh.dev/polymesh/test/e2e/node"
)

var (
	focus = flag.String("focus", "", "run the conformance specs that this regular expression matches, and write no report")
	procs = flag.Int("procs", 2*runtime.NumCPU(), "so many specs at a time")
	limit = flag.Duration("limit", 5*time.Hour, "end the run after this time")
	again = flag.Bool("resume", false, "run what the last run had no time for and what failed in it, with the same program, and add it to that run's report")
)

func TestMain(m *testing.M) {
	flag.Parse()
	if err := node.Guard(); err != nil {
		fmt.Fprintln(os.Stderr, "conformance:", err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

func TestConformance(t *testing.T) {
	top, err := node.Top()
	if err != nil {
		t.Fatal(err)
	}
	programs := filepath.Join(top, ".build", "test", "kubernetes")
	suite := filepath.Join(programs, "e2e.test")
	list, err := exec.Command(suite, "--list-conformance-tests").Output()
	if err != nil {
		t.Fatalf("%s: %v: run make conformance-kubernetes, which builds it", suite, err)
	}
	all, err := names(list)
	if err != nil {
		t.Fatal(err)
	}
	specs, err := readSpecs(specsFile, all)
	if err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(top, ".build", "conformance", "kubernetes")
	file, err := node.Program()
	if err != nil {
		t.Fatal(err)
	}
	program, err := hash(file)
	if err != nil {
		t.Fatal(err)
	}
	var record Record
	if *again {
		if *focus != "" {
			t.Fatal("-resume and -focus are mutually exclusive")
		}
		if record, err = load(out); err != nil {
			t.Fatalf("-resume: %v", err)
		}
		if record.Program != program {
			t.Fatalf("-resume: the last run tested another program than %s: run the suite without it", file)
		}
		judge(record.Results, specs)
		*focus = record.left()
	}
	if !*again || *focus != "" && *limit > 0 {
		run, results := runSuite(t, top, out, specs, all, suite)
		judge(results, specs)
		if *again {
			record.add(run, results)
		} else {
			record = Record{program, run, results}
		}
	}
	whole := *again || *focus == ""
	for _, r := range record.Results {
		if problem := r.problem(); problem != "" && (whole || r.Outcome != NotRun) {
			t.Errorf("%s: %s", r.Name, problem)
		}
	}
	counts := count(record.Results)
	t.Logf("%d specs: %s", len(record.Results), counts)
	if counts[Passed]+counts[Failed] == 0 {
		t.Error("no spec ran")
	}
	if !whole {
		return
	}
	if err := record.save(out); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(top, "docs", "understand", "conformance.md"), []byte(page(record.Run, record.Results)), 0o644); err != nil {
		t.Fatal(err)
	}
}

// TestNetworkPolicy runs upstream's specs of NetworkPolicies: all with the label Feature:NetworkPolicy that this kernel can run.
func TestNetworkPolicy(t *testing.T) {
	top, err := node.Top()
	if err != nil {
		t.Fatal(err)
	}
	filter := "Feature: containsAny NetworkPolicy"
	if fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, unix.IPPROTO_SCTP); err == nil {
		unix.Close(fd)
	} else {
		// These open connections. That policies filter the protocol is in the others, and in pkg/node/netpol.
		filter += " && ! Feature: containsAny SCTPConnectivity"
	}
	_, report := runSpecs(t, top, filepath.Join(top, ".build", "conformance", "kubernetes"), filepath.Join(top, ".build", "test", "kubernetes", "e2e.test"), filter, "")
	counts := Counts{}
	for _, s := range report.SpecReports {
		name := strings.Join(append(slices.Clone(s.ContainerHierarchyTexts), s.LeafNodeText), " ")
		switch {
		case s.LeafNodeType == "It" && s.State == "passed":
			counts[Passed]++
		case s.LeafNodeType == "It" && (s.State == "interrupted" || s.State == "timedout" && s.Failure.Message == "A suite timeout occurred"):
			counts[NotRun]++
		case s.State != "passed" && (s.State != "skipped" || s.Failure.Message != ""):
			counts[Failed]++
			t.Errorf("%s: %s: %s", name, s.State, s.Failure.Message)
		}
	}
	t.Logf("%d specs: %s", counts[Passed]+counts[Failed]+counts[NotRun], counts)
	if counts[Passed] == 0 {
		t.Error("no spec passed")
	}
}

// runSuite starts a node and runs the specs of conformance on it.
func runSuite(t *testing.T, top, out string, specs Specs, all []string, suite string) (Run, []Result) {
	run, report := runSpecs(t, top, out, suite, specs.Focus, specs.skip())
	results, err := read(report, all)
	if err != nil {
		t.Fatal(err)
	}
	return run, results
}

// runSpecs starts a node and runs the specs that Ginkgo's label filter selects on it, without those that skip matches.
func runSpecs(t *testing.T, top, out, suite, filter, skip string) (Run, Suite) {
	if output, err := exec.Command(filepath.Join(top, "test", "conformance", "kubernetes", "images.sh")).CombinedOutput(); err != nil {
		t.Fatalf("build the suite's images: %v: %s", err, output)
	}
	n := node.ForTest(t, node.Options{})
	if err := n.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	n.WaitReady(t, 5*time.Minute)
	archives, err := filepath.Glob(filepath.Join(out, "archives", "*.tar"))
	if err != nil || len(archives) == 0 {
		t.Fatalf("%s has no archives of images: %v", out, err)
	}
	for _, archive := range archives {
		n.Import(t, archive)
	}
	tagPause(t, n, suite)
	version, err := n.Report(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	server, err := n.Client(t).ServerVersion()
	if err != nil {
		t.Fatal(err)
	}
	// Through a link with that name the program is kubectl.
	kubectl := filepath.Join(n.Dir, "kubectl")
	file, err := node.Program()
	if err == nil {
		err = os.Symlink(file, kubectl)
	}
	if err != nil {
		t.Fatal(err)
	}

	report := filepath.Join(out, "report.json")
	if err := os.RemoveAll(report); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), *limit+10*time.Minute)
	defer cancel()
	args := []string{
		"--procs=" + strconv.Itoa(*procs), "--timeout=" + limit.String(), "--label-filter=" + filter,
		"--no-color", "--silence-skips", "--output-dir=" + out, "--json-report=" + filepath.Base(report),
	}
	if skip != "" {
		args = append(args, "--skip="+skip)
	}
	if *focus != "" {
		args = append(args, "--focus="+*focus)
	}
	args = append(args, suite, "--", "--kubeconfig="+n.Kubeconfig(), "--kubectl-path="+kubectl,
		"--provider=skeleton", "--num-nodes=1", "--disable-log-dump")
	started := time.Now()
	ginkgo := n.Command(ctx, filepath.Join(filepath.Dir(suite), "ginkgo"), args...)
	ginkgo.Stdout, ginkgo.Stderr = os.Stdout, os.Stderr
	// Failed specs are read from the report.
	ended := ginkgo.Run()
	took := time.Since(started)
	text, err := os.ReadFile(report)
	if err != nil {
		t.Fatalf("ginkgo: %v: there is no report: %v", ended, err)
	}
	var suites []Suite
	if err := json.Unmarshal(text, &suites); err != nil || len(suites) != 1 {
		t.Fatalf("%s: %d suites: %v", report, len(suites), err)
	}
	if ended != nil {
		t.Logf("ginkgo: %v", ended)
	}
	return Run{Polymesh: version.Version, Kubernetes: server.GitVersion, Date: started.UTC().Format(time.DateOnly),
		Procs: *procs, CPUs: runtime.NumCPU(), Took: took.Round(time.Minute)}, suites[0]
}

// hash returns the SHA-256 of a file.
func hash(file string) (string, error) {
	f, err := os.Open(file)
	if err != nil {
		return "", err
	}
	defer f.Close()
	sum := sha256.New()
	if _, err := io.Copy(sum, f); err != nil {
		return "", fmt.Errorf("read %s: %w", file, err)
	}
	return hex.EncodeToString(sum.Sum(nil)), nil
}

// recordFile contains the last complete run.
const recordFile = "last.json"

func load(dir string) (r Record, err error) {
	text, err := os.ReadFile(filepath.Join(dir, recordFile))
	if errors.Is(err, fs.ErrNotExist) {
		return r, errors.New("there is no earlier run")
	}
	if err != nil {
		return r, err
	}
	if err := json.Unmarshal(text, &r); err != nil {
		return r, fmt.Errorf("%s: %w", recordFile, err)
	}
	return r, nil
}

func (r Record) save(dir string) error {
	text, err := json.MarshalIndent(r, "", " ")
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, recordFile), text, 0o644)
}

// tagPause tags the node's pause image, of the same Kubernetes version, with the suite's name.
func tagPause(t *testing.T, n *node.Node, suite string) {
	list, err := exec.Command(suite, "--list-images").Output()
	if err != nil {
		t.Fatalf("%s: %v", suite, err)
	}
	const ours, theirs = "registry.polymesh.dev/pause:", "registry.k8s.io/pause:"
	images := n.Ctr(t, "images", "ls", "-q")
	for wanted := range strings.FieldsSeq(string(list)) {
		tag, ok := strings.CutPrefix(wanted, theirs)
		if !ok {
			continue
		}
		if !slices.Contains(strings.Fields(images), ours+tag) {
			t.Fatalf("the suite needs %s, but the node has no %s%s", wanted, ours, tag)
		}
		n.Ctr(t, "images", "tag", ours+tag, wanted)
	}
}

func TestPage(t *testing.T) {
	all := []string{"[sig-b] was cut short", "[sig-a] passes", "[sig-a] is known to fail", "[sig-b] skips itself", "[sig-b] is left out", "[sig-b] came too late", "[sig-c] fails"}
	specs, err := readSpecs([]byte(`
focus: Conformance
excluded: [{reason: no registry, specs: ["[sig-b] is left out"]}]
skipped: [{reason: one node, specs: ["[sig-b] skips itself"]}]
failing: [{reason: a bug, specs: ["[sig-a] is known to fail"]}]`), all)
	if err != nil {
		t.Fatal(err)
	}
	spec := func(name, state, message string) Spec {
		s := Spec{LeafNodeType: "It", ContainerHierarchyTexts: []string{name[:7]}, LeafNodeText: name[8:], State: state}
		s.Failure.Message = message
		return s
	}
	got, err := read(Suite{SpecReports: []Spec{
		{LeafNodeType: "SynchronizedBeforeSuite", State: "passed"},
		spec("[sig-b] was cut short", "timedout", "A suite timeout occurred"),
		spec("[sig-a] passes", "passed", ""), spec("[sig-a] is known to fail", "failed", "as ever"),
		spec("[sig-b] skips itself", "skipped", "Requires at least 2 nodes"), spec("[sig-b] is left out", "skipped", ""),
		spec("[sig-b] came too late", "skipped", ""), spec("[sig-c] fails", "timedout", "too slow\nat length"),
	}}, all)
	if err != nil {
		t.Fatal(err)
	}
	judge(got, specs)
	want := []Outcome{NotRun, Passed, Failed, Skipped, Excluded, NotRun, Failed}
	for i, r := range got {
		if r.Outcome != want[i] {
			t.Errorf("%s: %s, want %s", r.Name, r.Outcome, want[i])
		}
		if problem := r.problem(); (problem != "") != (i == 0 || i >= 5) {
			t.Errorf("%s: the problem is %q", r.Name, problem)
		}
	}
	text := page(Run{}, got)
	for _, part := range []string{"| **all** | 7 | 1 | 2 | 1 | 1 | 2 |", "| [sig-c] fails | too slow |", "| [sig-a] is known to fail | a bug |", "- [sig-b] came too late\n"} {
		if !strings.Contains(text, part) {
			t.Errorf("the page lacks %q:\n%s", part, text)
		}
	}

	// Only specs that did not run or failed are run later.
	record := Record{Results: got, Run: Run{Took: time.Hour}}
	left := regexp.MustCompile(record.left())
	for i, r := range got {
		if left.MatchString(r.Name) != (i == 0 || i >= 5) {
			t.Errorf("%s: %s, run later: %v", r.Name, r.Outcome, left.MatchString(r.Name))
		}
	}
	record.add(Run{Took: time.Minute}, []Result{{Name: all[0], Outcome: Passed}, {Name: "[sig-b] came too late", Outcome: NotRun},
		{Name: "[sig-c] fails", Outcome: Passed}, {Name: "[sig-a] passes", Outcome: NotRun}})
	if c := count(record.Results); c[NotRun] != 1 || c[Passed] != 3 || c[Failed] != 1 || record.Run.Took != 61*time.Minute {
		t.Errorf("after the remaining specs: %s in %s", c, record.Run.Took)
	}
	if text := page(record.Run, record.Results); !strings.Contains(text, "again\n\nWith their first failure.\n\n| spec | why |\n| --- | --- |\n| [sig-c] fails | too slow |") {
		t.Errorf("the page does not list the specs that passed when run again:\n%s", text)
	}

	// A line of specs.yaml that is no longer true is a problem.
	got, err = read(Suite{SpecReports: []Spec{spec(all[2], "passed", ""), spec(all[3], "passed", "")}}, all[2:4])
	judge(got, specs)
	if err != nil || got[0].problem() == "" || got[1].problem() == "" {
		t.Errorf("specs that are listed and pass: %v, %v", got, err)
	}
	// A suite that failed to start has no results.
	if _, err := read(Suite{SpecReports: []Spec{{LeafNodeType: "SynchronizedBeforeSuite", State: "failed"}}}, all); err == nil {
		t.Error("a suite whose preparation failed was accepted")
	}
	if _, err := readSpecs([]byte(`{focus: x, failing: [{reason: r, specs: ["[sig-a] never was"]}]}`), all); err == nil {
		t.Error("a spec that upstream does not have was accepted")
	}
}
