package page

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"math"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"polymesh.dev/polymesh/observe/document"
	"polymesh.dev/polymesh/observe/logstore"
	"polymesh.dev/polymesh/observe/podlogs"
)

const (
	// An edge on which more than this share of requests fails is worth a sentence, more than the second one is bad.
	failingShare, badShare = 0.01, 0.05
	// fewRequests is how many failed requests are needed at least: one of three is no rate.
	fewRequests = 3
	// sinceWindow is how far back the start of a problem is searched.
	sinceWindow = 24 * time.Hour
	// maxStatements of one kind are shown.
	maxStatements = 8
	// maxDropReports are read, one for each container and ten seconds.
	maxDropReports = 2000
)

// level orders statements: what is wrong first.
type level string

const (
	bad  level = "bad"
	warn level = "warn"
	note level = "note"
)

func (l level) order() int { return slices.Index([]level{bad, warn, note}, l) }

// statement is a sentence about what is wrong, or worth knowing.
type statement struct {
	Level  level  `json:"level"`
	Text   string `json:"text"`
	Why    string `json:"why,omitempty"`
	Advice string `json:"advice,omitempty"`
	Since  int64  `json:"since,omitempty"` // Unix milliseconds
	// Earlier means that it began before what was looked at, Once that it happened at that time and is over.
	Earlier bool `json:"earlier,omitempty"`
	Once    bool `json:"once,omitempty"`
	// Link is a path of the page, with escaped names.
	Link string `json:"link,omitempty"`
}

// overviewAnswer says whether anything is wrong, since when, and why.
type overviewAnswer struct {
	Start      int64       `json:"start"`
	End        int64       `json:"end"`
	Verdict    level       `json:"verdict"` // of the worst statement; note if nothing is wrong
	Recorded   bool        `json:"recorded"`
	Statements []statement `json:"statements"`
	Numbers    struct {
		Workloads      int      `json:"workloads"`
		ReadyWorkloads int      `json:"readyWorkloads"`
		Pods           int      `json:"pods"`
		ReadyPods      int      `json:"readyPods"`
		Nodes          int      `json:"nodes"`
		ReadyNodes     int      `json:"readyNodes"`
		Rate           float64  `json:"rate"` // requests per second
		Errors         float64  `json:"errors"`
		P99            *float64 `json:"p99,omitempty"`
		Calls          int      `json:"calls"`
		MutualTLS      int      `json:"mutualTLS"` // of the calls whose security is known
		KnownSecurity  int      `json:"knownSecurity"`
	} `json:"numbers"`
	Rates     []line `json:"rates"`     // by class of code
	Quantiles []line `json:"quantiles"` // milliseconds
	Changes   []mark `json:"changes"`   // the newest first

	found *diagnosis
	// workloads are those of all namespaces, and explained the pods of which the diagnosis says why they are not ready.
	workloads []document.Workload
	explained map[podKey]bool
}

// overview answers with the state of everything in sentences. Parameters: end, window, ns.
func (s *server) overview(r *http.Request) (any, error) {
	p, err := s.periodOf(r)
	if err != nil {
		return nil, err
	}
	namespaces, err := namesOf(r, "ns")
	if err != nil {
		return nil, err
	}
	ctx := r.Context()
	a := &overviewAnswer{Start: p.start.UnixMilli(), End: p.end.UnixMilli(), Statements: []statement{}}
	for _, add := range []func(context.Context, *overviewAnswer, period, []string) error{
		s.addCluster, s.addFindings, s.addNodes, s.addWorkloads, s.addCalls, s.addRollouts, s.addTargets, s.addDroppedLines, s.addAlerts, s.addCharts,
	} {
		if err := add(ctx, a, p, namespaces); err != nil {
			return nil, err
		}
	}
	if a.Changes, err = s.marksIn(ctx, p, namespaces, ""); err != nil {
		return nil, err
	}
	slices.SortStableFunc(a.Statements, func(x, y statement) int { return x.Level.order() - y.Level.order() })
	a.Verdict = note
	if len(a.Statements) > 0 {
		a.Verdict = a.Statements[0].Level
	}
	return a, nil
}

func (a *overviewAnswer) say(st statement) { a.Statements = append(a.Statements, st) }

// route returns a path of the page from names that can be anything.
func route(parts ...string) string {
	var b strings.Builder
	for _, part := range parts {
		b.WriteString("/" + url.PathEscape(part))
	}
	return b.String()
}

func (s *server) addCluster(ctx context.Context, a *overviewAnswer, p period, _ []string) error {
	vector, err := s.instant(ctx, "count(last_over_time("+selector("up")+"["+duration(max(p.window(), 5*time.Minute))+"]))", p.end)
	if err != nil {
		return err
	}
	a.Recorded = len(vector) > 0
	state := s.Cluster.State()
	if state.Offline {
		a.say(statement{Level: note, Text: "These are recorded files, up to this time. Nothing is recorded now.", Since: state.Since.UnixMilli(), Once: true})
	}
	if !state.Reachable && !state.Offline && s.Now().Sub(p.end) < time.Minute {
		st := statement{Level: bad, Text: "The API server does not respond. What you see is what was recorded.", Advice: "Run polymesh status on a server."}
		if !state.Since.IsZero() {
			st.Since = state.Since.UnixMilli()
		}
		a.say(st)
	}
	return nil
}

// addFindings adds what the server's diagnosis has found.
func (s *server) addFindings(ctx context.Context, a *overviewAnswer, p period, namespaces []string) error {
	var err error
	if a.found, err = s.diagnosisAt(ctx, p.end); err != nil {
		return err
	}
	if a.workloads, err = s.latestWorkloads(ctx, p.end); err != nil {
		return err
	}
	a.explained = a.found.explained(a.workloads)
	for _, st := range a.found.statements(namespaces) {
		st.Earlier = st.Since > 0 && st.Since <= p.end.Add(-sinceWindow).UnixMilli()
		a.say(st)
	}
	return nil
}

func (s *server) addNodes(ctx context.Context, a *overviewAnswer, p period, _ []string) error {
	rows, err := s.nodeRows(ctx, p)
	if err != nil {
		return err
	}
	for _, n := range rows {
		a.Numbers.Nodes++
		if n.Ready || !n.Known {
			a.Numbers.ReadyNodes++
		}
	}
	longer := p
	if longer.window() < time.Hour {
		longer.start = longer.end.Add(-time.Hour)
	}
	triggers, err := s.triggers(ctx, longer)
	if err != nil {
		return err
	}
	for _, t := range triggers {
		if t.pods != nil {
			t.name(slices.DeleteFunc(t.pods, func(pod waitingPod) bool { return a.explained[pod.podKey] }))
		}
		if t.Firing {
			text, advice := t.sentence()
			a.say(statement{Level: warn, Text: text, Advice: advice, Since: t.Since, Earlier: t.Since <= longer.start.UnixMilli(), Link: "/nodes"})
		}
	}
	return nil
}

func (s *server) addWorkloads(ctx context.Context, a *overviewAnswer, p period, namespaces []string) error {
	restarts, err := s.byPod(ctx, "increase("+ofContainers("status_restarts_total")+"["+duration(p.window())+"])", p.end)
	if err != nil {
		return err
	}
	more := 0
	for i := range a.workloads {
		w := &a.workloads[i]
		if len(namespaces) > 0 && !slices.Contains(namespaces, w.Namespace) {
			continue
		}
		a.Numbers.Workloads++
		restarted, ended, at := 0.0, (*document.End)(nil), p.start
		for _, pod := range w.Pods {
			a.Numbers.Pods++
			if pod.Ready || pod.Phase == "Succeeded" {
				a.Numbers.ReadyPods++
			}
			restarted += restarts[podKey{w.Namespace, pod.Name}]
			for _, c := range pod.Containers {
				if c.Last != nil && !c.Last.Finished.Before(at) {
					ended, at = c.Last, c.Last.Finished.Time
				}
			}
		}
		link := route("workloads", w.Namespace, w.Name)
		if !isUnready(w) {
			a.Numbers.ReadyWorkloads++
		}
		switch {
		case len(a.found.of(keyOf(w))) > 0 || more > maxStatements:
		case isUnready(w) && !a.found.known:
			more++
			st := statement{Level: warn, Text: fmt.Sprintf("%s in %s: %s. Why was not recorded.", w.Name, w.Namespace, problemOf(w, a.found).Text), Link: link}
			if w.Ready == 0 {
				st.Level = bad
			}
			a.say(st)
		case restarted >= 0.5:
			more++
			st := statement{Level: warn, Text: fmt.Sprintf("%s in %s was restarted %s.", w.Name, w.Namespace, times(restarted)), Link: link}
			switch {
			case ended == nil:
				// The cluster may have lost how it ended, and the metrics still have when.
				if at, err = s.restartedAt(ctx, p, w); err != nil {
					return err
				}
				st.Why = "How it ended was not recorded."
			case ended.Reason == "OOMKilled":
				st.Text = fmt.Sprintf("%s in %s was killed at its memory limit and restarted %s.", w.Name, w.Namespace, times(restarted))
				st.Advice = "Raise the memory limit, or find what needs so much."
			case ended.ExitCode == 0:
				st.Why = "The last time, it ended by itself, without an error (exit code 0)."
			default:
				st.Why = fmt.Sprintf("The last time, it ended with exit code %d", ended.ExitCode)
				if ended.Reason != "" {
					st.Why += " (" + ended.Reason + ")"
				}
				st.Why += "."
			}
			if !at.IsZero() {
				st.Since, st.Once = at.UnixMilli(), true
			}
			a.say(st)
		}
	}
	return nil
}

// restartedAt returns when a container of a workload was last restarted in a period, by the metrics; zero if they do not tell.
func (s *server) restartedAt(ctx context.Context, p period, w *document.Workload) (time.Time, error) {
	var names []string
	for _, pod := range w.Pods[:min(len(w.Pods), maxNames)] {
		names = append(names, pod.Name)
	}
	lines, err := s.over(ctx, "sum by (pod) ("+ofContainers("status_restarts_total", is("namespace", w.Namespace), oneOf("pod", names...))+")", p, p.step(chartPoints))
	if err != nil {
		return time.Time{}, err
	}
	var last time.Time
	for _, l := range lines {
		for i := 1; i < len(l.Points); i++ {
			if at := time.UnixMilli(int64(l.Points[i][0])); l.Points[i][1] > l.Points[i-1][1] && at.After(last) {
				last = at
			}
		}
	}
	return last, nil
}

func times(n float64) string {
	if n = math.Round(n); n > 1 {
		return fmt.Sprintf("%.0f times", n)
	}
	return "once"
}

// addCalls adds a sentence for each edge on which requests fail.
func (s *server) addCalls(ctx context.Context, a *overviewAnswer, p period, namespaces []string) error {
	measured, err := s.recorded(ctx, p)
	if err != nil {
		return err
	}
	all, err := s.traffic(ctx, measured)
	if err != nil {
		return err
	}
	type failing struct {
		from, to nodeKey
		counts
		reporter string
	}
	var list []failing
	for ends, c := range all.edges {
		if len(namespaces) > 0 && !slices.Contains(namespaces, ends[0].Namespace) && !slices.Contains(namespaces, ends[1].Namespace) {
			continue
		}
		a.Numbers.Calls++
		switch c.securityOf() {
		case "mtls":
			a.Numbers.MutualTLS++
			a.Numbers.KnownSecurity++
		case "plain", "mixed":
			a.Numbers.KnownSecurity++
		}
		n, reporter := c.requests()
		a.Numbers.Rate += n.requests / measured.window().Seconds()
		a.Numbers.Errors += n.errors / measured.window().Seconds()
		if n.errors >= fewRequests-0.5 && n.errors/n.requests >= failingShare {
			list = append(list, failing{ends[0], ends[1], n, reporter})
		}
	}
	slices.SortFunc(list, func(x, y failing) int {
		return cmp.Or(cmp.Compare(y.errors, x.errors), x.from.compare(y.from), x.to.compare(y.to))
	})
	a.addUnrouted(all, namespaces)
	for i, f := range list {
		if i == maxStatements {
			a.say(statement{Level: warn, Text: fmt.Sprintf("Requests fail on %s.", plural(len(list)-i, "more connection", "more connections")), Link: "/graph?errors=1"})
			break
		}
		q := edgeQuery{s: s, p: measured, from: f.from, to: f.to, reporter: f.reporter, all: all}
		st := statement{Level: warn, Link: edgeRoute(f.from, f.to)}
		share := f.errors / f.requests
		if share >= badShare {
			st.Level = bad
		}
		st.Text = fmt.Sprintf("%s of the requests from %s to %s fail: %.0f of %.0f.", percentOf(share), f.from.title(), f.to.title(), f.errors, f.requests)
		if st.Why, err = q.mostly(ctx); err != nil {
			return err
		}
		// What fails further down is often the reason.
		if j := slices.IndexFunc(list, func(g failing) bool { return g.from == f.to }); j >= 0 {
			st.Why = strings.TrimSpace(st.Why + fmt.Sprintf(" Its own requests to %s fail, too.", list[j].to.title()))
		}
		since, earlier, err := q.failingSince(ctx)
		if err != nil {
			return err
		}
		st.Since, st.Earlier = since, earlier
		a.say(st)
	}
	return nil
}

// addUnrouted names the proxies that had no route for requests. To a gateway, these are usually a wrong host or path, or scanners from outside.
func (a *overviewAnswer) addUnrouted(all *graphOfCalls, namespaces []string) {
	var keys []nodeKey
	for k, facts := range all.nodes {
		if facts.noRoute >= fewRequests-0.5 && (len(namespaces) == 0 || slices.Contains(namespaces, k.Namespace)) {
			keys = append(keys, k)
		}
	}
	slices.SortFunc(keys, func(x, y nodeKey) int {
		return cmp.Or(cmp.Compare(all.nodes[y].noRoute, all.nodes[x].noRoute), x.compare(y))
	})
	for _, k := range keys[:min(len(keys), maxStatements)] {
		a.say(statement{
			Level: note, Text: fmt.Sprintf("%s to %s ended with 404 in its own proxy: no route has their host and path.", plural(int(math.Round(all.nodes[k].noRoute)), "request", "requests"), k.title()),
			Advice: "Compare them with the hosts and paths of the VirtualServices, HTTPRoutes and Ingresses.", Link: route("workloads", k.Namespace, k.Name),
		})
	}
}

func percentOf(share float64) string {
	if share < 0.1 {
		return fmt.Sprintf("%.1f %%", 100*share)
	}
	return fmt.Sprintf("%.0f %%", 100*share)
}

// title names a node in a sentence.
func (k nodeKey) title() string {
	switch k.Kind {
	case anUnknown:
		return "callers without a sidecar"
	case aService:
		return "service " + k.Name + " in " + k.Namespace
	}
	return k.Name
}

func edgeRoute(from, to nodeKey) string {
	blank := func(name string) string { return cmp.Or(name, "-") }
	path := route("edge", blank(from.Namespace), blank(from.Name), blank(to.Namespace), to.Name)
	if to.Kind != aWorkload {
		path += "?kind=" + string(to.Kind)
	}
	return path
}

// mostly returns how most of the failed requests ended.
func (q *edgeQuery) mostly(ctx context.Context) (string, error) {
	codes, err := q.codes(ctx)
	if err != nil {
		return "", err
	}
	for _, c := range codes {
		if !c.Failed {
			continue
		}
		text := "Most end with " + c.Code
		switch {
		case c.Code == "0":
			text = "Most get no response"
		case c.GRPC != "" && c.GRPC != "0":
			text = "Most end with gRPC status " + c.GRPC
		}
		if c.Flags != "" {
			text += " (" + cmp.Or(c.Meaning, c.Flags) + ")"
		}
		return text + ".", nil
	}
	return "", nil
}

// failingSince returns since when requests fail without a break.
func (q *edgeQuery) failingSince(ctx context.Context) (since int64, earlier bool, err error) {
	p := period{q.p.end.Add(-sinceWindow), q.p.end}
	const step = 5 * time.Minute
	rate := func(selected string) string { return "rate(" + selected + "[5m])" }
	own := is("reporter", q.reporter)
	now, _, err := q.s.above(ctx, "sum("+q.expression("istio_requests_total", rate, own, matches("response_code", failedCodes))+") / sum("+q.expression("istio_requests_total", rate, own)+")", failingShare/2, p, step)
	if err != nil || len(now) == 0 {
		return 0, false, err
	}
	return now[0].since.UnixMilli(), now[0].since.Sub(p.start) < step, nil
}

func (s *server) addRollouts(ctx context.Context, a *overviewAnswer, p period, namespaces []string) error {
	list, err := s.rolloutsIn(ctx, period{p.end.Add(-24 * time.Hour), p.end}, inNamespaces(namespaces)...)
	if err != nil {
		return err
	}
	if err := s.explainRollouts(ctx, list, p.end); err != nil {
		return err
	}
	seen := map[[2]string]bool{}
	for _, r := range list {
		// Of several, the last one counts.
		key := [2]string{r.Namespace, r.Name}
		if seen[key] || len(seen) > maxStatements {
			continue
		}
		seen[key] = true
		st := statement{Level: note, Since: r.Started.UnixMilli(), Link: fmt.Sprintf("%s?started=%d", route("rollouts", r.Namespace, r.Name), r.Started.UnixMilli())}
		switch {
		case !r.Over():
			st.Text, st.Why = fmt.Sprintf("A rollout of %s in %s is under way: %d %% of the requests go to %s.", r.Name, r.Namespace, r.Weight, r.Image), r.Reason
		case r.Phase == "RolledBack":
			st.Level, st.Since, st.Once, st.Why = warn, r.Ended.UnixMilli(), true, r.Reason
			st.Text = fmt.Sprintf("The rollout of %s in %s to %s was rolled back.", r.Name, r.Namespace, r.Image)
		default:
			continue
		}
		a.say(st)
	}
	return nil
}

// addTargets adds which of the store's own targets cannot be read: their metrics are missing everywhere else.
func (s *server) addTargets(ctx context.Context, a *overviewAnswer, p period, _ []string) error {
	longer := period{p.end.Add(-max(p.window(), time.Hour)), p.end}
	down, _, err := s.above(ctx, selector("up")+" == 0", -1, longer, longer.step(chartPoints))
	if err != nil {
		return err
	}
	users := 0
	byJob := map[string][]standing{}
	for _, x := range down {
		job := x.labels["job"]
		if strings.Contains(job, "/") {
			users++
			continue
		}
		byJob[job] = append(byJob[job], x)
	}
	for _, job := range slices.Sorted(maps.Keys(byJob)) {
		var names []string
		since := p.end
		for _, x := range byJob[job] {
			names = append(names, x.labels["instance"])
			if x.since.Before(since) {
				since = x.since
			}
		}
		slices.Sort(names)
		their := "their"
		if len(names) == 1 {
			their = "its"
		}
		a.say(statement{
			Level: warn, Text: fmt.Sprintf("%s of %s cannot be read: %s. Without that, %s metrics are missing.", plural(len(names), "target", "targets"), job, listed(names, 3), their),
			Since: since.UnixMilli(), Earlier: !since.After(longer.start), Link: "/metrics?q=" + url.QueryEscape("up{job="+fmt.Sprintf("%q", job)+"} == 0"),
		})
	}
	if users > 0 {
		a.say(statement{
			Level: note, Text: fmt.Sprintf("%s of your own scrape jobs cannot be read.", plural(users, "target", "targets")),
			Link: "/metrics?q=" + url.QueryEscape(`up{job=~".*/.*"} == 0`),
		})
	}
	return nil
}

// addDroppedLines adds whose log lines are missing because their pods write more than is kept.
func (s *server) addDroppedLines(ctx context.Context, a *overviewAnswer, p period, namespaces []string) error {
	type (
		workloadKey struct{ namespace, name string }
		loud        struct {
			lines uint64
			since time.Time
		}
	)
	found := map[workloadKey]loud{}
	reports := 0
	err := s.Logs.Select(ctx, logstore.Selector{
		Matchers: append([]logstore.Matcher{equal("job", podlogs.Job), equal("stream", podlogs.StreamPolymesh)}, inNamespaces(namespaces)...),
		Start:    p.start, End: p.end, Newest: true, Limit: maxDropReports,
	}, func(e logstore.Entry) bool {
		reports++
		// Other nodes report theirs, and may be wrong.
		n, err := strconv.ParseUint(logstore.Value(e.Metadata, podlogs.MetaDropped), 10, 32)
		if err != nil {
			return true
		}
		k := workloadKey{logstore.Value(e.Labels, "namespace"), logstore.Value(e.Labels, "workload")}
		found[k] = loud{found[k].lines + n, e.Time}
		return true
	})
	if err != nil {
		return fmt.Errorf("select the reports about dropped lines: %w", err)
	}
	keys := slices.SortedFunc(maps.Keys(found), func(x, y workloadKey) int {
		return cmp.Or(cmp.Compare(found[y].lines, found[x].lines), cmp.Compare(x.namespace, y.namespace), cmp.Compare(x.name, y.name))
	})
	for _, k := range keys[:min(len(keys), maxStatements)] {
		verb := "were"
		if found[k].lines == 1 {
			verb = "was"
		}
		text := fmt.Sprintf("%s of %s in %s %s dropped", plural(int(found[k].lines), "log line", "log lines"), k.name, k.namespace, verb)
		if reports == maxDropReports {
			text = "At least " + text
		}
		a.say(statement{
			Level: warn, Text: text + ".", Why: "A pod of it writes more than is kept of one.", Advice: "Let it log less; what is written to files of its own does not count.",
			Since: found[k].since.UnixMilli(), Link: route("workloads", k.namespace, k.name),
		})
	}
	return nil
}

// addAlerts adds alerts, users' and the store's own, without those with a trigger: the page says itself what these are about.
func (s *server) addAlerts(ctx context.Context, a *overviewAnswer, p period, _ []string) error {
	firing, _, err := s.above(ctx, selector("ALERTS", is("alertstate", "firing"), is("trigger", "")), 0, period{p.end.Add(-sinceWindow), p.end}, 5*time.Minute)
	if err != nil {
		return err
	}
	for _, x := range firing[:min(len(firing), maxStatements)] {
		of := x.labels
		text := "Alert " + of["alertname"] + " is firing"
		if name := cmp.Or(of["workload"], of["pod"], of["instance"], of["namespace"]); name != "" {
			text += " for " + name
		}
		st := statement{Level: warn, Text: text + ".", Since: x.since.UnixMilli(), Link: "/metrics?q=" + url.QueryEscape(`ALERTS{alertname=`+fmt.Sprintf("%q", of["alertname"])+`}`)}
		if of["severity"] == "critical" {
			st.Level = bad
		}
		a.say(st)
	}
	return nil
}

func (s *server) addCharts(ctx context.Context, a *overviewAnswer, p period, namespaces []string) error {
	of := []string{ofProxies, is("reporter", "destination")}
	if len(namespaces) > 0 {
		of = append(of, oneOf("destination_workload_namespace", namespaces...))
	}
	const buckets = "istio_request_duration_milliseconds_bucket"
	counted, err := s.instant(ctx, "count("+selector(buckets, of...)+")", p.end)
	if err != nil {
		return err
	}
	points := chartPoints
	if len(counted) > 0 {
		// A chart of many services has fewer points.
		points = min(points, max(fewestPoints, int(chartSamples/counted[0].F)))
	}
	step := p.step(points)
	rate := func(metric string) string {
		return "rate(" + selector(metric, of...) + "[" + duration(max(4*step, time.Minute)) + "])"
	}
	if a.Rates, err = s.over(ctx, byClass(rate("istio_requests_total")), p, step); err != nil {
		return err
	}
	if a.Quantiles, err = s.quantiles(ctx, rate(buckets), p, step); err != nil {
		return err
	}
	vector, err := s.instant(ctx, "histogram_quantile(0.99, sum by (le) (rate("+selector(buckets, of...)+"["+duration(p.window())+"])))", p.end)
	if err != nil {
		return err
	}
	if len(vector) > 0 && !math.IsNaN(vector[0].F) && !math.IsInf(vector[0].F, 0) {
		a.Numbers.P99 = &vector[0].F
	}
	return nil
}
