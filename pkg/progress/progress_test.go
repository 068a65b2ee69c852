package progress

import (
	"regexp"
	"strings"
	"testing"
)

// times are not the same twice.
var times = regexp.MustCompile(`\d+\.\d+s`)

func TestWithoutATerminal(t *testing.T) {
	var out strings.Builder
	s := New(&out)
	build := s.Start("image %s", "shop/api:1")
	wait := s.Start("deployment.apps/api")
	build.Note("building with %s", "buildah")
	build.Note("building with %s", "buildah") // unchanged
	wait.Note("0 of 1 updated replicas are available")
	build.Done("built, loaded")
	build.Done("twice") // a step ends once
	s.Print("a line between")
	wait.Fail()
	s.Start("prune").Done("")
	const want = `  image shop/api:1 ...
  deployment.apps/api ...
    image shop/api:1: building with buildah
    deployment.apps/api: 0 of 1 updated replicas are available
✓ image shop/api:1  built, loaded  0.0s
a line between
✗ deployment.apps/api  0.0s
  prune ...
✓ prune  0.0s
`
	if got := times.ReplaceAllString(out.String(), "0.0s"); got != want {
		t.Errorf("got:\n%s\nwant:\n%s", got, want)
	}
}

func TestTerminal(t *testing.T) {
	var out strings.Builder
	s := &Steps{out: &out, width: func() int { return 20 }}
	step := s.Start("deployment")
	s.mu.Lock()
	step.note = "a note that is much too long"
	out.Reset()
	s.draw("a finished line\n")
	s.mu.Unlock()
	_, drawn, _ := strings.Cut(out.String(), "a finished line\n")
	if line := strings.TrimSuffix(drawn, "\n"); len([]rune(line)) >= 20 || !strings.HasSuffix(line, "…") {
		t.Errorf("the running step is %q: it has to fit on a line of 20", line)
	}
	if !strings.HasPrefix(out.String(), "\x1b[1A\r\x1b[J") {
		t.Errorf("the old line is still there: %q", out.String())
	}
	step.Done("")
	if s.stop != nil || s.drawn != 0 {
		t.Error("the spinner is active without a running step")
	}
}

func TestNothing(t *testing.T) {
	s := &Steps{}
	step := s.Start("quiet")
	step.Note("note")
	s.Print("line")
	step.Done("")
	s.Start("other").Fail()
}
