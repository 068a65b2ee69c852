// Package loadbalancer gives Services of type LoadBalancer addresses: those of the nodes that are Ready, first come first served for
// each port and protocol, or one of a pool for each service.
//
// It owns status.loadBalancer of these services, the events with the reason why one of them is pending, and, with a pool, the choice of
// the node that announces each address, which pkg/node/announce does there. kube-proxy does the rest. Unlike K3s's ServiceLB, whose rules it
// follows otherwise, it needs no pods. pkg/server adds it to the server that leads.
package loadbalancer

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/resourceversion"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"
	corelisters "k8s.io/client-go/listers/core/v1"
	discoverylisters "k8s.io/client-go/listers/discovery/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"
	"k8s.io/client-go/util/workqueue"

	"polymesh.dev/polymesh/pkg/component"
	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/controlplane/nodeaddress"
	"polymesh.dev/polymesh/pkg/kubeconfig"
	"polymesh.dev/polymesh/pkg/layout"
	"polymesh.dev/polymesh/pkg/node/announce"
	"polymesh.dev/polymesh/pkg/ssa"
)

// Options of the load balancer.
type Options struct {
	// Kubeconfig may read services, their endpoints and nodes, patch services' status and write events. It is read by Start.
	Kubeconfig string
	// NodeName is the server's node.
	NodeName string
	// Addresses of the server's node by its settings, which services get until it has registered: the external one, if there is one, before the
	// internal one.
	Addresses []netip.Addr
	// Internal are the networks of the pods and of the services, in which no node has its address.
	Internal []netip.Prefix
	// Reserved ports are never given to a service, unless there is a pool: see ReservedPorts.
	Reserved map[Port]string
	Pool     []config.AddressRange
	Log      *slog.Logger
}

// ReservedPorts returns the ports that a node uses itself, and for what: SSH, the API server, and the default ports of the
// node's other components. They are reserved even if nothing listens on them at the moment.
func ReservedPorts(apiPort int) map[Port]string {
	tcp := func(n int) Port { return Port{corev1.ProtocolTCP, int32(n)} }
	ports := map[Port]string{tcp(22): "SSH"}
	for _, p := range layout.Ports() {
		port := tcp(p.Number)
		if p.UDP {
			port.Protocol = corev1.ProtocolUDP
		}
		ports[port] = p.Component
	}
	ports[tcp(apiPort)] = "kube-apiserver"
	return ports
}

const (
	// recheck is how often ports that processes have freed, and addresses that other programs have removed, are checked: there
	// are no events for these.
	recheck    = 30 * time.Second
	retryFirst = 50 * time.Millisecond
	retryMax   = 10 * time.Second
	// Decisions depend on all services, so there is one thing to do.
	queueKey = "services"
)

var _ component.Component = (*LoadBalancer)(nil)

// LoadBalancer is the component.
type LoadBalancer struct {
	component.Background // when it ends, services keep their addresses, as their pods keep running

	opts      Options
	clientset kubernetes.Interface
	services  corelisters.ServiceLister
	nodes     corelisters.NodeLister
	slices    discoverylisters.EndpointSliceLister
	recorder  record.EventRecorder
	queue     workqueue.TypedRateLimitingInterface[string]

	// Used only by the worker.
	view     nodeView
	written  map[types.UID]*corev1.Service // what was written and may not be in the cache yet
	reported map[types.UID]string          // the last reason given to a pending service

	mu    sync.Mutex
	state error
}

// New returns the load balancer of a node.
func New(opts Options) *LoadBalancer {
	return &LoadBalancer{
		opts:     opts,
		view:     nodeView{own: node{opts.NodeName, opts.Addresses}, internal: opts.Internal, lastReady: make(map[types.UID]time.Time)},
		written:  make(map[types.UID]*corev1.Service),
		reported: make(map[types.UID]string),
		state:    errors.New("services are being read"),
	}
}

// Name returns the name that --disable accepts.
func (*LoadBalancer) Name() string { return string(config.ServiceLB) }

// Init does nothing.
func (*LoadBalancer) Init(context.Context) error { return nil }

// Start watches services, endpoints and nodes in the background.
func (l *LoadBalancer) Start(ctx context.Context) error {
	var err error
	if l.clientset, err = kubeconfig.Client(l.opts.Kubeconfig, nil); err != nil {
		return err
	}
	factory := informers.NewSharedInformerFactoryWithOptions(l.clientset, 0, informers.WithTransform(trimmed))
	l.services, l.nodes, l.slices = factory.Core().V1().Services().Lister(), factory.Core().V1().Nodes().Lister(), factory.Discovery().V1().EndpointSlices().Lister()
	l.queue = workqueue.NewTypedRateLimitingQueue(workqueue.NewTypedItemExponentialFailureRateLimiter[string](retryFirst, retryMax))
	var synced []cache.InformerSynced
	for _, watch := range []struct {
		informer cache.SharedIndexInformer
		changed  func(any)
	}{
		{factory.Core().V1().Services().Informer(), func(any) { l.queue.Add(queueKey) }},
		{factory.Core().V1().Nodes().Informer(), func(any) { l.queue.Add(queueKey) }},
		{factory.Discovery().V1().EndpointSlices().Informer(), l.endpointsChanged},
	} {
		if _, err := watch.informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
			AddFunc: watch.changed, UpdateFunc: func(_, obj any) { watch.changed(obj) }, DeleteFunc: watch.changed,
		}); err != nil {
			return fmt.Errorf("watch services, nodes and endpoints: %w", err)
		}
		synced = append(synced, watch.informer.HasSynced)
	}

	l.Go(ctx, func(ctx context.Context) {
		events := record.NewBroadcaster(record.WithContext(ctx))
		events.StartRecordingToSink(&typedcorev1.EventSinkImpl{Interface: l.clientset.CoreV1().Events("")})
		l.recorder = events.NewRecorder(scheme.Scheme, corev1.EventSource{Component: l.Name(), Host: l.opts.NodeName})
		factory.StartWithContext(ctx)
		defer factory.Shutdown()
		defer events.Shutdown()
		defer context.AfterFunc(ctx, l.queue.ShutDown)()
		if cache.WaitForCacheSync(ctx.Done(), synced...) {
			l.queue.Add(queueKey)
			l.work(ctx)
		}
	})
	return nil
}

// endpointsChanged is called for each change of endpoints. Only those of services with externalTrafficPolicy Local matter.
func (l *LoadBalancer) endpointsChanged(obj any) {
	if gone, ok := obj.(cache.DeletedFinalStateUnknown); ok {
		obj = gone.Obj
	}
	slice, ok := obj.(*discoveryv1.EndpointSlice)
	if !ok {
		return
	}
	svc, err := l.services.Services(slice.Namespace).Get(slice.Labels[discoveryv1.LabelServiceName])
	if err == nil && announce.Serves(svc) && isLocal(svc) {
		l.queue.Add(queueKey)
	}
}

func (l *LoadBalancer) work(ctx context.Context) {
	for {
		key, shutdown := l.queue.Get()
		if shutdown {
			return
		}
		err := l.sync(ctx)
		if err != nil {
			l.opts.Log.Debug("services not up to date", "component", l.Name(), "err", err)
			l.queue.AddRateLimited(key)
		} else {
			l.queue.Forget(key)
			l.queue.AddAfter(key, recheck)
		}
		l.queue.Done(key)
		// A conflict only means that a service has changed in the meantime.
		if !apierrors.IsConflict(err) {
			l.mu.Lock()
			l.state = err
			l.mu.Unlock()
		}
	}
}

// Ready returns nil if the status of every service is up to date, including pending ones.
func (l *LoadBalancer) Ready(context.Context) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.state
}

// sync writes what allocate decides to every service.
func (l *LoadBalancer) sync(ctx context.Context) error {
	current, err := l.current()
	if err != nil {
		return fmt.Errorf("list services: %w", err)
	}
	requests := make([]service, len(current))
	for i, svc := range current {
		requests[i] = requestOf(svc)
		if requests[i].local {
			if requests[i].endpoints, err = endpointNodes(l.slices, svc); err != nil {
				return fmt.Errorf("list the endpoints of service %s/%s: %w", svc.Namespace, svc.Name, err)
			}
		}
	}
	net, err := l.network(requests)
	if err != nil {
		return err
	}
	decisions := allocate(requests, net)

	// Remove before adding, so that the statuses of two services never have the same address and port. What stays is never removed:
	// kube-proxy would interrupt its traffic.
	pool := len(net.pool) > 0
	for i, svc := range current {
		have, want := svc.Status.LoadBalancer.Ingress, ingress(decisions[svc.UID], requests[i].ports, pool)
		if keep := inBoth(have, want); len(keep) < len(have) {
			if current[i], err = l.write(ctx, svc, keep, decisions[svc.UID].announcer); err != nil {
				return err
			}
		}
	}
	for i, svc := range current {
		d := decisions[svc.UID]
		want := ingress(d, requests[i].ports, pool)
		if !equality.Semantic.DeepEqual(svc.Status.LoadBalancer.Ingress, want) || svc.Annotations[announce.Annotation] != d.announcer {
			if svc, err = l.write(ctx, svc, want, d.announcer); err != nil {
				return err
			}
		}
		if d.announcer != "" && d.announcer != requests[i].announcer {
			l.recorder.Eventf(svc, corev1.EventTypeNormal, "NodeAssigned", "node %s announces %v", d.announcer, d.addresses)
		}
		l.record(svc, d)
	}
	return nil
}

// network reads which nodes there are, and the machine's addresses and sockets. Sockets are read only when a service requests what it does not hold.
func (l *LoadBalancer) network(requests []service) (network, error) {
	net := network{reserved: l.opts.Reserved, pool: l.opts.Pool}
	all, err := l.nodes.List(labels.Everything())
	if err != nil {
		return net, fmt.Errorf("list nodes: %w", err)
	}
	now := time.Now()
	nodes, next := l.view.publish(all, now)
	if len(net.pool) > 0 {
		net.announcers, next = l.view.announcers(all, now)
		net.claimed = l.claimed(all)
		net.used, err = announce.OtherAddresses()
	} else {
		net.nodes = nodes
	}
	if next > 0 {
		l.queue.AddAfter(queueKey, next)
	}
	if err != nil || len(net.pool) > 0 {
		return net, err
	}
	if !slices.ContainsFunc(requests, func(s service) bool { return s.countHeld() < len(s.ports) }) {
		return net, nil
	}
	if net.nodePorts, err = nodePorts(l.services); err != nil {
		return net, fmt.Errorf("list node ports: %w", err)
	}
	net.listening, err = listening(procNet, l.opts.Addresses)
	return net, err
}

// claimed returns the addresses that nodes report as theirs, one of each kind, with the node's name.
func (l *LoadBalancer) claimed(nodes []*corev1.Node) map[netip.Addr]string {
	out := make(map[netip.Addr]string)
	for _, n := range nodes {
		for _, kind := range []corev1.NodeAddressType{corev1.NodeInternalIP, corev1.NodeExternalIP} {
			if of := nodeaddress.Of(n, kind, l.opts.Internal); len(of) > 0 {
				out[of[0]] = n.Name
			}
		}
	}
	return out
}

// current returns the services that are ours, as they were last seen or written, whichever is newer.
func (l *LoadBalancer) current() ([]*corev1.Service, error) {
	all, err := l.services.List(labels.Everything())
	if err != nil {
		return nil, err
	}
	var ours []*corev1.Service
	seen := make(map[types.UID]bool)
	for _, svc := range all {
		if w := l.written[svc.UID]; w != nil {
			if order, err := resourceversion.CompareResourceVersion(svc.ResourceVersion, w.ResourceVersion); err == nil && order < 0 {
				svc = w
			} else {
				delete(l.written, svc.UID)
			}
		}
		if announce.Serves(svc) {
			ours = append(ours, svc)
			seen[svc.UID] = true
		}
	}
	for uid := range l.reported {
		if !seen[uid] {
			delete(l.reported, uid)
		}
	}
	for uid := range l.written {
		if !seen[uid] {
			delete(l.written, uid)
		}
	}
	return ours, nil
}

// write sets a service's status and the node that announces its address, unless the service has changed since it was read.
func (l *LoadBalancer) write(ctx context.Context, svc *corev1.Service, in []corev1.LoadBalancerIngress, announcer string) (*corev1.Service, error) {
	metadata := map[string]any{"uid": svc.UID, "resourceVersion": svc.ResourceVersion}
	if announcer != "" {
		metadata["annotations"] = map[string]any{announce.Annotation: announcer}
	} else if svc.Annotations[announce.Annotation] != "" {
		metadata["annotations"] = map[string]any{announce.Annotation: nil}
	}
	patch, err := json.Marshal(map[string]any{
		"metadata": metadata,
		"status":   map[string]any{"loadBalancer": map[string]any{"ingress": in}},
	})
	if err != nil {
		return svc, err
	}
	got, err := l.clientset.CoreV1().Services(svc.Namespace).Patch(ctx, svc.Name, types.MergePatchType, patch, metav1.PatchOptions{FieldManager: ssa.ServiceLB}, "status")
	if apierrors.IsNotFound(err) {
		return svc, nil // deleted; the watch will report it
	}
	if err != nil {
		return svc, fmt.Errorf("write the status of service %s/%s: %w", svc.Namespace, svc.Name, err)
	}
	l.written[svc.UID] = got
	return got, nil
}

// record emits an event about a decision, once for each change.
func (l *LoadBalancer) record(svc *corev1.Service, d decision) {
	before, pending := l.reported[svc.UID]
	switch {
	case d.message == "" && pending:
		l.recorder.Eventf(svc, corev1.EventTypeNormal, "AddressAssigned", "no longer pending: %v", d.addresses)
		delete(l.reported, svc.UID)
	case d.message != "" && d.message != before:
		l.recorder.Event(svc, corev1.EventTypeWarning, d.reason, d.message)
		l.reported[svc.UID] = d.message
	}
}
