package command

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"k8s.io/cli-runtime/pkg/genericclioptions"

	"polymesh.dev/polymesh/pkg/imagestore"
	"polymesh.dev/polymesh/pkg/kubeconfig"
	"polymesh.dev/polymesh/pkg/layout"
	"polymesh.dev/polymesh/pkg/progress"
	"polymesh.dev/polymesh/pkg/workflow/image"
)

func newImageLoad() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "load FILE|IMAGE...",
		Short: "Give images without a registry to the cluster",
		Long: `Load gives images to the cluster, from files (OCI or Docker archives) or from the storage of the program that builds. On a server of
the cluster, as root, they are loaded into its containerd; from any other machine, an agent too, they are pushed through the API server of
the kubeconfig, which is allowed to its administrators. They stay until they are removed.

Other nodes get them when a pod starts there, and another server keeps a copy. The tag latest is not accepted: its meaning changes.`,
		Example: "  polymesh image load api.tar\n  polymesh image load shop/api:1.0.0 --kubeconfig other.yaml",
		Args:    someArgs("an image: a file, or a name"),
	}
	flags := clusterFlags(cmd)
	var dataDir layout.DataDir
	dataDirFlag(cmd, &dataDir)
	engine := cmd.Flags().String("engine", "", "the program whose storage has the images: "+strings.Join(image.EngineNames(), ", ")+" (default: the first that works)")
	complete(cmd, "engine", image.EngineNames())
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := useClusterKubeconfig(); err != nil {
			return err
		}
		ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
		defer stop()
		to, err := loadDestination(ctx, flags, dataDir)
		if err != nil {
			return err
		}
		defer to.Close()
		steps := progress.New(cmd.ErrOrStderr())
		if notice := to.Notice(); notice != "" {
			steps.Print("%s", notice)
		}
		reader := image.Reader{Engine: func(ctx context.Context) (image.Engine, error) { return image.Find(ctx, *engine) }}
		for _, arg := range args {
			err := steps.Do("image "+arg, func(step *progress.Step) (string, error) {
				return loadImage(ctx, reader, to, arg, func(note string) { step.Note("%s", note) })
			})
			if err != nil {
				return interrupted(err)
			}
		}
		return nil
	}
	return cmd
}

func loadDestination(ctx context.Context, flags *genericclioptions.ConfigFlags, dataDir layout.DataDir) (image.Destination, error) {
	config, err := flags.ToRESTConfig()
	if err != nil {
		return nil, kubeconfig.None(err)
	}
	// What an agent says that a tag means is believed by no other node.
	return image.OpenDestination(ctx, dataDir.ContainerdSocket(), []string{dataDir.ServerAuthority()}, config, imagestore.ImagesPath)
}

// loadImage loads a file, or an image of the program that builds, and returns what was done.
func loadImage(ctx context.Context, reader image.Reader, to image.Destination, arg string, note func(string)) (string, error) {
	from := image.FromEngine
	if _, err := os.Stat(arg); err == nil {
		from = image.FromArchive
	}
	found, err := reader.Read(ctx, arg, from)
	if err != nil {
		return "", err
	}
	defer found.Close()
	form, file, _ := strings.Cut(found.Location, ":")
	if form != "oci-archive" && form != "docker-archive" {
		return "", errors.New(filepath.Base(file) + " is not an archive: pack the folder with `tar -cf image.tar -C FOLDER .`")
	}
	list, done, err := image.OpenArchive(file)
	if err != nil {
		return "", err
	}
	defer done()
	for _, i := range list {
		_, tag := image.Cut(i.Name)
		if err := imagestore.CheckTag(tag); err != nil {
			return "", fmt.Errorf("%s: %w", i.Name, err)
		}
	}
	if err := to.LoadAll(ctx, file, list, note); err != nil {
		return "", err
	}
	if to.Notice() != "" {
		return "pushed", nil
	}
	return "loaded", nil
}
