// Package config turns flags, environment and config file into validated, typed structs: Server and Agent, which
// share Node, and Cluster, on which all servers must agree.
//
// It owns the names, defaults and rules of every setting of `polymesh server`; names are the same as in K3s where K3s has the
// setting. The launcher uses it to reject a bad command line before it changes the machine, and the program
// to run. It does not inspect the machine, except to read the config file.
package config

import (
	"net/netip"
	"os"
	"time"

	"polymesh.dev/polymesh/pkg/layout"
	"polymesh.dev/polymesh/pkg/token"
)

// envPrefix is the prefix of a flag's environment variable: POLYMESH_DATA_DIR for --data-dir.
const envPrefix = "POLYMESH_"

// Addon is the name of a part that --disable can leave out.
type Addon string

const (
	CoreDNS       Addon = "coredns"
	MetricsServer Addon = "metrics-server"
	LocalStorage  Addon = "local-storage"
	ServiceLB     Addon = "servicelb"
	Istio         Addon = "istio"
	// Observe is the store of metrics, logs and traces.
	Observe Addon = "observe"
)

// Addons returns the values of --disable.
func Addons() []Addon {
	return []Addon{CoreDNS, MetricsServer, LocalStorage, ServiceLB, Istio, Observe}
}

// MeshProfiles returns the values of --mesh-profile: the profiles of the guide.
func MeshProfiles() []string { return []string{"default", "demo", "minimal", "empty"} }

// ObserveAccess is what pods reach of the store of metrics, logs and traces.
type ObserveAccess string

const (
	// ObserveAll is sending and querying.
	ObserveAll ObserveAccess = "all"
	// ObserveIngest is sending traces.
	ObserveIngest ObserveAccess = "ingest"
	// ObserveOff is nothing.
	ObserveOff ObserveAccess = "off"
)

// ObserveAccesses returns the values of --observe-cluster-access, the default first.
func ObserveAccesses() []ObserveAccess {
	return []ObserveAccess{ObserveAll, ObserveIngest, ObserveOff}
}

// EncryptionProviders returns the values of --secrets-encryption-provider, the default first. Kubernetes' documentation calls
// secretbox strong and aescbc, K3s's default, weak.
func EncryptionProviders() []string { return []string{"secretbox", "aescbc"} }

// PodSecurityLevels returns the values of --pod-security, the default first, which allows everything.
func PodSecurityLevels() []string { return []string{"privileged", "baseline", "restricted"} }

// DatastoreSync is when an acknowledged write of the API server is on disk.
type DatastoreSync string

const (
	// SyncFull means before it is acknowledged, as in etcd.
	SyncFull DatastoreSync = "full"
	// SyncNormal means some time later: a power failure loses the last minutes, but the datastore stays consistent.
	SyncNormal DatastoreSync = "normal"
)

// DatastoreSyncs returns the values of --datastore-sync.
func DatastoreSyncs() []string { return []string{string(SyncFull), string(SyncNormal)} }

// FlannelBackend is how packets reach the pods of other nodes; names are K3s's and flannel's.
type FlannelBackend string

const (
	// VXLAN wraps packets in UDP, and works between subnets.
	VXLAN FlannelBackend = "vxlan"
	// WireGuard encrypts them, and works between subnets.
	WireGuard FlannelBackend = "wireguard-native"
	// HostGW routes them, which needs all nodes in one subnet.
	HostGW FlannelBackend = "host-gw"
	// NoBackend leaves the whole pod network to a program that the user installs.
	NoBackend FlannelBackend = "none"
)

// FlannelBackends returns the values of --flannel-backend, the default first.
func FlannelBackends() []FlannelBackend { return []FlannelBackend{VXLAN, HostGW, WireGuard, NoBackend} }

// Node is the configuration of any node, server or agent.
type Node struct {
	DataDir layout.DataDir

	// NodeName is empty to use the host's name.
	NodeName   string
	NodeIP     netip.Addr // invalid: taken from the machine
	ExternalIP netip.Addr // invalid: none
	NodeLabels []string   // key=value
	NodeTaints []string   // key=value:effect
	// FlannelIface is the network interface for packets between nodes' pods; empty for that of the node's address.
	FlannelIface string
	// ResolvConf is the file with the name servers for pods; empty for the host's own.
	ResolvConf string
	// PrivateRegistry is the file registries.yaml, which need not exist. DisableDefaultEndpoint keeps a registry that has mirrors there from
	// being asked itself.
	PrivateRegistry        string
	DisableDefaultEndpoint bool
	// ProtectKernelDefaults makes the kubelet exit instead of changing kernel settings.
	ProtectKernelDefaults bool

	KubeletArgs []string
	ProxyArgs   []string

	// LogLevel is the verbosity of the Kubernetes components, klog's -v.
	LogLevel int
	Debug    bool

	// Notes are remarks on accepted settings that have no effect here, to be shown once.
	Notes []string
}

// Cluster is the cluster-wide configuration: all servers must agree on it. K3s compares the same settings when a server joins
// (CriticalControlArgs in its pkg/daemons/config).
type Cluster struct {
	ClusterCIDR   netip.Prefix
	ServiceCIDR   netip.Prefix
	ClusterDNS    netip.Addr
	ClusterDomain string
	NodePortRange string // "30000-32767"
	// FlannelBackend is how packets reach the pods of other nodes, FlannelPort the UDP port for it, and FlannelExternalIP whether nodes that have an
	// external address are reached by that.
	FlannelBackend    FlannelBackend
	FlannelPort       int
	FlannelExternalIP bool

	Disabled map[Addon]bool
	// EmbeddedRegistry lets nodes give each other also the images of registries, of those that PrivateRegistry names as a mirror.
	EmbeddedRegistry bool
	// DisableNetworkPolicy leaves NetworkPolicies to a controller that the user installs.
	DisableNetworkPolicy bool
	LoadBalancerPool     []AddressRange
	MeshProfile          string
	ObserveAccess        ObserveAccess

	// SecretsEncryption is the provider, one of EncryptionProviders, with which Secrets are encrypted in the datastore. If empty,
	// existing encryption stays on.
	SecretsEncryption  bool
	EncryptionProvider string
	// PodSecurity is the Pod Security Standard for namespaces without a label: one of PodSecurityLevels.
	PodSecurity string
	// ImagePolicyKeys are public keys in DER form (PKIX); where the policy is enforced, images signed by one of them may run.
	ImagePolicyKeys [][]byte
}

// Server is the complete, checked configuration of `polymesh server`.
type Server struct {
	Node
	Cluster
	Joining

	Kubeconfig     string
	KubeconfigMode os.FileMode
	// KubeconfigGroup is the id of the group that may read Kubeconfig; -1 for none.
	KubeconfigGroup int
	DatastoreSync   DatastoreSync
	Datastore       Datastore
	// ClusterInit makes etcd the datastore, which other servers can join.
	ClusterInit bool
	// EtcdArgs are further settings of etcd on this server.
	EtcdArgs EtcdArgs
	// ClusterReset makes this server's member of etcd the only one, and ends. ClusterResetRestorePath is a snapshot that is restored then;
	// empty for the member's own data.
	ClusterReset            bool
	ClusterResetForce       bool
	ClusterResetRestorePath string

	BindAddress      netip.Addr
	AdvertiseAddress netip.Addr // invalid: the node's address
	HTTPSPort        int
	TLSSANs          []string

	Snapshots Snapshots
	Observe   ObserveStore
	// ClusterFlags are the cluster-wide settings that were given, as name=value; flags are all that were given, which Adopt needs.
	ClusterFlags []string
	flags        *Flags
	// ConfigFile is the config file. It may be missing if it is the default one.
	ConfigFile string

	// AuditLog enables the API server's audit log, with the policy in the file, or ours if it is empty.
	AuditLog        bool
	AuditPolicyFile string

	APIServerArgs         []string
	ControllerManagerArgs []string
	SchedulerArgs         []string
}

// Snapshots are the settings of a server's snapshots.
type Snapshots struct {
	// Dir is the folder; empty for the one in the data dir.
	Dir string
	// Disabled is set if the server saves none by itself.
	Disabled bool
	// Schedule is a cron expression in local time, Retention the number of automatic snapshots that are kept for each reason.
	Schedule  string
	Retention int
	// Passphrase is a secret; empty if snapshots are not encrypted.
	Passphrase string
	// S3 is nil if snapshots are only kept in Dir.
	S3 *S3
}

// S3 is where in S3 snapshots are kept, with K3s's settings.
type S3 struct {
	// Endpoint is a host name, or host:port.
	Endpoint, Bucket, Region, Folder string
	// AccessKey and SecretKey are secrets; both are empty to use the environment's (AWS_ACCESS_KEY_ID), or the machine's role.
	AccessKey, SecretKey string
	// CAFile is a PEM file with the endpoint's authority; empty for the system's.
	CAFile string
	// SkipVerify accepts every certificate, Insecure uses HTTP.
	SkipVerify, Insecure bool
	// Timeout limits each transfer.
	Timeout time.Duration
}

// Joining is how a machine joins a cluster.
type Joining struct {
	// Server is the URL of the API server with which the machine joins: https://HOST:PORT. Empty for the first server of a cluster.
	Server string
	// Token is the secret with which it joins; none if it has joined before.
	Token token.Token
	// Secret is the servers' secret that the user has chosen for a cluster, on its first server, and on those that find the others in the
	// datastore; empty otherwise. Token is none then.
	Secret string
}

// Agent is the whole configuration of a node without a control plane, checked.
type Agent struct {
	Node
	Joining
}

// AddressRange is an inclusive range of addresses of one family.
type AddressRange struct {
	From netip.Addr `json:"from"`
	To   netip.Addr `json:"to"`
}

// Contains reports whether a is in the range.
func (r AddressRange) Contains(a netip.Addr) bool {
	return r.From.Compare(a) <= 0 && a.Compare(r.To) <= 0
}

// Enabled reports whether an add-on is to be installed.
func (c *Cluster) Enabled(a Addon) bool { return !c.Disabled[a] }
