// Package certify makes istiod add the workload to each workload certificate, and checks that every certificate that
// istiod signs is for the identity of its requester.
//
// Istio's own proxies exchange their workloads in a header, and in a preface on TCP connections, and trust what they
// receive. Here the certificate contains the workload, signed by istiod, which gets it from Kubernetes: from the pod that
// a token belongs to, and the pod's labels. So clients cannot forge it, apps do not see it, and it works for TCP too.
// Access control still uses only the SPIFFE identity, as in Istio.
//
// The workload's name is mostly free text from the pod's author. It is never combined with identities: Istio's CA joins
// those with commas and splits them again, so a name with a comma would become two. As a last check, a certificate for
// other names than the caller's is discarded (verify).
//
// cmd/pilot-discovery calls Install. Envoy reads the value with %DOWNSTREAM_PEER_OTHERNAME_SAN% (pkg/mesh/dialect).
package certify

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"sync"
	"time"

	"istio.io/istio/pilot/pkg/bootstrap"
	"istio.io/istio/pkg/kube"
	"istio.io/istio/pkg/kube/kclient"
	"istio.io/istio/pkg/kube/labels"
	"istio.io/istio/pkg/log"
	"istio.io/istio/pkg/security"
	"istio.io/istio/security/pkg/pki/ca"
	caerror "istio.io/istio/security/pkg/pki/error"
	caserver "istio.io/istio/security/pkg/server/ca"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"polymesh.dev/polymesh/pkg/mesh/istiod"
	"polymesh.dev/polymesh/pkg/mesh/workload"
)

var scope = log.RegisterScope("certify", "workloads in certificates")

// podWait limits how long a pod lookup may take, because a proxy is waiting for its certificate.
const podWait = 5 * time.Second

// Install inserts the package between istiod's certificate service and its CA. Call it after bootstrap.NewServer and
// before Start. If istiod does not issue the certificates itself (external CA), only callers are checked; peers' metrics then
// lack the workload, as they do for certificates that a node proxy requests (ambient mode).
func Install(server *bootstrap.Server, cluster string) error {
	server.XDSServer.Authenticators = checked(server.XDSServer.Authenticators, nil, nil)
	if server.CA == nil || server.RA != nil {
		scope.Infof("certificates will not contain workloads: istiod does not sign them")
		return nil
	}
	service, err := istiod.Field[*caserver.Server](reflect.ValueOf(server).Elem(), "caServer")
	if err != nil {
		return err
	}
	client, err := istiod.Field[kube.Client](reflect.ValueOf(server).Elem(), "kubeClient")
	if err != nil {
		return err
	}
	return install(*service, server.CA, newPods(*client, cluster))
}

func install(service *caserver.Server, own *ca.IstioCA, pods pods) error {
	signer, err := istiod.Field[caserver.CertificateAuthority](reflect.ValueOf(service).Elem(), "ca")
	if err != nil {
		return err
	}
	calls := &calls{workloads: map[*string]workload.Workload{}}
	*signer = authority{own, calls}
	service.Authenticators = checked(service.Authenticators, pods.workload, calls)
	return nil
}

// calls are the certificate requests in progress, with the workload of each. Istio's service passes only the identities
// to the CA, and no context. But that slice is the one that the authenticator allocated for this request, so its
// address identifies the request.
type calls struct {
	mu        sync.Mutex
	workloads map[*string]workload.Workload
}

// begin returns a copy of the identities, by whose address the workload is found until ctx, the request's context, ends.
func (c *calls) begin(ctx context.Context, identities []string, w workload.Workload) []string {
	own := slices.Clone(identities)
	if len(own) == 0 {
		return own
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.workloads[&own[0]] = w
	context.AfterFunc(ctx, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.workloads, &own[0])
	})
	return own
}

// workload returns the workload of the request with exactly this identities slice.
func (c *calls) workload(identities []string) (workload.Workload, bool) {
	if len(identities) == 0 {
		return workload.Workload{}, false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	w, ok := c.workloads[&identities[0]]
	return w, ok
}

// pods looks up the workload of a pod.
type pods struct {
	client  kubernetes.Interface
	known   kclient.Reader[*corev1.Pod]
	cluster string
}

// newPods reads pods from istiod's own cache, and falls back to the API server, with istiod's client, for pods that are
// newer or in namespaces that istiod is configured to ignore. The filter is that of istiod's registry
// (istio.io/istio/pilot/pkg/serviceregistry/kube/controller/controller.go), so that both share one cache.
func newPods(client kube.Client, cluster string) pods {
	return pods{client.Kube(), kclient.NewFiltered[*corev1.Pod](client, kclient.Filter{
		ObjectFilter: client.ObjectFilter(), ObjectTransform: kube.StripPodUnusedFields, FieldSelector: "status.phase!=Failed",
	}), cluster}
}

func (p pods) workload(ctx context.Context, info security.KubernetesInfo) (workload.Workload, error) {
	if pod := p.known.Get(info.PodName, info.PodNamespace); pod != nil && info.PodUID != "" && string(pod.UID) == info.PodUID {
		return workloadOf(pod, p.cluster), nil
	}
	ctx, cancel := context.WithTimeout(ctx, podWait)
	defer cancel()
	pod, err := p.client.CoreV1().Pods(info.PodNamespace).Get(ctx, info.PodName, metav1.GetOptions{})
	if err != nil {
		return workload.Workload{}, fmt.Errorf("get the pod: %w", err)
	}
	if string(pod.UID) != info.PodUID {
		return workload.Workload{}, fmt.Errorf("the pod has been replaced by one with UID %s", pod.UID)
	}
	return workloadOf(pod, p.cluster), nil
}

// workloadOf returns the workload of a pod as injection and istiod's registry determine it, if it is a valid name: an owner
// reference is free text. A pod whose owner has no valid name is its own workload.
func workloadOf(pod *corev1.Pod, cluster string) workload.Workload {
	owner, _ := kube.GetWorkloadMetaFromPod(pod)
	w := workload.Workload{
		Name: owner.Name, Namespace: pod.Namespace, Cluster: cluster, App: pod.Labels["app"], Version: pod.Labels["version"],
	}.Named()
	if w.Name == "" {
		w.Name = pod.Name
	}
	w.CanonicalService, w.CanonicalRevision = labels.CanonicalService(pod.Labels, w.Name)
	return w.Named()
}

// authority is istiod's CA, restricted to certificates for the caller, with the workload added.
type authority struct {
	*ca.IstioCA
	calls *calls
}

// Sign implements caserver.CertificateAuthority. Its errors have Istio's type, which the service relies on.
func (a authority) Sign(csr []byte, opts ca.CertOpts) ([]byte, error) {
	cert, err := a.IstioCA.Sign(csr, opts)
	if err != nil {
		return nil, err
	}
	if err := verify(cert, opts.SubjectIDs, nil); err != nil {
		return nil, refused(opts.SubjectIDs, err)
	}
	w, ok := a.calls.workload(opts.SubjectIDs)
	if !ok {
		return cert, nil
	}
	named, err := a.name(cert, w)
	if err != nil {
		scope.Warnf("the certificate of %q will not contain its workload: %v", opts.SubjectIDs, err)
		return cert, nil
	}
	if err := verify(named, opts.SubjectIDs, &w); err != nil {
		return nil, refused(opts.SubjectIDs, err)
	}
	return named, nil
}

// SignWithCertChain implements caserver.CertificateAuthority. Requests for a chain name their own signer, and have no workload.
func (a authority) SignWithCertChain(csr []byte, opts ca.CertOpts) ([]string, error) {
	chain, err := a.IstioCA.SignWithCertChain(csr, opts)
	if err != nil {
		return nil, err
	}
	if len(chain) == 0 {
		return nil, refused(opts.SubjectIDs, errors.New("no certificate"))
	}
	if err := verify([]byte(chain[0]), opts.SubjectIDs, nil); err != nil {
		return nil, refused(opts.SubjectIDs, err)
	}
	return chain, nil
}

// refused is the error for a discarded certificate.
func refused(identities []string, err error) error {
	return caerror.NewError(caerror.CertGenError, fmt.Errorf("the certificate for %q was discarded: %w", identities, err))
}

// name signs a certificate again, with the workload added. It uses the CA's current key: a plugged-in CA can be
// replaced while istiod runs.
func (a authority) name(cert []byte, w workload.Workload) ([]byte, error) {
	signer, key, _, _ := a.GetCAKeyCertBundle().GetAll()
	if signer == nil || key == nil {
		return nil, errors.New("the CA has no key")
	}
	return WithWorkload(cert, signer, *key, w)
}
