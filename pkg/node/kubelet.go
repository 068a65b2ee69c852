package node

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/pflag"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	utilfeature "k8s.io/apiserver/pkg/util/feature"
	cliflag "k8s.io/component-base/cli/flag"
	"k8s.io/component-base/version"
	"k8s.io/kubernetes/cmd/kubelet/app"
	"k8s.io/kubernetes/cmd/kubelet/app/options"
	kubeletconfig "k8s.io/kubernetes/pkg/kubelet/apis/config"
	"k8s.io/kubernetes/pkg/kubelet/apis/config/validation"

	"polymesh.dev/polymesh/pkg/certificate"
	"polymesh.dev/polymesh/pkg/component"
	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/controlplane"
	"polymesh.dev/polymesh/pkg/kubeflags"
	"polymesh.dev/polymesh/pkg/preflight"
)

// Kubelet is the component "kubelet", in this process.
type Kubelet struct {
	component.Task
	opts   Options
	server *options.KubeletServer
}

// NewKubelet returns the kubelet, not yet started.
func NewKubelet(o Options) *Kubelet { return &Kubelet{Task: component.NewTask(), opts: o} }

// Name implements component.Component.
func (k *Kubelet) Name() string { return "kubelet" }

// Version is that of Kubernetes.
func (k *Kubelet) Version() string { return version.Get().GitVersion }

func (k *Kubelet) args() []string {
	flags := map[string]string{
		"hostname-override": k.opts.Name,
		"kubeconfig":        controlplane.Kubeconfig(k.opts.Config, k.Name()),
		"node-ip":           k.opts.IP.String(),
		"root-dir":          config.KubeletDir(k.opts.Config.DataDir),
		"cert-dir":          k.opts.Config.AgentDir("pki"),
	}
	if labels := k.opts.Config.NodeLabels; len(labels) > 0 {
		flags["node-labels"] = strings.Join(labels, ",")
	}
	if taints := k.opts.Config.NodeTaints; len(taints) > 0 {
		flags["register-with-taints"] = strings.Join(taints, ",")
	}
	return kubeflags.Merge(flags, k.opts.Config.KubeletArgs)
}

// configure sets our values; the user's --kubelet-arg are parsed over them.
func (k *Kubelet) configure(c *kubeletconfig.KubeletConfiguration) {
	cfg, certs := k.opts.Config, k.opts.Certificates
	c.Authentication.Anonymous.Enabled = false
	c.Authentication.Webhook.Enabled = true
	c.Authentication.X509.ClientCAFile = certs.Cert(certificate.ClientCA)
	c.Authorization.Mode = kubeletconfig.KubeletAuthorizationModeWebhook
	c.CgroupDriver = "cgroupfs"
	if systemdCgroups() {
		c.CgroupDriver = "systemd"
	} else {
		c.CgroupRoot = config.CgroupRoot(cfg.DataDir)
	}
	c.ClusterDNS = []string{cfg.ClusterDNS.String()}
	c.ClusterDomain = cfg.ClusterDomain
	c.ContainerRuntimeEndpoint = "unix://" + config.ContainerdSocket(cfg.DataDir)
	// As K3s: a full disk is the user's to judge, up to a last reserve.
	c.EvictionHard = map[string]string{"imagefs.available": "5%", "nodefs.available": "5%", "memory.available": "100Mi"}
	c.EvictionMinimumReclaim = map[string]string{"imagefs.available": "10%", "nodefs.available": "10%"}
	c.FailCgroupV1 = false
	c.FailSwapOn = false
	c.HealthzBindAddress = "127.0.0.1"
	// The kubelet's chains go with kube-proxy's iptables mode, and nobody would remove them.
	c.MakeIPTablesUtilChains = !preflight.NFTables()
	c.ProtectKernelDefaults = cfg.ProtectKernelDefaults
	c.PodLogsDir = config.PodLogsDir(cfg.DataDir)
	c.Port = preflight.KubeletPort
	c.ReadOnlyPort = 0
	c.ResolverConfig = ResolvConf(cfg)
	c.SerializeImagePulls = false
	c.MaxParallelImagePulls = ptr[int32](4)
	c.StaticPodPath = cfg.AgentDir("pod-manifests")
	c.TLSCertFile = certs.Cert(certificate.KubeletServing)
	c.TLSPrivateKeyFile = certs.Key(certificate.KubeletServing)
	c.VolumePluginDir = cfg.AgentDir("volume-plugins")
	// Pods get this much to end before the machine goes down.
	c.ShutdownGracePeriod = metav1.Duration{Duration: 60 * time.Second}
	c.ShutdownGracePeriodCriticalPods = metav1.Duration{Duration: 10 * time.Second}
	if _, err := os.Stat("/run/systemd/system"); err != nil {
		// Only systemd's login manager can hold a shutdown back.
		c.ShutdownGracePeriod, c.ShutdownGracePeriodCriticalPods = metav1.Duration{}, metav1.Duration{}
	}
}

func ptr[T any](v T) *T { return &v }

// inotifyInstances is how many inotify instances all processes of one user may have. A sidecar takes three, and a proxy
// that gets none ends itself; the kernel's 128 are too few for the 110 pods that the kubelet allows.
const (
	inotifyInstances = "/proc/sys/fs/inotify/max_user_instances"
	wantedInstances  = 8192
)

// raise writes a number to a kernel setting that has a lower one.
func raise(path string, want int) error {
	text, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if have, err := strconv.Atoi(strings.TrimSpace(string(text))); err != nil || have >= want {
		return err
	}
	return os.WriteFile(path, []byte(strconv.Itoa(want)), 0o644)
}

// Init parses the command line and makes what the kubelet expects to find.
func (k *Kubelet) Init(context.Context) error {
	if err := k.parse(); err != nil {
		return err
	}
	cfg := k.opts.Config
	for _, dir := range []string{cfg.AgentDir("pod-manifests"), config.KubeletDir(cfg.DataDir), config.PodLogsDir(cfg.DataDir), cfg.AgentDir("etc")} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	if !systemdCgroups() {
		if err := makeCgroup(config.CgroupRoot(cfg.DataDir)); err != nil {
			return err
		}
	}
	if err := raise(inotifyInstances, wantedInstances); err != nil {
		k.opts.Log.Info("the kernel's limit of inotify instances stays, so about forty pods with a sidecar can run here", "err", err)
	}
	// An own resolv.conf without name servers, for a machine that has none: the host's may be missing altogether.
	return certificate.WriteFile(cfg.AgentDir("etc", "resolv.conf"), []byte("# this machine has no name server that pods could use\n"), 0o644)
}

// parse makes the kubelet's settings of ours and of the user's.
func (k *Kubelet) parse() error {
	flags := options.NewKubeletFlags()
	conf, err := options.NewKubeletConfiguration()
	if err != nil {
		return fmt.Errorf("kubelet's default configuration: %w", err)
	}
	k.configure(conf)
	fs := pflag.NewFlagSet(k.Name(), pflag.ContinueOnError)
	fs.SetNormalizeFunc(cliflag.WordSepNormalizeFunc)
	flags.AddFlags(fs)
	options.AddKubeletConfigFlags(fs, conf)
	if err := kubeflags.Check("kubelet-arg", fs, k.args()); err != nil {
		return err
	}
	if flags.KubeletConfigFile != "" || flags.KubeletDropinConfigDirectory != "" {
		return errors.New("--kubelet-arg: config and config-dir are not supported: give each setting as a flag of its own")
	}
	if err := utilfeature.DefaultMutableFeatureGate.SetFromMap(conf.FeatureGates); err != nil {
		return fmt.Errorf("--kubelet-arg: feature gates: %w", err)
	}
	if err := options.ValidateKubeletFlags(flags); err != nil {
		return fmt.Errorf("--kubelet-arg or --node-label: %w", err)
	}
	if err := validation.ValidateKubeletConfiguration(conf, utilfeature.DefaultFeatureGate); err != nil {
		return fmt.Errorf("--kubelet-arg: %w", err)
	}
	k.server = &options.KubeletServer{KubeletFlags: *flags, KubeletConfiguration: *conf}
	return nil
}

// ResolvConf is the file from which pods get their name servers: the host's if pods can use those in it, or else one of
// our own that names none. One on loopback is the host's own forwarder, which a pod cannot reach.
func ResolvConf(cfg *config.Server) string {
	for _, path := range []string{"/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"} {
		if HasNameservers(path) {
			return path
		}
	}
	return cfg.AgentDir("etc", "resolv.conf")
}

// HasNameservers reports whether a resolv.conf names a server that pods can reach.
func HasNameservers(path string) bool {
	text, err := os.ReadFile(path)
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(text)) {
		f := strings.Fields(line)
		if len(f) == 2 && f[0] == "nameserver" && !strings.HasPrefix(f[1], "127.") && f[1] != "::1" {
			return true
		}
	}
	return false
}

// Start runs the kubelet.
func (k *Kubelet) Start(ctx context.Context) error {
	deps, err := app.UnsecuredDependencies(ctx, k.server, utilfeature.DefaultFeatureGate)
	if err != nil {
		return fmt.Errorf("build dependencies: %w", err)
	}
	k.Go(ctx, func(ctx context.Context) error {
		return app.Run(ctx, k.server, deps, utilfeature.DefaultFeatureGate)
	})
	return nil
}

// Ready asks the kubelet's health endpoint.
func (k *Kubelet) Ready(ctx context.Context) error {
	return healthz(ctx, fmt.Sprintf("http://127.0.0.1:%d/healthz", k.server.HealthzPort))
}

func healthz(ctx context.Context, url string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return errors.New("does not answer yet")
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s says %s", url, resp.Status)
	}
	return nil
}
