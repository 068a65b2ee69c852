package main

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"text/template"
	"time"

	_ "embed"
)

//go:embed report.tmpl
var reportTemplate string

// row is a figure in a table: its description, unit, and values for comparison.
type row struct {
	id    figureID
	what  string
	unit  string
	aim   string
	other string // measured elsewhere, with source
}

const proof = "proof: "

// Targets, and the values of the prototype and of K3s users, are from the issue that requested these measurements.
var (
	startRows = []row{
		{meshAPI, "API server ready", "s", "", proof + "2.3 s"},
		{meshNode, "node Ready", "s", "", proof + "4.5 s"},
		{meshIstiod, "istiod Ready", "s", "", ""},
		{meshIngress, "ingress answers", "s", "20 s", proof + "17.5 s, images imported before"},
		{meshAll, "every component ready", "s", "", ""},
	}
	startAgainRows = []row{
		{meshAPIAgain, "API server ready", "s", "", ""},
		{meshNodeAgain, "node Ready", "s", "", ""},
		{meshAllAgain, "every component ready", "s", "", ""},
	}
	bareRows = []row{
		{bareAPI, "API server ready", "s", "", proof + "2.3 s"},
		{bareNode, "node Ready", "s", "", proof + "4.5 s"},
		{bareAll, "every component ready", "s", "", ""},
		{bareAPIAgain, "second start: API server ready", "s", "", ""},
		{bareNodeAgain, "second start: node Ready", "s", "", ""},
		{bareAllAgain, "second start: every component ready", "s", "", ""},
	}
	agentRows = []row{
		{agentReady, "node Ready", "s", "3 s", proof + "7.1 s"},
		{agentAll, "every component ready", "s", "", ""},
		{agentReadyAgain, "second start: node Ready", "s", "", ""},
		{agentAllAgain, "second start: every component ready", "s", "", ""},
		{"agent server RSS", "agent at rest: RSS", "MB", "100 MB", proof + "100 MB"},
		{"agent server anonymous", "agent at rest: anonymous", "MB", "", proof + "25 MB"},
		{"agent server CPU", "agent at rest: CPU", "% of a core", "", ""},
		{"agent all anonymous", "all processes of the node: anonymous", "MB", "", ""},
	}
	idleRows = []row{
		{"bare server RSS", "server without Istio: RSS", "MB", "250 MB", "K3s's users: 500 to 535 MB; " + proof + "294 MB"},
		{"bare server anonymous", "server without Istio: anonymous", "MB", "", proof + "169 MB"},
		{"bare server CPU", "server without Istio: CPU", "% of a core", "3 %", "K3s's users: 5 %; " + proof + "8 %"},
		{"bare all anonymous", "all processes without Istio: anonymous", "MB", "", ""},
		{"bare all CPU", "all processes without Istio: CPU", "% of a core", "", ""},
		{"mesh server RSS", "server with Istio and the app: RSS", "MB", "350 MB", proof + "469 MB"},
		{"mesh server anonymous", "server with Istio and the app: anonymous", "MB", "", proof + "342 MB"},
		{"mesh server CPU", "server with Istio and the app: CPU", "% of a core", "3 %", proof + "8 %"},
		{"mesh all anonymous", "all processes with Istio and the app: anonymous", "MB", "", ""},
		{"mesh all CPU", "all processes with Istio and the app: CPU", "% of a core", "", ""},
	}
	podRows = []row{
		{sidecarOne, "one pod with a sidecar", "s", "", ""},
		{plainOne, "one pod without", "s", "", ""},
		{sidecarMany, "30 pods with sidecars, until the last is Ready", "s", "", ""},
		{plainMany, "30 pods without", "s", "", ""},
		{sidecarEach, "30 pods with sidecars, the median one", "s", "", ""},
		{plainEach, "30 pods without, the median one", "s", "", ""},
	}
	smallBareRows = []row{
		{"small bare ready", "until every component is ready", "s", "", ""},
		{"small bare in use", "until the pod is Ready too", "s", "", ""},
		{"small bare anonymous", "anonymous memory, all processes, at rest", "MB", "", ""},
		{"small bare cache", "page cache beside it", "MB", "", ""},
		{"small bare killed", "processes killed for memory", "", "0", ""},
	}
	smallMeshRows = []row{
		{"small mesh ready", "until every component is ready", "s", "", ""},
		{"small mesh in use", "until the app answers too", "s", "", ""},
		{"small mesh anonymous", "anonymous memory, all processes, at rest", "MB", "", ""},
		{"small mesh cache", "page cache beside it", "MB", "", ""},
		{"small mesh killed", "processes killed for memory", "", "0", ""},
	}
)

// ratio compares two figures of the same run.
type ratio struct {
	what      string
	over, and figureID
}

var ratios = []ratio{
	{"first start to second start, every component, with Istio", meshAll, meshAllAgain},
	{"server's RSS with Istio and the app to without", "mesh server RSS", "bare server RSS"},
	{"CPU of all processes at rest, with Istio, the app and the store to without the store", "store all CPU", "mesh all CPU"},
	{"anonymous memory of all processes at rest, with the store to without", "store all anonymous", "mesh all anonymous"},
	{"one pod with a sidecar to one without", sidecarOne, plainOne},
	{"30 pods with sidecars to 30 without", sidecarMany, plainMany},
	{"most requests per second, two sidecars with mTLS to no mesh", two.most(), direct.most()},
	{"p99 at 1,000 requests per second, two sidecars with mTLS to no mesh", two.figure(topRate, "p99"), direct.figure(topRate, "p99")},
}

// report renders bench/README.md from the records of the parts.
func report(parts []part, known records) string {
	r := newResults()
	var latest machine
	for _, k := range known {
		r.addAll(k.Results)
		if k.Machine.Date >= latest.Date {
			latest = k.Machine
		}
	}
	var out strings.Builder
	t := template.Must(template.New("report").Funcs(template.FuncMap{
		"table":     func(rows []row) string { return table(r, rows) },
		"matrix":    func(m matrix) string { return matrixTable(r, m) },
		"processes": func(id setting) string { return processTable(r.Processes[id]) },
		"verdict":   func(id setting) string { return verdict(r.Verdicts[id]) },
		"value":     func(id figureID) string { return cell(r.Values[id]) },
		"size":      func() string { return cell(r.Values[fileSize]) },
	}).Parse(reportTemplate))
	err := t.Execute(&out, map[string]any{
		"Machine": latest, "Parts": partTable(parts, known),
		"Start": startRows, "Again": startAgainRows, "Bare": bareRows, "Agent": agentRows, "Members": memberRows(), "IdleRows": idleRows, "Pods": podRows, "Singles": singles,
		"SmallBare": smallBareRows, "SmallMesh": smallMeshRows, "Ratios": ratioTable(r, ratios),
		"API": apiMatrix(), "APIMemory": apiMemoryMatrix(), "APIRatios": ratioTable(r, apiRatios()), "APIClients": apiClients, "APIRounds": apiRounds, "APIObjects": apiClients * apiCreates,
		"Failover": failoverRows(), "StreamRate": streamRate, "LostAfter": lostAfter.Seconds(),
		"Network": networkMatrix(), "NetworkRatios": ratioTable(r, networkRatios()), "KeptRate": keptRate, "NewRate": newRate, "NetworkRounds": networkRounds,
		"Growth": growthMatrix(), "GrowthCost": growthCostMatrix(), "GrowthRatios": ratioTable(r, growthRatios()), "HollowKubelet": stores[0].figure(hollowStage(hollowSizes[0]), "kubelet"),
		"HollowEach": podsEach, "FakeEach": fakePodsEach, "Creators": creators, "ProbePage": probePage,
		"BareID": bareIdle, "AgentID": agentIdle, "MeshID": meshIdle, "StoreID": storeIdle, "SmallBareID": smallBare, "SmallMeshID": smallMesh,
		"Latency": latencyMatrix(), "Most": mostRows(), "Cost": costMatrix(), "StatsLogger": statsLoggerRows,
		"Sidecars": sidecarMatrix(), "Pushes": pushRows(), "Connections": connections, "Endpoints": endpointsEach,
		"Store": storeMatrix(), "StoreQueries": storeQueryRows(), "StoreRounds": queryRounds,
		"Deploy": deployRows, "Languages": languageMatrix(), "LanguageRate": languageRate,
	})
	if err != nil {
		panic(err) // the template is embedded
	}
	return out.String()
}

// partTable lists when and how each part was measured.
func partTable(parts []part, known records) string {
	var out strings.Builder
	out.WriteString("| part | date | Polymesh | runs | settings | load before: min | median | max |\n| --- | --- | --- | ---: | --- | ---: | ---: | ---: |\n")
	for _, p := range parts {
		k := known[p.name]
		if k == nil {
			fmt.Fprintf(&out, "| %s | not measured | | | | | | |\n", p.name)
			continue
		}
		fmt.Fprintf(&out, "| %s | %s | %s | %d | %s | %s |\n", p.name, k.Machine.Date, k.Machine.Polymesh, k.Runs, k.Settings, spread(k.Load))
	}
	return strings.TrimSuffix(out.String(), "\n")
}

func seconds(d time.Duration) string { return number(d.Seconds()) + "s" }

// number formats a value with its significant digits.
func number(v float64) string {
	switch {
	case v >= 100 || v == float64(int(v)):
		return strconv.FormatFloat(v, 'f', 0, 64)
	case v >= 10:
		return strconv.FormatFloat(v, 'f', 1, 64)
	}
	return strconv.FormatFloat(v, 'f', 2, 64)
}

// spread returns minimum, median and maximum as table cells.
func spread(values []float64) string {
	if len(values) == 0 {
		return "– | – | –"
	}
	return number(slices.Min(values)) + " | " + number(median(values)) + " | " + number(slices.Max(values))
}

// cell returns the median, with minimum and maximum if they differ.
func cell(values []float64) string {
	if len(values) == 0 {
		return "–"
	}
	low, high := number(slices.Min(values)), number(slices.Max(values))
	if low == high {
		return low
	}
	return fmt.Sprintf("%s (%s–%s)", number(median(values)), low, high)
}

// matrix is a table of figures in two dimensions.
type matrix struct {
	heads []string // the first is the head of the lines' names
	lines []line
}

type line struct {
	name string
	ids  []figureID
}

func matrixTable(r *results, m matrix) string {
	var out strings.Builder
	fmt.Fprintf(&out, "| %s |\n| --- |%s\n", strings.Join(m.heads, " | "), strings.Repeat(" ---: |", len(m.heads)-1))
	for _, l := range m.lines {
		out.WriteString("| " + l.name + " |")
		for _, id := range l.ids {
			out.WriteString(" " + cell(r.Values[id]) + " |")
		}
		out.WriteString("\n")
	}
	return strings.TrimSuffix(out.String(), "\n")
}

func table(r *results, rows []row) string {
	var out strings.Builder
	out.WriteString("| | unit | min | median | max | aim | elsewhere |\n| --- | --- | ---: | ---: | ---: | --- | --- |\n")
	for _, f := range rows {
		fmt.Fprintf(&out, "| %s | %s | %s | %s | %s |\n", f.what, f.unit, spread(r.Values[f.id]), f.aim, f.other)
	}
	return strings.TrimSuffix(out.String(), "\n")
}

func ratioTable(r *results, ratios []ratio) string {
	var out strings.Builder
	out.WriteString("| | ratio of the medians |\n| --- | ---: |\n")
	for _, c := range ratios {
		over, and := r.Values[c.over], r.Values[c.and]
		if len(over) > 0 && len(and) > 0 && median(and) > 0 {
			fmt.Fprintf(&out, "| %s | %s |\n", c.what, number(median(over)/median(and)))
		}
	}
	return strings.TrimSuffix(out.String(), "\n")
}

// processTable has a row for each kind of process: its values over all processes of that kind in all runs.
func processTable(runs [][]process) string {
	kinds := map[string][]process{}
	for _, run := range runs {
		for _, p := range run {
			kinds[p.Name] = append(kinds[p.Name], p)
		}
	}
	of := func(kind string, value func(process) float64) []float64 {
		var values []float64
		for _, p := range kinds[kind] {
			values = append(values, value(p))
		}
		return values
	}
	rss := func(p process) float64 { return p.RSS }
	names := slices.SortedFunc(maps.Keys(kinds), func(a, b string) int {
		if d := median(of(b, rss)) - median(of(a, rss)); d != 0 {
			return int(d / max(d, -d))
		}
		return strings.Compare(a, b)
	})
	var out strings.Builder
	out.WriteString("| process | count | RSS, MB: min | median | max | anonymous, MB: min | median | max | CPU, % of a core: min | median | max |\n" +
		"| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n")
	for _, name := range names {
		count := float64(len(kinds[name])) / float64(len(runs))
		fmt.Fprintf(&out, "| %s | %s | %s | %s | %s |\n", name, number(count), spread(of(name, rss)),
			spread(of(name, func(p process) float64 { return p.Anonymous })), spread(of(name, func(p process) float64 { return p.CPU })))
	}
	return strings.TrimSuffix(out.String(), "\n")
}

// verdict counts the results of all runs.
func verdict(answers []string) string {
	count := map[string]int{}
	for _, a := range answers {
		count[a]++
	}
	if len(count) == 1 {
		return answers[0]
	}
	var parts []string
	for _, a := range slices.Sorted(maps.Keys(count)) {
		parts = append(parts, fmt.Sprintf("%d of %d runs: %s", count[a], len(answers), a))
	}
	return strings.Join(parts, "; ")
}
