//go:build e2e

// Package cis runs the checks of the CIS Kubernetes Benchmark, as listed in K3s's self-assessment, on three nodes: a
// server with default settings, one with the settings of docs/operate/hardening.md, and one that also has etcd. It needs root.
//
//	make cis          # all three, and the report in docs/understand/cis.md
//
// By default, no check may be worse than K3s's; with the settings, all automated checks pass.
package cis

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"text/tabwriter"
	"time"

	"sigs.k8s.io/yaml"

	"polymesh.dev/polymesh/test/e2e/node"
)

var report = flag.Bool("report", false, "write the report to docs/understand/cis.md")

func TestMain(m *testing.M) {
	flag.Parse()
	if err := node.Guard(); err != nil {
		fmt.Fprintln(os.Stderr, "cis:", err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

func TestBenchmark(t *testing.T) {
	all := checks()
	var plain, hardened, etcd []Result
	t.Run("as it comes", func(t *testing.T) {
		plain = run(t, all, node.ForTest(t, node.Options{}))
		for i, c := range all {
			if c.K3s == Pass && plain[i].Outcome == Fail {
				t.Errorf("%s %s: K3s passes by default, and this does not: %s", c.Number, c.Title, plain[i].Evidence)
			}
		}
	})
	t.Run("hardened", func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "config.yaml")
		if err := os.WriteFile(file, []byte(settings(t)), 0o600); err != nil {
			t.Fatal(err)
		}
		n := node.ForTest(t, node.Options{Args: append([]string{"--config", file}, kubeletArgs(t)...)})
		hardened = run(t, all, n)
		wantAutomated(t, all, hardened)
		// The commands on the page.
		for _, command := range []string{"rotate-keys", "disable", "enable", "reencrypt", "status"} {
			out, errOut, code := n.Polymesh(t, "secrets-encrypt", command)
			if code != 0 || command == "status" && !strings.Contains(out, "encryption: enabled\nSecrets that are not encrypted: 0\n") {
				t.Errorf("polymesh secrets-encrypt %s: code %d: %s%s", command, code, out, errOut)
			}
		}
	})
	t.Run("hardened, with etcd", func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "config.yaml")
		if err := os.WriteFile(file, []byte(settings(t)), 0o600); err != nil {
			t.Fatal(err)
		}
		etcd = run(t, all, node.ForTest(t, node.Options{Args: append([]string{"--config", file, "--cluster-init"}, kubeletArgs(t)...)}))
		wantAutomated(t, all, etcd)
	})
	// The report is also written if a check has failed.
	if !*report || plain == nil || hardened == nil || etcd == nil {
		return
	}
	if err := os.WriteFile(filepath.Join(top(t), "docs", "understand", "cis.md"), []byte(page(all, plain, hardened, etcd)), 0o644); err != nil {
		t.Fatal(err)
	}
}

// wantAutomated fails the test if an automated check fails on a hardened server.
func wantAutomated(t *testing.T, all []Check, results []Result) {
	t.Helper()
	for i, c := range all {
		if c.Automated && results[i].Outcome != Pass && results[i].Outcome != NotApplicable {
			t.Errorf("%s %s: %s with the settings of docs/operate/hardening.md: %s", c.Number, c.Title, results[i].Outcome, results[i].Evidence)
		}
	}
}

// run starts a server and audits it.
func run(t *testing.T, all []Check, n *node.Node) []Result {
	t.Helper()
	if err := n.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	n.WaitReady(t, 5*time.Minute)
	s := look(t, n)
	results := make([]Result, len(all))
	var table strings.Builder
	w := tabwriter.NewWriter(&table, 0, 0, 2, ' ', 0)
	for i, c := range all {
		results[i] = c.Audit(s)
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", c.Number, results[i].Outcome, c.Title, results[i].Evidence)
	}
	w.Flush()
	t.Log("\n" + table.String())
	return results
}

// settings returns the config file on the hardening page: its first YAML block that begins with the file's name.
func settings(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(top(t), "docs", "operate", "hardening.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, ok := strings.Cut(string(text), "```yaml\n# /etc/polymesh/config.yaml\n")
	block, _, ok2 := strings.Cut(rest, "```")
	if !ok || !ok2 {
		t.Fatal("docs/operate/hardening.md has no config file")
	}
	return block
}

// kubeletArgs returns the file's kubelet settings as flags. Test nodes have such flags, which override lists in a file.
func kubeletArgs(t *testing.T) []string {
	t.Helper()
	var file struct {
		KubeletArg []string `json:"kubelet-arg"`
	}
	if err := yaml.Unmarshal([]byte(settings(t)), &file); err != nil || len(file.KubeletArg) == 0 {
		t.Fatalf("the hardening page's settings of the kubelet: %v", err)
	}
	var args []string
	for _, arg := range file.KubeletArg {
		args = append(args, "--kubelet-arg="+arg)
	}
	return args
}

func top(t *testing.T) string {
	t.Helper()
	dir, err := node.Top()
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// page renders the report.
func page(all []Check, plain, hardened, etcd []Result) string {
	var b strings.Builder
	b.WriteString(`# The CIS Kubernetes Benchmark

<!-- Written by ` + "`make cis`" + `. -->

Each check of the benchmark, audited on running servers: one with default settings, one with the settings of
[hardening](../operate/hardening.md), and one with these settings and ` + "`--cluster-init`" + `, whose datastore is etcd instead of SQLite.
Numbers and what is automated are those of K3s's self-assessment for Kubernetes 1.36; the titles are shortened. The column K3s
is K3s by default, according to its documentation, without its hardening guide. The evidence is the hardened server's, and that
of the server with etcd for the checks that only apply to etcd. Flags are read from the server's log, and the kubelet's settings
from its /configz. Files, ports and cipher suites are tested. "warn" is for the administrator to judge. K3s's assessment has
"warn" for every manual check; if such a check can be audited, this page has the result.

`)
	count := func(results []Result, automated bool) (out string) {
		sum := map[Outcome]int{}
		for i, c := range all {
			if c.Automated == automated {
				sum[results[i].Outcome]++
			}
		}
		for _, o := range []Outcome{Pass, Fail, Warn, NotApplicable} {
			out += fmt.Sprintf(" %d |", sum[o])
		}
		return out
	}
	b.WriteString("| | pass | fail | warn | not applicable |\n| --- | --- | --- | --- | --- |\n")
	for _, automated := range []bool{true, false} {
		kind := map[bool]string{true: "automated", false: "manual"}[automated]
		fmt.Fprintf(&b, "| %s, default |%s\n| %s, hardened |%s\n| %s, hardened, with etcd |%s\n",
			kind, count(plain, automated), kind, count(hardened, automated), kind, count(etcd, automated))
	}
	b.WriteString("\n| check | | automated | K3s | default | hardened | with etcd | evidence |\n| --- | --- | --- | --- | --- | --- | --- | --- |\n")
	for i, c := range all {
		automated := ""
		if c.Automated {
			automated = "yes"
		}
		shown := hardened[i]
		if shown.Outcome == NotApplicable {
			shown = etcd[i]
		}
		evidence := strings.ReplaceAll(shown.Evidence, "|", `\|`)
		fmt.Fprintf(&b, "| %s | %s | %s | %s | %s | %s | %s | %s |\n", c.Number, c.Title, automated, c.K3s, plain[i].Outcome, hardened[i].Outcome, etcd[i].Outcome, evidence)
	}
	return b.String()
}
