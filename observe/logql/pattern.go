package logql

import (
	"errors"
	"strconv"
	"strings"
)

// pattern is a line with holes: <ip> - - <_> "<method> <uri> <_>".
type pattern struct {
	text  string
	parts []patternPart
}

// patternPart is a text, or a hole if name is not empty.
type patternPart struct{ text, name string }

// anyHole is the name of a hole whose text is ignored.
const anyHole = "_"

var (
	errAdjacentHoles = errors.New("consecutive captures need a text between them")
	errNoHoles       = errors.New("at least one named capture is required")
	errNamedHoles    = errors.New("named captures are not allowed in a line filter, use <_>")
	errDuplicateHole = errors.New("a capture's name is used twice")
)

// parsePattern reads a pattern. What looks like a hole and has no name of a label in it is text.
func parsePattern(text string) (*pattern, error) {
	p := &pattern{text: text}
	begin := 0 // of the text that is not yet a part
	for at := 0; at < len(text); {
		name, after, ok := hole(text[at:])
		if !ok {
			at++
			continue
		}
		if begin < at {
			p.parts = append(p.parts, patternPart{text: text[begin:at]})
		} else if at > 0 {
			return nil, errAdjacentHoles
		}
		p.parts = append(p.parts, patternPart{name: name})
		at = len(text) - len(after)
		begin = at
	}
	if begin < len(text) {
		p.parts = append(p.parts, patternPart{text: text[begin:]})
	}
	return p, nil
}

// hole reads <name> at the beginning of a text.
func hole(s string) (name, after string, ok bool) {
	if s[0] != '<' {
		return "", "", false
	}
	end := 1
	for end < len(s) && (isIdentStart(s[end]) && s[end] != ':' || end > 1 && isDigit(s[end])) {
		end++
	}
	if end == 1 || end == len(s) || s[end] != '>' {
		return "", "", false
	}
	return s[1:end], s[end+1:], true
}

// forParser checks a pattern that is to find labels.
func (p *pattern) forParser() error {
	names := map[string]bool{}
	for _, part := range p.parts {
		if part.name != "" && part.name != anyHole {
			if names[part.name] {
				return errDuplicateHole
			}
			names[part.name] = true
		}
	}
	if len(names) == 0 {
		return errNoHoles
	}
	return nil
}

// forFilter checks a pattern that only matches.
func (p *pattern) forFilter() error {
	for _, part := range p.parts {
		if part.name != "" && part.name != anyHole {
			return errNamedHoles
		}
	}
	return nil
}

// match says whether the whole line fits. A hole is not empty.
func (p *pattern) match(line string) bool {
	for i, part := range p.parts {
		last := i == len(p.parts)-1
		switch {
		case part.name != "" && last:
			return line != ""
		case part.name != "": // the text after it is looked for behind its first byte
		case i == 0:
			if !strings.HasPrefix(line, part.text) {
				return false
			}
			line = line[len(part.text):]
		case last: // at the end of the line, not where it stands first
			return len(line) > len(part.text) && strings.HasSuffix(line, part.text)
		default:
			if line == "" {
				return false
			}
			at := strings.Index(line[1:], part.text)
			if at < 0 {
				return false
			}
			line = line[1+at+len(part.text):]
		}
	}
	return line == ""
}

// find tells what is in the holes. It stops where the line goes another way: the last hole gets the rest then.
func (p *pattern) find(line string, found func(name, value string)) {
	for i, part := range p.parts {
		if part.name == "" {
			if i == 0 {
				if !strings.HasPrefix(line, part.text) {
					return
				}
				line = line[len(part.text):]
			}
			continue
		}
		value, rest, ok := line, "", false
		if i < len(p.parts)-1 {
			value, rest, ok = strings.Cut(line, p.parts[i+1].text)
		}
		if part.name != anyHole {
			found(part.name, value)
		}
		if !ok {
			return
		}
		line = rest
	}
}

// patternStage gives what is in the holes to labels.
type patternStage struct{ pattern *pattern }

func (s patternStage) String() string { return "| pattern " + strconv.Quote(s.pattern.text) }

func (s patternStage) run(r *record) bool {
	s.pattern.find(r.line, r.extract)
	return true
}
