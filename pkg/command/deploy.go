package command

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	istiolog "istio.io/istio/pkg/log"
	"k8s.io/cli-runtime/pkg/genericclioptions"

	"polymesh.dev/polymesh/pkg/layout"
	"polymesh.dev/polymesh/pkg/progress"
	"polymesh.dev/polymesh/pkg/signature"
	"polymesh.dev/polymesh/pkg/workflow/deploy"
	"polymesh.dev/polymesh/pkg/workflow/image"
	"polymesh.dev/polymesh/pkg/workflow/project"
	"polymesh.dev/polymesh/pkg/workflow/rollout"
	"polymesh.dev/polymesh/pkg/workflow/scanner"
)

// clusterFlags adds kubectl's flags for cluster and namespace.
func clusterFlags(cmd *cobra.Command) *genericclioptions.ConfigFlags {
	all := genericclioptions.NewConfigFlags(true)
	flags := genericclioptions.ConfigFlags{KubeConfig: all.KubeConfig, Context: all.Context, Namespace: all.Namespace, CacheDir: all.CacheDir}
	flags.AddFlags(cmd.Flags())
	requireCluster(all)
	return all
}

// deployFlags adds the flags that deploy and dev share. The returned function reads them, once they are parsed.
func deployFlags(cmd *cobra.Command) func(args []string) (deploy.Options, error) {
	var o deploy.Options
	var registry string
	var dataDir layout.DataDir
	var timeout = cmd.Flags().Duration("timeout", 0, "how long to wait for the pods (default: the project's, or 5m)")
	o.Cluster = clusterFlags(cmd)
	cmd.Flags().StringVar(&registry, "registry", "", "push images to this registry instead of giving them to the cluster's nodes")
	cmd.Flags().StringVar(&o.Engine, "engine", "", "program that builds images: buildah, podman or docker (default: the first that works)")
	dataDirFlag(cmd, &dataDir)
	cmd.Flags().BoolVar(&o.AllowLatest, "allow-latest", false, "allow images without a version")
	network := cmd.Flags().String("build-network", "", "network access of builds: "+strings.Join(image.Networks(), ", ")+" (default: the service's, or private, which is all but this machine's loopback)")
	settings := cmd.Flags().StringSlice("build-settings", nil, "package managers whose settings on this machine, including passwords, builds can read: "+strings.Join(image.Clients(), ", "))
	complete(cmd, "build-network", image.Networks())
	complete(cmd, "build-settings", image.Clients())
	adoptFlag(cmd, &o.Adopt)
	signKey := cmd.Flags().String("sign-key", "", "sign the images with this private key: a file, or env://NAME (see polymesh image keygen)")
	cmd.Flags().StringVar(&o.SBOM, "sbom", "", "write a bill of materials (CycloneDX) of each image to this folder")
	_ = cmd.MarkFlagDirname("sbom")
	_ = cmd.RegisterFlagCompletionFunc("engine", cobra.FixedCompletions(image.EngineNames(), cobra.ShellCompDirectiveNoFileComp))
	return func(args []string) (deploy.Options, error) {
		if err := useClusterKubeconfig(); err != nil {
			return o, err
		}
		// Istio's analyzers log each informer to standard output.
		for _, scope := range istiolog.Scopes() {
			scope.SetOutputLevel(istiolog.NoneLevel)
		}
		silenceKlog()
		dir := "."
		if len(args) > 0 {
			dir = args[0]
		}
		var err error
		if o.Project, err = project.Load(dir); err != nil {
			return o, err
		}
		if registry != "" {
			o.Project.Registry = registry
		}
		if err := buildOptions(o.Project, *network, *settings); err != nil {
			return o, err
		}
		if *signKey != "" {
			if o.Signer, err = signature.ReadSigner(*signKey, keyPassword); err != nil {
				return o, err
			}
		}
		if o.SBOM != "" {
			if o.Scanner, err = scanner.Find(os.Args[0], ""); err != nil {
				return o, err
			}
		}
		if *timeout > 0 {
			o.Project.Timeout = *timeout
		}
		o.ContainerdSocket, o.RegistryDir, o.Authorities = dataDir.ContainerdSocket(), dataDir.RegistryDir(), dataDir.Authorities()
		o.Steps = progress.New(cmd.ErrOrStderr())
		o.Out = cmd.OutOrStdout()
		o.Allowed = rollout.Refuse
		return o, nil
	}
}

// buildOptions applies the build flags to every service.
func buildOptions(p *project.Project, network string, settings []string) error {
	if network != "" && !slices.Contains(image.Networks(), network) {
		return fmt.Errorf("--build-network %q is not one of %s", network, strings.Join(image.Networks(), ", "))
	}
	for _, name := range settings {
		if !slices.Contains(image.Clients(), name) {
			return fmt.Errorf("--build-settings %q is not one of %s", name, strings.Join(image.Clients(), ", "))
		}
	}
	for i := range p.Services {
		s := &p.Services[i]
		if network != "" {
			s.Network = network
		}
		s.Settings = slices.Compact(slices.Sorted(slices.Values(slices.Concat(s.Settings, settings))))
	}
	return nil
}

func adoptFlag(cmd *cobra.Command, adopt *bool) {
	cmd.Flags().BoolVar(adopt, "adopt", false, "take over a project of this name, or objects, that were deployed from elsewhere")
}

func newDeploy() *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use:   "deploy [DIR]",
		Short: "Build a project's images and deploy it to the cluster",
		Long: `Deploy builds the images of the services in DIR (the current folder by default) that changed, loads them into this
machine's node, or pushes them to the cluster if this machine is not a node of it, or to a registry, applies the manifests, removes
what is no longer in them, and waits until the pods are ready. If one does not become ready it prints the reason, and which line to change.

DIR has a polymesh.yaml, or just the folders services/, k8s/ and istio/. It can be any cluster with Istio: see --kubeconfig.`,
		Example: `  polymesh deploy
  polymesh deploy shop --diff
  polymesh deploy --registry registry.example.com/team --kubeconfig other.yaml`,
		Args:              cobra.MaximumNArgs(1),
		ValidArgsFunction: completeDir,
	}
	options := deployFlags(cmd)
	dryRun := cmd.Flags().Bool("dry-run", false, "show what would change, as computed by the API server; build and change nothing")
	diff := cmd.Flags().Bool("diff", false, "show what would change, line by line; build and change nothing. Exit code 1 if something would")
	rebuild := cmd.Flags().Bool("rebuild", false, "build images even if they exist")
	wait := cmd.Flags().Bool("wait", true, "wait until the pods are ready")
	volumes := cmd.Flags().Bool("prune-volumes", false, "delete volumes, and the data in them, that are no longer in the manifests")
	outputFlag(cmd, &output)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := checkOutput(output); err != nil {
			return err
		}
		o, err := options(args)
		if err != nil {
			return err
		}
		o.DryRun, o.Diff, o.Rebuild, o.Wait = *dryRun, *diff, *rebuild, *wait
		o.Volumes = *volumes
		ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
		defer stop()
		result, err := deploy.Run(ctx, o)
		if done, printErr := printAs(cmd.OutOrStdout(), output, result); done {
			return errors.Join(err, printErr)
		}
		printResult(cmd.ErrOrStderr(), result, err)
		if err == nil && *diff && changes(result) {
			return exitError(1)
		}
		return interrupted(err)
	}
	return cmd
}

// printResult prints what the steps have not shown.
func printResult(w io.Writer, r *deploy.Result, err error) {
	w = progress.Escaping(w) // it may contain a container's output
	for _, f := range r.Findings {
		fmt.Fprintf(w, "\n%s\n", f)
	}
	if len(r.Findings) > 0 && err != nil {
		fmt.Fprintln(w)
	}
	if err == nil && len(r.Hosts) > 0 && !r.DryRun {
		fmt.Fprintf(w, "\nServed by the gateway as:\n")
		for _, host := range r.Hosts {
			fmt.Fprintf(w, "  %s\n", host)
		}
	}
}

func changes(r *deploy.Result) bool {
	for _, c := range r.Objects {
		if c.Action != deploy.Unchanged {
			return true
		}
	}
	return false
}

// interrupted replaces the error after Ctrl-C.
func interrupted(err error) error {
	if errors.Is(err, context.Canceled) {
		return errors.New("interrupted; the same command continues where this one stopped")
	}
	return err
}

func newUndeploy() *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use:   "undeploy [DIR]",
		Short: "Remove what deploy has created in the cluster",
		Long: `Undeploy removes every object that ` + "`polymesh deploy`" + ` of the project in DIR has applied, as recorded in the cluster,
whatever the manifests contain now. Volumes stay, with the data in them (--prune-volumes), and so do other things in the namespace and
the namespace itself.`,
		Example:           "  polymesh undeploy\n  polymesh undeploy shop --delete-namespace",
		Args:              cobra.MaximumNArgs(1),
		ValidArgsFunction: completeDir,
	}
	flags := clusterFlags(cmd)
	namespace := cmd.Flags().Bool("delete-namespace", false, "also remove the namespace, with everything in it")
	dryRun := cmd.Flags().Bool("dry-run", false, "only show what would be removed")
	volumes := cmd.Flags().Bool("prune-volumes", false, "also delete volumes, and the data in them")
	var adopt bool
	adoptFlag(cmd, &adopt)
	outputFlag(cmd, &output)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := checkOutput(output); err != nil {
			return err
		}
		if err := useClusterKubeconfig(); err != nil {
			return err
		}
		dir := "."
		if len(args) > 0 {
			dir = args[0]
		}
		p, err := project.Load(dir)
		if err != nil {
			return err
		}
		ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
		defer stop()
		removed, err := deploy.Remove(ctx, deploy.RemoveOptions{
			Project: p, Cluster: flags, DryRun: *dryRun, Adopt: adopt, Volumes: *volumes, Namespace: *namespace, Steps: progress.New(cmd.ErrOrStderr()),
		})
		if done, printErr := printAs(cmd.OutOrStdout(), output, removed); done {
			return errors.Join(err, printErr)
		}
		if *dryRun {
			for _, id := range removed.Objects {
				fmt.Fprintln(cmd.OutOrStdout(), id)
			}
			for _, l := range removed.Left {
				fmt.Fprintf(cmd.ErrOrStderr(), "left: %s (%s)\n", l.ID, l.Why)
			}
		}
		return interrupted(err)
	}
	return cmd
}

func completeDir(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
	return nil, cobra.ShellCompDirectiveFilterDirs
}

// newSchema prints the schema of polymesh.yaml, for editors.
func newSchema() *cobra.Command {
	return &cobra.Command{
		Use:   "schema",
		Short: "Print the JSON schema of polymesh.yaml",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := cmd.OutOrStdout().Write(project.Schema)
			return err
		},
	}
}
