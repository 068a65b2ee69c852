package config

import (
	"os"
	"reflect"
	"slices"
	"testing"
)

// What CommandLine returns means the same from every other folder.
func TestCommandLine(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	for _, name := range []string{"x,1.pub", "y.pub"} {
		text, err := os.ReadFile(publicKeyFile(t))
		if err == nil {
			err = os.WriteFile(name, text, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	given := []string{"-d", "data", "--mesh-profile", "demo", "--tls-san", "a,b", "--tls-san", "c", "--secrets-encryption", "-v", "2",
		"--kubelet-arg", "feature-gates=A=true,B=false", "--image-policy-key", `"x,1.pub",y.pub`, "--audit-policy-file=p.yaml"}
	want := []string{"--data-dir=" + dir + "/data", "--tls-san=a", "--tls-san=b", "--tls-san=c", "--mesh-profile=demo",
		`--image-policy-key="` + dir + `/x,1.pub"`, "--image-policy-key=" + dir + "/y.pub", "--secrets-encryption=true", "--audit-policy-file=" + dir + "/p.yaml",
		"--kubelet-arg=feature-gates=A=true,B=false", "--v=2"}
	f := ServerFlags()
	if err := f.Parse(given); err != nil {
		t.Fatal(err)
	}
	got, err := f.CommandLine()
	if err != nil || !slices.Equal(got, want) {
		t.Fatalf("%v\n%q, want\n%q", err, got, want)
	}
	environ := []string{"POLYMESH_WRITE_KUBECONFIG=k.yaml", "POLYMESH_IMAGE_POLICY_KEY=q", "POLYMESH_PAYLOAD_DIR=/x", "HOME=/root", "POLYMESH_NODE_NAME=", "POLYMESH_CONFIG=c"}
	variables, err := f.Environment(environ)
	if want := []string{"POLYMESH_CONFIG=" + dir + "/c", "POLYMESH_WRITE_KUBECONFIG=" + dir + "/k.yaml"}; err != nil || !slices.Equal(variables, want) {
		t.Errorf("%q, %v, want %q", variables, err, want)
	}
	here, err := Parse(given, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Chdir("/")
	there, err := Parse(got, nil)
	if err != nil {
		t.Fatal(err)
	}
	here.flags, there.flags = nil, nil // the same values from other texts
	if !reflect.DeepEqual(here, there) {
		t.Errorf("%v: %+v became %+v", err, here, there)
	}
}
