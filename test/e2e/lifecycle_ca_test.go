//go:build e2e

package e2e

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"polymesh.dev/polymesh/test/e2e/node"
)

// The mesh moves from istiod's own authority to the user's, and from one of its intermediate authorities to the next,
// under STRICT mutual TLS and without a failed request. The test has its own node, because the roots of all proxies change.
func TestUserCA(t *testing.T) {
	ownNodes(t, 1)
	n := node.ForTest(t, node.Options{Args: []string{"--mesh-profile", "minimal"}})
	if err := n.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	n.WaitReady(t, 4*time.Minute)
	s := newScenarioOn(t, n, "user-ca")
	s.wantCaller("client", "spiffe://cluster.local/ns/user-ca/sa/default", "get", myService)
	sent, end := s.load(myService)

	own := istiodAuthority(t, n)
	root := newMeshAuthority(t, nil, "root", rsaKey(t))
	both := append(bytes.Clone(own.cert), root.cert...)
	first := newMeshAuthority(t, root, "intermediate 1", rsaKey(t))
	second := newMeshAuthority(t, root, "intermediate 2", ecdsaKey(t))

	s.wantAuthority(own, own.cert)
	for _, step := range []struct {
		what    string
		signer  *meshAuthority
		roots   []byte
		restart bool // istiod reads other roots only when it starts
	}{
		{"both roots", own, both, true},
		{"first intermediate", first, both, false},
		{"one root", first, root.cert, true},
		{"second intermediate", second, root.cert, false},
	} {
		ok := t.Run(step.what, func(t *testing.T) {
			s := s.in(t)
			before := istiod(t, n)
			s.plugIn(step.signer, step.roots)
			if step.restart {
				n.Kubectl(t, "rollout", "restart", "deployment/istiod", "-n", "istio-system")
				n.WaitRollout(t, "istio-system", "deployment/istiod")
			}
			s.wantAuthority(step.signer, step.roots)
			if after := istiod(t, n); (after != before) != step.restart {
				t.Errorf("istiod is %s and was %s, want another one: %v", after, before, step.restart)
			}
			s.wantCaller("client", "spiffe://cluster.local/ns/user-ca/sa/default", "get", myService)
		})
		if !ok {
			return // the next step builds on this one
		}
	}
	end()
	wantNoFailure(t, "the authorities changed", sent)
	// A pod that comes now knows nothing of what was.
	n.Kubectl(t, "rollout", "restart", "deployment/server", "-n", "user-ca")
	n.WaitRollout(t, "user-ca", "deployment/server")
	s.wantCaller("client", "spiffe://cluster.local/ns/user-ca/sa/default", "get", myService)
	s.wantAuthority(second, root.cert)
}

// meshAuthority is a certificate with its key, and with the certificates between it and its root.
type meshAuthority struct {
	name       string
	cert, key  []byte // PEM
	chain      []byte // its own certificate first, PEM; of a root, itself
	parsed     *x509.Certificate
	privateKey crypto.Signer
}

func rsaKey(t *testing.T) crypto.Signer {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func ecdsaKey(t *testing.T) crypto.Signer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// newMeshAuthority makes one that the parent has signed, or a root where there is none.
func newMeshAuthority(t *testing.T, parent *meshAuthority, name string, key crypto.Signer) *meshAuthority {
	t.Helper()
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{Organization: []string{"Polymesh's tests"}, CommonName: name},
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	by := &meshAuthority{parsed: template, privateKey: key}
	if parent != nil {
		by = parent
	}
	der, err := x509.CreateCertificate(rand.Reader, template, by.parsed, key.Public(), by.privateKey)
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	cert := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	return &meshAuthority{
		name: name, cert: cert, chain: cert, parsed: parsed, privateKey: key,
		key: pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private}),
	}
}

// istiodAuthority is the root that istiod has made for itself.
func istiodAuthority(t *testing.T, n *node.Node) *meshAuthority {
	t.Helper()
	secret, err := n.Client(t).CoreV1().Secrets("istio-system").Get(t.Context(), "istio-ca-secret", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	cert := secret.Data["ca-cert.pem"]
	block, _ := pem.Decode(cert)
	if block == nil {
		t.Fatal("istio-ca-secret has no ca-cert.pem")
	}
	parsed, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return &meshAuthority{name: "istiod's own", cert: cert, key: secret.Data["ca-key.pem"], chain: cert, parsed: parsed}
}

// plugIn gives istiod an authority to sign with, and the roots that all proxies trust, as the README does.
func (s *scenario) plugIn(signer *meshAuthority, roots []byte) {
	s.t.Helper()
	dir := s.t.TempDir()
	for name, content := range map[string][]byte{
		"ca-cert.pem": signer.cert, "ca-key.pem": signer.key, "cert-chain.pem": signer.chain, "root-cert.pem": roots,
	} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			s.t.Fatal(err)
		}
	}
	s.Apply(s.t, s.Kubectl(s.t, "create", "secret", "generic", "cacerts", "-n", "istio-system", "--from-file="+dir, "--dry-run=client", "-o", "yaml"))
}

// lookAgain makes the kubelet sync pods now, which updates their volumes. By default it does so once a
// minute.
func lookAgain(t *testing.T, n *node.Node, namespace, selector string) {
	t.Helper()
	n.Kubectl(t, "annotate", "pods", "-n", namespace, "-l", selector, "--overwrite", "e2e.polymesh.dev/look="+rand.Text())
}

// wantAuthority waits until both Envoys have a certificate that this authority has signed, which names the workload, and trust
// these roots only; and until their agents trust istiod by the same ones.
func (s *scenario) wantAuthority(signer *meshAuthority, roots []byte) {
	s.t.Helper()
	for _, deployment := range []string{"client", "server"} {
		s.Eventually(s.t, 5*time.Minute, func() (bool, string) {
			// Restarts of istiod and the kubelet's updates of the mounted ConfigMap come before this.
			if mounted := s.Kubectl(s.t, "exec", "-n", s.name, "deployment/"+deployment, "-c", "istio-proxy", "--", "cat", "/var/run/secrets/istio/root-cert.pem"); !sameCertificates([]byte(mounted), roots) {
				lookAgain(s.t, s.Node, s.name, "app="+deployment)
				return false, "the agent of " + deployment + " has yet other roots"
			}
			chain, trusted, err := s.secrets(deployment)
			if err != nil {
				return false, err.Error()
			}
			if !sameCertificates(trusted, roots) {
				return false, fmt.Sprintf("%s trusts yet other roots:\n%s", deployment, trusted)
			}
			certs := certificates(chain)
			if len(certs) == 0 {
				return false, deployment + " has no certificate"
			}
			leaf := certs[0]
			if err := leaf.CheckSignatureFrom(signer.parsed); err != nil {
				lookAgain(s.t, s.Node, "istio-system", "app=istiod")
				return false, fmt.Sprintf("the certificate of %s is not by %s: %v", deployment, signer.name, err)
			}
			pool, between := x509.NewCertPool(), x509.NewCertPool()
			pool.AppendCertsFromPEM(roots)
			for _, c := range certs[1:] {
				between.AddCert(c)
			}
			if _, err := leaf.Verify(x509.VerifyOptions{Roots: pool, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err != nil {
				return false, fmt.Sprintf("the certificate of %s: %v", deployment, err)
			}
			if !strings.Contains(string(leaf.Raw), deployment+";"+s.name+";"+deployment+";") {
				return false, "the certificate of " + deployment + " does not name its workload"
			}
			return true, ""
		})
	}
}

// certificates are those of a PEM text, in its order.
func certificates(text []byte) (found []*x509.Certificate) {
	for block, rest := pem.Decode(text); block != nil; block, rest = pem.Decode(rest) {
		if c, err := x509.ParseCertificate(block.Bytes); err == nil {
			found = append(found, c)
		}
	}
	return found
}

// sameCertificates reports whether two PEM texts have the same certificates, in any order.
func sameCertificates(a, b []byte) bool {
	sums := func(text []byte) map[[sha256.Size]byte]bool {
		set := map[[sha256.Size]byte]bool{}
		for _, c := range certificates(text) {
			set[sha256.Sum256(c.Raw)] = true
		}
		return set
	}
	in, want := sums(a), sums(b)
	for sum := range want {
		if !in[sum] {
			return false
		}
	}
	return len(in) == len(want) && len(want) > 0
}

// secrets are the certificate with its chain with which a Deployment's Envoy works, and the roots that it trusts, as
// istioctl shows them.
func (s *scenario) secrets(deployment string) (chain, roots []byte, err error) {
	return s.secretsOf("deployment/" + deployment)
}

// secretsOf is secrets for a pod of any kind, as kubectl names it.
func (s *scenario) secretsOf(pod string) (chain, roots []byte, err error) {
	out, errOut, code := s.Polymesh(s.t, "istioctl", "proxy-config", "secret", pod, "-n", s.name, "-o", "json")
	if code != 0 {
		return nil, nil, fmt.Errorf("istioctl proxy-config secret: %s", errOut)
	}
	var dump struct {
		DynamicActiveSecrets []struct {
			Name   string
			Secret struct {
				TLSCertificate struct {
					CertificateChain struct{ InlineBytes []byte }
				} `json:"tlsCertificate"`
				ValidationContext struct {
					TrustedCA struct{ InlineBytes []byte } `json:"trustedCa"`
				} `json:"validationContext"`
			}
		}
	}
	if err := json.Unmarshal([]byte(out), &dump); err != nil {
		return nil, nil, err
	}
	for _, secret := range dump.DynamicActiveSecrets {
		switch secret.Name {
		case "default":
			chain = secret.Secret.TLSCertificate.CertificateChain.InlineBytes
		case "ROOTCA":
			roots = secret.Secret.ValidationContext.TrustedCA.InlineBytes
		}
	}
	if len(chain) == 0 || len(roots) == 0 {
		return nil, nil, fmt.Errorf("%s has no active certificate: %s", pod, out)
	}
	return chain, roots, nil
}
