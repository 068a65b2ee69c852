package command

import (
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/server"
)

func newServer() *cobra.Command {
	flags := config.ServerFlags()
	cmd := &cobra.Command{
		Use:   "server",
		Short: "Run a server: control plane, node and add-ons",
		Long: `Run a server: datastore, Kubernetes' control plane, this machine as a node, and the add-ons.

Every flag can also be set in the config file under the same name, and in the environment as POLYMESH_ plus the name in uppercase
(POLYMESH_DATA_DIR). A flag overrides the environment, which overrides the file.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			cfg, err := flags.Server(os.Environ())
			if err != nil {
				return err
			}
			if cfg.ClusterReset {
				return clusterReset(cmd, cfg)
			}
			ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM)
			defer stop()
			return server.Run(ctx, cfg)
		},
	}
	serverFlags(cmd, flags)
	return cmd
}

// spelled are values as a flag has them.
func spelled[T ~string](values []T) []string {
	var texts []string
	for _, v := range values {
		texts = append(texts, string(v))
	}
	return texts
}

// serverFlags adds the flags of a server, with what completes them.
func serverFlags(cmd *cobra.Command, flags *config.Flags) {
	cmd.Flags().SortFlags = false
	cmd.Flags().SetNormalizeFunc(config.ServerNames)
	cmd.Flags().AddFlagSet(flags.FlagSet)
	for flag, values := range map[string][]string{
		"datastore-sync": config.DatastoreSyncs(), "flannel-backend": spelled(config.FlannelBackends()), "disable": spelled(config.Addons()),
		"mesh-profile": config.MeshProfiles(), "observe-cluster-access": spelled(config.ObserveAccesses()), "secrets-encryption-provider": config.EncryptionProviders(), "pod-security": config.PodSecurityLevels(),
	} {
		_ = cmd.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp))
	}
}
