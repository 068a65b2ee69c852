package metrics

import (
	"sync/atomic"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/discovery/targetgroup"
	"github.com/prometheus/prometheus/model/labels"

	"polymesh.dev/polymesh/observe/scrapeconfig"
)

// places holds the cluster's pods and their nodes, from the discovery of the store's own jobs. A kubelet is only trusted about
// its own pods: an attacker who controls a node could otherwise forge metrics of pods on other nodes.
type places struct {
	nodes atomic.Pointer[map[podName]string]
}

type podName struct{ namespace, name string }

// found replaces all places. There is a group for each pod that has an address.
func (p *places) found(groups []*targetgroup.Group) {
	nodes := make(map[podName]string, len(groups))
	for _, g := range groups {
		namespace, name, node := scrapeconfig.Place(g.Labels)
		nodes[podName{namespace, name}] = node
	}
	p.nodes.Store(&nodes)
}

// allow reports whether a kubelet's sample is about its node, or about a pod there. The label node is the target's, not the sample's.
func (p *places) allow(ls labels.Labels) bool {
	pod := podName{ls.Get("namespace"), ls.Get("pod")}
	if pod == (podName{}) {
		return true
	}
	nodes := p.nodes.Load()
	if nodes == nil {
		return false
	}
	node, ok := (*nodes)[pod]
	return ok && node == ls.Get("node")
}

// kubelet reports whether a series comes from a kubelet.
func kubelet(ls labels.Labels) bool { return scrapeconfig.OfKubelet(ls.Get(model.JobLabel)) }
