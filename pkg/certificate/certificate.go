// Package certificate creates and renews the control plane's credentials: certificate authorities, the certificates that they
// sign, the key for service-account tokens, and the kubeconfigs that refer to them.
//
// Authorities are cluster-wide and can be exported to another server; Issue signs the certificates of one server; the Renewal
// component does both at startup and renews while the server runs. The package owns <data-dir>/server/tls and
// <data-dir>/server/cred. The authorities are those in Kubernetes' documentation
// (https://kubernetes.io/docs/setup/best-practices/certificates/), plus one for the kubelets.
package certificate

import "path/filepath"

// Store is the folder with the certificates.
type Store string

// Cert returns the certificate's file.
func (s Store) Cert(name string) string { return filepath.Join(string(s), name+".crt") }

// Key returns the private key's file.
func (s Store) Key(name string) string { return filepath.Join(string(s), name+".key") }

// ServiceAccountKey returns the file of the key that signs service-account tokens.
func (s Store) ServiceAccountKey() string { return filepath.Join(string(s), "service-account.key") }

// MinVersion is the minimum TLS version of the API server and the kubelet, in their flags' format.
const MinVersion = "VersionTLS12"

// CipherSuites are the ciphers of the API server and the kubelet below TLS 1.3, in their flags' format: those of K3s, which the
// CIS Kubernetes Benchmark requires (1.2.29 and 4.2.12). Go's default list includes CBC and SHA-1.
func CipherSuites() []string {
	return []string{
		"TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384", "TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384",
		"TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256", "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256",
		"TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256", "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256",
	}
}
