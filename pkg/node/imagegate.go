package node

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// imageGate is containerd's image service for the kubelet. A question about an image that is still being imported is answered when it is
// there: otherwise the kubelet would report an error, and try again only after a backoff. Everything else is containerd's.
type imageGate struct {
	runtimeapi.UnimplementedImageServiceServer
	runtime string
	await   func(ctx context.Context, ref string) error

	server     *grpc.Server
	connection *grpc.ClientConn
	client     runtimeapi.ImageServiceClient
}

// maxImageMessage, in bytes, is the kubelet's own limit for answers (k8s.io/cri-client, maxMsgSize).
const maxImageMessage = 16 << 20

func newImageGate(runtime string, await func(context.Context, string) error) *imageGate {
	return &imageGate{runtime: runtime, await: await}
}

// start serves on a socket of root's.
func (g *imageGate) start(socket string) (err error) {
	// One of a process that was killed.
	if err := os.Remove(socket); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	g.connection, err = grpc.NewClient("unix://"+g.runtime, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxImageMessage)))
	if err != nil {
		return err
	}
	g.client = runtimeapi.NewImageServiceClient(g.connection)
	listener, err := net.Listen("unix", socket)
	if err != nil {
		return errors.Join(err, g.connection.Close())
	}
	if err := os.Chmod(socket, 0o600); err != nil {
		return errors.Join(err, listener.Close(), g.connection.Close())
	}
	g.server = grpc.NewServer()
	runtimeapi.RegisterImageServiceServer(g.server, g)
	go func() { _ = g.server.Serve(listener) }()
	return nil
}

// stop ends all requests.
func (g *imageGate) stop() {
	if g.server != nil {
		g.server.Stop()
		_ = g.connection.Close()
	}
}

// known returns when containerd's image service has an image, which was imported by containerd's own API.
func (g *imageGate) known(ctx context.Context, ref string) error {
	ctx, cancel := context.WithTimeout(ctx, knownTime)
	defer cancel()
	for {
		r, err := g.client.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: ref}})
		if err == nil && r.GetImage() != nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s was imported, and containerd's image service does not have it: %w", ref, errors.Join(err, ctx.Err()))
		case <-time.After(knownPoll):
		}
	}
}

const (
	knownPoll = 10 * time.Millisecond
	// knownTime is for a machine under load: it takes milliseconds.
	knownTime = time.Minute
)

// ImageStatus is what the kubelet asks before it starts a container, with each pull policy.
func (g *imageGate) ImageStatus(ctx context.Context, r *runtimeapi.ImageStatusRequest) (*runtimeapi.ImageStatusResponse, error) {
	if err := g.await(ctx, r.GetImage().GetImage()); err != nil {
		return nil, err
	}
	return g.client.ImageStatus(ctx, r)
}

func (g *imageGate) PullImage(ctx context.Context, r *runtimeapi.PullImageRequest) (*runtimeapi.PullImageResponse, error) {
	return g.client.PullImage(ctx, r)
}

func (g *imageGate) RemoveImage(ctx context.Context, r *runtimeapi.RemoveImageRequest) (*runtimeapi.RemoveImageResponse, error) {
	return g.client.RemoveImage(ctx, r)
}

func (g *imageGate) ListImages(ctx context.Context, r *runtimeapi.ListImagesRequest) (*runtimeapi.ListImagesResponse, error) {
	return g.client.ListImages(ctx, r)
}

func (g *imageGate) ImageFsInfo(ctx context.Context, r *runtimeapi.ImageFsInfoRequest) (*runtimeapi.ImageFsInfoResponse, error) {
	return g.client.ImageFsInfo(ctx, r)
}

// StreamImages is ListImages without a limit of size.
func (g *imageGate) StreamImages(r *runtimeapi.StreamImagesRequest, to grpc.ServerStreamingServer[runtimeapi.StreamImagesResponse]) error {
	from, err := g.client.StreamImages(to.Context(), r)
	if err != nil {
		return err
	}
	for {
		part, err := from.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := to.Send(part); err != nil {
			return err
		}
	}
}
