// Package network is a node's pod network: the component "pod-network". It connects the node's pods to each other by the CNI plugin bridge, to the
// pods of other nodes by VXLAN or routes (backend), and to the rest of the world under the node's address.
//
// It owns the CNI configuration, the interfaces cni0 and flannel.1, routes with its protocol number, the packet filter table `ip polymesh`, and the
// flannel annotations of the node's own object. A keeper puts back what other programs change. pkg/server builds the component from
// plain values, as a worker can; the only identity that it needs is the node's own. docs/understand/network.md is the design.
package network

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	"github.com/vishvananda/netlink"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"

	"polymesh.dev/polymesh/pkg/component"
	"polymesh.dev/polymesh/pkg/condition"
	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/datadir"
	"polymesh.dev/polymesh/pkg/kubeconfig"
	"polymesh.dev/polymesh/pkg/layout"
	"polymesh.dev/polymesh/pkg/node/keeper"
	"polymesh.dev/polymesh/pkg/preflight"
)

// Options of the pod network.
type Options struct {
	Settings config.Node
	// Name and IP are the node's in the cluster, configured or detected.
	Name string
	IP   netip.Addr

	// Cluster-wide settings: the pods' address range, how packets reach other nodes, the UDP port of VXLAN, and whether nodes with an external
	// address are reached by that.
	ClusterCIDR netip.Prefix
	Backend     config.FlannelBackend
	Port        int
	External    bool

	// Kubeconfig is that of the node itself (system:node:NAME). It may list and watch nodes, and patch the status of its own. Start reads it.
	Kubeconfig string
	// Plugins is the folder of the CNI plugins.
	Plugins string
	// Marker and Lock are the data dir's; interfaces carry their mark.
	Marker *datadir.Marker
	Lock   *datadir.Lock
	Log    *slog.Logger
}

// public returns the address by which other nodes reach this one.
func (o Options) public(b base) netip.Addr {
	if o.External && o.Settings.ExternalIP.IsValid() {
		return o.Settings.ExternalIP
	}
	return b.address
}

// Network is the component.
type Network struct {
	opts   Options
	cancel context.CancelFunc
	client kubernetes.Interface
	// nodes is the cache of all nodes, with what trim leaves; synced reports whether it has all.
	nodes  cache.Store
	synced func() bool
	// obstacles describes other programs' rules that drop pods' packets, unusable the nodes whose announcement cannot be used; nil before
	// they were looked for.
	obstacles, unusable atomic.Pointer[[]string]
	since               time.Time
	log                 *slog.Logger
	keeper              *keeper.Keeper
	overlay             *overlay
	// addresses returns the machine's addresses.
	addresses func() ([]net.Addr, error)
}

// New returns the component, not yet started.
func New(o Options) *Network {
	log := o.Log.With("component", "pod-network")
	return &Network{opts: o, log: log, keeper: keeper.New(log), nodes: cache.NewStore(cache.MetaNamespaceKeyFunc), addresses: net.InterfaceAddrs}
}

// Name implements component.Component.
func (n *Network) Name() string { return "pod-network" }

// Init notes when the node begins: the kubelet may start, and report, before this component does, and then for minutes not again. Start
// changes the machine's settings.
func (n *Network) Init(context.Context) error {
	// Without fractions of a second, like times in the API.
	n.since = time.Now().Truncate(time.Second)
	return nil
}

// own reports whether this component provides the pod network, not another program.
func (n *Network) own() bool { return n.opts.Backend != config.NoBackend }

// Start watches the nodes.
func (n *Network) Start(ctx context.Context) error {
	if err := forwarding().Restore(ctx); err != nil {
		return err
	}
	var err error
	if n.client, err = kubeconfig.Client(n.opts.Kubeconfig, func(c *rest.Config) { c.ContentType = runtime.ContentTypeProtobuf }); err != nil {
		return err
	}
	if err := n.addParts(); err != nil {
		return err
	}
	ctx, n.cancel = component.Running(ctx)
	n.watchNodes(ctx)
	go n.keeper.Run(ctx)
	go n.watchObstacles(ctx)
	if n.own() {
		go events{kick: n.keeper.Kick, log: n.log}.run(ctx)
		go n.watchBridge(ctx)
	}
	return nil
}

// addParts adds what the keeper keeps, in the order in which a pod needs it: the first one may start as soon as the configuration exists.
func (n *Network) addParts() error {
	network, dir := n.opts.Settings.DataDir.PodNetwork(), n.opts.Settings.DataDir
	n.keeper.Add(forwarding())
	if !n.own() {
		n.keeper.Add(&configuration{dir: dir.CNIConfDir(), none: true})
		return nil
	}
	n.overlay = &overlay{
		backend: n.opts.Backend, port: n.opts.Port, cluster: n.opts.ClusterCIDR, alias: n.opts.Marker.Alias(),
		mac: hardwareAddr(n.opts.Marker.ID, n.opts.Name), base: n.opts.findBase,
		noOffload: !preflight.KernelAtLeast(5, 7) || n.opts.External && n.opts.Settings.ExternalIP.IsValid(),
	}
	if n.opts.Backend == config.WireGuard {
		key, err := wireGuardKey(dir.Agent("wireguard.key"))
		if err != nil {
			return fmt.Errorf("the key of the pod network: %w", err)
		}
		n.overlay.wg = &wireGuard{key: key, endpoints: map[wgtypes.Key]netip.AddrPort{}, log: n.log}
	}
	masq, err := newMasquerade(network, n.opts.ClusterCIDR, n.podCIDR)
	if err != nil {
		return err
	}
	local, err := newLoopback(network)
	if err != nil {
		return err
	}
	pods := newAttachments(network, n.opts.Plugins, "")
	n.keeper.Add(local, masq, &nodeRoutes{n}, &configuration{dir: dir.CNIConfDir(), text: n.conflist}, &announcement{n},
		&bridge{attachments: pods, pods: n.podCIDR, alias: n.opts.Marker.Alias(), mtu: n.mtu}, &hostPorts{attachments: pods})
	return nil
}

// watchNodes keeps the cache of nodes, or of this node only if other nodes do not matter.
func (n *Network) watchNodes(ctx context.Context) {
	which := fields.Everything()
	if !n.own() {
		which = fields.OneTermEqualSelector("metadata.name", n.opts.Name)
	}
	// The store outlives the informer's: Ready may be called at any time.
	changed := func(update func(any) error) func(any) {
		return func(o any) {
			if last, ok := o.(cache.DeletedFinalStateUnknown); ok {
				o = last.Obj
			}
			if err := update(o); err != nil {
				n.log.Error("note a node", "err", err)
			}
			n.keeper.Kick()
		}
	}
	_, informer := cache.NewInformerWithOptions(cache.InformerOptions{
		ListerWatcher: cache.NewListWatchFromClient(n.client.CoreV1().RESTClient(), "nodes", metav1.NamespaceAll, which),
		ObjectType:    &corev1.Node{},
		Transform:     n.trim,
		Handler: cache.ResourceEventHandlerFuncs{
			AddFunc: changed(n.nodes.Add), UpdateFunc: func(_, o any) { changed(n.nodes.Update)(o) }, DeleteFunc: changed(n.nodes.Delete),
		},
	})
	n.synced = informer.HasSynced
	go informer.RunWithContext(ctx)
	go func() {
		if cache.WaitForCacheSync(ctx.Done(), informer.HasSynced) {
			n.keeper.Kick()
		}
	}()
}

// trim leaves of a node what is needed here: nodes are large, and there may be many.
func (n *Network) trim(o any) (any, error) {
	node, ok := o.(*corev1.Node)
	if !ok {
		return o, nil
	}
	out := &corev1.Node{ObjectMeta: metav1.ObjectMeta{
		Name: node.Name, UID: node.UID, ResourceVersion: node.ResourceVersion, CreationTimestamp: node.CreationTimestamp, Annotations: map[string]string{},
	}}
	for _, key := range []string{backendType, backendData, publicIP, kubeSubnetManager} {
		if value, ok := node.Annotations[key]; ok {
			out.Annotations[key] = value
		}
	}
	out.Spec.PodCIDR = node.Spec.PodCIDR
	if node.Name == n.opts.Name {
		out.Status.Conditions = node.Status.Conditions
	}
	return out, nil
}

// node returns this node's object; nil until it is registered.
func (n *Network) node() *corev1.Node {
	o, ok, err := n.nodes.GetByKey(n.opts.Name)
	if err != nil || !ok {
		return nil
	}
	return o.(*corev1.Node)
}

// podCIDR returns this node's pod address range; empty until it is known.
func (n *Network) podCIDR() string {
	if node := n.node(); node != nil {
		return node.Spec.PodCIDR
	}
	return ""
}

// mtu returns that of the pods' interfaces, in bytes; 0 until it is known.
func (n *Network) mtu() int {
	b, err := n.opts.findBase()
	if err != nil {
		return 0
	}
	return n.overlay.mtu(b)
}

// conflist returns the CNI configuration; nil until the pod address range is known.
func (n *Network) conflist() ([]byte, error) {
	pods := n.podCIDR()
	if pods == "" {
		return nil, nil
	}
	b, err := n.opts.findBase()
	if err != nil {
		return nil, err
	}
	return Conflist(n.opts.Settings.DataDir.PodNetwork(), pods, n.opts.Settings.DataDir.Run("cni"), n.overlay.mtu(b), preflight.NFTables())
}

// view returns what this node is to others.
func (n *Network) view(b base, pods netip.Prefix) view {
	v := view{node: n.opts.Name, cluster: n.opts.ClusterCIDR, backend: n.opts.Backend, pods: pods, address: n.opts.public(b), port: uint16(n.opts.Port)}
	switch n.opts.Backend {
	case config.VXLAN:
		v.mac = n.overlay.mac
	case config.WireGuard:
		v.key = n.overlay.wg.key.PublicKey()
	}
	return v
}

// nodeRoutes is the part that passes the nodes to the overlay.
type nodeRoutes struct{ n *Network }

// Settle implements keeper.Changing.
func (r *nodeRoutes) Settle(ctx context.Context) error {
	n := r.n
	// Before all nodes are known, routes that are in use would look left over.
	pods, err := netip.ParsePrefix(n.podCIDR())
	if err != nil || !n.synced() {
		return nil
	}
	b, err := n.opts.findBase()
	if err != nil {
		return err
	}
	v := n.view(b, pods)
	var nodes []*corev1.Node
	for _, o := range n.nodes.List() {
		nodes = append(nodes, o.(*corev1.Node))
	}
	peers, notes := v.peers(nodes)
	for _, text := range replaced(&n.unusable, notes) {
		n.log.Warn("a node's announcement cannot be used", "what", text)
	}
	if now, before := n.overlay.set(pods, peers); len(now)+len(before) > 0 {
		n.log.Info("the routes to other nodes' pods have changed", "now", describe(now), "before", describe(before), "nodes", len(peers))
	}
	return n.overlay.Settle(ctx)
}

// Missing implements keeper.Part.
func (r *nodeRoutes) Missing(ctx context.Context) (string, error) { return r.n.overlay.Missing(ctx) }

// Restore implements keeper.Part.
func (r *nodeRoutes) Restore(ctx context.Context) error { return r.n.overlay.Restore(ctx) }

// announcement is the part that writes the annotations of the node's own object, by which other nodes reach its pods.
type announcement struct{ n *Network }

// Settle implements keeper.Changing.
func (a *announcement) Settle(ctx context.Context) error {
	n := a.n
	node := n.node()
	if node == nil || node.Spec.PodCIDR == "" {
		return nil
	}
	b, err := n.opts.findBase()
	if err != nil {
		return err
	}
	want, err := n.view(b, netip.Prefix{}).announce()
	if err != nil {
		return err
	}
	if maps.Equal(want, node.Annotations) {
		return nil
	}
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"annotations": want, "uid": node.UID}})
	if err != nil {
		return err
	}
	// The kubelet's identity may patch the status of its node, and metadata with it, as flannel does.
	_, err = n.client.CoreV1().Nodes().Patch(ctx, n.opts.Name, types.StrategicMergePatchType, patch, metav1.PatchOptions{}, "status")
	if err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("announce this node's pods to other nodes: %w", err)
	}
	return nil
}

// Missing implements keeper.Part: Settle finds it.
func (a *announcement) Missing(context.Context) (string, error) { return "", nil }

// Restore implements keeper.Part.
func (a *announcement) Restore(context.Context) error { return nil }

// bridgePoll is how often to look for the bridge, which the CNI plugin creates for the first pod.
const bridgePoll = 5 * time.Second

// MarkBridge sets the data dir's alias on the bridge, by which `polymesh reset` identifies it, if it was created after this server
// saw that there was none. A bridge that existed before may be another Kubernetes'; adopt means that it is ours anyway. It precedes the first pod.
func MarkBridge(lock *datadir.Lock, marker *datadir.Marker, adopt bool) error {
	expected := lock.BridgeExpected()
	link, err := netlink.LinkByName(layout.Bridge)
	switch {
	case errors.As(err, new(netlink.LinkNotFoundError)):
		if !expected {
			return lock.ExpectBridge(true)
		}
	case err != nil:
		return fmt.Errorf("look for network interface %s: %w", layout.Bridge, err)
	case link.Attrs().Alias == "" && (expected || adopt):
		if err := netlink.LinkSetAlias(link, marker.Alias()); err != nil {
			return fmt.Errorf("mark network interface %s: %w", layout.Bridge, err)
		}
		return lock.ExpectBridge(false)
	}
	return nil
}

func (n *Network) watchBridge(ctx context.Context) {
	component.Rounds(ctx, nil, bridgePoll, func(context.Context) {
		if err := MarkBridge(n.opts.Lock, n.opts.Marker, false); err != nil {
			n.log.Warn("the pods' bridge is not marked", "err", err)
		}
	})
}

// Ready returns nil if the node is Ready, has its address, and no part of its network is missing. If another program provides the pod network,
// the node may wait for that: a service manager must not.
func (n *Network) Ready(ctx context.Context) error {
	if err := n.nodeReady(); err != nil && (n.own() || n.node() == nil) {
		return err
	}
	if err := n.hasAddress(); err != nil {
		return err
	}
	return n.keeper.Check(ctx)
}

func (n *Network) nodeReady() error {
	node := n.node()
	if node == nil {
		return errors.New("the node has not registered yet")
	}
	switch c := condition.NodeReady(node); {
	case c == nil:
		return fmt.Errorf("node %s has not reported yet", node.Name)
	case c.LastHeartbeatTime.Time.Before(n.since):
		return fmt.Errorf("node %s has not reported since the start", node.Name)
	case c.Status != corev1.ConditionTrue:
		return fmt.Errorf("node %s is not Ready: %s", node.Name, c.Message)
	}
	return nil
}

// hasAddress returns an error if the machine has lost the address that the cluster uses. Certificates, endpoints and the
// load balancer use it too, and all are updated at startup.
func (n *Network) hasAddress() error {
	addrs, err := n.addresses()
	if err != nil {
		return fmt.Errorf("list the machine's addresses: %w", err)
	}
	for _, a := range addrs {
		if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr().Unmap() == n.opts.IP {
			return nil
		}
	}
	if n.opts.Settings.NodeIP.IsValid() {
		return fmt.Errorf("the node's address %s, set by --node-ip, is on no interface any more: restore it, or restart the server with another --node-ip", n.opts.IP)
	}
	return fmt.Errorf("the node's address %s is on no interface any more: restart the server, so that it uses the machine's new one", n.opts.IP)
}

// watchObstacles checks from time to time for other programs' rules that drop the pods' packets. The server must not
// change them.
func (n *Network) watchObstacles(ctx context.Context) {
	for {
		if pods := n.podCIDR(); pods != "" {
			rules, err := obstacles(ctx, pods)
			if err != nil && ctx.Err() == nil {
				n.log.Debug("check other programs' rules", "err", err)
			} else {
				for _, text := range replaced(&n.obstacles, rules) {
					n.log.Warn("another program's rules drop pods' packets", "what", text)
				}
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(30 * time.Second):
		}
	}
}

// replaced stores texts and returns those that are new.
func replaced(p *atomic.Pointer[[]string], texts []string) []string {
	old := p.Swap(&texts)
	if old == nil {
		return texts
	}
	return slices.DeleteFunc(slices.Clone(texts), func(text string) bool { return slices.Contains(*old, text) })
}

// Notes reports what was restored, and what an administrator has to do.
func (n *Network) Notes(context.Context) []string {
	var notes []string
	for _, texts := range []*[]string{n.obstacles.Load(), n.unusable.Load()} {
		if texts != nil {
			notes = append(notes, *texts...)
		}
	}
	if err := n.nodeReady(); err != nil && !n.own() {
		notes = append(notes, fmt.Sprintf("%v: with --flannel-backend %s install a pod network", err, config.NoBackend))
	}
	if n.overlay != nil && n.overlay.inProcess() {
		notes = append(notes, "the kernel has no WireGuard (CONFIG_WIREGUARD), so the server encrypts packets between nodes itself: this is slower, takes memory, and they wait while the server restarts")
	}
	restored := n.keeper.Last()
	return append(notes, component.Present(&restored)...)
}

// Stop ends the watch. Pods keep their addresses, and the routes to other nodes stay.
func (n *Network) Stop(context.Context) error {
	if n.cancel != nil {
		n.cancel()
	}
	return nil
}
