package loadbalancer

import (
	"cmp"
	"hash/fnv"
	"net/netip"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"

	"polymesh.dev/polymesh/pkg/condition"
)

// announcer is a node that can announce addresses of the pool: it has the label node.kubernetes.io/exclude-from-external-load-balancers
// neither, nor is it being deleted, and it is Ready.
type announcer struct {
	name string
	// cordoned is whether it is about to go.
	cordoned bool
}

// announcers returns the nodes that can announce addresses, and when that changes by itself. A node that has not reported within
// --node-monitor-grace-period, 50 s by default, is lost, and its addresses move; one that says itself that it is not Ready may only be
// restarting its kubelet, and has readyGrace. publish must have seen these nodes.
func (v *nodeView) announcers(all []*corev1.Node, now time.Time) (out []announcer, next time.Duration) {
	for _, n := range all {
		if _, excluded := n.Labels[corev1.LabelNodeExcludeBalancers]; excluded || n.DeletionTimestamp != nil {
			continue
		}
		switch ready := condition.NodeReady(n); {
		case ready == nil:
			continue
		case ready.Status == corev1.ConditionTrue:
		case ready.Status == corev1.ConditionFalse:
			last, known := v.lastReady[n.UID]
			left := readyGrace - now.Sub(last)
			if !known || left <= 0 {
				continue
			}
			if next == 0 || left < next {
				next = left
			}
		default:
			continue
		}
		out = append(out, announcer{n.Name, n.Spec.Unschedulable})
	}
	return out, next
}

// elect returns the node that announces an address of the pool: the one that does, while it can, because connections end when an
// address moves. Otherwise it is chosen by a hash of address and node (rendezvous hashing), so that the addresses are spread over the nodes.
//
// With externalTrafficPolicy Local, only a node with a ready endpoint passes traffic on. A cordoned node is used if there is no other. If
// there is none at all, the address stays where it is, so that it works again as soon as that node does.
func elect(s service, address netip.Addr, nodes []announcer) string {
	passes := func(n announcer) bool { return !s.local || s.endpoints[n.name] }
	for _, can := range []func(announcer) bool{
		func(n announcer) bool { return passes(n) && !n.cordoned },
		passes,
	} {
		var names []string
		for _, n := range nodes {
			if can(n) {
				names = append(names, n.name)
			}
		}
		if slices.Contains(names, s.announcer) {
			return s.announcer
		}
		if len(names) > 0 {
			return slices.MaxFunc(names, func(a, b string) int {
				return cmp.Or(cmp.Compare(weight(address, a), weight(address, b)), cmp.Compare(a, b))
			})
		}
	}
	return s.announcer
}

func weight(address netip.Addr, node string) uint64 {
	h := fnv.New64a()
	h.Write([]byte(node)) // never fails
	h.Write(address.AsSlice())
	// FNV's last bytes change the low bits only.
	sum := h.Sum64()
	sum ^= sum >> 33
	sum *= 0xff51afd7ed558ccd
	return sum ^ sum>>33
}
