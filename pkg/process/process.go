// Package process is what the process of every node does, server or agent, around its components: it claims the data dir and holds
// its lock, finds out the node's name and address, finds the unpacked programs, sets up the logs, serves `polymesh status`, notifies
// the service manager when the node is up, and gives memory back.
//
// pkg/server and pkg/agent call Run with a function that builds their components.
package process

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"google.golang.org/grpc/grpclog"
	utilfeature "k8s.io/apiserver/pkg/util/feature"
	logsapi "k8s.io/component-base/logs/api/v1"
	"k8s.io/klog/v2"

	"polymesh.dev/polymesh/pkg/component"
	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/datadir"
	"polymesh.dev/polymesh/pkg/layout"
	"polymesh.dev/polymesh/pkg/payload"
	"polymesh.dev/polymesh/pkg/preflight"
	"polymesh.dev/polymesh/pkg/status"
	"polymesh.dev/polymesh/pkg/version"
)

// Options are those of the process.
type Options struct {
	Node *config.Node
	// Kubeconfig is where a server writes the administrator's; empty on an agent.
	Kubeconfig string
	// Build adds the components, and returns the one whose readiness is reported to a service manager. It may wait, for a server
	// of the cluster for example; Process.Waiting shows for what.
	Build func(context.Context, *Process, *component.Manager) (up component.Handle, err error)
}

// Process is the input for building components.
type Process struct {
	// Name and IP are the node's, configured or detected.
	Name string
	IP   netip.Addr
	// Programs is the path by which running pods use the shipped programs, unpacked the folder that this program came from.
	Programs payload.Dir
	unpacked string
	Manifest *payload.Manifest
	Marker   *datadir.Marker
	Lock     *datadir.Lock
	Log      *slog.Logger
	// Status serves `polymesh status`. Build adds what it shows besides the components.
	Status *status.Server
	// Before is called when all components have checked their settings, before the first one starts; nil for nothing.
	Before func(context.Context) error

	waiting atomic.Pointer[component.Status]
}

// Run runs a node until ctx ends.
func Run(ctx context.Context, o Options) error {
	// Inherited by containerd, the kubelet and the shims.
	syscall.Umask(layout.Umask)
	// Everything that this process starts inherits its environment.
	for _, name := range config.SecretVariables() {
		if err := os.Unsetenv(name); err != nil {
			return err
		}
	}
	cfg := o.Node
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
	if o.Kubeconfig != "" {
		if err := marker.NoteKubeconfig(cfg.DataDir, o.Kubeconfig); err != nil {
			return err
		}
	}
	foreign, err := marker.Take(cfg.DataDir, cfg.DataDir.Kubelet(), cfg.DataDir.PodLogs())
	if err != nil {
		return err
	}
	for _, folder := range foreign {
		log.Warn("a folder that this node uses contains files of another Kubernetes: `polymesh reset` will not remove it", "folder", folder)
	}
	p := &Process{Name: cfg.NodeName, IP: cfg.NodeIP, Marker: marker, Lock: lock, Log: log}
	if err := p.prepare(cfg); err != nil {
		return err
	}
	manager := component.NewManager(log)
	manager.OnceChecked(func(ctx context.Context) error {
		if p.Before != nil {
			if err := p.Before(ctx); err != nil {
				return err
			}
		}
		return p.linkPrograms()
	})
	role := status.RoleServer
	if o.Kubeconfig == "" {
		role = status.RoleAgent
	}
	// The components are not known before Build has returned. Until then, nothing is ready.
	p.Waiting(role, "reading its settings and certificates")
	base := status.Report{
		Role: role, Version: version.Version, Since: time.Now(), DataDir: string(cfg.DataDir),
		Node: p.Name, NodeIP: p.IP.String(), Kubeconfig: o.Kubeconfig,
	}
	if p.Status, err = status.Serve(ctx, cfg.DataDir.StatusSocket(), base, source{p, manager}); err != nil {
		return err
	}
	up, err := o.Build(ctx, p, manager)
	if ctx.Err() != nil {
		return nil
	}
	if err != nil {
		return err
	}
	p.waiting.Store(nil)
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

// Waiting shows in `polymesh status` what Build waits for.
func (p *Process) Waiting(name, message string) {
	s := component.Status{Name: name, State: component.Starting, Since: time.Now(), Message: message}
	if before := p.waiting.Load(); before != nil {
		s.Since = before.Since
	}
	p.waiting.Store(&s)
}

// source is what `polymesh status` shows: what Build waits for, and then the components.
type source struct {
	p       *Process
	manager *component.Manager
}

// Status implements status.Source.
func (s source) Status(ctx context.Context) []component.Status {
	if w := s.p.waiting.Load(); w != nil {
		return []component.Status{*w}
	}
	return s.manager.Status(ctx)
}

// prepare collects what the components need to know about the machine. It changes nothing on it.
func (p *Process) prepare(cfg *config.Node) error {
	// All of Kubernetes runs in one process: a second component must not set up logging again.
	logsapi.ReapplyHandling = logsapi.ReapplyHandlingIgnoreUnchanged
	logging := logsapi.NewLoggingConfiguration()
	logging.Verbosity = logsapi.VerbosityLevel(cfg.LogLevel)
	if err := logsapi.ValidateAndApply(logging, utilfeature.DefaultFeatureGate); err != nil {
		return fmt.Errorf("set up the Kubernetes components' logs: %w", err)
	}
	if p.Name == "" {
		host, err := os.Hostname()
		if err != nil {
			return fmt.Errorf("read the host's name: %w", err)
		}
		p.Name = strings.ToLower(host)
	}
	if !p.IP.IsValid() {
		ip, err := preflight.NodeIP()
		if err != nil {
			return err
		}
		p.IP = ip
	}
	p.unpacked = os.Getenv(payload.EnvDir)
	if p.unpacked == "" {
		return errors.New("the program was not started by its launcher: run `polymesh`, the file that was shipped")
	}
	var err error
	if p.Manifest, err = payload.Dir(p.unpacked).Manifest(); err != nil {
		return err
	}
	p.Programs = payload.Dir(cfg.DataDir.Programs())
	// kube-proxy and the CNI plugins call nft by name.
	return os.Setenv("PATH", p.Programs.BinDir()+":"+os.Getenv("PATH"))
}

func newLog(cfg *config.Node) *slog.Logger {
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
