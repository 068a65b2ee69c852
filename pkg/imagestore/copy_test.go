package imagestore

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"polymesh.dev/polymesh/pkg/signature"
)

// A manifest that a builder makes is accepted; one that others would read in another way, or that points elsewhere, is not.
func TestChildren(t *testing.T) {
	sum := digest.FromString("x")
	part := func(media string, size int64) string {
		return fmt.Sprintf(`{"mediaType":%q,"digest":%q,"size":%d}`, media, sum, size)
	}
	config, layer, child := part(ocispec.MediaTypeImageConfig, 2), part(ocispec.MediaTypeImageLayerGzip, 3), part(ocispec.MediaTypeImageManifest, 4)
	manifest, index := ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageIndex
	for _, c := range []struct {
		media, text string
		want        int
	}{
		{manifest, `{"schemaVersion":2,"config":` + config + `,"layers":[` + layer + `,` + layer + `]}`, 3},
		{manifest, `{"mediaType":"` + manifest + `","config":` + config + `,"layers":[]}`, 1},
		{"application/vnd.docker.distribution.manifest.v2+json", `{"config":` + config + `,"layers":[` + layer + `]}`, 2},
		{index, `{"manifests":[` + child + `]}`, 1},
		// What is refused has -1.
		{manifest, `{"mediaType":"` + index + `","config":` + config + `,"layers":[]}`, -1},
		{manifest, `{"config":` + config + `,"layers":[],"manifests":[` + child + `]}`, -1},
		{index, `{"config":` + config + `,"manifests":[` + child + `]}`, -1},
		{index, `{"layers":[` + layer + `],"manifests":[]}`, -1},
		{manifest, `{"layers":[` + layer + `]}`, -1},
		{manifest, `{"config":` + config + `,"layers":[` + child + `]}`, -1},
		{index, `{"manifests":[` + layer + `]}`, -1},
		{manifest, `{"config":` + config + `,"layers":[],"fsLayers":[]}`, -1},
		{"application/vnd.docker.distribution.manifest.v1+json", `{"config":` + config + `,"layers":[]}`, -1},
		{"text/html", `{"config":` + config + `,"layers":[]}`, -1},
		{"", `{"config":` + config + `,"layers":[]}`, -1},
		{manifest, `{"config":` + part(ocispec.MediaTypeImageConfig, -1) + `,"layers":[]}`, -1},
		{manifest, `{"config":` + part(ocispec.MediaTypeImageConfig, 0) + `,"layers":[]}`, -1},
		{manifest, `{"config":` + part(ocispec.MediaTypeImageConfig, MaxBlob+1) + `,"layers":[]}`, -1},
		{index, `{"manifests":[` + part(manifest, MaxManifest+1) + `]}`, -1},
		{manifest, `{"config":{"digest":"sha256:../../etc/passwd","size":1},"layers":[]}`, -1},
		{manifest, `{"config":{"digest":"sha512:` + strings.Repeat("0", 128) + `","size":1},"layers":[]}`, -1},
		{manifest, `{"config":{"digest":"` + sum.String() + `","size":1,"urls":["http://169.254.169.254/"]},"layers":[]}`, -1},
		{manifest, `{"config":` + config + `,"layers":[` + layer + strings.Repeat(","+layer, maxWalk) + `]}`, -1},
		{manifest, `{"config":`, -1},
		{manifest, strings.Repeat(" ", MaxManifest) + `{"config":` + config + `,"layers":[]}`, -1},
	} {
		got, err := Children(c.media, []byte(c.text))
		switch {
		case c.want < 0 && !errors.Is(err, errdefs.ErrInvalidArgument):
			t.Errorf("%s %.200s: %d parts, %v", c.media, c.text, len(got), err)
		case c.want >= 0 && (err != nil || len(got) != c.want):
			t.Errorf("%s %.200s: %d parts, %v, want %d", c.media, c.text, len(got), err, c.want)
		}
	}
}

// A signature has few and small parts: all of them are read at once.
func TestSignatureParts(t *testing.T) {
	part := func(size int64) string {
		return fmt.Sprintf(`{"mediaType":%q,"digest":%q,"size":%d}`, ocispec.MediaTypeImageLayer, digest.FromString("x"), size)
	}
	manifest := func(layers int, size int64) []byte {
		list := strings.TrimSuffix(strings.Repeat(part(size)+",", layers), ",")
		return []byte(`{"config":` + part(100) + `,"layers":[` + list + `]}`)
	}
	for what, c := range map[string]struct {
		media string
		text  []byte
		ok    bool
	}{
		"one of cosign":          {ocispec.MediaTypeImageManifest, manifest(1, 300), true},
		"as many as are checked": {ocispec.MediaTypeImageManifest, manifest(signature.MaxSignatures, 300), true},
		"one more":               {ocispec.MediaTypeImageManifest, manifest(signature.MaxSignatures+1, 300), false},
		"a large part":           {ocispec.MediaTypeImageManifest, manifest(1, MaxPayloads), false},
		"large parts together":   {ocispec.MediaTypeImageManifest, manifest(40, 10<<10), false},
		"a large manifest":       {ocispec.MediaTypeImageManifest, append(manifest(1, 300), strings.Repeat(" ", maxSignature)...), false},
		"an index":               {ocispec.MediaTypeImageIndex, []byte(`{"manifests":[]}`), false},
	} {
		if _, err := SignatureParts(c.media, c.text); (err == nil) != c.ok {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// A manifest of empty parts does not take many times its size in memory.
func TestChildrenOfManyParts(t *testing.T) {
	for media, field := range map[string]string{ocispec.MediaTypeImageManifest: "layers", ocispec.MediaTypeImageIndex: "manifests"} {
		text := []byte(`{"` + field + `":[{}` + strings.Repeat(",{}", 1<<20) + `]}`)
		if _, err := Children(media, text); err == nil {
			t.Errorf("%s: it is accepted", field)
		}
		got := testing.Benchmark(func(b *testing.B) {
			for b.Loop() {
				_, _ = Children(media, text)
			}
		}).AllocedBytesPerOp()
		if limit := int64(2 * len(text)); got > limit {
			t.Errorf("%s takes %d bytes in memory, want at most %d", field, got, limit)
		}
	}
}

// What another node says about an image is checked before it is used.
func TestCheckCopy(t *testing.T) {
	good := func() Copy {
		return Copy{Name: "docker.io/shop/api:1-0123456789abcdef0123456789abcdef", Deployed: deployedNow(), Project: "p", Service: "s",
			Target: ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString("x"), Size: 10}}
	}
	if err := good().Check(); err != nil || !good().Built() {
		t.Errorf("a copy of ours: %v", err)
	}
	sign := good()
	sign.Name, sign.Deployed, sign.Signature = "docker.io/shop/api:sha256-"+digest.FromString("x").Encoded()+".sig", "", true
	if err := sign.Check(); err != nil {
		t.Errorf("a signature: %v", err)
	}
	if sign.signed() != digest.FromString("x").String() || signatureName("docker.io/shop/api:1", digest.FromString("x")) != sign.Name {
		t.Errorf("%s is the signature of %s", sign.Name, sign.signed())
	}
	for what, change := range map[string]func(*Copy){
		"a signature that is an index": func(c *Copy) { *c = sign; c.Target.MediaType = ocispec.MediaTypeImageIndex },
		"a large signature":            func(c *Copy) { *c = sign; c.Target.Size = maxSignature + 1 },
		"a short name":                 func(c *Copy) { c.Name = "shop/api:1" },
		"no tag":                       func(c *Copy) { c.Name = "docker.io/shop/api" },
		"a digest":                     func(c *Copy) { c.Name = "docker.io/shop/api:1@" + digest.FromString("x").String() },
		"not a name":                   func(c *Copy) { c.Name = "docker.io/shop/../api:1" },
		"CRI's name":                   func(c *Copy) { c.Name = digest.FromString("x").String() },
		"a shipped image":              func(c *Copy) { c.Name = ShippedRegistry + "/coredns:1" },
		"latest":                       func(c *Copy) { c.Name = "docker.io/shop/api:latest" },
		"a signature as an image":      func(c *Copy) { c.Name = sign.Name },
		"an image as a signature":      func(c *Copy) { c.Signature, c.Deployed = true, "" },
		"no reason":                    func(c *Copy) { c.Deployed = "" },
		"a time without end":           func(c *Copy) { c.Deployed = "9" },
		"a long project":               func(c *Copy) { c.Project = strings.Repeat("x", maxReason+1) },
		"a project with NUL":           func(c *Copy) { c.Project = "a\x00b" },
		"a layer":                      func(c *Copy) { c.Target.MediaType = ocispec.MediaTypeImageLayer },
		"a large document":             func(c *Copy) { c.Target.Size = MaxManifest + 1 },
		"no digest":                    func(c *Copy) { c.Target.Digest = "sha256:x" },
	} {
		c := good()
		change(&c)
		if err := c.Check(); err == nil {
			t.Errorf("%s is accepted: %+v", what, c)
		}
	}
}

// A node that asks for a copy of what another reason keeps here does not take that reason's place.
func TestRenews(t *testing.T) {
	for what, c := range map[string]struct {
		labels map[string]string
		want   bool
	}{
		"its own copy":            {map[string]string{fromLabel: "b", pushedLabel: "x", deployedLabel: "x", pinnedLabel: pinnedValue}, true},
		"another's copy":          {map[string]string{fromLabel: "c", pushedLabel: "x", deployedLabel: "x", pinnedLabel: pinnedValue}, false},
		"released":                {map[string]string{releasedLabel: "x"}, true},
		"pulled":                  {map[string]string{"io.cri-containerd.image": "managed"}, true},
		"imported":                {map[string]string{importedLabel: "true", pinnedLabel: pinnedValue}, false},
		"of an archive":           {map[string]string{archiveLabel: "x"}, false},
		"that came from a node":   {map[string]string{deployedLabel: "x", serviceLabel: "x", pinnedLabel: pinnedValue}, false},
		"deployed here":           {map[string]string{deployedLabel: "x", projectLabel: "x", serviceLabel: "x", pinnedLabel: pinnedValue}, false},
		"pinned by the user":      {map[string]string{pinnedLabel: pinnedValue}, false},
		"that came with Polymesh": {map[string]string{payloadLabel: "x"}, false},
	} {
		if got := renews(c.labels, "b"); got != c.want {
			t.Errorf("an image %s: %t", what, got)
		}
	}
	if renews(map[string]string{deployedLabel: "x"}, "") {
		t.Error("no node")
	}
	for what, c := range map[string]struct {
		labels map[string]string
		want   bool
	}{
		"that was pulled":   {map[string]string{deployedLabel: "x", pinnedLabel: "pinned"}, true},
		"of no pod":         {map[string]string{}, false},
		"of a project":      {map[string]string{deployedLabel: "x", projectLabel: "p", pinnedLabel: "pinned"}, false},
		"that was imported": {map[string]string{deployedLabel: "x", importedLabel: "true", pinnedLabel: "pinned"}, false},
		"of another node":   {map[string]string{deployedLabel: "x", fromLabel: "c", pinnedLabel: "pinned"}, false},
	} {
		if got := pulled(c.labels); got != c.want {
			t.Errorf("an image %s is one that was pulled: %t", what, got)
		}
	}
}

// A copy is kept as long as the original, and another node's copies do not displace this node's own images.
func TestPinsOfCopies(t *testing.T) {
	deploys := func(prefix, from string, first int) (list []heldImage) {
		for i := range KeptDeploys + 1 {
			h := heldOf(fmt.Sprint(prefix, i), false, fmt.Sprintf("%s=2026-01-%02dT00:00:00Z", deployedLabel, first+i), projectLabel+"=p", serviceLabel+"=s", pinnedLabel+"=pinned")
			if from != "" {
				h.labels[fromLabel], h.labels[pushedLabel] = from, "2026-01-01T00:00:00Z"
			}
			list = append(list, h)
		}
		return list
	}
	all := slices.Concat(deploys("own:", "", 1), deploys("copy:", "b", 10), deploys("other:", "c", 20))
	all = append(all, heldOf("loaded:1", false, pushedLabel+"=2026-01-01T00:00:00Z", importedLabel+"=true", pinnedLabel+"=pinned"))
	got := settle(t, all, Wanted{})
	for _, prefix := range []string{"own:", "copy:", "other:"} {
		for i := range KeptDeploys + 1 {
			name := fmt.Sprint(prefix, i)
			if pinned := got[name][pinnedLabel] != ""; pinned != (i > 0) {
				t.Errorf("%s is pinned: %t", name, pinned)
			}
			if i == 0 && (got[name][pushedLabel] != "" || got[name][fromLabel] != "") {
				t.Errorf("%s, which is released, is copied on: %v", name, got[name])
			}
		}
	}
	if got["loaded:1"][pinnedLabel] == "" {
		t.Error("an image that was loaded is released")
	}
}

// The copies of a node that was removed are released by later deploys of this node, and release none of its images.
func TestPinsOfRemovedNodes(t *testing.T) {
	image := func(name, day, from string, removed bool) heldImage {
		h := heldOf(name, false, deployedLabel+"=2026-01-"+day+"T00:00:00Z", projectLabel+"=p", serviceLabel+"=s", pinnedLabel+"=pinned", pushedLabel+"=x")
		if from != "" {
			h.labels[fromLabel] = from
		}
		if removed {
			h.labels[removedLabel] = "true"
		}
		return h
	}
	list := func(own int) []heldImage {
		all := []heldImage{
			image("gone:old", "01", "b", true), image("gone:future", "31", "b", true), image("there:old", "01", "c", false),
			heldOf("loaded:1", false, pushedLabel+"=x", importedLabel+"=true", fromLabel+"=b", removedLabel+"=true", pinnedLabel+"=pinned"),
		}
		for i := range own {
			all = append(all, image(fmt.Sprint("own:", i), fmt.Sprint(10+i), "", false))
		}
		// Those of another service, and of another node, do not count.
		for i := range KeptDeploys {
			other := image(fmt.Sprint("other:", i), fmt.Sprint(10+i), "", false)
			other.labels[serviceLabel] = "other"
			all = append(all, other, image(fmt.Sprint("copy:", i), fmt.Sprint(20+i), "c", false))
		}
		return all
	}
	for own := range KeptDeploys + 2 {
		got := settle(t, list(own), Wanted{})
		released := own >= KeptDeploys
		if pinned := got["gone:old"][pinnedLabel] != ""; pinned == released {
			t.Errorf("after %d deploys, the image of a node that was removed is pinned: %t", own, pinned)
		}
		if released && (got["gone:old"][fromLabel] != "" || got["gone:old"][removedLabel] != "") {
			t.Errorf("it is released with %v", got["gone:old"])
		}
		for _, name := range []string{"gone:future", "loaded:1"} {
			if got[name][pinnedLabel] == "" {
				t.Errorf("after %d deploys, %s is released", own, name)
			}
		}
		for i := range own {
			if name := fmt.Sprint("own:", i); (got[name][pinnedLabel] != "") != (i >= own-KeptDeploys) {
				t.Errorf("of %d own images, %s has %v", own, name, got[name])
			}
		}
	}
}
