package progress

import (
	"bytes"
	"fmt"
	"strings"
	"testing"
	"unicode/utf8"
)

func TestEscape(t *testing.T) {
	for text, want := range map[string]string{
		"registry.example.com/shop/api:1.0": "registry.example.com/shop/api:1.0",
		"größe 日本 👩‍💻":                      "größe 日本 👩‍💻",
		"\x1b[2J\x1b]0;title\a":             `\x1b[2J\x1b]0;title\x07`,
		"\u009b31m":                         `\u009b31m`,
		"a\u202eb\u2028c\U000e0041":         `a\u202eb\u2028c\U000e0041`,
		"over\rwrite\b\x7f":                 `over\x0dwrite\x08\x7f`,
		"bad \xff\xfe":                      `bad \xff\xfe`,
		"two\n✓ lines\t":                    `two\n✓ lines\t`,
	} {
		if got := Line(text); got != want {
			t.Errorf("%q became %q, want %q", text, got, want)
		}
	}
	if got := Text("one\n\ttwo\r\n\x1b"); got != "one\n\ttwo\\x0d\n\\x1b" {
		t.Errorf("got %q", got)
	}
	var out bytes.Buffer
	if n, err := fmt.Fprintf(Escaping(&out), "%s\n", "\x1b[1m"); n != 5 || err != nil || out.String() != "\\x1b[1m\n" {
		t.Errorf("%d bytes, %v: %q", n, err, out.String())
	}
}

// Titles and notes of steps come from clusters and registries.
func TestStepsEscape(t *testing.T) {
	var out bytes.Buffer
	s := New(&out)
	step := s.Start("title %s", "\x1b[1A")
	step.Note("note %s", "\x1b[2K\n✓ all is well")
	step.Done("%s", "\a")
	s.Print("printed\n%s", "\x1b[m")
	if got := out.String(); strings.ContainsAny(got, "\x1b\a") || strings.Contains(got, "\n✓ all is well") || !strings.Contains(got, "printed\n\\x1b[m\n") {
		t.Errorf("%q", got)
	}
}

func FuzzLine(f *testing.F) {
	for _, seed := range []string{"", "a\x1b[m", "\xc2\x9b", "\u202e"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		got := Line(text)
		if !utf8.ValidString(got) {
			t.Errorf("%q became %q, which is not UTF-8", text, got)
		}
		for _, r := range got {
			if isUnsafe(r) {
				t.Errorf("%q became %q, which has %q", text, got, r)
			}
		}
	})
}
