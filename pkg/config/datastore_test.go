package config

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
)

// The forms of K3s and of the guide.
func TestDatastoreEndpoint(t *testing.T) {
	const certs = " --datastore-cafile=/ca --datastore-certfile=/c --datastore-keyfile=/k"
	for args, want := range map[string]Datastore{
		"": {},
		"--datastore-endpoint=etcd://etcd1:2379,etcd://etcd2:2379,etcd://etcd3:2379": {Kind: Etcd, Endpoint: "http://etcd1:2379,http://etcd2:2379,http://etcd3:2379"},
		"--datastore-endpoint=etcd://etcd1,etcd://[2001:db8::1]:1" + certs:           {Kind: Etcd, Endpoint: "https://etcd1:2379,https://[2001:db8::1]:1", CAFile: "/ca", CertFile: "/c", KeyFile: "/k"},
		"--datastore-endpoint=https://a/":                                            {Kind: Etcd, Endpoint: "https://a:2379"},
		"--datastore-endpoint=postgres://u:p@h:5432/d?sslmode=require":               {Kind: PostgreSQL, Endpoint: "u:p@h:5432/d?sslmode=require"},
		"--datastore-endpoint=postgresql://h --datastore-cafile=/ca":                 {Kind: PostgreSQL, Endpoint: "h", CAFile: "/ca"},
		"--datastore-endpoint=mysql://u:p@tcp(h:3306)/d":                             {Kind: MySQL, Endpoint: "u:p@tcp(h:3306)/d"},
	} {
		s, err := Parse(append([]string{"-c", file(t, "")}, strings.Fields(args)...), nil)
		if err != nil || s.Datastore != want {
			t.Errorf("%s: %v, %v", args, err, s)
		} else if s.Datastore.Endpoint != want.Endpoint {
			t.Errorf("%s: the endpoint is %q", args, string(s.Datastore.Endpoint))
		}
	}
}

// An error about an endpoint, and whatever prints the configuration, does not contain the password.
func TestEndpointIsNotPrinted(t *testing.T) {
	const secret = "s3%cret"
	for endpoint, want := range map[string]string{
		"postgres://u:" + secret + "@h/d":              "--datastore-endpoint is not postgres://USER",
		"postgres://u:" + secret + "@h/d/e":            "--datastore-endpoint is not postgres://USER",
		"mysql://u:" + secret + "@tcp(h)":              "--datastore-endpoint is not mysql://USER",
		"etcd://u:s3cret@a":                            "--datastore-endpoint contains a user",
		"etcd://a/path":                                "--datastore-endpoint is not etcd://HOST",
		"etcd://a,https://b":                           "--datastore-endpoint mixes etcd:// and https://",
		"etcd://a,b:2379":                              "--datastore-endpoint is not etcd://HOST",
		"https://a:0":                                  `--datastore-endpoint: "0" is not a port`,
		"nats://u:" + secret + "@h":                    "--datastore-endpoint is neither etcd://HOST",
		"/var/lib/state.db":                            "--datastore-endpoint is neither etcd://HOST",
		"http://a --datastore-cafile=/ca":              "--datastore-endpoint is http://, for which there are no certificates",
		"https://a --datastore-certfile=/c":            "belong together",
		"https://a --datastore-sync=normal":            "--datastore-sync is for the server's own SQLite",
		"https://a --cluster-init":                     "--cluster-init and --datastore-endpoint are mutually exclusive",
		"https://a --datastore-endpoint-file=/nowhere": "mutually exclusive",
	} {
		_, err := Parse(append([]string{"-c", file(t, "")}, strings.Fields("--datastore-endpoint="+endpoint)...), nil)
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "s3") {
			t.Errorf("%s: %v, want %q", endpoint, err, want)
		}
	}
	s, err := Parse([]string{"-c", file(t, "")}, []string{"POLYMESH_DATASTORE_ENDPOINT=postgres://u:s3cret@h/d"})
	if err != nil {
		t.Fatal(err)
	}
	text, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	for _, printed := range []string{fmt.Sprint(s), fmt.Sprintf("%+v %#v %s %q", s, s, s.Datastore.Endpoint, s.Datastore.Endpoint), string(text), strings.Join(s.Notes, " ")} {
		if strings.Contains(printed, "s3cret") {
			t.Errorf("the password is printed: %s", printed)
		}
	}
	if len(s.Notes) > 0 {
		t.Errorf("with the variable there is a note: %q", s.Notes)
	}
}

// A password on the command line is accepted with a note, but not written into a unit that everyone can read.
func TestEndpointOnTheCommandLine(t *testing.T) {
	for endpoint, visible := range map[string]bool{
		"postgres://u:p@h/d": true, "mysql://u:p@tcp(h)/d": true, "postgres://h/d?password=p": true, "etcd://a:2379": false,
	} {
		f := ServerFlags()
		if err := f.Parse([]string{"-c", file(t, ""), "--datastore-endpoint=" + endpoint}); err != nil {
			t.Fatal(err)
		}
		line, err := f.CommandLine()
		if err != nil || strings.Contains(strings.Join(line, " "), endpoint) {
			t.Errorf("%s: the command line is %q, %v", endpoint, line, err)
		}
		if env, err := f.Environment(nil); err != nil || !slices.Contains(env, "POLYMESH_DATASTORE_ENDPOINT="+endpoint) {
			t.Errorf("%s: the environment is %q, %v", endpoint, env, err)
		}
		s, err := f.Server(nil)
		if err != nil {
			t.Fatal(err)
		}
		if (len(s.Notes) == 1) != visible {
			t.Errorf("%s: notes %q", endpoint, s.Notes)
		}
	}
}
