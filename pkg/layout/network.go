package layout

import "net/netip"

// Port is a port on which a part of a node listens, or would listen if configured to.
type Port struct {
	// Number is the port, TCP unless UDP is set.
	Number int
	UDP    bool
	// Component is the part's name in logs and `polymesh status`; What describes it within a sentence.
	Component, What string
	// Loopback is set if the part only listens on 127.0.0.1.
	Loopback bool
	// Unused is set if the part does not listen there with the default settings. Users may enable it.
	Unused bool
}

// Ports of a node's parts. Those that upstream defines are in cmd/kubeadm/app/constants and pkg/cluster/ports of Kubernetes.
const (
	APIServerPort     = 6443
	APIBalancerPort   = 6444
	KubeletPort       = 10250
	KubeletHealthPort = 10248
	ProxyHealthPort   = 10256
	ImagePolicyPort   = 10263
	RegistryPort      = 10264
	RegistryPeerPort  = 10265
	// VXLANPort is the default of flannel, which is the kernel's own.
	VXLANPort = 8472
	// WireGuardPort is the default of flannel.
	WireGuardPort   = 51820
	ControllersPort = 10257
	SchedulerPort   = 10259
	EtcdClientPort  = 2379
	EtcdPeerPort    = 2380
	EtcdHTTPPort    = 2382 // K3s's
)

// Ports lists all ports except the API server's, which is configurable.
func Ports() []Port {
	return []Port{
		{Number: APIBalancerPort, Component: "api-balancer", What: "the balancer over the API servers", Loopback: true, Unused: true},
		{Number: KubeletPort, Component: "kubelet", What: "the kubelet"},
		{Number: KubeletHealthPort, Component: "kubelet", What: "the kubelet's health check", Loopback: true},
		{Number: ProxyHealthPort, Component: "kube-proxy", What: "kube-proxy's health check"},
		{Number: ImagePolicyPort, Component: "image-policy", What: "the image policy, with --image-policy-key", Loopback: true, Unused: true},
		{Number: RegistryPort, Component: "registry", What: "the images for this node's containerd", Loopback: true},
		{Number: RegistryPeerPort, Component: "registry", What: "the images for other nodes"},
		{Number: VXLANPort, UDP: true, Component: "pod-network", What: "the pod network between nodes"},
		{Number: WireGuardPort, UDP: true, Component: "pod-network", What: "the pod network between nodes, with --flannel-backend wireguard-native", Unused: true},
		{Number: EtcdClientPort, Component: "datastore", What: "etcd, for this server, with --cluster-init", Loopback: true, Unused: true},
		{Number: EtcdPeerPort, Component: "datastore", What: "etcd, for the other servers, with --cluster-init", Unused: true},
		{Number: EtcdHTTPPort, Component: "datastore", What: "etcd's health check, with --cluster-init", Loopback: true, Unused: true},
		{Number: 10255, Component: "kubelet", What: "the kubelet's read-only port", Unused: true},
		{Number: 10249, Component: "kube-proxy", What: "kube-proxy's metrics", Loopback: true, Unused: true},
		{Number: ControllersPort, Component: "kube-controller-manager", What: "the controller manager's health check, with another datastore than SQLite", Loopback: true, Unused: true},
		{Number: SchedulerPort, Component: "kube-scheduler", What: "the scheduler's health check, with another datastore than SQLite", Loopback: true, Unused: true},
	}
}

// Loopback returns a port of this machine that no other machine reaches.
func Loopback(port int) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), uint16(port))
}

// Bridge is the network interface that connects all pods of a node.
const Bridge = "cni0"

// Network interfaces that carry packets between the pods of different nodes; the names are flannel's. They outlive the server, like the pods.
const (
	FlannelLink   = "flannel.1"
	WireGuardLink = "flannel-wg"
)

// OverlayLinks are all of these.
func OverlayLinks() []string { return []string{FlannelLink, WireGuardLink} }

// RouteProtocol marks the routes of the pod network (rtm_protocol in rtnetlink(7)): a number that neither the kernel's rt_protos nor a
// routing program that we know uses.
const RouteProtocol = 111

// PoolLink is the network interface that holds the addresses in use of a LoadBalancer pool. It outlives the server, like the
// pods.
const PoolLink = "polymesh-lb"

// InterfacePrefixes are the name prefixes of interfaces that a node creates: those of CNI's plugins, and our own. The
// node's address is never taken from one of these.
func InterfacePrefixes() []string { return []string{"cni", "flannel", "polymesh"} }

// Packet filter tables, family ip, PolicyTable family inet.
const (
	// Table is our own, for the pod network.
	Table = "polymesh"
	// PolicyTable is our own, for NetworkPolicies.
	PolicyTable = "polymesh-policy"
	// ProxyTable is kube-proxy's in nftables mode (k8s.io/kubernetes/pkg/proxy/nftables).
	ProxyTable = "kube-proxy"
)

// Tables lists the tables that parts of the node create, including CNI's plugins.
func Tables() []string {
	return []string{ProxyTable, "cni_plugins_masquerade", "cni_hostport", Table, PolicyTable}
}

// MasqueradeChain is the chain of the pod network's rule with iptables, before Linux 5.13.
const MasqueradeChain = "CNI-POLYMESH"
