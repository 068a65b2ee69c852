package imagepolicy

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	admission "k8s.io/api/admission/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/kubernetes/pkg/credentialprovider"
	"k8s.io/kubernetes/pkg/credentialprovider/secrets"

	"polymesh.dev/polymesh/pkg/signature"
)

// maxReview limits what is read of a request, in bytes: etcd accepts objects of up to 1.5 MiB, and a review may contain two.
const maxReview = 8 << 20

// operation is one of a JSON patch (RFC 6902).
type operation struct {
	Op    string `json:"op"`
	Path  string `json:"path"`
	Value string `json:"value"`
}

// decide returns a patch for the new images of a pod, or an error that explains why the pod is rejected.
type decide func(ctx context.Context, images []imageField, logins credentialprovider.DockerKeyring) ([]operation, error)

// handler serves admission reviews (admission.k8s.io/v1).
func (p *Policy) handler(decide decide) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var review admission.AdmissionReview
		if err := json.NewDecoder(io.LimitReader(r.Body, maxReview)).Decode(&review); err != nil || review.Request == nil {
			http.Error(w, "not an admission review", http.StatusBadRequest)
			return
		}
		response := &admission.AdmissionResponse{UID: review.Request.UID, Allowed: true}
		patch, err := p.review(r.Context(), review.Request, decide)
		if err == nil && len(patch) > 0 {
			kind := admission.PatchTypeJSONPatch
			response.PatchType = &kind
			response.Patch, err = json.Marshal(patch)
		}
		if err != nil {
			p.opts.Log.Info("pod rejected", "component", p.Name(), "namespace", review.Request.Namespace, "pod", review.Request.Name, "err", err)
			response = &admission.AdmissionResponse{UID: review.Request.UID, Result: &metav1.Status{
				Code: http.StatusForbidden, Reason: metav1.StatusReasonForbidden, Message: err.Error(),
			}}
		}
		review.Request, review.Response = nil, response
		w.Header().Set("Content-Type", "application/json")
		if err := json.NewEncoder(w).Encode(review); err != nil {
			p.opts.Log.Debug("response not sent", "component", p.Name(), "err", err)
		}
	})
}

func (p *Policy) review(ctx context.Context, request *admission.AdmissionRequest, decide decide) ([]operation, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout*4/5)
	defer cancel()
	var pod, old corev1.Pod
	if err := json.Unmarshal(request.Object.Raw, &pod); err != nil {
		return nil, fmt.Errorf("read the pod: %w", err)
	}
	if len(request.OldObject.Raw) > 0 {
		if err := json.Unmarshal(request.OldObject.Raw, &old); err != nil {
			return nil, fmt.Errorf("read the pod as it was: %w", err)
		}
	}
	// An image that was accepted stays: the labels of a running pod can change also after a key was withdrawn.
	had := map[string]string{}
	for _, field := range images(&old) {
		had[field.path] = field.image
	}
	var fresh []imageField
	for _, field := range images(&pod) {
		if had[field.path] != field.image {
			fresh = append(fresh, field)
		}
	}
	if len(fresh) == 0 {
		return nil, nil
	}
	logins, err := p.logins(ctx, request.Namespace, pod.Spec.ImagePullSecrets)
	if err != nil {
		return nil, err
	}
	return decide(ctx, fresh, logins)
}

// imageField is a field of a pod that names an image.
type imageField struct {
	owner string // "container api"
	path  string // JSON pointer
	image string
	pull  corev1.PullPolicy
}

// images returns all images that a pod names.
func images(pod *corev1.Pod) (fields []imageField) {
	add := func(owner, image string, pull corev1.PullPolicy, path string, args ...any) {
		fields = append(fields, imageField{owner, fmt.Sprintf(path, args...), image, pull})
	}
	for i, c := range pod.Spec.InitContainers {
		add("container "+c.Name, c.Image, c.ImagePullPolicy, "/spec/initContainers/%d/image", i)
	}
	for i, c := range pod.Spec.Containers {
		add("container "+c.Name, c.Image, c.ImagePullPolicy, "/spec/containers/%d/image", i)
	}
	for i, c := range pod.Spec.EphemeralContainers {
		add("container "+c.Name, c.Image, c.ImagePullPolicy, "/spec/ephemeralContainers/%d/image", i)
	}
	for i, v := range pod.Spec.Volumes {
		if v.Image != nil {
			add("volume "+v.Name, v.Image.Reference, v.Image.PullPolicy, "/spec/volumes/%d/image/reference", i)
		}
	}
	return fields
}

// pin checks each image that is named by a tag, and writes its digest into the pod.
func (p *Policy) pin(ctx context.Context, fields []imageField, logins credentialprovider.DockerKeyring) (patch []operation, err error) {
	for _, field := range fields {
		named, err := reference.ParseDockerRef(field.image)
		if err != nil {
			return nil, fmt.Errorf("%s: image %q: %w", field.owner, field.image, err)
		}
		if _, exact := named.(reference.Digested); exact {
			continue // check verifies it
		}
		sum, err := p.verify(ctx, field, logins)
		if err != nil {
			return nil, err
		}
		// The tag stays for people to read; the kubelet uses the digest.
		exact, err := pinned(field.image, sum)
		if err != nil {
			return nil, fmt.Errorf("%s: image %q: %w", field.owner, field.image, err)
		}
		patch = append(patch, operation{"replace", field.path, exact})
	}
	return patch, nil
}

// pinned returns an image's name as it is written, with its tag, "latest" if it has none, and the digest.
func pinned(image, sum string) (string, error) {
	parsed, err := reference.Parse(image)
	if err != nil {
		return "", err
	}
	named, ok := parsed.(reference.Named)
	if !ok {
		return "", reference.ErrNameEmpty
	}
	exact, err := reference.WithDigest(reference.TagNameOnly(named), digest.Digest(sum))
	if err != nil {
		return "", err
	}
	return exact.String(), nil
}

// check rejects images that are not named by digest, or not signed.
func (p *Policy) check(ctx context.Context, fields []imageField, logins credentialprovider.DockerKeyring) ([]operation, error) {
	for _, field := range fields {
		named, err := reference.ParseDockerRef(field.image)
		if err != nil {
			return nil, fmt.Errorf("%s: image %q: %w", field.owner, field.image, err)
		}
		if _, exact := named.(reference.Digested); !exact {
			return nil, fmt.Errorf("%s: image %s has no digest, because another webhook has set it last: that webhook must write name@sha256:…", field.owner, field.image)
		}
		if _, err := p.verify(ctx, field, logins); err != nil {
			return nil, err
		}
	}
	return nil, nil
}

// verify returns the digest of an image that may run.
func (p *Policy) verify(ctx context.Context, field imageField, logins credentialprovider.DockerKeyring) (digest string, err error) {
	named, err := reference.ParseDockerRef(field.image)
	if err != nil {
		return "", fmt.Errorf("%s: image %q: %w", field.owner, field.image, err)
	}
	shipped, err := p.node.Shipped(ctx, named.String())
	if err != nil {
		return "", fmt.Errorf("%s: image %s: %w", field.owner, field.image, err)
	}
	if shipped {
		sum, err := p.node.Digest(ctx, named.String())
		return sum.String(), err
	}
	registry := signature.NewRegistry(p.opts.RegistryDirs, logins)
	places := []signature.Place{p.node, registry}
	if _, exact := named.(reference.Digested); !exact && field.pull == corev1.PullAlways {
		// The kubelet has the tag resolved again, by nodes or the registry, whatever the node has.
		places = places[1:]
	}
	image, err := p.keys.Verify(ctx, field.image, places...)
	if errors.Is(err, signature.ErrUnsigned) {
		return "", fmt.Errorf("%s: image %s is not signed by a key of this server (%w): sign it (polymesh image sign --key FILE %s), or name one that is", field.owner, field.image, err, field.image)
	}
	if err != nil {
		return "", fmt.Errorf("%s: could not determine whether the image is signed: %w", field.owner, err)
	}
	return image.Digest.String(), nil
}

// logins returns those of the pod's own pull secrets, read as the kubelet reads them.
func (p *Policy) logins(ctx context.Context, namespace string, refs []corev1.LocalObjectReference) (credentialprovider.DockerKeyring, error) {
	var found []corev1.Secret
	for _, ref := range refs {
		secret, err := p.client.CoreV1().Secrets(namespace).Get(ctx, ref.Name, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			continue // as the kubelet does
		}
		if err != nil {
			return nil, fmt.Errorf("read the pull secret %s: %w", ref.Name, err)
		}
		found = append(found, *secret)
	}
	return secrets.MakeDockerKeyring(found, &credentialprovider.BasicDockerKeyring{})
}
