package config

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// imagePolicyKey is the setting with the keys of the image policy. All servers need the keys themselves, and the files of one are not on the
// others: so it has two forms, a file's name and the key.
const imagePolicyKey = "image-policy-key"

// inlineKey is the prefix of a public key that is given itself: its DER form (PKIX), in base64, follows.
const inlineKey = "base64:"

// inline returns the form of a public key that means the same on every machine.
func inline(der []byte) string { return inlineKey + base64.StdEncoding.EncodeToString(der) }

// publicKey reads a value of --image-policy-key, and returns the key in DER form (PKIX). pkg/signature uses it.
func publicKey(value string) ([]byte, error) {
	der, form := []byte(nil), ""
	text, ok := strings.CutPrefix(value, inlineKey)
	if ok {
		var err error
		if der, err = base64.StdEncoding.DecodeString(text); err != nil {
			return nil, fmt.Errorf("--image-policy-key: %.40q is not a key in base64: %w", value, err)
		}
		form = "key of another kind"
	} else {
		if value == "" {
			return nil, fmt.Errorf("--image-policy-key is empty: specify the file of a public key, or omit the flag")
		}
		file, err := filepath.Abs(value)
		if err != nil {
			return nil, fmt.Errorf("--image-policy-key: %w", err)
		}
		content, err := os.ReadFile(file)
		if err != nil {
			return nil, fmt.Errorf("--image-policy-key: %w", err)
		}
		block, _ := pem.Decode(content)
		if block == nil {
			return nil, fmt.Errorf("--image-policy-key: %s is not a PEM file: specify the .pub file written by `polymesh image keygen` or cosign", file)
		}
		value, der, form = file, block.Bytes, block.Type
	}
	public, err := x509.ParsePKIXPublicKey(der)
	if err != nil {
		return nil, fmt.Errorf("--image-policy-key: %.100s contains a %s, not a public key: specify the .pub file that belongs to it", value, form)
	}
	return x509.MarshalPKIXPublicKey(public)
}

// described returns a setting, name=value, for a user: of a key, its hash, with the file if it is in one.
func described(setting string) string {
	name, value, _ := strings.Cut(setting, "=")
	if name != imagePolicyKey || value == "" {
		return setting
	}
	der, err := publicKey(value)
	if err != nil {
		return setting
	}
	sum := fmt.Sprintf("sha256:%x", sha256.Sum256(der))
	if strings.HasPrefix(value, inlineKey) {
		return name + "=" + sum
	}
	return fmt.Sprintf("%s=%s (%s)", name, value, sum)
}
