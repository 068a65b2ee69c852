// Package certify lets istiod write into each workload's certificate which workload it is.
//
// Istio's own proxies introduce themselves to each other with a header, and with a preface on TCP connections, and
// believe what they are told. Here the certificate says it, signed by istiod, which has it from Kubernetes: the pod that
// a token belongs to, and the pod's labels. So there is nothing that a client could forge, nothing that an app could see,
// and TCP has it too. What decides about access, the SPIFFE identity, is as in Istio.
//
// cmd/pilot-discovery calls Install. Envoy reads the text by %DOWNSTREAM_PEER_OTHERNAME_SAN% (pkg/mesh/dialect).
package certify

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"time"

	"istio.io/istio/pilot/pkg/bootstrap"
	"istio.io/istio/pkg/kube"
	"istio.io/istio/pkg/kube/labels"
	"istio.io/istio/pkg/log"
	"istio.io/istio/pkg/security"
	"istio.io/istio/security/pkg/pki/ca"
	caserver "istio.io/istio/security/pkg/server/ca"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"polymesh.dev/polymesh/pkg/mesh/workload"
)

var scope = log.RegisterScope("certify", "workloads in certificates")

// podWait bounds the look at a pod: a proxy waits for its certificate.
const podWait = 5 * time.Second

// Install puts the package between istiod's certificate service and its CA. It is called after bootstrap.NewServer and
// before Start. Where the certificates are not istiod's own (an external CA) it changes nothing; workloads are then unknown
// to the other side's metrics, as are those whose certificates a node's proxy asks for (ambient mode).
func Install(server *bootstrap.Server, client kubernetes.Interface, cluster string) error {
	if server.CA == nil || server.RA != nil {
		scope.Infof("certificates do not name workloads: istiod does not sign them")
		return nil
	}
	// Neither the service nor its CA are fields that Istio exports. What they are is checked, so that an Istio that has
	// changed ends istiod at its start, and the build's tests.
	service, err := unexported[*caserver.Server](reflect.ValueOf(server).Elem(), "caServer")
	if err != nil {
		return err
	}
	signer, err := unexported[caserver.CertificateAuthority](reflect.ValueOf(*service).Elem(), "ca")
	if err != nil {
		return err
	}
	*signer = &authority{server.CA, client, cluster}
	authenticators := make([]security.Authenticator, len((*service).Authenticators))
	for i, a := range (*service).Authenticators {
		authenticators[i] = podAuthenticator{a}
	}
	// istiod's discovery service has the same slice, and needs no pods.
	(*service).Authenticators = authenticators
	return nil
}

// unexported is a struct's field of this name and type.
func unexported[T any](of reflect.Value, name string) (*T, error) {
	field := of.FieldByName(name)
	if !field.IsValid() || field.Type() != reflect.TypeFor[T]() || field.IsZero() {
		return nil, fmt.Errorf("%s has no %s of type %s", of.Type(), name, reflect.TypeFor[T]())
	}
	return (*T)(field.Addr().UnsafePointer()), nil
}

// podAuthenticator adds the pod that a token is bound to to the caller's identities, which is all of the caller that the
// service passes on to the CA.
type podAuthenticator struct{ security.Authenticator }

// Authenticate implements security.Authenticator.
func (a podAuthenticator) Authenticate(ctx security.AuthContext) (*security.Caller, error) {
	caller, err := a.Authenticator.Authenticate(ctx)
	if err != nil || caller == nil || caller.KubernetesInfo.PodName == "" {
		return caller, err
	}
	with := *caller
	with.Identities = append(append([]string{}, caller.Identities...), podRef{
		caller.KubernetesInfo.PodNamespace, caller.KubernetesInfo.PodName, caller.KubernetesInfo.PodUID,
	}.String())
	return &with, nil
}

// podRef names one pod. Among identities it is told by its prefix, which no SPIFFE identity has.
type podRef struct{ namespace, name, uid string }

const podPrefix = "polymesh-pod:"

func (p podRef) String() string { return podPrefix + p.namespace + "/" + p.name + "/" + p.uid }

// cutPod takes the pod out of a list of identities.
func cutPod(identities []string) (rest []string, pod *podRef) {
	for _, id := range identities {
		text, ours := strings.CutPrefix(id, podPrefix)
		if parts := strings.Split(text, "/"); ours && len(parts) == 3 {
			pod = &podRef{parts[0], parts[1], parts[2]}
			continue
		}
		rest = append(rest, id)
	}
	return rest, pod
}

// authority is istiod's CA; its certificates say which workload they are for.
type authority struct {
	*ca.IstioCA
	client  kubernetes.Interface
	cluster string
}

// Sign implements caserver.CertificateAuthority. A workload that cannot be found out costs labels in metrics, no more:
// the certificate is then Istio's.
func (a *authority) Sign(csr []byte, opts ca.CertOpts) ([]byte, error) {
	var pod *podRef
	opts.SubjectIDs, pod = cutPod(opts.SubjectIDs)
	cert, err := a.IstioCA.Sign(csr, opts)
	if err != nil || pod == nil {
		return cert, err
	}
	named, err := a.name(cert, *pod)
	if err != nil {
		scope.Warnf("the certificate of pod %s/%s does not name its workload: %v", pod.namespace, pod.name, err)
		return cert, nil
	}
	return named, nil
}

// SignWithCertChain implements caserver.CertificateAuthority.
func (a *authority) SignWithCertChain(csr []byte, opts ca.CertOpts) ([]string, error) {
	opts.SubjectIDs, _ = cutPod(opts.SubjectIDs)
	return a.IstioCA.SignWithCertChain(csr, opts)
}

// name signs a certificate again, with the pod's workload in it.
func (a *authority) name(cert []byte, ref podRef) ([]byte, error) {
	ctx, cancel := context.WithTimeout(context.Background(), podWait)
	defer cancel()
	pod, err := a.client.CoreV1().Pods(ref.namespace).Get(ctx, ref.name, metav1.GetOptions{})
	if err != nil {
		return nil, fmt.Errorf("read the pod: %w", err)
	}
	if ref.uid != "" && string(pod.UID) != ref.uid {
		return nil, fmt.Errorf("the pod is another one by now, %s", pod.UID)
	}
	signer, key, _, _ := a.GetCAKeyCertBundle().GetAll()
	if signer == nil || key == nil {
		return nil, errors.New("the CA has no key")
	}
	return WithWorkload(cert, signer, *key, workloadOf(pod, a.cluster))
}

// workloadOf is what injection and istiod's registry call the workload of a pod.
func workloadOf(pod *corev1.Pod, cluster string) workload.Workload {
	deployment, _ := kube.GetWorkloadMetaFromPod(pod)
	service, revision := labels.CanonicalService(pod.Labels, deployment.Name)
	return workload.Workload{
		Name: deployment.Name, Namespace: pod.Namespace, CanonicalService: service, CanonicalRevision: revision,
		Cluster: cluster, App: pod.Labels["app"], Version: pod.Labels["version"],
	}
}
