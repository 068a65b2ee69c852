package node

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"polymesh.dev/polymesh/pkg/layout"
)

// bridge is the interface that connects the pods, with the gateway's address and the pods' ends in it. The plugin bridge
// makes it when a pod starts and does not look at it again for those that run.
type bridge struct {
	attachments
	// pods are this node's addresses for pods; empty as long as they are not known.
	pods func() string
	// alias marks the interface as this data dir's, for `polymesh reset`.
	alias string
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
			if i.Sandbox != "" || i.Name == layout.Bridge {
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
			if hw, err := net.ParseMAC(i.Mac); err == nil && i.Name == layout.Bridge && i.Sandbox == "" {
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
	link, err := netlink.LinkByName(layout.Bridge)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return "the interface " + layout.Bridge + ", which connects the pods", nil
	}
	if err != nil {
		return "", fmt.Errorf("look at %s: %w", layout.Bridge, err)
	}
	if link.Attrs().Flags&net.FlagUp == 0 {
		return layout.Bridge + " is down: what connects the pods", nil
	}
	addrs, err := netlink.AddrList(link, netlink.FAMILY_V4)
	if err != nil {
		return "", fmt.Errorf("look at the addresses of %s: %w", layout.Bridge, err)
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
		return "the address " + gateway.String() + " of " + layout.Bridge + ", the pods' gateway", nil
	}
	for _, end := range ends {
		if end.Attrs().MasterIndex != link.Attrs().Index {
			return "the connection of a pod's interface " + end.Attrs().Name + " to " + layout.Bridge, nil
		}
	}
	return "", nil
}

func (b *bridge) restore(context.Context) error {
	link, err := netlink.LinkByName(layout.Bridge)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		// -1: the kernel's own length of the queue, as the plugin has it.
		made := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: layout.Bridge, TxQLen: -1, HardwareAddr: b.hardwareAddr()}}
		if err := netlink.LinkAdd(made); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("make %s: %w", layout.Bridge, err)
		}
		// Nothing else marks it: the next look at the bridge finds one that it has not expected.
		if link, err = netlink.LinkByName(layout.Bridge); err == nil {
			err = netlink.LinkSetAlias(link, b.alias)
		}
	}
	if err != nil {
		return fmt.Errorf("look at %s: %w", layout.Bridge, err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("set %s up: %w", layout.Bridge, err)
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
		return fmt.Errorf("give %s the address %s: %w", layout.Bridge, gateway, err)
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
			failures = append(failures, fmt.Errorf("connect %s to %s: %w", end.Attrs().Name, layout.Bridge, err))
		}
	}
	published, err := b.published()
	if err == nil && len(published) > 0 {
		// What the plugin portmap sets, so that hostPorts answer on 127.0.0.1, is gone with the interface.
		err = os.WriteFile(filepath.Join("/proc/sys/net/ipv4/conf", layout.Bridge, "route_localnet"), []byte("1"), 0o644)
	}
	return errors.Join(append(failures, err)...)
}
