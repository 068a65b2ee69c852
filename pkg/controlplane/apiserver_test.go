package controlplane

import (
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"polymesh.dev/polymesh/pkg/certificate"
	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/controlplane/datastore"
)

// A command line that upstream rejects is rejected before the first start has created anything. At that point the token
// signing key, which upstream reads during the check, does not exist.
func TestAPIServerInitChecksAndChangesNothing(t *testing.T) {
	for arg, want := range map[string]string{
		"": "",
		"service-account-max-token-expiration=1s": "service-account-max-token-expiration must be between 1 hour and 2^32 seconds",
		"no-such-flag=1":           "unknown flag",
		"max-requests-inflight=-1": "max-requests-inflight can not be negative value",
	} {
		name, _, _ := strings.Cut(arg, "=")
		t.Run("arg-"+name, func(t *testing.T) {
			dir := t.TempDir()
			dataDir := filepath.Join(dir, "data")
			empty := filepath.Join(dir, "config.yaml")
			if err := os.WriteFile(empty, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			args := []string{"-c", empty, "-d", dataDir}
			if arg != "" {
				args = append(args, "--kube-apiserver-arg", arg)
			}
			cfg, err := config.Parse(args, nil)
			if err != nil {
				t.Fatal(err)
			}
			a := NewAPIServer(Options{
				Config: cfg, NodeIP: netip.MustParseAddr("192.0.2.1"), Certificates: certificate.Store(cfg.DataDir.Server("tls")), Datastore: datastore.Endpoint{Servers: "unix://none"},
			})
			err = a.Init(t.Context())
			if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
				t.Errorf("error is %v, want %q", err, want)
			}
			if _, err := os.Stat(dataDir); !os.IsNotExist(err) {
				t.Errorf("the data dir was created: %v", err)
			}
		})
	}
}

// Kubelets are reached by the addresses by which nodes see each other.
func TestKubeletAddresses(t *testing.T) {
	for flag, want := range map[string]string{"false": "InternalIP,ExternalIP,Hostname", "true": "ExternalIP,InternalIP,Hostname"} {
		dir := t.TempDir()
		empty := filepath.Join(dir, "config.yaml")
		if err := os.WriteFile(empty, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		cfg, err := config.Parse([]string{"-c", empty, "-d", filepath.Join(dir, "data"), "--flannel-external-ip=" + flag}, nil)
		if err != nil {
			t.Fatal(err)
		}
		a := NewAPIServer(Options{
			Config: cfg, NodeIP: netip.MustParseAddr("192.0.2.1"), Certificates: certificate.Store(cfg.DataDir.Server("tls")), Datastore: datastore.Endpoint{Servers: "unix://none"},
		})
		s, err := a.parse()
		if err != nil {
			t.Fatal(err)
		}
		if got := strings.Join(s.KubeletConfig.PreferredAddressTypes, ","); got != want {
			t.Errorf("with --flannel-external-ip=%s: %s, want %s", flag, got, want)
		}
	}
}
