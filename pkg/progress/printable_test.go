package progress

import (
	"strings"
	"testing"
)

func TestPrintable(t *testing.T) {
	for text, want := range map[string]string{
		"plain é 世界\n\ttext":                   "plain é 世界\n\ttext",
		"\x1b[31mred\x1b[0m":                   "red",
		"\x1b[2Jgone":                          `\x1b[2Jgone`,
		"\x1b]0;title\a":                       `\x1b]0;title\x07`,
		"a\r\nb\rc\x00":                        "a\nb\\rc\\x00",
		"\u009b2J":                             `\x9b2J`,
		"user\u202etxt.exe":                    `user\u202etxt.exe`,
		"\xff":                                 "\uFFFD",
		"✓ deployment.apps/api -n shop  ready": "✓ deployment.apps/api -n shop  ready",
	} {
		want = strings.ReplaceAll(want, `\r`, `\x0d`)
		if got := Printable(text); got != want {
			t.Errorf("%q became %q, want %q", text, got, want)
		}
	}
}

func TestStepsArePrintable(t *testing.T) {
	var out strings.Builder
	s := New(&out)
	if err := s.Do("image \x1b[2J", func(step *Step) (string, error) {
		step.Note("%s", "note\x1b[2J")
		s.Print("%s", "line\x1b[2J")
		return "done\x1b[2J", nil
	}); err != nil {
		t.Fatal(err)
	}
	if strings.Contains(out.String(), "\x1b") || strings.Count(out.String(), `\x1b[2J`) < 4 {
		t.Errorf("printed: %q", out.String())
	}
}
