//go:build integration

package registry

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"polymesh.dev/polymesh/pkg/imagestore"
	"polymesh.dev/polymesh/pkg/signature"
)

// another is content that another node has.
type another map[digest.Digest][]byte

func (o another) add(mediaType string, text []byte) ocispec.Descriptor {
	d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(text), Size: int64(len(text))}
	o[d.Digest] = text
	return d
}

// manifest adds one of a layer with a text.
func (o another) manifest(t *testing.T, text string) ocispec.Descriptor {
	t.Helper()
	m := ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, Config: o.add(ocispec.MediaTypeImageConfig, []byte(`{"rootfs":{"type":"layers"}}`))}
	m.SchemaVersion = 2
	m.Layers = append(m.Layers, o.add("application/vnd.dev.cosign.simplesigning.v1+json", []byte(text)))
	out, err := json.Marshal(m)
	ok(t, err)
	return o.add(m.MediaType, out)
}

func (o another) fetch(_ context.Context, d ocispec.Descriptor) (io.ReadCloser, error) {
	text, found := o[d.Digest]
	if !found {
		return nil, fmt.Errorf("%s is not there", d.Digest)
	}
	return io.NopCloser(bytes.NewReader(text)), nil
}

// signed is the copy of a signature that a node has of an image.
func (o another) signed(t *testing.T, node, repository string, target digest.Digest) imagestore.Copy {
	t.Helper()
	c := imagestore.Copy{Name: repository + ":sha256-" + target.Encoded() + ".sig", Signature: true, From: node, Target: o.manifest(t, "a signature of "+node)}
	ok(t, c.Check())
	return c
}

// What a real containerd keeps of other nodes' images and signatures.
func TestKeptCopies(t *testing.T) {
	m := newMachine(t, newPKI(t), "a", "127.0.0.10")
	ctx := t.Context()
	target := func(repository string) digest.Digest {
		t.Helper()
		d, err := m.store.Find(ctx, "docker.io/"+repository, hash, false)
		ok(t, err)
		return d.Digest
	}
	from := func(node string) int {
		t.Helper()
		n, err := m.store.CopiesFrom(ctx, node)
		ok(t, err)
		return n
	}
	there := another{}

	t.Run("signatures", func(t *testing.T) {
		m.load(newImage(t), "shop/api:"+hash, true)
		kept := there.signed(t, "b", "docker.io/shop/api", target("shop/api"))
		gone := there.signed(t, "b", "docker.io/shop/gone", digest.FromString("gone"))
		for c, want := range map[*imagestore.Copy]bool{&kept: true, &gone: false} {
			if has, err := m.store.HasSigned(ctx, *c); err != nil || has != want {
				t.Errorf("the image of %s is here: %t, %v", c.Name, has, err)
			}
			ok(t, m.store.Receive(ctx, *c, there.fetch))
		}
		if n := from("b"); n != 2 {
			t.Errorf("%d copies count", n)
		}
		ok(t, m.store.DropSignatures(ctx, "c"))
		if n := from("b"); n != 2 {
			t.Errorf("%d are left after those of another node were removed", n)
		}
		ok(t, m.store.DropSignatures(ctx, "b"))
		if has, err := m.store.HasCopy(ctx, kept); err != nil || !has {
			t.Errorf("the signature of an image that is kept is removed: %v", err)
		}
		if has, err := m.store.HasCopy(ctx, gone); err != nil || has {
			t.Errorf("the signature of an image that is gone stays: %v", err)
		}
		large := there.signed(t, "b", "docker.io/shop/api", digest.FromString("large"))
		large.Target = there.manifest(t, string(bytes.Repeat([]byte("x"), imagestore.MaxPayloads)))
		if err := m.store.Receive(ctx, large, there.fetch); err == nil {
			t.Error("a large signature is kept")
		}
	})

	// A copy that has begun before does not replace what was pushed meanwhile.
	t.Run("pushed meanwhile", func(t *testing.T) {
		name := "docker.io/shop/late:" + hash
		m.load(newImage(t), "shop/pushed:"+hash, true)
		pushed, err := m.store.Find(ctx, "docker.io/shop/pushed", hash, false)
		ok(t, err)
		late := imagestore.NewDeployed(name, "project", "service")
		late.From, late.Target = "b", there.manifest(t, "late")
		if has, err := m.store.HasCopy(ctx, late); err != nil || has {
			t.Fatalf("before: %t, %v", has, err)
		}
		err = m.store.Receive(ctx, late, func(ctx context.Context, d ocispec.Descriptor) (io.ReadCloser, error) {
			if d.Digest == late.Target.Digest {
				if err := m.store.Pushed(t.Context(), name, pushed); err != nil {
					return nil, err
				}
			}
			return there.fetch(ctx, d)
		})
		if !errors.Is(err, imagestore.ErrTaken) || target("shop/late") != pushed.Digest {
			t.Errorf("the copy ends with %v, and the name means %s", err, target("shop/late"))
		}
		// The node that it came from may have another one later.
		for _, text := range []string{"first", "second"} {
			c := imagestore.NewDeployed("docker.io/shop/other:"+hash, "project", "service")
			c.From, c.Target = "b", there.manifest(t, text)
			ok(t, m.store.Receive(ctx, c, there.fetch))
			if got := target("shop/other"); got != c.Target.Digest {
				t.Errorf("after the %s copy, the name means %s", text, got)
			}
		}
	})

	// What shares content counts once, and no other node's counts.
	t.Run("bytes", func(t *testing.T) {
		want := int64(0)
		counted := map[digest.Digest]bool{}
		for i := range 2 {
			c := imagestore.NewDeployed(fmt.Sprintf("docker.io/shop/bytes%d:%s", i, hash), "project", "bytes")
			c.From, c.Target = "d", there.manifest(t, "the same layer")
			ok(t, m.store.Receive(ctx, c, there.fetch))
			var parts ocispec.Manifest
			ok(t, json.Unmarshal(there[c.Target.Digest], &parts))
			for _, d := range []ocispec.Descriptor{c.Target, parts.Config, parts.Layers[0]} {
				if !counted[d.Digest] {
					counted[d.Digest] = true
					want += d.Size
				}
			}
		}
		sign := there.signed(t, "d", "docker.io/shop/bytes0", target("shop/bytes0"))
		ok(t, m.store.Receive(ctx, sign, there.fetch))
		var parts ocispec.Manifest
		ok(t, json.Unmarshal(there[sign.Target.Digest], &parts))
		// Its config is that of the images.
		want += sign.Target.Size + parts.Layers[0].Size
		for node, want := range map[string]int64{"d": want, "e": 0} {
			if got, err := m.store.BytesFrom(ctx, node, 1<<40); err != nil || got != want {
				t.Errorf("%d bytes of %s, want %d: %v", got, node, want, err)
			}
		}
		if got, err := m.store.BytesFrom(ctx, "d", 10); err != nil || got <= 10 || got > want {
			t.Errorf("more than 10 bytes are %d: %v", got, err)
		}
	})

	// A node that was removed and comes again is noticed, by its name; its copies are released by later deploys here only while it is away.
	t.Run("removed", func(t *testing.T) {
		c := imagestore.NewDeployed("docker.io/shop/left:"+hash, "project", "left")
		c.From, c.Target = "gone", there.manifest(t, "left")
		ok(t, m.store.Receive(ctx, c, there.fetch))
		deploy := func(i int) {
			t.Helper()
			ref := fmt.Sprintf("shop/left:%d-%s", i, hash)
			m.load(newImage(t), ref, false)
			ok(t, m.store.Deployed(ctx, "docker.io/"+ref, "project", "left"))
		}
		known := func(is bool) func(string) bool { return func(node string) bool { return is || node != "gone" } }
		ok(t, m.store.Removed(ctx, known(false)))
		ok(t, m.store.Removed(ctx, known(true)))
		for i := range imagestore.KeptDeploys {
			deploy(i)
		}
		if n := from("gone"); n != 1 {
			t.Errorf("a node that was removed and came again has %d copies after other deploys, want 1", n)
		}
		ok(t, m.store.Removed(ctx, known(false)))
		if n := from("gone"); n != 0 {
			t.Errorf("%d copies of a node that was removed are kept after other deploys", n)
		}
		if has, err := m.store.HasCopy(ctx, c); err != nil || !has {
			t.Errorf("what is released is left to the kubelet: %t, %v", has, err)
		}
		// Nothing replaces it yet.
		only := imagestore.NewDeployed("docker.io/shop/only:"+hash, "project", "only")
		only.From, only.Target = "gone", there.manifest(t, "only")
		ok(t, m.store.Receive(ctx, only, there.fetch))
		ok(t, m.store.Removed(ctx, known(false)))
		if n := from("gone"); n != 1 {
			t.Errorf("the only copy is released: %d are kept", n)
		}
	})

	// What the user has imported stays until the user removes it, also if a node says that it has deployed it.
	t.Run("imported here", func(t *testing.T) {
		ref := "shop/mine:" + hash
		m.load(newImage(t), ref, false)
		ok(t, m.store.Pin(ctx, imagestore.Wanted{}))
		m.eventuallyPinned(ref)
		d, err := m.store.Find(ctx, "docker.io/shop/mine", hash, false)
		ok(t, err)
		c := imagestore.NewDeployed("docker.io/"+ref, "project", "mine")
		c.From, c.Target = "b", ocispec.Descriptor{MediaType: d.MediaType, Digest: d.Digest, Size: d.Size}
		before := from("b")
		if has, err := m.store.HasCopy(ctx, c); err != nil || !has {
			t.Fatalf("%t, %v", has, err)
		}
		ok(t, m.store.Renew(ctx, c))
		if n := from("b"); n != before {
			t.Errorf("it counts as a copy: %d, were %d", n, before)
		}
		for i := range imagestore.KeptDeploys {
			later := imagestore.NewDeployed(fmt.Sprintf("docker.io/shop/mine:%d-%s", i, hash), "project", "mine")
			later.From, later.Target = "b", there.manifest(t, fmt.Sprint("later ", i))
			ok(t, m.store.Receive(ctx, later, there.fetch))
		}
		list, err := m.store.Copies(ctx)
		ok(t, err)
		for _, c := range list {
			if c.Name == "docker.io/"+ref {
				t.Errorf("%+v", c)
			}
		}
		if !m.pinned(ref) {
			t.Error("it is released")
		}
	})

	// What a user signs here is this node's own, also if another node's signature was there.
	t.Run("signed here", func(t *testing.T) {
		m.load(newImage(t), "shop/signed:"+hash, true)
		before := from("b")
		theirs := there.signed(t, "b", "docker.io/shop/signed", target("shop/signed"))
		ok(t, m.store.Receive(ctx, theirs, there.fetch))
		if n := from("b"); n != before+1 {
			t.Errorf("%d copies, were %d", n, before)
		}
		own := there.manifest(t, "a signature of a user")
		var signed ocispec.Manifest
		ok(t, json.Unmarshal(there[own.Digest], &signed))
		blobs := []signature.Blob{{Descriptor: signed.Config, Content: there[signed.Config.Digest]}, {Descriptor: signed.Layers[0], Content: there[signed.Layers[0].Digest]}}
		ok(t, m.store.Signatures().Put(ctx, theirs.Name, signature.Blob{Descriptor: own, Content: there[own.Digest]}, blobs...))
		if n := from("b"); n != before {
			t.Errorf("the user's signature counts as the other node's: %d copies, were %d", n, before)
		}
		if has, err := m.store.HasCopy(ctx, theirs); !errors.Is(err, imagestore.ErrTaken) {
			t.Errorf("the other node may replace it: %t, %v", has, err)
		}
	})
}
