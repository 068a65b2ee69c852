package deploy

import (
	"context"
	"fmt"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// maxNamed limits how many workloads a warning names.
const maxNamed = 3

// warnOfNodes warns if pods can be scheduled on nodes that do not get the images: without a registry, images are loaded into this
// machine's node only, and are never pulled.
func (d *deployment) warnOfNodes(ctx context.Context) error {
	if len(d.images) == 0 || d.mover.registry {
		return nil
	}
	free := d.unpinned()
	if len(free) == 0 {
		return nil
	}
	nodes, err := d.cluster.Client.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if apierrors.IsForbidden(err) {
		return nil // a user who may not read them deploys without this check
	}
	if err != nil {
		return fmt.Errorf("list the nodes: %w", err)
	}
	n := 0
	for i := range nodes.Items {
		if node := &nodes.Items[i]; !node.Spec.Unschedulable && node.DeletionTimestamp == nil {
			n++
		}
	}
	if n < 2 {
		return nil
	}
	if len(free) > maxNamed {
		free = append(free[:maxNamed], fmt.Sprintf("%d more", len(free)-maxNamed))
	}
	d.warn(fmt.Sprintf("images are loaded into this machine's node only, and the cluster has %d nodes: on another one, pods of %s cannot start. Use --registry to push the images, or pin the pods to this node: nodeSelector %s",
		n, strings.Join(free, ", "), corev1.LabelHostname))
	return nil
}

// unpinned returns the workloads with an image that is built here whose pods can run on more than one node.
func (d *deployment) unpinned() []string {
	built := map[string]bool{}
	for _, j := range d.images {
		built[j.ref.Short] = true
	}
	var found []string
	seen := map[string]bool{}
	for _, c := range containers(d.objects) {
		id := c.object.ID()
		if !built[c.image] || seen[id] {
			continue
		}
		spec, _ := valueAt(c.object.Object, c.path[:len(c.path)-2]).(map[string]any)
		name, _ := spec["nodeName"].(string)
		selector, _ := spec["nodeSelector"].(map[string]any)
		if hostname, _ := selector[corev1.LabelHostname].(string); name == "" && hostname == "" {
			seen[id] = true
			found = append(found, id)
		}
	}
	return found
}
