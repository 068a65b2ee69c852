package command

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/distribution/reference"
	"k8s.io/cli-runtime/pkg/genericclioptions"
	"k8s.io/cli-runtime/pkg/genericiooptions"
	"k8s.io/component-base/cli"
	"k8s.io/klog/v2"
	"k8s.io/kubectl/pkg/cmd"
	"k8s.io/kubectl/pkg/cmd/plugin"
	"k8s.io/kubectl/pkg/cmd/util"

	"polymesh.dev/polymesh/pkg/imagestore"
	"polymesh.dev/polymesh/pkg/kubeconfig"
	"polymesh.dev/polymesh/pkg/mesh/istioctl"
	"polymesh.dev/polymesh/pkg/payload"
	"polymesh.dev/polymesh/pkg/signature"
)

// tools are the upstream programs inside this one, by name. Each takes the arguments after its name and returns an exit code.
var tools = map[string]func(args []string) int{
	"kubectl":  runKubectl,
	"istioctl": runIstioctl,
}

// runKubectl is kubectl's own main (cmd/kubectl/kubectl.go upstream).
func runKubectl(args []string) int {
	if err := useClusterKubeconfig(); err != nil {
		fmt.Fprintln(os.Stderr, "kubectl:", err)
		return 1
	}
	// kubectl's commands read it too.
	os.Args = append([]string{"kubectl"}, args...)
	// Like cmd.NewDefaultKubectlCommand, except that it requires a configured cluster.
	streams := genericiooptions.IOStreams{In: os.Stdin, Out: os.Stdout, ErrOut: os.Stderr}
	flags := genericclioptions.NewConfigFlags(true).WithDeprecatedPasswordFlag().WithDiscoveryBurst(300).WithDiscoveryQPS(50.0).WithWarningPrinter(streams)
	requireCluster(flags)
	kubectl := cmd.NewDefaultKubectlCommandWithArgs(cmd.KubectlOptions{
		PluginHandler: cmd.NewDefaultPluginHandler(plugin.ValidPluginFilenamePrefixes), Arguments: os.Args, ConfigFlags: flags, IOStreams: streams,
	})
	if err := cli.RunNoErrOutput(kubectl); err != nil {
		util.CheckErr(err)
	}
	return 0
}

// requireCluster makes a command fail if it uses a cluster and flags select none. Without it client-go connects to
// localhost:8080, and logs five times that this fails.
func requireCluster(flags *genericclioptions.ConfigFlags) {
	kubeconfig.Require(flags, func() {
		if !klog.V(1).Enabled() {
			silenceKlog()
		}
	})
}

func runIstioctl(args []string) int {
	if err := useClusterKubeconfig(); err != nil {
		fmt.Fprintln(os.Stderr, "istioctl:", err)
		return 1
	}
	return istioctl.Run(args, imageAvailable)
}

// imageAvailable returns an error unless a node can get an image: from this file, from this machine's node, or from a registry.
func imageAvailable(ctx context.Context, ref string) error {
	full, err := reference.ParseDockerRef(ref)
	if err != nil {
		return err
	}
	var shipped []string
	if manifest, err := payload.Dir(os.Getenv(payload.EnvDir)).Manifest(); err == nil {
		shipped = manifest.Images
	}
	if slices.Contains(shipped, full.String()) {
		return nil
	}
	if store, err := imagestore.Open(dataDirFromEnv().ContainerdSocket()); err == nil {
		defer store.Close()
		if has, err := store.Has(ctx, full.String()); err == nil && has {
			return nil
		}
	}
	// No registry serves the images of this file.
	for _, image := range shipped {
		if domain, _, _ := strings.Cut(image, "/"); domain == reference.Domain(full) {
			return errors.New("this file does not have it")
		}
	}
	logins, err := signature.UserLogins()
	if err != nil {
		return err
	}
	if _, err := signature.NewRegistry(dataDirFromEnv().RegistryDir(), logins).Digest(ctx, full.String()); err != nil {
		return fmt.Errorf("neither this file nor this machine's node has it, and its registry does not provide it (%w)", err)
	}
	return nil
}
