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

// Nameservers follows the host's name servers. Pods get them by a file of ours, a copy of the host's without what is of no
// use to a pod: one on loopback is the host's own forwarder. The kubelet reads the file for each pod that it starts, so it
// may change while the server runs: a laptop boots before it has a network, or moves to another one.
type Nameservers struct {
	file  string
	hosts []string
	given bool // hosts is what the user has named
	log   *slog.Logger

	mu      sync.Mutex
	servers []string
}

// hostFiles are where a host's name servers may be written down, the first file with one that pods can reach counts:
// the usual one; what systemd-resolved, NetworkManager (NetworkManager.conf(5), rc-manager) and dnsmasq forward to when the
// usual one names them on loopback.
func hostFiles() []string {
	return []string{
		"/etc/resolv.conf", "/run/systemd/resolve/resolv.conf", "/run/NetworkManager/no-stub-resolv.conf", "/run/dnsmasq/resolv.conf",
	}
}

// NewNameservers looks at the host's files, or at the one that the user has named for the server or for the kubelet.
func NewNameservers(cfg config.Node, log *slog.Logger) *Nameservers {
	n := &Nameservers{file: cfg.DataDir.Agent("etc", "resolv.conf"), hosts: hostFiles(), log: log.With("component", "kubelet")}
	if cfg.ResolvConf != "" {
		n.hosts, n.given = []string{cfg.ResolvConf}, true
	}
	// The kubelet itself takes this one; CoreDNS, a pod, gets what is in it.
	for _, arg := range cfg.KubeletArgs {
		if file, ok := strings.CutPrefix(strings.TrimPrefix(arg, "--"), "resolv-conf="); ok {
			n.hosts, n.given = []string{file}, true
		}
	}
	n.servers, _ = n.read()
	return n
}

// File is the file for pods.
func (n *Nameservers) File() string { return n.file }

// Servers are those that pods get; none where the host has none that they can reach.
func (n *Nameservers) Servers() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Clone(n.servers)
}

// Note says why pods have no name server.
func (n *Nameservers) Note() string {
	if len(n.Servers()) > 0 {
		return ""
	}
	return "no name server that pods can reach in " + strings.Join(n.hosts, ", ") + ": names outside of the cluster are not found until there is one (--resolv-conf names another file)"
}

// update writes the file for pods if it is not what it should be.
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

// follow keeps the file up to date until ctx ends. Files in /etc/ and /run are replaced, linked and unlinked by several
// programs, and looking at them costs nothing.
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

// read returns the name servers for pods and the text of their resolv.conf.
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

// podResolvConf takes out of a resolv.conf what pods cannot use. As for the kubelet (pkg/kubelet/network/dns,
// parseResolvConf) and glibc, the second word of a line is the address and the rest of it a remark.
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
