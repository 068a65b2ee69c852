package node

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/pflag"
	"k8s.io/component-base/version"
	"k8s.io/kubernetes/cmd/kube-proxy/app"

	"polymesh.dev/polymesh/pkg/component"
	"polymesh.dev/polymesh/pkg/kubeflags"
	"polymesh.dev/polymesh/pkg/layout"
	"polymesh.dev/polymesh/pkg/node/keeper"
	"polymesh.dev/polymesh/pkg/preflight"
)

// ProxyCommand is the name under which this program is kube-proxy.
const ProxyCommand = "kube-proxy"

// RunProxy runs kube-proxy as a process of its own, until it is killed, and returns its exit code. It has no server for metrics, see Init.
func RunProxy(args []string) int {
	options, err := parseProxy(append(args, "--metrics-port=0"))
	if err == nil {
		err = options.Run(context.Background())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "kube-proxy:", err)
		return 1
	}
	return 0
}

// Proxy is the component "kube-proxy", in this process.
type Proxy struct {
	component.Task
	opts    Options
	options *app.Options
	keeper  *keeper.Keeper
	log     *slog.Logger
}

// NewProxy returns kube-proxy, not yet started.
func NewProxy(o Options) *Proxy {
	log := o.Log.With("component", "kube-proxy")
	return &Proxy{Task: component.NewTask(), opts: o, keeper: keeper.New(log), log: log}
}

// Name implements component.Component.
func (p *Proxy) Name() string { return "kube-proxy" }

// Version is the version of Kubernetes.
func (p *Proxy) Version() string { return version.Get().GitVersion }

func (p *Proxy) args() []string {
	mode := "nftables"
	if !preflight.NFTables() {
		mode = "iptables"
	}
	flags := map[string]string{
		"cluster-cidr":         p.opts.ClusterCIDR.String(),
		"healthz-bind-address": fmt.Sprintf("0.0.0.0:%d", layout.ProxyHealthPort),
		"hostname-override":    p.opts.Name,
		"kubeconfig":           p.opts.Identity.Proxy,
		"proxy-mode":           mode,
	}
	if !mayTuneConntrack() {
		// A network namespace, or a sandbox, cannot change the machine's connection table.
		flags["conntrack-max-per-core"] = "0"
		flags["conntrack-tcp-timeout-established"] = "0s"
		flags["conntrack-tcp-timeout-close-wait"] = "0s"
		flags["conntrack-udp-timeout"] = "0s"
		flags["conntrack-udp-timeout-stream"] = "0s"
	}
	return kubeflags.Merge(flags, p.opts.Settings.ProxyArgs)
}

// mayTuneConntrack tries to write the current value.
func mayTuneConntrack() bool {
	const path = "/proc/sys/net/netfilter/nf_conntrack_max"
	text, err := os.ReadFile(path)
	return err == nil && os.WriteFile(path, bytes.TrimSpace(text), 0o644) == nil
}

// Init parses the command line.
func (p *Proxy) Init(context.Context) error {
	args := p.args()
	options, err := parseProxy(args)
	if err != nil {
		return err
	}
	if err := options.Validate(); err != nil {
		return fmt.Errorf("--kube-proxy-arg: %w", err)
	}
	if !slices.ContainsFunc(args, func(arg string) bool { return strings.HasPrefix(arg, "--metrics-") }) {
		// The metrics server needs no credentials, and exposes all components in this process: metrics, flags and
		// configuration. The API server and the kubelet serve the same metrics, with authentication. Validate rejects the value
		// that turns the server off, but Run accepts it.
		if options, err = parseProxy(append(args, "--metrics-port=0")); err != nil {
			return err
		}
	}
	p.options = options
	return nil
}

func parseProxy(args []string) (*app.Options, error) {
	options := app.NewOptions()
	fs := pflag.NewFlagSet("kube-proxy", pflag.ContinueOnError)
	fs.SetOutput(io.Discard) // deprecation warnings
	options.AddFlags(fs)
	if err := kubeflags.Check("kube-proxy-arg", fs, args); err != nil {
		return nil, err
	}
	if err := options.Complete(fs); err != nil {
		return nil, fmt.Errorf("--kube-proxy-arg: %w", err)
	}
	return options, nil
}

// Start runs kube-proxy. Its Run ignores the context (cmd/kube-proxy/app/server.go: the sync loop and the node
// informer never end), so stopping it means no longer waiting for it; its rules stay in place either way.
func (p *Proxy) Start(ctx context.Context) error {
	// In the other modes kube-proxy has its own monitor (pkg/util/iptables, Monitor).
	if slices.Contains(p.args(), "--proxy-mode=nftables") {
		rules, err := newServiceRules(p.args(), p.log)
		if err != nil {
			return err
		}
		p.keeper.Add(rules)
	}
	kubeflags.Log(p.Name(), p.args())
	p.Go(ctx, func(ctx context.Context) error {
		ended := make(chan error, 1)
		go func() { ended <- p.options.Run(ctx) }()
		go p.keeper.Run(ctx)
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

// Ready checks kube-proxy's health endpoint and tries a service address: the endpoint stays healthy when another program has
// removed the rules.
func (p *Proxy) Ready(ctx context.Context) error {
	if err := healthz(ctx, "http://"+layout.Loopback(layout.ProxyHealthPort).String()+"/healthz"); err != nil {
		return err
	}
	if err := p.keeper.Check(ctx); err != nil {
		return err
	}
	address := net.JoinHostPort(p.opts.APIServiceIP.String(), "443")
	conn, err := (&net.Dialer{Timeout: dialTimeout}).DialContext(ctx, "tcp", address)
	if errors.Is(err, syscall.ENETUNREACH) {
		// Without a default route, the machine cannot route to a service address before any rule applies. Its pods can.
		return nil
	}
	if err != nil {
		return fmt.Errorf("service addresses do not work: %w", err)
	}
	return conn.Close()
}

// dialTimeout is the timeout for a connection that never leaves the machine.
const dialTimeout = 2 * time.Second

// Notes reports that rules were restored.
func (p *Proxy) Notes(context.Context) []string {
	note := p.keeper.Last()
	return component.Present(&note)
}
