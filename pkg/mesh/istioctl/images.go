package istioctl

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"google.golang.org/protobuf/types/known/structpb"
	opconfig "istio.io/istio/operator/pkg/apis"
	"istio.io/istio/operator/pkg/render"
	"istio.io/istio/operator/pkg/util/clog"
	"istio.io/istio/operator/pkg/values"
	"istio.io/istio/pkg/kube/inject"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

// Available reports whether a node can get an image: nil, or the reason why it cannot.
type Available func(ctx context.Context, image string) error

// skipImageCheck is the flag that skips the check.
const skipImageCheck = "skip-image-check"

// imageCheckTimeout is the time limit for queries to the registries of all images.
const imageCheckTimeout = 20 * time.Second

// checkImages refuses an installation whose images are not available to nodes, before it changes the cluster. Upstream's
// installer does not check, and does not wait for DaemonSets and sidecars: it would report "installed successfully". files and
// sets are the installer's flags.
func checkImages(ctx context.Context, available Available, files, sets []string) error {
	manifests, merged, err := render.GenerateManifest(files, sets, true, nil, clog.NewConsoleLogger(io.Discard, io.Discard, nil))
	if err != nil {
		return fmt.Errorf("find the installation's images: %w", err)
	}
	var images []string
	add := func(image string) {
		// Gateways use the proxy image, which injection fills in.
		if image != "" && image != "auto" && !slices.Contains(images, image) {
			images = append(images, image)
		}
	}
	for _, set := range manifests {
		for _, m := range set.Manifests {
			for _, field := range []string{"containers", "initContainers"} {
				containers, _, _ := unstructured.NestedSlice(m.Object, "spec", "template", "spec", field)
				for _, item := range containers {
					container, _ := item.(map[string]any)
					image, _ := container["image"].(string)
					add(image)
				}
			}
			if m.GetKind() == "ConfigMap" && strings.HasPrefix(m.GetName(), "istio-sidecar-injector") {
				add(proxyImage(merged))
			}
		}
	}
	ctx, cancel := context.WithTimeout(ctx, imageCheckTimeout)
	defer cancel()
	problems := make([]error, len(images))
	var wg sync.WaitGroup
	for i, image := range images {
		wg.Go(func() { problems[i] = available(ctx, image) })
	}
	wg.Wait()
	var missing []string
	for i, image := range images {
		if problems[i] != nil {
			missing = append(missing, fmt.Sprintf("  %s: %v", image, problems[i]))
		}
	}
	if len(missing) == 0 {
		return nil
	}
	slices.Sort(missing)
	return fmt.Errorf("nothing was changed: these images of the installation are not available:\n%s\nImport them (polymesh ctr images import FILE), or use a hub that has them (--set hub=…). "+
		"To install anyway, for nodes that can pull them: --%s", strings.Join(missing, "\n"), skipImageCheck)
}

// proxyImage returns the image of sidecars, built from the values as the injector does it.
func proxyImage(merged values.Map) string {
	text := func(path string) string {
		v, ok := merged.GetPath("spec.values.global." + path)
		if !ok || v == nil {
			return ""
		}
		return fmt.Sprint(v)
	}
	if image := text("proxy.image"); strings.Contains(image, "/") {
		return image
	}
	return inject.ProxyImage(&opconfig.Values{Global: &opconfig.GlobalConfig{
		Hub: text("hub"), Tag: structpb.NewStringValue(text("tag")), Variant: text("variant"),
		Proxy: &opconfig.ProxyConfig{Image: text("proxy.image")},
	}}, nil, nil)
}

// withImageCheck makes a command check the images first. It must be applied before underlay, which changes the files.
func withImageCheck(c *cobra.Command, available Available) {
	skip := c.Flags().Bool(skipImageCheck, false, "Install even if images are missing from this file, this machine's node and the registries")
	run := c.RunE
	c.RunE = func(c *cobra.Command, args []string) error {
		if !*skip {
			files, ok := c.Flags().Lookup("filename").Value.(pflag.SliceValue)
			if !ok {
				return errors.New("--filename is not a list of files in this version of Istio")
			}
			if err := checkImages(c.Context(), available, files.GetSlice(), sets(c.Flags())); err != nil {
				return err
			}
		}
		return run(c, args)
	}
}
