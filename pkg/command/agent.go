package command

import (
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"polymesh.dev/polymesh/pkg/agent"
	"polymesh.dev/polymesh/pkg/config"
)

func newAgent() *cobra.Command {
	flags := config.AgentFlags()
	cmd := &cobra.Command{
		Use:   "agent",
		Short: "Run an agent: this machine as a node of a cluster",
		Long: `Run an agent: this machine becomes a node of the cluster of a server, and runs pods.

  polymesh agent --server https://HOST:6443 --token-file FILE

On the server, /var/lib/polymesh/server/node-token has a token that does not expire, and ` + "`polymesh token create`" + ` creates one that does.

Every flag can also be set in the config file under the same name, and in the environment as POLYMESH_ plus the name in uppercase
(POLYMESH_TOKEN; POLYMESH_URL is --server, too). A flag overrides the environment, which overrides the file.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := flags.Agent(os.Environ())
			if err != nil {
				return err
			}
			ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM)
			defer stop()
			return agent.Run(ctx, cfg)
		},
	}
	cmd.Flags().SortFlags = false
	cmd.Flags().AddFlagSet(flags.FlagSet)
	return cmd
}
