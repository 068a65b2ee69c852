package node

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"polymesh.dev/polymesh/pkg/atomicfile"
	"polymesh.dev/polymesh/pkg/config"
)

// Nameservers follows the host's name servers. Pods get them through our own file, a copy of the host's without servers that
// pods cannot use: a loopback address is the host's own forwarder. The kubelet reads the file for each pod that it starts, so it
// may change while the server runs: a laptop may boot without a network, or change networks.
type Nameservers struct {
	file  string
	hosts []string
	given bool // hosts is the user's choice
	log   *slog.Logger

	mu      sync.Mutex
	servers []string
}

// hostFiles are the files in which a host's name servers can be configured; the first one with a server that pods can reach counts:
// the usual one, and those of the servers to which systemd-resolved, NetworkManager (NetworkManager.conf(5), rc-manager) and dnsmasq
// forward if the usual one contains their loopback address.
func hostFiles() []string {
	return []string{
		"/etc/resolv.conf", "/run/systemd/resolve/resolv.conf", "/run/NetworkManager/no-stub-resolv.conf", "/run/dnsmasq/resolv.conf",
	}
}

// NewNameservers reads the host's files, or the one that the user has set for the server or the kubelet.
func NewNameservers(cfg config.Node, log *slog.Logger) *Nameservers {
	n := &Nameservers{file: cfg.DataDir.Agent("etc", "resolv.conf"), hosts: hostFiles(), log: log.With("component", "kubelet")}
	if cfg.ResolvConf != "" {
		n.hosts, n.given = []string{cfg.ResolvConf}, true
	}
	// The kubelet itself uses this one; CoreDNS, a pod, gets its contents.
	for _, arg := range cfg.KubeletArgs {
		if file, ok := strings.CutPrefix(strings.TrimPrefix(arg, "--"), "resolv-conf="); ok {
			n.hosts, n.given = []string{file}, true
		}
	}
	n.servers, _ = n.read()
	return n
}

// File returns the file for pods.
func (n *Nameservers) File() string { return n.file }

// Servers returns the name servers of pods; none if the host has none that they can reach.
func (n *Nameservers) Servers() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Clone(n.servers)
}

// Note reports why pods have no name server.
func (n *Nameservers) Note() string {
	if len(n.Servers()) > 0 {
		return ""
	}
	return "no name server that pods can reach in " + strings.Join(n.hosts, ", ") + ": names outside the cluster cannot be resolved until there is one (--resolv-conf sets another file)"
}

// update writes the file for pods if it is outdated.
func (n *Nameservers) update() error {
	servers, text := n.read()
	if have, err := os.ReadFile(n.file); err != nil || !bytes.Equal(have, text) {
		if err := atomicfile.Write(n.file, text, 0o644); err != nil {
			return fmt.Errorf("write the pods' name servers: %w", err)
		}
	}
	n.mu.Lock()
	changed := !slices.Equal(servers, n.servers)
	n.servers = servers
	n.mu.Unlock()
	if changed {
		n.log.Info("the host's name servers have changed", "now", strings.Join(servers, " "))
	}
	return nil
}

// follow keeps the file up to date until ctx ends, by polling: files in /etc and /run are replaced, linked and unlinked by several
// programs, and reading them is cheap.
func (n *Nameservers) follow(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(5 * time.Second):
		}
		if err := n.update(); err != nil && ctx.Err() == nil {
			n.log.Error("follow the host's name servers", "err", err)
		}
	}
}

// read returns the name servers for pods and the contents of their resolv.conf.
func (n *Nameservers) read() (servers []string, text []byte) {
	for _, path := range n.hosts {
		host, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		if servers, text := podResolvConf(string(host)); len(servers) > 0 {
			return servers, []byte(text)
		}
	}
	return nil, []byte("# this machine has no name server that pods could use\n")
}

// podResolvConf removes from a resolv.conf what pods cannot use. As in the kubelet (pkg/kubelet/network/dns,
// parseResolvConf) and glibc, the second word of a line is the address and the rest of it a comment.
func podResolvConf(host string) (servers []string, text string) {
	var out strings.Builder
	for line := range strings.Lines(host) {
		if f := strings.Fields(line); len(f) > 0 && f[0] == "nameserver" {
			if len(f) < 2 {
				continue
			}
			address, err := netip.ParseAddr(f[1])
			// 0.0.0.0 means this machine too, and a zone is one of its interfaces (resolv.conf(5)).
			if err != nil || address.Unmap().IsLoopback() || address.IsUnspecified() || address.Zone() != "" {
				continue
			}
			servers = append(servers, f[1])
			line = "nameserver " + f[1] + "\n"
		}
		out.WriteString(line)
	}
	return servers, out.String()
}
