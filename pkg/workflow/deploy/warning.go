package deploy

import (
	"strings"
	"sync"
)

// warnings are the API server's warnings in a deploy: a deprecated field, or a message of an admission policy.
type warnings struct {
	mu    sync.Mutex
	at    string // the place of the object that is being applied
	shown map[string]bool
}

// applying sets which object warnings are about, until the function that it returns is called.
func (w *warnings) applying(at string) func() {
	set := func(at string) {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.at = at
	}
	set(at)
	return func() { set("") }
}

// line returns the line to show for a warning, empty if it has been shown.
func (w *warnings) line(text string) string {
	w.mu.Lock()
	defer w.mu.Unlock()
	line := "warning: " + strings.Join(strings.Fields(text), " ")
	if w.at != "" {
		line = w.at + ": " + line
	}
	if w.shown[line] {
		return ""
	}
	if w.shown == nil {
		w.shown = map[string]bool{}
	}
	w.shown[line] = true
	return line
}

// warn shows a warning of the API server. Webhooks of others write these texts too: Print escapes them.
func (d *deployment) warn(text string) {
	if line := d.warnings.line(text); line != "" {
		d.Steps.Print("%s", line)
	}
}
