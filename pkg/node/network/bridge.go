package network

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

// bridge is the interface that connects the pods, with the gateway's address and the host ends of the pods' interfaces. The bridge plugin
// creates it when a pod starts and does not check it again for running pods.
type bridge struct {
	attachments
	// pods is this node's pod address range; empty until it is known.
	pods func() string
	// alias marks the interface as this data dir's, for `polymesh reset`.
	alias string
	// mtu is that of new pods, in bytes; 0 until it is known. Packets of the node to them must not be larger.
	mtu func() int
	// settled is the MTU that was set last.
	settled int
}

// gateway returns the bridge's own address: the host-local plugin uses the first of a range.
func (b *bridge) gateway() (netip.Prefix, error) {
	pods, err := netip.ParsePrefix(b.pods())
	if err != nil {
		return netip.Prefix{}, err
	}
	return netip.PrefixFrom(pods.Masked().Addr().Next(), pods.Bits()), nil
}

// ends returns the host ends of the running pods' interfaces.
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
				continue // it has just exited
			}
			out = append(out, link)
		}
	}
	return out, nil
}

// hardwareAddr returns the bridge's address when the last pod was attached, which pods have cached; nil for any.
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

// Settle implements keeper.Changing: the MTU follows that of the interface between nodes.
func (b *bridge) Settle(context.Context) error {
	mtu := b.mtu()
	if mtu == 0 || mtu == b.settled {
		return nil
	}
	link, err := netlink.LinkByName(layout.Bridge)
	if err == nil && link.Attrs().MTU != mtu {
		err = netlink.LinkSetMTU(link, mtu)
	}
	if err != nil && !errors.As(err, new(netlink.LinkNotFoundError)) {
		return fmt.Errorf("set the MTU of %s: %w", layout.Bridge, err)
	}
	b.settled = mtu
	return nil
}

// Missing implements keeper.Part.
func (b *bridge) Missing(context.Context) (string, error) {
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
		return "", fmt.Errorf("check %s: %w", layout.Bridge, err)
	}
	if link.Attrs().Flags&net.FlagUp == 0 {
		return layout.Bridge + " is down: what connects the pods", nil
	}
	if mtu := b.mtu(); mtu != 0 && link.Attrs().MTU != mtu {
		return fmt.Sprintf("the MTU %d of %s", mtu, layout.Bridge), nil
	}
	addrs, err := netlink.AddrList(link, netlink.FAMILY_V4)
	if err != nil {
		return "", fmt.Errorf("check the addresses of %s: %w", layout.Bridge, err)
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

// Restore implements keeper.Part.
func (b *bridge) Restore(context.Context) error {
	link, err := netlink.LinkByName(layout.Bridge)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		// -1: the kernel's default queue length, as set by the plugin.
		made := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: layout.Bridge, TxQLen: -1, HardwareAddr: b.hardwareAddr()}}
		if err := netlink.LinkAdd(made); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("make %s: %w", layout.Bridge, err)
		}
		// Not marked otherwise: the next check would find an unexpected bridge.
		if link, err = netlink.LinkByName(layout.Bridge); err == nil {
			err = netlink.LinkSetAlias(link, b.alias)
		}
	}
	if err != nil {
		return fmt.Errorf("check %s: %w", layout.Bridge, err)
	}
	if mtu := b.mtu(); mtu != 0 && link.Attrs().MTU != mtu {
		if err := netlink.LinkSetMTU(link, mtu); err != nil {
			return fmt.Errorf("set the MTU of %s: %w", layout.Bridge, err)
		}
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
		return fmt.Errorf("add to %s the address %s: %w", layout.Bridge, gateway, err)
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
			// Lets a pod reach itself through a service.
			err = netlink.LinkSetHairpin(end, true)
		}
		if err != nil && !errors.Is(err, unix.ENODEV) {
			failures = append(failures, fmt.Errorf("connect %s to %s: %w", end.Attrs().Name, layout.Bridge, err))
		}
	}
	published, err := b.published()
	if err == nil && len(published) > 0 {
		// Set by the portmap plugin so that hostPorts work on 127.0.0.1; lost with the interface.
		err = os.WriteFile(filepath.Join("/proc/sys/net/ipv4/conf", layout.Bridge, "route_localnet"), []byte("1"), 0o644)
	}
	return errors.Join(append(failures, err)...)
}
