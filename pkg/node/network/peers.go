package network

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
	corev1 "k8s.io/api/core/v1"

	"polymesh.dev/polymesh/pkg/config"
)

// Annotations of a Node: flannel's, so that its tools and K3s's read them (github.com/flannel-io/flannel, pkg/subnet/kube/annotations.go and
// Documentation/kubernetes.md).
const (
	annotationPrefix  = "flannel.alpha.coreos.com/"
	backendType       = annotationPrefix + "backend-type"
	backendData       = annotationPrefix + "backend-data"
	publicIP          = annotationPrefix + "public-ip"
	kubeSubnetManager = annotationPrefix + "kube-subnet-manager"
)

// vni is the VXLAN network identifier, flannel's default.
const vni = 1

// vxlanData is the backend data of a node with VXLAN (vxlanLeaseAttrs in flannel's pkg/backend/vxlan/vxlan_network.go).
type vxlanData struct {
	VNI     uint32
	VtepMAC string
}

// wireGuardData is that of a node with WireGuard (wireguardLeaseAttrs in flannel's pkg/backend/wireguard/wireguard_network.go).
type wireGuardData struct {
	PublicKey string
	Port      uint16
}

// typeOf returns the name of a backend in the annotation.
func typeOf(backend config.FlannelBackend) string {
	if backend == config.WireGuard {
		return "wireguard" // flannel's; wireguard-native is K3s's
	}
	return string(backend)
}

// announce returns the annotations by which the other nodes reach the pods of this one.
func (v view) announce() (map[string]string, error) {
	var data any // nil is flannel's for a backend without data
	switch v.backend {
	case config.VXLAN:
		data = vxlanData{vni, v.mac.String()}
	case config.WireGuard:
		data = wireGuardData{v.key.String(), v.port}
	}
	text, err := json.Marshal(data)
	if err != nil {
		return nil, err
	}
	return map[string]string{
		backendType: typeOf(v.backend), backendData: string(text), publicIP: v.address.String(), kubeSubnetManager: "true",
	}, nil
}

// peer is another node, as far as packets to its pods are concerned.
type peer struct {
	node    string
	pods    netip.Prefix
	address netip.Addr
	mac     string // six bytes; empty without VXLAN
	key     wgtypes.Key
	port    uint16 // of WireGuard
}

// gateway returns the address of the peer's device, flannel's choice: the first of its range.
func (p peer) gateway() netip.Addr { return p.pods.Addr() }

// view is what a node knows about itself when it reads the other nodes' objects.
type view struct {
	node    string
	cluster netip.Prefix
	backend config.FlannelBackend
	pods    netip.Prefix // this node's
	address netip.Addr
	mac     net.HardwareAddr
	key     wgtypes.Key // public
	port    uint16
}

// peers returns the other nodes with a usable announcement, by name, and a sentence for each one whose announcement is not usable. A node
// writes its own annotations and registers with a range of its choice, so nothing in them may take packets that are another node's: of two
// nodes that claim the same, the one that was registered first has it.
func (v view) peers(nodes []*corev1.Node) (peers []peer, notes []string) {
	nodes = slices.DeleteFunc(slices.Clone(nodes), func(n *corev1.Node) bool { return n.Name == v.node })
	slices.SortFunc(nodes, func(a, b *corev1.Node) int {
		return cmp.Or(a.CreationTimestamp.Compare(b.CreationTimestamp.Time), strings.Compare(a.Name, b.Name))
	})
	for _, n := range nodes {
		if n.Spec.PodCIDR == "" || n.Annotations[publicIP] == "" {
			continue // it has just joined, or has no pod network yet
		}
		p, err := v.peer(n)
		if err == nil {
			err = v.conflict(p, peers)
		}
		if err != nil {
			notes = append(notes, fmt.Sprintf("no route to the pods of node %s: %v", n.Name, err))
			continue
		}
		peers = append(peers, p)
	}
	slices.SortFunc(peers, func(a, b peer) int { return strings.Compare(a.node, b.node) })
	slices.Sort(notes)
	return peers, notes
}

// peer reads one node's announcement.
func (v view) peer(n *corev1.Node) (peer, error) {
	p := peer{node: n.Name}
	if other := n.Annotations[backendType]; other != typeOf(v.backend) {
		return p, fmt.Errorf("its --flannel-backend is %.40q and this node's %s: all nodes need the same", other, v.backend)
	}
	var err error
	if p.pods, err = netip.ParsePrefix(n.Spec.PodCIDR); err != nil || p.pods.Masked() != p.pods || p.pods.Bits() <= v.cluster.Bits() || !v.cluster.Contains(p.pods.Addr()) {
		return p, fmt.Errorf("its pod address range %.40q is not a part of --cluster-cidr %s", n.Spec.PodCIDR, v.cluster)
	}
	p.address, err = netip.ParseAddr(n.Annotations[publicIP])
	if a := p.address; err != nil || !a.Is4() || !a.IsGlobalUnicast() || v.cluster.Contains(a) {
		return p, fmt.Errorf("%.40q, its annotation %s, is not the IPv4 address of a node", n.Annotations[publicIP], publicIP)
	}
	text := n.Annotations[backendData]
	switch v.backend {
	case config.VXLAN:
	case config.WireGuard:
		var data wireGuardData
		if err := json.Unmarshal([]byte(text), &data); err != nil {
			return p, fmt.Errorf("%.40q, its annotation %s, cannot be read", text, backendData)
		}
		p.port = data.Port
		if p.key, err = wgtypes.ParseKey(data.PublicKey); err != nil || p.key == (wgtypes.Key{}) || p.port == 0 {
			return p, fmt.Errorf("%.80q, its annotation %s, is not a WireGuard key with a port", text, backendData)
		}
		return p, nil
	default:
		return p, nil
	}
	var data vxlanData
	if err := json.Unmarshal([]byte(text), &data); err != nil {
		return p, fmt.Errorf("%.40q, its annotation %s, cannot be read", text, backendData)
	}
	mac, err := net.ParseMAC(data.VtepMAC)
	// A frame to the zero address is what VXLAN floods by, and the lowest bit of the first byte is that of a group.
	if err != nil || len(mac) != 6 || mac[0]&1 != 0 || bytes.Equal(mac, make([]byte, 6)) || data.VNI != vni {
		return p, fmt.Errorf("%.60q, its annotation %s, is not VNI %d with the hardware address of an interface", text, backendData, vni)
	}
	p.mac = string(mac)
	return p, nil
}

// conflict returns an error if the peer claims what is this node's or another peer's.
func (v view) conflict(p peer, others []peer) error {
	if p.pods.Overlaps(v.pods) {
		return fmt.Errorf("its pod address range %s overlaps this node's %s", p.pods, v.pods)
	}
	if p.address == v.address {
		return fmt.Errorf("it claims this node's address %s", p.address)
	}
	if p.mac != "" && p.mac == string(v.mac) {
		return fmt.Errorf("it claims the hardware address %s of this node's %s: were the machines cloned after the first start?", v.mac, v.backend)
	}
	if p.key != (wgtypes.Key{}) && p.key == v.key {
		return errors.New("it claims this node's WireGuard key: were the machines cloned after the first start?")
	}
	for _, o := range others {
		switch {
		case p.key != (wgtypes.Key{}) && p.key == o.key:
			return fmt.Errorf("it claims the WireGuard key of node %s: were the machines cloned after the first start?", o.node)
		case p.pods.Overlaps(o.pods):
			return fmt.Errorf("its pod address range %s overlaps %s of node %s", p.pods, o.pods, o.node)
		case p.mac != "" && p.mac == o.mac:
			return fmt.Errorf("it claims the hardware address %s of node %s: were the machines cloned after the first start?", net.HardwareAddr(p.mac), o.node)
		}
	}
	return nil
}
