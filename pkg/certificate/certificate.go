// Package certificate makes and renews what the control plane trusts: certificate authorities, the certificates that they
// sign, the key for service-account tokens, and the kubeconfigs that refer to them.
//
// Authorities are the cluster's and can be exported to another server; Issue signs what one server needs; the Renewal
// component does both at the start and renews while the server runs. It owns <data-dir>/server/tls and
// <data-dir>/server/cred. The division in authorities is the one that Kubernetes documents
// (https://kubernetes.io/docs/setup/best-practices/certificates/), with one more for the kubelets.
package certificate

import "path/filepath"

// Store is the folder with the certificates.
type Store string

// Cert is the certificate's file.
func (s Store) Cert(name string) string { return filepath.Join(string(s), name+".crt") }

// Key is the private key's file.
func (s Store) Key(name string) string { return filepath.Join(string(s), name+".key") }

// ServiceAccountKey is the file of the key that signs service-account tokens.
func (s Store) ServiceAccountKey() string { return filepath.Join(string(s), "service-account.key") }

// MinVersion is the oldest version of TLS that the API server and the kubelet speak, as their flags take it.
const MinVersion = "VersionTLS12"

// CipherSuites are those that the API server and the kubelet take below TLS 1.3, as their flags take them: K3s's, which the
// CIS Kubernetes Benchmark asks for (1.2.29 and 4.2.12). Go's own list has ones with CBC and SHA-1 in it.
func CipherSuites() []string {
	return []string{
		"TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384", "TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384",
		"TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256", "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256",
		"TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256", "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256",
	}
}
