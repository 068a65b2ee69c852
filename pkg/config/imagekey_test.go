package config

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"os"
	"path/filepath"
	"testing"
)

// publicKeyFile writes a new public key.
func publicKeyFile(t *testing.T) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	public, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "image.pub")
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: public}), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

func TestPublicKey(t *testing.T) {
	dir := t.TempDir()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	write := func(name string, text []byte) string {
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, text, 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	for value, want := range map[string]string{
		write("image.key", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private})): "contains a PRIVATE KEY, not a public key",
		write("text", []byte("key")): "is not a PEM file",
		filepath.Join(dir, "none"):   "no such file",
		"":                           "is empty",
		"base64:%":                   "is not a key in base64",
		"base64:AAAA":                "not a public key",
		inline(private):              "not a public key",
	} {
		_, err := publicKey(value)
		wantError(t, value, err, want)
	}
	der, err := publicKey(publicKeyFile(t))
	if err != nil {
		t.Fatal(err)
	}
	if same, err := publicKey(inline(der)); err != nil || !bytes.Equal(same, der) {
		t.Errorf("%x became %x, %v", der, same, err)
	}
}
