// Package istioctl is Istio's own istioctl, linked into Polymesh.
//
// It is upstream's command tree (istio.io/istio/istioctl/cmd) with three differences: it adds `istioctl profile list` and
// `profile dump`, which upstream removed and many guides use; in `install`, `upgrade` and `manifest generate` it applies
// the values that Polymesh's images need, below the user's own; and it fails where upstream waits for an unreachable
// cluster. Hub and tag default to the shipped images by Istio's own mechanism, the version stamped at build time.
// pkg/command calls Run for `polymesh istioctl` and for a link named istioctl.
package istioctl

import (
	"flag"
	"fmt"
	"os"
	"slices"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"istio.io/istio/istioctl/cmd"
	"istio.io/istio/pkg/log"

	"polymesh.dev/polymesh/pkg/mesh/install"
)

// Run does what upstream's main does (istioctl/cmd/istioctl) and returns the exit code. Upstream's code selects the
// kubeconfig: --kubeconfig, then KUBECONFIG. available is called for every image of an installation.
func Run(args []string, available Available) int {
	if err := cmd.ConfigAndEnvProcessing(); err != nil {
		fmt.Fprintf(os.Stderr, "Could not initialize: %v\n", err)
		return cmd.GetExitCode(err)
	}
	root := NewCommand(args, available)
	log.EnableKlogWithCobra()
	if err := root.Execute(); err != nil {
		return cmd.GetExitCode(err)
	}
	return 0
}

// NewCommand returns the istioctl command for the given arguments.
func NewCommand(args []string, available Available) *cobra.Command {
	root := cmd.GetRootCmd(args)
	// Upstream adds the flags of Go's flag package. In this program they are the kubelet's and have no meaning
	// here.
	flag.CommandLine.VisitAll(func(f *flag.Flag) {
		if known := root.PersistentFlags().Lookup(f.Name); known != nil {
			known.Hidden = true
		}
	})
	images := install.BuiltIn()
	for _, path := range [][]string{{"install"}, {"upgrade"}, {"manifest", "generate"}} {
		c, rest, err := root.Find(path)
		if err != nil || len(rest) > 0 {
			// Upstream moved a command. The tests of this package catch this before a release.
			continue
		}
		if path[0] != "manifest" {
			withImageCheck(c, available)
		}
		underlay(c, images)
	}
	root.AddCommand(newProfileCommand(images))
	withCluster(root)
	return root
}

// underlay puts our values before the files that the user gave, so that every file and --set of the user overrides them.
func underlay(c *cobra.Command, images install.Images) {
	run := c.RunE
	c.RunE = func(c *cobra.Command, args []string) error {
		files, ok := c.Flags().Lookup("filename").Value.(pflag.SliceValue)
		if !ok {
			return fmt.Errorf("istioctl %s: --filename is not a list of files in this version of Istio", c.Name())
		}
		names, done, err := install.Input(images, files.GetSlice(), sets(c.Flags()), c.InOrStdin())
		if err != nil {
			return err
		}
		defer done()
		if err := files.Replace(names); err != nil {
			return fmt.Errorf("istioctl %s: %w", c.Name(), err)
		}
		return run(c, args)
	}
}

// sets returns the --set flags, including those that upstream derives from other flags (operator/cmd/mesh, applyFlagAliases).
func sets(flags *pflag.FlagSet) []string {
	var out []string
	if f := flags.Lookup("set"); f != nil {
		if v, ok := f.Value.(pflag.SliceValue); ok {
			out = slices.Clone(v.GetSlice())
		}
	}
	if f := flags.Lookup("manifests"); f != nil && f.Value.String() != "" {
		out = append(out, "installPackagePath="+f.Value.String())
	}
	return out
}
