package command

import (
	"context"
	"fmt"
	"io"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"polymesh.dev/polymesh/pkg/progress"
	"polymesh.dev/polymesh/pkg/workflow/deploy"
	"polymesh.dev/polymesh/pkg/workflow/dev"
	"polymesh.dev/polymesh/pkg/workflow/project"
)

func newDev() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "dev [DIR]",
		Short: "Deploy a project, and redeploy it whenever one of its files changes",
		Long: `Dev deploys the project in DIR (the current folder by default), watches its services and manifests, and deploys
changes as soon as a file is saved. A save during a deploy restarts it. It continues after an error, and ends with Ctrl-C;
what it has deployed stays (remove it with polymesh undeploy).`,
		Example:           "  polymesh dev\n  polymesh dev shop",
		Args:              cobra.MaximumNArgs(1),
		ValidArgsFunction: completeDir,
	}
	options := deployFlags(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		o, err := options(args)
		if err != nil {
			return err
		}
		o.Wait = true
		ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
		defer stop()
		w, err := dev.Watch(watched(o.Project.Dir))
		if err != nil {
			return err
		}
		defer w.Close()
		return develop(ctx, cmd.ErrOrStderr(), w, o.Project, func(ctx context.Context) error {
			// The project is loaded again: polymesh.yaml may have changed.
			o, err := options(args)
			if err != nil {
				return err
			}
			o.Wait = true
			result, err := deploy.Run(ctx, o)
			printResult(cmd.ErrOrStderr(), result, err)
			return err
		})
	}
	return cmd
}

// watched lists the files that a deploy of the project reads. The project is loaded each time: polymesh.yaml, or the set of
// services, may have changed.
func watched(dir string) dev.List {
	return func(visit func(path string)) error {
		visit(filepath.Join(dir, project.File))
		p, err := project.Load(dir)
		if err != nil {
			return err
		}
		return deploy.Inputs(p, visit)
	}
}

// develop runs once, and again after each change, until ctx ends. A change cancels a running run.
func develop(ctx context.Context, out io.Writer, w *dev.Watcher, p *project.Project, run func(context.Context) error) error {
	for {
		running, cancel := context.WithCancel(ctx)
		done := make(chan struct{})
		go func() {
			defer close(done)
			err := run(running)
			switch {
			case running.Err() != nil: // canceled by a change
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
			return nil // ended by Ctrl-C
		}
		if err != nil {
			return err
		}
		for i, file := range files {
			if name, err := filepath.Rel(p.Dir, file); err == nil {
				files[i] = name
			}
		}
		fmt.Fprintf(out, "\n%s changed\n", progress.Line(strings.Join(files, ", ")))
	}
}
