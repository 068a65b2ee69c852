package layout

// Port is one on which a part of a node listens, or would if it were configured to.
type Port struct {
	// Number is the port, TCP.
	Number int
	// Component is the part as logs and `polymesh status` name it, What what it is for, as part of a sentence.
	Component, What string
	// Loopback says that it listens on 127.0.0.1 only.
	Loopback bool
	// Unused says that the part does not listen there with our settings. Users may turn it on.
	Unused bool
}

// Ports of a node's parts; those that upstream chooses are in cmd/kubeadm/app/constants and pkg/cluster/ports of Kubernetes.
const (
	APIServerPort     = 6443
	KubeletPort       = 10250
	KubeletHealthPort = 10248
	ProxyHealthPort   = 10256
	ImagePolicyPort   = 10263
)

// Ports lists all but the API server's, which the user chooses.
func Ports() []Port {
	return []Port{
		{Number: KubeletPort, Component: "kubelet", What: "the kubelet"},
		{Number: KubeletHealthPort, Component: "kubelet", What: "the kubelet's health check", Loopback: true},
		{Number: ProxyHealthPort, Component: "kube-proxy", What: "kube-proxy's health check"},
		{Number: ImagePolicyPort, Component: "image-policy", What: "the image policy, with --image-policy-key", Loopback: true, Unused: true},
		{Number: 10255, Component: "kubelet", What: "the kubelet's read-only port", Unused: true},
		{Number: 10249, Component: "kube-proxy", What: "kube-proxy's metrics", Loopback: true, Unused: true},
		{Number: 10257, Component: "kube-controller-manager", What: "the controller manager", Unused: true},
		{Number: 10259, Component: "kube-scheduler", What: "the scheduler", Unused: true},
	}
}

// Bridge is the network interface to which all pods of a node are connected.
const Bridge = "cni0"

// PoolLink is the network interface that holds the addresses in use of a LoadBalancer pool. It outlives the server, as the
// pods do.
const PoolLink = "polymesh-lb"

// InterfacePrefixes start the names of the interfaces that a node makes: those of CNI's plugins, and our own. An address of
// one of these is never the node's.
func InterfacePrefixes() []string { return []string{"cni", "polymesh"} }

// Packet filter tables, in the family ip.
const (
	// Table is ours, for the pod network.
	Table = "polymesh"
	// ProxyTable is kube-proxy's in nftables mode (k8s.io/kubernetes/pkg/proxy/nftables).
	ProxyTable = "kube-proxy"
)

// Tables lists those that the parts of a node make, CNI's plugins included.
func Tables() []string {
	return []string{ProxyTable, "cni_plugins_masquerade", "cni_hostport", Table}
}

// MasqueradeChain is where the rule of the pod network is with iptables, before Linux 5.13.
const MasqueradeChain = "CNI-POLYMESH"
