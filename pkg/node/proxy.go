package node

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"time"

	"github.com/spf13/pflag"
	"k8s.io/component-base/version"
	"k8s.io/kubernetes/cmd/kube-proxy/app"

	"polymesh.dev/polymesh/pkg/component"
	"polymesh.dev/polymesh/pkg/controlplane"
	"polymesh.dev/polymesh/pkg/kubeflags"
	"polymesh.dev/polymesh/pkg/preflight"
)

// Proxy is the component "kube-proxy", in this process.
type Proxy struct {
	component.Task
	opts    Options
	options *app.Options
}

// NewProxy returns kube-proxy, not yet started.
func NewProxy(o Options) *Proxy { return &Proxy{Task: component.NewTask(), opts: o} }

// Name implements component.Component.
func (p *Proxy) Name() string { return "kube-proxy" }

// Version is that of Kubernetes.
func (p *Proxy) Version() string { return version.Get().GitVersion }

func (p *Proxy) args() []string {
	mode := "nftables"
	if !preflight.NFTables() {
		mode = "iptables"
	}
	flags := map[string]string{
		"cluster-cidr":         p.opts.Config.ClusterCIDR.String(),
		"healthz-bind-address": "0.0.0.0:10256",
		"hostname-override":    p.opts.Name,
		"kubeconfig":           controlplane.Kubeconfig(p.opts.Config, p.Name()),
		"metrics-bind-address": "127.0.0.1:10249",
		"proxy-mode":           mode,
	}
	if !mayTuneConntrack() {
		// A network namespace, or a sandbox, has no say over the machine's connection table.
		flags["conntrack-max-per-core"] = "0"
		flags["conntrack-tcp-timeout-established"] = "0s"
		flags["conntrack-tcp-timeout-close-wait"] = "0s"
		flags["conntrack-udp-timeout"] = "0s"
		flags["conntrack-udp-timeout-stream"] = "0s"
	}
	return kubeflags.Merge(flags, p.opts.Config.ProxyArgs)
}

// mayTuneConntrack tries by writing the value that is there.
func mayTuneConntrack() bool {
	const path = "/proc/sys/net/netfilter/nf_conntrack_max"
	text, err := os.ReadFile(path)
	return err == nil && os.WriteFile(path, bytes.TrimSpace(text), 0o644) == nil
}

// Init parses the command line.
func (p *Proxy) Init(context.Context) error {
	p.options = app.NewOptions()
	fs := pflag.NewFlagSet(p.Name(), pflag.ContinueOnError)
	p.options.AddFlags(fs)
	if err := kubeflags.Check("kube-proxy-arg", fs, p.args()); err != nil {
		return err
	}
	if err := p.options.Complete(fs); err != nil {
		return fmt.Errorf("--kube-proxy-arg: %w", err)
	}
	if err := p.options.Validate(); err != nil {
		return fmt.Errorf("--kube-proxy-arg: %w", err)
	}
	return nil
}

// Start runs kube-proxy. Its Run takes no notice of the context (cmd/kube-proxy/app/server.go: the sync loop and the node
// informer never end), so stopping it means no longer waiting for it; its rules stay in place either way.
func (p *Proxy) Start(ctx context.Context) error {
	p.Go(ctx, func(ctx context.Context) error {
		ended := make(chan error, 1)
		go func() { ended <- p.options.Run(ctx) }()
		select {
		case err := <-ended:
			return err
		case <-ctx.Done():
			return nil
		}
	})
	return nil
}

// OutlivedFor implements component.Outlived. As with the kubelet, only a fresh process can start another.
func (p *Proxy) OutlivedFor() time.Duration { return outlivedFor }

// Ready asks kube-proxy's health endpoint, which is well once the rules have been written.
func (p *Proxy) Ready(ctx context.Context) error {
	return healthz(ctx, "http://127.0.0.1:10256/healthz")
}
