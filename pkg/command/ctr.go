package command

import (
	"os"

	"github.com/containerd/containerd/v2/cmd/ctr/app"
	"github.com/spf13/cobra"

	"polymesh.dev/polymesh/pkg/config"
)

func newCtr() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "ctr",
		Short: "Run containerd's ctr on this node's containerd and namespace",
		Example: `  polymesh ctr images import app.tar
  polymesh ctr images ls`,
		DisableFlagParsing: true,
		RunE: func(_ *cobra.Command, args []string) error {
			for key, value := range map[string]string{
				"CONTAINERD_ADDRESS":   config.ContainerdSocket(dataDirFromEnv()),
				"CONTAINERD_NAMESPACE": "k8s.io",
			} {
				if os.Getenv(key) == "" {
					if err := os.Setenv(key, value); err != nil {
						return err
					}
				}
			}
			silenceGRPC()
			return app.New().Run(append([]string{"ctr"}, args...))
		},
	}
	return cmd
}

// dataDirFromEnv is the data dir for commands that pass all their flags on.
func dataDirFromEnv() string {
	if dir := os.Getenv("POLYMESH_DATA_DIR"); dir != "" {
		return dir
	}
	return config.DefaultDataDir
}
