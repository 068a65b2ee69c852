package deploy

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"

	"polymesh.dev/polymesh/pkg/atomicfile"
	"polymesh.dev/polymesh/pkg/imagestore"
	"polymesh.dev/polymesh/pkg/progress"
	"polymesh.dev/polymesh/pkg/signature"
	"polymesh.dev/polymesh/pkg/workflow/image"
	"polymesh.dev/polymesh/pkg/workflow/project"
	"polymesh.dev/polymesh/pkg/workflow/scanner"
)

// parallelBuilds is how many images are built at once: each build can use all cores.
const parallelBuilds = 2

// job is the image of a service that is built.
type job struct {
	service project.Service
	source  image.Source
	ref     image.Ref
}

// source returns what a service's image is built from.
func source(p *project.Project, s project.Service) image.Source {
	source := image.Source{Context: p.Path(s.Context), Dockerfile: s.Dockerfile, Target: s.Target, Args: s.Args, Network: s.Network, Settings: s.Settings}
	for _, mount := range s.Mounts {
		source.Mounts = append(source.Mounts, p.Path(mount))
	}
	return source
}

// nameImages sets the names of the images in the manifests. They contain hashes of what the images are built from, so nothing
// needs to be built yet.
func (d *deployment) nameImages(ctx context.Context) (err error) {
	var step *progress.Step
	defer func() {
		switch {
		case step == nil:
		case err != nil:
			step.Fail()
		default:
			step.Done("")
		}
	}()
	note := func(text string) {
		if step == nil {
			step = d.Steps.Start("base images")
		}
		step.Note("%s", text)
	}
	if d.dry {
		note = nil // nothing is pulled
	}
	named := map[string]image.Ref{}
	for _, c := range containers(d.objects) {
		s, ok := d.serviceOf(c.image)
		if !ok {
			continue
		}
		ref, ok := named[s.Name]
		if !ok {
			if err := d.openMover(ctx); err != nil {
				return err
			}
			source := source(d.Project, s)
			if err := d.readBases(ctx, &source, note); err != nil {
				return fmt.Errorf("service %s: %w", s.Name, err)
			}
			fingerprint, err := source.Fingerprint()
			if err != nil {
				return fmt.Errorf("service %s: %w", s.Name, err)
			}
			if ref, err = image.Name(c.image, d.Project.Registry, fingerprint); err != nil {
				return fmt.Errorf("service %s: %w", s.Name, err)
			}
			named[s.Name] = ref
			d.images = append(d.images, job{s, source, ref})
		}
		c.content["image"] = ref.Short
	}
	return nil
}

// readBases reads which base images a build starts from. Without a program that builds they are unknown; a build from scratch
// needs none.
func (d *deployment) readBases(ctx context.Context, source *image.Source, note func(string)) error {
	names, err := source.Bases()
	if err != nil || len(names) == 0 {
		return err
	}
	e, err := d.mover.engine()
	if err != nil {
		return nil
	}
	return source.ReadBases(ctx, e, d.mover.bases(), note)
}

// openMover sets d.mover, which close closes.
func (d *deployment) openMover(ctx context.Context) error {
	if d.mover.engine != nil {
		return nil
	}
	d.mover = mover{registry: d.Project.Registry != "", engine: sync.OnceValues(func() (image.Engine, error) { return image.Find(ctx, d.Engine) })}
	if d.mover.registry || d.dry {
		return nil
	}
	to, err := image.OpenDestination(ctx, d.ContainerdSocket, d.Authorities, d.cluster.REST, imagestore.BuildsPath)
	if err != nil {
		return err
	}
	d.mover.to = to
	if notice := to.Notice(); notice != "" {
		d.Steps.Print("%s", notice)
	}
	return nil
}

func (d *deployment) close() error {
	if d.mover.to == nil {
		return nil
	}
	return d.mover.to.Close()
}

// buildImages builds the images that changed, and brings them to where nodes pull them from.
func (d *deployment) buildImages(ctx context.Context) error {
	jobs, m := d.images, d.mover
	if len(jobs) == 0 || d.dry {
		for _, j := range jobs {
			d.result.Images = append(d.result.Images, Image{Service: j.service.Name, Ref: j.ref.Short})
		}
		return nil
	}
	if d.SBOM != "" {
		if err := os.MkdirAll(d.SBOM, 0o755); err != nil {
			return err
		}
	}
	project, err := newSet(d.cluster, d.Project)
	if err != nil {
		return err
	}
	d.result.Images = make([]Image, len(jobs))
	// Builds have no time limit; the first that fails ends the others.
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(parallelBuilds)
	for i, j := range jobs {
		g.Go(func() error {
			return d.Steps.Do("image "+j.ref.Short, func(step *progress.Step) (string, error) {
				out, err := d.provide(ctx, m, j, step)
				if err != nil {
					return "", fmt.Errorf("service %s: %w", j.service.Name, err)
				}
				if !m.registry {
					// So that the kubelet keeps it, and the one for a rollback.
					if err := m.to.Deployed(ctx, j.ref.Full, project.ID(), j.service.Name); err != nil {
						return "", fmt.Errorf("service %s: %w", j.service.Name, err)
					}
				}
				d.result.Images[i] = out
				return out.summary(m.pushes()), nil
			})
		})
	}
	return g.Wait()
}

func (i Image) summary(pushed bool) string {
	done := []string{"loaded"}
	switch {
	case !i.Built && !i.Moved:
		done = []string{"unchanged"}
	case pushed:
		done = []string{"pushed"}
	}
	if i.Built {
		done = append([]string{"built"}, done...)
	}
	if i.Digest != "" {
		done = append(done, "signed")
	}
	return strings.Join(done, ", ")
}

// provide moves an image to where nodes pull it from, signs it there, and writes its bill of materials.
func (d *deployment) provide(ctx context.Context, m mover, j job, step *progress.Step) (Image, error) {
	note := func(note string) { step.Note("%s", note) }
	var place signature.Place
	if d.Signer != nil {
		var err error
		if place, err = d.place(m); err != nil {
			return Image{}, err
		}
	}
	out, err := m.bring(ctx, j.source, j.ref, d.Rebuild, note)
	if err != nil {
		return out, err
	}
	if d.Signer != nil && !out.Built {
		// An existing image of this name may be from another user: only one with this key's signature is used.
		signed, err := d.Signer.Public().Verify(ctx, j.ref.Full, place)
		switch {
		case err == nil:
			out.Digest = signed.Digest.String()
		case errors.Is(err, signature.ErrUnsigned):
			note("building, because the existing image is not signed with this key")
			if out, err = m.bring(ctx, j.source, j.ref, true, note); err != nil {
				return out, err
			}
		default:
			return out, err
		}
	}
	out.Service, out.Ref = j.service.Name, j.ref.Short
	if d.SBOM != "" {
		out.SBOM = filepath.Join(d.SBOM, sbomName(out.Service, j.ref.Short))
		if _, err := os.Stat(out.SBOM); err != nil || out.Built {
			note("listing its contents")
			if err := d.writeSBOM(ctx, m, j.ref, out.SBOM); err != nil {
				return out, err
			}
		}
	}
	if d.Signer == nil || out.Digest != "" {
		return out, nil
	}
	note("signing")
	stored, config, err := signature.Stored(ctx, j.ref.Full, place)
	if err != nil {
		return out, err
	}
	// Since the build, the name may have been given to another image.
	if out.id == "" || config != out.id && stored.Digest != out.id {
		return out, fmt.Errorf("%s in %s is not the image that was built (%s): it is not signed", stored, place, out.id)
	}
	signed, _, err := signature.Sign(ctx, d.Signer, stored.String(), place)
	out.Digest = signed.Digest.String()
	return out, err
}

// place returns where images and their signatures are.
func (d *deployment) place(m mover) (signature.Place, error) {
	if !m.registry {
		return m.to.SignedPlace(), nil
	}
	return image.SignedRegistry(d.RegistryDir)
}

// sbomName returns a name with the tag, which has the hash of what the image was built from: an existing file is for this image.
func sbomName(service, ref string) string {
	_, tag := image.Cut(ref)
	return service + "-" + tag + ".cdx.json"
}

func (d *deployment) writeSBOM(ctx context.Context, m mover, ref image.Ref, file string) error {
	reader, from := image.Reader{Engine: func(context.Context) (image.Engine, error) { return m.engine() }}, image.FromEngine
	if !m.registry {
		reader.Node, from = m.to, image.FromNode
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
	return atomicfile.Write(file, text.Bytes(), 0o644)
}

// mover moves a built image to where nodes pull it from.
type mover struct {
	registry bool
	// to is nil with a registry.
	to     image.Destination
	engine func() (image.Engine, error)
}

// pushes reports whether images are sent elsewhere.
func (m mover) pushes() bool { return m.to == nil || m.to.Notice() != "" }

// bases returns where base images are, beside the program that builds; nil for nowhere.
func (m mover) bases() image.Store {
	if m.pushes() {
		return nil
	}
	return m.to
}

func (m mover) bring(ctx context.Context, source image.Source, ref image.Ref, rebuild bool, note func(string)) (Image, error) {
	var out Image
	if !m.registry && !rebuild {
		if has, err := m.to.Has(ctx, ref.Full); err != nil || has {
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
		if err := image.Provide(ctx, e, source, m.bases(), note); err != nil {
			return out, err
		}
		note("building with " + e.Name())
		if out.id, err = build(ctx, e, ref, source); err != nil {
			return out, err
		}
		out.Built = true
	}
	out.Moved = true
	if m.registry {
		note("pushing")
		return out, e.Push(ctx, ref.Full, io.Discard)
	}
	note("saving")
	dir, err := os.MkdirTemp("", "polymesh-image-")
	if err != nil {
		return out, err
	}
	defer os.RemoveAll(dir)
	archive := filepath.Join(dir, "image.tar")
	if err := e.Save(ctx, ref.Full, archive, io.Discard); err != nil {
		return out, err
	}
	return out, m.to.Load(ctx, archive, ref.Full, note)
}

// build builds an image and returns its id, as the program that built it reports it.
func build(ctx context.Context, e image.Engine, ref image.Ref, source image.Source) (digest.Digest, error) {
	dir, err := os.MkdirTemp("", "polymesh-build-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(dir)
	source.IDFile = filepath.Join(dir, "id")
	if err := e.Build(ctx, ref.Full, source, io.Discard); err != nil {
		return "", err
	}
	text, err := os.ReadFile(source.IDFile)
	if err != nil {
		return "", fmt.Errorf("read the id of the image that %s built: %w", e.Name(), err)
	}
	id := digest.Digest(strings.TrimSpace(string(text)))
	if err := id.Validate(); err != nil {
		return "", fmt.Errorf("read the id of the image that %s built: %q: %w", e.Name(), id, err)
	}
	return id, nil
}
