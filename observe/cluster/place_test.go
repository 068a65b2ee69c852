package cluster

import (
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
)

func TestPlace(t *testing.T) {
	unwatched := New(Options{})
	_, known, final := unwatched.Place("x")
	require.False(t, known || final, "no pod is known yet")

	store := openStore(t, t.TempDir())
	c := watched(t, store)
	objects := read(t)
	is := func(c *Cluster, uid string, want Place) {
		t.Helper()
		got, known, final := c.Place(uid)
		require.True(t, final)
		require.Equal(t, want != Place{}, known, uid)
		require.Equal(t, want, got, uid)
	}
	pod := in[*corev1.Pod](t, objects, "api-7f9c-x1")
	pod.UID, pod.Spec.NodeName = "u1", ""
	c.give(t, pod)
	is(c, "u1", Place{}) // no node has it yet
	pod.Spec.NodeName = "n2"
	c.give(t, pod)
	own := Place{pod.Namespace, pod.Name, "n2"}
	is(c, "u1", own)

	// Another pod with its name, on another node: both are known, each at its place.
	next := pod.DeepCopy()
	next.UID, next.Spec.NodeName = "u2", "n3"
	c.give(t, next)
	is(c, "u1", own)
	is(c, "u2", Place{pod.Namespace, pod.Name, "n3"})
	c.take(t, next)
	is(c, "u2", Place{pod.Namespace, pod.Name, "n3"})

	// Who can create pods cannot take a deleted pod's place.
	thief := pod.DeepCopy()
	thief.Name, thief.UID, thief.Spec.NodeName, thief.Annotations = "thief", "u9", "n9", map[string]string{corev1.MirrorPodAnnotationKey: "u2"}
	c.give(t, thief)
	is(c, "u2", Place{pod.Namespace, pod.Name, "n3"})
	c.take(t, thief)
	is(c, "u2", Place{pod.Namespace, pod.Name, "n3"})

	// A pod of a file on the node, and one that claims to be another.
	static := pod.DeepCopy()
	static.Name, static.UID, static.Annotations = "proxy-n2", "u3", map[string]string{corev1.MirrorPodAnnotationKey: "hash"}
	c.give(t, static)
	is(c, "u3", Place{pod.Namespace, "proxy-n2", "n2"})
	is(c, "hash", Place{pod.Namespace, "proxy-n2", "n2"})
	fake := pod.DeepCopy()
	fake.Name, fake.UID, fake.Spec.NodeName, fake.Annotations = "fake", "u4", "n9", map[string]string{corev1.MirrorPodAnnotationKey: "u3"}
	c.give(t, fake)
	is(c, "u3", Place{pod.Namespace, "proxy-n2", "n2"})
	c.take(t, fake)
	is(c, "u3", Place{pod.Namespace, "proxy-n2", "n2"})
	c.take(t, static)
	is(c, "hash", Place{pod.Namespace, "proxy-n2", "n2"})

	// The next run of the store knows those that are in its documents.
	c.give(t, objects...)
	c.flush(time.Now())
	later := watched(t, store)
	documented := in[*corev1.Pod](t, objects, "api-7f9c-x1")
	is(later, string(documented.UID), Place{documented.Namespace, documented.Name, "node-1"})

	// Not every pod that ever was, but every one that is.
	c.give(t, pod)
	for i := range maxGone + 10 {
		p := in[*corev1.Pod](t, objects, "bare")
		p.Name, p.UID, p.Spec.NodeName = fmt.Sprint("p", i), types.UID(fmt.Sprint("uid", i)), "n2"
		c.give(t, p)
		c.take(t, p)
	}
	require.Len(t, c.places.gone, maxGone)
	require.Len(t, c.places.order, maxGone)
	is(c, "u1", own)
	is(c, "uid0", Place{})
	is(c, fmt.Sprint("uid", maxGone+9), Place{pod.Namespace, fmt.Sprint("p", maxGone+9), "n2"})
}
