// Package config turns flags, environment and config file into one validated, typed struct.
//
// It owns the names, defaults and rules of every setting of `polymesh server`; the names are K3s's where K3s has the
// setting. The launcher calls it to refuse a bad command line before it touches the machine, the program calls it again
// to run. Nothing here looks at the machine, except to read the config file.
package config

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
)

const (
	// DefaultDataDir is where a server keeps its data unless told otherwise.
	DefaultDataDir = "/var/lib/polymesh"
	// DefaultConfigFile is read when it exists.
	DefaultConfigFile = "/etc/polymesh/config.yaml"
	// DefaultKubeconfig is where a server writes the administrator's kubeconfig.
	DefaultKubeconfig = "/etc/polymesh/polymesh.yaml"
	// envPrefix starts the environment variable of a flag: POLYMESH_DATA_DIR for --data-dir.
	envPrefix = "POLYMESH_"
)

// Umask is the server's, whatever the shell has that starts it. containerd makes the root folder of every container with
// mode 0755 less the umask: under 077, or the 027 of hardened hosts, no program that is not root's finds its own files
// (kubernetes/kubernetes#96342). systemd gives its services the same one.
const Umask = 0o022

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

// Server is the whole configuration of `polymesh server`, checked.
type Server struct {
	DataDir        string
	Kubeconfig     string
	KubeconfigMode os.FileMode
	// KubeconfigGroup is the number of the group that may read Kubeconfig; -1 for none.
	KubeconfigGroup int
	DatastoreSync   DatastoreSync

	// NodeName is empty for the host's name.
	NodeName   string
	NodeIP     netip.Addr // not valid: taken from the machine
	ExternalIP netip.Addr // not valid: none
	NodeLabels []string   // key=value
	NodeTaints []string   // key=value:effect

	BindAddress      netip.Addr
	AdvertiseAddress netip.Addr // not valid: the node's address
	HTTPSPort        int
	TLSSANs          []string

	ClusterCIDR   netip.Prefix
	ServiceCIDR   netip.Prefix
	ClusterDNS    netip.Addr
	ClusterDomain string
	NodePortRange string // "30000-32767"
	// ResolvConf is the file with the name servers for pods; empty: the host's own.
	ResolvConf string

	Disabled         map[Addon]bool
	LoadBalancerPool []AddressRange
	MeshProfile      string

	// ImagePolicyKeys are files of public keys; images signed by one of them run where the policy is enforced.
	ImagePolicyKeys []string

	// SecretsEncryption has Secrets encrypted in the datastore, by this one of EncryptionProviders. Without it, an encryption
	// that is on stays on.
	SecretsEncryption  bool
	EncryptionProvider string
	// AuditLog has the API server write an audit log, by the policy in the file or by ours where it is empty.
	AuditLog        bool
	AuditPolicyFile string
	// PodSecurity is the Pod Security Standard for namespaces without a label: one of PodSecurityLevels.
	PodSecurity string
	// ProtectKernelDefaults has the kubelet end rather than change the kernel's settings.
	ProtectKernelDefaults bool

	APIServerArgs         []string
	ControllerManagerArgs []string
	SchedulerArgs         []string
	KubeletArgs           []string
	ProxyArgs             []string

	// LogLevel is the verbosity of the Kubernetes components, klog's -v.
	LogLevel int
	Debug    bool

	// Notes are remarks on accepted settings that do nothing here, to be shown once.
	Notes []string
}

// AddressRange is an inclusive range of addresses of one family.
type AddressRange struct{ From, To netip.Addr }

// Contains reports whether a lies in the range.
func (r AddressRange) Contains(a netip.Addr) bool {
	return r.From.Compare(a) <= 0 && a.Compare(r.To) <= 0
}

// Enabled reports whether an add-on is to be installed.
func (s *Server) Enabled(a Addon) bool { return !s.Disabled[a] }

// DataDir is the data dir that a text means: absolute and clean, as the paths of a node are made of its name. Links in it stay:
// a link and what it leads to are two names of one folder, and the server knows it by the one that it was started with.
func DataDir(text string) (string, error) {
	if text == "" {
		return "", fmt.Errorf("it is empty: give a folder, or leave it out for %s", DefaultDataDir)
	}
	dir, err := filepath.Abs(text)
	if err != nil {
		return "", fmt.Errorf("find the folder %q: %w", text, err)
	}
	return dir, nil
}

// Paths of a node. One machine can hold several data dirs, in tests each in a network namespace of its own: what
// Kubernetes usually keeps at fixed places lies there only for the default data dir.

// RunDir holds what must not outlive a boot: sockets, lock and containerd's state.
func (s *Server) RunDir() string { return RunDir(s.DataDir) }

// RunDir is the run directory that belongs to a data dir.
func RunDir(dataDir string) string {
	if dataDir == DefaultDataDir {
		return "/run/polymesh"
	}
	return "/run/polymesh-" + shortID(dataDir)
}

// CgroupRoot is the cgroup, in every hierarchy, under which all pods of the node lie.
func CgroupRoot(dataDir string) string {
	if dataDir == DefaultDataDir {
		return "/polymesh"
	}
	return "/polymesh-" + shortID(dataDir)
}

// KubeletDir is the kubelet's root; CSI drivers expect the usual one.
func KubeletDir(dataDir string) string {
	if dataDir == DefaultDataDir {
		return "/var/lib/kubelet"
	}
	return filepath.Join(dataDir, "agent", "kubelet")
}

// PodLogsDir is where containers' logs lie.
func PodLogsDir(dataDir string) string {
	if dataDir == DefaultDataDir {
		return "/var/log/pods"
	}
	return filepath.Join(dataDir, "agent", "pods-log")
}

// ServerDir holds the control plane's data: datastore, certificates, kubeconfigs.
func (s *Server) ServerDir(elem ...string) string {
	return filepath.Join(append([]string{s.DataDir, "server"}, elem...)...)
}

// AgentDir holds the node's data: containerd, images, CNI configuration.
func (s *Server) AgentDir(elem ...string) string {
	return filepath.Join(append([]string{s.DataDir, "agent"}, elem...)...)
}

// ContainerdSocket is where the node's containerd listens.
func ContainerdSocket(dataDir string) string {
	return filepath.Join(RunDir(dataDir), "containerd", "containerd.sock")
}

// RegistryDir is where the node's containerd finds how to reach registries: a folder with a hosts.toml for each.
func RegistryDir(dataDir string) string {
	return filepath.Join(dataDir, "agent", "etc", "containerd", "certs.d")
}

// DatastoreSocket is where the datastore serves etcd's API.
func DatastoreSocket(dataDir string) string { return filepath.Join(RunDir(dataDir), "kine.sock") }

// EncryptionFile holds the keys with which Secrets are encrypted.
func EncryptionFile(dataDir string) string {
	return filepath.Join(dataDir, "server", "cred", "encryption-config.json")
}

// StatusSocket is where a running server answers `polymesh status`.
func StatusSocket(dataDir string) string { return filepath.Join(RunDir(dataDir), "status.sock") }
