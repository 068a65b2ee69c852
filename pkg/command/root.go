// Package command contains the commands of `polymesh`. Each is thin: it reads its flags and calls the package that does the
// work.
package command

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	istio "istio.io/istio/pkg/version"
	"k8s.io/component-base/version"

	"polymesh.dev/polymesh/pkg/controlplane"
	"polymesh.dev/polymesh/pkg/layout"
	"polymesh.dev/polymesh/pkg/node"
	"polymesh.dev/polymesh/pkg/payload"
	"polymesh.dev/polymesh/pkg/progress"
	polymesh "polymesh.dev/polymesh/pkg/version"
)

// Run runs the program for a command line and returns its exit code.
func Run(args []string) int {
	restoreGRPC()
	tool, toolArgs := toolOf(args)
	if tool != "istioctl" { // it sets up its logs itself, based on what its packages have set
		restoreLogging()
	}
	if tool != "" {
		return tools[tool](toolArgs)
	}
	if len(args) > 1 && controlplane.IsProgram(args[1]) {
		return controlplane.RunProgram(args[1], args[2:])
	}
	if len(args) > 1 && args[1] == node.ProxyCommand {
		return node.RunProxy(args[2:])
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
	fmt.Fprintln(os.Stderr, "polymesh:", progress.Text(err.Error()))
	return 1
}

// toolOf returns the upstream program that a command line is for, and its arguments; empty if it is for this one. Called through a link of
// that name, the program is kubectl or istioctl. As subcommands they are not left to cobra: they parse and complete the whole command
// line themselves.
func toolOf(args []string) (name string, its []string) {
	name, its = filepath.Base(args[0]), args[1:]
	if tools[name] != nil {
		return name, its
	}
	if len(its) == 0 {
		return "", nil
	}
	name, its = its[0], its[1:]
	if (name == cobra.ShellCompRequestCmd || name == cobra.ShellCompNoDescRequestCmd) && len(its) > 1 {
		request := name
		name, its = its[0], append([]string{request}, its[1:]...)
	}
	if tools[name] == nil {
		return "", nil
	}
	return name, its
}

// exitError is an exit code of a command that has printed everything itself.
type exitError int

func (e exitError) Error() string { return fmt.Sprintf("exit code %d", int(e)) }

func newRoot() *cobra.Command {
	root := &cobra.Command{
		Use:   "polymesh",
		Short: "Kubernetes and Istio in one program",
		Long: `Polymesh brings up Kubernetes with Istio inside, on one machine or several, from one file.

  polymesh server          run a server: control plane, node and add-ons
  polymesh agent           run an agent: one more node
  polymesh status          show its state
  polymesh new project     create a project, and services in it
  polymesh deploy DIR      build a project and deploy it to the cluster
  polymesh kubectl get nodes`,
		Version: polymesh.Version,
	}
	root.SetVersionTemplate("polymesh {{.Version}}\n")
	// Kubernetes adds its own --version to the process's flags, which cobra adds to every command without one.
	root.Flags().Bool("version", false, "print the version")
	if kubernetes := pflag.Lookup("version"); kubernetes != nil {
		kubernetes.Hidden = true
	}
	root.AddCommand(newServer(), newAgent(), newToken(), newNode(), newEtcd(), newInstall(), newUninstall(), newStatus(), newDashboard(), newReset(), newDeploy(), newUndeploy(), newDev(), newNew(), newBridge(), newImage(), newRollout(), newSchema(), newCtr(), newSecretsEncrypt(), newSnapshot(), newDatastore(), newVersion())
	for name, run := range tools {
		root.AddCommand(&cobra.Command{
			Use:                name,
			Short:              fmt.Sprintf("Run %s against this cluster", name),
			DisableFlagParsing: true,
			// Only help gets here.
			Run: func(*cobra.Command, []string) { os.Exit(run(os.Args[2:])) },
		})
	}
	// Cobra creates this command only when the program runs.
	root.InitDefaultCompletionCmd()
	refuseUnknown(root)
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return fmt.Errorf("%w (see `%s --help`)", err, cmd.CommandPath())
	})
	return root
}

// refuseUnknown makes the command groups below a command reject unknown subcommands, with the same message as cobra's for the
// root. By default cobra prints a group's help then, and the exit code is 0.
func refuseUnknown(parent *cobra.Command) {
	for _, group := range parent.Commands() {
		if !group.HasSubCommands() {
			continue
		}
		group.Args = func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return nil
			}
			suggestions := ""
			cmd.SuggestionsMinimumDistance = 2 // cobra's default
			if names := cmd.SuggestionsFor(args[0]); len(names) > 0 {
				suggestions = "\n\nDid you mean this?\n\t" + strings.Join(names, "\n\t")
			}
			return fmt.Errorf("unknown command %q for %q%s", args[0], cmd.CommandPath(), suggestions)
		}
		group.RunE = func(cmd *cobra.Command, _ []string) error { return cmd.Help() }
		refuseUnknown(group)
	}
}

// oneArg accepts one argument. Unlike cobra's, its error names what is expected.
func oneArg(what string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) != 1 {
			return fmt.Errorf("give %s (see `%s --help`)", what, cmd.CommandPath())
		}
		return nil
	}
}

// someArgs is oneArg for one or more arguments.
func someArgs(what string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) == 0 {
			return oneArg(what)(cmd, args)
		}
		return nil
	}
}

func newVersion() *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use:   "version",
		Short: "Print the versions of Polymesh and its components",
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

// useClusterKubeconfig makes kubectl and istioctl use this machine's cluster unless the user selects another one, like
// K3s.
func useClusterKubeconfig() error {
	if os.Getenv("KUBECONFIG") != "" {
		return nil
	}
	if home, err := os.UserHomeDir(); err == nil && os.Geteuid() != 0 {
		if _, err := os.Stat(filepath.Join(home, ".kube", "config")); err == nil {
			return nil
		}
	}
	f, err := os.Open(layout.DefaultKubeconfig)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil
	case errors.Is(err, os.ErrPermission):
		return fmt.Errorf("this user cannot read %s: use sudo, copy it to ~/.kube/config, or start the server with --write-kubeconfig-group and one of your groups", layout.DefaultKubeconfig)
	case err != nil:
		return err
	}
	f.Close()
	return os.Setenv("KUBECONFIG", layout.DefaultKubeconfig)
}
