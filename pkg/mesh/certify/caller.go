package certify

import (
	"context"
	"crypto/x509"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
	"strings"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"istio.io/istio/pkg/security"
	"istio.io/istio/pkg/spiffe"
	"istio.io/istio/security/pkg/server/ca/authenticate"
	"k8s.io/apimachinery/pkg/util/validation"

	"polymesh.dev/polymesh/pkg/mesh/workload"
)

// authenticator checks istiod's callers and, for a certificate request, resolves the caller's workload. That happens here rather than
// at signing: by then the service has already read the CA's chain, and a CA replaced during the API request would sign for a
// different chain.
type authenticator struct {
	security.Authenticator
	find  func(context.Context, security.KubernetesInfo) (workload.Workload, error)
	calls *calls
}

// checked wraps each authenticator. Without find, workloads are not resolved. It returns a new slice, because istiod's two services
// share the original.
func checked(all []security.Authenticator, find func(context.Context, security.KubernetesInfo) (workload.Workload, error), calls *calls) []security.Authenticator {
	out := make([]security.Authenticator, len(all))
	for i, a := range all {
		out[i] = authenticator{a, find, calls}
	}
	return out
}

// Authenticate implements security.Authenticator. If the workload cannot be resolved, only metric labels are missing:
// the certificate is then Istio's own.
func (a authenticator) Authenticate(ctx security.AuthContext) (*security.Caller, error) {
	caller, err := a.Authenticator.Authenticate(ctx)
	if err != nil || caller == nil {
		return caller, err
	}
	with := *caller
	if _, byCertificate := a.Authenticator.(*authenticate.ClientCertAuthenticator); byCertificate {
		if with.Identities, err = identitiesOf(clientCertificate(ctx)); err != nil {
			return nil, fmt.Errorf("the client's certificate: %w", err)
		}
	}
	info := caller.KubernetesInfo
	if a.find == nil || info.PodName == "" || ctx.GrpcContext == nil {
		return &with, nil
	}
	found, err := a.find(ctx.GrpcContext, info)
	if err != nil {
		scope.Warnf("the certificate of pod %q will not contain its workload: %v", info.PodNamespace+"/"+info.PodName, err)
		return &with, nil
	}
	with.Identities = a.calls.begin(ctx.GrpcContext, caller.Identities, found)
	return &with, nil
}

// clientCertificate returns the client certificate that Go's TLS has verified.
func clientCertificate(ctx security.AuthContext) *x509.Certificate {
	var chains [][]*x509.Certificate
	switch {
	case ctx.GrpcContext != nil:
		if p, ok := peer.FromContext(ctx.GrpcContext); ok {
			if info, ok := p.AuthInfo.(credentials.TLSInfo); ok {
				chains = info.State.VerifiedChains
			}
		}
	case ctx.Request != nil && ctx.Request.TLS != nil:
		chains = ctx.Request.TLS.VerifiedChains
	}
	if len(chains) == 0 || len(chains[0]) == 0 {
		return nil
	}
	return chains[0][0]
}

// identitiesOf returns the names in a client's certificate: one SPIFFE ID, as the X.509-SVID standard requires
// (https://github.com/spiffe/spiffe/blob/main/standards/X509-SVID.md, section 2), and DNS names. Our own otherName is not included, as
// Istio does not read it either. A certificate with anything else is not trusted at all: an earlier Polymesh added "polymesh-workload:" as
// a DNS name to each certificate to which it added foreign identities, and a second SPIFFE ID is such an identity.
func identitiesOf(cert *x509.Certificate) ([]string, error) {
	if cert == nil {
		return nil, errors.New("no certificate")
	}
	names, err := alternativeNames(cert)
	if err != nil {
		return nil, err
	}
	var ids []string
	uris := 0
	for _, name := range names {
		text := string(name.Bytes)
		switch {
		case name.Class != asn1.ClassContextSpecific:
			return nil, errors.New("an alternative name has no type")
		case name.Tag == tagURI && workload.IsPrincipal(text):
			uris++
		case name.Tag == tagDNS && validDNS(text):
		case isWorkload(name):
			continue
		default:
			return nil, fmt.Errorf("the alternative name %q is neither a SPIFFE ID nor a DNS name", text)
		}
		ids = append(ids, text)
	}
	if uris != 1 {
		return nil, fmt.Errorf("it has %d SPIFFE IDs", uris)
	}
	return ids, nil
}

func validDNS(text string) bool {
	return len(validation.IsDNS1123Subdomain(strings.TrimPrefix(text, "*."))) == 0
}

// verify returns an error if a certificate (PEM, first block) has other names than these identities and this workload, if
// any.
func verify(cert []byte, identities []string, w *workload.Workload) error {
	block, _ := pem.Decode(cert)
	if block == nil {
		return errors.New("the certificate is not PEM")
	}
	leaf, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return fmt.Errorf("parse the certificate: %w", err)
	}
	var want []asn1.RawValue
	uris := 0
	for _, id := range identities {
		name := asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: tagDNS, Bytes: []byte(id)}
		switch {
		case workload.IsPrincipal(id):
			name.Tag = tagURI
			uris++
		case strings.HasPrefix(id, spiffe.URIPrefix) || !validDNS(id):
			return fmt.Errorf("%q is neither a SPIFFE ID nor a DNS name", id)
		}
		want = append(want, name)
	}
	if uris != 1 {
		return fmt.Errorf("the caller has %d SPIFFE IDs", uris)
	}
	if w != nil {
		if id, err := spiffe.ParseIdentity(identities[0]); err != nil || id.Namespace != w.Namespace {
			return fmt.Errorf("the workload's namespace is %q", w.Namespace)
		}
		name, err := otherName(w.String())
		if err != nil {
			return err
		}
		want = append(want, name)
	}
	got, err := alternativeNames(leaf)
	if err != nil {
		return err
	}
	if !slices.EqualFunc(got, want, sameName) {
		return fmt.Errorf("it has %d names, the first unexpected one is %q", len(got), firstOther(got, want))
	}
	if cn := leaf.Subject.CommonName; cn != "" && cn != identities[0] {
		return fmt.Errorf("the subject is %q", cn)
	}
	if leaf.IsCA || leaf.KeyUsage&x509.KeyUsageCertSign != 0 {
		return errors.New("it is a CA certificate")
	}
	return nil
}

func sameName(a, b asn1.RawValue) bool {
	return a.Class == b.Class && a.Tag == b.Tag && a.IsCompound == b.IsCompound && string(a.Bytes) == string(b.Bytes)
}

func firstOther(got, want []asn1.RawValue) []byte {
	for i, name := range got {
		if i >= len(want) || !sameName(name, want[i]) {
			return name.Bytes
		}
	}
	return nil
}
