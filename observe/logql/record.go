package logql

import (
	"slices"
	"strings"
	"time"

	"polymesh.dev/polymesh/observe/logstore"
)

// The labels that say what went wrong with a line. A line with an error stays in the result, unless a filter says otherwise.
const (
	errorLabel   = "__error__"
	detailsLabel = "__error_details__"
)

// What errorLabel says, in Loki's words: people filter on them.
const (
	errJSON     = "JSONParserErr"
	errLogfmt   = "LogfmtParserErr"
	errTemplate = "TemplateFormatErr"
	errFilter   = "LabelFilterErr"
	errSample   = "SampleExtractionErr"
)

// origin is where a label comes from.
type origin byte

const (
	fromStream   origin = iota
	fromMetadata        // of the entry
	fromPipeline        // parsed or set by a stage
)

// label of a record.
type label struct {
	name, value string
	origin      origin
	dropped     bool
}

// record is an entry on its way through a pipeline. It is used again for the next entry.
type record struct {
	time time.Time
	line string

	labels []label
	byName map[string]int
	// base is how many of the labels came with the entry.
	base int

	err, details string
	// keepError is set when a filter on errorLabel asked for lines with errors, so a metric query counts them.
	keepError bool

	value float64 // of unwrap
}

func newRecord() *record { return &record{byName: map[string]int{}} }

// reset puts an entry in.
func (r *record) reset(e logstore.Entry) {
	r.time, r.line = e.Time, e.Line
	r.labels = r.labels[:0]
	clear(r.byName)
	r.err, r.details, r.keepError, r.value = "", "", false, 0
	for _, f := range e.Labels {
		r.add(f.Name, f.Value, fromStream)
	}
	for _, f := range e.Metadata {
		r.add(f.Name, f.Value, fromMetadata)
	}
	r.base = len(r.labels)
}

func (r *record) add(name, value string, from origin) {
	if i, ok := r.byName[name]; ok {
		r.labels[i] = label{name: name, value: value, origin: from}
		return
	}
	r.byName[name] = len(r.labels)
	r.labels = append(r.labels, label{name: name, value: value, origin: from})
}

// get returns a label, also the ones about errors.
func (r *record) get(name string) (string, bool) {
	switch name {
	case errorLabel:
		return r.err, r.err != ""
	case detailsLabel:
		return r.details, r.details != ""
	}
	i, ok := r.byName[name]
	if !ok || r.labels[i].dropped {
		return "", false
	}
	return r.labels[i].value, true
}

// set makes a label or replaces it.
func (r *record) set(name, value string, from origin) {
	if i, ok := r.byName[name]; ok {
		r.labels[i].value, r.labels[i].origin, r.labels[i].dropped = value, from, false
		return
	}
	if len(r.labels) < maxLabels {
		r.add(name, value, from)
	}
}

// extract sets what a parser found. What came with the entry stays, and the parser's goes beside it; of two with the same name the first stays.
func (r *record) extract(name, value string) {
	if i, ok := r.byName[name]; ok && i < r.base && !r.labels[i].dropped && r.labels[i].origin != fromPipeline {
		name += "_extracted"
	}
	if i, ok := r.byName[name]; ok && !r.labels[i].dropped {
		return
	}
	r.set(name, value, fromPipeline)
}

func (r *record) drop(name string) {
	switch name {
	case errorLabel:
		r.err = ""
	case detailsLabel:
		r.details = ""
	default:
		if i, ok := r.byName[name]; ok {
			r.labels[i].dropped = true
		}
	}
}

// fail notes the first error.
func (r *record) fail(what, details string) {
	if r.err == "" {
		r.err, r.details = what, details
	}
}

// current returns the labels by name, those about errors among them.
func (r *record) current() []label {
	all := make([]label, 0, len(r.labels)+2)
	for _, l := range r.labels {
		if !l.dropped {
			all = append(all, l)
		}
	}
	if r.err != "" {
		all = append(all, label{name: errorLabel, value: r.err, origin: fromPipeline})
	}
	if r.details != "" {
		all = append(all, label{name: detailsLabel, value: r.details, origin: fromPipeline})
	}
	slices.SortFunc(all, func(a, b label) int { return strings.Compare(a.name, b.name) })
	return all
}

// labelName makes a name that LogQL can use of any text: letters, digits and _.
func labelName(s string) string {
	ok := s != "" && !isDigit(s[0])
	for i := 0; ok && i < len(s); i++ {
		ok = isDigit(s[i]) || isIdentStart(s[i]) && s[i] != ':'
	}
	if ok {
		return s
	}
	if s = strings.TrimSpace(s); s == "" {
		return ""
	}
	var b strings.Builder
	if isDigit(s[0]) {
		b.WriteByte('_')
	}
	for _, c := range s {
		if c < 0x80 && c != ':' && (isDigit(byte(c)) || isIdentStart(byte(c))) {
			b.WriteRune(c)
		} else {
			b.WriteByte('_')
		}
	}
	return b.String()
}
