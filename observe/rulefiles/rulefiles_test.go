package rulefiles

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/promql/parser"
	"github.com/stretchr/testify/require"
)

func parse1(text string) (File, []string) {
	f, problems := Parse([]byte(text), "shop", "rules", "a.yaml")
	var s []string
	for _, p := range problems {
		s = append(s, p.Message)
	}
	return f, s
}

// The five rows of the guide's table, with its figures.
func TestDefault(t *testing.T) {
	f, err := Default()
	require.NoError(t, err)
	var got []string
	for _, r := range f.Groups.Groups[0].Rules {
		got = append(got, r.Labels["trigger"]+" "+r.Expr[strings.LastIndex(r.Expr, ">"):]+" "+r.For.String())
	}
	require.Equal(t, []string{"cpu > 70 10m", "memory > 80 5m", "pending > 0 0s", "evicted > 0 0s", "apiserver > 1 5m"}, got)
	require.Equal(t, 14, f.Rules)
	// They keep to what users' have to keep to.
	f.Name = ""
	_, problems := parse1(string(defaultRules))
	require.Empty(t, problems)
}

func TestUsers(t *testing.T) {
	f, problems := parse1(`
groups:
- name: requests
  interval: 1s
  labels: {team: shop}
  rules:
  - record: namespace:istio_requests:rate5m
    expr: sum by (destination_workload_namespace) (rate(istio_requests_total{reporter="destination"}[5m]))
  - alert: Errors
    expr: namespace:istio_requests:rate5m > 1
    for: 5m
    labels: {severity: '{{ if gt $value 10.0 }}critical{{ else }}warning{{ end }}'}
    annotations:
      summary: '{{ $labels.namespace }}: {{ $value | humanize }} ({{ printf "%-5.2f %s" $value (toUpper $labels.job) }}){{/* a comment */}}'
- name: second
  rules: []
`)
	require.Empty(t, problems)
	require.Equal(t, "shop/rules/a.yaml", f.Name)
	require.Equal(t, 2, f.Rules)
	g := f.Groups.Groups[0]
	require.Equal(t, model.Duration(15*time.Second), g.Interval)
	require.Equal(t, 1000, g.Limit)
	require.Zero(t, f.Groups.Groups[1].Interval)
	_, problems = parse1("")
	require.Empty(t, problems)
}

func TestRefused(t *testing.T) {
	alert := func(annotation string) string {
		return fmt.Sprintf("groups: [{name: a, rules: [{alert: A, expr: up, annotations: {x: %q}}]}]", annotation)
	}
	for what, c := range map[string]struct{ text, problem string }{
		"no YAML":                  {"{", "Prometheus does not accept it"},
		"an unknown field":         {"groups: [{name: a, x: b}]", "field x not found"},
		"a broken expression":      {"groups: [{name: a, rules: [{alert: A, expr: 'up{'}]}]", "could not parse expression"},
		"both":                     {"groups: [{name: a, rules: [{alert: A, record: 'a:b', expr: up}]}]", "only one of"},
		"a group twice":            {"groups: [{name: a}, {name: a}]", "repeated"},
		"a metric's name":          {"groups: [{name: a, rules: [{record: istio_requests_total, expr: up}]}]", "needs a colon"},
		"a name of the store's":    {"groups: [{name: a, rules: [{record: 'polymesh:x', expr: up}]}]", "needs a colon"},
		"many groups":              {"groups: [" + groups(21) + "]", "it has 21 groups"},
		"many rules":               {"groups: [{name: a, rules: [" + strings.Repeat("{record: 'a:b', expr: up}, ", 100) + "{record: 'a:b', expr: up}]}]", "it has 101 rules"},
		"a long expression":        {"groups: [{name: a, rules: [{record: 'a:b', expr: '" + strings.Repeat("1+", 2500) + "1'}]}]", "more than 4096 bytes"},
		"a deep expression":        {"groups: [{name: a, rules: [{record: 'a:b', expr: '" + strings.Repeat("(", 101) + "1" + strings.Repeat(")", 101) + "'}]}]", "nested 101 deep"},
		"repeated labels":          {"groups: [{name: a, rules: [{record: 'a:b', expr: 'label_replace(up, \"a\", \"" + strings.Repeat("$1", 65) + "\", \"a\", \"(.*)\")'}]}]", "repeat labels too often"},
		"nested subqueries":        {"groups: [{name: a, rules: [{record: 'a:b', expr: 'max_over_time(max_over_time(up[1d:10s])[1d:10s])'}]}]", "its subqueries have"},
		"a long annotation":        {alert(strings.Repeat("a", 2000)), "more than 1024 bytes"},
		"a long name":              {"groups: [{name: a, rules: [{alert: " + strings.Repeat("a", 200) + ", expr: up}]}]", "more than 128 bytes"},
		"a long group's name":      {"groups: [{name: " + strings.Repeat("a", 200) + "}]", "more than 128 bytes"},
		"a large file":             {"# " + strings.Repeat("a", maxFile), "at most 131072"},
		"a loop":                   {alert(`{{ range query "up" }}{{ . }}{{ end }}`), "is not allowed in templates"},
		"a query":                  {alert(`{{ query "up" | first | value }}`), `"query" is not allowed`},
		"with":                     {alert(`{{ with printf "%s%s" "a" "a" }}{{ printf "%s%s" . . }}{{ end }}`), "is not allowed in templates"},
		"a variable":               {alert(`{{ $x := "a" }}{{ $x = printf "%s%s" $x $x }}`), "variables are not allowed"},
		"a variable of an if":      {alert(`{{ if $x := "a" }}{{ $x }}{{ end }}`), "variables are not allowed"},
		"recursion":                {alert(`{{ define "a" }}{{ template "a" }}{{ end }}{{ template "a" }}`), "define and block"},
		"a template":               {alert(`{{ template "__alert_A" . }}`), "is not allowed in templates"},
		"a repeated argument":      {alert(`{{ printf "%[1]s%[1]s" "a" }}`), "printf needs a format"},
		"a width":                  {alert(`{{ printf "%1000000d" 1 }}`), "printf needs a format"},
		"a width as argument":      {alert(`{{ printf "%*d" 1000000 1 }}`), "printf needs a format"},
		"a precision":              {alert(`{{ printf "%.999999f" 1.0 }}`), "printf needs a format"},
		"a verb that doubles":      {alert(`{{ printf "%x" (printf "%x" "a") }}`), "printf needs a format"},
		"a format that is made":    {alert(`{{ printf (printf "%s%s" "%999" "999d") 1 }}`), "printf needs a format"},
		"a format by a pipe":       {alert(`{{ "%999999d" | printf }}`), "printf needs a format"},
		"printf as an argument":    {alert(`{{ and printf }}`), ""},
		"a replacement":            {alert(`{{ reReplaceAll "" "aaaaaaaa" "b" }}`), `"reReplaceAll" is not allowed`},
		"an escape":                {alert(`{{ js "\\" }}`), `"js" is not allowed`},
		"in a label":               {"groups: [{name: a, rules: [{alert: A, expr: up, labels: {x: '{{ query \"up\" }}'}}]}]", `"query" is not allowed`},
		"many labels":              {"groups: [{name: a, rules: [{alert: A, expr: up, annotations: {" + annotations(31) + "}}]}]", "more than 30 labels"},
		"a function of a function": {alert(`{{ call .X }}`), `"call" is not allowed`},
	} {
		t.Run(what, func(t *testing.T) {
			f, problems := parse1(c.text)
			if c.problem == "" {
				return // harmless: it fails when it is evaluated
			}
			require.NotEmpty(t, problems)
			require.Contains(t, strings.Join(problems, "\n"), c.problem)
			require.Nil(t, f.Groups)
			for _, p := range problems {
				require.Less(t, len(p), 600)
			}
		})
	}
}

func TestDepth(t *testing.T) {
	for expr, want := range map[string]int{
		"": 0, "up": 0, `sum(rate(a{b="c"}[5m]))`: 3, `{a="(((("}`: 1, `{a='\'(('}`: 1, "{a=`\\`} + ((1))": 2, `{a="\\"} + ((1))`: 2,
		"# ' (((\n((1))": 2, "((((": 4, "))((": 0, `"`: 0, `"\`: 0, "#": 0,
	} {
		require.Equal(t, want, Depth(expr), expr)
	}
}

func groups(n int) string {
	var s []string
	for i := range n {
		s = append(s, fmt.Sprintf("{name: g%d}", i))
	}
	return strings.Join(s, ", ")
}

func annotations(n int) string {
	var s []string
	for i := range n {
		s = append(s, fmt.Sprintf("a%d: x", i))
	}
	return strings.Join(s, ", ")
}

func FuzzParse(f *testing.F) {
	f.Add(string(defaultRules))
	f.Add("groups: [{name: a, rules: [{record: 'a:b', expr: up}]}]")
	f.Fuzz(func(t *testing.T, text string) {
		file, problems := parse1(text)
		require.True(t, (file.Groups != nil) != (len(problems) > 0))
	})
}

// What repeats labels or steps is refused, and what people write is not.
func TestCheck(t *testing.T) {
	replace := func(inner, replacement string) string {
		return fmt.Sprintf(`label_replace(%s, "a", %q, "a", "(.*)")`, inner, replacement)
	}
	join := func(inner string, n int) string {
		return `label_join(` + inner + `, "a", "-"` + strings.Repeat(`, "a"`, n) + `)`
	}
	nested := func(n int, inner string, f func(string) string) string {
		for range n {
			inner = f(inner)
		}
		return inner
	}
	const day, hours = 24 * time.Hour, 3 * time.Hour
	for what, c := range map[string]struct {
		expr       string
		span, step time.Duration
		problem    string // empty: allowed
	}{
		"no function":              {expr: "up"},
		"one":                      {expr: replace("up", "$1:9090")},
		"four with two references": {expr: nested(4, "up", func(e string) string { return replace(e, "$1-$2") })},
		"ten with one":             {expr: nested(10, "up", func(e string) string { return replace(e, "x$1") })},
		"five labels, twice":       {expr: nested(2, "up", func(e string) string { return join(e, 5) })},
		"ten alternatives":         {expr: strings.Repeat(replace("up", "$1")+" or ", 9) + "up"},
		"a hundred terms":          {expr: strings.Repeat("up + ", 100) + "up"},
		"labels of another":        {expr: "up * on (pod) group_left (node, workload) kube_pod_info"},

		"300 sources, twice":     {expr: nested(2, replace("vector(1)", strings.Repeat("x", 4000)), func(e string) string { return join(e, 300) }), problem: "repeat labels too often"},
		"many references":        {expr: replace("up", strings.Repeat("$1", 65)), problem: "repeat labels too often"},
		"many in named form":     {expr: replace("up", strings.Repeat("${1}", 65)), problem: "repeat labels too often"},
		"in parentheses":         {expr: `label_replace(up, "a", ("` + strings.Repeat("$1", 65) + `"), "a", "(.*)")`, problem: "repeat labels too often"},
		"doubled":                {expr: nested(6, "up", func(e string) string { return replace(e, "$1$1") }), problem: "repeat labels too often"},
		"doubled under others":   {expr: nested(6, "up", func(e string) string { return "sum by (a) (-(" + replace(e, "$1$1") + "))" }), problem: "repeat labels too often"},
		"a doubled text":         {expr: nested(4, `vector(1)`, func(e string) string { return replace(e, "$1$1"+strings.Repeat("x", 1000)) }), problem: "repeat labels too often"},
		"long texts":             {expr: nested(3, "up", func(e string) string { return replace(e, strings.Repeat("x", 4000)) }), problem: "repeat labels too often"},
		"a long separator":       {expr: `label_join(up, "a", "` + strings.Repeat("x", 2000) + `", "b", "b", "b", "b", "b")`, problem: "repeat labels too often"},
		"many sides":             {expr: strings.Repeat(replace("up", "$1")+" or ", 70) + "up", problem: "repeat labels too often"},
		"in a subquery":          {expr: "max_over_time(" + nested(6, "up", func(e string) string { return replace(e, "$1$1") }) + "[1h:])", problem: "repeat labels too often"},
		"labels of many others":  {expr: "up" + strings.Repeat(" * on (pod) group_left (node) up", 70), problem: "repeat labels too often"},
		"a subquery":             {expr: "max_over_time(rate(up[5m])[1h:1m])", span: day, step: time.Minute},
		"a day at each point":    {expr: "max_over_time(rate(up[5m])[1d:])", span: 11000 * time.Second, step: time.Second},
		"two of them":            {expr: "max_over_time(avg_over_time(rate(up[5m])[1h:1m])[1d:5m])"},
		"two days of seconds":    {expr: "quantile_over_time(0.5, vector(1)[2d:1s])", span: 11000 * time.Second, step: time.Second, problem: "its subqueries have"},
		"ten hours of seconds":   {expr: "quantile_over_time(0.5, vector(1)[10h:1s])", span: 11000 * time.Second, step: time.Second, problem: "its subqueries have"},
		"milliseconds":           {expr: "max_over_time(vector(1)[1d:1ms])", problem: "its subqueries have"},
		"many years":             {expr: "max_over_time(vector(1)[100y:1ms])", span: day, step: time.Second, problem: "its subqueries have"},
		"in one another":         {expr: nested(3, "vector(1)", func(e string) string { return "max_over_time(" + e + "[1d:10s])" }), problem: "its subqueries have"},
		"beside each other":      {expr: strings.Repeat("max_over_time(vector(1)[1d:5s]) + ", 30) + "1", span: hours, step: time.Minute, problem: "its subqueries have"},
		"at one time, each step": {expr: "quantile_over_time(scalar(up), up[2d:1s] @ end())", span: 11000 * time.Second, step: time.Second, problem: "its subqueries have"},
	} {
		t.Run(what, func(t *testing.T) {
			expr, err := parser.NewParser(parser.Options{}).ParseExpr(c.expr)
			require.NoError(t, err)
			_, err = Check(expr, c.span, c.step)
			if c.problem == "" {
				require.NoError(t, err)
				return
			}
			require.ErrorContains(t, err, c.problem)
		})
	}
}
