package main

import (
	"context"

	"golang.org/x/sync/errgroup"
	"k8s.io/client-go/kubernetes"

	"polymesh.dev/polymesh/test/e2e/node"
)

// creators is how many requests createEach sends at the same time.
const creators = 8

// unlimited returns a client that sends requests as fast as the API server responds, on a connection of its own: client-go shares none
// between clients with a dialer.
func unlimited(n *node.Node) (*kubernetes.Clientset, error) {
	config, err := n.ClientConfig()
	if err != nil {
		return nil, err
	}
	config.QPS = -1
	return kubernetes.NewForConfig(config)
}

// createEach calls create for the numbers from first up to, but not including, end, with a client for all of them.
func createEach(ctx context.Context, n *node.Node, first, end int, create func(ctx context.Context, client kubernetes.Interface, i int) error) error {
	client, err := unlimited(n)
	if err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(creators)
	for i := first; i < end; i++ {
		g.Go(func() error { return create(ctx, client, i) })
	}
	return g.Wait()
}
