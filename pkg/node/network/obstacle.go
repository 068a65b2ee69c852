package network

import (
	"context"
	"fmt"
	"os/exec"
	"regexp"
	"strings"

	"polymesh.dev/polymesh/pkg/layout"
)

var (
	tableLine = regexp.MustCompile(`^table ip (\S+) \{$`)
	chainLine = regexp.MustCompile(`^chain (\S+) \{$`)
)

// obstacles describes rules of other programs that drop the pods' packets, and what to do. The server must not change them. pods is this
// node's pod address range.
func obstacles(ctx context.Context, pods string) (notes []string, err error) {
	chains, err := nft(ctx, "list", "chains", "ip")
	if err != nil {
		return nil, err
	}
	k3s, drops := readChains(chains)
	if k3s {
		notes = append(notes, "K3s has left rules that drop pods' packets (chains KUBE-ROUTER-…): run k3s-killall.sh, or reboot, and restart the server")
	}
	for _, drop := range drops {
		// ufw's rules are in chains that this one jumps to.
		rules, err := nft(ctx, "list", "table", "ip", drop.table)
		if err != nil {
			return nil, err
		}
		if pods != "" && !letsThrough(rules, pods) {
			notes = append(notes, fmt.Sprintf("a firewall drops forwarded packets (table ip %s, chain %s; Docker and ufw do so) and has no rule for pods: see \"Firewalls\" in docs/start/requirements.md", drop.table, drop.chain))
		}
	}
	return notes, nil
}

// chain is a chain of the packet filter.
type chain struct{ table, chain string }

// readChains searches nft's list of chains for those of K3s's network policies (kube-router), and for those that drop forwarded
// packets by default.
func readChains(list string) (k3s bool, drops []chain) {
	var at chain
	for line := range strings.Lines(list) {
		line = strings.TrimSpace(line)
		if m := tableLine.FindStringSubmatch(line); m != nil {
			at.table = m[1]
		}
		if m := chainLine.FindStringSubmatch(line); m != nil {
			at.chain = m[1]
			k3s = k3s || strings.HasPrefix(at.chain, "KUBE-ROUTER-")
		}
		if strings.Contains(line, "hook forward") && strings.Contains(line, "policy drop") {
			drops = append(drops, at)
		}
	}
	return k3s, drops
}

// letsThrough reports whether a table's rules mention the pods: their addresses, a wider range of the same /16, or the bridge.
func letsThrough(rules, pods string) bool {
	octets := strings.SplitN(pods, ".", 3)
	return strings.Contains(rules, layout.Bridge) || len(octets) == 3 && strings.Contains(rules, " "+octets[0]+"."+octets[1]+".")
}

func nft(ctx context.Context, args ...string) (string, error) {
	out, err := exec.CommandContext(ctx, "nft", args...).Output()
	if err != nil {
		return "", fmt.Errorf("nft %s: %w", strings.Join(args, " "), err)
	}
	return string(out), nil
}
