package network

import (
	"context"
	"fmt"

	"sigs.k8s.io/knftables"

	"polymesh.dev/polymesh/pkg/layout"
)

// loopback is the rule that keeps others from what listens on this machine's 127.0.0.1, as the part of a node that is kept. The portmap
// plugin sets route_localnet on the pods' bridge, so that hostPorts work there; with it the kernel also delivers packets for 127.0.0.0/8 that
// a pod with NET_RAW sends (CVE-2020-8558). With iptables the kubelet has the same rule (KUBE-FIREWALL in its kubelet_network_linux.go).
type loopback struct {
	network string
	nft     knftables.Interface
}

const (
	loopbackChain   = "loopback"
	loopbackComment = "127.0.0.0/8 is for this machine only"
)

// newLoopback returns the part; with iptables, one that does nothing.
func newLoopback(network string) (*loopback, error) {
	nft, err := openTable()
	return &loopback{network, nft}, err
}

// Missing implements keeper.Part.
func (l *loopback) Missing(ctx context.Context) (string, error) {
	if l.nft == nil {
		return "", nil
	}
	if has, err := hasRules(ctx, l.nft, loopbackChain, 3, loopbackComment); err != nil || has {
		return "", err
	}
	return "the rule that keeps pods from 127.0.0.1", nil
}

// Restore implements keeper.Part.
func (l *loopback) Restore(ctx context.Context) error {
	if l.nft == nil {
		return nil
	}
	tx := l.nft.NewTransaction()
	tx.Add(&knftables.Table{Comment: knftables.PtrTo("Polymesh's pod network " + l.network)})
	tx.Add(&knftables.Chain{
		Name: loopbackChain, Type: knftables.PtrTo(knftables.FilterType),
		Hook: knftables.PtrTo(knftables.InputHook), Priority: knftables.PtrTo(knftables.FilterPriority),
	})
	tx.Flush(&knftables.Chain{Name: loopbackChain})
	// Answers of a hostPort's pod to this machine, and what another program has sent here on purpose.
	for _, accepted := range []string{"ct state established,related accept", "ct status dnat accept"} {
		tx.Add(&knftables.Rule{Chain: loopbackChain, Rule: accepted})
	}
	tx.Add(&knftables.Rule{
		Chain: loopbackChain, Rule: `iifname != "lo" ip daddr 127.0.0.0/8 drop`, Comment: knftables.PtrTo(loopbackComment),
	})
	if err := l.nft.Run(ctx, tx); err != nil {
		return fmt.Errorf("write table %s: %w", layout.Table, err)
	}
	return nil
}
