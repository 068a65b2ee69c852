// Package servingcert approves the serving certificates that the kubelets of agents renew.
//
// kube-controller-manager signs an approved request with the kubelets' authority, but approves only client certificates: which
// addresses a node may serve on is the installer's decision (https://kubernetes.io/docs/reference/access-authn-authz/kubelet-tls-bootstrapping/#certificate-rotation).
// pkg/server adds the component; the first certificate is signed when a machine joins (pkg/join).
package servingcert

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/util/sets"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	certificateslisters "k8s.io/client-go/listers/certificates/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/kubernetes/pkg/apis/certificates"

	"polymesh.dev/polymesh/pkg/component"
	"polymesh.dev/polymesh/pkg/kubeconfig"
	"polymesh.dev/polymesh/pkg/layout"
)

// recheck is how often requests are looked at that could not be decided, because the node has no addresses yet.
const recheck = 30 * time.Second

// Options define where requests are decided.
type Options struct {
	// Kubeconfig may approve requests for kubernetes.io/kubelet-serving, and list nodes.
	Kubeconfig string
	// ServiceCIDR are addresses that are no node's.
	ServiceCIDR netip.Prefix
	// Joined returns the addresses with which nodes have joined, by name (join.Addresses).
	Joined func(context.Context, kubernetes.Interface) (map[string]netip.Addr, error)
	Log    *slog.Logger
}

// Component is "serving-certificates".
type Component struct {
	component.Background
	opts   Options
	log    *slog.Logger
	client kubernetes.Interface
	list   certificateslisters.CertificateSigningRequestLister
	failed atomic.Pointer[error]
}

// New returns the component, not yet started.
func New(o Options) *Component {
	return &Component{opts: o, log: o.Log.With("component", "serving-certificates")}
}

// Name implements component.Component.
func (*Component) Name() string { return "serving-certificates" }

// Init implements component.Component.
func (*Component) Init(context.Context) error { return nil }

// Start watches the requests.
func (c *Component) Start(ctx context.Context) error {
	var err error
	if c.client, err = kubeconfig.Client(c.opts.Kubeconfig, nil); err != nil {
		return err
	}
	factory := informers.NewSharedInformerFactoryWithOptions(c.client, 0, informers.WithTweakListOptions(func(o *metav1.ListOptions) {
		o.FieldSelector = "spec.signerName=" + certificatesv1.KubeletServingSignerName
	}))
	requests := factory.Certificates().V1().CertificateSigningRequests()
	c.list = requests.Lister()
	changed := component.NewWake()
	if _, err := requests.Informer().AddEventHandler(cache.ResourceEventHandlerFuncs{AddFunc: func(any) { changed.Call() }}); err != nil {
		return err
	}
	c.Go(ctx, func(ctx context.Context) {
		factory.StartWithContext(ctx)
		defer factory.Shutdown()
		component.Rounds(ctx, changed, recheck, func(ctx context.Context) {
			err := c.round(ctx)
			if err != nil && ctx.Err() == nil {
				c.log.Warn("requests for serving certificates are not decided yet", "err", err)
			}
			c.failed.Store(&err)
		})
	})
	return nil
}

// Ready returns the error of the last round.
func (c *Component) Ready(context.Context) error {
	if err := c.failed.Load(); err != nil {
		return *err
	}
	return nil
}

func (c *Component) round(ctx context.Context) error {
	all, err := c.list.List(labels.Everything())
	if err != nil {
		return err
	}
	pending := slices.DeleteFunc(all, func(r *certificatesv1.CertificateSigningRequest) bool { return len(r.Status.Conditions) > 0 })
	if len(pending) == 0 {
		return nil
	}
	nodes, err := c.client.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return fmt.Errorf("list the nodes: %w", err)
	}
	joined, err := c.opts.Joined(ctx, c.client)
	if err != nil {
		return err
	}
	for _, r := range pending {
		decided := decide(r, nodes.Items, joined, c.opts.ServiceCIDR)
		if decided == nil {
			continue
		}
		next := r.DeepCopy()
		next.Status.Conditions = append(next.Status.Conditions, *decided)
		_, err := c.client.CertificatesV1().CertificateSigningRequests().UpdateApproval(ctx, next.Name, next, metav1.UpdateOptions{})
		if err != nil && !apierrors.IsConflict(err) && !apierrors.IsNotFound(err) {
			return fmt.Errorf("decide on request %s: %w", r.Name, err)
		}
		c.log.Info("serving certificate of a node", "node", r.Spec.Username, "decision", decided.Type, "why", decided.Message)
	}
	return nil
}

// decide returns the condition for a request; nil while the node has no addresses to compare with. joined has the addresses with which nodes
// have joined.
func decide(r *certificatesv1.CertificateSigningRequest, nodes []corev1.Node, joined map[string]netip.Addr, services netip.Prefix) *certificatesv1.CertificateSigningRequestCondition {
	deny := func(format string, args ...any) *certificatesv1.CertificateSigningRequestCondition {
		return &certificatesv1.CertificateSigningRequestCondition{
			Type: certificatesv1.CertificateDenied, Status: corev1.ConditionTrue, Reason: "NotTheNodesOwn", Message: fmt.Sprintf(format, args...),
		}
	}
	name, ok := strings.CutPrefix(r.Spec.Username, "system:node:")
	if !ok || !slices.Contains(r.Spec.Groups, user.NodesGroup) {
		return deny("only a node can have a kubelet's serving certificate, for itself")
	}
	block, _ := pem.Decode(r.Spec.Request)
	if block == nil {
		return deny("the request contains no PEM")
	}
	req, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return deny("the request cannot be read: %v", err)
	}
	usages := sets.NewString()
	for _, u := range r.Spec.Usages {
		usages.Insert(string(u))
	}
	if err := certificates.ValidateKubeletServingCSR(req, usages); err != nil {
		return deny("%v", err)
	}
	if req.Subject.CommonName != r.Spec.Username {
		return deny("the certificate would be for %.100q, not for who requests it", req.Subject.CommonName)
	}
	for _, dns := range req.DNSNames {
		if dns != name {
			return deny("%.100q is not the node's name", dns)
		}
	}
	at := slices.IndexFunc(nodes, func(n corev1.Node) bool { return n.Name == name })
	if at < 0 || len(addresses(nodes[at])) == 0 {
		return nil
	}
	own := addresses(nodes[at])
	for _, ip := range req.IPAddresses {
		a, _ := netip.AddrFromSlice(ip)
		a = a.Unmap()
		switch {
		case !slices.Contains(own, a):
			return deny("%s is not the node's address", a)
		case a.IsLoopback() || a.IsUnspecified() || services.Contains(a):
			return deny("%s is no address of a node", a)
		}
		// The node writes its own addresses, so they prove nothing against others', whichever node is older. The address with which it has
		// joined was no other node's then, unless that is a server's now.
		for i, n := range nodes {
			_, server := n.Labels[layout.ServerLabel]
			if i != at && slices.Contains(addresses(n), a) && (joined[name] != a || joined[n.Name] == a || server) {
				return deny("%s is also the address of node %s", a, n.Name)
			}
		}
	}
	return &certificatesv1.CertificateSigningRequestCondition{
		Type: certificatesv1.CertificateApproved, Status: corev1.ConditionTrue, Reason: "NodesOwn", Message: "the node's own name and addresses",
	}
}

func addresses(n corev1.Node) []netip.Addr {
	var all []netip.Addr
	for _, a := range n.Status.Addresses {
		if ip, err := netip.ParseAddr(a.Address); err == nil {
			all = append(all, ip.Unmap())
		}
	}
	return all
}
