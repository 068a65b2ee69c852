package command

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
	"k8s.io/client-go/rest"

	"polymesh.dev/polymesh/pkg/dashboard"
	"polymesh.dev/polymesh/pkg/kubeconfig"
)

func newDashboard() *cobra.Command {
	var o dashboard.Options
	var noBrowser bool
	flags := apiFlags()
	address := "127.0.0.1"
	cmd := &cobra.Command{
		Use:   "dashboard",
		Short: "Open the page with the cluster's metrics, logs and traces",
		Long: `Open the page with the cluster's metrics, logs and traces, in a browser on this machine. The command prints its address, which works
once, in one browser, and until Ctrl-C.

On a server, as root, it shows the store of this machine, also when the server, the API server and all pods are down; if the store itself
does not run, its files. Elsewhere, or with --kubeconfig or --context, it goes by the cluster's API server, and needs the permission to do so
(the ClusterRole ` + dashboard.Role + `). With --data-dir it never does that.

From a server without a browser: ssh -L PORT:127.0.0.1:PORT SERVER, with --port PORT.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var err error
			if o.Address, err = netip.ParseAddr(address); err != nil {
				return fmt.Errorf("--address %q is not an IP address", address)
			}
			o.Local = cmd.Flags().Changed("data-dir")
			o.Remote = cmd.Flags().Changed("kubeconfig") || cmd.Flags().Changed("context")
			if o.Local && o.Remote {
				return errors.New("--data-dir is for the store of this machine, and --kubeconfig and --context are for a cluster: remove one of them")
			}
			o.Cluster = func(context.Context) (*rest.Config, error) {
				if err := useClusterKubeconfig(); err != nil {
					return nil, err
				}
				config, err := flags.ToRESTConfig()
				if err != nil {
					return nil, kubeconfig.None(err)
				}
				return config, kubeconfig.Named(flags.ToRawKubeConfigLoader(), config)
			}
			o.Program, o.Browser = dashboard.ShippedProgram, !noBrowser
			o.Out, o.Log = cmd.OutOrStdout(), cmd.ErrOrStderr()
			silenceKlog()
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
			defer stop()
			return dashboard.Run(ctx, o)
		},
	}
	cmd.Flags().Uint16Var(&o.Port, "port", 0, "port on this machine (default: a free one)")
	cmd.Flags().StringVar(&address, "address", address, "address of this machine's loopback")
	cmd.Flags().BoolVar(&noBrowser, "no-browser", false, "only print the address; as root, no browser is opened anyway")
	_ = cmd.RegisterFlagCompletionFunc("address", cobra.FixedCompletions([]string{"127.0.0.1", "::1"}, cobra.ShellCompDirectiveNoFileComp))
	_ = cmd.RegisterFlagCompletionFunc("port", cobra.NoFileCompletions)
	flags.AddFlags(cmd.Flags())
	dataDirFlag(cmd, &o.DataDir)
	return cmd
}
