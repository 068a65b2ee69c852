// Package ssa applies objects on the server's side (https://kubernetes.io/docs/reference/using-api/server-side-apply), and
// reads from their managed fields who has applied what.
//
// It owns the names of Polymesh's field managers, because the API server distinguishes owners by these names only, and the
// migration from the name that earlier versions shared. Every part that applies objects uses it: the add-ons, the image
// policy, the mesh, and the workflow.
package ssa

import (
	"context"
	"fmt"
	"strings"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"
)

// Field managers. Each part of the server has its own.
const (
	Addon       = "polymesh-addon"
	Mesh        = "polymesh-mesh"
	ImagePolicy = "polymesh-image-policy"
	NodeRole    = "polymesh-node"
	ServiceLB   = "polymesh-servicelb"
	Observe     = "polymesh-observe"
	// Deploy is `polymesh deploy`. In earlier versions the parts of the server used it too; see TakeOver.
	Deploy  = "polymesh"
	Rollout = "polymesh-rollout"
)

// Options define how to apply.
type Options struct {
	// Manager becomes the owner of the object's fields.
	Manager string
	// Force takes fields over that another manager owns. Without it they are a conflict (apierrors.IsConflict), and nothing
	// is changed.
	Force bool
	// DryRun has the API server do everything but store the object.
	DryRun bool
	// WebhookWait is how long an admission webhook may not answer, as that of a control plane which starts. Zero does not
	// wait.
	WebhookWait time.Duration
}

const (
	// conflictTries bounds how often a forced apply is repeated because others write the object at the same time.
	conflictTries = 5
	conflictPause = 50 * time.Millisecond
	webhookPause  = time.Second
)

// Apply makes the fields that obj names what they are there, and removes those that the manager applied before and obj no
// longer names. It returns the object as it is, or in a dry run would be.
func Apply(ctx context.Context, r dynamic.ResourceInterface, obj *unstructured.Unstructured, o Options) (*unstructured.Unstructured, error) {
	data, err := obj.MarshalJSON()
	if err != nil {
		return nil, fmt.Errorf("encode %s %s: %w", obj.GetKind(), obj.GetName(), err)
	}
	options := metav1.PatchOptions{FieldManager: o.Manager, Force: &o.Force}
	if o.DryRun {
		options.DryRun = []string{metav1.DryRunAll}
	}
	begin, conflicts := time.Now(), 0
	for {
		live, err := r.Patch(ctx, obj.GetName(), types.ApplyPatchType, data, options)
		var pause time.Duration
		switch {
		case err == nil:
			return live, nil
		case ctx.Err() != nil:
			return nil, context.Cause(ctx)
		case o.Force && apierrors.IsConflict(err) && conflicts < conflictTries:
			conflicts++
			pause = conflictPause
		case webhookUnavailable(err) && time.Since(begin) < o.WebhookWait:
			pause = webhookPause
		default:
			return nil, err
		}
		timer := time.NewTimer(pause)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil, context.Cause(ctx)
		case <-timer.C:
		}
	}
}

// webhookUnavailable reports whether an admission webhook could not be asked, which is not a refusal
// (k8s.io/apiserver/pkg/admission/plugin/webhook/errors).
func webhookUnavailable(err error) bool {
	return apierrors.IsInternalError(err) && strings.Contains(err.Error(), "failed calling webhook") && !strings.Contains(err.Error(), "denied the request")
}
