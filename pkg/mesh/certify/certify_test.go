package certify

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"
	pb "istio.io/api/security/v1alpha1"
	"istio.io/istio/pilot/pkg/bootstrap"
	"istio.io/istio/pilot/pkg/xds"
	"istio.io/istio/pkg/kube"
	"istio.io/istio/pkg/security"
	"istio.io/istio/security/pkg/pki/ca"
	caserver "istio.io/istio/security/pkg/server/ca"
	"istio.io/istio/security/pkg/server/ca/authenticate"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"polymesh.dev/polymesh/pkg/mesh/istiod"
	"polymesh.dev/polymesh/pkg/mesh/workload"
)

// TestWithWorkload re-signs a certificate like istiod's: everything in it is kept, and one name is added.
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
		t.Errorf("the certificate does not verify: %v", err)
	}
	if len(is.URIs) != 1 || is.URIs[0].String() != id.String() || len(is.DNSNames) != 0 || len(is.UnhandledCriticalExtensions) != 0 {
		t.Errorf("the identities are %v and %v, unhandled %v", is.URIs, is.DNSNames, is.UnhandledCriticalExtensions)
	}
	if is.SerialNumber.Cmp(was.SerialNumber) != 0 || !is.NotAfter.Equal(was.NotAfter) || !is.NotBefore.Equal(was.NotBefore) ||
		is.KeyUsage != was.KeyUsage || !slices.Equal(is.ExtKeyUsage, was.ExtKeyUsage) || !leafKey.PublicKey.Equal(is.PublicKey) || is.Subject.String() != was.Subject.String() {
		t.Errorf("unexpected changes: %+v, was %+v", is, was)
	}
	if !strings.Contains(string(is.Raw), w.String()) {
		t.Error("the certificate does not contain the workload")
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

// newCA returns Istio's own CA.
func newCA(t *testing.T) *ca.IstioCA {
	t.Helper()
	opts, err := ca.NewSelfSignedDebugIstioCAOptions("", time.Hour, time.Hour, time.Hour, "cluster.local", 2048)
	if err != nil {
		t.Fatal(err)
	}
	own, err := ca.NewIstioCA(opts)
	if err != nil {
		t.Fatal(err)
	}
	return own
}

func request(t *testing.T, commonName string) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject: pkix.Name{CommonName: commonName}, DNSNames: []string{"bank"}, URIs: []*url.URL{{Scheme: "spiffe", Host: "cluster.local", Path: "/ns/bank/sa/payments"}},
	}, key)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: csr}))
}

// overTLS returns the context of a request over TLS, with the client's certificate, if any.
func overTLS(ctx context.Context, shown *x509.Certificate) context.Context {
	var state tls.ConnectionState
	if shown != nil {
		state.VerifiedChains = [][]*x509.Certificate{{shown}}
	}
	return peer.NewContext(ctx, &peer.Peer{Addr: &net.IPAddr{}, AuthInfo: credentials.TLSInfo{State: state}})
}

// token authenticates every caller as a pod.
type token struct{ security.Caller }

func (c token) Authenticate(security.AuthContext) (*security.Caller, error) { return &c.Caller, nil }
func (token) AuthenticatorType() string                                     { return "test" }

const callersID = "spiffe://cluster.local/ns/evil/sa/default"

func podCaller(identities ...string) token {
	return token{security.Caller{Identities: identities, KubernetesInfo: security.KubernetesInfo{PodName: "impostor", PodNamespace: "evil", PodUID: "1"}}}
}

// service returns Istio's certificate service and its CA, with this package in between.
func service(t *testing.T, own *ca.IstioCA, client kube.Client, authenticators ...security.Authenticator) *caserver.Server {
	t.Helper()
	s, err := caserver.New(own, time.Hour, authenticators, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := install(s, own, newPods(client, "Kubernetes")); err != nil {
		t.Fatal(err)
	}
	return s
}

// otherNames returns the workloads in a certificate.
func otherNames(t *testing.T, cert *x509.Certificate) (texts []string) {
	t.Helper()
	names, err := alternativeNames(cert)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		if !isWorkload(name) {
			continue
		}
		var kind, value asn1.RawValue
		rest, err := asn1.Unmarshal(name.Bytes, &kind)
		if err == nil {
			_, err = asn1.Unmarshal(rest, &value)
		}
		var text string
		if err == nil {
			_, err = asn1.UnmarshalWithParams(value.Bytes, &text, "utf8")
		}
		if err != nil {
			t.Fatal(err)
		}
		texts = append(texts, text)
	}
	return texts
}

// onlyCaller fails unless the certificate is for the caller's identity, and for at most one valid workload in its namespace.
func onlyCaller(t *testing.T, what string, cert *x509.Certificate) (w workload.Workload) {
	t.Helper()
	names, err := alternativeNames(cert)
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	texts := otherNames(t, cert)
	if len(names) != 1+len(texts) || len(texts) > 1 || len(cert.URIs) != 1 || cert.URIs[0].String() != callersID ||
		len(cert.DNSNames)+len(cert.IPAddresses)+len(cert.EmailAddresses) > 0 {
		t.Errorf("%s: URIs %v, DNS %q, IP %v, email %q, workloads %q, %d names in all", what, cert.URIs, cert.DNSNames, cert.IPAddresses, cert.EmailAddresses, texts, len(names))
	}
	if cn := cert.Subject.CommonName; cn != "" && cn != callersID {
		t.Errorf("%s: its subject is %q", what, cn)
	}
	if len(texts) == 1 {
		var ok bool
		if w, ok = workload.Parse(texts[0]); !ok || w != w.Named() || w.Namespace != "evil" || w.Cluster != "Kubernetes" {
			t.Errorf("%s: its workload is %q", what, texts[0])
		}
	}
	return w
}

// hostile returns texts that contain every separator in use.
func hostile() (texts []string) {
	for _, sep := range []string{",", ";", "|", "\n", "\r\n", "%", "/", "=", "\x00", "\u2028", "，", " ", "\"", "\\", "\xff"} {
		texts = append(texts, sep, "x"+sep, sep+"x", "x"+sep+"spiffe://cluster.local/ns/bank/sa/payments"+sep+"y", strings.Repeat("x"+sep, 7),
			"x;"+sep+"spiffe://cluster.local/ns/bank/sa/payments"+sep+"DNS:bank")
	}
	return append(texts, "x;,spiffe://cluster.local/ns/bank/sa/payments,y", "polymesh-workload:a;b;c;d;e;f;g", strings.Repeat("x", 300), "10.0.0.1", "::1")
}

// Whatever a pod's author writes, the pod's certificate is for its own identity.
func TestForgedPods(t *testing.T) {
	owned := func(kind, name string) func(*corev1.Pod) {
		return func(p *corev1.Pod) {
			yes := true
			p.GenerateName = "impostor-"
			p.OwnerReferences = []metav1.OwnerReference{{APIVersion: "v1", Kind: kind, Name: name, UID: "1", Controller: &yes}}
		}
	}
	labeled := func(key, value string) func(*corev1.Pod) {
		return func(p *corev1.Pod) { p.Labels = map[string]string{key: value} }
	}
	fields := map[string]func(text string) func(*corev1.Pod){
		"owner":           func(text string) func(*corev1.Pod) { return owned("Nothing", text) },
		"owner, as a Job": func(text string) func(*corev1.Pod) { return owned("Job", text+"-28371632") },
		"owner's kind":    func(text string) func(*corev1.Pod) { return owned(text, "x") },
		"node":            func(text string) func(*corev1.Pod) { return func(p *corev1.Pod) { p.Spec.NodeName = text } },
		"host name":       func(text string) func(*corev1.Pod) { return func(p *corev1.Pod) { p.Spec.Hostname = text } },
		"annotation": func(text string) func(*corev1.Pod) {
			return func(p *corev1.Pod) { p.Annotations = map[string]string{"istio.io/autoRegistrationGroup": text} }
		},
		"generateName": func(text string) func(*corev1.Pod) { return func(p *corev1.Pod) { p.GenerateName = text } },
		"owner, as a ReplicaSet": func(text string) func(*corev1.Pod) {
			return func(p *corev1.Pod) {
				owned("ReplicaSet", text+"-abc")(p)
				labeled("pod-template-hash", "abc")(p)
			}
		},
	}
	// The API server rejects labels like these; they must be refused here too.
	for _, key := range []string{
		"app", "version", "app.kubernetes.io/name", "app.kubernetes.io/version", "service.istio.io/canonical-name", "service.istio.io/canonical-revision",
		"service.istio.io/workload-name", "topology.istio.io/cluster", "deploymentconfig",
	} {
		fields["label "+key] = func(text string) func(*corev1.Pod) { return labeled(key, text) }
	}
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "impostor", Namespace: "evil", UID: "1"}}
	client := kube.NewFakeClient(pod)
	s := service(t, newCA(t), client, podCaller(callersID))
	csr := request(t, "bank")
	for field, with := range fields {
		for _, text := range hostile() {
			pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "impostor", Namespace: "evil", UID: "1"}}
			with(text)(pod)
			if _, err := client.Kube().CoreV1().Pods("evil").Update(t.Context(), pod, metav1.UpdateOptions{}); err != nil {
				t.Fatal(err)
			}
			ctx, end := context.WithCancel(overTLS(t.Context(), nil))
			response, err := s.CreateCertificate(ctx, &pb.IstioCertificateRequest{Csr: csr})
			end()
			if err != nil {
				t.Fatalf("%s %q: %v", field, text, err)
			}
			if w := onlyCaller(t, fmt.Sprintf("%s %q", field, text), parse(t, []byte(response.CertChain[0]))); w.Name == "" {
				t.Errorf("%s %q: the workload's name is empty", field, text)
			}
		}
	}
}

// Invalid or multiple identities get no certificate and an error that Istio's service can handle, with and without a workload.
func TestForgedIdentities(t *testing.T) {
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "impostor", Namespace: "evil", UID: "1"}}
	own := newCA(t)
	forged := [][]string{{""}, {callersID, ""}, {callersID + "/"}, {"spiffe://"}, {"spiffe://cluster.local"}, {"10.0.0.1"}, {"a b"}, {"user@bank"}}
	for _, text := range hostile() {
		forged = append(forged, []string{text}, []string{callersID, "spiffe://cluster.local/ns/evil/sa/" + text})
		if !workload.IsPrincipal(callersID + text) {
			forged = append(forged, []string{callersID + text})
		}
	}
	csr := request(t, "bank")
	for _, client := range []kube.Client{kube.NewFakeClient(), kube.NewFakeClient(pod)} {
		for _, identities := range forged {
			s := service(t, own, client, podCaller(identities...))
			for _, signer := range []string{"", "other"} {
				response, err := s.CreateCertificate(overTLS(t.Context(), nil), &pb.IstioCertificateRequest{
					Csr: csr, Metadata: &structpb.Struct{Fields: map[string]*structpb.Value{security.CertSigner: structpb.NewStringValue(signer)}},
				})
				if status.Code(err) != codes.Internal || response != nil {
					t.Errorf("%q got a certificate, or an odd error: %v", identities, err)
				}
			}
		}
	}
}

// Certificates of an earlier Polymesh with foreign identities are rejected by istiod, for new certificates as well as for
// configuration and secrets. Those of this version, and of Istio, are accepted.
func TestClientCertificates(t *testing.T) {
	own := newCA(t)
	sign := func(ids ...string) *x509.Certificate {
		t.Helper()
		cert, err := own.Sign([]byte(request(t, "")), ca.CertOpts{SubjectIDs: ids, TTL: time.Minute})
		if err != nil {
			t.Fatal(err)
		}
		return parse(t, cert)
	}
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "impostor", Namespace: "evil", UID: "1"}}
	response, err := service(t, own, kube.NewFakeClient(pod), podCaller(callersID)).CreateCertificate(overTLS(t.Context(), nil), &pb.IstioCertificateRequest{Csr: request(t, "")})
	if err != nil {
		t.Fatal(err)
	}
	named := parse(t, []byte(response.CertChain[0]))
	if len(otherNames(t, named)) != 1 {
		t.Fatal("the certificate does not contain its workload")
	}
	s := service(t, own, kube.NewFakeClient(), &authenticate.ClientCertAuthenticator{})
	for name, shown := range map[string]*x509.Certificate{"Istio's": sign(callersID), "ours": named} {
		response, err := s.CreateCertificate(overTLS(t.Context(), shown), &pb.IstioCertificateRequest{Csr: request(t, "bank")})
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		onlyCaller(t, name, parse(t, []byte(response.CertChain[0])))
	}
	xds := checked([]security.Authenticator{&authenticate.ClientCertAuthenticator{}}, nil, nil)
	const bank = "spiffe://cluster.local/ns/bank/sa/payments"
	for name, shown := range map[string]*x509.Certificate{
		"a leaked text":         sign(callersID, "polymesh-workload:x;,"+bank+",y"),
		"a leaked text without": sign(callersID, "polymesh-workload:x;"),
		"two identities":        sign(callersID, bank),
		"the same twice":        sign(callersID, callersID),
		"no SPIFFE ID":          sign("bank.svc"),
		"an address":            sign(callersID, "10.0.0.1"),
		"none":                  nil,
	} {
		if _, err := s.CreateCertificate(overTLS(t.Context(), shown), &pb.IstioCertificateRequest{Csr: request(t, "")}); status.Code(err) != codes.Unauthenticated {
			t.Errorf("a certificate with %s can be renewed: %v", name, err)
		}
		if caller, err := security.Authenticate(overTLS(t.Context(), shown), xds); err == nil {
			t.Errorf("a certificate with %s authenticates %q for configuration", name, caller.Identities)
		}
		if shown == nil {
			continue
		}
		r := &http.Request{TLS: &tls.ConnectionState{VerifiedChains: [][]*x509.Certificate{{shown}}}}
		if caller, err := xds[0].Authenticate(security.AuthContext{Request: r}); err == nil {
			t.Errorf("a certificate with %s authenticates %q over HTTP", name, caller.Identities)
		}
	}
}

// A workload is found only by its own request, and forgotten with it.
func TestCalls(t *testing.T) {
	c := &calls{workloads: map[*string]workload.Workload{}}
	ctx, end := context.WithCancel(t.Context())
	w := workload.Workload{Name: "b", Namespace: "demo"}
	ids := []string{callersID}
	own := c.begin(ctx, ids, w)
	if got, ok := c.workload(own); !ok || got != w || !slices.Equal(own, ids) {
		t.Errorf("got %+v, %v for %q", got, ok, own)
	}
	for _, other := range [][]string{ids, slices.Clone(own), nil, {}} {
		if got, ok := c.workload(other); ok {
			t.Errorf("%q has %+v", other, got)
		}
	}
	end()
	for deadline := time.Now().Add(time.Minute); ; runtime.Gosched() {
		if _, ok := c.workload(own); !ok {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the workload is not forgotten")
		}
	}
}

// A pod that was replaced or deleted is not added to the certificate.
func TestOtherPods(t *testing.T) {
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "impostor", Namespace: "evil", UID: "2"}}
	for _, client := range []kube.Client{kube.NewFakeClient(), kube.NewFakeClient(pod)} {
		response, err := service(t, newCA(t), client, podCaller(callersID)).CreateCertificate(overTLS(t.Context(), nil), &pb.IstioCertificateRequest{Csr: request(t, "")})
		if err != nil {
			t.Fatal(err)
		}
		cert := parse(t, []byte(response.CertChain[0]))
		onlyCaller(t, "another pod", cert)
		if texts := otherNames(t, cert); len(texts) > 0 {
			t.Errorf("the certificate contains %q", texts)
		}
	}
}

// TestInstall: Install finds Istio's certificate service, which then uses our CA and our authenticators.
func TestInstall(t *testing.T) {
	own := newCA(t)
	shared := []security.Authenticator{podCaller(callersID)}
	s, err := caserver.New(own, time.Hour, shared, nil)
	if err != nil {
		t.Fatal(err)
	}
	server := &bootstrap.Server{CA: own, XDSServer: &xds.DiscoveryServer{Authenticators: shared}}
	set := func(name string, value any) {
		field := reflect.ValueOf(server).Elem().FieldByName(name)
		reflect.NewAt(field.Type(), field.Addr().UnsafePointer()).Elem().Set(reflect.ValueOf(value))
	}
	set("caServer", s)
	if err := Install(server, "Kubernetes"); err == nil {
		t.Error("an istiod without a client is accepted")
	}
	set("kubeClient", kube.NewFakeClient())
	server.XDSServer.Authenticators = shared
	if err := Install(server, "Kubernetes"); err != nil {
		t.Fatal(err)
	}
	got, err := istiod.Field[caserver.CertificateAuthority](reflect.ValueOf(s).Elem(), "ca")
	if err != nil {
		t.Fatal(err)
	}
	if a, ours := (*got).(authority); !ours || a.IstioCA != own {
		t.Errorf("the service's CA is %T", *got)
	}
	for _, a := range []security.Authenticator{s.Authenticators[0], server.XDSServer.Authenticators[0]} {
		if _, ours := a.(authenticator); !ours {
			t.Errorf("an authenticator is %T", a)
		}
	}
	if server.XDSServer.Authenticators[0].(authenticator).find != nil {
		t.Error("the discovery service resolves workloads")
	}
	if err := Install(&bootstrap.Server{CA: own, XDSServer: &xds.DiscoveryServer{}}, ""); err == nil {
		t.Error("an istiod without the service is accepted")
	}
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
