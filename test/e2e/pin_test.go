//go:build e2e

package e2e

import (
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// An image that no registry has could not be pulled again: the kubelet's garbage collection, which uses CRI's data, must keep
// it. And a missing shipped image is not pulled from the owner of the domain in its name.
func TestImagesThatNoRegistryHasStay(t *testing.T) {
	n := app(t)
	importEcho(t, n)
	conn, err := grpc.NewClient("unix://"+n.Layout().ContainerdSocket(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	images := cri.NewImageServiceClient(conn)

	// Shipped, imported by `make up` and imported by `polymesh ctr`.
	for _, name := range []string{"registry.polymesh.dev/coredns:", "go-service:1.0.0", echoImage} {
		n.Eventually(t, time.Minute, func() (bool, string) {
			list, err := images.ListImages(t.Context(), &cri.ListImagesRequest{})
			if err != nil {
				return false, err.Error()
			}
			for _, image := range list.Images {
				for _, tag := range image.RepoTags {
					if strings.Contains(tag, name) {
						return image.Pinned, tag + " is not pinned: the kubelet would remove it when the disk fills up"
					}
				}
			}
			return false, "CRI lists no image " + name
		})
	}

	_, err = images.PullImage(t.Context(), &cri.PullImageRequest{Image: &cri.ImageSpec{Image: "registry.polymesh.dev/coredns:missing"}})
	if err == nil || !strings.Contains(err.Error(), "not found") {
		t.Errorf("a shipped image that is missing: %v", err)
	}
}

// An object of an add-on that someone deletes comes back without a restart.
func TestAddonComesBack(t *testing.T) {
	n := app(t)
	n.Kubectl(t, "delete", "service", "metrics-server", "-n", "kube-system")
	n.Eventually(t, 2*time.Minute, func() (bool, string) {
		out, err := n.KubectlErr("get", "service", "metrics-server", "-n", "kube-system", "-o", "name")
		return err == nil, "the deleted Service is not back: " + out
	})
	n.WaitReady(t, 2*time.Minute)
}
