package imagepolicy

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"

	"polymesh.dev/polymesh/pkg/converge"
)

// Every server with keys has a record on the ValidatingWebhookConfiguration: an annotation with this prefix and a hash of its name. One
// without keys leaves the webhooks alone while there is a record of another one: its API server then finds no webhook on its loopback, and
// rejects pods in the namespaces with the label.
const recordPrefix = "servers.image-policy.polymesh.dev/"

// record is a server with keys.
type record struct {
	Server string `json:"server"`
	// Keys is their fingerprint (signature.Keys).
	Keys string `json:"keys"`
}

// recordName is the annotation of a server: a name may be longer than that of an annotation.
func recordName(server string) string {
	sum := sha256.Sum256([]byte(server))
	return recordPrefix + hex.EncodeToString(sum[:8])
}

// records returns the records of the other servers, by name. One that cannot be read counts as a server with other keys.
func (p *Policy) records(config *unstructured.Unstructured) []record {
	var out []record
	for key, value := range config.GetAnnotations() {
		if !strings.HasPrefix(key, recordPrefix) || key == recordName(p.opts.Server) {
			continue
		}
		var r record
		if err := json.Unmarshal([]byte(value), &r); err != nil || r.Server == "" {
			r = record{Server: strings.TrimPrefix(key, recordPrefix)}
		}
		out = append(out, r)
	}
	slices.SortFunc(out, func(a, b record) int { return strings.Compare(a.Server, b.Server) })
	return out
}

// agree writes this server's record, and returns an error if another server has other keys.
func (p *Policy) agree(ctx context.Context) error {
	if !p.opts.Several {
		return nil
	}
	keys, err := p.keys.Fingerprint()
	if err != nil {
		return err
	}
	config, err := p.dynamic.Resource(validatingWebhooks).Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return fmt.Errorf("read %s %s: %w", validatingWebhooks.Resource, name, err)
	}
	own, err := json.Marshal(record{p.opts.Server, keys})
	if err != nil {
		return err
	}
	if config.GetAnnotations()[recordName(p.opts.Server)] != string(own) {
		if err := p.annotate(ctx, config, string(own)); err != nil {
			return err
		}
	}
	for _, r := range p.records(config) {
		if r.Keys != keys {
			return converge.Later(fmt.Sprintf("server %q has other keys: an image may run or not, depending on the server that is asked; %s%s", r.Server, restart, ifGone))
		}
	}
	return nil
}

// restart is what to do about servers with different keys: the setting of the first one was changed, or one runs an earlier version.
const restart = "--image-policy-key is a setting of the cluster, which servers read when they start: restart them, the first one before the others"

const ifGone = " (if that server no longer exists, `polymesh kubectl delete validatingwebhookconfiguration " + name + "`: the others put it back)"

// leave removes this server's record. It returns nil if no server has keys, and so the webhooks can go.
func (p *Policy) leave(ctx context.Context) error {
	config, err := p.dynamic.Resource(validatingWebhooks).Get(ctx, name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		p.unused = ""
		return nil
	}
	if err != nil {
		return fmt.Errorf("read %s %s: %w", validatingWebhooks.Resource, name, err)
	}
	if _, has := config.GetAnnotations()[recordName(p.opts.Server)]; has {
		if err := p.annotate(ctx, config, nil); err != nil {
			return err
		}
	}
	if others := p.records(config); len(others) > 0 {
		p.unused = ""
		return converge.Later(fmt.Sprintf("server %q has an image policy and this one has no key: it lets no pod in namespaces with the label %s=%s be created; %s%s",
			others[0].Server, Label, Enforce, restart, ifGone))
	}
	// A server that starts applies the webhooks, and its record right after.
	if p.unused != config.GetResourceVersion() {
		p.unused = config.GetResourceVersion()
		return converge.Later("the image policy's webhooks are removed if no server uses them")
	}
	return nil
}

// annotate sets or, with nil, removes this server's record.
func (p *Policy) annotate(ctx context.Context, config *unstructured.Unstructured, value any) error {
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{
		"uid": config.GetUID(), "resourceVersion": config.GetResourceVersion(), "annotations": map[string]any{recordName(p.opts.Server): value},
	}})
	if err != nil {
		return err
	}
	_, err = p.dynamic.Resource(validatingWebhooks).Patch(ctx, name, types.MergePatchType, patch, metav1.PatchOptions{FieldManager: fieldManager})
	if err != nil {
		return fmt.Errorf("write this server's record on %s %s: %w", validatingWebhooks.Resource, name, err)
	}
	return nil
}
