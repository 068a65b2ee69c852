package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"github.com/vishvananda/netlink"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/clientcmd"

	"polymesh.dev/polymesh/pkg/atomicfile"
	"polymesh.dev/polymesh/pkg/component"
	"polymesh.dev/polymesh/pkg/layout"
	"polymesh.dev/polymesh/pkg/preflight"
)

// Network is the component "pod-network": it waits for the node's pod address range, writes the CNI configuration
// for it, maintains the kernel settings that the pods' traffic needs, and is ready when the node is.
type Network struct {
	opts   Options
	cancel context.CancelFunc
	client kubernetes.Interface
	node   atomic.Pointer[corev1.Node]
	// obstacle describes another program's rule that drops pods' packets; empty or nil if there is none.
	obstacle atomic.Pointer[string]
	since    time.Time
	log      *slog.Logger
	keeper   keeper
	masq     *masquerade
	// addresses returns the machine's addresses.
	addresses func() ([]net.Addr, error)
}

// NewNetwork returns the component, not yet started.
func NewNetwork(o Options) *Network {
	log := o.Log.With("component", "pod-network")
	return &Network{opts: o, log: log, keeper: keeper{log: log}, addresses: net.InterfaceAddrs}
}

// Name implements component.Component.
func (n *Network) Name() string { return "pod-network" }

// Init does nothing: Start changes the machine's settings.
func (n *Network) Init(context.Context) error { return nil }

// bridgePoll is how often to look for the bridge, which the CNI plugin creates for the first pod.
const bridgePoll = 5 * time.Second

// markBridge sets the data dir's alias on the bridge, by which `polymesh reset` identifies it, if it was created after this server
// saw that there was none. A bridge that existed before may be another Kubernetes'; adopt means that it is ours anyway.
func (o Options) markBridge(adopt bool) error {
	expected := o.Lock.BridgeExpected()
	link, err := netlink.LinkByName(layout.Bridge)
	switch {
	case errors.As(err, new(netlink.LinkNotFoundError)):
		if !expected {
			return o.Lock.ExpectBridge(true)
		}
	case err != nil:
		return fmt.Errorf("look for network interface %s: %w", layout.Bridge, err)
	case link.Attrs().Alias == "" && (expected || adopt):
		if err := netlink.LinkSetAlias(link, o.Marker.Alias()); err != nil {
			return fmt.Errorf("mark network interface %s: %w", layout.Bridge, err)
		}
		return o.Lock.ExpectBridge(false)
	}
	return nil
}

func (n *Network) watchBridge(ctx context.Context) {
	ticker := time.NewTicker(bridgePoll)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		if err := n.opts.markBridge(false); err != nil {
			n.log.Warn("the pods' bridge is not marked", "err", err)
		}
	}
}

// Start watches the node's own object.
func (n *Network) Start(ctx context.Context) error {
	if err := forwarding().restore(ctx); err != nil {
		return err
	}
	// Without fractions of a second, like times in the API.
	n.since = time.Now().Truncate(time.Second)
	rest, err := clientcmd.BuildConfigFromFlags("", n.opts.Identity.Kubelet)
	if err != nil {
		return err
	}
	if n.client, err = kubernetes.NewForConfig(rest); err != nil {
		return err
	}
	network := n.opts.Settings.DataDir.PodNetwork()
	if n.masq, err = newMasquerade(network, n.opts.ClusterCIDR, n.podCIDR); err != nil {
		return err
	}
	pods := newAttachments(network, n.opts.Programs.CNIDir(), "")
	n.keeper.parts = []part{forwarding(), n.masq, &bridge{pods, n.podCIDR, n.opts.Marker.Alias()}, &hostPorts{attachments: pods}}
	ctx, n.cancel = component.Running(ctx)
	go n.keeper.run(ctx)
	go n.watchObstacles(ctx)
	own := cache.NewListWatchFromClient(n.client.CoreV1().RESTClient(), "nodes", metav1.NamespaceAll,
		fields.OneTermEqualSelector("metadata.name", n.opts.Name))
	_, informer := cache.NewInformerWithOptions(cache.InformerOptions{
		ListerWatcher: own,
		ObjectType:    &corev1.Node{},
		Handler: cache.ResourceEventHandlerFuncs{
			AddFunc:    func(o any) { n.see(ctx, o.(*corev1.Node)) },
			UpdateFunc: func(_, o any) { n.see(ctx, o.(*corev1.Node)) },
		},
		// A failed step is retried.
		ResyncPeriod: 30 * time.Second,
	})
	go informer.RunWithContext(ctx)
	go n.watchBridge(ctx)
	return nil
}

func (n *Network) see(ctx context.Context, node *corev1.Node) {
	n.node.Store(node)
	if node.Spec.PodCIDR == "" {
		return
	}
	// The first pod may start as soon as the configuration exists.
	if gone, err := n.masq.missing(ctx); err == nil && gone != "" {
		if err := n.masq.restore(ctx); err != nil {
			n.log.Error("masquerade pods' traffic", "err", err)
			return
		}
	}
	text, err := Conflist(n.opts.Settings.DataDir.PodNetwork(), node.Spec.PodCIDR, n.opts.Settings.DataDir.Run("cni"), preflight.NFTables())
	if err != nil {
		n.log.Error("render the CNI configuration", "err", err)
		return
	}
	path := filepath.Join(n.opts.Settings.DataDir.CNIConfDir(), "10-polymesh.conflist")
	if have, err := os.ReadFile(path); err == nil && string(have) == string(text) {
		return
	}
	if err := atomicfile.Write(path, text, 0o644); err != nil {
		n.log.Error("write the CNI configuration", "err", err)
	}
}

// Conflist renders the CNI configuration: a bridge whose pods get addresses of the range and can publish ports
// (https://www.cni.dev/plugins/current/main/bridge/). Their outgoing traffic uses the node's address, see masquerade.
func Conflist(name, podCIDR, stateDir string, nftables bool) ([]byte, error) {
	backend := "nftables"
	if !nftables {
		backend = "iptables"
	}
	conf := map[string]any{
		"cniVersion": "1.0.0",
		"name":       name,
		"plugins": []map[string]any{
			{
				"type":             "bridge",
				"bridge":           layout.Bridge,
				"isDefaultGateway": true,
				"forceAddress":     true,
				"hairpinMode":      true,
				"ipMasq":           false,
				"ipam": map[string]any{
					"type":    "host-local",
					"dataDir": stateDir,
					"ranges":  [][]map[string]string{{{"subnet": podCIDR}}},
				},
			},
			{
				"type":         "portmap",
				"backend":      backend,
				"snat":         true,
				"capabilities": map[string]bool{"portMappings": true},
			},
		},
	}
	text, err := json.MarshalIndent(conf, "", "  ")
	if err != nil {
		return nil, err
	}
	return append(text, '\n'), nil
}

func (n *Network) podCIDR() string {
	if node := n.node.Load(); node != nil {
		return node.Spec.PodCIDR
	}
	return ""
}

// Ready returns nil if the node is Ready, has its address, and no part of its network is missing.
func (n *Network) Ready(ctx context.Context) error {
	if err := n.nodeReady(); err != nil {
		return err
	}
	if err := n.hasAddress(); err != nil {
		return err
	}
	return n.keeper.check(ctx)
}

func (n *Network) nodeReady() error {
	node := n.node.Load()
	if node == nil {
		return errors.New("the node has not registered yet")
	}
	for _, c := range node.Status.Conditions {
		if c.Type == corev1.NodeReady {
			if c.LastHeartbeatTime.Time.Before(n.since) {
				return fmt.Errorf("node %s has not reported since the start", node.Name)
			}
			if c.Status == corev1.ConditionTrue {
				return nil
			}
			return fmt.Errorf("node %s is not Ready: %s", node.Name, c.Message)
		}
	}
	return fmt.Errorf("node %s has not reported yet", node.Name)
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
			text, err := obstacles(ctx, pods)
			if err != nil && ctx.Err() == nil {
				n.log.Debug("check other programs' rules", "err", err)
			} else if replaced(&n.obstacle, text) {
				n.log.Warn("another program's rules drop pods' packets", "what", text)
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(30 * time.Second):
		}
	}
}

// replaced stores a text and reports whether it is new.
func replaced(p *atomic.Pointer[string], text string) bool {
	old := p.Swap(&text)
	return text != "" && (old == nil || *old != text)
}

// Note reports what was restored, and what an administrator has to do.
func (n *Network) Note(context.Context) string {
	var notes []string
	if text := n.obstacle.Load(); text != nil && *text != "" {
		notes = append(notes, *text)
	}
	if last := n.keeper.last(); last != "" {
		notes = append(notes, last)
	}
	return strings.Join(notes, "; ")
}

// Stop ends the watch. Pods keep their addresses.
func (n *Network) Stop(context.Context) error {
	if n.cancel != nil {
		n.cancel()
	}
	return nil
}
