package logql

import (
	"encoding/json"
	"errors"
	"strconv"
	"strings"
)

// jsonReader reads a JSON text where it lies: a log line is read once and most of it is not needed, so nothing is made of it in between.
type jsonReader struct {
	text string
	at   int
}

var (
	errNotJSON  = errors.New("the line is not a JSON document")
	errDeepJSON = errors.New("the JSON document is nested too deep")
	errNoObject = errors.New("the line is not a JSON object")
)

// jsonValue is a value as it is written.
type jsonValue struct {
	raw  string
	kind byte // { [ " t f n, or 0 for a number
}

// text returns a value for a label: strings without their quotes, everything else as written.
func (v jsonValue) text() string {
	if v.kind != '"' {
		return v.raw
	}
	inner := v.raw[1 : len(v.raw)-1]
	if strings.IndexByte(inner, '\\') < 0 {
		return inner
	}
	var s string
	if json.Unmarshal([]byte(v.raw), &s) != nil { // an escape that JSON does not have
		return inner
	}
	return s
}

func (r *jsonReader) space() {
	for r.at < len(r.text) {
		switch r.text[r.at] {
		case ' ', '\t', '\n', '\r':
			r.at++
		default:
			return
		}
	}
}

// next is the next byte that is no space, or 0.
func (r *jsonReader) next() byte {
	r.space()
	if r.at < len(r.text) {
		return r.text[r.at]
	}
	return 0
}

// value reads over a value.
func (r *jsonReader) value(depth int) (jsonValue, error) {
	if depth > maxJSONDepth {
		return jsonValue{}, errDeepJSON
	}
	c := r.next()
	begin := r.at
	var err error
	switch {
	case c == '{':
		err = r.object(depth, func(string, jsonValue) error { return nil })
	case c == '[':
		err = r.array(depth, func(int, jsonValue) error { return nil })
	case c == '"':
		err = r.str()
	case c == 't':
		err = r.word("true")
	case c == 'f':
		err = r.word("false")
	case c == 'n':
		err = r.word("null")
	default:
		c = 0
		err = r.number()
	}
	return jsonValue{raw: r.text[begin:r.at], kind: c}, err
}

// object reads an object and gives each member to a function.
func (r *jsonReader) object(depth int, member func(key string, v jsonValue) error) error {
	r.at++ // the brace
	if r.next() == '}' {
		r.at++
		return nil
	}
	for {
		if r.next() != '"' {
			return errNotJSON
		}
		begin := r.at
		if err := r.str(); err != nil {
			return err
		}
		key := jsonValue{raw: r.text[begin:r.at], kind: '"'}
		if r.next() != ':' {
			return errNotJSON
		}
		r.at++
		v, err := r.value(depth + 1)
		if err != nil {
			return err
		}
		if err := member(key.text(), v); err != nil {
			return err
		}
		if done, err := r.more('}'); done || err != nil {
			return err
		}
	}
}

// array reads an array and gives each element to a function.
func (r *jsonReader) array(depth int, element func(i int, v jsonValue) error) error {
	r.at++ // the bracket
	if r.next() == ']' {
		r.at++
		return nil
	}
	for i := 0; ; i++ {
		v, err := r.value(depth + 1)
		if err != nil {
			return err
		}
		if err := element(i, v); err != nil {
			return err
		}
		if done, err := r.more(']'); done || err != nil {
			return err
		}
	}
}

// more reads a comma, or the end.
func (r *jsonReader) more(end byte) (done bool, err error) {
	switch r.next() {
	case ',':
		r.at++
		return false, nil
	case end:
		r.at++
		return true, nil
	}
	return false, errNotJSON
}

func (r *jsonReader) str() error {
	for r.at++; r.at < len(r.text); r.at++ {
		switch c := r.text[r.at]; {
		case c == '"':
			r.at++
			return nil
		case c == '\\':
			r.at++
		case c < 0x20:
			return errNotJSON
		}
	}
	r.at = len(r.text)
	return errNotJSON
}

func (r *jsonReader) word(w string) error {
	if !strings.HasPrefix(r.text[r.at:], w) {
		return errNotJSON
	}
	r.at += len(w)
	return nil
}

func (r *jsonReader) digits() bool {
	begin := r.at
	for r.at < len(r.text) && isDigit(r.text[r.at]) {
		r.at++
	}
	return r.at > begin
}

func (r *jsonReader) is(c byte) bool {
	if r.at < len(r.text) && r.text[r.at] == c {
		r.at++
		return true
	}
	return false
}

func (r *jsonReader) number() error {
	r.is('-')
	begin := r.at
	if !r.digits() || r.text[begin] == '0' && r.at > begin+1 || r.is('.') && !r.digits() {
		return errNotJSON
	}
	if r.is('e') || r.is('E') {
		if !r.is('+') {
			r.is('-')
		}
		if !r.digits() {
			return errNotJSON
		}
	}
	return nil
}

// document reads all of the text: one value.
func (r *jsonReader) document() (jsonValue, error) {
	v, err := r.value(0)
	if err != nil {
		return v, err
	}
	if r.next() != 0 || r.at < len(r.text) {
		return v, errNotJSON
	}
	return v, nil
}

// jsonStage gives the properties of a JSON line to labels: all that are no arrays, or what the expressions say.
type jsonStage struct{ wanted []extraction }

// extraction is one item of json and logfmt with expressions.
type extraction struct {
	name, expression string
	path             []jsonStep // of json
}

// jsonStep is one step into a document: a key, or an index if key is nil.
type jsonStep struct {
	key   *string
	index int
}

func joinExtractions(wanted []extraction) string {
	var b strings.Builder
	for i, x := range wanted {
		if i > 0 {
			b.WriteByte(',')
		}
		b.WriteString(" " + x.name + "=" + strconv.Quote(x.expression))
	}
	return b.String()
}

func (s *jsonStage) String() string { return "| json" + joinExtractions(s.wanted) }

func (s *jsonStage) run(r *record) bool {
	doc, err := (&jsonReader{text: r.line}).document()
	switch {
	case err != nil:
	case s.wanted == nil && doc.kind != '{':
		err = errNoObject
	case s.wanted == nil:
		flatten(r, "", doc.raw, 0)
	default:
		for _, x := range s.wanted {
			v, found := lookUp(doc, x.path)
			text := ""
			if found && v.kind != 'n' {
				text = v.text()
			}
			r.extract(x.name, text)
		}
	}
	if err != nil {
		r.fail(errJSON, err.Error())
	}
	return true
}

// flatten gives the members of an object to labels. The text has been read once, so it is JSON.
func flatten(r *record, prefix, object string, depth int) {
	_ = (&jsonReader{text: object}).object(depth, func(key string, v jsonValue) error {
		if prefix != "" {
			key = prefix + "_" + key
		}
		switch {
		case len(key) > maxLabelName, v.kind == '[', v.kind == 'n':
		case v.kind == '{':
			flatten(r, key, v.raw, depth+1)
		default:
			if name := labelName(key); name != "" {
				r.extract(name, v.text())
			}
		}
		return nil
	})
}

// errFound ends a reading before the end.
var errFound = errors.New("found")

// lookUp walks into a document.
func lookUp(v jsonValue, path []jsonStep) (jsonValue, bool) {
	for depth, step := range path {
		var inner jsonValue
		var err error
		reader := &jsonReader{text: v.raw}
		switch {
		case step.key != nil && v.kind == '{':
			err = reader.object(depth, func(key string, v jsonValue) error {
				if key != *step.key {
					return nil
				}
				inner = v
				return errFound
			})
		case step.key == nil && v.kind == '[':
			err = reader.array(depth, func(i int, v jsonValue) error {
				if i != step.index {
					return nil
				}
				inner = v
				return errFound
			})
		}
		if !errors.Is(err, errFound) {
			return jsonValue{}, false
		}
		v = inner
	}
	return v, true
}

// parsePath reads an expression of json: a.b["c"][0].
func parsePath(expression string) ([]jsonStep, bool) {
	var path []jsonStep
	for rest := expression; rest != ""; {
		switch {
		case strings.HasPrefix(rest, `["`):
			quoted, err := strconv.QuotedPrefix(rest[1:])
			if err != nil || !strings.HasPrefix(rest[1+len(quoted):], "]") {
				return nil, false
			}
			key, err := strconv.Unquote(quoted)
			if err != nil {
				return nil, false
			}
			path = append(path, jsonStep{key: &key})
			rest = rest[1+len(quoted)+1:]
		case rest[0] == '[':
			digits, after, ok := strings.Cut(rest[1:], "]")
			index, err := strconv.ParseUint(digits, 10, 31)
			if !ok || err != nil {
				return nil, false
			}
			path = append(path, jsonStep{index: int(index)})
			rest = after
		default:
			if rest[0] == '.' && len(path) > 0 {
				rest = rest[1:]
			} else if len(path) > 0 {
				return nil, false
			}
			end := strings.IndexAny(rest, `.["]`)
			if end < 0 {
				end = len(rest)
			}
			if end == 0 {
				return nil, false
			}
			key := rest[:end]
			path = append(path, jsonStep{key: &key})
			rest = rest[end:]
		}
	}
	return path, len(path) > 0 && len(path) <= maxJSONDepth
}

// unpackStage undoes the packing of labels into a line: a flat object with the line itself in _entry.
type unpackStage struct{}

func (unpackStage) String() string { return "| unpack" }

const packedLine = "_entry"

func (unpackStage) run(r *record) bool {
	doc, err := (&jsonReader{text: r.line}).document()
	if err == nil && doc.kind != '{' {
		err = errNoObject
	}
	if err != nil {
		r.fail(errJSON, err.Error())
		return true
	}
	var line string
	packed := false
	var found []label
	_ = (&jsonReader{text: doc.raw}).object(0, func(key string, v jsonValue) error {
		switch {
		case v.kind != '"' || len(key) > maxLabelName:
		case key == packedLine:
			line, packed = v.text(), true
		case len(found) < maxLabels:
			found = append(found, label{name: labelName(key), value: v.text()})
		}
		return nil
	})
	if !packed {
		return true
	}
	for _, l := range found {
		if l.name != "" {
			r.extract(l.name, l.value)
		}
	}
	r.line = line
	return true
}
