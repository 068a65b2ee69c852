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

// Plan is the list of files of a new project or service, compared with existing ones. Nothing is changed before Write.
type Plan struct {
	Project  string    `json:"project"`
	Dir      string    `json:"dir"` // absolute
	Host     string    `json:"host"`
	Services []Service `json:"services,omitempty"`
	Files    []File    `json:"files"`
}

// File is one file of a plan.
type File struct {
	Path   string `json:"path"` // relative to the project's folder, with slashes
	Action Action `json:"action"`

	text []byte
	// changes is set for an existing file that gets an additional line.
	changes bool
}

// Action is what a plan does with a file.
type Action string

// The actions.
const (
	Create    Action = "create"
	Change    Action = "change"    // add a line
	Overwrite Action = "overwrite" // replace different contents, which are lost
	Unchanged Action = "unchanged" // already has these contents
	Keep      Action = "keep"      // exists, with any contents
)

// keptFiles are files that a folder may already have when it becomes a project.
var keptFiles = []string{".gitignore", "README.md"}

// compare determines the action for each file.
func (p *Plan) compare() error {
	slices.SortFunc(p.Files, func(a, b File) int { return strings.Compare(a.Path, b.Path) })
	for i := range p.Files {
		f := &p.Files[i]
		text, err := os.ReadFile(p.path(*f))
		switch {
		case errors.Is(err, fs.ErrNotExist):
			f.Action = Create
		case err != nil: // a folder, or a file in place of a folder
			return fmt.Errorf("%s is in the way: %w", p.path(*f), err)
		case bytes.Equal(text, f.text):
			f.Action = Unchanged
		case f.changes:
			f.Action = Change
		case slices.Contains(keptFiles, f.Path):
			f.Action = Keep
		default:
			f.Action = Overwrite
		}
	}
	return nil
}

func (p *Plan) path(f File) string { return filepath.Join(p.Dir, filepath.FromSlash(f.Path)) }

// Refuse returns an error if the plan would overwrite files, and nil otherwise.
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
	return fmt.Errorf("%s already has these files, with different contents:\n  %s\nChoose another name, or overwrite them with --force", p.Dir, strings.Join(lost, "\n  "))
}

// Write applies the plan: completely, or not at all if there is an error. Files are created in a temporary folder and then moved
// into place in as few steps as possible. If the program is killed between two of these, running the same command again creates
// the rest.
func (p *Plan) Write(ctx context.Context) (err error) {
	base := p.Dir
	for { // the nearest existing folder
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
	// The project's folder, with normal permissions.
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

// openModes restores permissions that the umask has removed: files copied into an image keep their mode, and are read by
// another user there.
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

// move moves a tree into place, and can be undone.
type move struct {
	old  string // folder for replaced files
	done []moved
}

// moved is one step: the new target, and the backup of what it replaced, if anything.
type moved struct{ target, before string }

// into moves the contents of from to target, as whole folders where these do not exist.
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
	if err == nil { // merge a folder into a folder
		for _, entry := range entries {
			if err := m.into(ctx, filepath.Join(from, entry.Name()), filepath.Join(target, entry.Name())); err != nil {
				return err
			}
		}
		return nil
	}
	// Keep the old file through a hard link, and replace its name atomically.
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

// undo reverts the steps, last one first.
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
