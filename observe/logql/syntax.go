package logql

import (
	"math"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/prometheus/model/labels"
)

// Expr is a parsed query: *LogExpr, or one of the expressions that give numbers. Its text is LogQL that parses into the same.
type Expr interface{ String() string }

// LogExpr is a query for lines.
type LogExpr struct {
	Matchers []*labels.Matcher // which streams
	stages   []stage           // what is done with each line, in this order
}

// stage is one step of a pipeline.
type stage interface {
	String() string
	// run changes the record, or says that the line is not wanted.
	run(*record) bool
}

// rangeExpr turns the lines of the last while into numbers: what Loki calls a range aggregation.
type rangeExpr struct {
	op       string
	param    *float64 // of quantile_over_time
	log      *LogExpr
	unwrap   *unwrapStage // where the numbers come from, nil if lines are counted
	after    []stage      // filters after unwrap
	window   time.Duration
	offset   time.Duration
	grouping *grouping // nil if there is none
}

// grouping is by (…) or without (…).
type grouping struct {
	without bool
	names   []string
}

// vectorExpr is an aggregation of series, or a sort.
type vectorExpr struct {
	op       string
	param    *float64 // of topk and its like
	inner    Expr
	grouping *grouping
}

// binaryExpr is two expressions and an operator.
type binaryExpr struct {
	op          string
	left, right Expr
	bool        bool
	matching    *matching // nil if nothing was said
}

// matching says which series on the two sides of an operator belong together.
type matching struct {
	on      bool // on, else ignoring
	names   []string
	group   string // group_left, group_right or nothing
	include []string
}

// numberExpr is a number; constVector is the series without labels that has it.
type (
	numberExpr  float64
	constVector float64
)

// replaceExpr is label_replace.
type replaceExpr struct {
	inner                           Expr
	target, replacement, source, re string
}

func (e *LogExpr) String() string {
	var b strings.Builder
	writeMatchers(&b, e.Matchers)
	writeStages(&b, e.stages)
	return b.String()
}

func writeMatchers(b *strings.Builder, matchers []*labels.Matcher) {
	b.WriteByte('{')
	for i, m := range matchers {
		if i > 0 {
			b.WriteString(", ")
		}
		writeMatcher(b, m)
	}
	b.WriteByte('}')
}

func writeMatcher(b *strings.Builder, m *labels.Matcher) {
	b.WriteString(m.Name)
	b.WriteString(m.Type.String())
	b.WriteString(strconv.Quote(m.Value))
}

func writeStages(b *strings.Builder, stages []stage) {
	for _, s := range stages {
		b.WriteByte(' ')
		b.WriteString(s.String())
	}
}

func (e *rangeExpr) String() string {
	var b strings.Builder
	b.WriteString(e.op)
	b.WriteByte('(')
	if e.param != nil {
		b.WriteString(formatNumber(*e.param))
		b.WriteString(", ")
	}
	b.WriteString(e.log.String())
	if e.unwrap != nil {
		b.WriteByte(' ')
		b.WriteString(e.unwrap.String())
		writeStages(&b, e.after)
	}
	b.WriteString(" [")
	b.WriteString(e.window.String())
	b.WriteByte(']')
	if e.offset != 0 {
		b.WriteString(" offset ")
		b.WriteString(e.offset.String())
	}
	b.WriteByte(')')
	if e.grouping != nil {
		b.WriteByte(' ')
		b.WriteString(e.grouping.String())
	}
	return b.String()
}

func (g *grouping) String() string {
	if g.without {
		return "without (" + strings.Join(g.names, ", ") + ")"
	}
	return "by (" + strings.Join(g.names, ", ") + ")"
}

func (e *vectorExpr) String() string {
	var b strings.Builder
	b.WriteString(e.op)
	if e.grouping != nil {
		b.WriteByte(' ')
		b.WriteString(e.grouping.String())
		b.WriteByte(' ')
	}
	b.WriteByte('(')
	if e.param != nil {
		b.WriteString(formatNumber(*e.param))
		b.WriteString(", ")
	}
	b.WriteString(e.inner.String())
	b.WriteByte(')')
	return b.String()
}

func (e *binaryExpr) String() string {
	return "(" + e.left.String() + " " + e.operator(strings.Join) + " " + e.right.String() + ")"
}

// operator returns the operator and what was said about it; join makes a list of names.
func (e *binaryExpr) operator(join func(names []string, separator string) string) string {
	s := e.op
	if e.bool {
		s += " bool"
	}
	if m := e.matching; m != nil {
		if m.on {
			s += " on ("
		} else {
			s += " ignoring ("
		}
		s += join(m.names, ", ") + ")"
		if m.group != "" {
			s += " " + m.group + " (" + join(m.include, ", ") + ")"
		}
	}
	return s
}

// String writes results of calculations that LogQL has no word for as calculations.
func (e numberExpr) String() string {
	switch n := float64(e); {
	case math.IsNaN(n):
		return "(0 / 0)"
	case math.IsInf(n, 1):
		return "(1 / 0)"
	case math.IsInf(n, -1):
		return "(-1 / 0)"
	default:
		return formatNumber(n)
	}
}

func (e constVector) String() string { return "vector(" + formatNumber(float64(e)) + ")" }

func (e *replaceExpr) String() string {
	return "label_replace(" + e.inner.String() + ", " + strconv.Quote(e.target) + ", " + strconv.Quote(e.replacement) + ", " +
		strconv.Quote(e.source) + ", " + strconv.Quote(e.re) + ")"
}

func formatNumber(n float64) string { return strconv.FormatFloat(n, 'g', -1, 64) }
