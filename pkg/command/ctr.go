package command

import (
	"errors"
	"io/fs"
	"os"
	"slices"

	"github.com/containerd/containerd/v2/cmd/ctr/app"
	"github.com/spf13/cobra"

	"polymesh.dev/polymesh/pkg/atomicfile"
	"polymesh.dev/polymesh/pkg/layout"
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
				"CONTAINERD_ADDRESS":   dataDirFromEnv().ContainerdSocket(),
				"CONTAINERD_NAMESPACE": "k8s.io",
			} {
				if os.Getenv(key) == "" {
					if err := os.Setenv(key, value); err != nil {
						return err
					}
				}
			}
			silenceGRPC()
			if err := app.New().Run(append([]string{"ctr"}, args...)); err != nil {
				return err
			}
			// These use containerd's transfer service, which does not sync layers, so they are synced before the command returns.
			if slices.Contains(args, "import") || slices.Contains(args, "pull") {
				return syncDataDir()
			}
			return nil
		},
	}
	return cmd
}

// syncDataDir syncs the file system of the data dir, if it exists.
func syncDataDir() error {
	if err := atomicfile.SyncFilesystem(string(dataDirFromEnv())); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// dataDirFromEnv returns the data dir from the environment, or else the default one: for commands that pass all their flags on, or
// have no flag for it.
func dataDirFromEnv() layout.DataDir {
	text := os.Getenv("POLYMESH_DATA_DIR")
	if text == "" {
		return layout.DefaultDataDir
	}
	dir, err := layout.ParseDataDir(text)
	if err != nil {
		return layout.DataDir(text) // the current folder is gone, and so are paths in it
	}
	return dir
}
