// Package signature signs images and checks their signatures, in the form of Sigstore's cosign: the same key files, the
// same payload, and the signature stored beside the image under the tag sha256-<digest>.sig
// (https://github.com/sigstore/cosign/blob/main/specs/SIGNATURE_SPEC.md). What one of the two signs, the other verifies.
//
// A signature is over the image's digest and its repository's name, so it says nothing about tags: who verifies must go on
// with the digest. The package owns keys, payload and storage; pkg/command and pkg/workflow/deploy sign, pkg/controlplane/imagepolicy verifies.
package signature

import (
	"bytes"
	"context"
	"crypto"
	"crypto/elliptic"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/sigstore/sigstore/pkg/cryptoutils"
	"github.com/sigstore/sigstore/pkg/signature"
	"github.com/sigstore/sigstore/pkg/signature/payload"
)

// Names of the format.
const (
	payloadType = "application/vnd.dev.cosign.simplesigning.v1+json"
	annotation  = "dev.cosignproject.cosign/signature"
)

// maxSignatures is how many signatures of an image are looked at: what is stored beside an image is not to be trusted yet.
const maxSignatures = 50

// Password asks for the password of a private key; twice says that the user must repeat it.
type Password func(twice bool) ([]byte, error)

// Generate makes a key pair (ECDSA, P-256) as PEM; the private key is encrypted with the password.
func Generate(password Password) (private, public []byte, err error) {
	return cryptoutils.GeneratePEMEncodedECDSAKeyPair(elliptic.P256(), cryptoutils.PassFunc(password))
}

// Signer is a private key.
type Signer struct {
	key    signature.SignerVerifier
	public Keys
}

// Public is the key that verifies what the signer signs.
func (key *Signer) Public() Keys { return key.public }

// envScheme begins a key that is a variable of the environment, as cosign has it.
const envScheme = "env://"

// ReadSigner reads a private key from a file, or from the variable NAME of the environment if it is given as env://NAME.
func ReadSigner(from string, password Password) (*Signer, error) {
	text, err := read(from)
	if err != nil {
		return nil, err
	}
	private, err := cryptoutils.UnmarshalPEMToPrivateKey(text, cryptoutils.PassFunc(password))
	if err != nil {
		return nil, fmt.Errorf("private key %s: %w", from, err)
	}
	key, err := signature.LoadSignerVerifier(private, crypto.SHA256)
	if err != nil {
		return nil, fmt.Errorf("private key %s: %w", from, err)
	}
	return &Signer{key, Keys{key}}, nil
}

func read(from string) ([]byte, error) {
	variable, ok := strings.CutPrefix(from, envScheme)
	if !ok {
		text, err := os.ReadFile(from)
		if err != nil {
			return nil, fmt.Errorf("read the key: %w (polymesh image keygen makes a pair)", err)
		}
		return text, nil
	}
	text := os.Getenv(variable)
	if text == "" {
		return nil, fmt.Errorf("key %s: the environment has no %s", from, variable)
	}
	return []byte(text), nil
}

// Keys are public keys; a signature by any of them is good.
type Keys []signature.Verifier

// ReadKeys reads public keys, each as ReadSigner does.
func ReadKeys(from ...string) (Keys, error) {
	var keys Keys
	for _, from := range from {
		text, err := read(from)
		if err != nil {
			return nil, err
		}
		if bytes.Contains(text, []byte("PRIVATE KEY")) {
			return nil, fmt.Errorf("key %s is a private one: give the public key that belongs to it", from)
		}
		public, err := cryptoutils.UnmarshalPEMToPublicKey(text)
		if err != nil {
			return nil, fmt.Errorf("public key %s: %w", from, err)
		}
		key, err := signature.LoadVerifier(public, crypto.SHA256)
		if err != nil {
			return nil, fmt.Errorf("public key %s: %w", from, err)
		}
		keys = append(keys, key)
	}
	return keys, nil
}

// Blob is content with its name.
type Blob struct {
	ocispec.Descriptor
	Content []byte
}

// Place keeps images and, beside them, signatures: a node's containerd or a registry. Names are full ones
// (docker.io/library/x:1). What is not there is an error for which errdefs.IsNotFound holds.
type Place interface {
	fmt.Stringer
	// Digest is that of the image which has the name now. From then on the image can be named by it, too.
	Digest(ctx context.Context, name string) (digest.Digest, error)
	// Copied reports whether the image came to this place from a registry, which then has its signatures.
	Copied(ctx context.Context, image Image) (bool, error)
	// ImageManifest is the manifest of the image that has the name now, "repository@digest" too.
	ImageManifest(ctx context.Context, name string) ([]byte, error)
	// Manifest is what is stored under a name that is no image's.
	Manifest(ctx context.Context, name string) ([]byte, error)
	// Blob reads what the manifest of that name refers to.
	Blob(ctx context.Context, name string, blob ocispec.Descriptor) ([]byte, error)
	// Put stores blobs and then the manifest under the name.
	Put(ctx context.Context, name string, manifest Blob, blobs ...Blob) error
}

// Image is an image as it is signed: a repository and a digest.
type Image struct {
	repository reference.Named
	Digest     digest.Digest
}

// String is "repository@digest".
func (i Image) String() string { return i.repository.Name() + "@" + i.Digest.String() }

// stored is the name under which the image's signatures are.
func (i Image) stored() string {
	return i.repository.Name() + ":" + i.Digest.Algorithm().String() + "-" + i.Digest.Encoded() + ".sig"
}

// checkBlob refuses a descriptor that could not be of something beside an image. It comes from whoever can write to the
// registry, and the methods of a digest panic when it is none.
func checkBlob(d ocispec.Descriptor) error {
	if err := d.Digest.Validate(); err != nil {
		return fmt.Errorf("%q is not a digest: %w", d.Digest, err)
	}
	if d.Size < 0 || d.Size > maxBlob {
		return fmt.Errorf("%s has %d bytes, which a signature has not", d.Digest, d.Size)
	}
	// containerd's fetcher would ask these, wherever they lead, with a client of its own.
	if len(d.URLs) > 0 {
		return fmt.Errorf("%s is said to be at %q, and not in the registry", d.Digest, d.URLs[0])
	}
	return nil
}

// find returns what a reference means in the first place that knows it, and the places that may have its signatures: that
// one and, if the image was only copied there, those behind it.
func find(ctx context.Context, ref string, places []Place) (Image, []Place, error) {
	named, err := reference.ParseDockerRef(ref)
	if err != nil {
		return Image{}, nil, fmt.Errorf("image %q: %w", ref, err)
	}
	for i, place := range places {
		sum, err := place.Digest(ctx, named.String())
		if errdefs.IsNotFound(err) && i+1 < len(places) {
			continue
		}
		if err != nil {
			return Image{}, nil, fmt.Errorf("look for image %s in %s: %w", named, place, err)
		}
		if err := sum.Validate(); err != nil {
			return Image{}, nil, fmt.Errorf("image %s: what %s gives as its digest, %q, is none: %w", named, place, sum, err)
		}
		image := Image{reference.TrimNamed(named), sum}
		if exact, ok := named.(reference.Digested); ok && exact.Digest() != sum {
			return Image{}, nil, fmt.Errorf("%s has the image %s instead of %s", place, image, named)
		}
		copied, err := place.Copied(ctx, image)
		if err != nil {
			return Image{}, nil, fmt.Errorf("look for image %s in %s: %w", named, place, err)
		}
		if !copied {
			return image, places[i : i+1], nil
		}
		return image, places[i:], nil
	}
	return Image{}, nil, fmt.Errorf("image %s: no place to look for it", named)
}

// Stored is the image that a place has under a name now, with its digest, and the digest of its configuration, which
// programs that build call the image's id; empty for an image of several platforms.
func Stored(ctx context.Context, ref string, place Place) (image Image, config digest.Digest, err error) {
	image, _, err = find(ctx, ref, []Place{place})
	if err != nil {
		return image, "", err
	}
	text, err := place.ImageManifest(ctx, image.String())
	if err != nil {
		return image, "", fmt.Errorf("read the manifest of %s in %s: %w", image, place, err)
	}
	// The digest decides, not where the text comes from.
	if err := image.Digest.Validate(); err != nil {
		return image, "", fmt.Errorf("%s in %s: %w", image, place, err)
	}
	if image.Digest.Algorithm().FromBytes(text) != image.Digest {
		return image, "", fmt.Errorf("%s has another manifest for %s", place, image)
	}
	var manifest ocispec.Manifest
	if err := json.Unmarshal(text, &manifest); err != nil {
		return image, "", fmt.Errorf("read the manifest of %s in %s: %w", image, place, err)
	}
	return image, manifest.Config.Digest, nil
}

// Sign signs the image that a reference means in the first place that has it, and stores the signature there. What is
// signed with the same key already stays as it is: fresh is false. Signatures by other keys are kept.
func Sign(ctx context.Context, key *Signer, ref string, places ...Place) (image Image, fresh bool, err error) {
	image, at, err := find(ctx, ref, places)
	if err != nil {
		return image, false, err
	}
	fresh, err = key.sign(ctx, image, at[0])
	return image, fresh, err
}

func (key *Signer) sign(ctx context.Context, image Image, place Place) (fresh bool, err error) {
	manifest, err := signatures(ctx, place, image)
	if err != nil && !errdefs.IsNotFound(err) {
		return false, err
	}
	for _, layer := range manifest.Layers {
		if key.public.check(ctx, place, image, layer) == nil {
			return false, nil
		}
	}
	exact, err := name.NewDigest(image.String())
	if err != nil {
		return false, fmt.Errorf("image %s: %w", image, err)
	}
	content, err := payload.Cosign{Image: exact}.MarshalJSON()
	if err != nil {
		return false, fmt.Errorf("sign %s: %w", image, err)
	}
	sum, err := key.key.SignMessage(bytes.NewReader(content))
	if err != nil {
		return false, fmt.Errorf("sign %s: %w", image, err)
	}
	layer := blob(payloadType, content)
	layer.Annotations = map[string]string{annotation: base64.StdEncoding.EncodeToString(sum)}
	manifest.Layers = append(manifest.Layers, layer.Descriptor)

	// cosign's form is an image whose layers are the payloads.
	var configuration ocispec.Image
	configuration.RootFS.Type = "layers"
	for _, layer := range manifest.Layers {
		configuration.RootFS.DiffIDs = append(configuration.RootFS.DiffIDs, layer.Digest)
	}
	text, err := json.Marshal(configuration)
	if err != nil {
		return false, err
	}
	config := blob(ocispec.MediaTypeImageConfig, text)
	manifest.Versioned, manifest.MediaType, manifest.Config = specs.Versioned{SchemaVersion: 2}, ocispec.MediaTypeImageManifest, config.Descriptor
	if text, err = json.Marshal(manifest); err != nil {
		return false, err
	}
	if err := place.Put(ctx, image.stored(), blob(ocispec.MediaTypeImageManifest, text), config, layer); err != nil {
		return false, fmt.Errorf("store the signature of %s: %w", image, err)
	}
	return true, nil
}

func blob(mediaType string, content []byte) Blob {
	return Blob{ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(content), Size: int64(len(content))}, content}
}

// signatures reads the manifest that lists the signatures of an image.
func signatures(ctx context.Context, place Place, image Image) (m ocispec.Manifest, err error) {
	text, err := place.Manifest(ctx, image.stored())
	if err != nil {
		return m, fmt.Errorf("signatures of %s: %w", image, err)
	}
	if err := json.Unmarshal(text, &m); err != nil {
		return ocispec.Manifest{}, fmt.Errorf("signatures of %s: %w", image, err)
	}
	if m.MediaType != "" && m.MediaType != ocispec.MediaTypeImageManifest && m.MediaType != images.MediaTypeDockerSchema2Manifest {
		return ocispec.Manifest{}, fmt.Errorf("signatures of %s: what is stored there is a %q and not a manifest", image, m.MediaType)
	}
	if len(m.Layers) > maxSignatures {
		m.Layers = m.Layers[:maxSignatures]
	}
	return m, nil
}

// ErrUnsigned says that no good signature of the image by one of the keys was found.
var ErrUnsigned = errors.New("not signed by a trusted key")

// Verify returns the image that a reference means now, if it has a signature by one of the keys, and an error that wraps
// ErrUnsigned if it has none. Only what is returned is verified: the same reference may mean another image later.
func (k Keys) Verify(ctx context.Context, ref string, places ...Place) (Image, error) {
	image, at, err := find(ctx, ref, places)
	if err != nil {
		return image, err
	}
	problems := []error{ErrUnsigned}
	for _, place := range at {
		manifest, err := signatures(ctx, place, image)
		if errdefs.IsNotFound(err) {
			err = fmt.Errorf("there is no signature of it in %s", place)
		}
		if err != nil {
			problems = append(problems, err)
		}
		for _, layer := range manifest.Layers {
			if err = k.check(ctx, place, image, layer); err == nil {
				return image, nil
			}
			problems = append(problems, err)
		}
	}
	return image, unsigned{image, problems}
}

// unsigned is why an image does not pass, in one line.
type unsigned struct {
	image    Image
	problems []error
}

func (u unsigned) Unwrap() []error { return u.problems }

func (u unsigned) Error() string {
	text := u.image.String() + ": " + u.problems[0].Error()
	for _, problem := range u.problems[1:] {
		text += "; " + problem.Error()
	}
	return text
}

// check checks one signature: the key's, of this digest, for this repository.
func (k Keys) check(ctx context.Context, place Place, image Image, layer ocispec.Descriptor) error {
	sum, err := base64.StdEncoding.DecodeString(layer.Annotations[annotation])
	if err != nil || len(sum) == 0 || layer.MediaType != payloadType {
		return errors.New("what is stored as its signature is none")
	}
	if err := checkBlob(layer); err != nil {
		return fmt.Errorf("what is stored as its signature is none: %w", err)
	}
	content, err := place.Blob(ctx, image.stored(), layer)
	if err != nil {
		return err
	}
	good := false
	for _, key := range k {
		good = good || key.VerifySignature(bytes.NewReader(sum), bytes.NewReader(content)) == nil
	}
	if !good {
		return errors.New("its signature is by another key, or does not fit what it signs")
	}
	var claim payload.Cosign
	if err := json.Unmarshal(content, &claim); err != nil {
		return fmt.Errorf("its signature is not one of an image: %w", err)
	}
	// Names of Docker Hub are spelt in two ways.
	want, err := name.NewRepository(image.repository.Name())
	if err != nil {
		return err
	}
	if claim.Image.DigestStr() != image.Digest.String() || claim.Image.Repository.Name() != want.Name() {
		return fmt.Errorf("its signature is of %s@%s", claim.Image.Repository.Name(), claim.Image.DigestStr())
	}
	return nil
}
