package diagnose

import (
	"strings"

	"polymesh.dev/polymesh/pkg/progress"
)

// maxLine is how many bytes of a message are shown: programs that crash, registries and webhooks write what they like.
const maxLine = 1200

// Line makes a message that someone else wrote one line of a status or a report: white space is one space, what a terminal
// would act on is escaped, and what is too long is cut.
func Line(text string) string {
	cut := ""
	// White space goes first, so that indentation does not count.
	if text = strings.Join(strings.Fields(text), " "); len(text) > maxLine {
		text, cut = strings.ToValidUTF8(text[:maxLine], ""), " …"
	}
	return progress.Line(text) + cut
}
