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
	*signer = authority{server.CA}
	pods := pods{client, cluster}
	authenticators := make([]security.Authenticator, len((*service).Authenticators))
	for i, a := range (*service).Authenticators {
		authenticators[i] = podAuthenticator{a, pods.workload}
	}
	// istiod's discovery service has the same slice, and needs no workloads.
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

// podAuthenticator adds the workload of the pod that a token is bound to to the caller's identities, which is all of the
// caller that the service passes on to the CA. It is found out here and not when the CA signs: the service has taken the
// CA's chain by then, and a CA that is replaced while the API server is asked would sign for another chain.
type podAuthenticator struct {
	security.Authenticator
	find func(context.Context, security.KubernetesInfo) (workload.Workload, error)
}

// Authenticate implements security.Authenticator. A workload that cannot be found out costs labels in metrics, no more:
// the certificate is then Istio's.
func (a podAuthenticator) Authenticate(ctx security.AuthContext) (*security.Caller, error) {
	caller, err := a.Authenticator.Authenticate(ctx)
	if err != nil || caller == nil || caller.KubernetesInfo.PodName == "" {
		return caller, err
	}
	info := caller.KubernetesInfo
	found, err := a.find(context.Background(), info)
	if err != nil {
		scope.Warnf("the certificate of pod %s/%s does not name its workload: %v", info.PodNamespace, info.PodName, err)
		return caller, nil
	}
	with := *caller
	with.Identities = append(append([]string{}, caller.Identities...), workloadPrefix+found.String())
	return &with, nil
}

// workloadPrefix tells a workload from the identities that it is among. No SPIFFE identity begins like this.
const workloadPrefix = "polymesh-workload:"

// cutWorkload takes the workload out of a list of identities.
func cutWorkload(identities []string) (rest []string, found *workload.Workload) {
	for _, id := range identities {
		text, ours := strings.CutPrefix(id, workloadPrefix)
		if w, ok := workload.Parse(text); ours && ok {
			found = &w
			continue
		}
		rest = append(rest, id)
	}
	return rest, found
}

// pods finds the workload of a pod.
type pods struct {
	client  kubernetes.Interface
	cluster string
}

func (p pods) workload(ctx context.Context, info security.KubernetesInfo) (workload.Workload, error) {
	ctx, cancel := context.WithTimeout(ctx, podWait)
	defer cancel()
	pod, err := p.client.CoreV1().Pods(info.PodNamespace).Get(ctx, info.PodName, metav1.GetOptions{})
	if err != nil {
		return workload.Workload{}, fmt.Errorf("read the pod: %w", err)
	}
	if info.PodUID != "" && string(pod.UID) != info.PodUID {
		return workload.Workload{}, fmt.Errorf("the pod is another one by now, %s", pod.UID)
	}
	return workloadOf(pod, p.cluster), nil
}

// authority is istiod's CA; its certificates say which workload they are for.
type authority struct{ *ca.IstioCA }

// Sign implements caserver.CertificateAuthority.
func (a authority) Sign(csr []byte, opts ca.CertOpts) ([]byte, error) {
	var found *workload.Workload
	opts.SubjectIDs, found = cutWorkload(opts.SubjectIDs)
	cert, err := a.IstioCA.Sign(csr, opts)
	if err != nil || found == nil {
		return cert, err
	}
	named, err := a.name(cert, *found)
	if err != nil {
		scope.Warnf("the certificate of %s/%s does not name its workload: %v", found.Namespace, found.Name, err)
		return cert, nil
	}
	return named, nil
}

// SignWithCertChain implements caserver.CertificateAuthority.
func (a authority) SignWithCertChain(csr []byte, opts ca.CertOpts) ([]string, error) {
	opts.SubjectIDs, _ = cutWorkload(opts.SubjectIDs)
	return a.IstioCA.SignWithCertChain(csr, opts)
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

// workloadOf is what injection and istiod's registry call the workload of a pod.
func workloadOf(pod *corev1.Pod, cluster string) workload.Workload {
	deployment, _ := kube.GetWorkloadMetaFromPod(pod)
	service, revision := labels.CanonicalService(pod.Labels, deployment.Name)
	return workload.Workload{
		Name: deployment.Name, Namespace: pod.Namespace, CanonicalService: service, CanonicalRevision: revision,
		Cluster: cluster, App: pod.Labels["app"], Version: pod.Labels["version"],
	}
}
