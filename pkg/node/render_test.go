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
	"k8s.io/kubernetes/cmd/kube-proxy/app"
	kubeletconfig "k8s.io/kubernetes/pkg/kubelet/apis/config"
	"sigs.k8s.io/yaml"

	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/imagestore"
	"polymesh.dev/polymesh/pkg/layout"
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

// settings returns the settings of a command line, independent of this machine.
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
		Settings: cfg.Node, Name: "node-1", IP: netip.MustParseAddr("192.0.2.10"),
		ClusterCIDR: cfg.ClusterCIDR, ClusterDNS: cfg.ClusterDNS, ClusterDomain: cfg.ClusterDomain, APIServiceIP: cfg.APIServiceIP(),
		Identity: Identity{
			Kubelet: cfg.DataDir.Kubeconfig("kubelet"), Proxy: cfg.DataDir.Kubeconfig("kube-proxy"),
			ClientCA: cfg.DataDir.Server("tls", "client-ca.crt"), ServingCert: cfg.DataDir.Server("tls", "serving-kubelet.crt"), ServingKey: cfg.DataDir.Server("tls", "serving-kubelet.key"),
		},
		OwnNetwork:  cfg.FlannelBackend != config.NoBackend,
		Programs:    payload.Dir(cfg.DataDir.Programs()),
		Manifest:    &payload.Manifest{Images: []string{"registry.polymesh.dev/pause:3.10.1", "registry.polymesh.dev/istio/pilot:1"}},
		Nameservers: NewNameservers(cfg.Node, slog.New(slog.DiscardHandler)),
		Log:         slog.New(slog.DiscardHandler),
	}
}

func TestContainerdConfiguration(t *testing.T) {
	for name, c := range map[string]struct {
		dataDir          layout.DataDir
		mayLower, system bool
	}{
		"containerd.toml":         {layout.DefaultDataDir, true, true},
		"containerd-sandbox.toml": {"/srv/second", false, false},
	} {
		text, err := toml.Marshal(NewContainerd(nodeOptions(settings(t, "-d", string(c.dataDir)))).configuration("registry.polymesh.dev/pause:3.10.1", c.mayLower, c.system))
		if err != nil {
			t.Fatal(err)
		}
		golden(t, name, text)
	}
}

// A server that ran under umask 077 has left pods that cannot read their own resolv.conf.
func TestSandboxFilesAreOpened(t *testing.T) {
	c := NewContainerd(nodeOptions(settings(t, "-d", t.TempDir())))
	dir := filepath.Join(c.dir(), "io.containerd.grpc.v1.cri", "sandboxes", "abc")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]os.FileMode{"resolv.conf": 0o644, "hosts": 0o644, "hostname": 0o644, "other": 0o600} {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := c.openSandboxFiles(); err != nil {
			t.Fatal(err)
		}
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != want {
			t.Errorf("%s: %v, %v", name, info.Mode(), err)
		}
	}
}

func TestKubeletArguments(t *testing.T) {
	cfg := settings(t, "--node-label", "disk=ssd,zone=a", "--node-taint", "k=v:NoSchedule", "--kubelet-arg", "max-pods=20", "--kubelet-arg", "root-dir=/srv/kubelet")
	golden(t, "kubelet.args", []byte(strings.Join(NewKubelet(nodeOptions(cfg), nil).args(), "\n")+"\n"))
}

func TestKubeletUsesItsOwnCertificates(t *testing.T) {
	cfg := settings(t)
	var c kubeletconfig.KubeletConfiguration
	NewKubelet(nodeOptions(cfg), nil).configure(&c)
	if c.Authentication.Anonymous.Enabled || !c.Authentication.Webhook.Enabled || c.Authorization.Mode != "Webhook" || c.ReadOnlyPort != 0 {
		t.Errorf("the kubelet accepts anonymous requests: %+v %+v, read-only port %d", c.Authentication, c.Authorization, c.ReadOnlyPort)
	}
	if c.TLSCertFile != "/var/lib/polymesh/server/tls/serving-kubelet.crt" || c.Authentication.X509.ClientCAFile != "/var/lib/polymesh/server/tls/client-ca.crt" {
		t.Errorf("certificates are %s and %s", c.TLSCertFile, c.Authentication.X509.ClientCAFile)
	}
	if c.TLSMinVersion != "VersionTLS12" || len(c.TLSCipherSuites) == 0 || slices.ContainsFunc(c.TLSCipherSuites, func(s string) bool { return !strings.Contains(s, "_GCM_") && !strings.Contains(s, "_POLY1305_") }) {
		t.Errorf("TLS is %s, %v", c.TLSMinVersion, c.TLSCipherSuites)
	}
	if !slices.Equal(c.ClusterDNS, []string{"10.43.0.10"}) || c.FailCgroupV1 {
		t.Errorf("got %v, %v", c.ClusterDNS, c.FailCgroupV1)
	}
}

// cAdvisor has its client of containerd in the kubelet's process, and asks the one that has the pods.
func TestCAdvisorAsksOurContainerd(t *testing.T) {
	endpoint := flag.Lookup("containerd").Value
	before := endpoint.String()
	t.Cleanup(func() {
		if err := endpoint.Set(before); err != nil {
			t.Error(err)
		}
	})
	k := NewKubelet(nodeOptions(settings(t)), nil)
	var configured kubeletconfig.KubeletConfiguration
	k.configure(&configured)
	if err := k.measure(); err != nil {
		t.Fatal(err)
	}
	if got, want := "unix://"+endpoint.String(), configured.ContainerRuntimeEndpoint; got != want {
		t.Errorf("cAdvisor asks %s, and the kubelet %s", got, want)
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
		k := NewKubelet(nodeOptions(cfg), nil)
		if err := k.parse(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: error is %v, want %q", arg, err, want)
		}
	}
}

func TestContainerdNeedsThePauseImage(t *testing.T) {
	o := nodeOptions(settings(t, "-d", t.TempDir()))
	o.Session = NewSession(o.Settings.DataDir)
	o.Manifest = &payload.Manifest{Images: []string{"registry.polymesh.dev/pause-extra:1"}}
	if err := NewContainerd(o).prepare(t.Context()); err == nil || !strings.Contains(err.Error(), `no image "pause"`) {
		t.Errorf("error is %v", err)
	}
}

func TestArchiveNames(t *testing.T) {
	for name, want := range map[string]bool{"a.tar": true, "a.tar.gz": true, "a.tgz": true, "a.tar.zst": true, "a.zip": false, "README": false, "tar": false} {
		if got := imagestore.IsArchive(name); got != want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

func TestPressure(t *testing.T) {
	var n corev1.Node
	n.Status.Conditions = []corev1.NodeCondition{
		{Type: corev1.NodeMemoryPressure, Status: corev1.ConditionFalse}, {Type: corev1.NodeDiskPressure, Status: corev1.ConditionUnknown},
		{Type: corev1.NodeReady, Status: corev1.ConditionTrue, Message: "kubelet is posting ready status"},
	}
	if err := pressure(&n); err != nil {
		t.Error(err)
	}
	n.Status.Conditions[1] = corev1.NodeCondition{Type: corev1.NodeDiskPressure, Status: corev1.ConditionTrue, Message: "kubelet has disk pressure"}
	if err := pressure(&n); err == nil || !strings.HasPrefix(err.Error(), "DiskPressure: kubelet has disk pressure: no new pods") || !strings.Contains(err.Error(), "df -h") {
		t.Errorf("error is %v", err)
	}
}

// Every user of the machine and each pod in the host's network could read it: the metrics, flags and configuration of all
// components.
func TestProxyHasNoServerForMetrics(t *testing.T) {
	p := NewProxy(nodeOptions(settings(t)))
	if err := p.Init(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := metricsAddress(t, p.options); got != "" {
		t.Errorf("metrics are at %q", got)
	}
	p = NewProxy(nodeOptions(settings(t, "--kube-proxy-arg", "metrics-bind-address=127.0.0.1:10249")))
	if err := p.Init(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := metricsAddress(t, p.options); got != "127.0.0.1:10249" {
		t.Errorf("metrics are at %q, not where the user wants them", got)
	}
	if err := NewProxy(nodeOptions(settings(t, "--kube-proxy-arg", "healthz-bind-address=nowhere"))).Init(t.Context()); err == nil {
		t.Error("a wrong argument is accepted")
	}
}

// metricsAddress returns kube-proxy's resulting setting: it can write its configuration to a file.
func metricsAddress(t *testing.T, options *app.Options) string {
	t.Helper()
	options.WriteConfigTo = filepath.Join(t.TempDir(), "config.yaml")
	if err := options.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(options.WriteConfigTo)
	if err != nil {
		t.Fatal(err)
	}
	var conf struct{ MetricsBindAddress string }
	if err := yaml.Unmarshal(text, &conf); err != nil {
		t.Fatal(err)
	}
	return conf.MetricsBindAddress
}

func TestRaise(t *testing.T) {
	file := filepath.Join(t.TempDir(), "max")
	for _, tc := range []struct{ have, want string }{
		{"128\n", "8192"},
		{"8192\n", "8192\n"},
		{"65536\n", "65536\n"}, // a higher value set by the user stays
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
		t.Error("a nonexistent setting was raised")
	}
}

// What pushes of images leave free follows from what the user tells the kubelet.
func TestEvictsBelow(t *testing.T) {
	const size = 100 << 30
	for _, c := range []struct {
		args []string
		want uint64
	}{
		{nil, 5 << 30},
		{[]string{"--kubelet-arg=eviction-hard=memory.available<100Mi,nodefs.available<1%,imagefs.available<2%"}, 2 << 30},
		{[]string{"--kubelet-arg=eviction-hard=nodefs.available<7Gi"}, 7 << 30},
		{[]string{"--kubelet-arg=eviction-hard=imagefs.available<1%", "--kubelet-arg=eviction-soft=imagefs.available<10%", "--kubelet-arg=eviction-soft-grace-period=imagefs.available=1m"}, 10 << 30},
		{[]string{"--kubelet-arg=eviction-hard=memory.available<100Mi"}, 0},
	} {
		k := NewKubelet(nodeOptions(settings(t, c.args...)), nil)
		if err := k.parse(); err != nil {
			t.Fatalf("%q: %v", c.args, err)
		}
		if got := k.EvictsBelow(size); got>>20 != c.want>>20 && (got+1<<20)>>20 != c.want>>20 {
			t.Errorf("%q: %d MiB of 100 GiB must be free, want %d", c.args, got>>20, c.want>>20)
		}
	}
}
