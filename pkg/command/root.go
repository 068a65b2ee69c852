// Package command holds the commands of `polymesh`. Each is thin: it reads its flags and calls the package that does the
// work.
package command

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	istio "istio.io/istio/pkg/version"
	"k8s.io/component-base/version"

	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/payload"
	polymesh "polymesh.dev/polymesh/pkg/version"
)

// Run runs the program for a command line and returns its exit code.
func Run(args []string) int {
	// Called through a link of that name, the program is kubectl or istioctl. As sub-commands they are caught here too,
	// before cobra: their own handling of the command line needs the whole of it.
	if tool, ok := tools[filepath.Base(args[0])]; ok {
		return tool(args[1:])
	}
	if len(args) > 1 {
		if tool, ok := tools[args[1]]; ok {
			return tool(args[2:])
		}
	}
	cmd := newRoot()
	cmd.SetArgs(args[1:])
	cmd.SilenceUsage, cmd.SilenceErrors = true, true
	err := cmd.Execute()
	var silent exitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &silent):
		return int(silent)
	}
	fmt.Fprintln(os.Stderr, "polymesh:", err)
	return 1
}

// exitError ends the program with a code when the command has said everything itself.
type exitError int

func (e exitError) Error() string { return fmt.Sprintf("exit code %d", int(e)) }

func newRoot() *cobra.Command {
	root := &cobra.Command{
		Use:   "polymesh",
		Short: "Kubernetes and Istio in one program",
		Long: `Polymesh brings up Kubernetes with Istio inside, on one machine, from one file.

  polymesh server          run a server: control plane, node and add-ons
  polymesh status          see how it is
  polymesh new project     make a project, and services in it
  polymesh deploy DIR      build a project and bring it to the cluster
  polymesh kubectl get nodes`,
		Version: polymesh.Version,
	}
	root.SetVersionTemplate("polymesh {{.Version}}\n")
	// Kubernetes has a --version of its own among the process's flags, which cobra gives to every command that has none.
	root.Flags().Bool("version", false, "print the version")
	if kubernetes := pflag.Lookup("version"); kubernetes != nil {
		kubernetes.Hidden = true
	}
	root.AddCommand(newServer(), newStatus(), newReset(), newDeploy(), newUndeploy(), newDev(), newNew(), newBridge(), newImage(), newRollout(), newSchema(), newCtr(), newSecretsEncrypt(), newVersion())
	for name, run := range tools {
		root.AddCommand(&cobra.Command{
			Use:                name,
			Short:              fmt.Sprintf("Run %s against this cluster", name),
			DisableFlagParsing: true,
			// Only help and completion get here.
			Run: func(*cobra.Command, []string) { os.Exit(run(os.Args[2:])) },
		})
	}
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return fmt.Errorf("%w (see `%s --help`)", err, cmd.CommandPath())
	})
	return root
}

func newVersion() *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use:   "version",
		Short: "Print the versions of Polymesh and of what it carries",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			v := versions{Polymesh: polymesh.Version, Kubernetes: version.Get().GitVersion, Istio: istio.Info.Version, Go: version.Get().GoVersion}
			if manifest, err := payload.Dir(os.Getenv(payload.EnvDir)).Manifest(); err == nil {
				v.Images = manifest.Images
			}
			return v.print(cmd.OutOrStdout(), output)
		},
	}
	outputFlag(cmd, &output)
	return cmd
}

// useClusterKubeconfig makes kubectl and istioctl reach this machine's cluster when the user has not said otherwise, as
// K3s does.
func useClusterKubeconfig() error {
	if os.Getenv("KUBECONFIG") != "" {
		return nil
	}
	if home, err := os.UserHomeDir(); err == nil && os.Geteuid() != 0 {
		if _, err := os.Stat(filepath.Join(home, ".kube", "config")); err == nil {
			return nil
		}
	}
	f, err := os.Open(config.DefaultKubeconfig)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil
	case errors.Is(err, os.ErrPermission):
		return fmt.Errorf("%s may not be read by this user: use sudo, start the server with --write-kubeconfig-mode 644, or copy it to ~/.kube/config", config.DefaultKubeconfig)
	case err != nil:
		return err
	}
	f.Close()
	return os.Setenv("KUBECONFIG", config.DefaultKubeconfig)
}
