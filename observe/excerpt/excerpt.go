// Package excerpt shortens texts that somebody else has chosen, and makes them valid UTF-8.
package excerpt

import (
	"strings"
	"unicode/utf8"
)

// Of returns the beginning of a text, of at most a number of bytes.
func Of(s string, most int) string {
	s, _ = Cut(s, most)
	return s
}

// Marked is Of with "…" behind it if something was left out, for people.
func Marked(s string, most int) string {
	s, cut := Cut(s, most)
	if cut {
		s += "…"
	}
	return s
}

// Cut is Of, and reports whether something was left out.
func Cut(s string, most int) (text string, cut bool) {
	if len(s) > most {
		// A copy, because a part would keep the whole in memory.
		s, cut = strings.Clone(s[:start(s, most)]), true
	}
	if utf8.ValidString(s) {
		return s, cut
	}
	// The replacements can be longer than what they replace.
	s = strings.ToValidUTF8(s, "\uFFFD")
	if len(s) > most {
		s, cut = s[:start(s, most)], true
	}
	return s, cut
}

// start returns where the character begins that an offset is in. Bytes that are no text have no such place.
func start(s string, at int) int {
	for i := at; i > max(0, at-utf8.UTFMax); i-- {
		if utf8.RuneStart(s[i]) {
			return i
		}
	}
	return max(0, at-utf8.UTFMax)
}
