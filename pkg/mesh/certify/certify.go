// Package certify lets istiod write into each workload's certificate which workload it is for, and holds every certificate that
// istiod signs to the identity of who asked for it.
//
// Istio's own proxies introduce themselves to each other with a header, and with a preface on TCP connections, and
// believe what they are told. Here the certificate says it, signed by istiod, which has it from Kubernetes: the pod that
// a token belongs to, and the pod's labels. So there is nothing that a client could forge, nothing that an app could see,
// and TCP has it too. What decides about access, the SPIFFE identity, is as in Istio.
//
// The workload's name is for the most part what the pod's author chose. It never travels together with identities: Istio's CA joins
// those with commas and splits them again, so one that holds a comma would be two. Whatever reaches the CA, a certificate that is for
// other names than the caller's is thrown away (verify).
//
// cmd/pilot-discovery calls Install. Envoy reads the text by %DOWNSTREAM_PEER_OTHERNAME_SAN% (pkg/mesh/dialect).
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

// podWait bounds the look at a pod: a proxy waits for its certificate.
const podWait = 5 * time.Second

// Install puts the package between istiod's certificate service and its CA. It is called after bootstrap.NewServer and
// before Start. Where the certificates are not istiod's own (an external CA) only the callers are checked; workloads are then
// unknown to the other side's metrics, as are those whose certificates a node's proxy asks for (ambient mode).
func Install(server *bootstrap.Server, cluster string) error {
	server.XDSServer.Authenticators = checked(server.XDSServer.Authenticators, nil, nil)
	if server.CA == nil || server.RA != nil {
		scope.Infof("certificates do not name workloads: istiod does not sign them")
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

// calls are the requests for a certificate that are being answered, with the workload that each is for. Istio's service hands on
// nothing of the caller to the CA but the identities, and the CA is given no context. But the slice that it is given is the one
// that the authenticator has made for this request, so where that lies in memory says which request it is.
type calls struct {
	mu        sync.Mutex
	workloads map[*string]workload.Workload
}

// begin returns the identities in memory of their own, by which the workload is found until ctx, the request's context, ends.
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

// workload is that of the request with just these identities.
func (c *calls) workload(identities []string) (workload.Workload, bool) {
	if len(identities) == 0 {
		return workload.Workload{}, false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	w, ok := c.workloads[&identities[0]]
	return w, ok
}

// pods finds the workload of a pod.
type pods struct {
	client  kubernetes.Interface
	known   kclient.Reader[*corev1.Pod]
	cluster string
}

// newPods looks at pods in istiod's own cache, and asks the API server, with istiod's own client, for those that are not in it: pods
// that are newer, and those of namespaces that istiod is configured to leave out. The filter is that of istiod's registry
// (istio.io/istio/pilot/pkg/serviceregistry/kube/controller/controller.go), so that there is one cache.
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
		return workload.Workload{}, fmt.Errorf("read the pod: %w", err)
	}
	if string(pod.UID) != info.PodUID {
		return workload.Workload{}, fmt.Errorf("the pod is another one by now, %s", pod.UID)
	}
	return workloadOf(pod, p.cluster), nil
}

// workloadOf is what injection and istiod's registry call the workload of a pod, as far as it is a name: an owner reference is
// free text of the pod's author. A pod whose owner has no valid name is a workload by itself.
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

// authority is istiod's CA. Its certificates are for the caller only, and say which workload it is.
type authority struct {
	*ca.IstioCA
	calls *calls
}

// Sign implements caserver.CertificateAuthority. Its errors are of Istio's type, which the service relies on.
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
		scope.Warnf("the certificate of %q does not name its workload: %v", opts.SubjectIDs, err)
		return cert, nil
	}
	if err := verify(named, opts.SubjectIDs, &w); err != nil {
		return nil, refused(opts.SubjectIDs, err)
	}
	return named, nil
}

// SignWithCertChain implements caserver.CertificateAuthority. What asks for a chain names a signer of its own, and no workload.
func (a authority) SignWithCertChain(csr []byte, opts ca.CertOpts) ([]string, error) {
	chain, err := a.IstioCA.SignWithCertChain(csr, opts)
	if err != nil {
		return nil, err
	}
	if len(chain) == 0 {
		return nil, refused(opts.SubjectIDs, errors.New("there is none"))
	}
	if err := verify([]byte(chain[0]), opts.SubjectIDs, nil); err != nil {
		return nil, refused(opts.SubjectIDs, err)
	}
	return chain, nil
}

// refused says that a certificate was thrown away.
func refused(identities []string, err error) error {
	return caerror.NewError(caerror.CertGenError, fmt.Errorf("the certificate for %q was thrown away: %w", identities, err))
}

// name signs a certificate again, with the workload in it. The CA's key is the one of this moment: a CA that the user has
// plugged in can be replaced while istiod runs.
func (a authority) name(cert []byte, w workload.Workload) ([]byte, error) {
	signer, key, _, _ := a.GetCAKeyCertBundle().GetAll()
	if signer == nil || key == nil {
		return nil, errors.New("the CA has no key")
	}
	return WithWorkload(cert, signer, *key, w)
}
