// Package config turns flags, environment and config file into validated, typed structs: Server and Agent, which
// share Node, and Cluster, on which all servers must agree.
//
// It owns the names, defaults and rules of every setting of `polymesh server`; the names are K3s's where K3s has the
// setting. The launcher calls it to refuse a bad command line before it touches the machine, the program calls it again
// to run. Nothing here looks at the machine, except to read the config file.
package config

import (
	"net/netip"
	"os"

	"polymesh.dev/polymesh/pkg/layout"
)

// envPrefix starts the environment variable of a flag: POLYMESH_DATA_DIR for --data-dir.
const envPrefix = "POLYMESH_"

// Addon names a part that --disable can leave out.
type Addon string

const (
	CoreDNS       Addon = "coredns"
	MetricsServer Addon = "metrics-server"
	LocalStorage  Addon = "local-storage"
	// NetworkPolicy warns that NetworkPolicies are not enforced. Who brings a controller for them disables it.
	NetworkPolicy Addon = "network-policy"
	ServiceLB     Addon = "servicelb"
	Istio         Addon = "istio"
)

// Addons lists what --disable takes.
func Addons() []Addon {
	return []Addon{CoreDNS, MetricsServer, LocalStorage, NetworkPolicy, ServiceLB, Istio}
}

// MeshProfiles lists what --mesh-profile takes: the profiles of the guide.
func MeshProfiles() []string { return []string{"default", "demo", "minimal", "empty"} }

// EncryptionProviders lists what --secrets-encryption-provider takes, the default first. Kubernetes' documentation calls
// secretbox strong and aescbc, K3s's default, weak.
func EncryptionProviders() []string { return []string{"secretbox", "aescbc"} }

// PodSecurityLevels lists what --pod-security takes, the default first, which allows everything.
func PodSecurityLevels() []string { return []string{"privileged", "baseline", "restricted"} }

// DatastoreSync is when a write that the API server has acknowledged is on disk.
type DatastoreSync string

const (
	// SyncFull is before it is acknowledged, as etcd does.
	SyncFull DatastoreSync = "full"
	// SyncNormal is at some later time: a power cut loses the last minutes. The datastore stays whole.
	SyncNormal DatastoreSync = "normal"
)

// DatastoreSyncs lists what --datastore-sync takes.
func DatastoreSyncs() []string { return []string{string(SyncFull), string(SyncNormal)} }

// Node is what every node is configured with, server or agent.
type Node struct {
	DataDir layout.DataDir

	// NodeName is empty for the host's name.
	NodeName   string
	NodeIP     netip.Addr // not valid: taken from the machine
	ExternalIP netip.Addr // not valid: none
	NodeLabels []string   // key=value
	NodeTaints []string   // key=value:effect
	// ResolvConf is the file with the name servers for pods; empty: the host's own.
	ResolvConf string
	// ProtectKernelDefaults has the kubelet end rather than change the kernel's settings.
	ProtectKernelDefaults bool

	KubeletArgs []string
	ProxyArgs   []string

	// LogLevel is the verbosity of the Kubernetes components, klog's -v.
	LogLevel int
	Debug    bool

	// Notes are remarks on accepted settings that do nothing here, to be shown once.
	Notes []string
}

// Cluster is what the cluster is: all its servers must agree on it. K3s compares the same settings when a server joins
// (CriticalControlArgs in its pkg/daemons/config).
type Cluster struct {
	ClusterCIDR   netip.Prefix
	ServiceCIDR   netip.Prefix
	ClusterDNS    netip.Addr
	ClusterDomain string
	NodePortRange string // "30000-32767"

	Disabled         map[Addon]bool
	LoadBalancerPool []AddressRange
	MeshProfile      string

	// SecretsEncryption has Secrets encrypted in the datastore, by this one of EncryptionProviders. Without it, an encryption
	// that is on stays on.
	SecretsEncryption  bool
	EncryptionProvider string
	// PodSecurity is the Pod Security Standard for namespaces without a label: one of PodSecurityLevels.
	PodSecurity string
}

// Server is the whole configuration of `polymesh server`, checked.
type Server struct {
	Node
	Cluster

	Kubeconfig     string
	KubeconfigMode os.FileMode
	// KubeconfigGroup is the number of the group that may read Kubeconfig; -1 for none.
	KubeconfigGroup int
	DatastoreSync   DatastoreSync

	BindAddress      netip.Addr
	AdvertiseAddress netip.Addr // not valid: the node's address
	HTTPSPort        int
	TLSSANs          []string

	// ImagePolicyKeys are files of public keys; images signed by one of them run where the policy is enforced.
	ImagePolicyKeys []string

	// AuditLog has the API server write an audit log, by the policy in the file or by ours where it is empty.
	AuditLog        bool
	AuditPolicyFile string

	APIServerArgs         []string
	ControllerManagerArgs []string
	SchedulerArgs         []string
}

// Agent is the whole configuration of a node without a control plane, checked.
type Agent struct {
	Node

	// Server is the URL of the API server with which the node joins: https://HOST:PORT.
	Server string
	// Token is a secret. Whether it is one, the server knows.
	Token string
}

// AddressRange is an inclusive range of addresses of one family.
type AddressRange struct{ From, To netip.Addr }

// Contains reports whether a lies in the range.
func (r AddressRange) Contains(a netip.Addr) bool {
	return r.From.Compare(a) <= 0 && a.Compare(r.To) <= 0
}

// Enabled reports whether an add-on is to be installed.
func (c *Cluster) Enabled(a Addon) bool { return !c.Disabled[a] }
