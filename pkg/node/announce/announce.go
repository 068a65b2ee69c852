// Package announce is a node's part in LoadBalancer services with a pool: it has the addresses that the cluster's load balancer
// (pkg/controlplane/loadbalancer) has assigned to this node, and notifies the network's other machines. kube-proxy does the rest.
//
// It owns the network interface polymesh-lb. What it may do in the cluster is to watch Services, with the node's own identity: it writes
// nothing. pkg/worker builds the component "pool-addresses".
package announce

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	corelisters "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"

	"polymesh.dev/polymesh/pkg/component"
	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/converge"
	"polymesh.dev/polymesh/pkg/kubeconfig"
)

const (
	// Annotation is on a Service that has an address of the pool: the name of the node that announces it. The load balancer writes it. A user who
	// may write the Service could change it for a moment, and with that which node has the Service's own address.
	Annotation = "polymesh.dev/announced-by"
	// Class is the spec.loadBalancerClass of the load balancer; it also serves services without a class.
	Class = "polymesh.dev/servicelb"
)

// Serves reports whether a Service is the load balancer's. The API server itself clears the status of one that is no longer of type
// LoadBalancer (pkg/registry/core/service/strategy.go, dropTypeDependentFields).
func Serves(svc *corev1.Service) bool {
	return svc.Spec.Type == corev1.ServiceTypeLoadBalancer && (svc.Spec.LoadBalancerClass == nil || *svc.Spec.LoadBalancerClass == Class)
}

// Options of the announcements.
type Options struct {
	// Node is the node's name.
	Node string
	// Kubeconfig is the node's own. It may list and watch Services and nodes. It is read by Start.
	Kubeconfig string
	// Pool are the only addresses that are ever put on the interface; without any, the interface is removed.
	Pool []config.AddressRange
	// LinkAlias marks the network interface as this data dir's.
	LinkAlias string
	Log       *slog.Logger
}

const (
	// recheck is how often addresses that other programs have removed are put back, the lifetime of addresses is extended, and neighbours
	// hear of them again: one whose cache holds the node of before learns it then.
	recheck = 20 * time.Second
	// lifetime is how long an address outlives this process on a cluster with other nodes: the node counts as lost after 50 s
	// (--node-monitor-grace-period), and another one has the address then. A restart takes less.
	lifetime = time.Minute
	// burst is how often an address that is new here is announced, once a second: a single packet may be lost.
	burst = 5
)

// Announcer is the component.
type Announcer struct {
	opts     Options
	client   kubernetes.Interface
	services corelisters.ServiceLister
	synced   cache.InformerSynced
	loop     *converge.Loop
	watching component.Background
	repeat   component.Background
	expires  time.Duration // the lifetime of addresses; used by the loop

	mu  sync.Mutex
	due map[netip.Addr]int // how often each address is still to be announced, once a second
}

var _ component.Component = (*Announcer)(nil)

// New returns the component, not yet started.
func New(o Options) *Announcer {
	o.Log = o.Log.With("component", "pool-addresses")
	a := &Announcer{opts: o, expires: lifetime, due: make(map[netip.Addr]int)}
	a.loop = converge.NewLoop(o.Log, recheck, a.sync)
	return a
}

// Name implements component.Component.
func (*Announcer) Name() string { return "pool-addresses" }

// Init implements component.Component.
func (*Announcer) Init(context.Context) error { return nil }

// Start follows the Services in the background.
func (a *Announcer) Start(ctx context.Context) error {
	if len(a.opts.Pool) == 0 {
		// Of a configuration before.
		_, err := setAddresses(a.opts.LinkAlias, nil, 0)
		return err
	}
	var err error
	if a.client, err = kubeconfig.Client(a.opts.Kubeconfig, func(c *rest.Config) { c.ContentType = runtime.ContentTypeProtobuf }); err != nil {
		return err
	}
	factory := informers.NewSharedInformerFactoryWithOptions(a.client, 0, informers.WithTransform(trimmed))
	services := factory.Core().V1().Services()
	a.services, a.synced = services.Lister(), services.Informer().HasSynced
	kick := func(objects ...any) {
		if slices.ContainsFunc(objects, announced) {
			a.loop.Kick()
		}
	}
	if _, err := services.Informer().AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc: func(obj any) { kick(obj) }, UpdateFunc: func(before, obj any) { kick(before, obj) }, DeleteFunc: func(obj any) { kick(obj) },
	}); err != nil {
		return fmt.Errorf("watch services: %w", err)
	}
	a.watching.Go(ctx, func(ctx context.Context) {
		factory.StartWithContext(ctx)
		<-ctx.Done()
		factory.Shutdown()
	})
	a.loop.Start(ctx)
	a.repeat.Go(ctx, a.announceAgain)
	return nil
}

// announced reports whether what was watched is a Service with an address of the pool, or may be one.
func announced(obj any) bool {
	svc, ok := obj.(*corev1.Service)
	return !ok || svc.Annotations[Annotation] != ""
}

// Ready returns nil if the interface has what the Services say.
func (a *Announcer) Ready(context.Context) error {
	if len(a.opts.Pool) == 0 {
		return nil
	}
	return a.loop.Ready()
}

// Stop ends the announcements. The addresses stay, as the pods behind them do; see lifetime.
func (a *Announcer) Stop(ctx context.Context) error {
	return errors.Join(a.repeat.Stop(ctx), a.loop.Stop(ctx), a.watching.Stop(ctx))
}

func (a *Announcer) sync(ctx context.Context) error {
	if !cache.WaitForCacheSync(ctx.Done(), a.synced) {
		return fmt.Errorf("list services: %w", ctx.Err())
	}
	list, err := a.services.List(labels.Everything())
	if err != nil {
		return fmt.Errorf("list services: %w", err)
	}
	want := assigned(list, a.opts.Node, a.opts.Pool)
	elsewhere, err := OtherAddresses()
	if err != nil {
		return err
	}
	var conflicts []error
	want = slices.DeleteFunc(want, func(addr netip.Addr) bool {
		if link := elsewhere[addr]; link != "" {
			conflicts = append(conflicts, fmt.Errorf("address %s of --loadbalancer-pool is this machine's own, on interface %s: remove it there, or leave it out of the pool", addr, link))
		}
		return elsewhere[addr] != ""
	})
	added, err := setAddresses(a.opts.LinkAlias, want, a.lifetime(ctx))
	if err != nil {
		return err
	}
	a.mu.Lock()
	clear(a.due)
	for _, addr := range want {
		a.due[addr] = 1
		if slices.Contains(added, addr) {
			a.opts.Log.Info("this node announces an address of the pool", "address", addr)
			a.due[addr] = burst
		}
	}
	a.mu.Unlock()
	a.announce()
	return errors.Join(conflicts...)
}

// lifetime returns how long the kernel keeps the addresses without this process: forever (0) where no other node could have them.
func (a *Announcer) lifetime(ctx context.Context) time.Duration {
	ctx, cancel := context.WithTimeout(ctx, recheck/2)
	defer cancel()
	list, err := a.client.CoreV1().Nodes().List(ctx, metav1.ListOptions{Limit: 2})
	if err != nil {
		return a.expires // as before: the API server may be the one that is stopping
	}
	if a.expires = lifetime; len(list.Items) < 2 {
		a.expires = 0
	}
	return a.expires
}

// announceAgain announces what is due, once a second.
func (a *Announcer) announceAgain(ctx context.Context) {
	ticker := time.NewTicker(time.Second)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
			a.announce()
		}
	}
}

func (a *Announcer) announce() {
	a.mu.Lock()
	defer a.mu.Unlock()
	for addr, times := range a.due {
		if err := gratuitousARP(addr); err != nil {
			a.opts.Log.Warn("cannot announce an address: neighbours that know its last node learn of this one later", "address", addr, "err", err)
		}
		if a.due[addr] = times - 1; times <= 1 {
			delete(a.due, addr)
		}
	}
}

// assigned returns the addresses of the pool that a node announces, sorted.
func assigned(services []*corev1.Service, node string, pool []config.AddressRange) []netip.Addr {
	var out []netip.Addr
	for _, svc := range services {
		if !Serves(svc) || svc.Annotations[Annotation] != node {
			continue
		}
		for _, in := range svc.Status.LoadBalancer.Ingress {
			a, err := netip.ParseAddr(in.IP)
			inPool := err == nil && slices.ContainsFunc(pool, func(r config.AddressRange) bool { return r.Contains(a) })
			if inPool && !slices.Contains(out, a) {
				out = append(out, a)
			}
		}
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return out
}

// trimmed keeps the cache small: of a Service only what is used stays.
func trimmed(obj any) (any, error) {
	svc, ok := obj.(*corev1.Service)
	if !ok {
		return obj, nil
	}
	kept := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: svc.Name, Namespace: svc.Namespace, UID: svc.UID, ResourceVersion: svc.ResourceVersion},
		Spec:       corev1.ServiceSpec{Type: svc.Spec.Type, LoadBalancerClass: svc.Spec.LoadBalancerClass},
	}
	if Serves(svc) {
		kept.Status.LoadBalancer = svc.Status.LoadBalancer
		if by, ok := svc.Annotations[Annotation]; ok {
			kept.Annotations = map[string]string{Annotation: by}
		}
	}
	return kept, nil
}
