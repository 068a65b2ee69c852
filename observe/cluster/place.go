package cluster

import (
	"slices"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
)

// Place is where a pod runs or ran.
type Place struct{ Namespace, Name, Node string }

// places knows the node of each pod, by UID, for some time also of deleted pods: what another node sends is only stored if it is about its
// own pods. The Cluster's mutex guards it.
type places struct {
	of, gone map[types.UID]Place
	// order are the UIDs in gone, the oldest first.
	order []types.UID
}

func newPlaces() places { return places{of: map[types.UID]Place{}, gone: map[types.UID]Place{}} }

// mirrorAnnotation holds the kubelet's UID of a pod that is defined by a file on the node; the object has another UID.
const mirrorAnnotation = corev1.MirrorPodAnnotationKey

// Place returns where the pod with a UID runs or ran. A pod that is defined by a file is found by both the kubelet's and the object's UID.
// final is false if the pods are not known yet.
func (c *Cluster) Place(uid string) (p Place, known, final bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if p, known = c.places.of[types.UID(uid)]; !known {
		p, known = c.places.gone[types.UID(uid)]
	}
	return p, known, c.pods.synced
}

// uids returns the UIDs of a pod.
func uids(p *corev1.Pod) []types.UID {
	list := []types.UID{p.UID}
	if mirrored := types.UID(p.Annotations[mirrorAnnotation]); mirrored != "" && mirrored != p.UID {
		list = append(list, mirrored)
	}
	return list
}

// put adds or updates a pod.
func (l *places) put(p *corev1.Pod) {
	if p.Spec.NodeName == "" {
		return
	}
	for _, uid := range uids(p) {
		place := Place{p.Namespace, p.Name, p.Spec.NodeName}
		// A pod cannot claim the UID of another one with the annotation, also if that was deleted.
		if uid != p.UID && (taken(l.of, uid, place) || taken(l.gone, uid, place)) {
			continue
		}
		l.of[uid] = place
	}
}

// taken reports whether a UID is known, and not of this place.
func taken(in map[types.UID]Place, uid types.UID, place Place) bool {
	had, ok := in[uid]
	return ok && had != place
}

// leave removes a deleted pod.
func (l *places) leave(p *corev1.Pod) {
	for _, uid := range uids(p) {
		if place, ok := l.of[uid]; ok && place == (Place{p.Namespace, p.Name, p.Spec.NodeName}) {
			delete(l.of, uid)
			l.remember(uid, place)
		}
	}
}

// remember keeps the place of a deleted pod.
func (l *places) remember(uid types.UID, p Place) {
	if _, ok := l.gone[uid]; !ok {
		l.order = append(l.order, uid)
	}
	l.gone[uid] = p
	if n := len(l.order) - maxGone; n > 0 {
		for _, old := range l.order[:n] {
			delete(l.gone, old)
		}
		l.order = slices.Delete(l.order, 0, n)
	}
}
