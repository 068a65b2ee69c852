package logstore

import (
	"fmt"
	"regexp"
	"strings"
	"time"

	"polymesh.dev/polymesh/observe/rowstore"
)

// MatchType is how a matcher compares.
type MatchType int

const (
	Equal MatchType = iota
	NotEqual
	Regexp
	NotRegexp
)

func (t MatchType) String() string {
	switch t {
	case NotEqual:
		return "!="
	case Regexp:
		return "=~"
	case NotRegexp:
		return "!~"
	}
	return "="
}

// Matcher selects by one value. A missing value counts as empty. A regular expression matches the whole value.
type Matcher struct {
	Name  string
	Type  MatchType
	Value string
}

// Filter selects by the line: it contains the text, or a match of the regular expression.
type Filter struct {
	Text     string
	Negative bool
	Regexp   bool
}

// Selector selects lines.
type Selector struct {
	Matchers []Matcher // on labels; none is every stream
	Metadata []Matcher // on the lines' metadata
	Filters  []Filter
	// Start is inclusive, End exclusive; zero is no limit.
	Start, End time.Time
	// Limit is the largest number of lines that Select returns; zero for all.
	Limit int
	// Newest returns the newest lines first.
	Newest bool
}

// Limits of a selector, whose texts come from clients.
const (
	maxMatchers    = 64
	maxFilters     = 64
	maxFilterBytes = 8 << 10
)

// compiled is a compiled selector: LogsQL for stored lines, functions for new ones.
type compiled struct {
	logsql string
	match  func(*Entry) bool
}

func compile(sel Selector) (compiled, error) {
	if len(sel.Matchers)+len(sel.Metadata) > maxMatchers || len(sel.Filters) > maxFilters {
		return compiled{}, fmt.Errorf("the query has more than %d matchers or %d filters", maxMatchers, maxFilters)
	}
	var (
		query  strings.Builder
		checks []func(*Entry) bool
	)
	for i, m := range sel.Matchers {
		if i == 0 {
			query.WriteByte('{')
		} else {
			query.WriteByte(',')
		}
		if err := checkMatcher(m); err != nil {
			return compiled{}, err
		}
		if !ValidName(m.Name) {
			return compiled{}, fmt.Errorf("%.40q is not a valid label name", m.Name)
		}
		query.WriteString(rowstore.FieldName(m.Name) + m.Type.String() + rowstore.Literal(m.Value))
		check, err := valueCheck(m)
		if err != nil {
			return compiled{}, err
		}
		checks = append(checks, func(e *Entry) bool { return check(Value(e.Labels, m.Name)) })
	}
	// In the storage, {} selects no streams.
	if len(sel.Matchers) == 0 {
		query.WriteByte('*')
	} else {
		query.WriteByte('}')
	}
	for _, m := range sel.Metadata {
		if err := checkMatcher(m); err != nil {
			return compiled{}, err
		}
		check, err := valueCheck(m)
		if err != nil {
			return compiled{}, err
		}
		value := rowstore.FieldName(metadataPrefix+m.Name) + ":"
		switch m.Type {
		case Equal, NotEqual:
			value += "=" + rowstore.Literal(m.Value)
		default:
			value += "~" + rowstore.Literal("^(?s:"+m.Value+")$")
		}
		if m.Type == NotEqual || m.Type == NotRegexp {
			value = "!(" + value + ")"
		}
		query.WriteString(" " + value)
		checks = append(checks, func(e *Entry) bool { return check(Value(e.Metadata, m.Name)) })
	}
	for _, f := range sel.Filters {
		if len(f.Text) > maxFilterBytes {
			return compiled{}, fmt.Errorf("a filter has %d bytes, more than %d", len(f.Text), maxFilterBytes)
		}
		var check func(string) bool
		value := rowstore.FieldName(rowstore.MessageField) + ":"
		if f.Regexp {
			re, err := regexp.Compile(f.Text)
			if err != nil {
				return compiled{}, fmt.Errorf("reading the filter: %w", err)
			}
			check = re.MatchString
			pattern := f.Text
			if pattern == ".+" {
				pattern = "(?:.+)" // which the storage takes for any line otherwise, also an empty one
			}
			value += "~" + rowstore.Literal(pattern)
		} else {
			check = func(line string) bool { return strings.Contains(line, f.Text) }
			value += "*" + rowstore.Literal(f.Text) + "*"
		}
		if f.Negative {
			positive := check
			check = func(line string) bool { return !positive(line) }
			value = "!(" + value + ")"
		}
		query.WriteString(" " + value)
		checks = append(checks, func(e *Entry) bool { return check(e.Line) })
	}
	return compiled{logsql: query.String(), match: func(e *Entry) bool {
		for _, check := range checks {
			if !check(e) {
				return false
			}
		}
		return true
	}}, nil
}

func checkMatcher(m Matcher) error {
	if len(m.Name) > MaxNameBytes || len(m.Value) > maxFilterBytes {
		return fmt.Errorf("a matcher has more than %d bytes of name or %d of value", MaxNameBytes, maxFilterBytes)
	}
	return nil
}

func valueCheck(m Matcher) (func(string) bool, error) {
	switch m.Type {
	case Equal:
		return func(v string) bool { return v == m.Value }, nil
	case NotEqual:
		return func(v string) bool { return v != m.Value }, nil
	}
	re, err := regexp.Compile("^(?s:" + m.Value + ")$")
	if err != nil {
		return nil, fmt.Errorf("reading the matcher for %s: %w", m.Name, err)
	}
	if m.Type == NotRegexp {
		return func(v string) bool { return !re.MatchString(v) }, nil
	}
	return re.MatchString, nil
}

// Value returns the value of the field with that name, empty if there is none.
func Value(fields []Field, name string) string {
	for _, f := range fields {
		if f.Name == name {
			return f.Value
		}
	}
	return ""
}
