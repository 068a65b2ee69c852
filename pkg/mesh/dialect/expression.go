package dialect

import (
	"errors"
	"math"
	"regexp"
	"regexp/syntax"
	"slices"
	"unicode"
	"unicode/utf8"

	"github.com/google/cel-go/common"
	"github.com/google/cel-go/common/ast"
	"github.com/google/cel-go/common/operators"
	"github.com/google/cel-go/common/types"
	"github.com/google/cel-go/parser"
)

// This file converts the expressions (CEL) that the Telemetry API sets labels to into format strings. Envoy rejects a whole
// listener if it cannot compile one expression, so only expressions that it can compile are passed on. The others get the value
// unknown, as Istio does when an expression fails.

// attributes are expressions for which a format string is cheaper.
var attributes = map[string]string{
	"request.host":      "%REQ(:AUTHORITY)%",
	"request.method":    "%REQ(:METHOD)%",
	"request.path":      "%REQ(:PATH)%",
	"request.scheme":    "%REQ(:SCHEME)%",
	"request.protocol":  "%PROTOCOL%",
	"request.useragent": "%REQ(USER-AGENT)%",
	"response.code":     "%RESPONSE_CODE%",
}

var (
	identifier       = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)
	headerExpression = regexp.MustCompile(`^(request|response)\.headers\["([A-Za-z0-9_-]+)"\]$`)
	// commandEnd is what Envoy takes for the end of %CEL(…)%. Operators have spaces around them, so a match is inside a string.
	commandEnd = regexp.MustCompile(`\)(:\d+)?%`)
)

// activations are the names that Envoy's expressions resolve
// (https://www.envoyproxy.io/docs/envoy/latest/intro/arch_overview/advanced/attributes).
var activations = []string{
	"request", "response", "connection", "upstream", "source", "destination", "metadata", "filter_state", "upstream_filter_state", "xds",
}

// xdsAttributes are names that only Istio resolves at the top level; Envoy has them under xds.
var xdsAttributes = []string{
	"node", "cluster_name", "cluster_metadata", "listener_direction", "listener_metadata", "route_name", "route_metadata",
}

// overload is a way to call a function. Envoy resolves it by name, receiver and number of arguments, before types are known.
type overload struct {
	member bool
	args   int
}

// overloads are the functions available in Envoy's CEL interpreter as configured in source/extensions/filters/common/expr/evaluator.cc:
// no comprehensions, no string conversion, and no functions that build new strings.
var overloads = map[overload][]string{
	{args: 1}: {operators.LogicalNot, operators.Negate, "size", "int", "uint", "double", "timestamp", "duration"},
	{args: 2}: {
		operators.LogicalAnd, operators.LogicalOr, operators.Equals, operators.NotEquals,
		operators.Less, operators.LessEquals, operators.Greater, operators.GreaterEquals,
		operators.Add, operators.Subtract, operators.Multiply, operators.Divide, operators.Modulo, operators.Index, operators.In,
		re + "capture",
	},
	{args: 3}:               {operators.Conditional, re + "extract"},
	{member: true}:          append([]string{"size"}, ofTime...),
	{member: true, args: 1}: append([]string{"contains", "startsWith", "endsWith", matches}, ofTime...),
}

// ofTime are functions on timestamps, with an optional time zone argument.
var ofTime = []string{
	"getFullYear", "getMonth", "getDate", "getDayOfMonth", "getDayOfWeek", "getDayOfYear",
	"getHours", "getMinutes", "getSeconds", "getMilliseconds",
}

const (
	matches = "matches"
	// re is the prefix of extension function names, and parses like a receiver.
	re = "re."
)

// toText is the string conversion, which a format string does implicitly.
const toText = "string"

// maxDepth is well below the limit of Envoy's parser.
const maxDepth = 32

// formatOfExpression returns the format string for an expression, or unknown if Envoy cannot evaluate it.
func formatOfExpression(s *surroundings, expression string) string {
	parsed, err := parse(expression)
	if err != nil {
		return unknown
	}
	if format, ok := formatOf(s, parsed.Expr(), parsed.SourceInfo()); ok {
		return format
	}
	return unknown
}

func parse(expression string) (*ast.AST, error) {
	p, err := parser.NewParser(parser.Macros(parser.AllMacros...), parser.MaxRecursionDepth(maxDepth))
	if err != nil {
		return nil, err
	}
	parsed, errs := p.Parse(common.NewTextSource(expression))
	if len(errs.GetErrors()) > 0 {
		return nil, errors.New(errs.ToDisplayString())
	}
	return parsed, nil
}

func formatOf(s *surroundings, e ast.Expr, info *ast.SourceInfo) (string, bool) {
	stripStringConversion(e)
	if text, ok := textOf(e); ok {
		return literal(text), true
	}
	if isCall(e, operators.Add) && isText(e) {
		left, ok := formatOf(s, e.AsCall().Args()[0], info)
		right, also := formatOf(s, e.AsCall().Args()[1], info)
		return left + right, ok && also
	}
	if !adapt(e) {
		return "", false
	}
	text, err := parser.Unparse(e, info, parser.WrapOnColumn(math.MaxInt32))
	if err != nil {
		return "", false
	}
	if format, ok := attributes[text]; ok {
		return format, true
	}
	if m := headerExpression.FindStringSubmatch(text); m != nil {
		command := map[string]string{"request": "REQ", "response": "RESP"}[m[1]]
		return "%" + command + "(" + m[2] + ")%", true
	}
	return "%CEL(" + commandEnd.ReplaceAllString(peerExpression(s, text), `)$1\x25`) + ")%", true
}

func isCall(e ast.Expr, function string) bool {
	return e.Kind() == ast.CallKind && e.AsCall().FunctionName() == function && !e.AsCall().IsMemberFunction()
}

func textOf(e ast.Expr) (string, bool) {
	if e.Kind() != ast.LiteralKind {
		return "", false
	}
	text, ok := e.AsLiteral().(types.String)
	return string(text), ok
}

// stripStringConversion removes string conversions whose result is only printed.
func stripStringConversion(e ast.Expr) {
	for isCall(e, toText) && len(e.AsCall().Args()) == 1 {
		e.SetKindCase(e.AsCall().Args()[0])
	}
	if isCall(e, operators.Conditional) {
		for _, value := range e.AsCall().Args()[1:] {
			stripStringConversion(value)
		}
	}
}

// isText reports whether e is known to be a string, so that + concatenates it.
func isText(e ast.Expr) bool {
	if _, ok := textOf(e); ok {
		return true
	}
	switch {
	case isCall(e, toText):
		return true
	case isCall(e, operators.Add):
		return slices.ContainsFunc(e.AsCall().Args(), isText)
	case isCall(e, operators.Index):
		return isSelect(e.AsCall().Args()[0], "headers")
	}
	return isSelect(e, "host") || isSelect(e, "method") || isSelect(e, "path") || isSelect(e, "url_path")
}

func isSelect(e ast.Expr, field string) bool {
	return e.Kind() == ast.SelectKind && !e.AsSelect().IsTestOnly() && e.AsSelect().FieldName() == field
}

// adapt renames Istio-only attributes to Envoy's names, and reports whether Envoy can compile e.
func adapt(e ast.Expr) bool {
	switch e.Kind() {
	case ast.LiteralKind:
		return true
	case ast.IdentKind:
		name := e.AsIdent()
		build := ast.NewExprFactory()
		switch {
		case slices.Contains(activations, name):
		case slices.Contains(xdsAttributes, name):
			e.SetKindCase(build.NewSelect(e.ID(), build.NewIdent(0, "xds"), name))
		default: // set by a Wasm plugin
			e.SetKindCase(build.NewCall(e.ID(), operators.Index, build.NewIdent(0, "filter_state"), build.NewLiteral(0, types.String("wasm."+name))))
		}
		return true
	case ast.SelectKind:
		return identifier.MatchString(e.AsSelect().FieldName()) && adapt(e.AsSelect().Operand())
	case ast.ListKind:
		return adaptAll(e.AsList().Elements())
	case ast.CallKind:
		call := e.AsCall()
		name, as := call.FunctionName(), overload{call.IsMemberFunction(), len(call.Args())}
		if as.member && call.Target().Kind() == ast.IdentKind && call.Target().AsIdent()+"." == re {
			name, as.member = re+name, false
		}
		if !slices.Contains(overloads[as], name) || as.member && !adapt(call.Target()) {
			return false
		}
		if name == matches {
			if pattern, ok := textOf(call.Args()[0]); ok && !isRegex(pattern) {
				return false
			}
		}
		return adaptAll(call.Args())
	}
	return false
}

func adaptAll(all []ast.Expr) bool {
	return !slices.ContainsFunc(all, func(e ast.Expr) bool { return !adapt(e) })
}

// maxProgram is the RE2 program size that Envoy allows for a regular expression in CEL, in instructions.
const maxProgram = 100

// isRegex reports whether Envoy accepts a regular expression. RE2 counts bytes where Go counts characters, so the size is an
// upper bound.
func isRegex(pattern string) bool {
	parsed, err := syntax.Parse(pattern, syntax.Perl)
	if err != nil {
		return false
	}
	program, err := syntax.Compile(parsed.Simplify())
	if err != nil {
		return false
	}
	size := 0
	for _, inst := range program.Inst {
		switch inst.Op {
		case syntax.InstRune1:
			size += utf8.UTFMax
			if inst.Rune[0] <= unicode.MaxASCII {
				size -= utf8.UTFMax - 1
			}
		case syntax.InstRuneAny, syntax.InstRuneAnyNotNL:
			size += anyRune
		case syntax.InstRune:
			if len(inst.Rune) == 0 || inst.Rune[len(inst.Rune)-1] > unicode.MaxASCII {
				size += anyRune
			}
			size += len(inst.Rune)
		default:
			size++
		}
	}
	return size <= maxProgram
}

// anyRune is roughly the number of RE2 instructions for a character of any encoded length.
const anyRune = 12
