package deploy

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sync/errgroup"

	"polymesh.dev/polymesh/pkg/certificate"
	"polymesh.dev/polymesh/pkg/image"
	"polymesh.dev/polymesh/pkg/node"
	"polymesh.dev/polymesh/pkg/progress"
	"polymesh.dev/polymesh/pkg/project"
	"polymesh.dev/polymesh/pkg/scanner"
	"polymesh.dev/polymesh/pkg/signature"
)

// parallelBuilds is how many images are built at once: each build is a compiler that takes all cores.
const parallelBuilds = 2

// buildImages builds and moves the images that changed, and puts their names into the manifests.
func (d *deployment) buildImages(ctx context.Context) error {
	d.built = map[string]image.Ref{}
	type job struct {
		service project.Service
		source  image.Source
		ref     image.Ref
	}
	var jobs []job
	for _, c := range containers(d.objects) {
		s, ok := d.serviceOf(c.image)
		if !ok {
			continue
		}
		ref, ok := d.built[s.Name]
		if !ok {
			source := image.Source{Context: filepath.Join(d.Project.Dir, s.Context), Dockerfile: s.Dockerfile, Target: s.Target, Args: s.Args}
			for _, mount := range s.Mounts {
				source.Mounts = append(source.Mounts, d.Project.Path(mount))
			}
			fingerprint, err := source.Fingerprint()
			if err != nil {
				return fmt.Errorf("service %s: %w", s.Name, err)
			}
			if ref, err = image.Name(c.image, d.Project.Registry, fingerprint); err != nil {
				return fmt.Errorf("service %s: %w", s.Name, err)
			}
			d.built[s.Name] = ref
			jobs = append(jobs, job{s, source, ref})
		}
		c.content["image"] = ref.Short
	}
	if len(jobs) == 0 || d.dry {
		for _, j := range jobs {
			d.result.Images = append(d.result.Images, Image{Service: j.service.Name, Ref: j.ref.Short})
		}
		return nil
	}

	// An engine is looked for only when there is something to build: a second deploy needs none.
	m := mover{registry: d.Project.Registry != "", engine: sync.OnceValues(func() (image.Engine, error) { return image.Find(ctx, d.Engine) })}
	if d.SBOM != "" {
		if err := os.MkdirAll(d.SBOM, 0o755); err != nil {
			return err
		}
	}
	if !m.registry {
		store, err := node.OpenImageStore(d.ContainerdSocket)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
			return fmt.Errorf("images cannot be loaded: no Polymesh server runs on this machine, or this user may not use its containerd (%w). Use --registry for another cluster, sudo for this one", err)
		}
		if err != nil {
			return err
		}
		defer store.Close()
		m.store = store
	}
	d.result.Images = make([]Image, len(jobs))
	// Each build takes as long as it takes; the first that fails ends the others.
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(parallelBuilds)
	for i, j := range jobs {
		g.Go(func() error {
			return d.Steps.Do("image "+j.ref.Short, func(step *progress.Step) (string, error) {
				out, err := m.bring(ctx, j.source, j.ref, d.Rebuild, func(note string) { step.Note("%s", note) })
				if err != nil {
					return "", fmt.Errorf("service %s: %w", j.service.Name, err)
				}
				if !m.registry {
					// So that the kubelet keeps it, and what a rollback goes back to.
					if err := m.store.Deployed(ctx, j.ref.Full, d.Project.Name, j.service.Name); err != nil {
						return "", fmt.Errorf("service %s: %w", j.service.Name, err)
					}
				}
				out.Service, out.Ref = j.service.Name, j.ref.Short
				if err := d.attest(ctx, m, j.ref, &out, step); err != nil {
					return "", fmt.Errorf("service %s: %w", j.service.Name, err)
				}
				d.result.Images[i] = out
				return out.said(m.registry), nil
			})
		})
	}
	return g.Wait()
}

func (i Image) said(registry bool) string {
	said := []string{"loaded"}
	switch {
	case !i.Built && !i.Moved:
		said = []string{"unchanged"}
	case registry:
		said = []string{"pushed"}
	}
	if i.Built {
		said = append([]string{"built"}, said...)
	}
	if i.Digest != "" {
		said = append(said, "signed")
	}
	return strings.Join(said, ", ")
}

// attest signs an image where it now is, and writes down what it is made of. It does so for images that are unchanged,
// too: they may be of a deploy without.
func (d *deployment) attest(ctx context.Context, m mover, ref image.Ref, out *Image, step *progress.Step) error {
	if d.SBOM != "" {
		out.SBOM = filepath.Join(d.SBOM, sbomName(out.Service, ref.Short))
		if _, err := os.Stat(out.SBOM); err != nil || out.Built {
			step.Note("listing what it is made of")
			if err := d.writeSBOM(ctx, m, ref, out.SBOM); err != nil {
				return err
			}
		}
	}
	if d.Signer == nil {
		return nil
	}
	step.Note("signing")
	var place signature.Place
	if m.registry {
		logins, err := signature.UserLogins()
		if err != nil {
			return err
		}
		place = signature.NewRegistry(d.RegistryDir, logins)
	} else {
		place = m.store.Signatures()
	}
	signed, _, err := signature.Sign(ctx, d.Signer, ref.Full, place)
	out.Digest = signed.Digest.String()
	return err
}

// sbomName has the tag in it, and so the hash of what the image was built of: one that is there is of this image.
func sbomName(service, ref string) string {
	_, tag := image.Cut(ref)
	return service + "-" + tag + ".cdx.json"
}

func (d *deployment) writeSBOM(ctx context.Context, m mover, ref image.Ref, file string) error {
	reader, from := image.Reader{Engine: func(context.Context) (image.Engine, error) { return m.engine() }}, image.FromEngine
	if !m.registry {
		reader.Node, from = m.store, image.FromNode
	}
	archive, err := reader.Read(ctx, ref.Full, from)
	if err != nil {
		return err
	}
	defer archive.Close()
	var text bytes.Buffer
	if err := d.Scanner.SBOM(ctx, scanner.Image{Name: ref.Short, Location: archive.Location}, scanner.SBOMFormats()[0], &text); err != nil {
		return err
	}
	return certificate.WriteFile(file, text.Bytes(), 0o644)
}

// mover brings a built image to where nodes get it.
type mover struct {
	registry bool
	store    *node.ImageStore
	engine   func() (image.Engine, error)
}

func (m mover) bring(ctx context.Context, source image.Source, ref image.Ref, rebuild bool, note func(string)) (Image, error) {
	var out Image
	if !m.registry && !rebuild {
		if has, err := m.store.Has(ctx, ref.Full); err != nil || has {
			return out, err
		}
	}
	e, err := m.engine()
	if err != nil {
		return out, err
	}
	has, err := e.Has(ctx, ref.Full)
	if err != nil {
		return out, err
	}
	if !has || rebuild {
		note("building with " + e.Name())
		if err := e.Build(ctx, ref.Full, source, io.Discard); err != nil {
			return out, err
		}
		out.Built = true
	}
	out.Moved = true
	if m.registry {
		note("pushing")
		return out, e.Push(ctx, ref.Full, io.Discard)
	}
	note("loading")
	dir, err := os.MkdirTemp("", "polymesh-image-")
	if err != nil {
		return out, err
	}
	defer os.RemoveAll(dir)
	archive := filepath.Join(dir, "image.tar")
	if err := e.Save(ctx, ref.Full, archive, io.Discard); err != nil {
		return out, err
	}
	return out, m.store.Import(ctx, archive, nil)
}

// imagePullAlways are containers that would ask a registry for an image that only this node has.
func (d *deployment) imagePullAlways() []container {
	return slices.DeleteFunc(containers(d.objects), func(c container) bool {
		_, ours := d.serviceOf(c.image)
		return !ours || d.Project.Registry != "" || c.content["imagePullPolicy"] != "Always"
	})
}
