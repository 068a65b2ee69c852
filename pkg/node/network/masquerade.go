package network

import (
	"context"
	"fmt"
	"net/netip"
	"os/exec"
	"strings"

	"sigs.k8s.io/knftables"

	"polymesh.dev/polymesh/pkg/layout"
	"polymesh.dev/polymesh/pkg/preflight"
)

// masquerade lets pods reach addresses outside the cluster under the node's address. It is a single rule for all pods, as
// in K3s and flannel: the CNI plugin's own rules, one per pod, are written only when a pod starts.
type masquerade struct {
	network string
	cluster netip.Prefix
	// pods is this node's pod address range; empty until it is known.
	pods func() string
	// nft is nil if iptables is used.
	nft knftables.Interface
	// settled is the range of the rule that was written last.
	settled string
}

func newMasquerade(network string, cluster netip.Prefix, pods func() string) (*masquerade, error) {
	nft, err := openTable()
	return &masquerade{network: network, cluster: cluster, pods: pods, nft: nft}, err
}

// openTable returns access to Polymesh's own table; nil if iptables is used.
func openTable() (knftables.Interface, error) {
	if !preflight.NFTables() {
		return nil, nil
	}
	nft, err := knftables.New(knftables.IPv4Family, layout.Table)
	if err != nil {
		return nil, fmt.Errorf("use nft: %w", err)
	}
	return nft, nil
}

// hasRules reports whether a chain of the table has this number of rules. The comment of the last one identifies them.
func hasRules(ctx context.Context, nft knftables.Interface, chain string, count int, comment string) (bool, error) {
	rules, err := nft.ListRules(ctx, chain)
	if err != nil && !knftables.IsNotFound(err) {
		return false, fmt.Errorf("list the rules of table %s: %w", layout.Table, err)
	}
	if len(rules) != count {
		return false, nil
	}
	last := rules[count-1].Comment
	return last != nil && *last == comment, nil
}

// comment identifies the exact rule, so that one for another address range counts as missing.
func (m *masquerade) comment(pods string) string {
	return fmt.Sprintf("%s: %s leaves %s", m.network, pods, m.cluster)
}

// Settle implements keeper.Changing.
func (m *masquerade) Settle(ctx context.Context) error {
	pods := m.pods()
	if pods == m.settled {
		return nil
	}
	gone, err := m.Missing(ctx)
	if err == nil && gone != "" {
		err = m.Restore(ctx)
	}
	if err == nil {
		m.settled = pods
	}
	return err
}

// Missing implements keeper.Part.
func (m *masquerade) Missing(ctx context.Context) (string, error) {
	pods := m.pods()
	if pods == "" {
		return "", nil
	}
	const gone = "the rule through which pods reach addresses outside the cluster"
	if m.nft == nil {
		for _, args := range m.iptables(pods, "-C") {
			if err := iptables(ctx, args...); err != nil {
				return gone, nil
			}
		}
		return "", nil
	}
	if has, err := hasRules(ctx, m.nft, "postrouting", 1, m.comment(pods)); err != nil || has {
		return "", err
	}
	return gone, nil
}

// Restore implements keeper.Part.
func (m *masquerade) Restore(ctx context.Context) error {
	pods := m.pods()
	if pods == "" {
		return nil
	}
	if m.nft == nil {
		// The chain may exist already; what matters is whether the rules can be added.
		_ = iptables(ctx, "-N", layout.MasqueradeChain)
		_ = iptables(ctx, "-F", layout.MasqueradeChain)
		for i, args := range m.iptables(pods, "-A") {
			if i == 0 && iptables(ctx, m.iptables(pods, "-C")[0]...) == nil {
				continue
			}
			if err := iptables(ctx, args...); err != nil {
				return err
			}
		}
		return nil
	}
	tx := m.nft.NewTransaction()
	tx.Add(&knftables.Table{Comment: knftables.PtrTo("Polymesh's pod network " + m.network)})
	tx.Add(&knftables.Chain{
		Name: "postrouting", Type: knftables.PtrTo(knftables.NATType),
		Hook: knftables.PtrTo(knftables.PostroutingHook), Priority: knftables.PtrTo(knftables.SNATPriority),
	})
	tx.Flush(&knftables.Chain{Name: "postrouting"})
	tx.Add(&knftables.Rule{
		Chain:   "postrouting",
		Rule:    knftables.Concat("ip saddr", pods, "ip daddr !=", m.cluster.String(), "ip daddr != 224.0.0.0/4", "masquerade fully-random"),
		Comment: knftables.PtrTo(m.comment(pods)),
	})
	if err := m.nft.Run(ctx, tx); err != nil {
		return fmt.Errorf("write table %s: %w", layout.Table, err)
	}
	return nil
}

// iptables returns the iptables arguments of the rules, with the command -A or -C.
func (m *masquerade) iptables(pods, command string) [][]string {
	return [][]string{
		{command, "POSTROUTING", "-j", layout.MasqueradeChain},
		{command, layout.MasqueradeChain, "-s", pods, "-d", "224.0.0.0/4", "-j", "RETURN"},
		{command, layout.MasqueradeChain, "-s", pods, "!", "-d", m.cluster.String(), "-j", "MASQUERADE", "--random-fully"},
	}
}

func iptables(ctx context.Context, args ...string) error {
	args = append([]string{"-w", "-t", "nat"}, args...)
	if out, err := exec.CommandContext(ctx, "iptables", args...).CombinedOutput(); err != nil {
		return fmt.Errorf("iptables %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return nil
}
