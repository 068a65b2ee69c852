//go:build e2e

package e2e

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/asn1"
	"encoding/pem"
	"fmt"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	pb "istio.io/api/security/v1alpha1"
	authenticationv1 "k8s.io/api/authentication/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// wantOnly fails unless a certificate is for one identity, and for no other name that a proxy or istiod reads.
func wantOnly(t *testing.T, cert *x509.Certificate, identity string) {
	t.Helper()
	var names []asn1.RawValue
	for _, e := range cert.Extensions {
		if e.Id.Equal(asn1.ObjectIdentifier{2, 5, 29, 17}) {
			if _, err := asn1.Unmarshal(e.Value, &names); err != nil {
				t.Fatal(err)
			}
		}
	}
	const otherName = 0 // the workload's
	for i, name := range names {
		if i == 0 && string(name.Bytes) == identity || i == 1 && name.Tag == otherName && !strings.Contains(string(name.Bytes), "payments") {
			continue
		}
		t.Errorf("the certificate has the name %q (%d of %d)", name.Bytes, i+1, len(names))
	}
	if len(cert.URIs) != 1 || cert.URIs[0].String() != identity || len(cert.DNSNames) > 0 {
		t.Errorf("the certificate is for %v %q, want %s only", cert.URIs, cert.DNSNames, identity)
	}
}

// A user who may create pods in one namespace gets no identity of another namespace, whatever the pod contains.
func TestImpostor(t *testing.T) {
	s := newScenario(t, "impostor")
	const (
		bank     = "impostor-bank"
		identity = "spiffe://cluster.local/ns/impostor/sa/default"
		url      = "http://server." + bank + ":8080/"
	)
	for _, deployment := range []string{"server", "payments"} {
		s.WaitRollout(t, bank, "deployment/"+deployment)
	}
	s.apply("policy.yaml", "impostor.yaml")
	s.Kubectl(t, "wait", "-n", s.name, "pod/impostor", "--for=condition=Ready", "--timeout=2m")

	// get is a call's status, and what came with it.
	get := func(namespace, from string) (int, string) {
		out, err := s.KubectlErr("exec", "-n", namespace, from, "-c", "echo", "--", "/echo", "get", url)
		if err == nil {
			return http.StatusOK, out
		}
		status := 0
		_, after, _ := strings.Cut(err.Error(), "echo: status ")
		_, _ = fmt.Sscan(after, &status)
		return status, err.Error()
	}
	// The policy is in force when the neighbour is rejected; only then the others' answers say something.
	for _, want := range []struct {
		namespace, from string
		status          int
	}{
		{s.name, "deployment/neighbour", http.StatusForbidden},
		{s.name, "pod/impostor", http.StatusForbidden},
		{bank, "deployment/payments", http.StatusOK},
		{s.name, "pod/impostor", http.StatusForbidden},
	} {
		s.Eventually(t, time.Minute, func() (bool, string) {
			status, text := get(want.namespace, want.from)
			return status == want.status && (status != http.StatusForbidden || strings.Contains(text, accessDenied)),
				fmt.Sprintf("%s in %s: status %d, want %d: %s", want.from, want.namespace, status, want.status, text)
		})
	}
	t.Run("its certificate", func(t *testing.T) {
		s := s.in(t)
		chain, _, err := s.secretsOf("pod/impostor")
		if err != nil {
			t.Fatal(err)
		}
		wantOnly(t, certificates(chain)[0], identity)
	})
	t.Run("what the server says of it", func(t *testing.T) {
		labels := map[string]string{
			"reporter": "destination", "source_principal": identity, "source_workload": "impostor", "source_workload_namespace": "impostor",
			"source_canonical_service": "c", "source_canonical_revision": "r", "destination_workload": "server", "response_code": "403",
		}
		s.Eventually(t, time.Minute, func() (bool, string) {
			n := requestsIn(t, s.Node, bank, "server", labels)
			return n >= 2, fmt.Sprintf("the server has counted %v requests of %v, want 2 or more", n, labels)
		})
	})
	t.Run("a token by hand", func(t *testing.T) {
		cert, err := s.sign(t, "impostor")
		if err != nil {
			t.Fatal(err)
		}
		wantOnly(t, cert, identity)
	})
}

// sign asks istiod for a certificate with the token of a pod, as the kubelet mounts it for sidecars.
func (s *scenario) sign(t *testing.T, pod string) (*x509.Certificate, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	client := s.Client(t)
	found, err := client.CoreV1().Pods(s.name).Get(ctx, pod, metav1.GetOptions{})
	if err != nil {
		return nil, err
	}
	token, err := client.CoreV1().ServiceAccounts(s.name).CreateToken(ctx, found.Spec.ServiceAccountName, &authenticationv1.TokenRequest{
		Spec: authenticationv1.TokenRequestSpec{
			Audiences: []string{"istio-ca"}, BoundObjectRef: &authenticationv1.BoundObjectReference{Kind: "Pod", APIVersion: "v1", Name: pod, UID: found.UID},
		},
	}, metav1.CreateOptions{})
	if err != nil {
		return nil, err
	}
	root, err := client.CoreV1().ConfigMaps(s.name).Get(ctx, "istio-ca-root-cert", metav1.GetOptions{})
	if err != nil {
		return nil, err
	}
	service, err := client.CoreV1().Services("istio-system").Get(ctx, "istiod", metav1.GetOptions{})
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM([]byte(root.Data["root-cert.pem"]))
	conn, err := grpc.NewClient("passthrough:///"+net.JoinHostPort(service.Spec.ClusterIP, "15012"),
		grpc.WithTransportCredentials(credentials.NewClientTLSFromCert(roots, "istiod.istio-system.svc")),
		grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) { return s.Dial(ctx, "tcp", address) }))
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{DNSNames: []string{"server.impostor-bank.svc"}}, key)
	if err != nil {
		return nil, err
	}
	response, err := pb.NewIstioCertificateServiceClient(conn).CreateCertificate(
		metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+token.Status.Token, "clusterid", "Kubernetes"),
		&pb.IstioCertificateRequest{Csr: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: csr}))})
	if err != nil {
		return nil, err
	}
	return certificates([]byte(response.CertChain[0]))[0], nil
}
