package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync/atomic"
	"time"

	"sigs.k8s.io/knftables"

	"polymesh.dev/polymesh/pkg/component"
	"polymesh.dev/polymesh/pkg/layout"
)

// servicesHook is the kube-proxy chain that all pod traffic to services passes
// (k8s.io/kubernetes/pkg/proxy/nftables).
const servicesHook = "nat-prerouting"

// serviceRules are kube-proxy's rules in nftables mode. kube-proxy writes changes only, and does a full sync once an hour
// (FullSyncPeriod); unlike in iptables mode it does not check whether the rules still exist. But a kube-proxy that starts writes all of them.
// So Restore runs a second one for some seconds, as a process, with the flags and the identity of the first. Both write the same rules,
// because they compute them from the same objects, and the first continues from what the second has written. This needs no permission that
// kube-proxy does not have.
type serviceRules struct {
	nft knftables.Interface
	// program is this program, which is kube-proxy with the command ProxyCommand, and args are kube-proxy's.
	program string
	args    []string
	log     *slog.Logger
	// seen is set once the rules have existed: at startup kube-proxy writes them by itself.
	seen atomic.Bool
}

// newServiceRules returns the rules of a kube-proxy with these arguments.
func newServiceRules(args []string, log *slog.Logger) (*serviceRules, error) {
	nft, err := knftables.New(knftables.IPv4Family, layout.ProxyTable)
	if err != nil {
		return nil, fmt.Errorf("use nft: %w", err)
	}
	program, err := os.Executable()
	if err != nil {
		return nil, err
	}
	// The first one has the port.
	args = append([]string{ProxyCommand}, append(args, "--healthz-port=0")...)
	return &serviceRules{nft: nft, program: program, args: args, log: log}, nil
}

// Missing implements keeper.Part.
func (s *serviceRules) Missing(ctx context.Context) (string, error) {
	rules, err := s.nft.ListRules(ctx, servicesHook)
	if err != nil && !knftables.IsNotFound(err) {
		return "", fmt.Errorf("list the rules of table %s: %w", layout.ProxyTable, err)
	}
	if len(rules) > 0 {
		s.seen.Store(true)
	} else if s.seen.Load() {
		return "the rules of service addresses", nil
	}
	return "", nil
}

const (
	// writesWithin is the deadline for a kube-proxy that starts to have written its rules: it writes all in one transaction.
	writesWithin = 15 * time.Second
	// overlap is how long the second kube-proxy runs after that: what changed while it started reaches both of them.
	overlap = 3 * time.Second
	// endsWithin is the deadline for its end.
	endsWithin = 5 * time.Second
)

// Restore implements keeper.Part: it returns when the rules are there.
func (s *serviceRules) Restore(ctx context.Context) (err error) {
	// If only rules were removed, the first kube-proxy could not continue from what is left of its table.
	tx := s.nft.NewTransaction()
	tx.Add(&knftables.Table{})
	tx.Delete(&knftables.Table{})
	if err := s.nft.Run(ctx, tx); err != nil {
		return fmt.Errorf("remove what is left of table %s: %w", layout.ProxyTable, err)
	}
	second := &component.Child{Path: s.program, Args: s.args, Output: os.Stderr, Log: s.log}
	if err := second.Start(ctx); err != nil {
		return fmt.Errorf("run a second kube-proxy: %w", err)
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), endsWithin)
		defer cancel()
		err = errors.Join(err, second.Stop(ctx))
	}()
	for end := time.Now().Add(writesWithin); ; {
		if gone, err := s.Missing(ctx); err == nil && gone == "" {
			break
		}
		if time.Now().After(end) {
			return errors.New("a second kube-proxy has not written the rules of service addresses either: see the log")
		}
		if !wait(ctx, 100*time.Millisecond) {
			return ctx.Err()
		}
	}
	wait(ctx, overlap)
	return nil
}

// wait waits; it reports false if ctx ends first.
func wait(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}
