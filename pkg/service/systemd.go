package service

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"polymesh.dev/polymesh/pkg/layout"
	"polymesh.dev/polymesh/pkg/payload"
	"polymesh.dev/polymesh/pkg/progress"
)

// poll is how often systemd is queried for the progress of a start.
const poll = 300 * time.Millisecond

// systemctl runs systemctl and returns what it prints.
func (m *Machine) systemctl(ctx context.Context, args ...string) (string, error) {
	argv := m.Systemctl
	if len(argv) == 0 {
		argv = []string{"systemctl"}
	}
	argv = append(slices.Clone(argv), args...)
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	var out, failure strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &failure
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("systemctl %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(failure.String()))
	}
	return out.String(), nil
}

// state is what systemd reports about the unit: systemctl(1), "show".
type state struct {
	active, sub string
	// invocation names this start of the service (systemd.exec(5), $INVOCATION_ID); empty before the first.
	invocation string
	// payload is the id of the payload of which the server runs; empty where none runs.
	payload string
}

// serverProgram is a server's program as /proc has it.
var serverProgram = regexp.MustCompile(`/data/([0-9a-f]{16})/` + payload.Program + `( \(deleted\))?$`)

func (m *Machine) state(ctx context.Context) (state, error) {
	out, err := m.systemctl(ctx, "show", "--property=ActiveState,SubState,InvocationID,MainPID", layout.Unit)
	if err != nil {
		return state{}, err
	}
	var s state
	for line := range strings.Lines(out) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		switch key {
		case "ActiveState":
			s.active = value
		case "SubState":
			s.sub = value
		case "InvocationID":
			s.invocation = value
		case "MainPID":
			exe, _ := os.Readlink(filepath.Join("/proc", value, "exe"))
			if match := serverProgram.FindStringSubmatch(exe); match != nil {
				s.payload = match[1]
			}
		}
	}
	if s.active == "" {
		return state{}, fmt.Errorf("systemctl show %s says nothing of its state: %q", layout.Unit, out)
	}
	return s, nil
}

// runs reports whether a server runs, or is starting.
func (s state) runs() bool {
	return slices.Contains([]string{"active", "activating", "reloading", "refreshing"}, s.active) && s.sub != "auto-restart"
}

// failed reports whether a start has ended without success. The unit has Restart=always: systemd tries again.
func (s state) failed() bool {
	return s.active == "failed" || s.sub == "auto-restart" || strings.HasPrefix(s.sub, "auto-restart-")
}

// isEnabled reports whether the service starts with the machine.
func (m *Machine) isEnabled(ctx context.Context) bool {
	out, _ := m.systemctl(ctx, "is-enabled", layout.Unit) // the exit code is not 0 for every other answer
	return strings.TrimSpace(out) == "enabled"
}

// start starts or restarts the service, and waits until the server has notified systemd that it is up. One that is starting
// already is waited for. waitsFor asks the server what is missing.
func (m *Machine) start(ctx context.Context, step *progress.Step, action Action, before state, waitsFor func(context.Context) string) error {
	if action == Start && before.runs() {
		before.invocation = ""
	} else if _, err := m.systemctl(ctx, "restart", "--no-block", layout.Unit); err != nil {
		return err
	}
	tick := time.NewTicker(poll)
	defer tick.Stop()
	missing := "it has not begun to start"
	for {
		now, err := m.state(ctx)
		switch {
		case ctx.Err() != nil:
		case err != nil:
			return err
		case now.invocation == before.invocation:
			// The old one is still being stopped.
		case now.active == "active":
			return nil
		case now.failed():
			return fmt.Errorf("the service does not start%s. systemd continues to try: see journalctl -u polymesh", m.lastWords(ctx))
		default:
			if missing = waitsFor(ctx); missing != "" {
				step.Note("%s", missing)
			}
		}
		select {
		case <-ctx.Done():
			if errors.Is(ctx.Err(), context.DeadlineExceeded) {
				return fmt.Errorf("the service is not up yet (%s). It continues to start: see `polymesh status` and journalctl -u polymesh, or give it more time with --timeout", missing)
			}
			return errors.New("interrupted. The service continues to start: see `polymesh status`")
		case <-tick.C:
		}
	}
}

// lastWords is the last line of the service's log, as part of a sentence; empty where it cannot be read.
func (m *Machine) lastWords(ctx context.Context) string {
	out, err := exec.CommandContext(ctx, "journalctl", "--unit="+layout.Unit, "--lines=20", "--output=cat", "--no-pager").Output()
	if err != nil {
		return ""
	}
	for _, line := range slices.Backward(strings.Split(strings.TrimSpace(string(out)), "\n")) {
		if line = strings.TrimSpace(line); strings.HasPrefix(line, "polymesh: ") {
			return ": " + strings.TrimPrefix(line, "polymesh: ")
		}
	}
	return ""
}
