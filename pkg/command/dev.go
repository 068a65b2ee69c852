package command

import (
	"context"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"polymesh.dev/polymesh/pkg/workflow/deploy"
	"polymesh.dev/polymesh/pkg/workflow/dev"
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
		return dev.Run(ctx, cmd.ErrOrStderr(), o.Project.Dir, func(ctx context.Context) error {
			// The project is read again: polymesh.yaml may be what changed.
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
