package certify

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net/url"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"istio.io/istio/pilot/pkg/bootstrap"
	"istio.io/istio/pkg/security"
	"istio.io/istio/security/pkg/pki/ca"
	caserver "istio.io/istio/security/pkg/server/ca"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"polymesh.dev/polymesh/pkg/mesh/workload"
)

// TestWithWorkload signs a certificate like istiod's again: all in it stays, and one name comes.
func TestWithWorkload(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	root := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "root"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, SubjectKeyId: []byte{1, 2, 3},
	}
	id := &url.URL{Scheme: "spiffe", Host: "cluster.local", Path: "/ns/demo/sa/b"}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(42), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Minute), URIs: []*url.URL{id},
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment, BasicConstraintsValid: true,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	leafKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	before := certificate(t, template, root, &leafKey.PublicKey, key)
	w := workload.Workload{Name: "b-v1", Namespace: "demo", CanonicalService: "b", CanonicalRevision: "v1", Cluster: "Kubernetes", App: "b", Version: "v1"}
	signed, err := WithWorkload(before, root, key, w)
	if err != nil {
		t.Fatal(err)
	}
	was, is := parse(t, before), parse(t, signed)
	ca := parse(t, certificate(t, root, root, &key.PublicKey, key))
	roots := x509.NewCertPool()
	roots.AddCert(ca)
	if _, err := is.Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err != nil {
		t.Errorf("it does not verify: %v", err)
	}
	if len(is.URIs) != 1 || is.URIs[0].String() != id.String() || len(is.DNSNames) != 0 || len(is.UnhandledCriticalExtensions) != 0 {
		t.Errorf("the identities are %v and %v, unhandled %v", is.URIs, is.DNSNames, is.UnhandledCriticalExtensions)
	}
	if is.SerialNumber.Cmp(was.SerialNumber) != 0 || !is.NotAfter.Equal(was.NotAfter) || !is.NotBefore.Equal(was.NotBefore) ||
		is.KeyUsage != was.KeyUsage || !slices.Equal(is.ExtKeyUsage, was.ExtKeyUsage) || !leafKey.PublicKey.Equal(is.PublicKey) || is.Subject.String() != was.Subject.String() {
		t.Errorf("something else changed: %+v, was %+v", is, was)
	}
	if !strings.Contains(string(is.Raw), w.String()) {
		t.Error("it does not name the workload")
	}
}

func certificate(t *testing.T, template, parent *x509.Certificate, public any, key *ecdsa.PrivateKey) []byte {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, template, parent, public, key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

func parse(t *testing.T, text []byte) *x509.Certificate {
	t.Helper()
	block, _ := pem.Decode(text)
	c, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

type caller struct{ security.Caller }

func (c caller) Authenticate(security.AuthContext) (*security.Caller, error) { return &c.Caller, nil }
func (caller) AuthenticatorType() string                                     { return "test" }

// The workload of a token's pod reaches the CA, and no certificate.
func TestWorkloadAmongIdentities(t *testing.T) {
	const id = "spiffe://cluster.local/ns/demo/sa/b"
	demo := workload.Workload{Name: "b-v1", Namespace: "demo", CanonicalService: "b", CanonicalRevision: "v1", Cluster: "Kubernetes", App: "b", Version: "v1"}
	find := func(_ context.Context, info security.KubernetesInfo) (workload.Workload, error) {
		if info.PodName == "gone" {
			return workload.Workload{}, errors.New("there is no such pod")
		}
		return demo, nil
	}
	for pod, want := range map[string]*workload.Workload{"": nil, "gone": nil, "b-7d9f-x2": &demo} {
		c := security.Caller{Identities: []string{id}, KubernetesInfo: security.KubernetesInfo{PodName: pod, PodNamespace: "demo"}}
		got, err := podAuthenticator{caller{c}, find}.Authenticate(security.AuthContext{})
		if err != nil {
			t.Fatal(err)
		}
		rest, found := cutWorkload(got.Identities)
		if !slices.Equal(rest, []string{id}) || (found == nil) != (want == nil) || found != nil && *found != *want {
			t.Errorf("of pod %q: identities %v, workload %v", pod, rest, found)
		}
		if len(c.Identities) != 1 {
			t.Errorf("the caller itself was changed: %v", c.Identities)
		}
	}
}

// TestInstall: Istio's certificate service is where Install looks for it, and has our CA and our authenticators afterwards.
func TestInstall(t *testing.T) {
	istiod := &bootstrap.Server{CA: &ca.IstioCA{}}
	field, err := unexportedField(istiod)
	if err != nil {
		t.Fatal(err)
	}
	service := &caserver.Server{Authenticators: []security.Authenticator{caller{}}}
	signer := reflect.ValueOf(service).Elem().FieldByName("ca")
	reflect.NewAt(signer.Type(), signer.Addr().UnsafePointer()).Elem().Set(reflect.ValueOf(istiod.CA))
	*field = service
	if err := Install(istiod, nil, "Kubernetes"); err != nil {
		t.Fatal(err)
	}
	got, err := unexported[caserver.CertificateAuthority](reflect.ValueOf(service).Elem(), "ca")
	if err != nil {
		t.Fatal(err)
	}
	if a, ours := (*got).(authority); !ours || a.IstioCA != istiod.CA {
		t.Errorf("the service's CA is %T", *got)
	}
	if _, ours := service.Authenticators[0].(podAuthenticator); !ours {
		t.Errorf("its authenticator is %T", service.Authenticators[0])
	}
	if err := Install(&bootstrap.Server{CA: &ca.IstioCA{}}, nil, ""); err == nil {
		t.Error("an istiod without the service is taken")
	}
}

func unexportedField(istiod *bootstrap.Server) (**caserver.Server, error) {
	field := reflect.ValueOf(istiod).Elem().FieldByName("caServer")
	if !field.IsValid() {
		return nil, errors.New("no field caServer")
	}
	return (**caserver.Server)(field.Addr().UnsafePointer()), nil
}

func TestWorkloadOf(t *testing.T) {
	controller := true
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{
		Name: "b-v1-5d8f7c9b6d-abcde", GenerateName: "b-v1-5d8f7c9b6d-", Namespace: "demo",
		Labels:          map[string]string{"app": "b", "version": "v1", "pod-template-hash": "5d8f7c9b6d", "service.istio.io/canonical-name": "shop"},
		OwnerReferences: []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: "ReplicaSet", Name: "b-v1-5d8f7c9b6d", Controller: &controller}},
	}}
	want := workload.Workload{Name: "b-v1", Namespace: "demo", CanonicalService: "shop", CanonicalRevision: "v1", Cluster: "Kubernetes", App: "b", Version: "v1"}
	if got := workloadOf(pod, "Kubernetes"); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
}
