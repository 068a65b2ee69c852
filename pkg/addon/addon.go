// Package addon keeps the parts of a cluster that are objects in it: CoreDNS, metrics-server and the local-path
// provisioner, which run as ordinary pods, and the admission policies that go with them or stand alone.
//
// It owns their manifests and applies them to the API server at each start, as K3s does with its packaged components; it
// removes what an earlier version applied and this one does not, and all of it when the add-on is disabled. pkg/command
// adds one component for each add-on, disabled ones included.
package addon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path"
	"strings"
	"sync"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	"polymesh.dev/polymesh/pkg/component"
	"polymesh.dev/polymesh/pkg/config"
)

// Options say which add-on, for which cluster.
type Options struct {
	// Name is config.CoreDNS, config.MetricsServer, config.LocalStorage or config.NetworkPolicy.
	Name config.Addon
	// Disabled makes the component remove the add-on instead.
	Disabled bool
	// Kubeconfig is a file with the rights of a cluster administrator. It is read by Start.
	Kubeconfig string
	// Images maps an image's short name, "coredns", to its reference; see Images.
	Images map[string]string

	ClusterDNS    netip.Addr
	ClusterDomain string
	// Nameservers says that pods with dnsPolicy Default get at least one name server that is not on the loopback.
	// CoreDNS does not start when told to forward to none, and ends itself when it is told to forward to itself.
	Nameservers bool
	NodeName    string
	NodeAddress netip.Addr

	// StorageDir is where volumes of the class local-path lie.
	StorageDir string

	Log *slog.Logger
}

// Images indexes image references, as payload.json lists them, by short name: "registry.polymesh.dev/coredns:1.15.0" is
// "coredns".
func Images(refs []string) map[string]string {
	images := make(map[string]string, len(refs))
	for _, ref := range refs {
		name, _ := cutTag(ref)
		images[path.Base(name)] = ref
	}
	return images
}

// cutTag splits an image reference at its tag; a colon before the last slash is a registry's port.
func cutTag(ref string) (name, tag string) {
	if i := strings.LastIndexByte(ref, ':'); i > strings.LastIndexByte(ref, '/') {
		return ref[:i], ref[i+1:]
	}
	return ref, ""
}

const (
	// A query of the API server for each 50 ms poll of three add-ons would be most of its work during a start.
	readyInterval = 250 * time.Millisecond
	retryFirst    = 200 * time.Millisecond
	retryMax      = 10 * time.Second
)

var (
	_ component.Component = (*Addon)(nil)
	_ component.Versioned = (*Addon)(nil)
	_ component.Noted     = (*Addon)(nil)
)

// Addon is the component of one add-on.
type Addon struct {
	opts    Options
	objects []*unstructured.Unstructured // set by Init, not changed afterwards

	dynamic   dynamic.Interface
	clientset kubernetes.Interface

	cancel context.CancelFunc
	done   chan struct{}

	mu      sync.Mutex
	applied error // nil once the cluster has what Init rendered
	asked   time.Time
	answer  error
}

// New returns the component of the add-on that opts names.
func New(opts Options) *Addon {
	return &Addon{opts: opts, applied: errors.New("not applied yet")}
}

// Name is the name that --disable takes.
func (a *Addon) Name() string { return string(a.opts.Name) }

// Version is the tag of the add-on's image.
func (a *Addon) Version() string {
	if a.opts.Disabled {
		return ""
	}
	_, tag := cutTag(a.opts.Images[mainImage(a.opts.Name)])
	return tag
}

// Init renders the manifests, so that a missing value stops the node before anything runs.
func (a *Addon) Init(context.Context) error {
	if a.opts.Name == config.LocalStorage && !a.opts.Disabled {
		// The volumes in it are open to every user; the way to them is not.
		if err := errors.Join(os.MkdirAll(a.opts.StorageDir, 0o700), os.Chmod(a.opts.StorageDir, 0o700)); err != nil {
			return fmt.Errorf("make the folder of volumes: %w", err)
		}
	}
	objects, err := render(a.opts)
	if err != nil {
		return fmt.Errorf("render the manifests of %s: %w", a.opts.Name, err)
	}
	a.objects = objects
	return nil
}

// Start applies the manifests in the background, again and again until that worked once.
func (a *Addon) Start(ctx context.Context) error {
	rest, err := clientcmd.BuildConfigFromFlags("", a.opts.Kubeconfig)
	if err != nil {
		return fmt.Errorf("read kubeconfig %s: %w", a.opts.Kubeconfig, err)
	}
	rest.QPS, rest.Burst = 50, 100
	if a.dynamic, err = dynamic.NewForConfig(rest); err != nil {
		return fmt.Errorf("make an API client from %s: %w", a.opts.Kubeconfig, err)
	}
	if a.clientset, err = kubernetes.NewForConfig(rest); err != nil {
		return fmt.Errorf("make an API client from %s: %w", a.opts.Kubeconfig, err)
	}

	ctx, a.cancel = context.WithCancel(ctx)
	a.done = make(chan struct{})
	go func() {
		defer close(a.done)
		a.converge(ctx)
	}()
	return nil
}

func (a *Addon) converge(ctx context.Context) {
	log := a.opts.Log.With("addon", a.Name())
	for delay := retryFirst; ; delay = min(2*delay, retryMax) {
		err := a.sync(ctx)
		if ctx.Err() != nil {
			return
		}
		a.mu.Lock()
		a.applied = err
		a.mu.Unlock()
		if err == nil {
			return
		}
		log.Debug("apply failed", "err", err, "again in", delay.String())
		select {
		case <-ctx.Done():
			return
		case <-time.After(delay):
		}
	}
}

// Ready returns nil when the add-on serves, or is removed if it is disabled; otherwise what it waits for, in one line.
// It asks the API server at most four times a second.
func (a *Addon) Ready(ctx context.Context) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.applied != nil || a.opts.Disabled {
		return a.applied
	}
	if time.Since(a.asked) >= readyInterval {
		a.answer = a.available(ctx)
		a.asked = time.Now()
	}
	return a.answer
}

// Note says how many NetworkPolicies do nothing, in the add-on that warns of them.
func (a *Addon) Note(ctx context.Context) string {
	if a.opts.Name != config.NetworkPolicy || a.opts.Disabled {
		return ""
	}
	// One object and the count of the others: the API server reads no more.
	list, err := a.clientset.NetworkingV1().NetworkPolicies(metav1.NamespaceAll).List(ctx, metav1.ListOptions{Limit: 1})
	if err != nil {
		return "" // kube-apiserver's own line says what is wrong
	}
	count := int64(len(list.Items))
	if list.RemainingItemCount != nil {
		count += *list.RemainingItemCount
	}
	switch count {
	case 0:
		return ""
	case 1:
		return "1 NetworkPolicy is stored and not enforced"
	}
	return fmt.Sprintf("%d NetworkPolicies are stored and not enforced", count)
}

// Stop ends the attempts to apply. The add-on's pods stay: they live as long as the cluster's data.
func (a *Addon) Stop(ctx context.Context) error {
	if a.cancel == nil {
		return nil
	}
	a.cancel()
	select {
	case <-a.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("still applying manifests: %w", ctx.Err())
	}
}
