package logql

import (
	"errors"
	"strconv"
	"strings"
)

// logfmtStage gives the pairs of a line in logfmt to labels: all of them, or what the expressions say.
type logfmtStage struct {
	strict    bool // a bad pair is an error
	keepEmpty bool // keys without a value are labels too
	wanted    []extraction
}

func (s *logfmtStage) String() string {
	text := "| logfmt"
	if s.strict {
		text += " --strict"
	}
	if s.keepEmpty {
		text += " --keep-empty"
	}
	return text + joinExtractions(s.wanted)
}

var errBadPair = errors.New("the line is not logfmt")

func (s *logfmtStage) run(r *record) bool {
	seen := make([]bool, len(s.wanted))
	for rest := r.line; ; {
		rest = strings.TrimLeftFunc(rest, func(c rune) bool { return c <= ' ' })
		if rest == "" {
			break
		}
		key, value, after, ok := logfmtPair(rest)
		rest = after
		if !ok {
			if s.strict {
				r.fail(errLogfmt, errBadPair.Error())
				return true
			}
			continue
		}
		if s.wanted == nil {
			if (value != "" || s.keepEmpty) && len(key) <= maxLabelName {
				if name := labelName(key); name != "" {
					r.extract(name, value)
				}
			}
			continue
		}
		for i, x := range s.wanted {
			if x.expression == key && !seen[i] {
				seen[i] = true
				r.extract(x.name, value)
			}
		}
	}
	for i, x := range s.wanted {
		if !seen[i] {
			r.extract(x.name, "")
		}
	}
	return true
}

// logfmtPair reads key, key=value or key="value" at the beginning of a text. A bad pair ends at the next space.
func logfmtPair(s string) (key, value, rest string, ok bool) {
	word := func(from int) int {
		end := from
		for end < len(s) && s[end] > ' ' {
			end++
		}
		return end
	}
	end := 0
	for end < len(s) && s[end] > ' ' && s[end] != '=' && s[end] != '"' {
		end++
	}
	key = s[:end]
	switch {
	case end == len(s) || s[end] <= ' ':
		return key, "", s[end:], true
	case key == "" || s[end] == '"':
		return "", "", s[word(end):], false
	}
	begin := end + 1
	if begin < len(s) && s[begin] == '"' {
		for end = begin + 1; end < len(s) && s[end] != '"'; end++ {
			if s[end] == '\\' {
				end++
			}
		}
		if end >= len(s) { // no end of the quotes: there is nothing to continue with
			return "", "", "", false
		}
		end++
		if end < len(s) && s[end] > ' ' {
			return "", "", s[word(end):], false
		}
		value, ok = unquoteLogfmt(s[begin:end])
		return key, value, s[end:], ok
	}
	end = word(begin)
	value = s[begin:end]
	return key, value, s[end:], !strings.ContainsAny(value, `="`)
}

func unquoteLogfmt(quoted string) (string, bool) {
	inner := quoted[1 : len(quoted)-1]
	if strings.IndexByte(inner, '\\') < 0 {
		return inner, true
	}
	if s, err := strconv.Unquote(quoted); err == nil {
		return s, true
	}
	v := jsonValue{raw: quoted, kind: '"'} // JSON has escapes that Go does not have, as \/
	s := v.text()
	return s, s != inner
}
