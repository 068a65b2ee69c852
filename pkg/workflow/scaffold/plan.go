package scaffold

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// Plan is what a new project or service consists of, compared with what is there. Nothing is changed before Write.
type Plan struct {
	Project  string    `json:"project"`
	Dir      string    `json:"dir"` // absolute
	Host     string    `json:"host"`
	Services []Service `json:"services,omitempty"`
	Files    []File    `json:"files"`
}

// File is one file of a plan.
type File struct {
	Path   string `json:"path"` // below the project's folder, with slashes
	Action Action `json:"action"`

	text []byte
	// changes is set for a file that is there and gets a line more.
	changes bool
}

// Action is what happens to a file.
type Action string

// The actions.
const (
	Create    Action = "create"
	Change    Action = "change"    // a line is added
	Overwrite Action = "overwrite" // it has another text, which is lost
	Unchanged Action = "unchanged" // it has this text already
	Keep      Action = "keep"      // it is there, and may be what it likes
)

// everybodys are files that a folder may have before it becomes a project.
var everybodys = []string{".gitignore", "README.md"}

// compare sets what happens to each file.
func (p *Plan) compare() error {
	slices.SortFunc(p.Files, func(a, b File) int { return strings.Compare(a.Path, b.Path) })
	for i := range p.Files {
		f := &p.Files[i]
		text, err := os.ReadFile(p.path(*f))
		switch {
		case errors.Is(err, fs.ErrNotExist):
			f.Action = Create
		case err != nil: // a folder, or a file where a folder should be
			return fmt.Errorf("%s is in the way: %w", p.path(*f), err)
		case bytes.Equal(text, f.text):
			f.Action = Unchanged
		case f.changes:
			f.Action = Change
		case slices.Contains(everybodys, f.Path):
			f.Action = Keep
		default:
			f.Action = Overwrite
		}
	}
	return nil
}

func (p *Plan) path(f File) string { return filepath.Join(p.Dir, filepath.FromSlash(f.Path)) }

// Refuse is the error of a plan that would overwrite files; nil if it would not.
func (p *Plan) Refuse() error {
	var lost []string
	for _, f := range p.Files {
		if f.Action == Overwrite {
			lost = append(lost, f.Path)
		}
	}
	if len(lost) == 0 {
		return nil
	}
	return fmt.Errorf("%s has these files already, with another text:\n  %s\nChoose another name, or overwrite them with --force", p.Dir, strings.Join(lost, "\n  "))
}

// Write does what the plan says: all of it, or nothing if there is an error. The files are made elsewhere first and moved
// to their places in as few steps as possible. If the program is killed between two of these, the same command again makes
// the rest.
func (p *Plan) Write(ctx context.Context) (err error) {
	base := p.Dir
	for { // the nearest folder that is there
		if _, err := os.Stat(base); err == nil {
			break
		} else if !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		base = filepath.Dir(base)
	}
	stage, err := os.MkdirTemp(base, ".polymesh-new-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(stage)) }()
	// The folder of the project, with the rights that a folder has.
	tree := filepath.Join(stage, "new")
	if err := os.Mkdir(tree, 0o755); err != nil {
		return err
	}
	for _, f := range p.Files {
		if f.Action == Unchanged || f.Action == Keep {
			continue
		}
		file := filepath.Join(tree, filepath.FromSlash(f.Path))
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(file, f.text, 0o644); err != nil {
			return err
		}
	}
	if err := openModes(tree); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(p.Dir), 0o755); err != nil {
		return err
	}
	m := move{old: filepath.Join(stage, "old")}
	if err := m.into(ctx, tree, p.Dir); err != nil {
		return errors.Join(err, m.undo())
	}
	return nil
}

// openModes gives a new tree the modes that the umask may have taken away: what is copied into an image keeps its mode, and
// there another user reads it.
func openModes(tree string) error {
	return filepath.WalkDir(tree, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if entry.IsDir() {
			return os.Chmod(path, 0o755)
		}
		return os.Chmod(path, 0o644)
	})
}

// move brings a tree to its place, and can take it back.
type move struct {
	old  string // keeps files that were replaced
	done []moved
}

// moved is one step: something new at target, and what was there before, if anything.
type moved struct{ target, before string }

// into moves what is in from to target, in whole folders where there is none.
func (m *move) into(ctx context.Context, from, target string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	there, err := os.Lstat(target)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if err := os.Rename(from, target); err != nil {
			return err
		}
		m.done = append(m.done, moved{target: target})
		return nil
	case err != nil:
		return err
	}
	entries, err := os.ReadDir(from)
	if err == nil { // a folder into a folder
		for _, entry := range entries {
			if err := m.into(ctx, filepath.Join(from, entry.Name()), filepath.Join(target, entry.Name())); err != nil {
				return err
			}
		}
		return nil
	}
	// A link to the old file keeps it, and the new one takes its name at once.
	if err := os.Chmod(from, there.Mode().Perm()); err != nil {
		return err
	}
	if err := os.MkdirAll(m.old, 0o700); err != nil {
		return err
	}
	before := filepath.Join(m.old, fmt.Sprint(len(m.done)))
	if err := os.Link(target, before); err != nil {
		return err
	}
	if err := os.Rename(from, target); err != nil {
		return err
	}
	m.done = append(m.done, moved{target, before})
	return nil
}

// undo takes the steps back, the last one first.
func (m *move) undo() error {
	var problems []error
	for _, step := range slices.Backward(m.done) {
		if step.before == "" {
			problems = append(problems, os.RemoveAll(step.target))
		} else {
			problems = append(problems, os.Rename(step.before, step.target))
		}
	}
	return errors.Join(problems...)
}
