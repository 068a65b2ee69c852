// Package token is the form of the tokens with which machines join a cluster.
//
// A token is a Kubernetes bootstrap token (https://kubernetes.io/docs/reference/access-authn-authz/bootstrap-tokens/) with the
// hash of the cluster's authority in front, in K3s's form: by it a machine knows in the first TLS handshake whether it talks to
// its cluster. A server's token has a longer secret, from which the bootstrap token's is derived: the cluster's datastore contains the
// derived one only, so that it does not open what the servers share (pkg/bootstrap). The package uses only the standard library, so that
// the launcher can reject a bad token. pkg/join makes and uses tokens.
package token

import (
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"math/big"
	"regexp"
	"strings"
)

// prefix is the version of the form, as in K3s (pkg/clientaccess/token.go).
const prefix = "K10"

// Token is a token. The zero value is none.
type Token struct {
	// CAHash is the SHA-256 of the cluster's server authority in DER form, 64 hex digits.
	CAHash string
	// ID is public, 6 characters. Secret has 16 characters, and 32 in a token for servers.
	ID, Secret string
}

// Role is what a machine becomes with a token.
type Role string

const (
	Agent Role = "agent"
	// Server tokens are for agents too.
	Server Role = "server"
)

// Roles returns all roles, the default first.
func Roles() []Role { return []Role{Agent, Server} }

// Lengths of a secret.
const (
	bootstrapSecret = 16 // of Kubernetes' bootstrap tokens
	serverSecret    = 32
)

var (
	pattern   = regexp.MustCompile(`^K10([0-9a-f]{64})::([a-z0-9]{6})\.([a-z0-9]{16}|[a-z0-9]{32})$`)
	bootstrap = regexp.MustCompile(`^[a-z0-9]{6}\.([a-z0-9]{16}|[a-z0-9]{32})$`)
	id        = regexp.MustCompile(`^[a-z0-9]{6}$`)
)

// Parse reads a token. Its errors never contain the secret.
func Parse(text string) (Token, error) {
	text = strings.TrimSpace(text)
	if m := pattern.FindStringSubmatch(text); m != nil {
		return Token{CAHash: m[1], ID: m[2], Secret: m[3]}, nil
	}
	const where = "on a server, `cat /var/lib/polymesh/server/node-token` or `polymesh token create` print the whole token"
	switch {
	case text == "":
		return Token{}, fmt.Errorf("the token is empty: %s", where)
	case bootstrap.MatchString(text):
		return Token{}, fmt.Errorf("the token lacks the hash of the cluster's authority (%s<hash>::), without which this machine cannot know whether it talks to its cluster: %s", prefix, where)
	case strings.HasPrefix(text, prefix) && strings.Contains(text, "::"):
		return Token{}, fmt.Errorf("the token is not one of Polymesh, or only a part of one: %s", where)
	}
	return Token{}, fmt.Errorf("this is not a token, which begins with %s: %s", prefix, where)
}

// Role is for what the token is.
func (t Token) Role() Role {
	if len(t.Secret) == serverSecret {
		return Server
	}
	return Agent
}

// String is the form in which a token is passed on. It contains the secret.
func (t Token) String() string { return prefix + t.CAHash + "::" + t.ID + "." + t.Secret }

// Bearer is what Kubernetes calls the bootstrap token, the bearer token of requests.
func (t Token) Bearer() string { return t.ID + "." + t.BootstrapSecret() }

// BootstrapSecret is the secret of the bootstrap token, which the cluster stores.
func (t Token) BootstrapSecret() string {
	if t.Role() == Agent {
		return t.Secret
	}
	// A number of 256 bits modulo 36^16, which has 83: no value is more likely than another.
	n := new(big.Int).SetBytes(t.derive("bootstrap token"))
	text, base, digit := make([]byte, bootstrapSecret), big.NewInt(int64(len(alphabet))), new(big.Int)
	for i := range text {
		n.DivMod(n, base, digit)
		text[i] = alphabet[digit.Int64()]
	}
	return string(text)
}

// SealingKey is a key of 32 bytes that only the token's holder has. The token must be a server's.
func (t Token) SealingKey() []byte { return t.derive("sealing key") }

func (t Token) derive(purpose string) []byte {
	// The secret is random, with more than 160 bits, and needs no salt (RFC 5869, section 3.1).
	key, err := hkdf.Key(sha256.New, []byte(t.Secret), nil, "polymesh "+purpose+" "+t.ID, sha256.Size)
	if err != nil {
		panic(err) // only for a length that is too large
	}
	return key
}

// Hash returns the hash of an authority for CAHash.
func Hash(ca *x509.Certificate) string {
	sum := sha256.Sum256(ca.Raw)
	return hex.EncodeToString(sum[:])
}

// ValidID reports whether a text can be the id of a token.
func ValidID(text string) bool { return id.MatchString(text) }

// New returns a new token of the cluster whose authority has the hash. The cluster does not know it yet.
func New(caHash string, role Role) (t Token, err error) {
	t.CAHash = caHash
	if t.ID, err = random(6); err != nil {
		return Token{}, err
	}
	length := bootstrapSecret
	if role == Server {
		length = serverSecret
	}
	t.Secret, err = random(length)
	return t, err
}

// alphabet is that of bootstrap tokens.
const alphabet = "abcdefghijklmnopqrstuvwxyz0123456789"

// random returns n characters of a bootstrap token's alphabet.
func random(n int) (string, error) {
	text := make([]byte, n)
	for i := range text {
		k, err := rand.Int(rand.Reader, big.NewInt(int64(len(alphabet))))
		if err != nil {
			return "", err
		}
		text[i] = alphabet[k.Int64()]
	}
	return string(text), nil
}
