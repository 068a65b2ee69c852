package command

import (
	"errors"
	"fmt"
	"os/signal"
	"slices"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"polymesh.dev/polymesh/pkg/progress"
	"polymesh.dev/polymesh/pkg/workflow/baseimage"
)

// basesResult is the result of `image bases`, for programs.
type basesResult struct {
	Images []baseImage `json:"images"`
}

type baseImage struct {
	Ref  string `json:"ref"`
	Made bool   `json:"made"`
}

func newImageBases() *cobra.Command {
	var langs []string
	var output string
	cmd := &cobra.Command{
		Use:   "bases",
		Short: "Build the base images of services from Debian packages",
		Long: `Bases builds the images in the FROM lines of ` + "`polymesh new`" + `'s services, under the same names, where there is no registry to pull
them from: from Debian 12's packages and, for Go, Node.js and Rust, from this machine's toolchains. They go into buildah's storage
of the user who runs it, where ` + "`polymesh deploy`" + ` of the same user finds them. Existing images of the same name from another source
are kept.

It uses apt's sources for Debian's packages, or DEBIAN_MIRROR and DEBIAN_SECURITY_MIRROR.`,
		Example: "  polymesh image bases\n  polymesh image bases --lang go,python",
		Args:    cobra.NoArgs,
	}
	cmd.Flags().StringSliceVar(&langs, "lang", baseimage.Languages(), "languages whose images are built: "+strings.Join(baseimage.Languages(), ", "))
	force := cmd.Flags().Bool("force", false, "rebuild images that it has built before, with Debian's updates")
	complete(cmd, "lang", baseimage.Languages())
	outputFlag(cmd, &output)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := checkOutput(output); err != nil {
			return err
		}
		for _, lang := range langs {
			if !slices.Contains(baseimage.Languages(), lang) {
				return fmt.Errorf("--lang %q is not one of %s", lang, strings.Join(baseimage.Languages(), ", "))
			}
		}
		ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
		defer stop()
		steps := progress.New(cmd.ErrOrStderr())
		var result basesResult
		err := steps.Do("base images for "+strings.Join(langs, ", "), func(step *progress.Step) (string, error) {
			made, err := baseimage.Make(ctx, langs, *force, func(ref string) { step.Note("%s", ref) })
			for _, lang := range langs {
				for _, ref := range baseimage.Images(lang) {
					if !slices.ContainsFunc(result.Images, func(i baseImage) bool { return i.Ref == ref }) {
						result.Images = append(result.Images, baseImage{ref, slices.Contains(made, ref)})
					}
				}
			}
			if len(made) == 0 {
				return "unchanged", err
			}
			return fmt.Sprintf("%d made", len(made)), err
		})
		if done, printErr := printAs(cmd.OutOrStdout(), output, result); done {
			return errors.Join(err, printErr)
		}
		return interrupted(err)
	}
	return cmd
}
