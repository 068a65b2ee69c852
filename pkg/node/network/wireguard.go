package network

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun"
	"golang.zx2c4.com/wireguard/wgctrl"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"polymesh.dev/polymesh/pkg/atomicfile"
	"polymesh.dev/polymesh/pkg/layout"
)

// wireGuardOverhead is what WireGuard adds to a packet, in bytes, also over IPv6, as in flannel: IP, UDP and WireGuard headers.
const wireGuardOverhead = 40 + 8 + 32

// wireGuardKey returns the node's private key. It is created when missing: other nodes learn the public one by the node's announcement.
func wireGuardKey(file string) (wgtypes.Key, error) {
	text, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		key, err := wgtypes.GeneratePrivateKey()
		if err != nil {
			return key, err
		}
		return key, atomicfile.Write(file, []byte(key.String()+"\n"), 0o600)
	}
	if err != nil {
		return wgtypes.Key{}, err
	}
	key, err := wgtypes.ParseKey(strings.TrimSpace(string(text)))
	if err != nil {
		return key, fmt.Errorf("%s does not contain a WireGuard key: remove the file, and the node makes another key: %w", file, err)
	}
	return key, nil
}

// wireGuard is the device that encrypts packets between nodes: the kernel's, or this process's where the kernel has none.
type wireGuard struct {
	key wgtypes.Key // private
	// user is the device in this process; nil for the kernel's.
	user *device.Device
	// endpoints are the addresses that were set last. WireGuard changes them itself when a peer's authenticated packets come from another one.
	endpoints map[wgtypes.Key]netip.AddrPort
	log       *slog.Logger
}

// create creates the interface.
func (w *wireGuard) create(mtu int) error {
	if w.user != nil {
		w.user.Close()
		w.user = nil
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = layout.WireGuardLink, mtu
	err := netlink.LinkAdd(&netlink.Wireguard{LinkAttrs: attrs})
	if !errors.Is(err, unix.EOPNOTSUPP) {
		return err
	}
	interf, err := tun.CreateTUN(layout.WireGuardLink, mtu)
	if err != nil {
		return fmt.Errorf("the kernel has no WireGuard (CONFIG_WIREGUARD), and a TUN device cannot be created in its place: %w", err)
	}
	w.user = device.NewDevice(interf, conn.NewDefaultBind(), &device.Logger{
		Verbosef: device.DiscardLogf,
		Errorf:   func(format string, args ...any) { w.log.Debug("WireGuard: " + fmt.Sprintf(format, args...)) },
	})
	return nil
}

// get returns the device's configuration.
func (w *wireGuard) get() (*wgtypes.Device, error) {
	if w.user != nil {
		text, err := w.user.IpcGet()
		if err != nil {
			return nil, err
		}
		return parseWireGuard(text)
	}
	client, err := wgctrl.New()
	if err != nil {
		return nil, err
	}
	defer client.Close()
	return client.Device(layout.WireGuardLink)
}

// set changes the device's configuration.
func (w *wireGuard) set(c wgtypes.Config) error {
	if w.user != nil {
		if err := w.user.IpcSet(formatWireGuard(c)); err != nil {
			return err
		}
		return w.user.Up()
	}
	client, err := wgctrl.New()
	if err != nil {
		return err
	}
	defer client.Close()
	return client.ConfigureDevice(layout.WireGuardLink, c)
}

// parseWireGuard reads WireGuard's configuration protocol (https://www.wireguard.com/xplatform/), as far as it is used here.
func parseWireGuard(text string) (*wgtypes.Device, error) {
	d := &wgtypes.Device{}
	for line := range strings.Lines(text) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		var err error
		switch name {
		case "private_key":
			d.PrivateKey, err = hexKey(value)
		case "listen_port":
			_, err = fmt.Sscan(value, &d.ListenPort)
		case "public_key":
			var key wgtypes.Key
			key, err = hexKey(value)
			d.Peers = append(d.Peers, wgtypes.Peer{PublicKey: key})
		case "endpoint", "allowed_ip":
			if len(d.Peers) == 0 {
				return nil, fmt.Errorf("%s without a peer", name)
			}
			p := &d.Peers[len(d.Peers)-1]
			if name == "endpoint" {
				var at netip.AddrPort
				if at, err = netip.ParseAddrPort(value); err == nil {
					p.Endpoint = net.UDPAddrFromAddrPort(at)
				}
				break
			}
			var allowed netip.Prefix
			if allowed, err = netip.ParsePrefix(value); err == nil {
				p.AllowedIPs = append(p.AllowedIPs, *ipNet(allowed))
			}
		}
		if err != nil {
			return nil, fmt.Errorf("read WireGuard's %s: %w", name, err)
		}
	}
	return d, nil
}

func hexKey(text string) (key wgtypes.Key, err error) {
	b, err := hex.DecodeString(text)
	if err != nil {
		return key, err
	}
	return wgtypes.NewKey(b)
}

// formatWireGuard writes a configuration in WireGuard's protocol.
func formatWireGuard(c wgtypes.Config) string {
	var b strings.Builder
	if c.PrivateKey != nil {
		fmt.Fprintf(&b, "private_key=%x\n", c.PrivateKey[:])
	}
	if c.ListenPort != nil {
		fmt.Fprintf(&b, "listen_port=%d\n", *c.ListenPort)
	}
	for _, p := range c.Peers {
		fmt.Fprintf(&b, "public_key=%x\n", p.PublicKey[:])
		if p.Remove {
			b.WriteString("remove=true\n")
			continue
		}
		if p.Endpoint != nil {
			fmt.Fprintf(&b, "endpoint=%s\n", p.Endpoint)
		}
		if p.ReplaceAllowedIPs {
			b.WriteString("replace_allowed_ips=true\n")
		}
		for _, allowed := range p.AllowedIPs {
			fmt.Fprintf(&b, "allowed_ip=%s\n", allowed.String())
		}
	}
	return b.String()
}

// planWireGuard plans the WireGuard device and its peers; link is nil if there is none.
func (o *overlay) planWireGuard(b base, link netlink.Link) ([]step, error) {
	const name = layout.WireGuardLink
	if link == nil {
		return []step{{"the interface " + name + ", which carries pods' packets to other nodes", func() error {
			if err := o.wg.create(o.mtu(b)); err != nil {
				return fmt.Errorf("create %s: %w", name, err)
			}
			made, err := netlink.LinkByName(name)
			if err == nil {
				err = netlink.LinkSetAlias(made, o.alias)
			}
			if err != nil {
				return fmt.Errorf("mark %s: %w", name, err)
			}
			return o.wg.set(wgtypes.Config{PrivateKey: &o.wg.key, ListenPort: &o.port})
		}}}, nil
	}
	have, err := o.wg.get()
	if link.Attrs().Alias != o.alias && (link.Attrs().Alias != "" || err != nil || have.PrivateKey != o.wg.key) {
		return nil, foreign(name)
	}
	if err != nil {
		return nil, fmt.Errorf("read the configuration of %s: %w", name, err)
	}
	steps, err := o.planLink(b, link)
	if err != nil {
		return nil, err
	}
	if have.PrivateKey != o.wg.key || have.ListenPort != o.port {
		steps = append(steps, step{"the settings of " + name, func() error { return o.wg.set(wgtypes.Config{PrivateKey: &o.wg.key, ListenPort: &o.port}) }})
	}
	for _, p := range o.peers {
		endpoint := netip.AddrPortFrom(p.address, p.port)
		if o.wg.endpoints[p.key] == endpoint && slices.ContainsFunc(have.Peers, func(h wgtypes.Peer) bool { return h.PublicKey == p.key && allows(h, p.pods) }) {
			continue
		}
		steps = append(steps, step{"the WireGuard peer of node " + p.node, func() error {
			err := o.wg.set(wgtypes.Config{Peers: []wgtypes.PeerConfig{{
				PublicKey: p.key, Endpoint: net.UDPAddrFromAddrPort(endpoint), ReplaceAllowedIPs: true, AllowedIPs: []net.IPNet{*ipNet(p.pods)},
			}}})
			if err == nil {
				o.wg.endpoints[p.key] = endpoint
			}
			return err
		}})
	}
	for _, h := range have.Peers {
		if !slices.ContainsFunc(o.peers, func(p peer) bool { return p.key == h.PublicKey }) {
			steps = append(steps, step{"", func() error {
				return o.wg.set(wgtypes.Config{Peers: []wgtypes.PeerConfig{{PublicKey: h.PublicKey, Remove: true}}})
			}})
		}
	}
	return steps, nil
}

// allows reports whether a peer may send packets from, and gets those to, exactly these addresses.
func allows(p wgtypes.Peer, pods netip.Prefix) bool {
	return len(p.AllowedIPs) == 1 && p.AllowedIPs[0].String() == pods.String()
}

// inProcess reports whether this process carries the packets between nodes.
func (o *overlay) inProcess() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.wg != nil && o.wg.user != nil
}
