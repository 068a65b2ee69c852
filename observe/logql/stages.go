package logql

import (
	"regexp"
	"strconv"
	"strings"

	"github.com/prometheus/prometheus/model/labels"
)

// decolorizeStage takes the colours of a terminal out of the line.
type decolorizeStage struct{}

func (decolorizeStage) String() string { return "| decolorize" }

func (decolorizeStage) run(r *record) bool {
	r.line = decolorize(r.line)
	return true
}

// decolorize removes the escape sequences that begin with ESC [.
func decolorize(line string) string {
	at := strings.Index(line, "\x1b[")
	if at < 0 {
		return line
	}
	var b strings.Builder
	for at >= 0 {
		b.WriteString(line[:at])
		end := at + 2
		for end < len(line) && line[end] >= 0x20 && line[end] < 0x40 {
			end++
		}
		if end < len(line) {
			end++
		}
		line = line[end:]
		at = strings.Index(line, "\x1b[")
	}
	b.WriteString(line)
	return b.String()
}

// labelChoice is one item of drop and keep: a name, perhaps only with certain values.
type labelChoice struct {
	name    string
	matcher *labels.Matcher
}

func (c labelChoice) String() string {
	if c.matcher == nil {
		return c.name
	}
	return textFilter{c.matcher}.String()
}

func (c labelChoice) holds(value string) bool { return c.matcher == nil || c.matcher.Matches(value) }

func joinChoices(word string, choices []labelChoice) string {
	texts := make([]string, len(choices))
	for i, c := range choices {
		texts[i] = c.String()
	}
	return "| " + word + " " + strings.Join(texts, ", ")
}

// dropStage removes labels, also those about errors.
type dropStage []labelChoice

func (s dropStage) String() string { return joinChoices("drop", s) }

func (s dropStage) run(r *record) bool {
	for _, c := range s {
		if value, ok := r.get(c.name); ok && c.holds(value) {
			r.drop(c.name)
			if c.name == errorLabel {
				r.drop(detailsLabel)
			}
		}
	}
	return true
}

// keepStage removes all other labels, but not those about errors.
type keepStage []labelChoice

func (s keepStage) String() string { return joinChoices("keep", s) }

func (s keepStage) run(r *record) bool {
	for i := range r.labels {
		l := &r.labels[i]
		kept := false
		for _, c := range s {
			kept = kept || c.name == l.name && c.holds(l.value)
		}
		l.dropped = l.dropped || !kept
	}
	return true
}

// renaming is one item of label_format: a template, or the label that gets the name.
type renaming struct {
	name     string
	source   string // a label, if there is no template
	template *lineTemplate
}

// labelFormatStage renames labels and sets them.
type labelFormatStage []renaming

func (s labelFormatStage) String() string {
	texts := make([]string, len(s))
	for i, f := range s {
		if f.template != nil {
			texts[i] = f.name + "=" + strconv.Quote(f.template.text)
		} else {
			texts[i] = f.name + "=" + f.source
		}
	}
	return "| label_format " + strings.Join(texts, ", ")
}

func (s labelFormatStage) run(r *record) bool {
	for _, f := range s {
		if f.template == nil {
			if i, ok := r.byName[f.source]; ok && !r.labels[i].dropped && f.source != f.name {
				r.set(f.name, r.labels[i].value, r.labels[i].origin)
				r.drop(f.source)
			}
			continue
		}
		if text, ok := f.template.execute(r); ok {
			r.set(f.name, text, fromPipeline)
		}
	}
	return true
}

// lineFormatStage replaces the line.
type lineFormatStage struct{ template *lineTemplate }

func (s lineFormatStage) String() string { return "| line_format " + strconv.Quote(s.template.text) }

func (s lineFormatStage) run(r *record) bool {
	if text, ok := s.template.execute(r); ok {
		r.line = text
	}
	return true
}

// unwrapStage takes a number out of a label. It is the end of the pipeline of a metric query.
type unwrapStage struct {
	name     string
	function string // bytes, duration or duration_seconds; empty for a number as it is
	convert  func(string) (float64, error)
}

func (s *unwrapStage) String() string {
	if s.function != "" {
		return "| unwrap " + s.function + "(" + s.name + ")"
	}
	return "| unwrap " + s.name
}

// run leaves lines without the label out. The label is no part of the series: each number would be a series of its own.
func (s *unwrapStage) run(r *record) bool {
	text, ok := r.get(s.name)
	if !ok || text == "" {
		return false
	}
	value, err := s.convert(text)
	if err != nil {
		r.fail(errSample, err.Error())
	}
	r.value = value
	r.drop(s.name)
	return true
}

// regexpStage gives the named groups of an expression to labels.
type regexpStage struct {
	re    *regexp.Regexp
	names []string // of the groups
}

func (s *regexpStage) String() string { return "| regexp " + strconv.Quote(s.re.String()) }

func (s *regexpStage) run(r *record) bool {
	found := s.re.FindStringSubmatchIndex(r.line)
	if found == nil {
		return true
	}
	for i, name := range s.names {
		if name == "" {
			continue
		}
		value := ""
		if from := found[2*i]; from >= 0 {
			value = r.line[from:found[2*i+1]]
		}
		r.extract(name, value)
	}
	return true
}
