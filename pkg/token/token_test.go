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
