package node

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/pelletier/go-toml/v2"
	"golang.org/x/sys/unix"
	"gopkg.in/natefinch/lumberjack.v2"

	"polymesh.dev/polymesh/pkg/atomicfile"
	"polymesh.dev/polymesh/pkg/cgroup"
	"polymesh.dev/polymesh/pkg/component"
	"polymesh.dev/polymesh/pkg/imagestore"
)

// Containerd is the component "containerd", a child process.
type Containerd struct {
	opts    Options
	child   component.Child
	version atomic.Pointer[string]
}

// NewContainerd returns containerd, not yet started.
func NewContainerd(o Options) *Containerd {
	c := &Containerd{opts: o}
	// Complete from the start: `status` may read the process id at any time.
	c.child = component.Child{
		Path: o.Programs.Bin("containerd"),
		Args: []string{"--config", c.configFile()},
		Env:  append(os.Environ(), "PATH="+o.Programs.BinDir()+":"+os.Getenv("PATH")),
		Output: &lumberjack.Logger{
			Filename: filepath.Join(c.dir(), "containerd.log"), MaxSize: 50, MaxBackups: 3, Compress: true,
		},
		Log: o.Log.With("component", c.Name()),
	}
	return c
}

// Name implements component.Component.
func (c *Containerd) Name() string { return "containerd" }

// Version is the version that containerd reports.
func (c *Containerd) Version() string {
	if v := c.version.Load(); v != nil {
		return *v
	}
	return ""
}

// PID implements component.Process.
func (c *Containerd) PID() int { return c.child.PID() }

func (c *Containerd) dir() string { return c.opts.Settings.DataDir.Agent("containerd") }
func (c *Containerd) configFile() string {
	return c.opts.Settings.DataDir.Agent("etc", "containerd", "config.toml")
}

// Init does nothing: Start writes the configuration.
func (c *Containerd) Init(context.Context) error { return nil }

// prepare writes containerd's configuration, and sets aside files that containerd could not read.
func (c *Containerd) prepare(ctx context.Context) error {
	_, err := os.Stat(c.dir())
	existed := err == nil
	if err := c.opts.Session.Begin(existed); err != nil {
		return err
	}
	if c.opts.Session.Doubt() {
		if err := setTornMetadataAside(c.dir(), c.child.Log); err != nil {
			return err
		}
		if err := removeHalfMadeLayers(ctx, c.dir()); err != nil {
			return err
		}
	}
	for _, dir := range []string{c.dir(), c.opts.Settings.DataDir.CNIConfDir(), c.opts.Settings.DataDir.RegistryDir()} {
		if err := os.MkdirAll(dir, 0o711); err != nil {
			return err
		}
	}
	pause, err := c.opts.Manifest.Image("pause")
	if err != nil {
		return err
	}
	if err := c.openSandboxFiles(); err != nil {
		return err
	}
	text, err := toml.Marshal(c.configuration(pause, hasCapability(unix.CAP_SYS_RESOURCE), cgroup.BySystemd()))
	if err != nil {
		return fmt.Errorf("encode containerd's configuration: %w", err)
	}
	return atomicfile.Write(c.configFile(), text, 0o600)
}

// openSandboxFiles makes the files that containerd has written for running pods readable for every user: hosts, resolv.conf and
// hostname. It writes them with mode 0644 less the umask, once per pod, and earlier servers had the umask of the shell
// that started them.
func (c *Containerd) openSandboxFiles() error {
	files, err := filepath.Glob(filepath.Join(c.dir(), "io.containerd.grpc.v1.cri", "sandboxes", "*", "*"))
	if err != nil {
		return err
	}
	for _, file := range files {
		if !slices.Contains([]string{"hosts", "hostname", "resolv.conf"}, filepath.Base(file)) {
			continue
		}
		if err := os.Chmod(file, 0o644); err != nil {
			return fmt.Errorf("let pods read their own files: %w", err)
		}
	}
	return nil
}

type table = map[string]any

// configuration returns containerd's config file, version 3
// (https://github.com/containerd/containerd/blob/main/docs/cri/config.md).
func (c *Containerd) configuration(pause string, mayLowerOOMScore, systemd bool) table {
	socket := c.opts.Settings.DataDir.ContainerdSocket()
	images := table{
		"snapshotter":   imagestore.Snapshotter,
		"pinned_images": table{"sandbox": pause},
		"registry":      table{"config_path": c.opts.Settings.DataDir.RegistryDirs()},
		// Sync a layer to disk before containerd records it. The transfer service cannot do that.
		"image_pull_with_sync_fs": true,
		"use_local_image_pull":    true,
	}
	binDirs, confDir := []string{c.opts.Programs.CNIDir()}, c.opts.Settings.DataDir.CNIConfDir()
	if !c.opts.OwnNetwork {
		// Where the installers of pod networks put their files (https://github.com/containernetworking/cni, cnitool and libcni's defaults).
		binDirs, confDir = append(binDirs, "/opt/cni/bin"), "/etc/cni/net.d"
	}
	runtime := table{
		"restrict_oom_score_adj":       !mayLowerOOMScore,
		"enable_unprivileged_ports":    true,
		"enable_unprivileged_icmp":     true,
		"netns_mounts_under_state_dir": true,
		"cni": table{
			"bin_dirs":              binDirs,
			"conf_dir":              confDir,
			"use_internal_loopback": true,
		},
		"containerd": table{
			"default_runtime_name": "runc",
			"runtimes": table{"runc": table{
				"runtime_type": "io.containerd.runc.v2",
				"runtime_path": c.opts.Programs.Bin("containerd-shim-runc-v2"),
				"options": table{
					"BinaryName":    c.opts.Programs.Bin("runc"),
					"Root":          c.opts.Settings.DataDir.Run("runc"),
					"SystemdCgroup": systemd,
				},
			}},
		},
	}
	conf := table{
		"version": 3,
		"root":    c.dir(),
		"state":   filepath.Dir(socket),
		"grpc":    table{"address": socket},
		"ttrpc":   table{"address": socket + ".ttrpc"},
		// Disabled because unused plugins cost memory.
		"disabled_plugins": []string{
			"io.containerd.nri.v1.nri", "io.containerd.snapshotter.v1.blockfile", "io.containerd.snapshotter.v1.btrfs",
			"io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.erofs", "io.containerd.snapshotter.v1.zfs",
			"io.containerd.tracing.processor.v1.otlp", "io.containerd.internal.v1.tracing",
			// It creates /opt/containerd, for programs from images.
			"io.containerd.internal.v1.opt",
		},
		"plugins": table{
			"io.containerd.cri.v1.images":  images,
			"io.containerd.cri.v1.runtime": runtime,
			// The same for every client: ours, ctr, buildkit.
			"io.containerd.service.v1.diff-service": table{"sync_fs": true},
			// Records each layer's folder, for the check after a power failure.
			"io.containerd.snapshotter.v1.overlayfs": table{"upperdir_label": true},
			// By default all shims of a machine listen in /run/containerd, and a killed one leaves its socket there.
			"io.containerd.shim.v1.manager": table{"socket_dir": c.opts.Settings.DataDir.Run("s")},
		},
	}
	if mayLowerOOMScore {
		// Same as the kubelet's: when memory runs out, pods are killed first.
		conf["oom_score"] = oomScore
	}
	return conf
}

// oomScore is the kubelet's default (k8s.io/kubernetes/pkg/kubelet/qos, KubeletOOMScoreAdj).
const oomScore = -999

// Start starts containerd.
func (c *Containerd) Start(ctx context.Context) error {
	if err := c.prepare(ctx); err != nil {
		return err
	}
	return c.child.Start(ctx)
}

// Ready requests containerd's version.
func (c *Containerd) Ready(ctx context.Context) error {
	socket := c.opts.Settings.DataDir.ContainerdSocket()
	if _, err := os.Stat(socket); err != nil {
		return errors.New("not listening yet")
	}
	client, err := containerd.New(socket, containerd.WithDefaultNamespace(imagestore.Namespace))
	if err != nil {
		return fmt.Errorf("connect to containerd: %w", err)
	}
	defer client.Close()
	v, err := client.Version(ctx)
	if err != nil {
		return fmt.Errorf("get containerd's version: %w", err)
	}
	c.version.Store(&v.Version)
	return nil
}

// Stop ends containerd. Containers keep running: each has its own shim.
func (c *Containerd) Stop(ctx context.Context) error {
	return errors.Join(c.child.Stop(ctx), c.opts.Session.End())
}

// hasCapability reports whether this process has a capability: sandboxed machines often lack some.
func hasCapability(capability int) bool {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return false
	}
	return data[capability/32].Effective&(1<<(capability%32)) != 0
}
