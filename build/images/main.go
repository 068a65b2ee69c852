// The images program assembles the container images from our binaries and Debian packages, without a base image and
// without a registry, and writes them as one OCI archive. The same input always gives the same bytes. The Makefile calls
// it; the archive becomes images/polymesh.tar in the payload.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"time"

	"polymesh.dev/polymesh/build/compress"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "images:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("images", flag.ExitOnError)
	var (
		programs  = flags.String("programs", "", "directory of our static programs")
		packages  = flags.String("debian", "", "directory of the Debian packages")
		bootstrap = flags.String("bootstrap", "", "Istio's template of Envoy's bootstrap configuration")
		registry  = flags.String("registry", "", "registry in the images' names")
		envoy     = flags.String("envoy-version", "", "Envoy's version")
		epoch     = flags.Int64("epoch", 0, "time stamp of everything in the images, in seconds since 1970")
		cache     = flags.String("cache", "", "directory that keeps compressed layers")
		level     = flags.Int("level", compress.Shipped, "how hard zstd compresses the layers")
		output    = flags.String("o", "", "the archive to write")
	)
	flags.Usage = func() {
		fmt.Fprintln(flags.Output(), "usage: images [flags] <image>=<tag> ...")
		flags.PrintDefaults()
	}
	if err := flags.Parse(args); err != nil {
		return err
	}
	tags := map[string]string{}
	for _, argument := range flags.Args() {
		name, tag, ok := strings.Cut(argument, "=")
		if !ok || tag == "" {
			return fmt.Errorf("%q is not <image>=<tag>", argument)
		}
		tags[name] = tag
	}

	stamp := time.Unix(*epoch, 0).UTC()
	b := builder{
		programs:  *programs,
		bootstrap: *bootstrap,
		envoy:     *envoy,
		debian:    debian{dir: *packages},
		archive:   newArchive(stamp, compress.Store{Dir: *cache, Level: *level}),
	}
	for _, image := range b.images() {
		tag, ok := tags[image.name]
		if !ok {
			continue // tests build only some of them
		}
		delete(tags, image.name)
		layers, err := b.layers(ctx, image.parts)
		if err != nil {
			return fmt.Errorf("make %s: %w", image.name, err)
		}
		reference := *registry + "/" + image.name + ":" + tag
		if err := b.archive.add(reference, tag, image.config, layers); err != nil {
			return err
		}
		size := int64(0)
		for _, l := range layers {
			size += l.descriptor.Size
		}
		fmt.Printf("%-58s %6.1f MB\n", reference, float64(size)/1e6)
	}
	for name := range tags {
		return fmt.Errorf("there is no image %s", name)
	}

	out, err := os.Create(*output)
	if err != nil {
		return fmt.Errorf("write the archive: %w", err)
	}
	if err := b.archive.write(out); err != nil {
		out.Close()
		return fmt.Errorf("write the archive: %w", err)
	}
	if err := out.Close(); err != nil {
		return fmt.Errorf("write the archive: %w", err)
	}
	return nil
}
