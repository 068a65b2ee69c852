package controlplane

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"strings"
	"sync"

	"github.com/spf13/pflag"
	"k8s.io/component-base/version"
	"k8s.io/kubernetes/cmd/kube-controller-manager/app"
	"k8s.io/kubernetes/cmd/kube-controller-manager/app/options"

	"polymesh.dev/polymesh/pkg/certificate"
	"polymesh.dev/polymesh/pkg/component"
	"polymesh.dev/polymesh/pkg/kubeflags"
	"polymesh.dev/polymesh/pkg/layout"
)

// ControllerManager is the component "kube-controller-manager".
type ControllerManager struct {
	component.Task
	opts    Options
	options *options.KubeControllerManagerOptions
	built   chan struct{} // closed when all controllers are built
}

// NewControllerManager returns the controller manager, not yet started.
func NewControllerManager(o Options) *ControllerManager {
	return &ControllerManager{Task: component.NewTask(), opts: o, built: make(chan struct{})}
}

// Name implements component.Component.
func (c *ControllerManager) Name() string { return "kube-controller-manager" }

// Version is the version of Kubernetes.
func (c *ControllerManager) Version() string { return version.Get().GitVersion }

func (c *ControllerManager) args() []string {
	cfg, certs := c.opts.Config, c.opts.Certificates
	args := map[string]string{
		"allocate-node-cidrs": "true",
		"cluster-cidr":        cfg.ClusterCIDR.String(),
		// For all signers: there is no duration for kubelets alone.
		"cluster-signing-duration": certificate.NodeLife.String(),
		// Expired tokens are removed; the cleaner is off by default.
		"controllers":                      "*,tokencleaner",
		"kubeconfig":                       cfg.DataDir.Kubeconfig(c.Name()),
		"profiling":                        "false",
		"root-ca-file":                     certs.Cert(certificate.ServerCA),
		"service-account-private-key-file": certs.ServiceAccountKey(),
		"service-cluster-ip-range":         cfg.ServiceCIDR.String(),
		"use-service-account-credentials":  "true",
	}
	// An authority for each signer, because kubelets have one of their own: with the others', a node could serve as the API server.
	for signer, authority := range map[string]string{
		"kubelet-serving": certificate.KubeletCA, "kubelet-client": certificate.ClientCA,
		"kube-apiserver-client": certificate.ClientCA, "legacy-unknown": certificate.ClientCA,
	} {
		args["cluster-signing-"+signer+"-cert-file"] = certs.Cert(authority)
		args["cluster-signing-"+signer+"-key-file"] = certs.Key(authority)
	}
	maps.Copy(args, separateFlags(c.opts, layout.ControllersPort))
	if c.opts.Datastore.LeaderElect {
		// Another server takes over at once when this one stops. Alpha, because not all controllers stop in time; the process ends anyway.
		args["feature-gates"] = "ControllerManagerReleaseLeaderElectionLockOnExit=true"
	}
	return kubeflags.Merge(args, cfg.ControllerManagerArgs)
}

// Init parses the command line.
func (c *ControllerManager) Init(context.Context) (err error) {
	if c.options, err = options.NewKubeControllerManagerOptions(); err != nil {
		return fmt.Errorf("initialize options: %w", err)
	}
	fs := pflag.NewFlagSet(c.Name(), pflag.ContinueOnError)
	for _, set := range c.options.Flags(app.KnownControllers(), app.ControllersDisabledByDefault(), app.ControllerAliases()).FlagSets {
		fs.AddFlagSet(set)
	}
	if err := kubeflags.Check("kube-controller-manager-arg", fs, c.args()); err != nil {
		return err
	}
	return checkLeaderElect(c.opts, "kube-controller-manager-arg", c.options.Generic.LeaderElection.LeaderElect)
}

// healthPort implements programmed.
func (c *ControllerManager) healthPort() int { return c.options.SecureServing.BindPort }

// Start runs the controllers.
func (c *ControllerManager) Start(ctx context.Context) error {
	config, err := c.options.Config(ctx, app.KnownControllers(), app.ControllersDisabledByDefault(), app.ControllerAliases())
	if err != nil {
		return fmt.Errorf("read options: %w", err)
	}
	config.Kubeconfig.Wrap(func(next http.RoundTripper) http.RoundTripper {
		return &firstList{next: next, seen: sync.OnceFunc(func() { close(c.built) })}
	})
	kubeflags.Log(c.Name(), c.args())
	c.Go(ctx, func(ctx context.Context) error { return app.Run(ctx, config.Complete()) })
	return nil
}

// firstList detects the first request of the controllers' shared informers. app.Run starts them when all controllers are
// built, and without a port there is no other sign (Run in cmd/kube-controller-manager/app/controllermanager.go).
type firstList struct {
	next http.RoundTripper
	seen func()
}

// RoundTrip implements http.RoundTripper.
func (f *firstList) RoundTrip(r *http.Request) (*http.Response, error) {
	// Before that, the same client requests /healthz until the API server is up.
	if strings.HasSuffix(r.UserAgent(), "/shared-informers") && r.URL.Path != "/healthz" {
		f.seen()
	}
	return f.next.RoundTrip(r)
}

// Ready returns nil once all controllers are built. The kubelet must not start earlier: the volume plugins of the controllers and
// of the kubelet share a variable (nim in pkg/volume/csi/csi_plugin.go), and a kubelet that finds the controllers' value
// never sets its node Ready and exits the process after two minutes.
func (c *ControllerManager) Ready(context.Context) error {
	select {
	case <-c.built:
		return nil
	default:
		return errors.New("building the controllers")
	}
}
