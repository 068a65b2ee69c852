package service

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"polymesh.dev/polymesh/pkg/atomicfile"
	"polymesh.dev/polymesh/pkg/layout"
	"polymesh.dev/polymesh/pkg/progress"
)

// Removal is what an uninstall removes, and what it leaves.
type Removal struct {
	Changes []Change `json:"changes"`
	record  *record
}

// PlanRemoval finds out what an install has written on this machine, and is still as it wrote it. It changes nothing.
func (m *Machine) PlanRemoval() (*Removal, error) {
	r, err := m.readRecord()
	if err != nil {
		return nil, err
	}
	p := &Removal{record: r}
	if r.owns(Unit) {
		p.Changes = append(p.Changes, Change{layout.Unit, Stop, ""})
	}
	for _, path := range slices.Concat([]string{Unit, EnvironmentFile}, links, []string{Program}) {
		have, err := fingerprintOf(m.path(path))
		if err != nil {
			return nil, err
		}
		switch {
		case have == none:
		case r.isOurs(path, have):
			p.Changes = append(p.Changes, Change{path, Delete, ""})
		case r.owns(path):
			p.Changes = append(p.Changes, Change{path, Leave, "it has been changed since it was installed"})
		case path == Program || path == Unit:
			p.Changes = append(p.Changes, Change{path, Leave, "`polymesh install` did not write it"})
		}
	}
	for _, path := range r.Partial {
		p.Changes = append(p.Changes, Change{path, Delete, "an interrupted install has left it"})
	}
	if _, err := os.Lstat(m.path(dropIns)); err == nil {
		p.Changes = append(p.Changes, Change{dropIns, Leave, "it is yours"})
	}
	return p, nil
}

// Empty reports whether there is nothing to remove.
func (p *Removal) Empty() bool {
	return len(p.record.Files) == 0 && !slices.ContainsFunc(p.Changes, func(c Change) bool { return c.Action != Leave })
}

// Stop stops the service and keeps it from starting with the machine.
func (m *Machine) Stop(ctx context.Context, p *Removal, steps *progress.Steps) error {
	if have, err := fingerprintOf(m.path(Unit)); err != nil || have == none || !p.record.owns(Unit) {
		return err
	}
	return steps.Do(layout.Unit, func(*progress.Step) (string, error) {
		args := []string{"disable", "--now", layout.Unit}
		if !m.HasSystemd() {
			args = []string{"disable", layout.Unit}
		}
		_, err := m.systemctl(ctx, args...)
		return Stop.done(), err
	})
}

// Remove removes what the plan says, if that is still what an install has written. The record of it goes last.
func (m *Machine) Remove(ctx context.Context, p *Removal, steps *progress.Steps) error {
	if p.Empty() {
		return nil
	}
	unlock, err := m.lock()
	if err != nil {
		return err
	}
	defer unlock()
	now, err := m.PlanRemoval()
	if err != nil {
		return err
	}
	if !slices.Equal(now.Changes, p.Changes) {
		return errors.New("another install has been at work meanwhile: run `polymesh uninstall` again")
	}
	for _, c := range p.Changes {
		if c.Action != Delete || slices.Contains(p.record.Partial, c.Target) {
			continue
		}
		err := steps.Do(c.Target, func(*progress.Step) (string, error) {
			if err := os.Remove(m.path(c.Target)); err != nil {
				return "", err
			}
			return c.Action.done(), atomicfile.SyncDir(filepath.Dir(m.path(c.Target)))
		})
		if err != nil {
			return err
		}
	}
	if err := m.removePartial(p.record); err != nil {
		return err
	}
	if p.record.owns(Unit) && m.HasSystemd() {
		if _, err := m.systemctl(ctx, "daemon-reload"); err != nil {
			return err
		}
		// A unit that has failed stays in systemd's list until it is reset; systemctl reports if there is nothing to reset.
		_, _ = m.systemctl(ctx, "reset-failed", layout.Unit)
	}
	return m.removeRecord()
}

// removeRecord removes the record, and its folder where nothing else lies in it.
func (m *Machine) removeRecord() error {
	entries, err := os.ReadDir(m.path(recordDir))
	if err != nil {
		return err
	}
	for _, e := range entries {
		name := filepath.Join(recordDir, e.Name())
		if name == recordFile || name == makeUpList || strings.HasPrefix(e.Name(), atomicfile.Prefix) {
			if err := os.Remove(m.path(name)); err != nil {
				return fmt.Errorf("remove the record of the install: %w", err)
			}
		}
	}
	if err := os.Remove(m.path(recordDir)); err != nil && !errors.Is(err, unix.ENOTEMPTY) {
		return err
	}
	return nil
}
