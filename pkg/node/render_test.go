package node

import (
	"flag"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/pelletier/go-toml/v2"
	corev1 "k8s.io/api/core/v1"
	kubeletconfig "k8s.io/kubernetes/pkg/kubelet/apis/config"

	"polymesh.dev/polymesh/pkg/certificate"
	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/payload"
)

var update = flag.Bool("update", false, "write the golden files")

// golden compares with a file in testdata.
func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != string(want) {
		t.Errorf("%s differs (go test -update writes it):\n%s", path, got)
	}
}

// settings are those of a command line, and nothing of this machine's.
func settings(t *testing.T, args ...string) *config.Server {
	t.Helper()
	empty := filepath.Join(t.TempDir(), "config.yaml")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	cfg, err := config.Parse(append([]string{"-c", empty}, args...), nil)
	if err != nil {
		t.Fatal(err)
	}
	return cfg
}

func nodeOptions(cfg *config.Server) Options {
	return Options{
		Config: cfg, Name: "node-1", IP: netip.MustParseAddr("192.0.2.10"), Certificates: certificate.Store(cfg.ServerDir("tls")),
		Programs: payload.Dir(filepath.Join(cfg.DataDir, "data", "current")),
		Manifest: &payload.Manifest{Images: []string{"registry.polymesh.dev/pause:3.10.1", "registry.polymesh.dev/istio/pilot:1"}},
		Log:      slog.New(slog.DiscardHandler),
	}
}

func TestContainerdConfiguration(t *testing.T) {
	for name, c := range map[string]struct {
		dataDir          string
		mayLower, system bool
	}{
		"containerd.toml":         {config.DefaultDataDir, true, true},
		"containerd-sandbox.toml": {"/srv/second", false, false},
	} {
		text, err := toml.Marshal(NewContainerd(nodeOptions(settings(t, "-d", c.dataDir))).configuration("registry.polymesh.dev/pause:3.10.1", c.mayLower, c.system))
		if err != nil {
			t.Fatal(err)
		}
		golden(t, name, text)
	}
}

func TestConflist(t *testing.T) {
	for name, nftables := range map[string]bool{"conflist-nftables.json": true, "conflist-iptables.json": false} {
		text, err := Conflist(NetworkName(config.DefaultDataDir), "10.42.0.0/24", "/run/polymesh/cni", nftables)
		if err != nil {
			t.Fatal(err)
		}
		golden(t, name, text)
	}
}

func TestKubeletArguments(t *testing.T) {
	cfg := settings(t, "--node-label", "disk=ssd,zone=a", "--node-taint", "k=v:NoSchedule", "--kubelet-arg", "max-pods=20", "--kubelet-arg", "root-dir=/srv/kubelet")
	golden(t, "kubelet.args", []byte(strings.Join(NewKubelet(nodeOptions(cfg)).args(), "\n")+"\n"))
}

func TestKubeletUsesItsOwnCertificates(t *testing.T) {
	cfg := settings(t)
	var c kubeletconfig.KubeletConfiguration
	NewKubelet(nodeOptions(cfg)).configure(&c)
	if c.Authentication.Anonymous.Enabled || !c.Authentication.Webhook.Enabled || c.Authorization.Mode != "Webhook" || c.ReadOnlyPort != 0 {
		t.Errorf("the kubelet answers strangers: %+v %+v, read-only port %d", c.Authentication, c.Authorization, c.ReadOnlyPort)
	}
	if c.TLSCertFile != "/var/lib/polymesh/server/tls/serving-kubelet.crt" || c.Authentication.X509.ClientCAFile != "/var/lib/polymesh/server/tls/client-ca.crt" {
		t.Errorf("certificates are %s and %s", c.TLSCertFile, c.Authentication.X509.ClientCAFile)
	}
	if !slices.Equal(c.ClusterDNS, []string{"10.43.0.10"}) || c.FailCgroupV1 {
		t.Errorf("got %v, %v", c.ClusterDNS, c.FailCgroupV1)
	}
}

func TestBadArgumentsAreRefused(t *testing.T) {
	for arg, want := range map[string]string{
		"max-pod=20":     "--kubelet-arg: unknown flag: --max-pod",
		"max-pods=many":  `--kubelet-arg: invalid argument "many"`,
		"config=/a.yaml": "--kubelet-arg: config and config-dir are not supported",
		"max-pods=-1":    "--kubelet-arg: ",
	} {
		cfg := settings(t, "-d", t.TempDir(), "--kubelet-arg", arg)
		k := NewKubelet(nodeOptions(cfg))
		if err := k.parse(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: error is %v, want %q", arg, err, want)
		}
	}
}

func TestHasNameservers(t *testing.T) {
	for text, want := range map[string]bool{
		"nameserver 192.0.2.53\n":                      true,
		"search example.com\nnameserver\t192.0.2.53":   true,
		"nameserver 127.0.0.53\nnameserver 192.0.2.53": true,
		"nameserver 127.0.0.53\noptions edns0\n":       false,
		"nameserver ::1\n":                             false,
		"# nameserver 192.0.2.53\n":                    false,
		"":                                             false,
	} {
		path := filepath.Join(t.TempDir(), "resolv.conf")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := HasNameservers(path); got != want {
			t.Errorf("%q: %v", text, got)
		}
	}
	if HasNameservers("/no/such/file") {
		t.Error("a file that is not there has name servers")
	}
}

func TestContainerdNeedsThePauseImage(t *testing.T) {
	o := nodeOptions(settings(t, "-d", t.TempDir()))
	o.Manifest = &payload.Manifest{Images: []string{"registry.polymesh.dev/pause-extra:1"}}
	if err := NewContainerd(o).Init(t.Context()); err == nil || !strings.Contains(err.Error(), `no image "pause"`) {
		t.Errorf("error is %v", err)
	}
}

func TestArchiveNames(t *testing.T) {
	for name, want := range map[string]bool{"a.tar": true, "a.tar.gz": true, "a.tgz": true, "a.tar.zst": true, "a.zip": false, "README": false, "tar": false} {
		if got := isArchive(name); got != want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

func TestNetworkSaysWhatItWaitsFor(t *testing.T) {
	n := NewNetwork(nodeOptions(settings(t)))
	condition := func(s corev1.ConditionStatus, message string) *corev1.Node {
		node := &corev1.Node{}
		node.Name = "node-1"
		if s != "" {
			node.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeMemoryPressure, Status: "True"}, {Type: corev1.NodeReady, Status: s, Message: message}}
		}
		return node
	}
	for _, c := range []struct {
		node *corev1.Node
		want string
	}{
		{nil, "the node has not registered yet"},
		{condition("", ""), "node node-1 has not reported yet"},
		{condition(corev1.ConditionFalse, "no network"), "node node-1 is not Ready: no network"},
		{condition(corev1.ConditionTrue, ""), ""},
	} {
		n.node.Store(c.node)
		err := n.Ready(t.Context())
		if (err == nil) != (c.want == "") || err != nil && err.Error() != c.want {
			t.Errorf("error is %v, want %q", err, c.want)
		}
	}
}

func TestRaise(t *testing.T) {
	file := filepath.Join(t.TempDir(), "max")
	for _, tc := range []struct{ have, want string }{
		{"128\n", "8192"},
		{"8192\n", "8192\n"},
		{"65536\n", "65536\n"}, // what the user has set higher stays
	} {
		if err := os.WriteFile(file, []byte(tc.have), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := raise(file, 8192); err != nil {
			t.Error(err)
		}
		if got, err := os.ReadFile(file); err != nil || string(got) != tc.want {
			t.Errorf("from %q to %q, %v; want %q", tc.have, got, err, tc.want)
		}
	}
	if err := raise(filepath.Join(t.TempDir(), "none"), 8192); err == nil {
		t.Error("a setting that is not there was raised")
	}
}
