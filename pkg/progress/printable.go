package progress

import (
	"fmt"
	"regexp"
	"strings"
	"unicode"
)

// colour is a sequence that sets colours and weights (ECMA-48, SGR), as compilers print them. It does no harm, and says nothing.
var colour = regexp.MustCompile("\x1b\\[[0-9;:]*m")

// Printable is a text that others chose, such as an object's name or the last lines of a program, in a form that a terminal
// takes for nothing but text: what would move the cursor, change the title or turn the direction of writing is written as
// its code. Line ends and tabs stay.
func Printable(text string) string {
	text = colour.ReplaceAllString(strings.ReplaceAll(text, "\r\n", "\n"), "")
	if !strings.ContainsFunc(text, unprintable) {
		return strings.ToValidUTF8(text, "\uFFFD")
	}
	var out strings.Builder
	for _, r := range text {
		switch {
		case !unprintable(r):
			out.WriteRune(r)
		case r < 0x100:
			fmt.Fprintf(&out, `\x%02x`, r)
		default:
			fmt.Fprintf(&out, `\u%04x`, r)
		}
	}
	return out.String()
}

func unprintable(r rune) bool {
	return r != '\n' && r != '\t' && (unicode.IsControl(r) || unicode.In(r, unicode.Cf, unicode.Zl, unicode.Zp))
}
