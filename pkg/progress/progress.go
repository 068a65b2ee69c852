// Package progress shows the steps of a command like kind: one line each, which is checked off when it is done. On a
// terminal, running steps have spinners below the finished ones; elsewhere the start and the end of a step are printed. Names and
// messages come from manifests and clusters, so they are escaped.
//
// Commands that take a while (deploy, dev, …) create Steps and pass them to the package that does the work. External
// text is escaped where it is printed: by Steps, and by Line, Text and Escaping for the commands' own output.
package progress

import (
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/term"
)

// Steps are the steps of one command. The zero value shows nothing.
type Steps struct {
	out   io.Writer
	width func() int // of the terminal; nil without one

	mu      sync.Mutex
	running []*Step
	drawn   int // lines of running steps on the terminal
	turn    int
	stop    chan struct{}
}

// New shows steps on out.
func New(out io.Writer) *Steps {
	s := &Steps{out: out}
	if f, ok := out.(*os.File); ok && term.IsTerminal(int(f.Fd())) && os.Getenv("TERM") != "dumb" {
		s.width = func() int {
			if w, _, err := term.GetSize(int(f.Fd())); err == nil && w > 0 {
				return w
			}
			return 80
		}
	}
	return s
}

// Step is a running step.
type Step struct {
	steps *Steps
	title string
	since time.Time
	note  string
}

// Start starts a step. Several may run at once.
func (s *Steps) Start(format string, args ...any) *Step {
	step := &Step{steps: s, title: Line(fmt.Sprintf(format, args...)), since: time.Now()}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.running = append(s.running, step)
	switch {
	case s.out == nil:
	case s.width == nil:
		fmt.Fprintf(s.out, "  %s ...\n", step.title)
	default:
		s.draw("")
		if s.stop == nil {
			s.stop = make(chan struct{})
			go s.spin(s.stop)
		}
	}
	return step
}

// Do runs work as one step, which ends with it: checked off with the returned note, or failed with its error.
func (s *Steps) Do(title string, work func(*Step) (note string, err error)) error {
	step := s.Start("%s", title)
	note, err := work(step)
	if err != nil {
		step.Fail()
		return err
	}
	step.Done("%s", note)
	return nil
}

// Note shows what a running step is doing. Without a terminal it is printed when it changes.
func (st *Step) Note(format string, args ...any) {
	note := Line(fmt.Sprintf(format, args...))
	s := st.steps
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.out == nil || note == st.note {
		return
	}
	st.note = note
	if s.width == nil && note != "" {
		fmt.Fprintf(s.out, "    %s: %s\n", st.title, note)
	}
}

// Done ends a successful step. The note is its result, and may be empty.
func (st *Step) Done(format string, args ...any) { st.end("✓", Line(fmt.Sprintf(format, args...))) }

// Fail ends a failed step. The caller prints the error.
func (st *Step) Fail() { st.end("✗", "") }

func (st *Step) end(mark, note string) {
	s := st.steps
	s.mu.Lock()
	defer s.mu.Unlock()
	i := slices.Index(s.running, st)
	if i < 0 {
		return
	}
	s.running = slices.Delete(s.running, i, i+1)
	if s.out == nil {
		return
	}
	if note != "" {
		note = "  " + note
	}
	line := fmt.Sprintf("%s %s%s  %s\n", mark, st.title, note, took(time.Since(st.since)))
	if s.width == nil {
		io.WriteString(s.out, line)
		return
	}
	s.draw(line)
	if len(s.running) == 0 && s.stop != nil {
		close(s.stop)
		s.stop = nil
	}
}

// Print prints a permanent line, above the running steps.
func (s *Steps) Print(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	line := Text(fmt.Sprintf(format, args...)) + "\n"
	switch {
	case s.out == nil:
	case s.width == nil:
		io.WriteString(s.out, line)
	default:
		s.draw(line)
	}
}

func took(d time.Duration) string {
	if d < time.Minute {
		return fmt.Sprintf("%.1fs", d.Seconds())
	}
	return fmt.Sprintf("%dm%02ds", int(d.Minutes()), int(d.Seconds())%60)
}

func (s *Steps) spin(stop chan struct{}) {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-stop:
			return
		case <-tick.C:
			s.mu.Lock()
			s.turn++
			if len(s.running) > 0 {
				s.draw("")
			}
			s.mu.Unlock()
		}
	}
}

// draw writes lines that stay, and redraws the running steps below them.
func (s *Steps) draw(lines string) {
	var b strings.Builder
	if s.drawn > 0 {
		fmt.Fprintf(&b, "\x1b[%dA\r\x1b[J", s.drawn)
	}
	b.WriteString(lines)
	frames := []rune("⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏")
	for _, step := range s.running {
		line := fmt.Sprintf("%c %s", frames[s.turn%len(frames)], step.title)
		if step.note != "" {
			line += "  " + step.note
		}
		// A line that wraps would take two, and the next drawing would leave one behind.
		if runes, width := []rune(line), s.width(); len(runes) >= width {
			line = string(runes[:max(0, width-2)]) + "…"
		}
		b.WriteString(line + "\n")
	}
	s.drawn = len(s.running)
	io.WriteString(s.out, b.String())
}
