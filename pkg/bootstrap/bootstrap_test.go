package bootstrap

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"polymesh.dev/polymesh/pkg/token"
)

func serverToken(t *testing.T) token.Token {
	t.Helper()
	made, err := token.New(strings.Repeat("0a", 32), token.Server)
	if err != nil {
		t.Fatal(err)
	}
	return made
}

// A bundle is opened by the holder of a token for which it was sealed, and by no one else.
func TestSeal(t *testing.T) {
	file := filepath.Join(t.TempDir(), "key")
	key, err := EnsureKey(file)
	if err != nil {
		t.Fatal(err)
	}
	if again, err := EnsureKey(file); err != nil || !reflect.DeepEqual(again, key) {
		t.Errorf("the key is %x, and then %x, %v", key, again, err)
	}
	if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
	b := Bundle{Authorities: map[string][]byte{"a.key": []byte("secret")}, Encryption: []byte("{}"), Settings: []string{"disable="}, Datastore: Etcd}
	sealed, err := b.Seal(key)
	if err != nil {
		t.Fatal(err)
	}
	mine, others := serverToken(t), serverToken(t)
	wrapped, err := key.Wrap(mine)
	if err != nil {
		t.Fatal(err)
	}
	if got, same, err := OpenWith(mine, sealed, wrapped); err != nil || !reflect.DeepEqual(got, b) || !reflect.DeepEqual(same, key) {
		t.Errorf("%+v, %v", got, err)
	}
	stored := token.Token{CAHash: mine.CAHash, ID: mine.ID, Secret: mine.BootstrapSecret()}
	for what, tok := range map[string]token.Token{"another token": others, "what the cluster stores": stored, "another id": {CAHash: mine.CAHash, ID: others.ID, Secret: mine.Secret}} {
		if _, _, err := OpenWith(tok, sealed, wrapped); err == nil {
			t.Errorf("%s opens it", what)
		}
	}
	for what, text := range map[string][]byte{"a changed text": append([]byte{sealed[0] ^ 1}, sealed[1:]...), "no text": nil, "the key's": wrapped} {
		if _, err := Open(key, text); err == nil {
			t.Errorf("%s is opened", what)
		}
	}
	if _, err := key.Wrap(stored); err == nil {
		t.Error("the key is sealed for an agent's token")
	}
	if err := os.WriteFile(file, []byte("short"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := EnsureKey(file); err == nil || !strings.Contains(err.Error(), "is damaged") {
		t.Errorf("a damaged key: %v", err)
	}
}
