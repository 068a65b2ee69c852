package excerpt

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestExcerpt(t *testing.T) {
	for _, tc := range []struct {
		text string
		most int
		want string
		cut  bool
	}{
		{"", 0, "", false},
		{"", 5, "", false},
		{"exact", 5, "exact", false},
		{"longer", 5, "longe", true},
		{"a", 0, "", true},
		{"日本", 6, "日本", false},
		{"日本", 5, "日", true},
		{"日本", 2, "", true},
		{"😀😀", 7, "😀", true},
		{"a\xffb", 5, "a\uFFFDb", false},
		{"a\xffb", 4, "a\uFFFD", true},
		{"a\xffb", 3, "a", true},
		{"ab\xff", 2, "ab", true},
		{"\x80\x80\x80\x80\x80\x80", 5, "\uFFFD", true},
		{"\xff" + strings.Repeat("a", 100), 10, "\uFFFDaaaaaaa", true},
	} {
		text, cut := Cut(tc.text, tc.most)
		require.Equal(t, tc.want, text, "%q", tc.text)
		require.Equal(t, tc.cut, cut, "%q", tc.text)
		require.Equal(t, tc.want, Of(tc.text, tc.most))
		if tc.cut {
			tc.want += "…"
		}
		require.Equal(t, tc.want, Marked(tc.text, tc.most))
	}
}
