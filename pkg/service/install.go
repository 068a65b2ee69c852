package service

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"polymesh.dev/polymesh/pkg/atomicfile"
	"polymesh.dev/polymesh/pkg/component"
	"polymesh.dev/polymesh/pkg/layout"
	"polymesh.dev/polymesh/pkg/payload"
	"polymesh.dev/polymesh/pkg/progress"
	"polymesh.dev/polymesh/pkg/status"
)

// Options define what to install.
type Options struct {
	// File is the shipped file.
	File string
	// Settings are what the service runs with; nil for those of the last install.
	Settings *Settings
	// FileOnly installs the file and its links, and no service.
	FileOnly bool
	// Now starts the service, or restarts it where it runs what was installed before, and waits until it is up.
	Now bool
}

// Plan is what an install does.
type Plan struct {
	Changes []Change `json:"changes"`

	record *record
	files  []*file
	node   *Node // nil without a service
	role   Role
	args   []string
	before state
	id     string // of the shipped file's payload
	// adopts is set where the file in /usr/local/bin has been replaced by hand, and is installed from there.
	adopts bool
}

// file is one path that an install writes.
type file struct {
	path         string
	have, want   fingerprint
	action       Action
	mode         os.FileMode
	content      []byte // of a file
	source, link string // or what is copied, or where the link leads
}

// Changed reports whether the plan changes anything.
func (p *Plan) Changed() bool {
	return slices.ContainsFunc(p.Changes, func(c Change) bool { return c.Action != Unchanged && c.Action != Leave })
}

// Plan finds out what an install would do. It changes nothing. What `polymesh server` would refuse is refused here.
func (m *Machine) Plan(ctx context.Context, o Options) (*Plan, error) {
	r, err := m.readRecord()
	if err != nil {
		return nil, err
	}
	shipped, err := payload.Open(o.File)
	if err != nil {
		return nil, err
	}
	defer shipped.Close()
	p := &Plan{record: r, id: shipped.ID}
	settings := o.Settings
	if !o.FileOnly {
		if !m.HasSystemd() {
			return nil, ErrNoSystemd
		}
		if settings == nil {
			if settings, err = m.settings(r); err != nil {
				return nil, err
			}
		}
		if p.node, err = settings.check(); err != nil {
			return nil, err
		}
		p.role, p.args = settings.Role, settings.Args
	}
	if err := m.planProgram(p, o.File); err != nil {
		return nil, err
	}
	for _, path := range links {
		if err := m.planLink(p, path); err != nil {
			return nil, err
		}
	}
	if o.FileOnly {
		return p, nil
	}
	if err := m.planUnit(p, settings, o.Settings == nil); err != nil {
		return nil, err
	}
	return p, m.planService(ctx, p, o.Now)
}

func (p *Plan) add(f *file, reason string) {
	p.Changes = append(p.Changes, Change{f.path, f.action, reason})
	p.files = append(p.files, f)
}

// decide sets what happens to a path, and refuses to touch what an install has not written.
func (r *record) decide(f *file) error {
	switch {
	case f.have == f.want:
		f.action = Unchanged
	case f.have == none:
		f.action = Create
	case f.want == none && r.isOurs(f.path, f.have):
		f.action = Delete
	case r.isOurs(f.path, f.have):
		f.action = Replace
	case r.owns(f.path):
		return fmt.Errorf("%s has been changed since it was installed: move it away and run this again. Nothing was changed", f.path)
	default:
		return fmt.Errorf("%s is there, and `polymesh install` did not write it: move it away and run this again. Nothing was changed", f.path)
	}
	return nil
}

func (m *Machine) planProgram(p *Plan, source string) error {
	f := &file{path: Program, source: source, mode: 0o755}
	var err error
	if f.have, err = fingerprintOf(m.path(Program)); err != nil {
		return err
	}
	this, err := os.Stat(source)
	if err != nil {
		return fmt.Errorf("look at the file to install: %w", err)
	}
	installed, err := os.Stat(m.path(Program))
	same := err == nil && os.SameFile(this, installed)
	if !same {
		if f.want, err = fingerprintOf(source); err != nil {
			return err
		}
	}
	safe := installed != nil && rootOnly(installed) && installed.Mode().Perm()&0o111 == 0o111
	switch {
	case same && !safe:
		return fmt.Errorf("%s is this very file, and not one that only root can change and everyone can run: move it away and run it from there (or chown root and chmod 755 it). Nothing was changed", Program)
	case same || f.have == f.want && safe:
		f.action, f.want = Unchanged, f.have
		p.adopts = p.record.owns(Program) && !p.record.isOurs(Program, f.have)
		p.add(f, "")
	case f.have == f.want:
		f.action = Replace
		p.add(f, "it was not one that only root can change and everyone can run")
	case f.have != none && !p.record.isOurs(Program, f.have) && isPolymesh(m.path(Program)):
		f.action = Replace
		p.add(f, "another version of Polymesh")
	default:
		if err := p.record.decide(f); err != nil {
			return err
		}
		p.add(f, "")
	}
	return nil
}

func (m *Machine) planLink(p *Plan, path string) error {
	f := &file{path: path, link: filepath.Base(Program), want: linkFingerprint(filepath.Base(Program))}
	var err error
	if f.have, err = fingerprintOf(m.path(path)); err != nil {
		return err
	}
	switch there := m.find(filepath.Base(path)); {
	case f.have == f.want:
		f.action = Unchanged
		p.add(f, "")
	case f.have != none:
		p.Changes = append(p.Changes, Change{path, Leave, "it is another program's"})
	case there != "":
		p.Changes = append(p.Changes, Change{path, Leave, there + " is there already"})
	default:
		f.action = Create
		p.add(f, "")
	}
	return nil
}

// find returns where a program of this name lies on the machine; empty where there is none.
func (m *Machine) find(name string) string {
	for _, dir := range filepath.SplitList(m.Path) {
		if !filepath.IsAbs(dir) {
			continue
		}
		path := filepath.Join(dir, name)
		if info, err := os.Stat(m.path(path)); err == nil && info.Mode().IsRegular() && info.Mode().Perm()&0o111 != 0 {
			return path
		}
	}
	return ""
}

func (m *Machine) planUnit(p *Plan, settings *Settings, kept bool) error {
	environment, err := environmentFile(settings.Environment)
	if err != nil {
		return err
	}
	unit, err := unitFile(settings.Role, settings.Args)
	if err != nil {
		return err
	}
	for _, f := range []*file{{path: EnvironmentFile, content: environment, mode: 0o600}, {path: Unit, content: unit, mode: 0o644}} {
		if f.have, err = fingerprintOf(m.path(f.path)); err != nil {
			return err
		}
		if f.want = fileFingerprint(f.content); f.content == nil {
			f.want = none
		}
		if f.have == none && f.want == none {
			continue
		}
		if kept && p.record.owns(f.path) && f.have != none && !p.record.isOurs(f.path, f.have) {
			p.Changes = append(p.Changes, Change{f.path, Leave, "it has been changed since it was installed"})
			continue
		}
		if err := p.record.decide(f); err != nil {
			if f.path == Unit {
				err = fmt.Errorf("%w. To change the service and keep the unit: systemctl edit polymesh", err)
			}
			return err
		}
		p.add(f, "")
	}
	return nil
}

func (m *Machine) planService(ctx context.Context, p *Plan, now bool) error {
	if !m.isEnabled(ctx) {
		p.Changes = append(p.Changes, Change{layout.Unit, Enable, ""})
	}
	var err error
	if p.before, err = m.state(ctx); err != nil {
		return err
	}
	stale := p.before.payload != "" && p.before.payload != p.id || p.record.Stale != "" && p.record.Stale == p.before.invocation || slices.ContainsFunc(p.files, func(f *file) bool {
		return f.action != Unchanged && f.link == ""
	})
	const old = "it runs what was installed before"
	switch {
	case !p.before.runs() && now:
		p.Changes = append(p.Changes, Change{layout.Unit, Start, ""})
	case p.before.runs() && stale && now:
		p.Changes = append(p.Changes, Change{layout.Unit, Restart, old})
	case p.before.runs() && stale:
		p.Changes = append(p.Changes, Change{layout.Unit, Leave, old + ": `polymesh install --now` or systemctl restart polymesh"})
	case now && p.before.active == "active":
		p.Changes = append(p.Changes, Change{layout.Unit, Unchanged, "it runs"})
	case now:
		p.Changes = append(p.Changes, Change{layout.Unit, Start, "it has not come up yet"})
	}
	return nil
}

// Install installs, and returns what it has done. It can be interrupted, and run again.
func (m *Machine) Install(ctx context.Context, o Options, steps *progress.Steps) (*Plan, error) {
	// What is refused leaves nothing behind, not even the record's folder.
	if _, err := m.Plan(ctx, o); err != nil {
		return nil, err
	}
	unlock, err := m.lock()
	if err != nil {
		return nil, err
	}
	defer unlock()
	p, err := m.Plan(ctx, o)
	if err != nil {
		return nil, err
	}
	if p.Changed() || p.adopts || len(p.record.Partial) > 0 {
		if err := m.write(ctx, p, steps); err != nil {
			return nil, err
		}
	}
	for _, c := range p.Changes {
		if c.Action != Start && c.Action != Restart {
			continue
		}
		err := steps.Do("the server is up", func(step *progress.Step) (string, error) {
			return c.Action.done(), m.start(ctx, step, c.Action, p.before, p.waitsFor)
		})
		if err != nil {
			return p, err
		}
	}
	return p, nil
}

// write brings the files to the disk, and systemd's view of them up to date.
func (m *Machine) write(ctx context.Context, p *Plan, steps *progress.Steps) error {
	if err := m.removePartial(p.record); err != nil {
		return err
	}
	for _, f := range p.files {
		if f.action == Create || f.action == Replace || p.adopts && f.path == Program {
			p.record.Files[f.path] = append(slices.Clone(p.record.Files[f.path]), f.want)
		}
	}
	if err := m.writeRecord(p.record); err != nil {
		return err
	}
	reload := false
	for _, f := range p.files {
		if f.action == Unchanged {
			continue
		}
		reload = reload || f.path == Unit
		err := steps.Do(f.path, func(*progress.Step) (string, error) { return f.action.done(), m.put(p.record, f) })
		if err != nil {
			return err
		}
	}
	if reload {
		if _, err := m.systemctl(ctx, "daemon-reload"); err != nil {
			return err
		}
	}
	for _, f := range p.files {
		switch {
		case f.want == none:
			delete(p.record.Files, f.path)
		case p.record.isOurs(f.path, f.want):
			p.record.Files[f.path] = []fingerprint{f.want}
		}
		if f.path == Unit && p.record.owns(Unit) {
			p.record.Role, p.record.Args = p.role, p.args
		}
		if f.action != Unchanged && f.link == "" && p.before.runs() {
			p.record.Stale = p.before.invocation
		}
	}
	if err := m.writeRecord(p.record); err != nil {
		return err
	}
	for _, c := range p.Changes {
		if c.Action != Enable {
			continue
		}
		err := steps.Do(c.Target, func(*progress.Step) (string, error) {
			_, err := m.systemctl(ctx, "enable", layout.Unit)
			return c.Action.done(), err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// put writes one file, if what lies there is still what the plan has seen.
func (m *Machine) put(r *record, f *file) error {
	path := m.path(f.path)
	if have, err := fingerprintOf(path); err != nil || have != f.have {
		return errors.Join(err, fmt.Errorf("%s has just been changed by another program: run this again", f.path))
	}
	switch {
	case f.want == none:
		if err := os.Remove(path); err != nil {
			return err
		}
		return atomicfile.SyncDir(filepath.Dir(path))
	case f.link != "":
		if err := atomicfile.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		// There is nothing at its place, and what comes there meanwhile stays.
		if err := os.Symlink(f.link, path); err != nil {
			return err
		}
		return atomicfile.SyncDir(filepath.Dir(path))
	case f.source == "":
		return atomicfile.Write(path, f.content, f.mode)
	}
	return m.copyProgram(r, f)
}

// copyProgram copies the shipped file, which is large: what an interruption leaves of it is noted.
func (m *Machine) copyProgram(r *record, f *file) error {
	in, err := os.Open(f.source)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := atomicfile.Create(m.path(f.path), f.mode)
	if err != nil {
		return err
	}
	defer out.Discard()
	r.Partial = []string{filepath.Join(filepath.Dir(f.path), filepath.Base(out.Name()))}
	if err := m.writeRecord(r); err != nil {
		return err
	}
	sum := sha256.New()
	if _, err := io.Copy(io.MultiWriter(out, sum), in); err != nil {
		return fmt.Errorf("copy %s: %w", f.source, err)
	}
	if got := fingerprint("sha256:" + hex.EncodeToString(sum.Sum(nil))); got != f.want {
		return fmt.Errorf("%s has changed while it was copied: run this again", f.source)
	}
	if err := out.Commit(); err != nil {
		return err
	}
	r.Partial = nil
	return nil
}

// waitsFor is what the server reports about its start.
func (p *Plan) waitsFor(ctx context.Context) string {
	report, err := status.Ask(ctx, p.node.DataDir.StatusSocket())
	if err != nil {
		return "waiting for the service to start"
	}
	var names []string
	for _, c := range report.Components {
		if c.State != component.Ready && c.State != component.Standby {
			if c.Name == "join" && c.Message != "" {
				return c.Message // an agent that has not joined yet has no other component
			}
			names = append(names, c.Name)
		}
	}
	if more := len(names) - 3; more > 0 {
		names = append(names[:3], fmt.Sprintf("%d more", more))
	}
	return "waiting for " + strings.Join(names, ", ")
}
