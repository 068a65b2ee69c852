// Package rulefiles reads recording and alerting rules: the default ones of the store, and users' from ConfigMaps with the label
// polymesh.dev/observe: rules.
//
// It owns what such a file may contain. Its functions turn bytes into Prometheus' types; package metrics evaluates them. A
// file is Prometheus' own format, "groups:" with rules, as the field spec of a PrometheusRule.
package rulefiles

import (
	_ "embed"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/rulefmt"
	"github.com/prometheus/prometheus/promql/parser"

	"polymesh.dev/polymesh/observe/excerpt"
)

// The bounds of one file. All files together have at most MaxRules rules.
const (
	MaxRules    = 500
	maxFile     = 128 << 10
	maxGroups   = 20
	maxRules    = 100
	maxExpr     = 4 << 10
	maxText     = 1 << 10 // a label or an annotation
	maxTexts    = 30      // labels and annotations of a rule
	maxName     = 128
	minInterval = 15 * time.Second
	// maxResults is how many series or alerts one rule may produce before it fails.
	maxResults = 1000
	maxProblem = 512
)

// File is a file with rules.
type File struct {
	// Name identifies it: "<namespace>/<ConfigMap>/<key>", or DefaultName. They cannot collide.
	Name   string
	Groups *rulefmt.RuleGroups
	// Rules is the number of rules in it.
	Rules int
}

// Problem says why a file is not used.
type Problem struct{ Message string }

// DefaultName is the name of the file with the store's own rules.
const DefaultName = "polymesh"

//go:embed default.yaml
var defaultRules []byte

// Default returns the store's own rules: when to extend the cluster, according to the guide, and when the store itself is full.
func Default() (File, error) {
	f, problems := read(defaultRules, DefaultName)
	if len(problems) > 0 {
		return File{}, fmt.Errorf("the default rules: %s", problems[0].Message)
	}
	return f, nil
}

// Parse reads a user's file. With a problem nothing of it is used, as in Prometheus.
//
// Expressions are bounded by the engine that evaluates them. Names of recorded series need a colon, as Prometheus' documentation recommends,
// so that none looks as if it was read from a target.
func Parse(content []byte, namespace, configMap, key string) (File, []Problem) {
	f, problems := read(content, namespace+"/"+configMap+"/"+key)
	if len(problems) > 0 {
		return f, problems
	}
	c := check{}
	if len(f.Groups.Groups) > maxGroups {
		c.problem("it has %d groups, at most %d are allowed", len(f.Groups.Groups), maxGroups)
	}
	if f.Rules > maxRules {
		c.problem("it has %d rules, at most %d are allowed", f.Rules, maxRules)
	}
	for i := range f.Groups.Groups {
		c.group(&f.Groups.Groups[i])
	}
	if len(c.problems) > 0 {
		return File{Name: f.Name}, c.problems
	}
	return f, nil
}

func read(content []byte, name string) (File, []Problem) {
	if len(content) > maxFile {
		return File{Name: name}, []Problem{{fmt.Sprintf("it has %d bytes, at most %d are read", len(content), maxFile)}}
	}
	groups, errs := rulefmt.Parse(content, false, model.UTF8Validation, parser.NewParser(parser.Options{}), slog.New(slog.DiscardHandler))
	var c check
	for _, err := range errs {
		c.problem("Prometheus does not accept it: %s", err)
	}
	if len(c.problems) > 0 {
		return File{Name: name}, c.problems
	}
	f := File{Name: name, Groups: groups}
	for _, g := range groups.Groups {
		f.Rules += len(g.Rules)
	}
	return f, nil
}

type check struct{ problems []Problem }

func (c *check) problem(format string, args ...any) {
	if len(c.problems) == 20 {
		return
	}
	c.problems = append(c.problems, Problem{excerpt.Marked(fmt.Sprintf(format, args...), maxProblem)})
}

// group checks a group, and completes its bounds.
func (c *check) group(g *rulefmt.RuleGroup) {
	if len(g.Name) > maxName {
		c.problem("the name of a group has more than %d bytes", maxName)
		return
	}
	if g.Interval != 0 {
		g.Interval = max(g.Interval, model.Duration(minInterval))
	}
	if g.Limit <= 0 || g.Limit > maxResults {
		g.Limit = maxResults
	}
	c.texts(fmt.Sprintf("group %q", g.Name), g.Labels, false)
	for _, r := range g.Rules {
		c.rule(g.Name, r)
	}
}

func (c *check) rule(group string, r rulefmt.Rule) {
	name := r.Alert + r.Record
	if len(name) > maxName {
		c.problem("group %q: the name of a rule has more than %d bytes", group, maxName)
		return
	}
	where := fmt.Sprintf("group %q, rule %q", group, name)
	if len(r.Expr) > maxExpr {
		c.problem("%s: the expression has more than %d bytes", where, maxExpr)
	}
	if d := Depth(r.Expr); d > MaxDepth {
		c.problem("%s: the expression is nested %d deep, at most %d are allowed", where, d, MaxDepth)
	} else if expr, err := parser.NewParser(parser.Options{}).ParseExpr(r.Expr); err != nil {
		c.problem("%s: %s", where, err)
	} else if _, err := Check(expr, 0, 0); err != nil {
		c.problem("%s: %s", where, err)
	}
	if r.Record != "" && (!strings.Contains(r.Record, ":") || strings.HasPrefix(r.Record, DefaultName+":")) {
		c.problem("%s: a recorded name needs a colon, and does not begin with %s: (for example namespace:requests:rate5m)", where, DefaultName)
	}
	if len(r.Labels)+len(r.Annotations) > maxTexts {
		c.problem("%s: it has more than %d labels and annotations", where, maxTexts)
		return
	}
	c.texts(where, r.Labels, r.Alert != "")
	c.texts(where, r.Annotations, true)
}

func (c *check) texts(where string, texts map[string]string, templates bool) {
	for _, k := range sortedKeys(texts) {
		if len(k) > maxName || len(texts[k]) > maxText {
			c.problem("%s: a label or annotation has more than %d bytes", where, maxText)
			continue
		}
		if !templates {
			continue
		}
		if err := checkTemplate(texts[k]); err != nil {
			c.problem("%s, %q: %s", where, k, err)
		}
	}
}

func sortedKeys(m map[string]string) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
