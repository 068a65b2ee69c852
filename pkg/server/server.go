// Package server is a Polymesh server: its components, and the order in which they start.
//
// It turns a checked configuration into the components of pkg/controlplane, pkg/node and pkg/mesh, passes them to a manager, and
// runs them until it is stopped. `polymesh server` calls Run. The list of components is addComponents in components.go.
package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"google.golang.org/grpc/grpclog"
	utilfeature "k8s.io/apiserver/pkg/util/feature"
	logsapi "k8s.io/component-base/logs/api/v1"
	"k8s.io/klog/v2"

	"polymesh.dev/polymesh/pkg/certificate"
	"polymesh.dev/polymesh/pkg/component"
	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/controlplane"
	"polymesh.dev/polymesh/pkg/datadir"
	"polymesh.dev/polymesh/pkg/layout"
	"polymesh.dev/polymesh/pkg/payload"
	"polymesh.dev/polymesh/pkg/preflight"
	"polymesh.dev/polymesh/pkg/status"
	"polymesh.dev/polymesh/pkg/version"
)

// Run runs a server until ctx ends.
func Run(ctx context.Context, cfg *config.Server) error {
	// Inherited by containerd, the kubelet and the shims.
	syscall.Umask(layout.Umask)
	for _, name := range config.SecretVariables() {
		if err := os.Unsetenv(name); err != nil {
			return err
		}
	}
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
	foreign, err := marker.Take(cfg.DataDir, cfg.DataDir.Kubelet(), cfg.DataDir.PodLogs())
	if err != nil {
		return err
	}
	for _, folder := range foreign {
		log.Warn("a folder that this node uses contains files of another Kubernetes: `polymesh reset` will not remove it", "folder", folder)
	}
	this, err := prepare(cfg, marker, lock, log)
	if err != nil {
		return err
	}
	manager := component.NewManager(log)
	manager.OnceChecked(this.linkPrograms)
	up := this.addComponents(manager)

	base := status.Report{
		Version: version.Version, Since: time.Now(), DataDir: string(cfg.DataDir),
		Node: this.name, NodeIP: this.ip.String(), Kubeconfig: cfg.Kubeconfig,
	}
	if err := status.Serve(ctx, cfg.DataDir.StatusSocket(), base, manager); err != nil {
		return err
	}
	go func() {
		select {
		case <-up.Ready():
			_, _ = daemon.SdNotify(false, daemon.SdNotifyReady)
		case <-ctx.Done():
		}
	}()
	go keepMemory(ctx, manager.Settled(), func() (uint64, error) { return availableMemory("") }, log)
	return manager.Run(ctx)
}

// server is the input for building a server's components.
type server struct {
	cfg  *config.Server
	log  *slog.Logger
	name string
	ip   netip.Addr
	// unpacked is the folder of the payload that this program came from, programs the path by which running pods use it.
	unpacked string
	programs payload.Dir
	manifest *payload.Manifest
	renewal  *certificate.Renewal
	marker   *datadir.Marker
	lock     *datadir.Lock
}

// prepare collects what the components need to know about the machine. It changes nothing on it.
func prepare(cfg *config.Server, marker *datadir.Marker, lock *datadir.Lock, log *slog.Logger) (*server, error) {
	s := &server{cfg: cfg, log: log, name: cfg.NodeName, ip: cfg.NodeIP, marker: marker, lock: lock}
	// All of Kubernetes runs in one process: a second component must not set up logging again.
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
	s.programs = payload.Dir(cfg.DataDir.Programs())
	// kube-proxy and the CNI plugins call nft by name.
	if err := os.Setenv("PATH", s.programs.BinDir()+":"+os.Getenv("PATH")); err != nil {
		return nil, err
	}
	s.renewal = certificate.NewRenewal(certificate.Options{
		Dir: cfg.DataDir.TLS(), NodeName: s.name, NodeIP: s.ip, SANs: s.sans(),
		ServiceIP: cfg.APIServiceIP(), ClusterDomain: cfg.ClusterDomain,
	}, s.writeKubeconfigs, log)
	return s, nil
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

func newLog(cfg *config.Server) *slog.Logger {
	level := slog.LevelInfo
	if cfg.Debug {
		level = slog.LevelDebug
	}
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level}))
}

// grpcToKlog sends gRPC's warnings and errors to klog, as kube-apiserver does.
func grpcToKlog() {
	grpclog.SetLoggerV2(grpclog.NewLoggerV2(io.Discard, klogWarnings{}, io.Discard))
}

// klogWarnings writes lines as warnings of klog.
type klogWarnings struct{}

func (klogWarnings) Write(line []byte) (int, error) {
	klog.Warning(strings.TrimSpace(string(line)))
	return len(line), nil
}
