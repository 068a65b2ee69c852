// Package imagepolicy lets only signed images run in the namespaces that request it.
//
// It is a component of the server: an admission webhook on the loopback, with two parts. The first, when a pod is created or one
// of its images changes, resolves each image's name, checks the signature of that image, and writes its digest into the pod.
// The second sees the pod after all other webhooks, and rejects an image without a digest or without a signature. So the kubelet
// runs what was checked, wherever a tag points later. Images that Polymesh ships, such as Istio's sidecar, need no signature.
//
// The package owns the two webhook configurations, and removes them when no server has keys any longer. While a server's webhook does
// not respond, because it has no keys for example, its API server rejects pods in these namespaces. pkg/server adds it to the server.
package imagepolicy

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"sync/atomic"
	"time"

	admissionv1 "k8s.io/api/admissionregistration/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	applyv1 "k8s.io/client-go/applyconfigurations/admissionregistration/v1"
	metaapply "k8s.io/client-go/applyconfigurations/meta/v1"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"

	"polymesh.dev/polymesh/pkg/certificate"
	"polymesh.dev/polymesh/pkg/component"
	"polymesh.dev/polymesh/pkg/converge"
	"polymesh.dev/polymesh/pkg/kubeconfig"
	"polymesh.dev/polymesh/pkg/layout"
	"polymesh.dev/polymesh/pkg/signature"
	"polymesh.dev/polymesh/pkg/ssa"
)

// The label by which a namespace requests the policy.
const (
	Label   = "polymesh.dev/image-policy"
	Enforce = "enforce"
)

const (
	name         = "polymesh-image-policy"
	webhookName  = "image-policy.polymesh.dev"
	fieldManager = ssa.ImagePolicy
	pinPath      = "/pin"
	checkPath    = "/check"
	// timeout is how long the API server waits. It includes the requests to registries.
	timeout = 15 * time.Second
	// interval is how often the two configurations are checked: without them nothing is enforced.
	interval = 10 * time.Second
)

// Node is the image store of the node.
type Node interface {
	signature.Place
	// Shipped reports whether an image came with Polymesh, by its full name; a missing one did not.
	Shipped(ctx context.Context, name string) (bool, error)
	Close() error
}

// Options of the component.
type Options struct {
	// Keys are the public keys, in DER form (PKIX); without any, the component only removes what an earlier server left.
	Keys [][]byte
	// Kubeconfig may write webhook configurations and read Secrets. It is read by Start.
	Kubeconfig   string
	Certificates certificate.Store
	// Port is the webhook's on the loopback: the same one on all servers of a cluster, because their API servers read the same
	// configurations. 0 is a free one.
	Port int
	// Open connects to the node's images.
	Open func() (Node, error)
	// RegistryDirs are containerd's folders with registry settings, separated by colons as containerd takes them.
	RegistryDirs string
	// Server is this server's name, and Several whether the cluster may have others. Each one is asked by its own API server only, and all have
	// to have the same keys: see servers.go.
	Server  string
	Several bool
	Log     *slog.Logger
}

var _ component.Component = (*Policy)(nil)

// Policy is the component.
type Policy struct {
	opts    Options
	keys    signature.Keys
	client  kubernetes.Interface // for Secrets
	dynamic dynamic.Interface    // for webhook configurations
	node    Node
	server  *http.Server
	loop    *converge.Loop
	broken  atomic.Pointer[error] // why the webhook no longer responds

	holding converge.Applied
	settled bool   // used by the loop: what is applied from now on was deleted or changed
	unused  string // used by the loop: the version of the webhook that no server has keys for
}

// New returns the component, not yet started.
func New(opts Options) *Policy {
	return &Policy{opts: opts}
}

// Name implements component.Component.
func (*Policy) Name() string { return "image-policy" }

// Init reads the keys, so that a bad one stops the server before anything runs.
func (p *Policy) Init(context.Context) (err error) {
	if p.keys, err = signature.ParseKeys(p.opts.Keys...); err != nil {
		return fmt.Errorf("--image-policy-key: %w", err)
	}
	return nil
}

// Start serves the API server's requests and applies the configurations in the background.
func (p *Policy) Start(ctx context.Context) error {
	rest, err := kubeconfig.Config(p.opts.Kubeconfig)
	if err != nil {
		return err
	}
	if p.client, err = kubernetes.NewForConfig(rest); err != nil {
		return fmt.Errorf("create an API client from %s: %w", p.opts.Kubeconfig, err)
	}
	if p.dynamic, err = dynamic.NewForConfig(rest); err != nil {
		return fmt.Errorf("create an API client from %s: %w", p.opts.Kubeconfig, err)
	}
	configure := p.remove
	if len(p.keys) > 0 {
		if p.node, err = p.opts.Open(); err != nil {
			return err
		}
		address, err := p.serve()
		if err != nil {
			return err
		}
		configure = func(ctx context.Context) error { return p.apply(ctx, "https://"+address) }
	}
	p.loop = converge.NewLoop(p.opts.Log.With("component", p.Name()), interval, configure)
	p.loop.Start(ctx)
	return nil
}

// serve listens on the loopback, with the API server's own certificate, which is also for 127.0.0.1.
func (p *Policy) serve() (address string, err error) {
	cert, key := p.opts.Certificates.Cert(certificate.APIServer), p.opts.Certificates.Key(certificate.APIServer)
	listener, err := tls.Listen("tcp", layout.Loopback(p.opts.Port).String(), &tls.Config{
		MinVersion: tls.VersionTLS12,
		// Another client could make the server query registries with any namespace's pull secrets.
		GetConfigForClient: func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
			own, err := sameProcess(hello.Conn)
			if err == nil && !own {
				err = errors.New("only this server's own API server may connect")
			}
			return nil, err
		},
		// It is read for each connection, because it is renewed while the server runs.
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			pair, err := tls.LoadX509KeyPair(cert, key)
			return &pair, err
		},
	})
	if err != nil {
		return "", fmt.Errorf("listen for the API server: %w", err)
	}
	mux := http.NewServeMux()
	mux.Handle("POST "+pinPath, p.handler(p.pin))
	mux.Handle("POST "+checkPath, p.handler(p.check))
	p.server = &http.Server{
		Handler: mux, ReadHeaderTimeout: timeout, ReadTimeout: timeout,
		ErrorLog: slog.NewLogLogger(p.opts.Log.With("component", p.Name()).Handler(), slog.LevelDebug),
	}
	go func() {
		if err := p.server.Serve(listener); !errors.Is(err, http.ErrServerClosed) && !errors.Is(err, net.ErrClosed) {
			p.broken.Store(&err)
		}
	}()
	return listener.Addr().String(), nil
}

// Ready implements component.Component.
func (p *Policy) Ready(context.Context) error {
	if err := p.broken.Load(); err != nil {
		return *err
	}
	if p.loop == nil {
		return errors.New("not started")
	}
	return p.loop.Ready()
}

// Stop ends the webhook. Its configurations stay: while no server runs there is no API server either.
func (p *Policy) Stop(ctx context.Context) error {
	var err error
	if p.loop != nil {
		err = p.loop.Stop(ctx)
	}
	if p.server != nil {
		err = errors.Join(err, p.server.Shutdown(ctx))
	}
	if p.node != nil {
		err = errors.Join(err, p.node.Close())
	}
	return err
}

// apply registers the webhooks. It is called repeatedly, and writes only what has changed since.
func (p *Policy) apply(ctx context.Context, url string) error {
	authority, err := os.ReadFile(p.opts.Certificates.Cert(certificate.ServerCA))
	if err != nil {
		return fmt.Errorf("read the cluster's authority: %w", err)
	}
	client := func(path string) *applyv1.WebhookClientConfigApplyConfiguration {
		return applyv1.WebhookClientConfig().WithURL(url + path).WithCABundle(authority...)
	}
	namespaces := metaapply.LabelSelector().WithMatchLabels(map[string]string{Label: Enforce})
	rules := []*applyv1.RuleWithOperationsApplyConfiguration{
		applyv1.RuleWithOperations().WithAPIGroups("").WithAPIVersions("v1").WithResources("pods").WithOperations(admissionv1.Create, admissionv1.Update),
		applyv1.RuleWithOperations().WithAPIGroups("").WithAPIVersions("v1").WithResources("pods/ephemeralcontainers").WithOperations(admissionv1.Update),
	}
	// The check is first: on its own it lets nothing unsigned pass.
	check := applyv1.ValidatingWebhookConfiguration(name).WithWebhooks(applyv1.ValidatingWebhook().
		WithName(webhookName).WithClientConfig(client(checkPath)).WithNamespaceSelector(namespaces).WithRules(rules...).
		WithFailurePolicy(admissionv1.Fail).WithSideEffects(admissionv1.SideEffectClassNone).WithAdmissionReviewVersions("v1").
		WithTimeoutSeconds(int32(timeout / time.Second)))
	if err := p.keep(ctx, validatingWebhooks, check); err != nil {
		return err
	}
	// It is called again if a later webhook added containers, as Istio's can.
	pin := applyv1.MutatingWebhookConfiguration(name).WithWebhooks(applyv1.MutatingWebhook().
		WithName(webhookName).WithClientConfig(client(pinPath)).WithNamespaceSelector(namespaces).WithRules(rules...).
		WithFailurePolicy(admissionv1.Fail).WithSideEffects(admissionv1.SideEffectClassNone).WithAdmissionReviewVersions("v1").
		WithTimeoutSeconds(int32(timeout / time.Second)).WithReinvocationPolicy(admissionv1.IfNeededReinvocationPolicy))
	if err := p.keep(ctx, mutatingWebhooks, pin); err != nil {
		return err
	}
	p.settled = true
	return p.agree(ctx)
}

// The two kinds of webhook configurations.
var (
	validatingWebhooks = admissionv1.SchemeGroupVersion.WithResource("validatingwebhookconfigurations")
	mutatingWebhooks   = admissionv1.SchemeGroupVersion.WithResource("mutatingwebhookconfigurations")
)

// keep applies a configuration unless it is as this run applied it.
func (p *Policy) keep(ctx context.Context, resource schema.GroupVersionResource, config any) error {
	content, err := runtime.DefaultUnstructuredConverter.ToUnstructured(config)
	if err != nil {
		return fmt.Errorf("encode %s %s: %w", resource.Resource, name, err)
	}
	client := p.dynamic.Resource(resource)
	have, err := client.Get(ctx, name, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
	case err != nil:
		return fmt.Errorf("read %s %s: %w", resource.Resource, name, err)
	default:
		holds, err := p.holding.Holds(resource.Resource, have, fieldManager)
		if err != nil || holds {
			return err
		}
		if _, err := ssa.TakeOver(ctx, client, have, fieldManager); err != nil {
			return fmt.Errorf("%s: %w", resource.Resource, err)
		}
	}
	if p.settled {
		p.opts.Log.Warn("the image policy's webhook was deleted or changed, putting it back", "component", p.Name(), "resource", resource.Resource)
	}
	applied, err := ssa.Apply(ctx, client, &unstructured.Unstructured{Object: content}, ssa.Options{Manager: fieldManager, Force: true})
	if err != nil {
		return fmt.Errorf("apply %s %s: %w", resource.Resource, name, err)
	}
	return p.holding.Note(resource.Resource, applied, fieldManager)
}

// remove removes what a server with keys left; otherwise no pod could be created in a namespace with the label. While another server
// has keys, it stays.
func (p *Policy) remove(ctx context.Context) error {
	if p.opts.Several {
		if err := p.leave(ctx); err != nil {
			return err
		}
	}
	for _, resource := range []schema.GroupVersionResource{mutatingWebhooks, validatingWebhooks} {
		options := metav1.DeleteOptions{}
		if resource == validatingWebhooks && p.unused != "" {
			options.Preconditions = &metav1.Preconditions{ResourceVersion: &p.unused} // no server has written its record meanwhile
		}
		if err := p.dynamic.Resource(resource).Delete(ctx, name, options); err != nil && !apierrors.IsNotFound(err) {
			return fmt.Errorf("remove %s %s: %w", resource.Resource, name, err)
		}
	}
	return nil
}
