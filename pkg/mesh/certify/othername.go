package certify

import (
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
	// workloadOID is the kind of our alternative name: a UUID, as ITU-T X.667 has it for whoever owns no number.
	workloadOID = mustOID("2.25.191526483160728549313374020117482630511")
)

func mustOID(text string) x509.OID {
	oid, err := x509.ParseOID(text)
	if err != nil {
		panic(err)
	}
	return oid
}

// WithWorkload returns a certificate (PEM) as it is, signed by the same signer once more, with the workload as an otherName
// (RFC 5280, 4.2.1.6) after its alternative names.
func WithWorkload(cert []byte, signer *x509.Certificate, key crypto.PrivateKey, w workload.Workload) ([]byte, error) {
	block, _ := pem.Decode(cert)
	if block == nil {
		return nil, errors.New("it is not PEM")
	}
	leaf, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("parse it: %w", err)
	}
	names, err := alternativeNames(leaf, w.String())
	if err != nil {
		return nil, err
	}
	public := leaf.PublicKey
	leaf.ExtraExtensions = []pkix.Extension{names}
	der, err := x509.CreateCertificate(rand.Reader, leaf, signer, public, key)
	if err != nil {
		return nil, fmt.Errorf("sign it: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: block.Type, Bytes: der}), nil
}

// alternativeNames is the certificate's extension with one name more.
func alternativeNames(leaf *x509.Certificate, value string) (pkix.Extension, error) {
	for _, e := range leaf.Extensions {
		if !e.Id.Equal(subjectAltName) {
			continue
		}
		var names []asn1.RawValue
		if rest, err := asn1.Unmarshal(e.Value, &names); err != nil || len(rest) > 0 {
			return e, fmt.Errorf("read its alternative names: %v, %d bytes after them", err, len(rest))
		}
		name, err := otherName(value)
		if err != nil {
			return e, err
		}
		e.Value, err = asn1.Marshal(append(names, name))
		return e, err
	}
	return pkix.Extension{}, errors.New("it has no alternative names")
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
	return asn1.RawValue{Class: asn1.ClassContextSpecific, IsCompound: true, Bytes: append(kind, text...)}, nil
}
