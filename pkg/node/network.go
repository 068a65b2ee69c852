package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/clientcmd"

	"polymesh.dev/polymesh/pkg/atomicfile"
	"polymesh.dev/polymesh/pkg/component"
	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/controlplane"
	"polymesh.dev/polymesh/pkg/preflight"
)

// Bridge is the interface to which all pods of a node are connected.
const Bridge = "cni0"

// Network is the component "pod-network": it waits for the node's range of pod addresses, writes the CNI configuration
// for it, gives the node its roles, and is ready when the node is.
type Network struct {
	opts   Options
	cancel context.CancelFunc
	client kubernetes.Interface
	node   atomic.Pointer[corev1.Node]
	since  time.Time
	log    *slog.Logger
}

// NewNetwork returns the component, not yet started.
func NewNetwork(o Options) *Network {
	return &Network{opts: o, log: o.Log.With("component", "pod-network")}
}

// Name implements component.Component.
func (n *Network) Name() string { return "pod-network" }

// Init does nothing: the machine's settings are changed by Start.
func (n *Network) Init(context.Context) error { return nil }

// forward lets the machine forward packets, also between pods on one bridge, where the answer must pass the rules that
// translated the request.
func (n *Network) forward() error {
	for path, value := range map[string]string{
		"/proc/sys/net/ipv4/ip_forward":                 "1",
		"/proc/sys/net/bridge/bridge-nf-call-iptables":  "1",
		"/proc/sys/net/bridge/bridge-nf-call-ip6tables": "1",
	} {
		if have, err := os.ReadFile(path); err == nil && strings.TrimSpace(string(have)) == value {
			continue
		}
		if err := os.WriteFile(path, []byte(value), 0o644); err != nil {
			return fmt.Errorf("turn packet forwarding on: %w", err)
		}
	}
	return nil
}

// Start watches the node's own object.
func (n *Network) Start(ctx context.Context) error {
	if err := n.forward(); err != nil {
		return err
	}
	// As the API gives times, without fractions of a second.
	n.since = time.Now().Truncate(time.Second)
	rest, err := clientcmd.BuildConfigFromFlags("", controlplane.Kubeconfig(n.opts.Config, "polymesh"))
	if err != nil {
		return err
	}
	if n.client, err = kubernetes.NewForConfig(rest); err != nil {
		return err
	}
	ctx, n.cancel = component.Running(ctx)
	own := cache.NewListWatchFromClient(n.client.CoreV1().RESTClient(), "nodes", metav1.NamespaceAll,
		fields.OneTermEqualSelector("metadata.name", n.opts.Name))
	_, informer := cache.NewInformerWithOptions(cache.InformerOptions{
		ListerWatcher: own,
		ObjectType:    &corev1.Node{},
		Handler: cache.ResourceEventHandlerFuncs{
			AddFunc:    func(o any) { n.see(ctx, o.(*corev1.Node)) },
			UpdateFunc: func(_, o any) { n.see(ctx, o.(*corev1.Node)) },
		},
		// A step that failed is tried again.
		ResyncPeriod: 30 * time.Second,
	})
	go informer.RunWithContext(ctx)
	return nil
}

func (n *Network) see(ctx context.Context, node *corev1.Node) {
	n.node.Store(node)
	if err := n.label(ctx, node); err != nil && ctx.Err() == nil {
		n.log.Error("label the node", "err", err)
	}
	if node.Spec.PodCIDR == "" {
		return
	}
	text, err := Conflist(NetworkName(n.opts.Config.DataDir), node.Spec.PodCIDR, filepath.Join(n.opts.Config.RunDir(), "cni"), preflight.NFTables())
	if err != nil {
		n.log.Error("render the CNI configuration", "err", err)
		return
	}
	path := filepath.Join(cniConfDir(n.opts.Config), "10-polymesh.conflist")
	if have, err := os.ReadFile(path); err == nil && string(have) == string(text) {
		return
	}
	if err := atomicfile.Write(path, text, 0o644); err != nil {
		n.log.Error("write the CNI configuration", "err", err)
	}
}

// NetworkName is the name of the pod network; libcni's cache of results in /var/lib/cni goes by it.
func NetworkName(dataDir string) string { return filepath.Base(config.RunDir(dataDir)) + "-pods" }

// Conflist renders the CNI configuration: a bridge whose pods get addresses of the range, leave it under the node's
// address, and can publish ports (https://www.cni.dev/plugins/current/main/bridge/).
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
				"bridge":           Bridge,
				"isDefaultGateway": true,
				"forceAddress":     true,
				"hairpinMode":      true,
				"ipMasq":           true,
				"ipMasqBackend":    backend,
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

// label gives the node its roles. The kubelet may not do so itself: NodeRestriction keeps these labels from nodes.
func (n *Network) label(ctx context.Context, node *corev1.Node) error {
	roles := map[string]string{}
	for _, role := range []string{"node-role.kubernetes.io/control-plane", "node-role.kubernetes.io/master"} {
		if _, has := node.Labels[role]; !has {
			roles[role] = "true"
		}
	}
	if len(roles) == 0 {
		return nil
	}
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"labels": roles}})
	if err != nil {
		return err
	}
	_, err = n.client.CoreV1().Nodes().Patch(ctx, node.Name, types.MergePatchType, patch, metav1.PatchOptions{FieldManager: "polymesh"})
	if apierrors.IsNotFound(err) {
		return nil
	}
	return err
}

// Ready is nil when the node is Ready.
func (n *Network) Ready(context.Context) error {
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

// Stop ends the watch. Pods keep their addresses.
func (n *Network) Stop(context.Context) error {
	if n.cancel != nil {
		n.cancel()
	}
	return nil
}
