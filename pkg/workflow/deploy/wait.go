package deploy

import (
	"context"
	"errors"
	"fmt"

	"polymesh.dev/polymesh/pkg/diagnose"
	"polymesh.dev/polymesh/pkg/workflow/cluster"
	"polymesh.dev/polymesh/pkg/workflow/project"
)

// awaitReady waits for all workloads in parallel. The findings are the reasons why they did not become ready.
func (d *deployment) awaitReady(ctx context.Context) error {
	if d.dry || !d.Wait {
		return nil
	}
	ctx, cancel := context.WithTimeoutCause(ctx, d.Project.Timeout, fmt.Errorf("not within %s", d.Project.Timeout))
	defer cancel()
	type ended struct {
		findings []diagnose.Finding
		err      error
	}
	var waits []chan ended
	for _, o := range d.objects {
		if !diagnose.IsWorkload(o.GroupVersionKind().GroupKind()) {
			continue
		}
		done := make(chan ended, 1)
		waits = append(waits, done)
		go func() {
			findings, err := d.cluster.Await(ctx, d.Steps, o, func(places []diagnose.Place) string { return d.at(o, places) })
			done <- ended{findings, err}
		}()
	}
	var failed error
	for _, done := range waits {
		e := <-done
		d.result.Findings = append(d.result.Findings, e.findings...)
		switch {
		case e.err == nil:
		case errors.Is(e.err, cluster.ErrNotReady) && failed == nil:
			failed = cluster.ErrNotReady
		case !errors.Is(e.err, cluster.ErrNotReady):
			failed = e.err
		}
	}
	return failed
}

// at returns the file and line of the first place that a manifest has, or of the workload.
func (d *deployment) at(workload project.Object, places []diagnose.Place) string {
	for _, place := range places {
		if place.Object == "" && workload.File != "" {
			return workload.At(place.Path...)
		}
		for _, o := range d.objects {
			if o.File != "" && o.ID() == place.Object {
				return o.At(place.Path...)
			}
		}
	}
	return workload.At()
}
