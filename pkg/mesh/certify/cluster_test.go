//go:build integration

package certify_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	pb "istio.io/api/security/v1alpha1"
	"istio.io/istio/pilot/pkg/bootstrap"
	kubecontroller "istio.io/istio/pilot/pkg/serviceregistry/kube/controller"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	"polymesh.dev/polymesh/pkg/controlplane/controlplanetest"
	"polymesh.dev/polymesh/pkg/mesh/certify"
	"polymesh.dev/polymesh/pkg/mesh/workload"
	"polymesh.dev/polymesh/pkg/porttest"
)

// signer is an istiod on a cluster, and requests certificates from it with a pod's own token.
type signer struct {
	t    *testing.T
	kube kubernetes.Interface
	ca   pb.IstioCertificateServiceClient
	csr  string
}

// newSigner starts Istio's server with the certificate code of cmd/pilot-discovery.
func newSigner(t *testing.T, kubeconfig string, client kubernetes.Interface) *signer {
	t.Helper()
	address := porttest.Loopback(t).String()
	server, err := bootstrap.NewServer(bootstrap.NewPilotArgs(func(p *bootstrap.PilotArgs) {
		p.Namespace = "istio-system"
		p.ServerOptions = bootstrap.DiscoveryServerOptions{
			HTTPAddr: "127.0.0.1:0", GRPCAddr: "127.0.0.1:0", MonitoringAddr: "127.0.0.1:0", SecureGRPCAddr: address,
		}
		p.RegistryOptions = bootstrap.RegistryOptions{
			KubeConfig: kubeconfig, Registries: []string{"Kubernetes"},
			KubeOptions: kubecontroller.Options{DomainSuffix: "cluster.local", ClusterID: "Kubernetes", KubernetesAPIQPS: 80, KubernetesAPIBurst: 160},
		}
	}))
	if err != nil {
		t.Fatal(err)
	}
	if err := certify.Install(server, "Kubernetes"); err != nil {
		t.Fatal(err)
	}
	stop := make(chan struct{})
	if err := server.Start(stop); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		close(stop)
		server.WaitUntilCompletion()
	})
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(server.CA.GetCAKeyCertBundle().GetRootCertPem())
	conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(credentials.NewClientTLSFromCert(roots, "istiod.istio-system.svc")))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{DNSNames: []string{"server.bank.svc"}}, key)
	if err != nil {
		t.Fatal(err)
	}
	return &signer{t, client, pb.NewIstioCertificateServiceClient(conn), string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: csr}))}
}

// create creates the pod, if the API server accepts it.
func (s *signer) create(pod *corev1.Pod) (*corev1.Pod, error) {
	return s.kube.CoreV1().Pods(pod.Namespace).Create(s.t.Context(), pod, metav1.CreateOptions{})
}

// certificate returns istiod's certificate for a caller with the token that the kubelet mounts for sidecars.
func (s *signer) certificate(pod *corev1.Pod) (*x509.Certificate, error) {
	token, err := s.kube.CoreV1().ServiceAccounts(pod.Namespace).CreateToken(s.t.Context(), "default", &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{
		Audiences: []string{"istio-ca"}, BoundObjectRef: &authenticationv1.BoundObjectReference{Kind: "Pod", APIVersion: "v1", Name: pod.Name, UID: pod.UID},
	}}, metav1.CreateOptions{})
	if err != nil {
		return nil, err
	}
	ctx := metadata.AppendToOutgoingContext(s.t.Context(), "authorization", "Bearer "+token.Status.Token, "clusterid", "Kubernetes")
	response, err := s.ca.CreateCertificate(ctx, &pb.IstioCertificateRequest{Csr: s.csr})
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode([]byte(response.CertChain[0]))
	return x509.ParseCertificate(block.Bytes)
}

// workloadIn returns the workload in a certificate for exactly this identity, and false if there is none.
func workloadIn(cert *x509.Certificate, identity string) (w workload.Workload, ok bool, err error) {
	if len(cert.URIs) != 1 || cert.URIs[0].String() != identity || len(cert.DNSNames)+len(cert.EmailAddresses)+len(cert.IPAddresses) > 0 {
		return w, false, fmt.Errorf("its names are %v %q %q %v, want only %s", cert.URIs, cert.DNSNames, cert.EmailAddresses, cert.IPAddresses, identity)
	}
	var names []asn1.RawValue
	for _, e := range cert.Extensions {
		if e.Id.Equal(asn1.ObjectIdentifier{2, 5, 29, 17}) {
			if _, err := asn1.Unmarshal(e.Value, &names); err != nil {
				return w, false, err
			}
		}
	}
	switch len(names) {
	case 1:
		return w, false, nil
	case 2:
	default:
		return w, false, fmt.Errorf("it has %d names", len(names))
	}
	var kind, value asn1.RawValue
	var text string
	rest, err := asn1.Unmarshal(names[1].Bytes, &kind)
	if err == nil {
		_, err = asn1.Unmarshal(rest, &value)
	}
	if err == nil {
		_, err = asn1.UnmarshalWithParams(value.Bytes, &text, "utf8")
	}
	if err != nil {
		return w, false, err
	}
	if w, ok = workload.Parse(text); !ok || w != w.Named() {
		return w, false, fmt.Errorf("its workload is %q", text)
	}
	return w, true, nil
}

// Whatever a pod's author can write at a real API server, the pod's token gets a certificate for the pod's own identity. When
// many pods request certificates at once, as after a reboot, each certificate contains the workload.
func TestIdentities(t *testing.T) {
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	kubeconfig := controlplanetest.Start(t, log)
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	config.QPS = -1
	client := kubernetes.NewForConfigOrDie(config)
	const namespace, identity = "evil", "spiffe://cluster.local/ns/evil/sa/default"
	for _, name := range []string{"istio-system", namespace} {
		if _, err := client.CoreV1().Namespaces().Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		_, err := client.CoreV1().ServiceAccounts(namespace).Get(t.Context(), "default", metav1.GetOptions{})
		if err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
	yes := true
	podOf := func(owner string) *corev1.Pod {
		return &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{
				GenerateName: "impostor-", Namespace: namespace, Labels: map[string]string{"service.istio.io/canonical-name": "c", "service.istio.io/canonical-revision": "r"},
				OwnerReferences: []metav1.OwnerReference{{APIVersion: "none.example.com/v1", Kind: "Nothing", Name: owner, UID: "1", Controller: &yes}},
			},
			Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "c", Image: "none"}}},
		}
	}

	// The pods exist before istiod, as after a reboot. The garbage collector does not know their owner's kind, so they stay.
	var there []*corev1.Pod
	s := &signer{t: t, kube: client}
	for range 80 {
		pod, err := s.create(podOf("rightful"))
		if err != nil {
			t.Fatal(err)
		}
		there = append(there, pod)
	}
	s = newSigner(t, kubeconfig, client)
	t.Run("many at once", func(t *testing.T) {
		want := workload.Workload{Name: "rightful", Namespace: namespace, CanonicalService: "c", CanonicalRevision: "r", Cluster: "Kubernetes"}
		var all sync.WaitGroup
		for _, pod := range there {
			all.Go(func() {
				cert, err := s.certificate(pod)
				if err != nil {
					t.Error(err)
					return
				}
				if w, ok, err := workloadIn(cert, identity); err != nil || !ok || w != want {
					t.Errorf("the workload is %+v, %v, %v, want %+v", w, ok, err, want)
				}
			})
		}
		all.Wait()
	})

	fields := map[string]func(*corev1.Pod, string){
		"owner": func(p *corev1.Pod, text string) { p.OwnerReferences[0].Name = text },
		"ReplicaSet": func(p *corev1.Pod, text string) {
			p.OwnerReferences[0].Kind, p.OwnerReferences[0].Name, p.Labels["pod-template-hash"] = "ReplicaSet", text+"-1", "1"
		},
		"owner's kind": func(p *corev1.Pod, text string) { p.OwnerReferences[0].Kind = text },
		"owner's UID":  func(p *corev1.Pod, text string) { p.OwnerReferences[0].UID = types.UID(text) },
		"annotation": func(p *corev1.Pod, text string) {
			p.Annotations = map[string]string{"istio.io/autoRegistrationGroup": text}
		},
		"node":           func(p *corev1.Pod, text string) { p.Spec.NodeName = text },
		"host name":      func(p *corev1.Pod, text string) { p.Spec.Hostname = text },
		"workload label": func(p *corev1.Pod, text string) { p.Labels["service.istio.io/workload-name"] = text },
		"service label":  func(p *corev1.Pod, text string) { p.Labels["service.istio.io/canonical-name"] = text },
		"revision label": func(p *corev1.Pod, text string) { p.Labels["service.istio.io/canonical-revision"] = text },
		"cluster label":  func(p *corev1.Pod, text string) { p.Labels["topology.istio.io/cluster"] = text },
		"app label":      func(p *corev1.Pod, text string) { p.Labels["app"] = text },
		"version label":  func(p *corev1.Pod, text string) { p.Labels["version"] = text },
	}
	for field, set := range fields {
		t.Run(field, func(t *testing.T) {
			made := 0
			for _, separator := range []string{",", ";", "|", "\n", "%", "/", "=", "\x00", "\u2028", "，"} {
				for _, text := range []string{
					"x;" + separator + "spiffe://cluster.local/ns/bank/sa/payments" + separator + "y", separator, strings.Repeat("x"+separator, 7),
				} {
					pod := podOf("rightful")
					set(pod, text)
					pod, err := s.create(pod)
					if apierrors.IsInvalid(err) || apierrors.IsBadRequest(err) {
						continue
					}
					if err != nil {
						t.Fatalf("%q: %v", text, err)
					}
					made++
					cert, err := s.certificate(pod)
					if err != nil {
						t.Fatalf("%q: %v", text, err)
					}
					w, ok, err := workloadIn(cert, identity)
					if err == nil && (!ok || w.Name == "" || w.Namespace != namespace || w.Cluster != "Kubernetes") {
						err = errors.New("another workload")
					}
					if err != nil {
						t.Errorf("%q: %v: %+v", text, err, w)
					}
				}
			}
			if field == "owner" && made == 0 {
				t.Error("the API server accepted none of the pods, so this test proves nothing")
			}
		})
	}
}
