package logql

import (
	"os"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// The examples in the documentation are queries of this language.
func TestDocs(t *testing.T) {
	text, err := os.ReadFile("../../docs/operate/page.md")
	require.NoError(t, err)
	_, rest, _ := strings.Cut(string(text), "```logql\n")
	examples, _, ok := strings.Cut(rest, "\n```")
	require.True(t, ok, "the page has no examples")
	n := 0
	for line := range strings.Lines(examples) {
		if line = strings.TrimSpace(line); line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		n++
		_, err := Parse(line)
		require.NoError(t, err, line)
	}
	require.GreaterOrEqual(t, n, 21)
}
