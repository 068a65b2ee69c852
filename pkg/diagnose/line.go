package diagnose

import (
	"strings"

	"polymesh.dev/polymesh/pkg/progress"
)

// maxLine limits how many bytes of a message are shown: programs that crash, registries and webhooks can write anything.
const maxLine = 1200

// Line returns a message that another program wrote as one line of a status or a report: white space is one space, control
// sequences of a terminal are escaped, and a long text is cut.
func Line(text string) string {
	cut := ""
	// White space is removed first, so that indentation does not count.
	if text = strings.Join(strings.Fields(text), " "); len(text) > maxLine {
		text, cut = strings.ToValidUTF8(text[:maxLine], ""), " …"
	}
	return progress.Line(text) + cut
}
