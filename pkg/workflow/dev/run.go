package dev

import (
	"context"
	"fmt"
	"io"
	"path/filepath"
	"strings"

	"polymesh.dev/polymesh/pkg/progress"
	"polymesh.dev/polymesh/pkg/workflow/deploy"
	"polymesh.dev/polymesh/pkg/workflow/project"
)

// Run deploys the project in a folder, and again after each change of what a deploy reads, until ctx ends. A change cancels a
// deploy that is under way; an error of one is printed, and the next change is waited for.
func Run(ctx context.Context, out io.Writer, dir string, run func(context.Context) error) error {
	w, err := Watch(inputs(dir))
	if err != nil {
		return err
	}
	defer w.Close()
	return develop(ctx, out, w, dir, run)
}

// inputs lists what a deploy of the project reads. The project is loaded each time: polymesh.yaml, and which services there
// are, may be what changed.
func inputs(dir string) List {
	return func(visit func(path string)) error {
		visit(filepath.Join(dir, project.File))
		p, err := project.Load(dir)
		if err != nil {
			return err
		}
		return deploy.Inputs(p, visit)
	}
}

// develop runs once, and again after each change, until ctx ends. A change ends a run that is under way.
func develop(ctx context.Context, out io.Writer, w *Watcher, dir string, run func(context.Context) error) error {
	for {
		running, cancel := context.WithCancel(ctx)
		done := make(chan struct{})
		go func() {
			defer close(done)
			err := run(running)
			switch {
			case running.Err() != nil: // broken off
			case err != nil:
				fmt.Fprintf(out, "\n%s\nwaiting for a change\n", progress.Text(err.Error()))
			default:
				fmt.Fprintln(out, "\nwaiting for a change")
			}
		}()
		files, err := w.Changed(ctx)
		cancel()
		<-done
		if ctx.Err() != nil {
			return nil // Ctrl-C is how this ends
		}
		if err != nil {
			return err
		}
		for i, file := range files {
			if name, err := filepath.Rel(dir, file); err == nil {
				files[i] = name
			}
		}
		fmt.Fprintf(out, "\n%s changed\n", progress.Line(strings.Join(files, ", ")))
	}
}
