package network

import (
	"fmt"
	"os"
	"slices"

	"github.com/containernetworking/cni/libcni"
	current "github.com/containernetworking/cni/pkg/types/100"
)

// attachments are the running pods on this node's network, as recorded by libcni when it attached them.
type attachments struct {
	network string
	plugins string // folder of the CNI plugins
	cni     *libcni.CNIConfig
}

// newAttachments reads the records in a folder, by default libcni's own, /var/lib/cni.
func newAttachments(network, plugins, notes string) attachments {
	return attachments{network, plugins, libcni.NewCNIConfigWithCacheDir([]string{plugins}, notes, nil)}
}

// attachment is the record of one pod.
type attachment struct {
	*libcni.NetworkAttachment
	list   *libcni.NetworkConfigList
	result *current.Result
}

// all lists the running pods: libcni's records survive a reboot, the network namespaces in them do not.
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
		// A record that is unreadable, or just being removed, must not affect other pods.
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

// runs reports whether a pod still exists.
func (a attachments) runs(pod attachment) (bool, error) {
	pods, err := a.all()
	return slices.ContainsFunc(pods, func(other attachment) bool { return other.ContainerID == pod.ContainerID }), err
}

const (
	portmap      = "portmap"
	portMappings = "portMappings"
)

// published returns the pods with hostPorts.
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
