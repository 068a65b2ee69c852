package deploy

import (
	"context"
	"encoding/json"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	cmdutil "k8s.io/kubectl/pkg/cmd/util"

	"polymesh.dev/polymesh/pkg/workflow/project"
)

// originAnnotation of the set's Secret records where the project is deployed from (project.Origin, as JSON).
const originAnnotation = "polymesh.dev/origin"

// originOf returns the recorded origin; ok is false if there is none, or it is not valid.
func originOf(parent *corev1.Secret) (origin project.Origin, ok bool) {
	text, ok := parent.Annotations[originAnnotation]
	if !ok || json.Unmarshal([]byte(text), &origin) != nil {
		return project.Origin{}, false
	}
	return origin, origin != project.Origin{}
}

// identify returns an error if another project of the same name is deployed, before anything is changed: this one would change
// and remove what that one has applied.
func (d *deployment) identify(ctx context.Context) (err error) {
	if d.origin, err = d.Project.Origin(ctx); err != nil {
		return err
	}
	parent, err := d.cluster.Client.CoreV1().Secrets(d.Project.Namespace).Get(ctx, parentName(d.Project), metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look for project %s in namespace %s: %w", d.Project.Name, d.Project.Namespace, err)
	}
	return d.compare(ctx, parent)
}

// compare sets d.adopted if the project was deployed from elsewhere and the user takes it over.
func (d *deployment) compare(ctx context.Context, parent *corev1.Secret) error {
	recorded, ok := originOf(parent)
	if ok && recorded.Same(d.origin) {
		return nil
	}
	if !ok {
		// A deploy that was interrupted before it recorded its origin has no members yet.
		empty, err := d.isEmpty(ctx)
		if err != nil || empty {
			return err
		}
	}
	if d.Adopt {
		d.adopted = true
		return nil
	}
	return fmt.Errorf(`project %[1]s in namespace %[2]s was deployed from elsewhere
  there: %[3]s
  here:  %[4]s
If that is another project, give this one a different name (name: in %[5]s). If it is this one, which has moved, take it over once with --adopt`,
		d.Project.Name, d.Project.Namespace, recorded, d.origin, project.File)
}

// isEmpty reports whether the project's set has no members.
func (d *deployment) isEmpty(ctx context.Context) (bool, error) {
	s, err := newSet(d.cluster, d.Project)
	if err != nil {
		return false, err
	}
	// It reads the members of the set.
	if err := s.BeforeApply(nil, cmdutil.DryRunServer, metav1.FieldValidationStrict); err != nil {
		return false, err
	}
	members, err := s.FindAllObjectsToPrune(ctx, d.cluster.Dynamic, nil)
	return len(members) == 0, err
}

// claimTries limits how often the set's Secret is read again because another deploy wrote it in between.
const claimTries = 5

// claim records the origin. Of two concurrent projects only one gets the name: the Secret must not have changed since it was
// read.
func (d *deployment) claim(ctx context.Context, s *set) error {
	text, err := json.Marshal(d.origin)
	if err != nil {
		return err
	}
	secrets := d.cluster.Client.CoreV1().Secrets(d.Project.Namespace)
	for range claimTries {
		parent, err := secrets.Get(ctx, parentName(d.Project), metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			if err := s.BeforeApply(nil, cmdutil.DryRunNone, metav1.FieldValidationStrict); err != nil {
				return fmt.Errorf("record the project in %s: %w", d.Project.Namespace, err)
			}
			continue
		}
		if err != nil {
			return fmt.Errorf("record the project in %s: %w", d.Project.Namespace, err)
		}
		if err := d.compare(ctx, parent); err != nil {
			return err
		}
		if parent.Annotations[originAnnotation] == string(text) {
			return nil
		}
		patch, err := json.Marshal(map[string]any{"metadata": map[string]any{
			"resourceVersion": parent.ResourceVersion, "annotations": map[string]string{originAnnotation: string(text)},
		}})
		if err != nil {
			return err
		}
		_, err = secrets.Patch(ctx, parent.Name, types.MergePatchType, patch, metav1.PatchOptions{FieldManager: fieldManager})
		if err == nil {
			return nil
		}
		if !apierrors.IsConflict(err) {
			return fmt.Errorf("record the project in %s: %w", d.Project.Namespace, err)
		}
	}
	return fmt.Errorf("record the project in %s: the Secret %s keeps changing: is another deploy running?", d.Project.Namespace, parentName(d.Project))
}
