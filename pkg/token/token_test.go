package token

import (
	"strings"
	"testing"
)

func TestParse(t *testing.T) {
	made, err := New(strings.Repeat("0a", 32))
	if err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{made.String(), " " + made.String() + "\n"} {
		if got, err := Parse(text); err != nil || got != made {
			t.Errorf("%q is read as %+v, %v", text, got, err)
		}
	}
	if other, err := New(made.CAHash); err != nil || other.ID == made.ID || other.Secret == made.Secret {
		t.Errorf("two tokens are %+v and %+v, %v", made, other, err)
	}
}

// What is not a token is refused with advice, and without what may be a secret.
func TestParseRefuses(t *testing.T) {
	made, err := New(strings.Repeat("0a", 32))
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
