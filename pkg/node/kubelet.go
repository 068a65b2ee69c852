package node

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/pflag"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	utilfeature "k8s.io/apiserver/pkg/util/feature"
	"k8s.io/client-go/kubernetes"
	cliflag "k8s.io/component-base/cli/flag"
	"k8s.io/component-base/version"
	"k8s.io/kubernetes/cmd/kubelet/app"
	"k8s.io/kubernetes/cmd/kubelet/app/options"
	kubeletconfig "k8s.io/kubernetes/pkg/kubelet/apis/config"
	"k8s.io/kubernetes/pkg/kubelet/apis/config/validation"
	"k8s.io/kubernetes/pkg/kubelet/eviction"
	evictionapi "k8s.io/kubernetes/pkg/kubelet/eviction/api"

	"polymesh.dev/polymesh/pkg/certificate"
	"polymesh.dev/polymesh/pkg/cgroup"
	"polymesh.dev/polymesh/pkg/component"
	"polymesh.dev/polymesh/pkg/kubeconfig"
	"polymesh.dev/polymesh/pkg/kubeflags"
	"polymesh.dev/polymesh/pkg/layout"
	"polymesh.dev/polymesh/pkg/node/external"
	"polymesh.dev/polymesh/pkg/node/network"
	"polymesh.dev/polymesh/pkg/preflight"
)

// Kubelet is the component "kubelet", in this process.
type Kubelet struct {
	component.Task
	opts   Options
	images *Images
	server *options.KubeletServer
	// disks are the thresholds of free disk, with less than which the kubelet evicts pods.
	disks  []evictionapi.ThresholdValue
	client kubernetes.Interface
}

// NewKubelet returns the kubelet, not yet started. Its Start waits for the images without which no pod starts.
func NewKubelet(o Options, images *Images) *Kubelet {
	return &Kubelet{Task: component.NewTask(), opts: o, images: images}
}

// Name implements component.Component.
func (k *Kubelet) Name() string { return "kubelet" }

// Version is the version of Kubernetes.
func (k *Kubelet) Version() string { return version.Get().GitVersion }

func (k *Kubelet) args() []string {
	flags := map[string]string{
		"hostname-override": k.opts.Name,
		"kubeconfig":        k.opts.Identity.Kubelet,
		"node-ip":           k.opts.IP.String(),
		"root-dir":          k.opts.Settings.DataDir.Kubelet(),
		"cert-dir":          k.opts.Settings.DataDir.NodePKI(),
	}
	if labels := k.opts.Settings.NodeLabels; len(labels) > 0 {
		flags["node-labels"] = strings.Join(labels, ",")
	}
	if taints := k.opts.Settings.NodeTaints; len(taints) > 0 {
		flags["register-with-taints"] = strings.Join(taints, ",")
	}
	if _, ok := external.Of(k.opts.Settings, k.opts.IP); ok {
		flags["cloud-provider"] = "external" // so that the kubelet leaves the addresses to pkg/node/external
	}
	return kubeflags.Merge(flags, k.opts.Settings.KubeletArgs)
}

// configure sets our values; the user's --kubelet-arg override them.
func (k *Kubelet) configure(c *kubeletconfig.KubeletConfiguration) {
	cfg, identity := k.opts.Settings, k.opts.Identity
	c.Authentication.Anonymous.Enabled = false
	c.Authentication.Webhook.Enabled = true
	c.Authentication.X509.ClientCAFile = identity.ClientCA
	c.Authorization.Mode = kubeletconfig.KubeletAuthorizationModeWebhook
	// Where systemd manages the cgroups, those of containers are created through it
	// (https://kubernetes.io/docs/setup/production-environment/container-runtimes/#cgroup-drivers).
	c.CgroupDriver = "cgroupfs"
	if cgroup.BySystemd() {
		c.CgroupDriver = "systemd"
	} else {
		c.CgroupRoot = cfg.DataDir.CgroupRoot()
	}
	c.ClusterDNS = []string{k.opts.ClusterDNS.String()}
	c.ClusterDomain = k.opts.ClusterDomain
	c.ContainerRuntimeEndpoint = "unix://" + cfg.DataDir.ContainerdSocket()
	c.ImageServiceEndpoint = "unix://" + cfg.DataDir.ImageSocket()
	// As in K3s: a full disk is the user's responsibility, up to a last reserve.
	const free = "5%"
	c.EvictionHard = map[string]string{"imagefs.available": free, "nodefs.available": free, "memory.available": "100Mi"}
	c.EvictionMinimumReclaim = map[string]string{"imagefs.available": "10%", "nodefs.available": "10%"}
	c.FailCgroupV1 = false
	c.FailSwapOn = false
	c.HealthzBindAddress = "127.0.0.1"
	// The kubelet's chains belong to kube-proxy's iptables mode, and would never be removed.
	c.MakeIPTablesUtilChains = !preflight.NFTables()
	c.ProtectKernelDefaults = cfg.ProtectKernelDefaults
	c.PodLogsDir = cfg.DataDir.PodLogs()
	c.Port = layout.KubeletPort
	c.ReadOnlyPort = 0
	c.ResolverConfig = k.opts.Nameservers.File()
	c.SerializeImagePulls = false
	c.MaxParallelImagePulls = ptr[int32](4)
	c.StaticPodPath = cfg.DataDir.Agent("pod-manifests")
	c.TLSCipherSuites, c.TLSMinVersion = certificate.CipherSuites(), certificate.MinVersion
	if identity.ServingCert != "" {
		c.TLSCertFile, c.TLSPrivateKeyFile = identity.ServingCert, identity.ServingKey
	} else {
		// The kubelet renews its certificates, from those of joining on.
		c.RotateCertificates, c.ServerTLSBootstrap = true, true
	}
	c.VolumePluginDir = cfg.DataDir.Agent("volume-plugins")
	// The time for pods to terminate before the machine shuts down.
	c.ShutdownGracePeriod = metav1.Duration{Duration: 60 * time.Second}
	c.ShutdownGracePeriodCriticalPods = metav1.Duration{Duration: 10 * time.Second}
	if _, err := os.Stat("/run/systemd/system"); err != nil {
		// Only systemd's login manager can delay a shutdown.
		c.ShutdownGracePeriod, c.ShutdownGracePeriodCriticalPods = metav1.Duration{}, metav1.Duration{}
	}
}

func ptr[T any](v T) *T { return &v }

// inotify are kernel limits per user, here root, shared by all containers on a node. Instances: a sidecar uses
// three, and a proxy that gets none exits; the kernel's 128 are too few for the kubelet's limit of 110 pods.
// Watches: an IDE or a log collector uses tens of thousands, and the kernel's default, which depends on the machine's memory, may be
// as low as 8192. A watch in use takes 1 KiB.
func inotify() map[string]int {
	return map[string]int{
		"/proc/sys/fs/inotify/max_user_instances": 8192,
		"/proc/sys/fs/inotify/max_user_watches":   524288,
	}
}

// raise raises a kernel setting to at least a number.
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

// Init checks the command line.
func (k *Kubelet) Init(context.Context) error { return k.parse() }

// prepare creates what the kubelet expects to exist.
func (k *Kubelet) prepare() error {
	cfg := k.opts.Settings
	for _, dir := range []string{cfg.DataDir.Agent("pod-manifests"), cfg.DataDir.Kubelet(), cfg.DataDir.PodLogs(), cfg.DataDir.Agent("etc")} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	open, err := k.opts.makeStorage()
	if err != nil {
		return err
	}
	if open {
		k.opts.Log.Warn("every user of this machine can enter the folder of volumes, which was there before", "folder", k.opts.StorageDir, "close", "chmod 700 "+k.opts.StorageDir)
	}
	if err := setTornCheckpointsAside(cfg.DataDir.Kubelet(), k.opts.Log.With("component", k.Name())); err != nil {
		return err
	}
	if !cgroup.BySystemd() {
		if err := makeCgroup(cfg.DataDir.CgroupRoot()); err != nil {
			return err
		}
	}
	for path, want := range inotify() {
		if err := raise(path, want); err != nil {
			k.opts.Log.Info("cannot raise a kernel limit for inotify, so fewer pods can run here: a sidecar uses three instances", "limit", path, "wanted", want, "err", err)
		}
	}
	if err := network.MarkBridge(k.opts.Lock, k.opts.Marker, k.opts.Marker.Adopted); err != nil {
		return err
	}
	return k.opts.Nameservers.update()
}

// parse combines our settings and the user's.
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
		return errors.New("--kubelet-arg: config and config-dir are not supported: set each setting as a separate flag")
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
	thresholds, err := eviction.ParseThresholdConfig(nil, conf.EvictionHard, conf.EvictionSoft, conf.EvictionSoftGracePeriod, conf.EvictionMinimumReclaim)
	if err != nil {
		return fmt.Errorf("--kubelet-arg: eviction thresholds: %w", err)
	}
	for _, t := range thresholds {
		switch t.Signal {
		case evictionapi.SignalNodeFsAvailable, evictionapi.SignalImageFsAvailable, evictionapi.SignalContainerFsAvailable:
			k.disks = append(k.disks, t.Value)
		}
	}
	k.server = &options.KubeletServer{KubeletFlags: *flags, KubeletConfiguration: *conf}
	return nil
}

// EvictsBelow is how many bytes of a disk of a size must be free, from Init on: with less, the kubelet evicts pods. It is the largest of the
// user's --kubelet-arg=eviction-hard and eviction-soft for the disks of images, containers and pods.
func (k *Kubelet) EvictsBelow(size uint64) uint64 {
	capacity := resource.NewQuantity(int64(min(size, math.MaxInt64)), resource.BinarySI)
	var most int64
	for _, t := range k.disks {
		most = max(most, evictionapi.GetThresholdQuantity(t, capacity).Value())
	}
	return uint64(most)
}

// Start runs the kubelet.
func (k *Kubelet) Start(ctx context.Context) error {
	if err := k.prepare(); err != nil {
		return err
	}
	var err error
	if k.client, err = kubeconfig.Client(k.opts.Identity.Kubelet, nil); err != nil {
		return err
	}
	if err := k.images.First(ctx); err != nil {
		return fmt.Errorf("wait for the images that every pod needs: %w", err)
	}
	if err := k.measure(); err != nil {
		return err
	}
	deps, err := app.UnsecuredDependencies(ctx, k.server, utilfeature.DefaultFeatureGate)
	if err != nil {
		return fmt.Errorf("build dependencies: %w", err)
	}
	kubeflags.Log(k.Name(), k.args())
	k.Go(ctx, func(ctx context.Context) error {
		go k.opts.Nameservers.follow(ctx)
		return app.Run(ctx, k.server, deps, utilfeature.DefaultFeatureGate)
	})
	return nil
}

// measure tells cAdvisor which containerd has the containers. Without it, what cAdvisor measures has no names of pods and containers, and
// nothing of pods' networks. Its endpoint is only a flag of the process, which the kubelet's program sets and a library's user has to.
func (k *Kubelet) measure() error {
	if err := flag.Set("containerd", k.opts.Settings.DataDir.ContainerdSocket()); err != nil {
		return fmt.Errorf("set cAdvisor's containerd: %w", err)
	}
	return nil
}

// OutlivedFor implements component.Outlived. A second kubelet in one process is not possible: the first one's port, watches
// and registered metrics stay (upstream's Run leaves them to the end of the process), so a fresh process has to start it.
func (k *Kubelet) OutlivedFor() time.Duration { return outlivedFor }

// outlivedFor is how long the API server keeps running after the kubelet or kube-proxy has failed.
const outlivedFor = time.Minute

// Ready checks the kubelet's health endpoint, and whether the machine's resources are so low that the kubelet accepts no more pods.
func (k *Kubelet) Ready(ctx context.Context) error {
	if err := healthz(ctx, "http://"+layout.Loopback(int(k.server.HealthzPort)).String()+"/healthz"); err != nil {
		return err
	}
	node, err := k.client.CoreV1().Nodes().Get(ctx, k.opts.Name, metav1.GetOptions{})
	if apierrors.IsUnauthorized(err) && k.opts.Identity.ServingCert == "" {
		return errors.New("the cluster does not accept this node's certificate, because its node was removed: remove what this machine has of the cluster with `polymesh reset`, or restart it with a token to join again")
	}
	if err != nil {
		return nil // pod-network and kube-apiserver report the problem
	}
	return pressure(node)
}

// pressure returns an error if the kubelet refuses pods and evicts them
// (https://kubernetes.io/docs/concepts/scheduling-eviction/node-pressure-eviction/).
func pressure(node *corev1.Node) error {
	advice := map[corev1.NodeConditionType]string{
		corev1.NodeDiskPressure:   "free some space (`df -h` shows how much each disk has)",
		corev1.NodeMemoryPressure: "free some memory (`polymesh kubectl top pods -A --sort-by=memory` shows where it is used)",
		corev1.NodePIDPressure:    "end some processes",
	}
	for _, c := range node.Status.Conditions {
		if what := advice[c.Type]; what != "" && c.Status == corev1.ConditionTrue {
			return fmt.Errorf("%s: %s: no new pods, and some are evicted: %s", c.Type, c.Message, what)
		}
	}
	return nil
}

// Notes reports what pods are missing.
func (k *Kubelet) Notes(context.Context) []string {
	note := k.opts.Nameservers.Note()
	return component.Present(&note)
}

// healthTime is the timeout of a health endpoint: one that hangs is unhealthy.
const healthTime = 5 * time.Second

func healthz(ctx context.Context, url string) error {
	ctx, cancel := context.WithTimeout(ctx, healthTime)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return errors.New("not responding yet")
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s returned %s", url, resp.Status)
	}
	return nil
}
