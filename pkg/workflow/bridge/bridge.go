// Package bridge synchronizes a mesh with the service registry of an older system, in both directions: services registered outside
// appear in the mesh as ServiceEntry and WorkloadEntry, and labeled Services of the mesh appear in the registry,
// without changes to programs on either side. It can also take a name over: callers outside then only see the mesh, and a
// VirtualService decides where requests go, so that a service can be moved step by step.
//
// It owns the objects with its labels in its namespace, its report in a ConfigMap there, and the instances in the registry
// that carry its mark. It removes nothing because a registry does not respond or has lost its data.
// pkg/command runs it; the subpackages are clients of the registries.
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
	// Name distinguishes the bridges of a cluster: it is in the labels of their objects, and in the label that adds a Service of
	// the mesh to the registry.
	Name string
	// Namespace is the namespace of the objects. It is created if it does not exist.
	Namespace string
	// Domain is the suffix of service names in the mesh.
	Domain string
	// Port is the port of services in the mesh, whatever the ports of their instances are.
	Port int
	// Interval is the time between two reads of the registry.
	Interval time.Duration
	// StaleAfter is how long an instance may miss heartbeats while others send them; 0 means forever.
	StaleAfter time.Duration
	// MaxLoss is the percentage of the instances in the mesh that may vanish from the registry at once. If more do, none of
	// them is removed until Guard has passed.
	MaxLoss int
	Guard   time.Duration
	// Allow are the ranges of permitted instance addresses; empty allows all but link-local ones and the cluster's own. The
	// smallest range that contains an address decides, so those need a range no larger than theirs.
	Allow []netip.Prefix
	// Gateway is the Service through which callers outside the cluster reach the mesh.
	Gateway types.NamespacedName
	// AdvertiseAddress, HOST or HOST:PORT, overrides the address of the gateway's Service.
	AdvertiseAddress string
	// AdvertiseDomain is the suffix of the host names for callers outside the cluster. Without it they use the address.
	AdvertiseDomain string

	Registry Registry
	REST     *rest.Config
	Log      *slog.Logger
}

// check rejects invalid options before anything is changed.
func (o Options) check() error {
	var bad []error
	refuse := func(format string, args ...any) { bad = append(bad, fmt.Errorf(format, args...)) }
	if len(validation.IsDNS1123Label(o.Name)) > 0 {
		refuse("the bridge's name %q may only contain lowercase letters, digits and -", o.Name)
	}
	if len(validation.IsDNS1123Label(o.Namespace)) > 0 {
		refuse("%q is not a valid namespace name", o.Namespace)
	}
	for _, domain := range []string{o.Domain, o.AdvertiseDomain} {
		if domain != "" && len(validation.IsDNS1123Subdomain(domain)) > 0 {
			refuse("%q is not a domain", domain)
		}
	}
	if o.Domain == "" {
		refuse("a domain is required")
	}
	if strings.HasSuffix("."+o.Domain, ".cluster.local") {
		refuse("the domain %s is Kubernetes' own domain for Services: use another one", o.Domain)
	}
	if o.Port < 1 || o.Port > 65535 {
		refuse("%d is not a port", o.Port)
	}
	if o.Interval < 100*time.Millisecond {
		refuse("an interval of %s is too short", o.Interval)
	}
	if o.StaleAfter < 0 || o.Guard < 0 {
		refuse("a duration cannot be negative")
	}
	if o.MaxLoss < 0 || o.MaxLoss > 100 {
		refuse("%d is not a percentage: the maximum loss is between 0 and 100", o.MaxLoss)
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
	// owner marks this bridge's instances in the registry. It also identifies the cluster.
	owner string
	// advertised is what this process has registered, and when.
	advertised map[string]registered
	// last is the last report written.
	last  Report
	saved time.Time
}

type registered struct {
	advert Advert
	at     time.Time
}

// New checks the options and connects to the cluster.
func New(ctx context.Context, o Options) (*Bridge, error) {
	if err := o.check(); err != nil {
		return nil, err
	}
	b := &Bridge{Options: o, advertised: make(map[string]registered)}
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

// Run keeps both sides in sync until ctx ends. Everything it created stays: a restarted bridge continues with it.
func (b *Bridge) Run(ctx context.Context) error {
	b.Log.Info("bridge is running", "registry", b.Registry.String(), "namespace", b.Namespace, "domain", b.Domain)
	tick := time.NewTicker(b.Interval)
	defer tick.Stop()
	for {
		report := b.pass(ctx, time.Now())
		if ctx.Err() != nil {
			return nil
		}
		b.logChanges(report)
		if err := b.save(ctx, report); err != nil && ctx.Err() == nil {
			b.Log.Error("cannot write the report", "err", err)
		}
		b.last = report
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// pass reads both sides once, and syncs them.
func (b *Bridge) pass(ctx context.Context, now time.Time) Report {
	report := b.last.next(b.Options, now)
	// Limit the time of a pass, so that a hanging registry does not block the next one.
	ctx, cancel := context.WithTimeout(ctx, max(b.Interval, 30*time.Second))
	defer cancel()
	services, err := b.Registry.Services(ctx)
	if err != nil {
		report.Error = fmt.Sprintf("the registry does not answer, so nothing is changed: %v", err)
		return report
	}
	report.Answered = now
	v, err := b.cluster.read(ctx, b.Options)
	if err != nil {
		report.Error = fmt.Sprintf("cannot read the cluster: %v", err)
		return report
	}
	p := b.plan(services, v, b.owner, now, b.last)
	report.Services, report.Advertised, report.Problems, report.Holding = p.services, p.advertised, p.problems, p.holding
	if err := b.carryOut(ctx, p, now); err != nil {
		report.Error = err.Error()
	}
	return report
}

// carryOut applies the plan, in an order in which callers on both sides always have an instance to call: first additions, then
// hiding, then removals.
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

// advertise updates the registry's side.
func (b *Bridge) advertise(ctx context.Context, registry Advertiser, p plan, now time.Time) error {
	var failures []error
	there := make(map[string]bool) // names that the mesh serves
	wanted := make(map[string]bool)
	for _, a := range p.register {
		wanted[a.ID] = true
		if p.altered[a.ID] {
			delete(b.advertised, a.ID) // renewing it would keep the modified entry
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
				continue // callers would have no instance
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

// keep registers a new or changed advert, and renews it when it is due or when the registry does not show it.
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
			b.advertised[a.ID] = registered{a, now}
			return nil
		}
	}
	if err := registry.Register(ctx, a); err != nil {
		return err
	}
	b.Log.Info("advertised", "service", a.Service, "as", a.Host, "port", a.Port)
	b.advertised[a.ID] = registered{a, now}
	return nil
}

// logChanges logs what is new in a report.
func (b *Bridge) logChanges(r Report) {
	if r.Error != "" && r.Error != b.last.Error {
		b.Log.Error(r.Error)
	}
	if r.Error == "" && b.last.Error != "" {
		b.Log.Info("the registry and the cluster respond again")
	}
	for _, p := range r.Problems {
		if !slices.Contains(b.last.Problems, p) {
			b.Log.Warn(p.Message, "service", p.Service)
		}
	}
	switch {
	case r.Holding != nil && b.last.Holding == nil:
		b.Log.Warn("too many instances vanished from the registry at once: keeping them in the mesh for now", "instances", len(r.Holding.Instances), "until", r.Holding.Until.Format(time.RFC3339))
	case r.Holding == nil && b.last.Holding != nil && r.Error == "":
		b.Log.Info("no instances are being kept any more")
	}
}

// splitAddress parses HOST or HOST:PORT; port is 0 if missing.
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
