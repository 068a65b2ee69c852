package logql

import (
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/prometheus/model/labels"
)

// lineFilter keeps lines, or drops them: |= "a" or "b". A negative one drops what any of its texts matches.
type lineFilter struct {
	op    kind // |= |~ |> != !~ !>
	texts []lineText
}

// lineText is one of the alternatives of a filter.
type lineText struct {
	text    string
	ip      *addresses // of ip("…")
	re      *regexp.Regexp
	pattern *pattern
}

func (f *lineFilter) negative() bool { return f.op[0] == '!' }

func (f *lineFilter) String() string {
	var b strings.Builder
	b.WriteString(string(f.op))
	for i, t := range f.texts {
		if i > 0 {
			b.WriteString(" or")
		}
		if t.ip != nil {
			b.WriteString(" ip(" + strconv.Quote(t.text) + ")")
		} else {
			b.WriteString(" " + strconv.Quote(t.text))
		}
	}
	return b.String()
}

func (f *lineFilter) run(r *record) bool {
	for _, t := range f.texts {
		if t.match(r.line) {
			return !f.negative()
		}
	}
	return f.negative()
}

func (t *lineText) match(line string) bool {
	switch {
	case t.ip != nil:
		return t.ip.in(line)
	case t.re != nil:
		return t.re.MatchString(line)
	case t.pattern != nil:
		return t.pattern.match(line)
	default:
		return strings.Contains(line, t.text)
	}
}

// labelFilter is a condition on labels.
type labelFilter interface {
	String() string
	holds(*record) bool
}

// filterStage is | condition.
type filterStage struct{ labelFilter }

func (s filterStage) String() string     { return "| " + s.labelFilter.String() }
func (s filterStage) run(r *record) bool { return s.holds(r) }

// bothFilter is a and b, eitherFilter is a or b.
type (
	bothFilter   struct{ a, b labelFilter }
	eitherFilter struct{ a, b labelFilter }
)

func (f bothFilter) String() string       { return "(" + f.a.String() + " and " + f.b.String() + ")" }
func (f bothFilter) holds(r *record) bool { return f.a.holds(r) && f.b.holds(r) }

func (f eitherFilter) String() string { return "(" + f.a.String() + " or " + f.b.String() + ")" }

// holds asks both: a filter on errors that is not decisive still says whether lines with errors are wanted.
func (f eitherFilter) holds(r *record) bool {
	a, b := f.a.holds(r), f.b.holds(r)
	return a || b
}

// textFilter compares a label with a text, and is the only one that can see errors.
type textFilter struct{ *labels.Matcher }

func (f textFilter) String() string {
	var b strings.Builder
	writeMatcher(&b, f.Matcher)
	return b.String()
}

func (f textFilter) holds(r *record) bool {
	value, _ := r.get(f.Name)
	if !f.Matches(value) {
		return false
	}
	if f.Name == errorLabel && value != "" {
		r.keepError = true
	}
	return true
}

// numberFilter compares a label with a number, a duration or a count of bytes.
type numberFilter struct {
	name    string
	op      kind
	value   token
	convert func(string) (float64, error)
}

func (f *numberFilter) String() string {
	if f.value.number < 0 && f.value.text[0] != '-' {
		return f.name + " " + string(f.op) + " -" + f.value.text
	}
	return f.name + " " + string(f.op) + " " + f.value.text
}

func (f *numberFilter) holds(r *record) bool {
	if r.err != "" { // only a text filter removes a line with an error
		return true
	}
	value, ok := r.get(f.name)
	if !ok {
		return false
	}
	n, err := f.convert(value)
	if err != nil {
		r.fail(errFilter, err.Error())
		return true
	}
	switch f.op {
	case "=", "==":
		return n == f.value.number
	case "!=":
		return n != f.value.number
	case ">":
		return n > f.value.number
	case ">=":
		return n >= f.value.number
	case "<":
		return n < f.value.number
	default:
		return n <= f.value.number
	}
}

// addressFilter is label = ip("…").
type addressFilter struct {
	name    string
	op      kind
	pattern string
	ip      addresses
}

func (f *addressFilter) String() string {
	return f.name + string(f.op) + "ip(" + strconv.Quote(f.pattern) + ")"
}

func (f *addressFilter) holds(r *record) bool {
	if r.err != "" {
		return true
	}
	value, ok := r.get(f.name)
	if !ok {
		return false
	}
	return f.ip.in(value) == (f.op == "=")
}

// conversionError says what could not be converted, without all of a label that may be long.
type conversionError struct{ what, value string }

func (e *conversionError) Error() string { return strconv.Quote(clip(e.value)) + " is not a " + e.what }

// The conversions of filters and of unwrap.
func toNumber(s string) (float64, error) {
	n, err := strconv.ParseFloat(s, 64)
	if err != nil {
		return 0, &conversionError{"number", s}
	}
	return n, nil
}

func toNanoseconds(s string) (float64, error) {
	d, err := time.ParseDuration(s)
	if err != nil {
		return 0, &conversionError{"duration", s}
	}
	return float64(d), nil
}

func toSeconds(s string) (float64, error) {
	n, err := toNanoseconds(s)
	return n / float64(time.Second), err
}

func toBytes(s string) (float64, error) {
	n, ok := parseBytes(s)
	if !ok {
		return 0, &conversionError{"count of bytes", s}
	}
	return n, nil
}
