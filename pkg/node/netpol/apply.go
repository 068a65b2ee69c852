package netpol

import (
	"context"
	"fmt"
	"slices"

	"sigs.k8s.io/knftables"
)

// kernel writes tables to the kernel, each in one transaction: no packet sees a half.
type kernel struct {
	nft knftables.Interface
	// have is the table in the kernel, as this process has written it; nil if it is not known.
	have   *Table
	checks int
}

// apply changes the kernel's table to want. It writes only what differs from the last one, or everything if that is not known.
func (k *kernel) apply(ctx context.Context, want *Table) error {
	tx := k.nft.NewTransaction()
	switch {
	case k.have == nil || k.have.Empty() != want.Empty():
		// Also removes what an earlier process has left. An empty table costs packets nothing: there is none.
		tx.Add(&knftables.Table{})
		tx.Delete(&knftables.Table{})
		if !want.Empty() {
			tx.Add(&knftables.Table{Comment: knftables.PtrTo("Polymesh's NetworkPolicies")})
			change(tx, newTable(), want)
		}
	default:
		change(tx, k.have, want)
	}
	if tx.NumOperations() == 0 {
		return nil
	}
	if err := k.nft.Run(ctx, tx); err != nil {
		k.have = nil
		return fmt.Errorf("write the packet filter rules: %w", err)
	}
	k.have = want
	return nil
}

// missing reports whether another program has removed the rules. It checks one base chain at a time: usually all rules are
// removed at once, and with a thousand policies nft takes 50 ms for each.
func (k *kernel) missing(ctx context.Context) (bool, error) {
	if k.have == nil || k.have.Empty() {
		return false, nil
	}
	k.checks++
	base := []string{egressChain, ingressChain, nodeChain}
	name := base[k.checks%len(base)]
	rules, err := k.nft.ListRules(ctx, name)
	if err != nil && !knftables.IsNotFound(err) {
		return false, fmt.Errorf("list the packet filter rules: %w", err)
	}
	if len(rules) != len(k.have.Chains[name].Rules) {
		k.have = nil
		return true, nil
	}
	return false, nil
}

// change adds to a transaction the operations that turn one table into the other. The order is that of their references: sets and chains first, then
// rules and elements that name them; what is not wanted any more goes the other way.
func change(tx *knftables.Transaction, from, to *Table) {
	for _, name := range sorted(to.Sets) {
		set, old := to.Sets[name], from.Sets[name]
		if old == nil {
			tx.Add(&knftables.Set{Name: name, Type: set.Type})
			old = &Set{}
		}
		for _, key := range sorted(old.Elements) {
			if _, ok := set.Elements[key]; !ok {
				tx.Delete(&knftables.Element{Set: name, Key: old.Elements[key]})
			}
		}
		for _, key := range sorted(set.Elements) {
			if _, ok := old.Elements[key]; !ok {
				tx.Add(&knftables.Element{Set: name, Key: set.Elements[key]})
			}
		}
	}
	for _, name := range sorted(to.Maps) {
		if from.Maps[name] == nil {
			tx.Add(&knftables.Map{Name: name, Type: verdictType})
		}
	}
	for _, name := range sorted(to.Chains) {
		if from.Chains[name] == nil {
			tx.Add(to.Chains[name].object(name))
		}
	}
	for _, name := range sorted(to.Chains) {
		want := texts(to.Chains[name])
		if old := from.Chains[name]; old != nil {
			if slices.Equal(texts(old), want) {
				continue
			}
			tx.Flush(&knftables.Chain{Name: name})
		}
		for _, text := range want {
			tx.Add(&knftables.Rule{Chain: name, Rule: text})
		}
	}
	for _, name := range sorted(to.Maps) {
		m, old := to.Maps[name], from.Maps[name]
		if old == nil {
			old = &Map{}
		}
		for _, key := range sorted(old.Elements) {
			if m.Elements[key] != old.Elements[key] {
				tx.Delete(&knftables.Element{Map: name, Key: []string{key}})
			}
		}
		for _, key := range sorted(m.Elements) {
			if m.Elements[key] != old.Elements[key] {
				tx.Add(&knftables.Element{Map: name, Key: []string{key}, Value: []string{m.Elements[key]}})
			}
		}
	}
	gone := slices.DeleteFunc(sorted(from.Chains), func(name string) bool { return to.Chains[name] != nil })
	for _, name := range gone {
		tx.Flush(&knftables.Chain{Name: name})
	}
	for _, name := range gone {
		tx.Delete(&knftables.Chain{Name: name})
	}
	for _, name := range sorted(from.Sets) {
		if to.Sets[name] == nil {
			tx.Delete(&knftables.Set{Name: name})
		}
	}
}

func (c *Chain) object(name string) *knftables.Chain {
	chain := &knftables.Chain{Name: name}
	if c.Hook != "" {
		chain.Type, chain.Hook, chain.Priority = knftables.PtrTo(knftables.FilterType), &c.Hook, &c.Priority
	}
	if c.Comment != "" {
		chain.Comment = &c.Comment
	}
	return chain
}

func texts(c *Chain) []string {
	out := make([]string, len(c.Rules))
	for i, r := range c.Rules {
		out[i] = r.nft()
	}
	return out
}
