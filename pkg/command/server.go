package command

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"
	utilfeature "k8s.io/apiserver/pkg/util/feature"
	logsapi "k8s.io/component-base/logs/api/v1"

	"polymesh.dev/polymesh/pkg/addon"
	"polymesh.dev/polymesh/pkg/atomicfile"
	"polymesh.dev/polymesh/pkg/certificate"
	"polymesh.dev/polymesh/pkg/component"
	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/controlplane"
	"polymesh.dev/polymesh/pkg/datadir"
	"polymesh.dev/polymesh/pkg/datastore"
	"polymesh.dev/polymesh/pkg/encryption"
	"polymesh.dev/polymesh/pkg/imagepolicy"
	"polymesh.dev/polymesh/pkg/kubeflags"
	"polymesh.dev/polymesh/pkg/loadbalancer"
	"polymesh.dev/polymesh/pkg/mesh"
	"polymesh.dev/polymesh/pkg/node"
	"polymesh.dev/polymesh/pkg/payload"
	"polymesh.dev/polymesh/pkg/preflight"
	"polymesh.dev/polymesh/pkg/status"
	polymesh "polymesh.dev/polymesh/pkg/version"
)

func newServer() *cobra.Command {
	flags := config.ServerFlags()
	cmd := &cobra.Command{
		Use:   "server",
		Short: "Run a server: control plane, node and add-ons",
		Long: `Run a server: datastore, Kubernetes' control plane, this machine as a node, and the add-ons.

Every flag can stand in the config file under the same name, and in the environment as POLYMESH_ and the name in capitals
(POLYMESH_DATA_DIR). A flag wins over the environment, the environment over the file.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			cfg, err := flags.Server(os.Environ())
			if err != nil {
				return err
			}
			ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM)
			defer stop()
			return serve(ctx, cfg)
		},
	}
	cmd.Flags().SortFlags = false
	cmd.Flags().AddFlagSet(flags.FlagSet)
	for flag, values := range map[string][]string{
		"datastore-sync": config.DatastoreSyncs(), "mesh-profile": config.MeshProfiles(), "secrets-encryption-provider": config.EncryptionProviders(), "pod-security": config.PodSecurityLevels(),
	} {
		_ = cmd.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp))
	}
	return cmd
}

// serve runs a server until ctx ends.
func serve(ctx context.Context, cfg *config.Server) error {
	// containerd, the kubelet and the shims inherit it.
	syscall.Umask(config.Umask)
	log := newLog(cfg)
	grpcToKlog()
	marker, err := datadir.Claim(cfg.DataDir)
	if err != nil {
		return err
	}
	lock, err := datadir.Acquire(cfg.DataDir)
	if err != nil {
		return err
	}
	defer lock.Release()
	for _, note := range cfg.Notes {
		log.Info(note)
	}
	if err := marker.NoteKubeconfig(cfg.DataDir, cfg.Kubeconfig); err != nil {
		return err
	}
	foreign, err := marker.Take(cfg.DataDir, config.KubeletDir(cfg.DataDir), config.PodLogsDir(cfg.DataDir))
	if err != nil {
		return err
	}
	for _, folder := range foreign {
		log.Warn("another Kubernetes has left something in a folder that this node uses: `polymesh reset` will leave it", "folder", folder)
	}
	this, err := prepare(cfg, marker, lock, log)
	if err != nil {
		return err
	}
	manager := component.NewManager(log)
	manager.OnceChecked(this.linkPrograms)
	this.addComponents(manager)

	base := status.Report{
		Version: polymesh.Version, Since: time.Now(), DataDir: cfg.DataDir,
		Node: this.name, NodeIP: this.ip.String(), Kubeconfig: cfg.Kubeconfig,
	}
	if err := status.Serve(ctx, config.StatusSocket(cfg.DataDir), base, manager); err != nil {
		return err
	}
	if os.Getenv("GOGC") == "" {
		// A quarter of Go's default. The control plane's heap is mostly caches: on an idle cluster this takes a fifth off
		// its memory and no measurable time, and memory is what small machines lack.
		debug.SetGCPercent(25)
	}
	go func() {
		// To a service manager the server is up with its node. The add-ons are ordinary pods, and a taint may leave no
		// room for them: `polymesh status` tells.
		select {
		case <-manager.Ready("pod-network"):
			_, _ = daemon.SdNotify(false, daemon.SdNotifyReady)
		case <-ctx.Done():
		}
	}()
	go func() {
		// The start needs a third more memory than the work that follows; give it back at once.
		select {
		case <-manager.Settled():
			if err := giveBack(); err != nil {
				log.Warn("memory of the start was not given back", "err", err)
			}
		case <-ctx.Done():
		}
	}()
	return manager.Run(ctx)
}

// server is what the components of a server are built from.
type server struct {
	cfg  *config.Server
	log  *slog.Logger
	name string
	ip   netip.Addr
	// unpacked is the folder of the payload that this program came from, programs the name by which running pods know it.
	unpacked string
	programs payload.Dir
	manifest *payload.Manifest
	renewal  *certificate.Renewal
	marker   *datadir.Marker
	lock     *datadir.Lock
}

// prepare finds out what the components need to know of the machine. It changes nothing on it.
func prepare(cfg *config.Server, marker *datadir.Marker, lock *datadir.Lock, log *slog.Logger) (*server, error) {
	s := &server{cfg: cfg, log: log, name: cfg.NodeName, ip: cfg.NodeIP, marker: marker, lock: lock}
	// One process holds all of Kubernetes: a second component must not set up logging again.
	logsapi.ReapplyHandling = logsapi.ReapplyHandlingIgnoreUnchanged
	logging := logsapi.NewLoggingConfiguration()
	logging.Verbosity = logsapi.VerbosityLevel(cfg.LogLevel)
	if err := logsapi.ValidateAndApply(logging, utilfeature.DefaultFeatureGate); err != nil {
		return nil, fmt.Errorf("set up the Kubernetes components' logs: %w", err)
	}
	if s.name == "" {
		host, err := os.Hostname()
		if err != nil {
			return nil, fmt.Errorf("read the host's name: %w", err)
		}
		s.name = strings.ToLower(host)
	}
	if !s.ip.IsValid() {
		ip, err := preflight.NodeIP()
		if err != nil {
			return nil, err
		}
		s.ip = ip
	}
	s.unpacked = os.Getenv(payload.EnvDir)
	if s.unpacked == "" {
		return nil, errors.New("the program was not started by its launcher: run `polymesh`, the file that was shipped")
	}
	var err error
	if s.manifest, err = payload.Dir(s.unpacked).Manifest(); err != nil {
		return nil, err
	}
	s.programs = payload.Dir(filepath.Join(cfg.DataDir, "data", "current"))
	// kube-proxy and the CNI plugins call nft by name.
	if err := os.Setenv("PATH", s.programs.BinDir()+":"+os.Getenv("PATH")); err != nil {
		return nil, err
	}
	s.renewal = certificate.NewRenewal(certificate.Options{
		Dir: cfg.ServerDir("tls"), NodeName: s.name, NodeIP: s.ip, SANs: s.sans(),
		ServiceIP: cfg.APIServiceIP(), ClusterDomain: cfg.ClusterDomain,
	}, s.writeKubeconfigs, log)
	return s, nil
}

// linkPrograms makes data/current point to the unpacked payload. Running shims and containers refer to their programs
// through it, so an upgrade does not pull them away.
func (s *server) linkPrograms(context.Context) error {
	current, id := string(s.programs), filepath.Base(s.unpacked)
	target, err := os.Readlink(current)
	if err == nil && target == id {
		return nil
	}
	if err := atomicfile.Symlink(id, current); err != nil {
		return fmt.Errorf("link the unpacked programs: %w", err)
	}
	// The version before stays: a shim that it started may still be at work with its files.
	if err := removeExcept(filepath.Dir(current), "current", id, target); err != nil {
		return fmt.Errorf("remove the programs of old versions: %w", err)
	}
	return nil
}

func removeExcept(dir string, keep ...string) error {
	entries, err := os.ReadDir(dir)
	for _, e := range entries {
		if !slices.Contains(keep, e.Name()) {
			err = errors.Join(err, os.RemoveAll(filepath.Join(dir, e.Name())))
		}
	}
	return err
}

func (s *server) sans() []string {
	sans := append([]string{}, s.cfg.TLSSANs...)
	for _, a := range []netip.Addr{s.cfg.AdvertiseAddress, s.cfg.ExternalIP} {
		if a.IsValid() {
			sans = append(sans, a.String())
		}
	}
	return sans
}

func (s *server) writeKubeconfigs(store certificate.Store) error {
	if err := controlplane.WriteKubeconfigs(s.cfg, store); err != nil {
		return err
	}
	if err := store.WritePortableKubeconfig(s.cfg.Kubeconfig, certificate.Admin, controlplane.URL(s.cfg), s.cfg.KubeconfigMode); err != nil || s.cfg.KubeconfigGroup < 0 {
		return err
	}
	return os.Chown(s.cfg.Kubeconfig, -1, s.cfg.KubeconfigGroup)
}

// addComponents is the server: what it consists of, and what each part waits for.
func (s *server) addComponents(m *component.Manager) {
	certs := certificate.Store(s.cfg.ServerDir("tls"))
	db := datastore.New(datastore.Options{
		Dir: s.cfg.ServerDir("db"), Socket: config.DatastoreSocket(s.cfg.DataDir), Sync: s.cfg.DatastoreSync,
	})
	plane := controlplane.Options{Config: s.cfg, NodeIP: s.ip, Certificates: certs, EtcdEndpoint: db.Endpoint()}
	machine := node.Options{
		Config: s.cfg, Name: s.name, IP: s.ip, Certificates: certs,
		Programs: s.programs, Manifest: s.manifest, Session: node.NewSession(s.cfg), Marker: s.marker, Lock: s.lock,
		Nameservers: node.NewNameservers(s.cfg, s.log), Log: s.log,
	}
	kubeconfig := controlplane.Kubeconfig(s.cfg, "polymesh")

	m.Add(s.renewal)
	m.Add(db)
	m.Add(node.NewContainerd(machine))
	m.Add(node.NewImages(machine), "containerd")
	m.Add(controlplane.NewAPIServer(plane), "certificates", "datastore")
	// Where the user gives the API server another configuration, with a KMS say, Secrets are written with keys that are not ours.
	if !kubeflags.Sets(s.cfg.APIServerArgs, "encryption-provider-config") {
		m.Add(encryption.New(encryption.Cluster{
			File: config.EncryptionFile(s.cfg.DataDir), Kubeconfig: kubeconfig, Datastore: db.Endpoint(),
		}, s.log), "kube-apiserver")
	}
	m.Add(controlplane.NewControllerManager(plane), "kube-apiserver")
	m.Add(controlplane.NewScheduler(plane), "kube-apiserver")
	m.Add(node.NewKubelet(machine), "kube-apiserver", "images", "kube-controller-manager")
	m.Add(node.NewProxy(machine), "kube-apiserver")
	m.Add(node.NewNetwork(machine), "kube-apiserver", "kube-controller-manager")
	m.Add(imagepolicy.New(imagepolicy.Options{
		Keys: s.cfg.ImagePolicyKeys, Kubeconfig: controlplane.Kubeconfig(s.cfg, "image-policy"), Certificates: certs,
		Open:        func() (imagepolicy.Node, error) { return node.OpenSignatures(config.ContainerdSocket(s.cfg.DataDir)) },
		RegistryDir: config.RegistryDir(s.cfg.DataDir), Log: s.log,
	}), "kube-apiserver", "images")
	for _, name := range []config.Addon{config.CoreDNS, config.MetricsServer, config.LocalStorage, config.NetworkPolicy} {
		m.Add(s.addon(name, kubeconfig, machine.Nameservers), "kube-apiserver")
	}
	if s.cfg.Enabled(config.ServiceLB) {
		m.Add(loadbalancer.New(loadbalancer.Options{
			Kubeconfig: controlplane.Kubeconfig(s.cfg, "servicelb"), NodeName: s.name, Addresses: s.addresses(), LinkAlias: s.marker.Alias(),
			Reserved: loadbalancer.ReservedPorts(s.cfg.HTTPSPort), Pool: s.cfg.LoadBalancerPool, Log: s.log,
		}), "kube-apiserver")
	}
	if s.cfg.Enabled(config.Istio) {
		m.Add(mesh.New(mesh.Options{
			Kubeconfig: kubeconfig, Profile: s.cfg.MeshProfile, ClusterDomain: s.cfg.ClusterDomain,
			GatewayAPI: s.programs.Path("manifests/gateway-api.yaml"), Log: s.log,
		}), "kube-apiserver")
	}
}

// addon is one of the add-ons; a disabled one is added too, to be removed where it was installed before.
func (s *server) addon(name config.Addon, kubeconfig string, names *node.Nameservers) component.Component {
	return addon.New(addon.Options{
		Name: name, Disabled: !s.cfg.Enabled(name), Kubeconfig: kubeconfig, Image: s.manifest.Image,
		ClusterDNS: s.cfg.ClusterDNS, ClusterDomain: s.cfg.ClusterDomain, Nameservers: names.Servers,
		NodeName: s.name, NodeAddress: s.ip, StorageDir: filepath.Join(s.cfg.DataDir, "storage"), Log: s.log,
	})
}

// addresses are those under which LoadBalancer services are reached, the outer one first.
func (s *server) addresses() []netip.Addr {
	if s.cfg.ExternalIP.IsValid() && s.cfg.ExternalIP != s.ip {
		return []netip.Addr{s.cfg.ExternalIP, s.ip}
	}
	return []netip.Addr{s.ip}
}

func newLog(cfg *config.Server) *slog.Logger {
	level := slog.LevelInfo
	if cfg.Debug {
		level = slog.LevelDebug
	}
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level}))
}
