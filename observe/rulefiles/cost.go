package rulefiles

import (
	"fmt"
	"strings"
	"time"

	"github.com/prometheus/prometheus/promql/parser"
)

const (
	// maxTimes and maxAdded bound the labels that an expression creates for a series, see Growth.
	maxTimes = 64
	maxAdded = 8 << 10
	// maxPoints is how many points the functions over subqueries may read per series. The engine only checks its timeout between
	// two series, so with more points it would exceed it.
	maxPoints = 20_000_000
	// SubqueryStep is the step of a subquery that has none.
	SubqueryStep = time.Minute
)

// Growth bounds what an expression adds to the labels of each series: Times the length of the labels that the series has, and
// Added bytes.
type Growth struct{ Times, Added float64 }

// Check refuses an expression that needs memory or time that the engine does not bound: label_join and label_replace inside each
// other double a label each time, and subqueries inside each other multiply their steps. It is evaluated each step for a span;
// both are zero for one point of time.
func Check(expr parser.Expr, span, step time.Duration) (Growth, error) {
	g := labelsOf(expr).all
	if g.Times > maxTimes || g.Added > maxAdded {
		return g, fmt.Errorf("label_join, label_replace and group_left repeat labels too often: they may make them %d times as long and %d bytes longer, and this expression up to %.0f times and %.0f bytes", maxTimes, maxAdded, g.Times, g.Added)
	}
	steps := 1.0
	if step > 0 {
		steps += float64(span / step)
	}
	if n := points(expr, span.Seconds(), steps); n > maxPoints {
		return g, fmt.Errorf("its subqueries have %.0f points for each series, at most %d are evaluated: use longer steps, or shorter ranges", n, maxPoints)
	}
	return g, nil
}

// sizes are upper bounds of the longest label and of all created labels: a multiple of the labels that a series had, plus bytes.
type sizes struct{ longest, all Growth }

func labelsOf(node parser.Node) sizes {
	s := sizes{longest: Growth{Times: 1}}
	for child := range parser.ChildrenIter(node) {
		c := labelsOf(child)
		s.longest = Growth{max(s.longest.Times, c.longest.Times), max(s.longest.Added, c.longest.Added)}
		// Both sides of an operator are in memory, and one may get the labels of the other.
		s.all = Growth{s.all.Times + c.all.Times, s.all.Added + c.all.Added}
	}
	var references, text float64
	switch n := node.(type) {
	case *parser.BinaryExpr:
		if n.VectorMatching == nil || len(n.VectorMatching.Include) == 0 {
			return s
		}
		references = 1
	case *parser.Call:
		switch {
		case n.Func.Name == "label_join" && len(n.Args) >= 3:
			references = float64(len(n.Args) - 3)
			text = references * float64(len(literal(n.Args[2])))
		case n.Func.Name == "label_replace" && len(n.Args) == 5:
			replacement := literal(n.Args[2])
			references, text = float64(strings.Count(replacement, "$")), float64(len(replacement))
		default:
			return s
		}
	default:
		return s
	}
	made := Growth{references * s.longest.Times, references*s.longest.Added + text}
	s.longest = Growth{max(s.longest.Times, made.Times), max(s.longest.Added, made.Added)}
	s.all = Growth{s.all.Times + made.Times, s.all.Added + made.Added}
	return s
}

// literal returns a string argument. Like the engine, it ignores parentheses.
func literal(e parser.Expr) string {
	for {
		switch n := e.(type) {
		case *parser.ParenExpr:
			e = n.Expr
		case *parser.StringLiteral:
			return n.Val
		default:
			return ""
		}
	}
}

// points returns how many points are read per series: those of each subquery for each step, times its own inner steps.
func points(node parser.Node, seconds, steps float64) float64 {
	var n float64
	if q, ok := node.(*parser.SubqueryExpr); ok {
		step := q.Step
		if step == 0 {
			step = SubqueryStep
		}
		n = steps * (q.Range.Seconds()/step.Seconds() + 1)
		seconds += q.Range.Seconds()
		steps = seconds/step.Seconds() + 1
		n += steps
	}
	for child := range parser.ChildrenIter(node) {
		n += points(child, seconds, steps)
	}
	return n
}
