package istioctl

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"istio.io/istio/manifests"
	"istio.io/istio/operator/pkg/render"
	"istio.io/istio/operator/pkg/values"
	"sigs.k8s.io/yaml"

	"polymesh.dev/polymesh/pkg/mesh/install"
)

// newProfileCommand restores `istioctl profile` as Istio had it up to 1.23: names, flags and output.
func newProfileCommand(images install.Images) *cobra.Command {
	c := &cobra.Command{
		Use:   "profile",
		Short: "Commands related to Istio configuration profiles",
		Long:  "The profile command lists and dumps Istio configuration profiles.",
		Example: `  istioctl profile list
  istioctl install --set profile=demo  # Use a profile from the list`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	c.AddCommand(newListCommand(), newDumpCommand(images))
	return c
}

func newListCommand() *cobra.Command {
	var dir string
	c := &cobra.Command{
		Use:   "list",
		Short: "Lists available Istio configuration profiles",
		Long:  "The list subcommand lists the available Istio configuration profiles.",
		Args:  cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			names, err := profiles(dir)
			if err != nil {
				return err
			}
			fmt.Fprintln(c.OutOrStdout(), "Istio configuration profiles:")
			for _, n := range names {
				fmt.Fprintf(c.OutOrStdout(), "    %s\n", n)
			}
			return nil
		},
	}
	manifestsFlag(c, &dir)
	return c
}

func newDumpCommand(images install.Images) *cobra.Command {
	var (
		dir, output, subtree string
		files                []string
	)
	c := &cobra.Command{
		Use:   "dump [<profile>]",
		Short: "Dumps an Istio configuration profile",
		Long: `The dump subcommand dumps the values in an Istio configuration profile: what an installation with it consists
of, the values of its charts included.`,
		Example: `  istioctl profile dump demo
  istioctl profile dump --config-path components.pilot`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) == 1 && len(files) > 0 {
				return errors.New("cannot specify both profile name and filename flag")
			}
			if len(args) > 1 {
				return errors.New("too many positional arguments")
			}
			return nil
		},
		RunE: func(c *cobra.Command, args []string) error {
			if output != "yaml" && output != "json" {
				return fmt.Errorf("unknown output format %q: use yaml or json", output)
			}
			var sets []string
			if len(args) == 1 {
				names, err := profiles(dir)
				if err != nil {
					return err
				}
				if !slices.Contains(names, args[0]) {
					return fmt.Errorf("there is no profile %q; there are: %s", args[0], strings.Join(names, ", "))
				}
				sets = append(sets, "profile="+args[0])
			}
			if dir != "" {
				sets = append(sets, "installPackagePath="+dir)
			}
			names, done, err := install.Input(images, files, sets, c.InOrStdin())
			if err != nil {
				return err
			}
			defer done()
			profile, err := dump(dir, names, sets)
			if err != nil {
				return err
			}
			out, err := format(profile, subtree, output)
			if err != nil {
				return err
			}
			fmt.Fprint(c.OutOrStdout(), out)
			return nil
		},
	}
	manifestsFlag(c, &dir)
	c.Flags().StringSliceVarP(&files, "filename", "f", nil, "Path to file containing IstioOperator custom resource. "+
		"This flag can be specified multiple times to overlay multiple files. Multiple files are overlaid in left to right order.")
	c.Flags().StringVarP(&output, "output", "o", "yaml", "Output format: one of json|yaml")
	c.Flags().StringVarP(&subtree, "config-path", "p", "", "The path the root of the configuration subtree to dump "+
		"e.g. components.pilot. By default, dump whole tree")
	return c
}

func manifestsFlag(c *cobra.Command, dir *string) {
	c.Flags().StringVarP(dir, "manifests", "d", "", "Specify a path to a directory of charts and profiles "+
		"(e.g. ~/Downloads/istio-1.31.0/manifests).")
}

// profiles lists the profiles in dir, or those embedded in Istio's module.
func profiles(dir string) ([]string, error) {
	entries, err := fs.ReadDir(manifests.BuiltinOrDir(dir), "profiles")
	if err != nil {
		return nil, fmt.Errorf("list the profiles: %w", err)
	}
	var names []string
	for _, e := range entries {
		if name, ok := strings.CutSuffix(e.Name(), ".yaml"); ok && !e.IsDir() {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names, nil
}

// dump returns the settings of an installation: the values of the charts for the profile (in the charts:
// files/profile-<name>.yaml, zzz_profile.yaml), overlaid by the profile and its overrides.
func dump(dir string, files, sets []string) (values.Map, error) {
	merged, err := render.MergeInputs(files, sets, nil)
	if err != nil {
		return nil, err
	}
	name := merged.GetPathString("spec.values.profile")
	if name == "" {
		name = merged.GetPathString("spec.values.global.profile")
	}
	if name == "" {
		return merged, nil
	}
	// All charts hold the same copy.
	content, err := fs.ReadFile(manifests.BuiltinOrDir(dir), path.Join("charts/istio-control/istio-discovery/files", "profile-"+name+".yaml"))
	if err != nil {
		return nil, fmt.Errorf("read the charts' profile %s: %w", name, err)
	}
	base, err := values.MapFromYaml(content)
	if err != nil {
		return nil, fmt.Errorf("read the charts' profile %s: %w", name, err)
	}
	if own, ok := merged.GetPathMap("spec.values"); ok {
		base.MergeFrom(own)
	}
	if err := merged.SetPath("spec.values", map[string]any(base)); err != nil {
		return nil, err
	}
	return merged, nil
}

// format writes a tree, or what is below a path in its spec.
func format(tree values.Map, subtree, output string) (string, error) {
	var v any = tree
	if subtree != "" {
		sub, ok := tree.GetPath("spec." + strings.TrimPrefix(subtree, "spec."))
		if !ok {
			return "", fmt.Errorf("the profile has nothing at %s", subtree)
		}
		v = sub
	}
	if output == "json" {
		b, err := json.MarshalIndent(v, "", "    ")
		if err != nil {
			return "", fmt.Errorf("write the profile: %w", err)
		}
		return string(b) + "\n", nil
	}
	b, err := yaml.Marshal(v)
	if err != nil {
		return "", fmt.Errorf("write the profile: %w", err)
	}
	return string(b), nil
}
