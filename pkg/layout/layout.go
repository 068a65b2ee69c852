// Package layout is the one table of what a node has where: files, sockets and cgroups, which follow from its data dir, and
// ports, network interfaces and packet filter tables, which are the machine's.
//
// It owns nothing on the machine. Whoever makes one of these, looks for it, or removes it takes its name from here. It uses
// the standard library only, so that the launcher can have it.
package layout

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"path/filepath"
)

const (
	// DefaultDataDir is where a node keeps its data by default.
	DefaultDataDir DataDir = "/var/lib/polymesh"
	// DefaultConfigFile is read when it exists.
	DefaultConfigFile = "/etc/polymesh/config.yaml"
	// DefaultKubeconfig is where a server writes the administrator's kubeconfig by default.
	DefaultKubeconfig = "/etc/polymesh/polymesh.yaml"
	// Unit is the systemd unit of a server that was installed (pkg/service).
	Unit = "polymesh.service"
)

// Umask is the node's, whatever the umask of the shell that starts it. containerd makes the root folder of every container
// with mode 0755 less the umask: under 077, or the 027 of hardened hosts, programs that do not run as root cannot read their
// own files (kubernetes/kubernetes#96342). systemd gives its services the same one.
const Umask = 0o022

// DataDir is a node's data dir: an absolute, clean path. One machine can hold several, in tests each in a network namespace
// of its own: what Kubernetes usually keeps at fixed places lies there only for the default data dir.
type DataDir string

// ParseDataDir returns the data dir that a text means. Links in it stay: a link and what it leads to are two names of one
// folder, and the node knows it by the one that it was started with.
func ParseDataDir(text string) (DataDir, error) {
	if text == "" {
		return "", fmt.Errorf("it is empty: give a folder, or leave it out for %s", DefaultDataDir)
	}
	dir, err := filepath.Abs(text)
	if err != nil {
		return "", fmt.Errorf("find the folder %q: %w", text, err)
	}
	return DataDir(dir), nil
}

// Path is a path below the data dir.
func (d DataDir) Path(elem ...string) string {
	return filepath.Join(append([]string{string(d)}, elem...)...)
}

// Server is a path below the control plane's data: datastore, certificates, kubeconfigs.
func (d DataDir) Server(elem ...string) string { return d.Path(append([]string{"server"}, elem...)...) }

// Agent is a path below the node's data: containerd, images, CNI configuration.
func (d DataDir) Agent(elem ...string) string { return d.Path(append([]string{"agent"}, elem...)...) }

// Programs is the link to the unpacked programs, by which running shims and containers know them.
func (d DataDir) Programs() string { return d.Path("data", "current") }

// Storage is where volumes of the class local-path lie.
func (d DataDir) Storage() string { return d.Path("storage") }

// Run is a path below the run directory, which holds what must not outlive a boot: sockets, lock and containerd's state.
func (d DataDir) Run(elem ...string) string {
	dir := "/run/polymesh"
	if d != DefaultDataDir {
		dir += "-" + d.shortID()
	}
	return filepath.Join(append([]string{dir}, elem...)...)
}

// CgroupRoot is the cgroup, in every hierarchy, under which all pods of the node lie.
func (d DataDir) CgroupRoot() string {
	if d == DefaultDataDir {
		return "/polymesh"
	}
	return "/polymesh-" + d.shortID()
}

// Kubelet is the kubelet's root; CSI drivers expect the usual one.
func (d DataDir) Kubelet() string {
	if d == DefaultDataDir {
		return "/var/lib/kubelet"
	}
	return d.Agent("kubelet")
}

// PodLogs is where containers' logs lie.
func (d DataDir) PodLogs() string {
	if d == DefaultDataDir {
		return "/var/log/pods"
	}
	return d.Agent("pods-log")
}

// ContainerdSocket is where the node's containerd listens.
func (d DataDir) ContainerdSocket() string { return d.Run("containerd", "containerd.sock") }

// RegistryDir is where the node's containerd finds how to reach registries: a folder with a hosts.toml for each.
func (d DataDir) RegistryDir() string { return d.Agent("etc", "containerd", "certs.d") }

// CNIConfDir is where the node's containerd finds the configuration of the pod network.
func (d DataDir) CNIConfDir() string { return d.Agent("etc", "cni", "net.d") }

// PodNetwork is the name of the pod network; libcni's cache of results in /var/lib/cni goes by it.
func (d DataDir) PodNetwork() string { return filepath.Base(d.Run()) + "-pods" }

// TLS is the folder of the control plane's certificates.
func (d DataDir) TLS() string { return d.Server("tls") }

// Kubeconfig is the file with which the component of this name reaches the API server.
func (d DataDir) Kubeconfig(component string) string {
	return d.Server("cred", component+".kubeconfig")
}

// DatastoreSocket is where the datastore serves etcd's API.
func (d DataDir) DatastoreSocket() string { return d.Run("kine.sock") }

// EncryptionFile holds the keys with which Secrets are encrypted.
func (d DataDir) EncryptionFile() string { return d.Server("cred", "encryption-config.json") }

// StatusSocket is where a running node answers `polymesh status`.
func (d DataDir) StatusSocket() string { return d.Run("status.sock") }

func (d DataDir) shortID() string {
	sum := sha256.Sum256([]byte(d))
	return hex.EncodeToString(sum[:4])
}
