package logql

import (
	"fmt"
	"strconv"
	"strings"
	"unicode/utf8"

	"polymesh.dev/polymesh/observe/excerpt"
)

// kind is the kind of a token. Operators and punctuation are their own text.
type kind string

const (
	kindEnd      kind = "end of the query"
	kindIdent    kind = "identifier"
	kindString   kind = "string"
	kindNumber   kind = "number"
	kindDuration kind = "duration"
	kindBytes    kind = "bytes"
	kindFlag     kind = "flag"
)

// token is one piece of a query.
type token struct {
	kind   kind
	text   string  // as written; of a string, what it stands for
	number float64 // of a number, nanoseconds of a duration, count of bytes
	at     int     // where it begins
}

// operators are tried in this order: longer ones come before their beginnings.
var operators = [...]kind{
	"|=", "|~", "|>", "!=", "!~", "!>", "=~", "==", ">=", "<=",
	"|", "=", ">", "<", "{", "}", "(", ")", "[", "]", ",", "+", "-", "*", "/", "%", "^",
}

// ParseError says where a query cannot be understood. Its text has the form that Loki's clients show.
type ParseError struct {
	Line, Column int // from 1; 0 if the error is not in one place
	Message      string
}

func (e *ParseError) Error() string {
	if e.Line == 0 {
		return "parse error : " + e.Message
	}
	return fmt.Sprintf("parse error at line %d, col %d: %s", e.Line, e.Column, e.Message)
}

// errorAt makes the error for a byte of the query.
func errorAt(query string, at int, format string, args ...any) *ParseError {
	before := query[:at]
	line := strings.Count(before, "\n") + 1
	column := utf8.RuneCountInString(before[strings.LastIndexByte(before, '\n')+1:]) + 1
	return &ParseError{Line: line, Column: column, Message: fmt.Sprintf(format, args...)}
}

// lex cuts a query into tokens; the last one is its end.
func lex(query string) ([]token, error) {
	var tokens []token
	for at := 0; ; {
		at = skipSpace(query, at)
		if at >= len(query) {
			return append(tokens, token{kind: kindEnd, text: string(kindEnd), at: len(query)}), nil
		}
		if len(tokens) == maxTokens {
			return nil, errorAt(query, at, "the query has more than %d words", maxTokens)
		}
		t, err := lexOne(query, at)
		if err != nil {
			return nil, err
		}
		tokens = append(tokens, t.token)
		at = t.end
	}
}

// skipSpace returns where the next token begins: after white space and comments.
func skipSpace(query string, at int) int {
	for at < len(query) {
		switch query[at] {
		case ' ', '\t', '\n', '\r':
			at++
		case '#':
			end := strings.IndexByte(query[at:], '\n')
			if end < 0 {
				return len(query)
			}
			at += end
		default:
			return at
		}
	}
	return at
}

type lexed struct {
	token
	end int
}

func lexOne(query string, at int) (lexed, error) {
	rest := query[at:]
	switch c := rest[0]; {
	case c == '"' || c == '`':
		return lexString(query, at)
	case isDigit(c) || c == '.' && len(rest) > 1 && isDigit(rest[1]):
		return lexNumber(query, at)
	case isIdentStart(c):
		end := 1
		for end < len(rest) && (isIdentStart(rest[end]) || isDigit(rest[end])) {
			end++
		}
		return lexed{token{kind: kindIdent, text: rest[:end], at: at}, at + end}, nil
	case strings.HasPrefix(rest, "--"):
		end := 2
		for end < len(rest) && (isIdentStart(rest[end]) || rest[end] == '-') {
			end++
		}
		if end > 2 {
			return lexed{token{kind: kindFlag, text: rest[:end], at: at}, at + end}, nil
		}
	}
	for _, op := range operators {
		if strings.HasPrefix(rest, string(op)) {
			return lexed{token{kind: op, text: string(op), at: at}, at + len(op)}, nil
		}
	}
	r, _ := utf8.DecodeRuneInString(rest)
	return lexed{}, errorAt(query, at, "syntax error: unexpected %q", r)
}

func lexString(query string, at int) (lexed, error) {
	rest := query[at:]
	end := 1
	for ; ; end++ {
		if end >= len(rest) || rest[0] == '"' && rest[end] == '\n' {
			return lexed{}, errorAt(query, at, "syntax error: literal not terminated")
		}
		if rest[end] == rest[0] {
			break
		}
		if rest[0] == '"' && rest[end] == '\\' {
			end++
		}
	}
	text := rest[1:end]
	if rest[0] == '"' {
		unquoted, err := strconv.Unquote(rest[:end+1])
		if err != nil {
			return lexed{}, errorAt(query, at, "syntax error: invalid string literal")
		}
		text = unquoted
	}
	return lexed{token{kind: kindString, text: text, at: at}, at + end + 1}, nil
}

// lexNumber reads a number, a duration or a count of bytes: the longest run of what they are made of must be one of them.
func lexNumber(query string, at int) (lexed, error) {
	rest := query[at:]
	end := 0
	for end < len(rest) {
		c := rest[end]
		switch {
		case isDigit(c), c == '.', 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z':
			end++
		case strings.HasPrefix(rest[end:], "µ"), strings.HasPrefix(rest[end:], "μ"):
			end += len("µ")
		case (c == '+' || c == '-') && end > 0 && (rest[end-1] == 'e' || rest[end-1] == 'E') && !strings.HasPrefix(rest, "0x") &&
			end+1 < len(rest) && isDigit(rest[end+1]):
			end++
		default:
			goto scanned
		}
	}
scanned:
	t := token{text: rest[:end], at: at}
	if n, ok := parseNumber(t.text); ok {
		t.kind, t.number = kindNumber, n
	} else if d, ok := parseQueryDuration(t.text); ok {
		t.kind, t.number = kindDuration, float64(d)
	} else if b, ok := parseQueryBytes(t.text); ok {
		t.kind, t.number = kindBytes, b
	} else {
		return lexed{}, errorAt(query, at, "syntax error: %q is not a number, duration or count of bytes", clip(t.text))
	}
	return lexed{t, at + end}, nil
}

func isDigit(c byte) bool { return '0' <= c && c <= '9' }

func isIdentStart(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || c == '_' || c == ':'
}

// clip bounds a text that is quoted in an error.
func clip(s string) string { return excerpt.Marked(s, 64) }
