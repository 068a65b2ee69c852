// Package addon keeps the parts of a cluster that are objects in it: CoreDNS, metrics-server and the local-path
// provisioner, which run as ordinary pods, the admission policies that go with them, and the pods by which the cluster reaches the store of
// metrics, logs and traces.
//
// It owns their manifests, applies them to the API server at each start, as K3s does with its packaged components, and again
// within a minute when they are deleted or changed. It removes what an earlier version applied and this one does not, and all of
// it when the add-on is disabled. pkg/server adds one component for each add-on, including disabled ones.
package addon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/distribution/reference"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	corelisters "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/tools/cache"

	"polymesh.dev/polymesh/pkg/component"
	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/converge"
	"polymesh.dev/polymesh/pkg/kubeconfig"
	"polymesh.dev/polymesh/pkg/placement"
)

// Options select the add-on, and describe the cluster.
type Options struct {
	// Name is config.CoreDNS, config.MetricsServer, config.LocalStorage, or ObserveAccess.
	Name config.Addon
	// Disabled makes the component remove the add-on instead.
	Disabled bool
	// Kubeconfig is a file with the permissions of a cluster administrator. It is read by Start.
	Kubeconfig string
	// Image returns the reference of the shipped image with a short name, "coredns"; see payload.Manifest.
	Image func(name string) (string, error)

	ClusterDNS    netip.Addr
	ClusterDomain string
	// Nameservers returns those that pods with dnsPolicy Default currently get on the server's node, none on the loopback; nil for none at all.
	Nameservers func() []string
	// NodeName and NodeAddress are those of the server's node.
	NodeName    string
	NodeAddress netip.Addr
	// External is whether kubelets are reached by the nodes' external addresses, of those that have one.
	External bool
	// Internal are the networks of the pods and of the services, in which no node has its address.
	Internal []netip.Prefix

	// StorageDir is the folder of the volumes of the class local-path, on every node. pkg/node creates it.
	StorageDir string
	// KubeletCA is the file with the CA of the kubelets' serving certificates. It does not exist before the server's first start.
	KubeletCA string
	// Access is what ObserveAccess offers, and Sockets the folder of the store's sockets on NodeName.
	Access  config.ObserveAccess
	Sockets string

	Log *slog.Logger
}

const (
	// Requests to the API server for each 50 ms poll of three add-ons would be most of its work during a start.
	readyInterval = 250 * time.Millisecond
	// nameserverInterval is how often the name servers are compared; that costs nothing.
	nameserverInterval = time.Second
)

var (
	_ component.Component = (*Addon)(nil)
	_ component.Versioned = (*Addon)(nil)
	_ component.Noted     = (*Addon)(nil)
)

// Addon is the component of one add-on.
type Addon struct {
	opts    Options
	objects []*unstructured.Unstructured // set by Init, and by sync under mu
	inputs  inputs                       // what they were rendered from
	pod     *corev1.PodSpec              // of the replicas, set by Init if it is replicated

	dynamic   dynamic.Interface
	clientset kubernetes.Interface

	following component.Background // followNameservers, for CoreDNS
	watching  component.Background // followNodes, if it is replicated; followUsers, if it yields

	nodes       corelisters.NodeLister // nil if it does not depend on the nodes
	nodesSynced cache.InformerSynced
	loop        *converge.Loop
	holding     converge.Applied
	settled     bool // used by the loop: what is applied from now on was deleted or changed

	mu      sync.Mutex
	checked time.Time // when the API server was queried last
	state   error     // what it returned
	notes   []string  // what users have in place of its objects
}

// New returns the component of the add-on that opts names.
func New(opts Options) *Addon {
	a := &Addon{opts: opts}
	a.loop = converge.NewLoop(opts.Log.With("addon", string(opts.Name)), converge.Interval, a.sync)
	return a
}

// Name returns the name that --disable accepts.
func (a *Addon) Name() string { return string(a.opts.Name) }

// Version returns the tag of the add-on's image.
func (a *Addon) Version() string {
	if a.opts.Disabled {
		return ""
	}
	ref, err := a.opts.Image(mainImage(a.opts.Name))
	if err != nil {
		return ""
	}
	named, err := reference.ParseNormalizedNamed(ref)
	if err != nil {
		return ""
	}
	if tagged, ok := named.(reference.Tagged); ok {
		return tagged.Tag()
	}
	return ""
}

// Init renders the manifests, so that a missing value stops the node before anything runs.
func (a *Addon) Init(context.Context) error {
	in, err := a.current()
	if err != nil {
		return err
	}
	if err := a.render(in); err != nil || !a.replicated() {
		return err
	}
	rendered := make(map[id]*unstructured.Unstructured)
	for _, obj := range a.objects {
		rendered[idOf(obj)] = obj
	}
	d, err := a.deployment(rendered)
	if err != nil {
		return err
	}
	a.pod = &d.Spec.Template.Spec
	return nil
}

// current returns what the manifests depend on that can change while the server runs.
func (a *Addon) current() (inputs, error) {
	authority, err := a.opts.kubeletAuthority()
	if err != nil {
		return inputs{}, err
	}
	nodes, err := a.allNodes()
	in := inputs{KubeletAuthority: authority, Spread: a.pod != nil && placement.Several(nodes, a.pod, time.Now())}
	if a.opts.Name == config.CoreDNS {
		in.Resolvers = nameserversOf(a.opts.NodeName, a.nameservers(), nodes)
		in.Hosts = hosts(host{a.opts.NodeAddress, a.opts.NodeName}, a.opts.Internal, nodes)
	}
	return in, err
}

func (a *Addon) render(in inputs) error {
	objects, err := render(a.opts, in)
	if err != nil {
		return fmt.Errorf("render the manifests of %s: %w", a.opts.Name, err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.objects, a.inputs = objects, in
	return nil
}

func (a *Addon) nameservers() []string {
	if a.opts.Nameservers == nil {
		return nil
	}
	return a.opts.Nameservers()
}

// Start applies the manifests in the background, and again when an object was deleted or changed.
func (a *Addon) Start(ctx context.Context) error {
	rest, err := kubeconfig.Config(a.opts.Kubeconfig)
	if err != nil {
		return err
	}
	rest.QPS, rest.Burst = 50, 100
	if a.dynamic, err = dynamic.NewForConfig(rest); err != nil {
		return fmt.Errorf("create an API client from %s: %w", a.opts.Kubeconfig, err)
	}
	if a.clientset, err = kubernetes.NewForConfig(rest); err != nil {
		return fmt.Errorf("create an API client from %s: %w", a.opts.Kubeconfig, err)
	}

	if a.replicated() {
		if err := a.followNodes(ctx); err != nil {
			return err
		}
	}
	if a.yields() && !a.opts.Disabled {
		if err := a.followUsers(ctx); err != nil {
			return err
		}
	}
	a.loop.Start(ctx)
	if a.opts.Nameservers != nil && a.opts.Name == config.CoreDNS && !a.opts.Disabled {
		a.following.Go(ctx, a.followNameservers)
	}
	return nil
}

// followNameservers applies the manifests again when the name servers of the host change.
func (a *Addon) followNameservers(ctx context.Context) {
	last := a.nameservers()
	component.Rounds(ctx, nil, nameserverInterval, func(context.Context) {
		if now := a.nameservers(); !slices.Equal(now, last) {
			last = now
			a.loop.Kick()
		}
	})
}

// Ready returns nil if the add-on serves, or is removed if it is disabled; otherwise what it waits for, in one line. It
// queries the API server at most four times a second.
func (a *Addon) Ready(ctx context.Context) error {
	if err := a.loop.Ready(); err != nil || a.opts.Disabled {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if time.Since(a.checked) >= readyInterval {
		a.state = a.available(ctx)
		if apierrors.IsNotFound(a.state) {
			a.loop.Kick()
		}
		a.checked = time.Now()
	}
	return a.state
}

// Notes implements component.Noted.
func (a *Addon) Notes(context.Context) []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.notes
}

// Stop ends the attempts to apply. The add-on's pods stay, as the cluster's data does.
func (a *Addon) Stop(ctx context.Context) error {
	return errors.Join(a.following.Stop(ctx), a.watching.Stop(ctx), a.loop.Stop(ctx))
}
