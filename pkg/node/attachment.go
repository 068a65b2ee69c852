package node

import (
	"fmt"
	"os"
	"slices"

	"github.com/containernetworking/cni/libcni"
	current "github.com/containernetworking/cni/pkg/types/100"
)

// attachments are the pods that run on this node's network, as libcni has written them down when it connected them.
type attachments struct {
	network string
	plugins string // the folder of the CNI plugins
	cni     *libcni.CNIConfig
}

// newAttachments reads the notes in a folder, by default libcni's own, /var/lib/cni.
func newAttachments(network, plugins, notes string) attachments {
	return attachments{network, plugins, libcni.NewCNIConfigWithCacheDir([]string{plugins}, notes, nil)}
}

// attachment is one pod's.
type attachment struct {
	*libcni.NetworkAttachment
	list   *libcni.NetworkConfigList
	result *current.Result
}

// all lists the pods that run: libcni's notes outlive a boot, the network namespaces that they name do not.
func (a attachments) all() ([]attachment, error) {
	cached, err := a.cni.GetCachedAttachments("")
	if err != nil {
		return nil, fmt.Errorf("list the pods' networks: %w", err)
	}
	var out []attachment
	for _, c := range cached {
		if c.Network != a.network {
			continue
		}
		if _, err := os.Stat(c.NetNS); err != nil {
			continue
		}
		// A note that cannot be read, or is just removed, keeps nothing from the other pods.
		list, err := libcni.ConfListFromBytes(c.Config)
		if err != nil {
			continue
		}
		cachedResult, err := a.cni.GetNetworkListCachedResult(list, &libcni.RuntimeConf{ContainerID: c.ContainerID, IfName: c.IfName})
		if err != nil || cachedResult == nil {
			continue
		}
		result, err := current.NewResultFromResult(cachedResult)
		if err != nil {
			continue
		}
		out = append(out, attachment{c, list, result})
	}
	return out, nil
}

// runs reports whether a pod is still there.
func (a attachments) runs(pod attachment) (bool, error) {
	pods, err := a.all()
	return slices.ContainsFunc(pods, func(other attachment) bool { return other.ContainerID == pod.ContainerID }), err
}

const (
	portmap      = "portmap"
	portMappings = "portMappings"
)

// published are the pods with hostPorts.
func (a attachments) published() ([]attachment, error) {
	pods, err := a.all()
	var out []attachment
	for _, pod := range pods {
		if list, ok := pod.CapabilityArgs[portMappings].([]any); ok && len(list) > 0 {
			out = append(out, pod)
		}
	}
	return out, err
}
