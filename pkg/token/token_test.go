package token

import (
	"bytes"
	"strings"
	"testing"
)

func TestParse(t *testing.T) {
	for _, role := range Roles() {
		made, err := New(strings.Repeat("0a", 32), role)
		if err != nil {
			t.Fatal(err)
		}
		for _, text := range []string{made.String(), " " + made.String() + "\n"} {
			if got, err := Parse(text); err != nil || got != made || got.Role() != role {
				t.Errorf("%q is read as %+v, %v", text, got, err)
			}
		}
		if other, err := New(made.CAHash, role); err != nil || other.ID == made.ID || other.Secret == made.Secret || other.Bearer() == made.Bearer() {
			t.Errorf("two tokens are %+v and %+v, %v", made, other, err)
		}
		if !bootstrap.MatchString(made.Bearer()) || len(made.BootstrapSecret()) != bootstrapSecret {
			t.Errorf("%s is not a bootstrap token", made.Bearer())
		}
	}
}

// What the cluster stores of a server's token neither contains the token's secret nor derives its key.
func TestServerToken(t *testing.T) {
	made, err := New(strings.Repeat("0a", 32), Server)
	if err != nil {
		t.Fatal(err)
	}
	stored := made.BootstrapSecret()
	if stored != made.BootstrapSecret() || strings.Contains(made.Secret, stored) {
		t.Errorf("the bootstrap token's secret is %s of %s", stored, made.Secret)
	}
	if key := made.SealingKey(); len(key) != 32 || !bytes.Equal(key, made.SealingKey()) {
		t.Errorf("the key is %x", key)
	}
	other := made
	other.ID = "aaaaaa"
	if bytes.Equal(made.SealingKey(), other.SealingKey()) {
		t.Error("tokens with other ids have the same key")
	}
	if agent := (Token{CAHash: made.CAHash, ID: made.ID, Secret: stored}); bytes.Equal(agent.SealingKey(), made.SealingKey()) {
		t.Error("what the cluster stores derives the key")
	}
}

// A secret that a user has chosen is always the same token of a cluster, and nothing that the cluster stores derives the secret.
func TestOfSecret(t *testing.T) {
	hash := strings.Repeat("0a", 32)
	const text = "chosen-by-the-user-0123456789"
	made, err := OfSecret(hash, text)
	if err != nil || made.CAHash != hash || made.Role() != Server || strings.Contains(made.String(), text) {
		t.Fatalf("%+v, %v", made, err)
	}
	if got, err := Parse(made.String()); err != nil || got != made {
		t.Errorf("%s is read as %+v, %v", made, got, err)
	}
	// Servers of several versions must agree.
	if want := "K10" + hash + "::uun863.xi0t5slapjwkxbcbyzbvvx683lny6hgm"; made.String() != want {
		t.Errorf("the token is %s, want %s", made, want)
	}
	if again, err := OfSecret("", text); err != nil || again.ID != made.ID || again.Secret != made.Secret {
		t.Errorf("without a hash it is %+v, %v", again, err)
	}
	if other, err := OfSecret(hash, text+"x"); err != nil || other.ID == made.ID || other.Secret == made.Secret {
		t.Errorf("of another secret it is %+v, %v", other, err)
	}
	// The part of a token after its hash.
	if got, err := OfSecret(hash, made.ID+"."+made.Secret); err != nil || got != made {
		t.Errorf("of a token without its hash: %+v, %v", got, err)
	}
	for secret, want := range map[string]string{
		"":                                     "too weak",
		"12345":                                "too weak",
		strings.Repeat("a", 64):                "too weak",
		"abcdef.0123456789abcde":               "too weak",
		"with a space in the middle of it":     "spaces",
		"with-a-\x00-in-the-middle-of-it-all":  "cannot be printed",
		strings.Repeat("0123456789abcdef", 17): "256 are the limit",
	} {
		if _, err := OfSecret(hash, secret); err == nil || !strings.Contains(err.Error(), want) || secret != "" && strings.Contains(err.Error(), secret) {
			t.Errorf("%q: %v, want %q", secret, err, want)
		}
	}
}

func TestParseHash(t *testing.T) {
	hash := strings.Repeat("0a", 32)
	for _, text := range []string{hash, "sha256:" + hash, strings.ToUpper(hash) + "\n"} {
		if got, err := ParseHash(text); err != nil || got != hash {
			t.Errorf("%q is read as %q, %v", text, got, err)
		}
	}
	for _, text := range []string{"", hash[1:], hash + "0", "K10" + hash + "::"} {
		if _, err := ParseHash(text); err == nil {
			t.Errorf("%q is the hash of an authority", text)
		}
	}
}

// What is not a token is refused with advice, and without what may be a secret.
func TestParseRefuses(t *testing.T) {
	made, err := New(strings.Repeat("0a", 32), Agent)
	if err != nil {
		t.Fatal(err)
	}
	whole := made.String()
	for text, want := range map[string]string{
		"":            "the token is empty",
		"  \n":        "the token is empty",
		made.Bearer(): "the token lacks the hash",
		whole[:90]:    "only a part of one",
		whole + "x":   "only a part of one",
		"K10" + made.CAHash + "::server:" + made.Secret: "not one of Polymesh", // K3s's
		strings.ToUpper(whole):                          "only a part of one",
		"secret" + made.Secret:                          "this is not a token",
		whole + "\n" + whole:                            "only a part of one",
	} {
		_, err := Parse(text)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: error is %v, want %q", text, err, want)
		}
		if err != nil && strings.Contains(err.Error(), made.Secret) {
			t.Errorf("the error contains the secret: %v", err)
		}
	}
}
