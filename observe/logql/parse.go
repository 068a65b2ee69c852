package logql

import (
	"math"
	"regexp"
	"slices"
	"time"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/labels"

	"polymesh.dev/polymesh/observe/logstore"
)

// Parse reads a query. It fails with a *ParseError.
func Parse(query string) (Expr, error) {
	p, err := newParser(query)
	if err != nil {
		return nil, err
	}
	return parseAll(p, func() (Expr, error) { return p.expr(0) })
}

// ParseLog reads a query for lines.
func ParseLog(query string) (*LogExpr, error) {
	expr, err := Parse(query)
	if err != nil {
		return nil, err
	}
	e, ok := expr.(*LogExpr)
	if !ok {
		return nil, &ParseError{Message: "only log queries are supported here"}
	}
	return e, nil
}

// ParseMatchers reads a selector of streams alone: {a="b"}. An empty one selects all.
func ParseMatchers(selector string) ([]*labels.Matcher, error) {
	p, err := newParser(selector)
	if err != nil {
		return nil, err
	}
	return parseAll(p, p.matchers)
}

// parseAll wants the end of the query after what was read.
func parseAll[T any](p *queryParser, read func() (T, error)) (T, error) {
	var none T
	result, err := read()
	if err != nil {
		return none, err
	}
	if p.peek().kind != kindEnd {
		return none, p.unexpected()
	}
	return result, nil
}

// queryParser reads tokens from left to right, one function for each rule of the grammar.
type queryParser struct {
	query  string
	tokens []token
	at     int
	nested int
	stages int
}

func newParser(query string) (*queryParser, error) {
	if len(query) > maxQuery {
		return nil, &ParseError{Message: "input size too long: a query has up to 65536 bytes"}
	}
	tokens, err := lex(query)
	return &queryParser{query: query, tokens: tokens}, err
}

func (p *queryParser) peek() token { return p.ahead(0) }

// ahead looks n tokens further.
func (p *queryParser) ahead(n int) token { return p.tokens[min(p.at+n, len(p.tokens)-1)] }

func (p *queryParser) next() token {
	t := p.peek()
	p.at++
	return t
}

// take reads a token if it is of the kind.
func (p *queryParser) take(k kind) bool {
	if p.peek().kind != k {
		return false
	}
	p.at++
	return true
}

// word reads a certain word.
func (p *queryParser) word(w string) bool {
	if t := p.peek(); t.kind != kindIdent || t.text != w {
		return false
	}
	p.at++
	return true
}

func (p *queryParser) want(k kind) (token, error) {
	if p.peek().kind != k {
		return token{}, p.unexpected(k)
	}
	return p.next(), nil
}

func (p *queryParser) errorf(t token, format string, args ...any) error {
	return errorAt(p.query, t.at, format, args...)
}

func (p *queryParser) unexpected(wanted ...kind) error {
	t := p.peek()
	is := string(t.kind)
	if t.kind == kindIdent {
		is = clip(t.text)
	}
	if len(wanted) > 0 {
		return p.errorf(t, "syntax error: unexpected %s, expecting %s", is, wanted[0])
	}
	return p.errorf(t, "syntax error: unexpected %s", is)
}

// enter bounds how deep brackets go; leave undoes it.
func (p *queryParser) enter() error {
	if p.nested++; p.nested > maxNested {
		return p.errorf(p.peek(), "the query is nested more than %d deep", maxNested)
	}
	return nil
}

func (p *queryParser) leave() { p.nested-- }

// precedence of the operators between expressions, the loosest first.
func precedence(op string) int {
	switch op {
	case "or":
		return 1
	case "and", "unless":
		return 2
	case "==", "!=", ">", ">=", "<", "<=":
		return 3
	case "+", "-":
		return 4
	case "*", "/", "%":
		return 5
	case "^":
		return 6
	}
	return 0
}

// expr reads an expression whose operators bind tighter than the given precedence.
func (p *queryParser) expr(than int) (Expr, error) {
	left, err := p.operand()
	if err != nil {
		return nil, err
	}
	for {
		op := p.peek()
		level := precedence(op.text)
		if op.kind == kindString || level <= than {
			return left, nil
		}
		p.next()
		e := &binaryExpr{op: op.text, left: left}
		if err := p.modifiers(e, op); err != nil {
			return nil, err
		}
		above := level
		if op.text == "^" { // to the right
			above--
		}
		if err := p.enter(); err != nil {
			return nil, err
		}
		e.right, err = p.expr(above)
		p.leave()
		if err != nil {
			return nil, err
		}
		if left, err = p.binary(e, op); err != nil {
			return nil, err
		}
		if depth(left) > maxNested { // a chain leans to the left, so the brackets do not bound it
			return nil, p.errorf(op, "the query is nested more than %d deep", maxNested)
		}
	}
}

// depth is how many operators stand in each other on the left side.
func depth(e Expr) int {
	n := 0
	for {
		b, ok := e.(*binaryExpr)
		if !ok {
			return n
		}
		e = b.left
		n++
	}
}

// modifiers reads what may follow an operator: bool, on (…), group_left (…).
func (p *queryParser) modifiers(e *binaryExpr, op token) error {
	e.bool = p.word("bool")
	if e.bool && precedence(op.text) != 3 {
		return p.errorf(op, "bool can only be used with a comparison")
	}
	switch {
	case p.word("on"):
		e.matching = &matching{on: true}
	case p.word("ignoring"):
		e.matching = &matching{}
	default:
		return nil
	}
	var err error
	if e.matching.names, err = p.names(); err != nil {
		return err
	}
	if t := p.peek(); p.word("group_left") || p.word("group_right") {
		if precedence(op.text) <= 2 {
			return p.errorf(t, "no grouping allowed for %q operation", op.text)
		}
		e.matching.group = t.text
		// A bracket here is the list of labels, and not what comes next.
		if p.peek().kind == "(" {
			e.matching.include, err = p.names()
		}
	}
	return err
}

// names reads a list of labels in brackets.
func (p *queryParser) names() ([]string, error) {
	if _, err := p.want("("); err != nil {
		return nil, err
	}
	names := []string{}
	for !p.take(")") {
		t, err := p.want(kindIdent)
		if err != nil {
			return nil, err
		}
		names = append(names, t.text)
		if !p.take(",") && p.peek().kind != ")" {
			return nil, p.unexpected(",")
		}
	}
	return names, nil
}

// binary checks the sides of an operator, and calculates with two numbers.
func (p *queryParser) binary(e *binaryExpr, op token) (Expr, error) {
	for _, side := range []Expr{e.left, e.right} {
		if _, ok := side.(*LogExpr); ok {
			return nil, p.errorf(op, "unexpected type for a leg of binary operation (%s): a log query", e.op)
		}
	}
	left, leftNumber := e.left.(numberExpr)
	right, rightNumber := e.right.(numberExpr)
	if (leftNumber || rightNumber) && precedence(e.op) <= 2 {
		return nil, p.errorf(op, "unexpected literal for a leg of logical/set binary operation (%s)", e.op)
	}
	if leftNumber && rightNumber {
		return numberExpr(calculate(e.op, float64(left), float64(right))), nil
	}
	return e, nil
}

func calculate(op string, a, b float64) float64 {
	is := func(holds bool) float64 {
		if holds {
			return 1
		}
		return 0
	}
	switch op {
	case "+":
		return a + b
	case "-":
		return a - b
	case "*":
		return a * b
	case "/":
		return a / b
	case "%":
		return math.Mod(a, b)
	case "^":
		return math.Pow(a, b)
	case "==":
		return is(a == b)
	case "!=":
		return is(a != b)
	case ">":
		return is(a > b)
	case ">=":
		return is(a >= b)
	case "<":
		return is(a < b)
	default:
		return is(a <= b)
	}
}

// operand reads an expression without operators around it.
func (p *queryParser) operand() (Expr, error) {
	switch t := p.peek(); t.kind {
	case "{":
		return p.logExpr()
	case "(":
		p.next()
		if err := p.enter(); err != nil {
			return nil, err
		}
		defer p.leave()
		inner, err := p.expr(0)
		if err != nil {
			return nil, err
		}
		_, err = p.want(")")
		return inner, err
	case kindNumber, "+", "-":
		n, err := p.number()
		return numberExpr(n), err
	case kindIdent:
		switch {
		case t.text == "vector":
			return p.vector()
		case t.text == "label_replace":
			return p.replace()
		case slices.Contains(vectorOps, t.text):
			return p.vectorExpr()
		case rangeOps[t.text] != 0:
			return p.rangeExpr()
		}
	}
	return nil, p.unexpected()
}

// number reads a number with its sign.
func (p *queryParser) number() (float64, error) {
	sign := 1.0
	if p.take("-") {
		sign = -1
	} else {
		p.take("+")
	}
	t, err := p.want(kindNumber)
	return sign * t.number, err
}

func (p *queryParser) vector() (Expr, error) {
	p.next()
	if _, err := p.want("("); err != nil {
		return nil, err
	}
	n, err := p.number()
	if err != nil {
		return nil, err
	}
	_, err = p.want(")")
	return constVector(n), err
}

func (p *queryParser) replace() (Expr, error) {
	at := p.next()
	if err := p.enter(); err != nil {
		return nil, err
	}
	defer p.leave()
	if _, err := p.want("("); err != nil {
		return nil, err
	}
	inner, err := p.metric()
	if err != nil {
		return nil, err
	}
	e := &replaceExpr{inner: inner}
	for _, text := range []*string{&e.target, &e.replacement, &e.source, &e.re} {
		if _, err := p.want(","); err != nil {
			return nil, err
		}
		t, err := p.want(kindString)
		if err != nil {
			return nil, err
		}
		*text = t.text
	}
	if err := checkRegexp(e.re, maxLineRegexp); err != nil {
		return nil, p.errorf(at, "invalid regex in label_replace: %s", err)
	}
	if !model.LegacyValidation.IsValidLabelName(e.target) || e.source != "" && !model.LegacyValidation.IsValidLabelName(e.source) {
		return nil, p.errorf(at, "invalid label name in label_replace")
	}
	_, err = p.want(")")
	return e, err
}

// metric reads an expression that gives series.
func (p *queryParser) metric() (Expr, error) {
	at := p.peek()
	e, err := p.expr(0)
	if err != nil {
		return nil, err
	}
	if _, ok := e.(*LogExpr); ok {
		return nil, p.errorf(at, "syntax error: unexpected log query, expecting a metric query")
	}
	return e, nil
}

// vectorOps are the aggregations of series; parameterOps are the ones that need a number.
var (
	vectorOps    = []string{"sum", "avg", "count", "max", "min", "stddev", "stdvar", "bottomk", "topk", "approx_topk", "sort", "sort_desc"}
	parameterOps = []string{"bottomk", "topk", "approx_topk"}
)

func (p *queryParser) vectorExpr() (Expr, error) {
	at := p.next()
	if err := p.enter(); err != nil {
		return nil, err
	}
	defer p.leave()
	e := &vectorExpr{op: at.text}
	var err error
	if e.grouping, err = p.grouping(); err != nil {
		return nil, err
	}
	if _, err := p.want("("); err != nil {
		return nil, err
	}
	if slices.Contains(parameterOps, e.op) {
		n, err := p.number()
		if err != nil {
			return nil, p.errorf(at, "parameter required for operation %s", e.op)
		}
		if n < 1 {
			return nil, p.errorf(at, "invalid parameter (must be greater than 0) %s(%s", e.op, formatNumber(n))
		}
		e.param = &n
		if _, err := p.want(","); err != nil {
			return nil, err
		}
	}
	if e.inner, err = p.metric(); err != nil {
		return nil, err
	}
	if _, err := p.want(")"); err != nil {
		return nil, err
	}
	if e.grouping == nil {
		if e.grouping, err = p.grouping(); err != nil {
			return nil, err
		}
	}
	if _, ok := e.inner.(numberExpr); ok {
		return nil, p.errorf(at, "%s needs series, not a number", e.op)
	}
	if e.grouping != nil && (e.op == "sort" || e.op == "sort_desc" || e.op == "approx_topk") {
		return nil, p.errorf(at, "grouping not allowed for %s aggregation", e.op)
	}
	return e, nil
}

// grouping reads by (…) or without (…), if it is there.
func (p *queryParser) grouping() (*grouping, error) {
	without := p.word("without")
	if !without && !p.word("by") {
		return nil, nil
	}
	names, err := p.names()
	return &grouping{without: without, names: names}, err
}

// use says what a range aggregation may be used with.
type use byte

const (
	ofLines use = 1 << iota
	ofNumbers
	grouped
)

var rangeOps = map[string]use{
	"rate":             ofLines | ofNumbers,
	"count_over_time":  ofLines | grouped,
	"bytes_rate":       ofLines,
	"bytes_over_time":  ofLines | grouped,
	"absent_over_time": ofLines | ofNumbers,
	"rate_counter":     ofNumbers,
	"sum_over_time":    ofNumbers,
	"avg_over_time":    ofNumbers | grouped,
	"max_over_time":    ofNumbers | grouped,
	"min_over_time":    ofNumbers | grouped,
	"first_over_time":  ofNumbers | grouped,
	"last_over_time":   ofNumbers | grouped,
	"stdvar_over_time": ofNumbers | grouped,
	"stddev_over_time": ofNumbers | grouped,
	quantileOp:         ofNumbers | grouped,
}

const quantileOp = "quantile_over_time"

func (p *queryParser) rangeExpr() (Expr, error) {
	at := p.next()
	e := &rangeExpr{op: at.text, log: &LogExpr{}}
	if _, err := p.want("("); err != nil {
		return nil, err
	}
	if e.op == quantileOp {
		n, err := p.number()
		if err != nil {
			return nil, p.errorf(at, "parameter required for operation %s", e.op)
		}
		e.param = &n
		if _, err := p.want(","); err != nil {
			return nil, err
		}
	}
	if err := p.logRange(e); err != nil {
		return nil, err
	}
	if _, err := p.want(")"); err != nil {
		return nil, err
	}
	var err error
	if e.grouping, err = p.grouping(); err != nil {
		return nil, err
	}
	may := rangeOps[e.op]
	switch {
	case e.window <= 0:
		return nil, p.errorf(at, "syntax error: %s needs a range like [5m]", e.op)
	case e.unwrap == nil && may&ofLines == 0:
		return nil, p.errorf(at, "invalid aggregation %s without unwrap", e.op)
	case e.unwrap != nil && may&ofNumbers == 0:
		return nil, p.errorf(at, "invalid aggregation %s with unwrap", e.op)
	case e.grouping != nil && may&grouped == 0:
		return nil, p.errorf(at, "grouping not allowed for %s aggregation", e.op)
	}
	return e, nil
}

// logRange reads what stands in the brackets of a range aggregation: a log query, a range and unwrap, in nearly any order.
func (p *queryParser) logRange(e *rangeExpr) error {
	if p.take("(") {
		if err := p.enter(); err != nil {
			return err
		}
		if err := p.logRange(e); err != nil {
			return err
		}
		p.leave()
		if _, err := p.want(")"); err != nil {
			return err
		}
	} else if err := p.selector(e.log); err != nil {
		return err
	}
	for {
		switch t := p.peek(); {
		case t.kind == "[" && e.window == 0:
			var err error
			if e.window, e.offset, err = p.window(); err != nil {
				return err
			}
		case t.kind == "|" && p.ahead(1).text == "unwrap" && !isComparison(p.ahead(2).kind) && e.unwrap == nil:
			p.at += 2
			var err error
			if e.unwrap, err = p.unwrap(); err != nil {
				return err
			}
		case startsStage(t.kind):
			s, err := p.stage()
			if err != nil {
				return err
			}
			if e.unwrap == nil {
				e.log.stages = append(e.log.stages, s)
			} else if _, ok := s.(filterStage); ok {
				e.after = append(e.after, s)
			} else {
				return p.errorf(t, "syntax error: only label filters can follow unwrap")
			}
		default:
			return nil
		}
	}
}

// window reads [5m] and an offset.
func (p *queryParser) window() (window, offset time.Duration, err error) {
	p.next()
	t, err := p.want(kindDuration)
	if err != nil {
		return 0, 0, err
	}
	if t.number <= 0 {
		return 0, 0, p.errorf(t, "the range must be more than 0")
	}
	window = time.Duration(t.number)
	if _, err := p.want("]"); err != nil {
		return 0, 0, err
	}
	if p.word("offset") {
		sign := time.Duration(1)
		if p.take("-") {
			sign = -1
		}
		t, err := p.want(kindDuration)
		if err != nil {
			return 0, 0, err
		}
		offset = sign * time.Duration(t.number)
	}
	return window, offset, nil
}

func (p *queryParser) unwrap() (*unwrapStage, error) {
	t, err := p.want(kindIdent)
	if err != nil {
		return nil, err
	}
	if p.peek().kind != "(" {
		return &unwrapStage{name: t.text, convert: toNumber}, nil
	}
	s := &unwrapStage{function: t.text}
	switch t.text {
	case "bytes":
		s.convert = toBytes
	case "duration", "duration_seconds":
		s.convert = toSeconds
	default:
		return nil, p.errorf(t, "syntax error: unexpected %s, expecting bytes, duration or duration_seconds", clip(t.text))
	}
	p.next()
	if t, err = p.want(kindIdent); err != nil {
		return nil, err
	}
	s.name = t.text
	_, err = p.want(")")
	return s, err
}

// selector reads {…}, which must choose something.
func (p *queryParser) selector(e *LogExpr) error {
	at := p.peek()
	var err error
	if e.Matchers, err = p.matchers(); err != nil {
		return err
	}
	for _, m := range e.Matchers {
		if !m.Matches("") {
			return nil
		}
	}
	return p.errorf(at, "queries require at least one regexp or equality matcher that does not have an empty-compatible value. "+
		`For instance, app=~".*" does not meet this requirement, but app=~".+" will`)
}

func (p *queryParser) matchers() ([]*labels.Matcher, error) {
	if _, err := p.want("{"); err != nil {
		return nil, err
	}
	matchers := []*labels.Matcher{}
	for !p.take("}") {
		at := p.peek()
		m, err := p.matcher()
		switch {
		case err != nil:
			return nil, err
		case !logstore.ValidName(m.Name):
			return nil, p.errorf(at, "%q is not a valid label name of a stream", clip(m.Name))
		case len(m.Value) > maxMatcherBytes:
			return nil, p.errorf(at, "the value for %s has more than %d bytes", m.Name, maxMatcherBytes)
		case len(matchers) == maxMatchers:
			return nil, p.errorf(at, "the query has more than %d matchers", maxMatchers)
		}
		matchers = append(matchers, m)
		if !p.take(",") && p.peek().kind != "}" {
			return nil, p.unexpected("}")
		}
	}
	return matchers, nil
}

func (p *queryParser) matcher() (*labels.Matcher, error) {
	name, err := p.want(kindIdent)
	if err != nil {
		return nil, err
	}
	op := p.next()
	var of labels.MatchType
	switch op.kind {
	case "=":
		of = labels.MatchEqual
	case "!=":
		of = labels.MatchNotEqual
	case "=~":
		of = labels.MatchRegexp
	case "!~":
		of = labels.MatchNotRegexp
	default:
		p.at--
		return nil, p.unexpected("=")
	}
	value, err := p.want(kindString)
	if err != nil {
		return nil, err
	}
	if of == labels.MatchRegexp || of == labels.MatchNotRegexp {
		if err := checkRegexp(value.text, maxLabelRegexp); err != nil {
			return nil, p.errorf(value, "%s", err)
		}
	}
	m, err := labels.NewMatcher(of, name.text, value.text)
	if err != nil {
		return nil, p.errorf(value, "%s", err)
	}
	return m, nil
}

func (p *queryParser) logExpr() (*LogExpr, error) {
	e := &LogExpr{}
	if err := p.selector(e); err != nil {
		return nil, err
	}
	for startsStage(p.peek().kind) {
		s, err := p.stage()
		if err != nil {
			return nil, err
		}
		e.stages = append(e.stages, s)
	}
	return e, nil
}

func startsStage(k kind) bool {
	switch k {
	case "|", "|=", "|~", "|>", "!=", "!~", "!>":
		return true
	}
	return false
}

func isComparison(k kind) bool {
	switch k {
	case "=", "==", "!=", "=~", "!~", ">", ">=", "<", "<=":
		return true
	}
	return false
}

// stage reads one step of a pipeline.
func (p *queryParser) stage() (stage, error) {
	if p.stages++; p.stages > maxStages {
		return nil, p.errorf(p.peek(), "the query has more than %d stages", maxStages)
	}
	if !p.take("|") {
		return p.lineFilter()
	}
	t := p.peek()
	if t.kind == kindIdent && !isComparison(p.ahead(1).kind) { // else it is a label with that name
		read := map[string]func() (stage, error){
			"json": p.json, "logfmt": p.logfmt, "pattern": p.pattern, "regexp": p.regexp,
			"line_format": p.lineFormat, "label_format": p.labelFormat,
			"unpack":     func() (stage, error) { return unpackStage{}, nil },
			"decolorize": func() (stage, error) { return decolorizeStage{}, nil },
			"drop":       func() (stage, error) { choices, err := p.choices(); return dropStage(choices), err },
			"keep":       func() (stage, error) { choices, err := p.choices(); return keepStage(choices), err },
		}[t.text]
		if read == nil {
			return nil, p.unexpected()
		}
		p.next()
		return read()
	}
	f, err := p.either()
	return filterStage{f}, err
}

func (p *queryParser) lineFilter() (stage, error) {
	op := p.next()
	f := &lineFilter{op: op.kind}
	for {
		t, err := p.lineText(op.kind)
		if err != nil {
			return nil, err
		}
		f.texts = append(f.texts, t)
		if !p.word("or") {
			return f, nil
		}
	}
}

func (p *queryParser) lineText(op kind) (lineText, error) {
	if at := p.peek(); p.word("ip") {
		pattern, ip, err := p.addresses()
		if err == nil && op != "|=" && op != "!=" {
			err = p.errorf(at, "ip() can only be used with |= and !=")
		}
		return lineText{text: pattern, ip: &ip}, err
	}
	text, err := p.want(kindString)
	if err != nil {
		return lineText{}, err
	}
	t := lineText{text: text.text}
	switch op {
	case "|~", "!~":
		if t.re, err = compileRegexp("(?s)"+t.text, maxLineRegexp); err != nil {
			return t, p.errorf(text, "%s", err)
		}
	case "|>", "!>":
		if t.pattern, err = parsePattern(t.text); err == nil {
			err = t.pattern.forFilter()
		}
		if err != nil {
			return t, p.errorf(text, "invalid pattern: %s", err)
		}
	}
	return t, nil
}

// addresses reads ("…") after ip.
func (p *queryParser) addresses() (string, addresses, error) {
	if _, err := p.want("("); err != nil {
		return "", addresses{}, err
	}
	t, err := p.want(kindString)
	if err != nil {
		return "", addresses{}, err
	}
	ip, ok := parseAddresses(t.text)
	if !ok {
		return "", addresses{}, p.errorf(t, "ip: invalid pattern %q", clip(t.text))
	}
	_, err = p.want(")")
	return t.text, ip, err
}

// either reads label filters with or between them; and binds tighter.
func (p *queryParser) either() (labelFilter, error) {
	left, err := p.both()
	for err == nil && p.word("or") {
		var right labelFilter
		if right, err = p.both(); err == nil {
			left = eitherFilter{left, right}
		}
	}
	return left, err
}

// both reads label filters with and, a comma or nothing between them.
func (p *queryParser) both() (labelFilter, error) {
	left, err := p.condition()
	for n := 0; err == nil; n++ {
		next := p.peek()
		if next.kind == kindIdent && next.text == "and" && !isComparison(p.ahead(1).kind) || next.kind == "," {
			p.next()
		} else if next.kind != "(" && (next.kind != kindIdent || !isComparison(p.ahead(1).kind)) {
			break
		}
		if n == maxNested*4 {
			return nil, p.errorf(next, "more than %d conditions in one filter", maxNested*4)
		}
		var right labelFilter
		if right, err = p.condition(); err == nil {
			left = bothFilter{left, right}
		}
	}
	return left, err
}

func (p *queryParser) condition() (labelFilter, error) {
	if p.take("(") {
		if err := p.enter(); err != nil {
			return nil, err
		}
		defer p.leave()
		f, err := p.either()
		if err != nil {
			return nil, err
		}
		_, err = p.want(")")
		return f, err
	}
	name := p.peek()
	if name.kind != kindIdent {
		return nil, p.unexpected(kindIdent)
	}
	op, value := p.ahead(1), p.ahead(2)
	if !isComparison(op.kind) {
		p.next()
		return nil, p.unexpected("=")
	}
	switch {
	case value.kind == kindString:
		m, err := p.matcher()
		return textFilter{m}, err
	case value.kind == kindIdent && value.text == "ip" && (op.kind == "=" || op.kind == "!="):
		p.at += 3
		pattern, ip, err := p.addresses()
		return &addressFilter{name: name.text, op: op.kind, pattern: pattern, ip: ip}, err
	}
	if op.kind == "=~" || op.kind == "!~" {
		p.at += 2
		return nil, p.unexpected(kindString)
	}
	p.at += 2
	sign := 1.0
	if p.take("-") {
		sign = -1
	} else {
		p.take("+")
	}
	value = p.next()
	value.number *= sign
	f := &numberFilter{name: name.text, op: op.kind, value: value}
	switch value.kind {
	case kindNumber:
		f.convert = toNumber
	case kindDuration:
		f.convert = toNanoseconds
	case kindBytes:
		f.convert = toBytes
	default:
		p.at--
		return nil, p.unexpected()
	}
	return f, nil
}

// extractions reads the list after json and logfmt, if there is one.
func (p *queryParser) extractions(path bool) ([]extraction, error) {
	var wanted []extraction
	for p.peek().kind == kindIdent {
		name := p.next()
		x := extraction{name: name.text, expression: name.text}
		if p.take("=") {
			t, err := p.want(kindString)
			if err != nil {
				return nil, err
			}
			x.expression = t.text
		}
		if path {
			var ok bool
			if x.path, ok = parsePath(x.expression); !ok {
				return nil, p.errorf(name, "cannot parse expression [%s]", clip(x.expression))
			}
		} else if x.expression == "" {
			return nil, p.errorf(name, "cannot parse expression []")
		}
		wanted = append(wanted, x)
		if !p.take(",") {
			break
		}
		if p.peek().kind != kindIdent {
			return nil, p.unexpected(kindIdent)
		}
	}
	return wanted, nil
}

func (p *queryParser) json() (stage, error) {
	wanted, err := p.extractions(true)
	return &jsonStage{wanted: wanted}, err
}

func (p *queryParser) logfmt() (stage, error) {
	s := &logfmtStage{}
	for p.peek().kind == kindFlag {
		switch t := p.next(); t.text {
		case "--strict":
			s.strict = true
		case "--keep-empty":
			s.keepEmpty = true
		default:
			return nil, p.errorf(t, "syntax error: unexpected %s, expecting --strict or --keep-empty", clip(t.text))
		}
	}
	var err error
	s.wanted, err = p.extractions(false)
	return s, err
}

func (p *queryParser) pattern() (stage, error) {
	t, err := p.want(kindString)
	if err != nil {
		return nil, err
	}
	parsed, err := parsePattern(t.text)
	if err == nil {
		err = parsed.forParser()
	}
	if err != nil {
		return nil, p.errorf(t, "invalid pattern: %s", err)
	}
	return patternStage{parsed}, nil
}

func (p *queryParser) regexp() (stage, error) {
	t, err := p.want(kindString)
	if err != nil {
		return nil, err
	}
	re, err := compileRegexp(t.text, maxLineRegexp)
	if err != nil {
		return nil, p.errorf(t, "%s", err)
	}
	names, problem := groupNames(re)
	if problem != "" {
		return nil, p.errorf(t, "%s", problem)
	}
	return &regexpStage{re: re, names: names}, nil
}

// groupNames checks the names of an expression's groups.
func groupNames(re *regexp.Regexp) (names []string, problem string) {
	named := false
	for i, name := range re.SubexpNames() {
		if name == "" {
			continue
		}
		if slices.Contains(re.SubexpNames()[:i], name) {
			return nil, "duplicate extracted label name '" + name + "'"
		}
		if labelName(name) != name {
			return nil, "invalid extracted label name '" + name + "'"
		}
		named = true
	}
	if !named {
		return nil, "at least one named capture must be supplied"
	}
	return re.SubexpNames(), ""
}

func (p *queryParser) template(t token) (*lineTemplate, error) {
	parsed, err := newTemplate(t.text)
	if err != nil {
		return nil, p.errorf(t, "invalid template: %s", err)
	}
	return parsed, nil
}

func (p *queryParser) lineFormat() (stage, error) {
	t, err := p.want(kindString)
	if err != nil {
		return nil, err
	}
	parsed, err := p.template(t)
	return lineFormatStage{parsed}, err
}

func (p *queryParser) labelFormat() (stage, error) {
	var s labelFormatStage
	for {
		name, err := p.want(kindIdent)
		if err != nil {
			return nil, err
		}
		if name.text == errorLabel || name.text == detailsLabel {
			return nil, p.errorf(name, "%s cannot be formatted", name.text)
		}
		for _, f := range s {
			if f.name == name.text {
				return nil, p.errorf(name, "multiple label name '%s' not allowed in a single format operation", name.text)
			}
		}
		if _, err := p.want("="); err != nil {
			return nil, err
		}
		f := renaming{name: name.text}
		switch t := p.next(); t.kind {
		case kindIdent:
			if t.text == errorLabel || t.text == detailsLabel {
				return nil, p.errorf(t, "%s cannot be formatted", t.text)
			}
			f.source = t.text
		case kindString:
			if f.template, err = p.template(t); err != nil {
				return nil, err
			}
		default:
			p.at--
			return nil, p.unexpected(kindString)
		}
		s = append(s, f)
		if !p.take(",") {
			return s, nil
		}
	}
}

// choices reads the list after drop and keep.
func (p *queryParser) choices() ([]labelChoice, error) {
	var choices []labelChoice
	for {
		name := p.peek()
		if name.kind != kindIdent {
			return nil, p.unexpected(kindIdent)
		}
		c := labelChoice{name: name.text}
		if isComparison(p.ahead(1).kind) && p.ahead(2).kind == kindString { // not a line filter: names bind tighter
			m, err := p.matcher()
			if err != nil {
				return nil, err
			}
			c.matcher = m
		} else {
			p.next()
		}
		choices = append(choices, c)
		if !p.take(",") {
			return choices, nil
		}
	}
}
