package progress

import (
	"fmt"
	"io"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Line makes external text (names, labels, messages, output of a registry or a cluster) safe to print as
// part of a line: characters that a terminal would interpret, or display in another order, are printed as
// in Go's strings ("\x1b", "\u202e").
func Line(text string) string { return escape(text, false) }

// Text is Line for multi-line text; line breaks stay.
func Text(text string) string { return escape(text, true) }

func escape(text string, lines bool) string {
	var b strings.Builder
	for i := 0; i < len(text); {
		r, size := utf8.DecodeRuneInString(text[i:])
		switch {
		case r == utf8.RuneError && size == 1:
			fmt.Fprintf(&b, `\x%02x`, text[i])
		case lines && (r == '\n' || r == '\t'), !isUnsafe(r):
			b.WriteString(text[i : i+size])
		case r == '\n':
			b.WriteString(`\n`)
		case r == '\t':
			b.WriteString(`\t`)
		case r < 0x80:
			fmt.Fprintf(&b, `\x%02x`, r)
		case r <= 0xffff:
			fmt.Fprintf(&b, `\u%04x`, r)
		default:
			fmt.Fprintf(&b, `\U%08x`, r)
		}
		i += size
	}
	return b.String()
}

// isUnsafe reports whether a terminal does anything other than display the character: controls (C0, DEL and C1, the eight-bit
// form of escape sequences), format characters (which change the direction of text, or are invisible), and line
// and paragraph separators. One format character, which joins emoji, is allowed.
func isUnsafe(r rune) bool {
	const zeroWidthJoiner = '\u200d'
	return r != zeroWidthJoiner && unicode.In(r, unicode.Cc, unicode.Cf, unicode.Zl, unicode.Zp)
}

// Escaping returns a writer to a terminal or text file that passes each write through Text.
func Escaping(w io.Writer) io.Writer { return escaping{w} }

type escaping struct{ w io.Writer }

// Write implements io.Writer. A character that is split between two writes is escaped, so write complete lines.
func (e escaping) Write(p []byte) (int, error) {
	if _, err := io.WriteString(e.w, Text(string(p))); err != nil {
		return 0, err
	}
	return len(p), nil
}
