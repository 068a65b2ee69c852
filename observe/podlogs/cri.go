package podlogs

import (
	"bytes"
	"time"
)

// The streams of a container: values of the label stream.
const (
	stdout = iota
	stderr
	unknown // lines that are not in containerd's format
	streamCount
)

var streamNames = [streamCount]string{"stdout", "stderr", "unknown"}

// criLine is one line as containerd writes it: TIME STREAM TAGS TEXT. The first tag says whether the text is a whole line's end (F) or a part (P).
type criLine struct {
	at      time.Time
	stream  int
	partial bool
	text    []byte
}

// parseCRI parses a line without its line feed.
func parseCRI(line []byte) (criLine, bool) {
	when, rest, ok := bytes.Cut(line, []byte{' '})
	if !ok || len(when) > 40 {
		return criLine{}, false
	}
	stream, rest, ok := bytes.Cut(rest, []byte{' '})
	if !ok {
		return criLine{}, false
	}
	// An empty line has no text, and some writers leave out the space before it.
	tags, text, _ := bytes.Cut(rest, []byte{' '})
	out := criLine{text: text}
	switch string(stream) {
	case "stdout":
		out.stream = stdout
	case "stderr":
		out.stream = stderr
	default:
		return criLine{}, false
	}
	tag, _, _ := bytes.Cut(tags, []byte{':'})
	switch string(tag) {
	case "P":
		out.partial = true
	case "F":
	default:
		return criLine{}, false
	}
	at, err := time.Parse(time.RFC3339Nano, string(when))
	if err != nil {
		return criLine{}, false
	}
	out.at = at
	return out, true
}
