// Package signature signs images and checks their signatures, in the format of Sigstore's cosign: the same key files, the
// same payload, and the signature stored next to the image under the tag sha256-<digest>.sig
// (https://github.com/sigstore/cosign/blob/main/specs/SIGNATURE_SPEC.md). Each can verify the other's signatures.
//
// A signature covers the image's digest and its repository's name, but not tags: after verifying, use
// the digest. The package owns keys, payload and storage; pkg/command and pkg/workflow/deploy sign, pkg/controlplane/imagepolicy verifies.
package signature

import (
	"bytes"
	"context"
	"crypto"
	"crypto/elliptic"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
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

// MaxSignatures limits how many signatures of an image are checked: content next to an image is not trusted yet.
const MaxSignatures = 50

// Password asks for the password of a private key; twice means that the user must repeat it.
type Password func(twice bool) ([]byte, error)

// Generate returns a new key pair (ECDSA, P-256) as PEM; the private key is encrypted with the password.
func Generate(password Password) (private, public []byte, err error) {
	return cryptoutils.GeneratePEMEncodedECDSAKeyPair(elliptic.P256(), cryptoutils.PassFunc(password))
}

// Signer is a private key.
type Signer struct {
	key    signature.SignerVerifier
	public Keys
}

// Public returns the key that verifies the signer's signatures.
func (key *Signer) Public() Keys { return key.public }

// envScheme is the prefix of a key in an environment variable, as in cosign.
const envScheme = "env://"

// ReadSigner reads a private key from a file, or from the environment variable NAME if given as env://NAME.
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
			return nil, fmt.Errorf("read the key: %w (`polymesh image keygen` creates a pair)", err)
		}
		return text, nil
	}
	text := os.Getenv(variable)
	if text == "" {
		return nil, fmt.Errorf("key %s: %s is not set in the environment", from, variable)
	}
	return []byte(text), nil
}

// Keys are public keys; a signature by any of them is accepted.
type Keys []signature.Verifier

// Fingerprint is a hash of the set of keys.
func (k Keys) Fingerprint() (string, error) {
	var sums []string
	for _, one := range k {
		public, err := one.PublicKey()
		if err != nil {
			return "", fmt.Errorf("read a public key: %w", err)
		}
		der, err := x509.MarshalPKIXPublicKey(public)
		if err != nil {
			return "", fmt.Errorf("encode a public key: %w", err)
		}
		sum := sha256.Sum256(der)
		sums = append(sums, string(sum[:]))
	}
	slices.Sort(sums)
	sum := sha256.Sum256([]byte(strings.Join(slices.Compact(sums), "")))
	return hex.EncodeToString(sum[:8]), nil
}

// ReadKeys reads public keys, in the same way as ReadSigner.
func ReadKeys(from ...string) (Keys, error) {
	var keys Keys
	for _, from := range from {
		text, err := read(from)
		if err != nil {
			return nil, err
		}
		if bytes.Contains(text, []byte("PRIVATE KEY")) {
			return nil, fmt.Errorf("key %s is a private key: specify the public key that belongs to it", from)
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

// ParseKeys reads public keys in DER form (PKIX).
func ParseKeys(ders ...[]byte) (Keys, error) {
	var keys Keys
	for _, der := range ders {
		public, err := x509.ParsePKIXPublicKey(der)
		if err != nil {
			return nil, fmt.Errorf("public key: %w", err)
		}
		key, err := signature.LoadVerifier(public, crypto.SHA256)
		if err != nil {
			return nil, fmt.Errorf("public key: %w", err)
		}
		keys = append(keys, key)
	}
	return keys, nil
}

// Blob is content with its descriptor.
type Blob struct {
	ocispec.Descriptor
	Content []byte
}

// Place stores images and their signatures: a node's containerd or a registry. Names are full names
// (docker.io/library/x:1). For missing content, the error satisfies errdefs.IsNotFound.
type Place interface {
	fmt.Stringer
	// Digest returns the digest of the image that currently has the name. From then on it is available by digest, too.
	Digest(ctx context.Context, name string) (digest.Digest, error)
	// Copied reports whether the image came to this place from a registry, which then has its signatures.
	Copied(ctx context.Context, image Image) (bool, error)
	// ImageManifest returns the manifest of the image that currently has the name, which may be "repository@digest".
	ImageManifest(ctx context.Context, name string) ([]byte, error)
	// Manifest returns the manifest under a name that is not an image's.
	Manifest(ctx context.Context, name string) ([]byte, error)
	// Blob reads content that the manifest with that name refers to.
	Blob(ctx context.Context, name string, blob ocispec.Descriptor) ([]byte, error)
	// Put stores blobs and then the manifest under the name.
	Put(ctx context.Context, name string, manifest Blob, blobs ...Blob) error
}

// Image identifies an image for signing: a repository and a digest.
type Image struct {
	repository reference.Named
	Digest     digest.Digest
}

// String is "repository@digest".
func (i Image) String() string { return i.repository.Name() + "@" + i.Digest.String() }

// stored returns the name under which the image's signatures are stored.
func (i Image) stored() string {
	return i.repository.Name() + ":" + i.Digest.Algorithm().String() + "-" + i.Digest.Encoded() + ".sig"
}

// checkBlob rejects a descriptor that cannot belong to a signature. It comes from anyone with write access to the
// registry, and the methods of a digest panic if it is invalid.
func checkBlob(d ocispec.Descriptor) error {
	if err := d.Digest.Validate(); err != nil {
		return fmt.Errorf("%q is not a digest: %w", d.Digest, err)
	}
	if d.Size < 0 || d.Size > maxBlob {
		return fmt.Errorf("%s has %d bytes, too many for a signature", d.Digest, d.Size)
	}
	// containerd's fetcher would contact these URLs, wherever they point, with its own client.
	if len(d.URLs) > 0 {
		return fmt.Errorf("%s refers to %q instead of the registry", d.Digest, d.URLs[0])
	}
	return nil
}

// find resolves a reference in the first place that has it, and returns the places that may have its signatures: that
// one and, if the image was only copied there, those after it.
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
			return Image{}, nil, fmt.Errorf("image %s: %s returned an invalid digest, %q: %w", named, place, sum, err)
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
	return Image{}, nil, fmt.Errorf("image %s: there is no place to look for it", named)
}

// Stored returns the image that currently has a name in a place, and the digest of its configuration, which
// build programs call the image's id; empty for a multi-platform image.
func Stored(ctx context.Context, ref string, place Place) (image Image, config digest.Digest, err error) {
	image, _, err = find(ctx, ref, []Place{place})
	if err != nil {
		return image, "", err
	}
	text, err := place.ImageManifest(ctx, image.String())
	if err != nil {
		return image, "", fmt.Errorf("read the manifest of %s in %s: %w", image, place, err)
	}
	// The text is trusted because of its digest.
	if err := image.Digest.Validate(); err != nil {
		return image, "", fmt.Errorf("%s in %s: %w", image, place, err)
	}
	if image.Digest.Algorithm().FromBytes(text) != image.Digest {
		return image, "", fmt.Errorf("%s has a different manifest for %s", place, image)
	}
	var manifest ocispec.Manifest
	if err := json.Unmarshal(text, &manifest); err != nil {
		return image, "", fmt.Errorf("read the manifest of %s in %s: %w", image, place, err)
	}
	return image, manifest.Config.Digest, nil
}

// Sign signs the image that a reference resolves to in the first place that has it, and stores the signature there. If it is
// already signed with the same key, nothing changes and fresh is false. Signatures by other keys are kept.
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

	// In cosign's format it is an image whose layers are the payloads.
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
		return ocispec.Manifest{}, fmt.Errorf("signatures of %s: the stored content is a %q, not a manifest", image, m.MediaType)
	}
	if len(m.Layers) > MaxSignatures {
		m.Layers = m.Layers[:MaxSignatures]
	}
	return m, nil
}

// ErrUnsigned means that no valid signature of the image by one of the keys was found.
var ErrUnsigned = errors.New("not signed by a trusted key")

// Verify returns the image that a reference currently resolves to, if it has a signature by one of the keys, and otherwise an error
// that wraps ErrUnsigned. Only the returned image is verified: the same reference may resolve to another image later.
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

// unsigned is the reason why an image is rejected, on one line.
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

// check checks one signature: by one of the keys, for this digest and this repository.
func (k Keys) check(ctx context.Context, place Place, image Image, layer ocispec.Descriptor) error {
	sum, err := base64.StdEncoding.DecodeString(layer.Annotations[annotation])
	if err != nil || len(sum) == 0 || layer.MediaType != payloadType {
		return errors.New("its stored signature is not valid")
	}
	if err := checkBlob(layer); err != nil {
		return fmt.Errorf("its stored signature is not valid: %w", err)
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
		return errors.New("its signature is by another key, or does not match its payload")
	}
	var claim payload.Cosign
	if err := json.Unmarshal(content, &claim); err != nil {
		return fmt.Errorf("its signature is not for an image: %w", err)
	}
	// There are two spellings of Docker Hub's name.
	want, err := name.NewRepository(image.repository.Name())
	if err != nil {
		return err
	}
	if claim.Image.DigestStr() != image.Digest.String() || claim.Image.Repository.Name() != want.Name() {
		return fmt.Errorf("its signature is for %s@%s", claim.Image.Repository.Name(), claim.Image.DigestStr())
	}
	return nil
}
