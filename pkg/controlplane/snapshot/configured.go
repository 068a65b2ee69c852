package snapshot

import (
	"context"
	"slices"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/kubeconfig"
)

// Configured returns the snapshots of a server with this configuration, and this datastore.
func Configured(cfg *config.Server, node string, store Source) (*Snapshots, error) {
	o := Options{
		DataDir: cfg.DataDir, Dir: cfg.Snapshots.Dir, Node: node, ConfigFile: cfg.ConfigFile, Settings: cfg.ClusterFlags,
		Datastore: store, Outside: cfg.Datastore.Kind != config.SQLite, Passphrase: cfg.Snapshots.Passphrase, Images: imagesInUse(cfg.DataDir.Kubeconfig("polymesh")),
	}
	if o.Dir == "" {
		o.Dir = DefaultDir(cfg.DataDir)
	}
	if cfg.Snapshots.S3 != nil {
		var err error
		if o.Bucket, err = NewBucket(*cfg.Snapshots.S3); err != nil {
			return nil, err
		}
	}
	return New(o), nil
}

// imagesInUse returns a function that returns the images of all pods.
func imagesInUse(file string) func(context.Context) ([]string, error) {
	return func(ctx context.Context) ([]string, error) {
		client, err := kubeconfig.Client(file, nil)
		if err != nil {
			return nil, err
		}
		var images []string
		for options := (metav1.ListOptions{Limit: 500}); ; {
			pods, err := client.CoreV1().Pods(metav1.NamespaceAll).List(ctx, options)
			if err != nil {
				return nil, err
			}
			for _, p := range pods.Items {
				for _, c := range slices.Concat(p.Spec.InitContainers, p.Spec.Containers) {
					images = append(images, c.Image)
				}
				for _, c := range p.Spec.EphemeralContainers {
					images = append(images, c.Image)
				}
			}
			if options.Continue = pods.Continue; options.Continue == "" {
				break
			}
		}
		slices.Sort(images)
		return slices.Compact(images), nil
	}
}

// Before returns a function that saves a snapshot before a step that is named by it.
func (s *Snapshots) Before(name string) func(context.Context) error {
	return func(ctx context.Context) error {
		info, err := s.Save(ctx, name)
		if info != nil {
			return nil // it is saved here, if not in S3
		}
		return err
	}
}
