// Package token is the form of the tokens with which machines join a cluster.
//
// A token is a Kubernetes bootstrap token (https://kubernetes.io/docs/reference/access-authn-authz/bootstrap-tokens/) with the
// hash of the cluster's authority in front, in K3s's form: by it a machine knows in the first TLS handshake whether it talks to
// its cluster. A server's token has a longer secret, from which the bootstrap token's is derived: the cluster's datastore contains the
// derived one only, so that it does not open what the servers share (pkg/bootstrap). A user can also choose the servers' secret: OfSecret makes
// a token of it. The package imports nothing of Kubernetes, so that the launcher can reject a bad token. pkg/join makes and uses tokens.
package token

import (
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"math/big"
	"regexp"
	"strings"
	"unicode"

	"golang.org/x/crypto/scrypt"
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
	idLength        = 6
)

var (
	pattern   = regexp.MustCompile(`^K10([0-9a-f]{64})::([a-z0-9]{6})\.([a-z0-9]{16}|[a-z0-9]{32})$`)
	bootstrap = regexp.MustCompile(`^[a-z0-9]{6}\.([a-z0-9]{16}|[a-z0-9]{32})$`)
	caHash    = regexp.MustCompile(`^[0-9a-f]{64}$`)
	id        = regexp.MustCompile(`^[a-z0-9]{6}$`)
)

// Parse reads a token. Its errors never contain the secret.
func Parse(text string) (Token, error) {
	text = strings.TrimSpace(text)
	if m := pattern.FindStringSubmatch(text); m != nil {
		return Token{CAHash: m[1], ID: m[2], Secret: m[3]}, nil
	}
	switch {
	case text == "":
		return Token{}, errors.New("the token is empty")
	case bootstrap.MatchString(text):
		return Token{}, fmt.Errorf("the token lacks the hash of the cluster's authority (%s<hash>::), without which this machine cannot know whether it talks to its cluster", prefix)
	case strings.HasPrefix(text, prefix) && strings.Contains(text, "::"):
		return Token{}, errors.New("the token is not one of Polymesh, or only a part of one")
	}
	return Token{}, fmt.Errorf("this is not a token, which begins with %s, or it is a secret alone, without the hash of the cluster's authority, and this machine cannot know whether it talks to its cluster", prefix)
}

// IsWhole reports whether a text is meant as a whole token, with a hash.
func IsWhole(text string) bool { return strings.HasPrefix(strings.TrimSpace(text), prefix) }

// A secret that a user chooses opens the authorities to whoever finds it out, and the datastore lets someone who can read it try many. So it
// must not be short, and each try costs 32 MB and a tenth of a second.
const (
	minSecret, maxSecret = 24, 256 // bytes
	minDifferent         = 8       // characters
	scryptN, scryptR     = 1 << 15, 8
)

// CheckSecret returns why a secret that a user has chosen is not accepted, without it.
func CheckSecret(text string) error {
	const advice = "`openssl rand -hex 32` makes a good one"
	different := map[rune]bool{}
	for _, r := range text {
		if !unicode.IsPrint(r) || unicode.IsSpace(r) {
			return fmt.Errorf("the servers' secret has spaces, or characters that cannot be printed: %s", advice)
		}
		different[r] = true
	}
	switch {
	case len(text) < minSecret || len(different) < minDifferent:
		return fmt.Errorf("the servers' secret is too weak, and opens the cluster's authorities: it needs at least %d characters, %d of them different; %s", minSecret, minDifferent, advice)
	case len(text) > maxSecret:
		return fmt.Errorf("the servers' secret has %d characters, and %d are the limit", len(text), maxSecret)
	}
	return nil
}

// OfSecret returns the token of a secret that a user has chosen, always the same. The secret may be the part of a server's token after the hash.
func OfSecret(caHash, text string) (Token, error) {
	if id, secret, ok := strings.Cut(text, "."); ok && bootstrap.MatchString(text) {
		return Token{CAHash: caHash, ID: id, Secret: secret}, nil
	}
	if err := CheckSecret(text); err != nil {
		return Token{}, err
	}
	// Machines that begin know nothing in common but the secret, so the salt is fixed.
	key, err := scrypt.Key([]byte(text), []byte("polymesh servers' secret"), scryptN, scryptR, 1, sha256.Size)
	if err != nil {
		return Token{}, fmt.Errorf("derive the servers' token: %w", err)
	}
	t := Token{CAHash: caHash}
	for purpose, to := range map[string]struct {
		text   *string
		length int
	}{"id": {&t.ID, idLength}, "secret": {&t.Secret, serverSecret}} {
		part, err := hkdf.Key(sha256.New, key, nil, "polymesh servers' token "+purpose, 2*sha256.Size)
		if err != nil {
			return Token{}, fmt.Errorf("derive the servers' token: %w", err)
		}
		*to.text = spell(part, to.length)
	}
	return t, nil
}

// ParseHash reads the hash of an authority as it is in a token, or as openssl and kubeadm write it.
func ParseHash(text string) (string, error) {
	hash := strings.ToLower(strings.TrimPrefix(strings.TrimSpace(text), "sha256:"))
	if !caHash.MatchString(hash) {
		return "", fmt.Errorf("%.80q is not the hash of an authority, which has 64 hexadecimal digits: it is in a token of the cluster, between %s and the two colons", text, prefix)
	}
	return hash, nil
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
	return spell(t.derive("bootstrap token"), bootstrapSecret)
}

// spell writes a number, modulo 36^length, in the alphabet. It must be much larger.
func spell(number []byte, length int) string {
	n := new(big.Int).SetBytes(number)
	text, base, digit := make([]byte, length), big.NewInt(int64(len(alphabet))), new(big.Int)
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
	if t.ID, err = random(idLength); err != nil {
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
