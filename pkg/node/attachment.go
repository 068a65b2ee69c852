package node

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
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
		list, err := libcni.ConfListFromBytes(c.Config)
		if err != nil {
			return nil, fmt.Errorf("read the network of container %s: %w", c.ContainerID, err)
		}
		cachedResult, err := a.cni.GetNetworkListCachedResult(list, &libcni.RuntimeConf{ContainerID: c.ContainerID, IfName: c.IfName})
		if err != nil {
			return nil, fmt.Errorf("read the network of container %s: %w", c.ContainerID, err)
		}
		if cachedResult == nil {
			continue // it has just ended
		}
		result, err := current.NewResultFromResult(cachedResult)
		if err != nil {
			return nil, fmt.Errorf("read the network of container %s: %w", c.ContainerID, err)
		}
		out = append(out, attachment{c, list, result})
	}
	return out, nil
}

// hostPorts are the rules for containers' hostPorts, which the plugin portmap writes when a pod starts.
type hostPorts struct {
	attachments
	// next is the pod whose rules are looked at next: whoever removes rules removes those of all, so one a time is enough.
	next atomic.Int64
}

func (h *hostPorts) missing(ctx context.Context) (string, error) {
	pods, err := h.published()
	if err != nil || len(pods) == 0 {
		return "", err
	}
	pod := pods[int(h.next.Add(1))%len(pods)]
	if h.call(ctx, "CHECK", pod) == nil {
		return "", nil
	}
	// A pod that is just ending has no rules any more, and in a moment no note either.
	select {
	case <-ctx.Done():
		return "", ctx.Err()
	case <-time.After(endingWait):
	}
	runs, err := h.runs(pod)
	if err != nil || !runs || h.call(ctx, "CHECK", pod) == nil {
		return "", err
	}
	return "the rules of hostPorts", nil
}

// endingWait is how long the removal of a pod's network takes at most between its first plugin and its last one.
const endingWait = time.Second

// runs reports whether a pod is still there.
func (a attachments) runs(pod attachment) (bool, error) {
	pods, err := a.all()
	return slices.ContainsFunc(pods, func(other attachment) bool { return other.ContainerID == pod.ContainerID }), err
}

// restore writes the rules of those pods that lack them.
func (h *hostPorts) restore(ctx context.Context) error {
	pods, err := h.published()
	if err != nil {
		return err
	}
	var failures []error
	for _, pod := range pods {
		if h.call(ctx, "CHECK", pod) == nil {
			continue
		}
		err := errors.Join(h.call(ctx, "DEL", pod), h.call(ctx, "ADD", pod))
		if runs, _ := h.runs(pod); !runs {
			// It has ended meanwhile: its rules must not send the port to whoever gets its address next.
			err = h.call(ctx, "DEL", pod)
		}
		if err != nil {
			failures = append(failures, fmt.Errorf("hostPorts of container %s: %w", pod.ContainerID, err))
		}
	}
	return errors.Join(failures...)
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

// call runs the plugin portmap for a pod as libcni does
// (https://www.cni.dev/docs/spec/#section-2-execution-protocol), but leaves libcni's notes alone.
func (h *hostPorts) call(ctx context.Context, command string, pod attachment) error {
	for _, plugin := range pod.list.Plugins {
		if plugin.Network.Type != portmap {
			continue
		}
		conf, err := libcni.InjectConf(plugin, map[string]any{
			"name": pod.list.Name, "cniVersion": pod.list.CNIVersion, "prevResult": types.Result(pod.result),
			"runtimeConfig": map[string]any{portMappings: pod.CapabilityArgs[portMappings]},
		})
		if err != nil {
			return err
		}
		args := &invoke.Args{
			Command: command, ContainerID: pod.ContainerID, NetNS: pod.NetNS, PluginArgs: pod.CniArgs, IfName: pod.IfName, Path: h.plugins,
		}
		if command == "ADD" {
			_, err = invoke.ExecPluginWithResult(ctx, filepath.Join(h.plugins, portmap), conf.Bytes, args, nil)
			return err
		}
		return invoke.ExecPluginWithoutResult(ctx, filepath.Join(h.plugins, portmap), conf.Bytes, args, nil)
	}
	return nil
}

// bridge is the interface that connects the pods, with the gateway's address and the pods' ends in it. The plugin bridge
// makes it when a pod starts and does not look at it again for those that run.
type bridge struct {
	attachments
	// pods are this node's addresses for pods; empty as long as they are not known.
	pods func() string
}

// gateway is the bridge's own address: the plugin host-local takes the first of a range.
func (b *bridge) gateway() (netip.Prefix, error) {
	pods, err := netip.ParsePrefix(b.pods())
	if err != nil {
		return netip.Prefix{}, err
	}
	return netip.PrefixFrom(pods.Masked().Addr().Next(), pods.Bits()), nil
}

// ends are the host's ends of the running pods' interfaces.
func (b *bridge) ends() ([]netlink.Link, error) {
	pods, err := b.all()
	if err != nil {
		return nil, err
	}
	var out []netlink.Link
	for _, pod := range pods {
		for _, i := range pod.result.Interfaces {
			if i.Sandbox != "" || i.Name == Bridge {
				continue
			}
			link, err := netlink.LinkByName(i.Name)
			if err != nil {
				continue // it has just ended
			}
			out = append(out, link)
		}
	}
	return out, nil
}

// hardwareAddr is the one that the bridge had when the last pod was connected, which pods remember; nil for any.
func (b *bridge) hardwareAddr() net.HardwareAddr {
	pods, _ := b.all()
	for _, pod := range slices.Backward(pods) {
		for _, i := range pod.result.Interfaces {
			if hw, err := net.ParseMAC(i.Mac); err == nil && i.Name == Bridge && i.Sandbox == "" {
				return hw
			}
		}
	}
	return nil
}

func (b *bridge) missing(context.Context) (string, error) {
	if b.pods() == "" {
		return "", nil
	}
	ends, err := b.ends()
	if err != nil || len(ends) == 0 {
		return "", err
	}
	link, err := netlink.LinkByName(Bridge)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return "the interface " + Bridge + ", which connects the pods", nil
	}
	if err != nil {
		return "", fmt.Errorf("look at %s: %w", Bridge, err)
	}
	if link.Attrs().Flags&net.FlagUp == 0 {
		return Bridge + " is down: what connects the pods", nil
	}
	addrs, err := netlink.AddrList(link, netlink.FAMILY_V4)
	if err != nil {
		return "", fmt.Errorf("look at the addresses of %s: %w", Bridge, err)
	}
	gateway, err := b.gateway()
	if err != nil {
		return "", err
	}
	has := false
	for _, a := range addrs {
		has = has || a.IPNet.String() == gateway.String()
	}
	if !has {
		return "the address " + gateway.String() + " of " + Bridge + ", the pods' gateway", nil
	}
	for _, end := range ends {
		if end.Attrs().MasterIndex != link.Attrs().Index {
			return "the connection of a pod's interface " + end.Attrs().Name + " to " + Bridge, nil
		}
	}
	return "", nil
}

func (b *bridge) restore(context.Context) error {
	link, err := netlink.LinkByName(Bridge)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		// -1: the kernel's own length of the queue, as the plugin has it.
		made := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: Bridge, TxQLen: -1, HardwareAddr: b.hardwareAddr()}}
		if err := netlink.LinkAdd(made); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("make %s: %w", Bridge, err)
		}
		link, err = netlink.LinkByName(Bridge)
	}
	if err != nil {
		return fmt.Errorf("look at %s: %w", Bridge, err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("set %s up: %w", Bridge, err)
	}
	gateway, err := b.gateway()
	if err != nil {
		return err
	}
	address, err := netlink.ParseAddr(gateway.String())
	if err != nil {
		return err
	}
	if err := netlink.AddrReplace(link, address); err != nil {
		return fmt.Errorf("give %s the address %s: %w", Bridge, gateway, err)
	}
	ends, err := b.ends()
	if err != nil {
		return err
	}
	var failures []error
	for _, end := range ends {
		if end.Attrs().MasterIndex == link.Attrs().Index {
			continue
		}
		err := netlink.LinkSetMaster(end, link)
		if err == nil {
			// A pod reaches itself through a service.
			err = netlink.LinkSetHairpin(end, true)
		}
		if err != nil && !errors.Is(err, unix.ENODEV) {
			failures = append(failures, fmt.Errorf("connect %s to %s: %w", end.Attrs().Name, Bridge, err))
		}
	}
	published, err := b.published()
	if err == nil && len(published) > 0 {
		// What the plugin portmap sets, so that hostPorts answer on 127.0.0.1, is gone with the interface.
		err = os.WriteFile(filepath.Join("/proc/sys/net/ipv4/conf", Bridge, "route_localnet"), []byte("1"), 0o644)
	}
	return errors.Join(append(failures, err)...)
}

// kernelSettings let the machine forward packets, also between pods on one bridge, where the answer must pass the rules
// that translated the request.
type kernelSettings map[string]string

func forwarding() kernelSettings {
	return kernelSettings{
		"/proc/sys/net/ipv4/ip_forward":                 "1",
		"/proc/sys/net/bridge/bridge-nf-call-iptables":  "1",
		"/proc/sys/net/bridge/bridge-nf-call-ip6tables": "1",
	}
}

func (s kernelSettings) missing(context.Context) (string, error) {
	var off []string
	for path, value := range s {
		have, err := os.ReadFile(path)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return "", fmt.Errorf("look at packet forwarding: %w", err)
		}
		if strings.TrimSpace(string(have)) != value {
			off = append(off, filepath.Base(path)+"="+value)
		}
	}
	if len(off) == 0 {
		return "", nil
	}
	return "packet forwarding (" + strings.Join(off, ", ") + ")", nil
}

func (s kernelSettings) restore(context.Context) error {
	for path, value := range s {
		if have, err := os.ReadFile(path); err == nil && strings.TrimSpace(string(have)) == value {
			continue
		}
		if err := os.WriteFile(path, []byte(value), 0o644); err != nil {
			return fmt.Errorf("turn packet forwarding on: %w", err)
		}
	}
	return nil
}
