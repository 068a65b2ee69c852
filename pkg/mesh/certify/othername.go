package certify

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"

	"polymesh.dev/polymesh/pkg/mesh/workload"
)

var (
	subjectAltName = asn1.ObjectIdentifier{2, 5, 29, 17}
	// workloadOID is the type of our alternative name: derived from a UUID (ITU-T X.667), which needs no registration.
	workloadOID = mustOID("2.25.191526483160728549313374020117482630511")
)

func mustOID(text string) x509.OID {
	oid, err := x509.ParseOID(text)
	if err != nil {
		panic(err)
	}
	return oid
}

// WithWorkload returns a certificate (PEM) signed again by the same signer, with the workload appended to its alternative names as
// an otherName (RFC 5280, 4.2.1.6).
func WithWorkload(cert []byte, signer *x509.Certificate, key crypto.PrivateKey, w workload.Workload) ([]byte, error) {
	block, _ := pem.Decode(cert)
	if block == nil {
		return nil, errors.New("the certificate is not PEM")
	}
	leaf, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("parse the certificate: %w", err)
	}
	names, err := alternativeNames(leaf)
	if err != nil {
		return nil, err
	}
	name, err := otherName(w.String())
	if err != nil {
		return nil, err
	}
	value, err := asn1.Marshal(append(names, name))
	if err != nil {
		return nil, fmt.Errorf("encode the alternative names: %w", err)
	}
	public := leaf.PublicKey
	leaf.ExtraExtensions = []pkix.Extension{{Id: subjectAltName, Critical: true, Value: value}} // critical, as in Istio: there is no subject
	der, err := x509.CreateCertificate(rand.Reader, leaf, signer, public, key)
	if err != nil {
		return nil, fmt.Errorf("sign the certificate: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: block.Type, Bytes: der}), nil
}

// Types of GeneralName (RFC 5280, 4.2.1.6).
const (
	tagOther = 0
	tagDNS   = 2
	tagURI   = 6
)

// alternativeNames returns all names of a certificate. Go's parser drops the types that it does not know.
func alternativeNames(leaf *x509.Certificate) (names []asn1.RawValue, err error) {
	for _, e := range leaf.Extensions {
		if !e.Id.Equal(subjectAltName) {
			continue
		}
		if rest, err := asn1.Unmarshal(e.Value, &names); err != nil || len(rest) > 0 {
			return nil, fmt.Errorf("parse the alternative names: %v, %d trailing bytes", err, len(rest))
		}
		return names, nil // Go rejects a certificate with two of these extensions
	}
	return nil, errors.New("the certificate has no alternative names")
}

// isWorkload reports whether a name was added by WithWorkload.
func isWorkload(name asn1.RawValue) bool {
	var kind asn1.RawValue
	if name.Class != asn1.ClassContextSpecific || name.Tag != tagOther || !name.IsCompound {
		return false
	}
	_, err := asn1.Unmarshal(name.Bytes, &kind)
	oid, also := workloadOID.MarshalBinary()
	return err == nil && also == nil && kind.Tag == asn1.TagOID && bytes.Equal(kind.Bytes, oid)
}

// otherName is GeneralName's otherName [0] { type-id OBJECT IDENTIFIER, value [0] EXPLICIT UTF8String }.
func otherName(value string) (asn1.RawValue, error) {
	oid, err := workloadOID.MarshalBinary()
	if err != nil {
		return asn1.RawValue{}, err
	}
	kind, err := asn1.Marshal(asn1.RawValue{Tag: asn1.TagOID, Bytes: oid})
	if err != nil {
		return asn1.RawValue{}, err
	}
	text, err := asn1.MarshalWithParams(value, "utf8,explicit,tag:0")
	if err != nil {
		return asn1.RawValue{}, fmt.Errorf("encode the workload: %w", err)
	}
	return asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: tagOther, IsCompound: true, Bytes: append(kind, text...)}, nil
}
