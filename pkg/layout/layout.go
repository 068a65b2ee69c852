// Package layout is the single table of names and places that a node uses: files, sockets and cgroups, which depend on its data dir,
// and the machine's ports, network interfaces and packet filter tables; and the label by which a node is a server.
//
// It owns nothing on the machine. Code that creates, finds, or removes one of these takes its name from here. It uses only
// the standard library, so that the launcher can import it.
package layout

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"path/filepath"
)

const (
	// DefaultDataDir is the default data dir.
	DefaultDataDir DataDir = "/var/lib/polymesh"
	// DefaultConfigFile is read if it exists.
	DefaultConfigFile = "/etc/polymesh/config.yaml"
	// DefaultRegistries is the file with the settings of registries, in K3s's form, read if it exists.
	DefaultRegistries = "/etc/polymesh/registries.yaml"
	// DefaultKubeconfig is the default path of the administrator's kubeconfig.
	DefaultKubeconfig = "/etc/polymesh/polymesh.yaml"
	// Unit is the systemd unit of a server that was installed (pkg/service).
	Unit = "polymesh.service"
	// ServerLabel is the label of a server's node (pkg/controlplane/noderole), which NodeRestriction keeps nodes from setting.
	ServerLabel = "node-role.kubernetes.io/control-plane"
	// ObserveGroup is the id of the group that may connect to ObserveSockets. It has no name on the machine: only pods use it.
	ObserveGroup = 60431
	// ObservePath is the path of the API server below which it serves the store, and ObserveRole the ClusterRole for it, which is bound to no one.
	ObservePath = "/polymesh/v1/observe/"
	ObserveRole = "system:polymesh:observe-view"
	// ObserveIngestPath is the path of the API server to which nodes send what the store is to keep of them (pkg/observe/route).
	ObserveIngestPath = "/polymesh/v1/observe-ingest"
)

// Umask is the node's, whatever the umask of the shell that starts it. containerd creates the root folder of every container
// with mode 0755 less the umask: under 077, or the 027 of hardened hosts, non-root programs cannot read their
// own files (kubernetes/kubernetes#96342). systemd uses the same umask for its services.
const Umask = 0o022

// DataDir is a node's data dir: an absolute, clean path. One machine can have several, in tests each in its own network
// namespace: only the default data dir uses the places that are usually fixed in Kubernetes.
type DataDir string

// ParseDataDir returns the data dir for a text. Links are not resolved: a link and its target are two names of one
// folder, and the node uses the one that it was started with.
func ParseDataDir(text string) (DataDir, error) {
	if text == "" {
		return "", fmt.Errorf("it is empty: specify a folder, or omit the flag for %s", DefaultDataDir)
	}
	dir, err := filepath.Abs(text)
	if err != nil {
		return "", fmt.Errorf("find the folder %q: %w", text, err)
	}
	return DataDir(dir), nil
}

// Path returns a path below the data dir.
func (d DataDir) Path(elem ...string) string {
	return filepath.Join(append([]string{string(d)}, elem...)...)
}

// Server returns a path below the control plane's data: datastore, certificates, kubeconfigs.
func (d DataDir) Server(elem ...string) string { return d.Path(append([]string{"server"}, elem...)...) }

// Agent returns a path below the node's data: containerd, images, CNI configuration.
func (d DataDir) Agent(elem ...string) string { return d.Path(append([]string{"agent"}, elem...)...) }

// Programs returns the link to the unpacked programs, through which running shims and containers use them.
func (d DataDir) Programs() string { return d.Path("data", "current") }

// Storage returns the folder of local-path volumes.
func (d DataDir) Storage() string { return d.Path("storage") }

// Run returns a path below the run directory, for what must not survive a reboot: sockets, lock and containerd's state.
func (d DataDir) Run(elem ...string) string {
	dir := "/run/polymesh"
	if d != DefaultDataDir {
		dir += "-" + d.shortID()
	}
	return filepath.Join(append([]string{dir}, elem...)...)
}

// Observe returns a path below the store of metrics, logs and traces.
func (d DataDir) Observe(elem ...string) string {
	return d.Path(append([]string{"observe"}, elem...)...)
}

// ObserveSocket returns the socket on which the store serves everything, to root.
func (d DataDir) ObserveSocket() string { return d.Run("observe.sock") }

// ObserveCollector returns a path below what a node keeps for the store of another machine.
func (d DataDir) ObserveCollector(elem ...string) string {
	return d.Agent(append([]string{"observe"}, elem...)...)
}

// ObserveCollectorSocket returns the socket on which the node's collector serves its status, to root.
func (d DataDir) ObserveCollectorSocket() string { return d.Run("observe-collector.sock") }

// ObserveSockets returns the folder of the sockets on which the store serves pods, one for each API.
func (d DataDir) ObserveSockets() string { return d.Run("observe") }

// CgroupRoot returns the cgroup, in every hierarchy, that contains all pods of the node.
func (d DataDir) CgroupRoot() string {
	if d == DefaultDataDir {
		return "/polymesh"
	}
	return "/polymesh-" + d.shortID()
}

// Kubelet returns the kubelet's root directory; CSI drivers expect the usual one.
func (d DataDir) Kubelet() string {
	if d == DefaultDataDir {
		return "/var/lib/kubelet"
	}
	return d.Agent("kubelet")
}

// PodLogs returns the folder of containers' logs.
func (d DataDir) PodLogs() string {
	if d == DefaultDataDir {
		return "/var/log/pods"
	}
	return d.Agent("pods-log")
}

// ContainerdSocket returns the socket of the node's containerd.
func (d DataDir) ContainerdSocket() string { return d.Run("containerd", "containerd.sock") }

// ImageSocket returns the socket on which the node serves containerd's images to the kubelet.
func (d DataDir) ImageSocket() string { return d.Run("images.sock") }

// RegistryDir returns containerd's registry configuration: a folder with a hosts.toml for each registry.
func (d DataDir) RegistryDir() string { return d.Agent("etc", "containerd", "certs.d") }

// NodeRegistryDir returns the folder of the same form that Polymesh writes. containerd reads it after RegistryDir, where registries of
// the same name are the user's.
func (d DataDir) NodeRegistryDir() string { return d.Agent("etc", "containerd", "registry.d") }

// RegistryDirs returns both, as containerd takes them.
func (d DataDir) RegistryDirs() string { return d.RegistryDir() + ":" + d.NodeRegistryDir() }

// CNIConfDir returns the folder of the pod network's CNI configuration.
func (d DataDir) CNIConfDir() string { return d.Agent("etc", "cni", "net.d") }

// PodNetwork returns the name of the pod network; libcni uses it in its result cache in /var/lib/cni.
func (d DataDir) PodNetwork() string { return filepath.Base(d.Run()) + "-pods" }

// TLS returns the folder of the control plane's certificates.
func (d DataDir) TLS() string { return d.Server("tls") }

// NodePKI returns the folder of a node's own certificates, which the kubelet renews.
func (d DataDir) NodePKI() string { return d.Agent("pki") }

// Authorities returns the files with the authority of API servers: a server's, and an agent's. One of them exists on a node.
func (d DataDir) Authorities() []string {
	return []string{d.ServerAuthority(), filepath.Join(d.NodePKI(), "server-ca.crt")}
}

// ServerAuthority returns the file with the authority of the API servers, on a server.
func (d DataDir) ServerAuthority() string { return filepath.Join(d.TLS(), "server-ca.crt") }

// NodeKubeconfig returns the kubeconfig of the node's own identity, on an agent.
func (d DataDir) NodeKubeconfig() string { return d.Agent("cred", "node.kubeconfig") }

// Membership returns the file with the settings of the cluster that an agent has joined.
func (d DataDir) Membership() string { return d.Agent("cluster.json") }

// NodeToken returns the file with the token with which machines join.
func (d DataDir) NodeToken() string { return d.Server("node-token") }

// ServerToken is the file with the token with which machines join as servers, and agents too.
func (d DataDir) ServerToken() string { return d.Server("token") }

// BootstrapKey is the file with the key of what the servers share in the datastore.
func (d DataDir) BootstrapKey() string { return d.Server("cred", "bootstrap.key") }

// ServerID is the file with the id by which servers that share a datastore tell data dirs apart. It is in no snapshot: a server that is restored
// on another machine is another one.
func (d DataDir) ServerID() string { return d.Server("id") }

// ServerMembership is the file by which a server is one that has joined others.
func (d DataDir) ServerMembership() string { return d.Server("cluster.json") }

// Kubeconfig returns the kubeconfig of a component.
func (d DataDir) Kubeconfig(component string) string {
	return d.Server("cred", component+".kubeconfig")
}

// DatastoreSocket returns the socket on which the datastore serves etcd's API.
func (d DataDir) DatastoreSocket() string { return d.Run("kine.sock") }

// DatastoreEndpoint returns the file with the endpoint of the running server's datastore.
func (d DataDir) DatastoreEndpoint() string { return d.Server("cred", "datastore.json") }

// Etcd returns the folder of the server's member of etcd.
func (d DataDir) Etcd() string { return d.Server("db", "etcd") }

// EncryptionFile returns the file with the encryption keys of Secrets.
func (d DataDir) EncryptionFile() string { return d.Server("cred", "encryption-config.json") }

// APIServers returns the file with the list of API servers that the node's balancer knows.
func (d DataDir) APIServers() string { return d.Agent("servers.json") }

// StatusSocket returns the socket on which a running node serves `polymesh status`.
func (d DataDir) StatusSocket() string { return d.Run("status.sock") }

func (d DataDir) shortID() string {
	sum := sha256.Sum256([]byte(d))
	return hex.EncodeToString(sum[:4])
}
