package logql

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"html"
	"math"
	"net/url"
	"reflect"
	"regexp"
	"strconv"
	"strings"
	"text/template"
	"text/template/parse"
	"time"
	"unicode"
	"unicode/utf8"
)

// lineTemplate is a template of line_format and label_format. Whoever writes a query writes a program: what it may make is bounded (each
// function's result and the whole), and how often it may go round. A template belongs to one pipeline, as its functions read the record of
// the moment.
type lineTemplate struct {
	text   string
	parsed *template.Template
	run    *templateRun
}

// templateRun is what a template's functions know.
type templateRun struct {
	record  *record
	rounds  int
	made    int // bytes of all texts that functions have made
	regexps map[string]*regexp.Regexp
	zones   map[string]*time.Location
}

var (
	errTooLong   = fmt.Errorf("the result is longer than %d bytes", maxTemplateOutput)
	errTooMuch   = fmt.Errorf("the template makes more than %d bytes", maxTemplateMade)
	errTooRound  = fmt.Errorf("the template goes round more than %d times", maxTemplateRounds)
	errNamed     = errors.New("define, block and template are not supported")
	errDivByZero = errors.New("division by zero")
)

// tick is the name of the function that counts the rounds of a range. A template that calls it itself has fewer.
const tick = "__round__"

// newTemplate parses a template.
func newTemplate(text string) (*lineTemplate, error) {
	if len(text) > maxTemplate {
		return nil, fmt.Errorf("the template is longer than %d bytes", maxTemplate)
	}
	t := &lineTemplate{text: text, run: &templateRun{regexps: map[string]*regexp.Regexp{}, zones: map[string]*time.Location{}}}
	parsed, err := template.New("line").Option("missingkey=zero").Funcs(t.run.functions()).Parse(text)
	if err != nil {
		return nil, errors.New(strings.TrimPrefix(err.Error(), "template: "))
	}
	if len(parsed.Templates()) > 1 || parsed.Tree == nil && len(parsed.Templates()) > 0 {
		return nil, errNamed
	}
	if parsed.Tree != nil {
		if err := bindRounds(parsed.Tree.Root, parsed.Tree); err != nil {
			return nil, err
		}
	}
	t.parsed = parsed
	return t, nil
}

// bindRounds puts a call of tick into each range, as numbers can be ranged over, and refuses templates that call others.
func bindRounds(node parse.Node, tree *parse.Tree) error {
	switch n := node.(type) {
	case *parse.ListNode:
		if n == nil {
			return nil
		}
		for _, inner := range n.Nodes {
			if err := bindRounds(inner, tree); err != nil {
				return err
			}
		}
	case *parse.TemplateNode:
		return errNamed
	case *parse.IfNode:
		return bindBranches(&n.BranchNode, tree)
	case *parse.WithNode:
		return bindBranches(&n.BranchNode, tree)
	case *parse.RangeNode:
		if err := bindBranches(&n.BranchNode, tree); err != nil {
			return err
		}
		call := &parse.CommandNode{NodeType: parse.NodeCommand, Pos: n.Pos, Args: []parse.Node{parse.NewIdentifier(tick).SetPos(n.Pos).SetTree(tree)}}
		count := &parse.ActionNode{NodeType: parse.NodeAction, Pos: n.Pos, Line: n.Line,
			Pipe: &parse.PipeNode{NodeType: parse.NodePipe, Pos: n.Pos, Line: n.Line, Cmds: []*parse.CommandNode{call}}}
		n.List.Nodes = append([]parse.Node{count}, n.List.Nodes...)
	}
	return nil
}

func bindBranches(n *parse.BranchNode, tree *parse.Tree) error {
	return errors.Join(bindRounds(n.List, tree), bindRounds(n.ElseList, tree))
}

// bind returns the same template for another pipeline.
func (t *lineTemplate) bind() (*lineTemplate, error) { return newTemplate(t.text) }

// execute fills the template in. What fails becomes the record's error, and the line stays as it is.
func (t *lineTemplate) execute(r *record) (string, bool) {
	t.run.record, t.run.rounds, t.run.made = r, 0, 0
	data := make(map[string]string, len(r.labels))
	for _, l := range r.labels {
		if !l.dropped {
			data[l.name] = l.value
		}
	}
	if r.err != "" {
		data[errorLabel], data[detailsLabel] = r.err, r.details
	}
	var out boundedText
	if t.parsed.Tree != nil {
		if err := t.parsed.Execute(&out, data); err != nil {
			var failed template.ExecError
			if errors.As(err, &failed) {
				err = failed.Err
			}
			r.fail(errTemplate, clip(err.Error()))
			return "", false
		}
	}
	return out.String(), true
}

// boundedText is a writer with an end.
type boundedText struct{ strings.Builder }

func (b *boundedText) Write(p []byte) (int, error) {
	if b.Len()+len(p) > maxTemplateOutput {
		return 0, errTooLong
	}
	return b.Builder.Write(p)
}

// bounded passes a text on if it is not too long.
func bounded(s string) (string, error) {
	if len(s) > maxTemplateOutput {
		return "", errTooLong
	}
	return s, nil
}

// functions are the ones that Loki documents, and bounded forms of text/template's own.
func (run *templateRun) functions() template.FuncMap {
	functions := template.FuncMap{
		tick: func() (string, error) {
			if run.rounds++; run.rounds > maxTemplateRounds {
				return "", errTooRound
			}
			return "", nil
		},
		"__line__":      func() string { return run.record.line },
		"__timestamp__": func() time.Time { return run.record.time },
		"now":           time.Now,

		"print":    func(args ...any) (string, error) { return run.print(args, fmt.Sprint) },
		"println":  func(args ...any) (string, error) { return run.print(args, fmt.Sprintln) },
		"printf":   printf,
		"html":     func(args ...any) (string, error) { return run.escape(args, html.EscapeString) },
		"js":       func(args ...any) (string, error) { return run.escape(args, template.JSEscapeString) },
		"urlquery": func(args ...any) (string, error) { return run.escape(args, url.QueryEscape) },
		"call":     func(...any) (string, error) { return "", errors.New("call is not supported") },

		// Texts.
		"lower": strings.ToLower, "ToLower": strings.ToLower,
		"upper": strings.ToUpper, "ToUpper": strings.ToUpper,
		"title":     title,
		"trunc":     trunc,
		"substr":    substr,
		"trim":      strings.TrimSpace,
		"TrimSpace": strings.TrimSpace,
		"contains":  func(part, s string) bool { return strings.Contains(s, part) },
		"hasPrefix": func(prefix, s string) bool { return strings.HasPrefix(s, prefix) },
		"hasSuffix": func(suffix, s string) bool { return strings.HasSuffix(s, suffix) },
		"replace":   func(old, with, s string) (string, error) { return replace(s, old, with, -1) },
		"Replace":   replace,
		"trimAll":   func(chars, s string) string { return strings.Trim(s, chars) },
		"Trim":      strings.Trim, "TrimLeft": strings.TrimLeft, "TrimRight": strings.TrimRight,
		"trimPrefix": func(prefix, s string) string { return strings.TrimPrefix(s, prefix) },
		"trimSuffix": func(suffix, s string) string { return strings.TrimSuffix(s, suffix) },
		"TrimPrefix": strings.TrimPrefix, "TrimSuffix": strings.TrimSuffix,
		"indent":     func(spaces int, s string) (string, error) { return indent(spaces, s) },
		"nindent":    func(spaces int, s string) (string, error) { return indent(spaces, s, "\n") },
		"repeat":     repeat,
		"alignLeft":  func(width int, s string) (string, error) { return align(width, s, true) },
		"alignRight": func(width int, s string) (string, error) { return align(width, s, false) },
		"default": func(other, s string) string {
			if s == "" {
				return other
			}
			return s
		},
		"b64enc":    func(s string) (string, error) { return bounded(base64.StdEncoding.EncodeToString([]byte(s))) },
		"b64dec":    decodeBase64,
		"urlencode": func(s string) (string, error) { return bounded(url.QueryEscape(s)) },
		"urldecode": url.QueryUnescape,
		"fromJson":  fromJSON,

		// Regular expressions.
		"count":                  run.count,
		"regexReplaceAll":        func(re, s, with string) (string, error) { return run.replaceAll(re, s, with, false) },
		"regexReplaceAllLiteral": func(re, s, with string) (string, error) { return run.replaceAll(re, s, with, true) },

		// Numbers.
		"int": asInt, "float64": asFloat,
		"add": func(args ...any) int64 { return foldInt(args, func(a, b int64) int64 { return a + b }) },
		"mul": func(args ...any) int64 { return foldInt(args, func(a, b int64) int64 { return a * b }) },
		"sub": func(a, b any) int64 { return asInt64(a) - asInt64(b) },
		"max": func(args ...any) int64 { return foldInt(args, func(a, b int64) int64 { return max(a, b) }) },
		"min": func(args ...any) int64 { return foldInt(args, func(a, b int64) int64 { return min(a, b) }) },
		"div": func(a, b any) (int64, error) { return divide(a, b, func(a, b int64) int64 { return a / b }) },
		"mod": func(a, b any) (int64, error) { return divide(a, b, func(a, b int64) int64 { return a % b }) },

		"addf":  func(args ...any) float64 { return foldFloat(args, func(a, b float64) float64 { return a + b }) },
		"subf":  func(args ...any) float64 { return foldFloat(args, func(a, b float64) float64 { return a - b }) },
		"mulf":  func(args ...any) float64 { return foldFloat(args, func(a, b float64) float64 { return a * b }) },
		"divf":  func(args ...any) float64 { return foldFloat(args, func(a, b float64) float64 { return a / b }) },
		"maxf":  func(args ...any) float64 { return foldFloat(args, math.Max) },
		"minf":  func(args ...any) float64 { return foldFloat(args, math.Min) },
		"ceil":  func(a any) float64 { return math.Ceil(asFloat(a)) },
		"floor": func(a any) float64 { return math.Floor(asFloat(a)) },
		"round": round,

		// Times and units.
		"date":            func(layout string, t any) (string, error) { return bounded(asTime(t).Format(layout)) },
		"toDate":          func(layout, s string) time.Time { return toDate(layout, time.Local, s) },
		"toDateInZone":    run.toDateInZone,
		"unixEpoch":       func(t time.Time) string { return strconv.FormatInt(t.Unix(), 10) },
		"unixEpochMillis": func(t time.Time) string { return strconv.FormatInt(t.UnixMilli(), 10) },
		"unixEpochNanos":  func(t time.Time) string { return strconv.FormatInt(t.UnixNano(), 10) },
		"unixToTime":      unixToTime,
		"duration":        toSeconds, "duration_seconds": toSeconds,
		"bytes": toBytes,
	}
	for name, f := range functions {
		functions[name] = run.charged(f)
	}
	return functions
}

// charged makes a function that returns a text count what it has made: variables keep all of it.
func (run *templateRun) charged(f any) any {
	function := reflect.ValueOf(f)
	of := function.Type()
	if of.Out(0).Kind() != reflect.String {
		return f
	}
	in := make([]reflect.Type, of.NumIn())
	for i := range in {
		in[i] = of.In(i)
	}
	failure := reflect.TypeFor[error]()
	out := reflect.FuncOf(in, []reflect.Type{of.Out(0), failure}, of.IsVariadic())
	return reflect.MakeFunc(out, func(args []reflect.Value) []reflect.Value {
		var results []reflect.Value
		if of.IsVariadic() {
			results = function.CallSlice(args)
		} else {
			results = function.Call(args)
		}
		err := reflect.Zero(failure)
		if len(results) == 2 {
			err = results[1]
		}
		if run.made += results[0].Len(); run.made > maxTemplateMade {
			err = reflect.ValueOf(&errTooMuch).Elem()
		}
		return []reflect.Value{results[0], err}
	}).Interface()
}

// print joins values whose length is known before.
func (run *templateRun) print(args []any, how func(...any) string) (string, error) {
	if total, err := lengths(args); err != nil || total > maxTemplateOutput {
		return "", errTooLong
	}
	return bounded(how(args...))
}

func (run *templateRun) escape(args []any, how func(string) string) (string, error) {
	s, err := run.print(args, fmt.Sprint)
	if err != nil {
		return "", err
	}
	return bounded(how(s))
}

// lengths adds up how long values are as texts.
func lengths(args []any) (int, error) {
	total := 0
	for _, a := range args {
		total += lengthOf(a)
		if total > maxTemplateOutput {
			return 0, errTooLong
		}
	}
	return total, nil
}

func lengthOf(value any) int {
	switch v := value.(type) {
	case string:
		return len(v)
	case nil, bool, int, int64, float64, time.Time, time.Duration:
		return 64
	default: // a document of fromJson, which is no longer than a label
		return len(fmt.Sprint(v))
	}
}

// printf is fmt.Sprintf. A format can name an argument many times, with a width of up to a million each time: all of that is counted before.
func printf(format string, args ...any) (string, error) {
	longest := 0
	for _, a := range args {
		if n, ok := a.(int); ok { // it may be a width
			longest = max(longest, n, -n)
		}
		longest = max(longest, lengthOf(a))
	}
	total := len(format)
	for i := 0; i < len(format); i++ {
		if format[i] != '%' {
			continue
		}
		widest, number := 0, 0
		for i++; i < len(format) && strings.IndexByte("+-# 0123456789.[]*", format[i]) >= 0; i++ {
			if isDigit(format[i]) {
				number = min(number*10+int(format[i]-'0'), maxTemplateOutput+1)
			} else {
				number = 0
			}
			widest = max(widest, number)
		}
		// %q and %x make several bytes of one.
		if total += max(widest, 6*longest); total > 8*maxTemplateOutput || widest > maxTemplateOutput {
			return "", errTooLong
		}
	}
	return bounded(fmt.Sprintf(format, args...))
}

// title makes the first letter of each word a capital.
func title(s string) string {
	before := ' '
	return strings.Map(func(r rune) rune {
		first := !unicode.IsLetter(before) && !unicode.IsDigit(before) && before != '_' && before != '\''
		before = r
		if first {
			return unicode.ToTitle(r)
		}
		return r
	}, s)
}

// trunc keeps the first runes, or the last ones if the count is negative.
func trunc(count int, s string) string {
	runes := []rune(s)
	switch {
	case count < 0 && -count < len(runes) && -count > 0:
		return string(runes[len(runes)+count:])
	case count >= 0 && count < len(runes):
		return string(runes[:count])
	}
	return s
}

func substr(start, end int, s string) string {
	runes := []rune(s)
	if end < 0 || end > len(runes) {
		end = len(runes)
	}
	if start < 0 {
		start = 0
	}
	if start >= end {
		return ""
	}
	return string(runes[start:end])
}

func replace(s, old, with string, n int) (string, error) {
	found := strings.Count(s, old)
	if n >= 0 {
		found = min(found, n)
	}
	if len(s)+found*(len(with)-len(old)) > maxTemplateOutput {
		return "", errTooLong
	}
	return strings.Replace(s, old, with, n), nil
}

func indent(spaces int, s string, before ...string) (string, error) {
	lines := strings.Count(s, "\n") + 1
	if spaces < 0 || spaces > maxTemplateOutput || spaces*lines+len(s) > maxTemplateOutput {
		return "", errTooLong
	}
	margin := strings.Repeat(" ", spaces)
	return strings.Join(before, "") + margin + strings.ReplaceAll(s, "\n", "\n"+margin), nil
}

func repeat(count int, s string) (string, error) {
	if count <= 0 || s == "" {
		return "", nil
	}
	if count > maxTemplateOutput/len(s) {
		return "", errTooLong
	}
	return strings.Repeat(s, count), nil
}

// align makes a text exactly as wide as said.
func align(width int, s string, left bool) (string, error) {
	if width < 0 {
		return s, nil
	}
	if width > maxTemplateOutput {
		return "", errTooLong
	}
	has := utf8.RuneCountInString(s)
	switch runes := []rune(s); {
	case has > width && left:
		return string(runes[:width]), nil
	case has > width:
		return string(runes[has-width:]), nil
	case left:
		return s + strings.Repeat(" ", width-has), nil
	default:
		return strings.Repeat(" ", width-has) + s, nil
	}
}

func decodeBase64(s string) string {
	decoded, err := base64.StdEncoding.DecodeString(s)
	if err != nil {
		return err.Error()
	}
	return string(decoded)
}

func fromJSON(s string) any {
	if doc, err := (&jsonReader{text: s}).document(); err != nil || doc.raw == "" { // also bounds how deep it is
		return ""
	}
	var v any
	if json.Unmarshal([]byte(s), &v) != nil {
		return ""
	}
	return v
}

// regexp compiles an expression once. They may come from labels, so there are not endlessly many.
func (run *templateRun) regexp(text string) (*regexp.Regexp, error) {
	if re, ok := run.regexps[text]; ok {
		return re, nil
	}
	if len(run.regexps) >= maxTemplateRegexps {
		return nil, fmt.Errorf("the template has more than %d regular expressions", maxTemplateRegexps)
	}
	re, err := compileRegexp(text, maxLineRegexp)
	if err != nil {
		return nil, err
	}
	run.regexps[text] = re
	return re, nil
}

func (run *templateRun) count(text, s string) (int, error) {
	re, err := run.regexp(text)
	if err != nil {
		return 0, err
	}
	return len(re.FindAllStringIndex(s, -1)), nil
}

func (run *templateRun) replaceAll(text, s, with string, literal bool) (string, error) {
	re, err := run.regexp(text)
	if err != nil {
		return "", err
	}
	// Each match may put all of the text into each $1.
	grown := len(with)
	if !literal {
		grown += strings.Count(with, "$") * len(s)
	}
	if found := len(re.FindAllStringIndex(s, -1)); found > 0 && grown > 4*maxTemplateOutput/found {
		return "", errTooLong
	}
	if literal {
		return bounded(re.ReplaceAllLiteralString(s, with))
	}
	return bounded(re.ReplaceAllString(s, with))
}

// The conversions: what is no number is 0, as in the functions that Loki takes these from.
func asFloat(value any) float64 {
	switch v := value.(type) {
	case float64:
		return v
	case int:
		return float64(v)
	case int64:
		return float64(v)
	case bool:
		if v {
			return 1
		}
	case string:
		if n, err := strconv.ParseFloat(v, 64); err == nil {
			return n
		}
	}
	return 0
}

func asInt64(value any) int64 {
	switch v := value.(type) {
	case int:
		return int64(v)
	case int64:
		return v
	case string:
		if n, err := strconv.ParseInt(v, 0, 64); err == nil {
			return n
		}
	}
	n := asFloat(value)
	if math.IsNaN(n) || n >= math.MaxInt64 || n <= math.MinInt64 {
		return 0
	}
	return int64(n)
}

func asInt(value any) int { return int(asInt64(value)) }

func asTime(value any) time.Time {
	switch v := value.(type) {
	case time.Time:
		return v
	case int64, int:
		return time.Unix(asInt64(v), 0)
	}
	return time.Now()
}

func foldInt(args []any, f func(a, b int64) int64) int64 {
	if len(args) == 0 {
		return 0
	}
	n := asInt64(args[0])
	for _, a := range args[1:] {
		n = f(n, asInt64(a))
	}
	return n
}

func foldFloat(args []any, f func(a, b float64) float64) float64 {
	if len(args) == 0 {
		return 0
	}
	n := asFloat(args[0])
	for _, a := range args[1:] {
		n = f(n, asFloat(a))
	}
	return n
}

func divide(a, b any, f func(a, b int64) int64) (int64, error) {
	x, y := asInt64(a), asInt64(b)
	if y == 0 {
		return 0, errDivByZero
	}
	if y == -1 { // the smallest number has no opposite
		return f(max(x, -math.MaxInt64), y), nil
	}
	return f(x, y), nil
}

// round rounds to digits behind the point; what is left over rounds up from the given part on, one half if nothing is said.
func round(value any, digits int, from ...float64) (float64, error) {
	const most = 15
	if digits < -most || digits > most {
		return 0, fmt.Errorf("round takes up to %d digits", most)
	}
	on := 0.5
	if len(from) > 0 {
		on = from[0]
	}
	scale := math.Pow(10, float64(digits))
	whole, rest := math.Modf(asFloat(value) * scale)
	if rest >= on {
		whole++
	} else if -rest > on {
		whole--
	}
	return whole / scale, nil
}

func toDate(layout string, zone *time.Location, s string) time.Time {
	t, _ := time.ParseInLocation(layout, s, zone)
	return t
}

// toDateInZone reads a zone's file once.
func (run *templateRun) toDateInZone(layout, zone, s string) time.Time {
	location, ok := run.zones[zone]
	if !ok {
		var err error
		if location, err = time.LoadLocation(zone); err != nil {
			location = time.UTC
		}
		if len(run.zones) < maxTemplateZones {
			run.zones[zone] = location
		}
	}
	return toDate(layout, location, s)
}

// unixToTime takes days, seconds, milliseconds, microseconds or nanoseconds, by the number of digits.
func unixToTime(epoch string) (time.Time, error) {
	n, err := strconv.ParseInt(epoch, 10, 64)
	if err != nil {
		return time.Time{}, &conversionError{"time", epoch}
	}
	switch len(strings.TrimPrefix(epoch, "-")) {
	case 5:
		return time.Unix(0, 0).UTC().AddDate(0, 0, int(n)), nil
	case 10:
		return time.Unix(n, 0), nil
	case 13:
		return time.UnixMilli(n), nil
	case 16:
		return time.UnixMicro(n), nil
	case 19:
		return time.Unix(0, n), nil
	}
	return time.Time{}, &conversionError{"time", epoch}
}
