// Package bridge keeps a mesh and the service registry of an older system in step, both ways: what is registered outside
// appears in the mesh as ServiceEntry and WorkloadEntry, and Services of the mesh that carry a label appear in the registry,
// so that neither side's programs change. It can also take a name over: callers outside then see the mesh only, and a
// VirtualService decides who answers, which is how a service is moved step by step.
//
// It owns the objects with its labels in its namespace, its report in a ConfigMap there, and the instances in the registry
// that bear its mark. It takes nothing away on the word of a registry that does not answer, or that has lost its memory.
// pkg/command runs it; the packages below it speak to the registries.
package bridge

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/client-go/rest"
)

// Options of a bridge.
type Options struct {
	// Name tells the bridges of a cluster apart: it is in the labels of their objects, and in the label that a Service of
	// the mesh carries to be in the registry.
	Name string
	// Namespace is where the objects are. It is made if it is missing.
	Namespace string
	// Domain is what the mesh puts behind a service's name.
	Domain string
	// Port is where the mesh's programs reach a service, whatever the ports of its instances are.
	Port int
	// Interval is the time from one look at the registry to the next.
	Interval time.Duration
	// StaleAfter is how long an instance may stay unheard of while others are heard; 0: forever.
	StaleAfter time.Duration
	// MaxLoss is how many percent of the instances in the mesh may vanish from the registry at once. If more do, none of
	// them is taken away for the time of Guard.
	MaxLoss int
	Guard   time.Duration
	// Allow are the ranges of addresses that instances may have; empty: all but link-local ones and the cluster's own. Of the
	// ranges that hold an address the smallest counts, so those need a range as small as theirs.
	Allow []netip.Prefix
	// Gateway is the Service through which callers outside reach the mesh.
	Gateway types.NamespacedName
	// AdvertiseAddress, HOST or HOST:PORT, goes before the address that the gateway's Service has.
	AdvertiseAddress string
	// AdvertiseDomain makes the names by which callers outside call the mesh's services. Without it they use the address.
	AdvertiseDomain string

	Registry Registry
	REST     *rest.Config
	Log      *slog.Logger
}

// check refuses what could not work, before anything is touched.
func (o Options) check() error {
	var bad []error
	refuse := func(format string, args ...any) { bad = append(bad, fmt.Errorf(format, args...)) }
	if len(validation.IsDNS1123Label(o.Name)) > 0 {
		refuse("the bridge's name %q may have small letters, digits and - only", o.Name)
	}
	if len(validation.IsDNS1123Label(o.Namespace)) > 0 {
		refuse("%q cannot be the name of a namespace", o.Namespace)
	}
	for _, domain := range []string{o.Domain, o.AdvertiseDomain} {
		if domain != "" && len(validation.IsDNS1123Subdomain(domain)) > 0 {
			refuse("%q is not a domain", domain)
		}
	}
	if o.Domain == "" {
		refuse("the mesh's names need a domain")
	}
	if strings.HasSuffix("."+o.Domain, ".cluster.local") {
		refuse("the domain %s is Kubernetes' own, where Services have their names: take another one", o.Domain)
	}
	if o.Port < 1 || o.Port > 65535 {
		refuse("%d is not a port", o.Port)
	}
	if o.Interval < 100*time.Millisecond {
		refuse("an interval of %s is too short", o.Interval)
	}
	if o.StaleAfter < 0 || o.Guard < 0 {
		refuse("a time cannot be negative")
	}
	if o.MaxLoss < 0 || o.MaxLoss > 100 {
		refuse("%d is not a percentage: how many of the instances may vanish at once is between 0 and 100", o.MaxLoss)
	}
	if _, _, err := splitAddress(o.AdvertiseAddress); err != nil {
		bad = append(bad, err)
	}
	return errors.Join(bad...)
}

// Bridge is one bridge to one registry.
type Bridge struct {
	Options
	cluster *cluster
	// owner is how the registry remembers who has put an instance there. It names this cluster too.
	owner string
	// advertised is what the registry was told by this process, and when.
	advertised map[string]told
	// last is the report that was written last.
	last  Report
	saved time.Time
}

type told struct {
	advert Advert
	at     time.Time
}

// New checks the options, and reaches the cluster.
func New(ctx context.Context, o Options) (*Bridge, error) {
	if err := o.check(); err != nil {
		return nil, err
	}
	b := &Bridge{Options: o, advertised: make(map[string]told)}
	var err error
	if b.cluster, err = connect(ctx, o); err != nil {
		return nil, err
	}
	b.owner = b.cluster.id + "/" + o.Namespace + "/" + o.Name
	if b.last, err = readReport(ctx, b.cluster.core, o.Namespace, o.Name); err != nil && !errors.Is(err, ErrNoReport) {
		return nil, err
	}
	return b, nil
}

// Run keeps both sides in step until ctx ends. What is there stays then: a bridge that is started again goes on with it.
func (b *Bridge) Run(ctx context.Context) error {
	b.Log.Info("bridge runs", "registry", b.Registry.String(), "namespace", b.Namespace, "domain", b.Domain)
	tick := time.NewTicker(b.Interval)
	defer tick.Stop()
	for {
		report := b.pass(ctx, time.Now())
		if ctx.Err() != nil {
			return nil
		}
		b.say(report)
		if err := b.save(ctx, report); err != nil && ctx.Err() == nil {
			b.Log.Error("the report cannot be written", "err", err)
		}
		b.last = report
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// pass looks at both sides once, and brings them in step.
func (b *Bridge) pass(ctx context.Context, now time.Time) Report {
	report := b.last.next(b.Options, now)
	// A registry that hangs must not keep the bridge from its next pass.
	ctx, cancel := context.WithTimeout(ctx, max(b.Interval, 30*time.Second))
	defer cancel()
	services, err := b.Registry.Services(ctx)
	if err != nil {
		report.Error = fmt.Sprintf("the registry does not answer, so nothing is changed: %v", err)
		return report
	}
	report.Answered = now
	v, err := b.cluster.look(ctx, b.Options)
	if err != nil {
		report.Error = fmt.Sprintf("the cluster cannot be read: %v", err)
		return report
	}
	p := b.plan(services, v, b.owner, now, b.last)
	report.Services, report.Advertised, report.Problems, report.Holding = p.services, p.advertised, p.problems, p.holding
	if err := b.carryOut(ctx, p, now); err != nil {
		report.Error = err.Error()
	}
	return report
}

// carryOut does what the plan says, in an order in which no caller on either side is left without anybody to call: first what
// is new, then who is hidden, and at the end who goes.
func (b *Bridge) carryOut(ctx context.Context, p plan, now time.Time) error {
	var failures []error
	for _, o := range p.apply {
		if err := b.cluster.apply(ctx, o); err != nil {
			failures = append(failures, err)
			continue
		}
		b.Log.Info("written", "object", id(o))
	}
	if advertiser, ok := b.Registry.(Advertiser); ok {
		failures = append(failures, b.advertise(ctx, advertiser, p, now))
	}
	for _, o := range p.remove {
		if err := b.cluster.remove(ctx, o); err != nil {
			failures = append(failures, err)
			continue
		}
		b.Log.Info("removed", "object", id(o))
	}
	return errors.Join(failures...)
}

// advertise keeps the registry's side.
func (b *Bridge) advertise(ctx context.Context, registry Advertiser, p plan, now time.Time) error {
	var failures []error
	there := make(map[string]bool) // names that the mesh answers to
	wanted := make(map[string]bool)
	for _, a := range p.register {
		wanted[a.ID] = true
		if p.altered[a.ID] {
			delete(b.advertised, a.ID) // to renew it would keep what others have made of it
		}
		if err := b.keep(ctx, registry, a, p.seen[a.ID], now); err != nil {
			failures = append(failures, fmt.Errorf("advertise %s: %w", a.Service, err))
			continue
		}
		there[a.Service] = true
	}
	if holder, ok := registry.(Holder); ok {
		for _, h := range p.hold {
			if !there[h.advert] {
				continue // callers would find no one
			}
			if err := holder.Hold(ctx, h.service, h.id); err != nil {
				failures = append(failures, err)
				continue
			}
			if !h.again {
				b.Log.Info("taken over", "service", h.service, "instance", h.id)
			}
		}
		for _, r := range p.release {
			if err := holder.Release(ctx, r.service, r.id); err != nil {
				failures = append(failures, err)
				continue
			}
			b.Log.Info("given back", "service", r.service, "instance", r.id)
		}
	}
	for _, w := range p.withdraw {
		if err := registry.Withdraw(ctx, w.service, w.id); err != nil {
			failures = append(failures, err)
			continue
		}
		b.Log.Info("withdrawn", "service", w.service, "instance", w.id)
	}
	for id := range b.advertised {
		if !wanted[id] {
			delete(b.advertised, id)
		}
	}
	return errors.Join(failures...)
}

// keep registers an advert that is new or another one than before, and renews it when it is time, or when the registry does
// not show it.
func (b *Bridge) keep(ctx context.Context, registry Advertiser, a Advert, seen bool, now time.Time) error {
	before, ok := b.advertised[a.ID]
	if ok && before.advert == a {
		if seen && now.Sub(before.at) < registry.RenewEvery() {
			return nil
		}
		known, err := registry.Renew(ctx, a)
		if err != nil {
			return err
		}
		if known {
			b.advertised[a.ID] = told{a, now}
			return nil
		}
	}
	if err := registry.Register(ctx, a); err != nil {
		return err
	}
	b.Log.Info("advertised", "service", a.Service, "as", a.Host, "port", a.Port)
	b.advertised[a.ID] = told{a, now}
	return nil
}

// say logs what is new in a report.
func (b *Bridge) say(r Report) {
	if r.Error != "" && r.Error != b.last.Error {
		b.Log.Error(r.Error)
	}
	if r.Error == "" && b.last.Error != "" {
		b.Log.Info("the registry and the cluster answer again")
	}
	for _, p := range r.Problems {
		if !slices.Contains(b.last.Problems, p) {
			b.Log.Warn(p.Message, "service", p.Service)
		}
	}
	switch {
	case r.Holding != nil && b.last.Holding == nil:
		b.Log.Warn("too much has vanished from the registry at once: it stays in the mesh for now", "instances", len(r.Holding.Instances), "until", r.Holding.Until.Format(time.RFC3339))
	case r.Holding == nil && b.last.Holding != nil && r.Error == "":
		b.Log.Info("nothing is held any more")
	}
}

// splitAddress reads HOST or HOST:PORT; port is 0 where there is none.
func splitAddress(address string) (host string, port int, err error) {
	if !strings.Contains(address, ":") || net.ParseIP(address) != nil {
		return address, 0, nil
	}
	host, number, err := net.SplitHostPort(address)
	if err == nil {
		port, err = net.LookupPort("tcp", number)
	}
	if err != nil || host == "" {
		return "", 0, fmt.Errorf("%q is neither HOST nor HOST:PORT", address)
	}
	return host, port, nil
}
