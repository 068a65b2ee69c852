package cluster

import (
	"slices"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
)

// Place is where a pod runs, or has run.
type Place struct{ Namespace, Name, Node string }

// places knows the node of each pod, by UID, for some time also of pods that are gone: what another node sends is only stored if it is about its
// own pods. The Cluster's mutex guards it.
type places struct {
	of, gone map[types.UID]Place
	// order are the UIDs in gone, the oldest first.
	order []types.UID
}

func newPlaces() places { return places{of: map[types.UID]Place{}, gone: map[types.UID]Place{}} }

// mirrorAnnotation has the kubelet's UID of a pod that is defined by a file on the node; the object has another one.
const mirrorAnnotation = corev1.MirrorPodAnnotationKey

// Place returns where the pod with a UID runs, or has run. Of a pod that is defined by a file, both the kubelet's and the object's UID are known.
// final is false if the pods are not known yet.
func (c *Cluster) Place(uid string) (p Place, known, final bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if p, known = c.places.of[types.UID(uid)]; !known {
		p, known = c.places.gone[types.UID(uid)]
	}
	return p, known, c.pods.synced
}

// uids are a pod's.
func uids(p *corev1.Pod) []types.UID {
	list := []types.UID{p.UID}
	if mirrored := types.UID(p.Annotations[mirrorAnnotation]); mirrored != "" && mirrored != p.UID {
		list = append(list, mirrored)
	}
	return list
}

// put notes a pod that is there.
func (l *places) put(p *corev1.Pod) {
	if p.Spec.NodeName == "" {
		return
	}
	for _, uid := range uids(p) {
		place := Place{p.Namespace, p.Name, p.Spec.NodeName}
		// An annotation does not make another pod's UID this one's.
		if had, ok := l.of[uid]; ok && uid != p.UID && had != place {
			continue
		}
		l.of[uid] = place
	}
}

// leave notes that a pod is gone.
func (l *places) leave(p *corev1.Pod) {
	for _, uid := range uids(p) {
		if place, ok := l.of[uid]; ok && place == (Place{p.Namespace, p.Name, p.Spec.NodeName}) {
			delete(l.of, uid)
			l.remember(uid, place)
		}
	}
}

// remember keeps the place of a pod that is not there.
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
