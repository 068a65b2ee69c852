package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	oci "github.com/opencontainers/image-spec/specs-go/v1"
)

// builder builds the layers of all images. A part that several images share is built once.
type builder struct {
	programs  string
	bootstrap string
	envoy     string
	debian    debian
	archive   *archive
	made      map[string]layer
}

// image is one image: its name below the registry, its layers from the bottom up, and how it is run.
type image struct {
	name   string
	parts  []part
	config oci.ImageConfig
}

// part is the contents of one layer.
type part struct {
	name string
	fill func(context.Context, tree) error
}

// Users as in the upstream images: 65535 for pause, 65532 is distroless' nonroot, 65534 nobody, 1337 Istio's.
const accounts = `root:x:0:0:root:/root:/sbin/nologin
nobody:x:65534:65534:nobody:/nonexistent:/sbin/nologin
nonroot:x:65532:65532:nonroot:/home/nonroot:/sbin/nologin
istio-proxy:x:1337:1337:istio-proxy:/nonexistent:/sbin/nologin
`

const groups = `root:x:0:
nobody:x:65534:
nonroot:x:65532:
istio-proxy:x:1337:
`

const searchPath = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// images is the list of shipped images. Users, entry points and paths are those of the upstream Dockerfiles, so that upstream
// manifests and charts work with them.
func (b *builder) images() []image {
	static := part{"static", b.static}
	shell := part{"busybox", b.debian.busybox}
	bootstrap := part{"bootstrap", func(_ context.Context, t tree) error {
		template, err := os.ReadFile(b.bootstrap)
		if err != nil {
			return err
		}
		text, err := withExposition(string(template))
		if err != nil {
			return fmt.Errorf("%s: %w", b.bootstrap, err)
		}
		t.text("var/lib/istio/envoy/envoy_bootstrap_tmpl.json", text)
		return nil
	}}
	return []image{
		{"pause", []part{b.program("pause", "pause")}, oci.ImageConfig{
			User: "65535:65535", Entrypoint: []string{"/pause"}, Env: []string{searchPath},
		}},
		{"coredns", []part{static, b.program("coredns", "coredns")}, oci.ImageConfig{
			User: "65532:65532", Entrypoint: []string{"/coredns"}, Env: []string{searchPath}, WorkingDir: "/",
			ExposedPorts: map[string]struct{}{"53": {}, "53/udp": {}},
		}},
		{"metrics-server", []part{static, b.program("metrics-server", "metrics-server")}, oci.ImageConfig{
			User: "65534", Entrypoint: []string{"/metrics-server"}, Env: []string{searchPath},
		}},
		{"local-path-provisioner", []part{static, b.program("local-path-provisioner", "usr/bin/local-path-provisioner")}, oci.ImageConfig{
			Cmd: []string{"local-path-provisioner"}, Env: []string{searchPath},
		}},
		{"forward", []part{b.program("forward", "forward")}, oci.ImageConfig{
			User: "65532:65532", Entrypoint: []string{"/forward"}, Env: []string{searchPath},
		}},
		{"busybox", []part{static, shell}, oci.ImageConfig{
			Cmd: []string{"sh"}, Env: []string{searchPath},
		}},
		{"istio/pilot", []part{static, bootstrap, b.program("pilot-discovery", "usr/local/bin/pilot-discovery")}, oci.ImageConfig{
			User: "1337:1337", Entrypoint: []string{"/usr/local/bin/pilot-discovery"}, Env: []string{searchPath},
		}},
		{"istio/proxyv2", []part{static, {"proxy", b.proxy}, shell, b.program("curl", "usr/bin/curl"), bootstrap, b.program("envoy", "usr/local/bin/envoy"), b.program("pilot-agent", "usr/local/bin/pilot-agent")}, oci.ImageConfig{
			User: "1337:1337", Entrypoint: []string{"/usr/local/bin/pilot-agent"}, WorkingDir: "/",
			Env: []string{searchPath, "ISTIO_META_ISTIO_PROXY_SHA=envoy:" + b.envoy},
		}},
	}
}

// static is the base of static programs: accounts, certificate authorities, a place for temporary files.
func (b *builder) static(ctx context.Context, t tree) error {
	t.text("etc/passwd", accounts)
	t.text("etc/group", groups)
	t.text("etc/nsswitch.conf", "hosts: files dns\n")
	t.directory("tmp", 0o1777)
	t.directory("run", 0o755)
	t.directory("home/nonroot", 0o755)
	t.directory("root", 0o700)
	return b.debian.certificates(ctx, t)
}

// proxy is the C library for Envoy and the packet-filter programs for istio-iptables.
func (b *builder) proxy(ctx context.Context, t tree) error {
	for _, name := range []string{"base-files", "libc6"} {
		if err := b.debian.unpack(ctx, t, name); err != nil {
			return err
		}
	}
	// Character sets, debugging helpers and vector mathematics of the C library: not used here.
	t.drop(func(name string, directory bool) bool {
		base := filepath.Base(name)
		return strings.Contains(name, "/gconv") || strings.HasPrefix(name, "usr/lib/x86_64-linux-gnu/audit") || strings.HasPrefix(base, "libmvec") ||
			strings.HasPrefix(base, "libmemusage") || strings.HasPrefix(base, "libpcprofile") || strings.HasPrefix(base, "libc_malloc_debug") || strings.HasPrefix(base, "libthread_db") ||
			(strings.HasPrefix(name, "usr/share/base-files") && !directory)
	})
	// base-files contains these with the permissions of a whole system; the layer below has set them already.
	t.drop(func(name string, _ bool) bool {
		return name == "tmp" || name == "root" || name == "home" || name == "run" || name == "boot"
	})
	t.link("etc/os-release", "../usr/lib/os-release")
	return b.debian.iptables(ctx, t)
}

// program is a layer with one of our programs. Parts that change for different reasons are in separate layers.
func (b *builder) program(name, target string) part {
	return part{name, func(_ context.Context, t tree) error {
		return t.copy(target, filepath.Join(b.programs, name), 0o755)
	}}
}

func (b *builder) layers(ctx context.Context, parts []part) ([]layer, error) {
	if b.made == nil {
		b.made = map[string]layer{}
	}
	var layers []layer
	for _, p := range parts {
		l, ok := b.made[p.name]
		if !ok {
			t := tree{}
			if err := p.fill(ctx, t); err != nil {
				return nil, fmt.Errorf("layer %s: %w", p.name, err)
			}
			var err error
			if l, err = b.archive.layer(ctx, t); err != nil {
				return nil, fmt.Errorf("layer %s: %w", p.name, err)
			}
			b.made[p.name] = l
		}
		layers = append(layers, l)
	}
	return layers, nil
}
