package controlplane

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/spf13/pflag"
	corev1 "k8s.io/api/core/v1"
	utilerrors "k8s.io/apimachinery/pkg/util/errors"
	"k8s.io/apimachinery/pkg/util/wait"
	apirequest "k8s.io/apiserver/pkg/endpoints/request"
	"k8s.io/apiserver/pkg/server"
	encryptioncontroller "k8s.io/apiserver/pkg/server/options/encryptionconfig/controller"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/util/keyutil"
	"k8s.io/component-base/version"
	"k8s.io/kubernetes/cmd/kube-apiserver/app"
	"k8s.io/kubernetes/cmd/kube-apiserver/app/options"

	"polymesh.dev/polymesh/pkg/certificate"
	"polymesh.dev/polymesh/pkg/component"
	"polymesh.dev/polymesh/pkg/controlplane/nodeaddress"
	"polymesh.dev/polymesh/pkg/kubeconfig"
	"polymesh.dev/polymesh/pkg/kubeflags"
)

// APIServer is the component "kube-apiserver".
type APIServer struct {
	component.Task
	opts   Options
	client kubernetes.Interface

	roles sync.Once // the first attempt of this run to reconcile them
	// noRoles is the error that kept the roles from being reconciled, nil if none.
	noRoles atomic.Pointer[string]
	refused chan struct{} // receives one value if the first attempt fails
}

// NewAPIServer returns the API server, not yet started.
func NewAPIServer(o Options) *APIServer {
	return &APIServer{Task: component.NewTask(), opts: o, refused: make(chan struct{}, 1)}
}

// Name implements component.Component.
func (a *APIServer) Name() string { return "kube-apiserver" }

// Version is the version of Kubernetes.
func (a *APIServer) Version() string { return version.Get().GitVersion }

func (a *APIServer) args() []string {
	cfg, certs := a.opts.Config, a.opts.Certificates
	issuer := "https://kubernetes.default.svc." + cfg.ClusterDomain
	args := map[string]string{
		"advertise-address":                  a.opts.Self().Address.String(),
		"allow-privileged":                   "true",
		"anonymous-auth":                     "false",
		"api-audiences":                      issuer + ",polymesh",
		"authorization-mode":                 "Node,RBAC",
		"bind-address":                       cfg.BindAddress.String(),
		"client-ca-file":                     certs.Cert(certificate.ClientCA),
		"enable-admission-plugins":           "NodeRestriction",
		"enable-aggregator-routing":          "true",
		"enable-bootstrap-token-auth":        "true",
		"kubelet-certificate-authority":      certs.Cert(certificate.KubeletCA),
		"kubelet-client-certificate":         certs.Cert(certificate.APIServerKubelet),
		"kubelet-client-key":                 certs.Key(certificate.APIServerKubelet),
		"kubelet-preferred-address-types":    kubeletAddresses(cfg.FlannelExternalIP),
		"profiling":                          "false",
		"proxy-client-cert-file":             certs.Cert(certificate.FrontProxy),
		"proxy-client-key-file":              certs.Key(certificate.FrontProxy),
		"requestheader-allowed-names":        "system:auth-proxy",
		"requestheader-client-ca-file":       certs.Cert(certificate.RequestHeaderCA),
		"requestheader-extra-headers-prefix": "X-Remote-Extra-",
		"requestheader-group-headers":        "X-Remote-Group",
		"requestheader-username-headers":     "X-Remote-User",
		"secure-port":                        fmt.Sprint(cfg.HTTPSPort),
		// The estimate requests the newest state from the watch caches of idle resources, fails, and logs that a few times
		// a minute (kubernetes/kubernetes#134343). Without it the cost of a LIST is estimated as before 1.34.
		"feature-gates": "SizeBasedListCostEstimate=false",
		// Without it, shutdown waits a minute for the watches of pods.
		"shutdown-send-retry-after":        "true",
		"service-account-issuer":           issuer,
		"service-account-key-file":         certs.ServiceAccountKey(),
		"service-account-signing-key-file": certs.ServiceAccountKey(),
		"service-cluster-ip-range":         cfg.ServiceCIDR.String(),
		"service-node-port-range":          cfg.NodePortRange,
		"tls-cipher-suites":                strings.Join(certificate.CipherSuites(), ","),
		"tls-min-version":                  certificate.MinVersion,
		"tls-cert-file":                    certs.Cert(certificate.APIServer),
		"tls-private-key-file":             certs.Key(certificate.APIServer),
		// The file exists even if nothing is encrypted, so that `polymesh secrets-encrypt` needs no restart.
		"encryption-provider-config":                  cfg.DataDir.EncryptionFile(),
		"encryption-provider-config-automatic-reload": "true",
	}
	maps.Copy(args, a.opts.Datastore.Flags())
	maps.Copy(args, hardening(cfg))
	return kubeflags.Merge(args, cfg.APIServerArgs)
}

// kubeletAddresses are the kinds of addresses at which kubelets are reached, the preferred one first.
func kubeletAddresses(external bool) string {
	var kinds []string
	for _, kind := range nodeaddress.Preferred(external) {
		kinds = append(kinds, string(kind))
	}
	return strings.Join(append(kinds, string(corev1.NodeHostName)), ",")
}

// parse reads the command line into upstream's options.
func (a *APIServer) parse() (*options.ServerRunOptions, error) {
	s := options.NewServerRunOptions()
	flags := pflag.NewFlagSet(a.Name(), pflag.ContinueOnError)
	for _, set := range s.Flags().FlagSets {
		flags.AddFlagSet(set)
	}
	return s, kubeflags.Check("kube-apiserver-arg", flags, a.args())
}

// Init checks the command line, so that a bad --kube-apiserver-arg is rejected before anything is changed.
func (a *APIServer) Init(ctx context.Context) error {
	s, err := a.parse()
	if err != nil {
		return err
	}
	if err := s.GenericServerRunOptions.ComponentGlobalsRegistry.Set(); err != nil {
		return fmt.Errorf("set feature gates: %w", err)
	}
	// As in upstream's command: loopback clients must not log warnings about their own requests.
	rest.SetDefaultWarningHandler(rest.NoWarnings{})
	// Complete reads the token signing key (completeServiceAccountOptions in upstream's
	// pkg/controlplane/apiserver/options/options.go). Before the first start there is none, so the check uses a temporary one.
	own := a.opts.Certificates.ServiceAccountKey()
	if _, err := os.Stat(own); errors.Is(err, fs.ErrNotExist) && s.ServiceAccountSigningKeyFile == own {
		key, remove, err := anyKey()
		if err != nil {
			return err
		}
		defer remove()
		s.ServiceAccountSigningKeyFile = key
	}
	completed, err := s.Complete(ctx)
	if err != nil {
		return fmt.Errorf("complete options: %w", err)
	}
	return utilerrors.NewAggregate(completed.Validate())
}

// anyKey writes a new key to a temporary file.
func anyKey() (file string, remove func(), err error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return "", nil, err
	}
	text, err := keyutil.MarshalPrivateKeyToPEM(key)
	if err != nil {
		return "", nil, err
	}
	f, err := os.CreateTemp("", "polymesh-check-*")
	if err != nil {
		return "", nil, fmt.Errorf("check kube-apiserver's options: %w", err)
	}
	remove = func() { _ = os.Remove(f.Name()) }
	_, err = f.Write(text)
	if err = errors.Join(err, f.Close()); err != nil {
		remove()
		return "", nil, fmt.Errorf("check kube-apiserver's options: %w", err)
	}
	return f.Name(), remove, nil
}

// Start runs the API server.
func (a *APIServer) Start(ctx context.Context) error {
	if err := writeHardening(a.opts.Config); err != nil {
		return err
	}
	if err := a.opts.Datastore.Write(a.opts.Config.DataDir.DatastoreEndpoint()); err != nil {
		return err
	}
	if a.opts.Datastore.LeaderElect {
		// Other servers can use this datastore.
		if err := a.claim(ctx); err != nil {
			return err
		}
	}
	if err := a.opts.Keys().Ensure(ctx, a.opts.Self(), a.opts.Provider()); err != nil {
		return fmt.Errorf("encryption of Secrets: %w", err)
	}
	s, err := a.parse()
	if err != nil {
		return err
	}
	completed, err := s.Complete(ctx)
	if err != nil {
		return fmt.Errorf("complete options: %w", err)
	}
	if err := utilerrors.NewAggregate(completed.Validate()); err != nil {
		return err
	}
	// A few requests at startup that depend on each other.
	unlimited := func(c *rest.Config) { c.QPS, c.Timeout = -1, rolesTimeout }
	if a.client, err = kubeconfig.Client(a.opts.Config.DataDir.Kubeconfig("polymesh"), unlimited); err != nil {
		return err
	}
	encryptioncontroller.EncryptionConfigFileChangePollDuration = a.opts.Keys().ReloadInterval()
	kubeflags.Log(a.Name(), a.args())
	a.Go(ctx, func(ctx context.Context) error {
		go a.retryRoles(ctx)
		return a.run(ctx, completed)
	})
	return nil
}

// claim rejects a datastore of another cluster. The server authority stands for all of a cluster's.
func (a *APIServer) claim(ctx context.Context) error {
	text, err := os.ReadFile(a.opts.Certificates.Cert(certificate.ServerCA))
	if err != nil {
		return err
	}
	sum := sha256.Sum256(text)
	return a.opts.Datastore.Claim(ctx, hex.EncodeToString(sum[:]))
}

// run is upstream's Run (cmd/kube-apiserver/app/server.go), with our own paths.
func (a *APIServer) run(ctx context.Context, opts options.CompletedOptions) error {
	config, err := app.NewConfig(opts)
	if err != nil {
		return err
	}
	if wrap := a.opts.Authenticator; wrap != nil {
		// Requests come in by the aggregator, which has a copy of the others' configuration.
		authentication := &config.Aggregator.GenericConfig.Authentication
		authentication.Authenticator = wrap(authentication.Authenticator)
	}
	generic := &config.Aggregator.GenericConfig.Config
	if filter := a.opts.Filter; filter != nil {
		build := generic.BuildHandlerChainFunc
		generic.BuildHandlerChainFunc = func(handler http.Handler, c *server.Config) http.Handler { return filter(build(handler, c)) }
	}
	// What a user sends to a prefix is as long as the user's line is slow: the handler ends a request from which nothing comes.
	usual := generic.LongRunningFunc
	generic.LongRunningFunc = func(r *http.Request, info *apirequest.RequestInfo) bool {
		return usual(r, info) || !info.IsResourceRequest && a.isPrefix(info.Path)
	}
	completed, err := config.Complete()
	if err != nil {
		return err
	}
	chain, err := app.CreateServerChain(completed)
	if err != nil {
		return err
	}
	for path, handler := range a.opts.Handlers {
		if strings.HasSuffix(path, "/") {
			chain.GenericAPIServer.Handler.NonGoRestfulMux.HandlePrefix(path, handler)
			continue
		}
		chain.GenericAPIServer.Handler.NonGoRestfulMux.Handle(path, handler)
	}
	prepared, err := chain.PrepareRun()
	if err != nil {
		return err
	}
	return prepared.Run(ctx)
}

// isPrefix reports whether a path is below one of the handlers' that end in a slash.
func (a *APIServer) isPrefix(path string) bool {
	for prefix := range a.opts.Handlers {
		if strings.HasSuffix(prefix, "/") && strings.HasPrefix(path, prefix) {
			return true
		}
	}
	return false
}

// Ready waits until /readyz returns exactly "ok": RBAC's bootstrap policy is written by a post-start hook, and earlier clients
// are refused. For the same reason our own roles are reconciled before the API server is first reported ready.
func (a *APIServer) Ready(ctx context.Context) error {
	var code int
	body, err := a.client.Discovery().RESTClient().Get().AbsPath("/readyz").Do(ctx).StatusCode(&code).Raw()
	switch {
	case err != nil && code == 0:
		return errors.New("not responding yet")
	case code != http.StatusOK || string(body) != "ok":
		return fmt.Errorf("/readyz returned %d", code)
	}
	a.roles.Do(func() {
		// This does not keep the API server from being ready: a webhook for roles may run in a pod, and the
		// kubelet waits for the API server.
		if a.putRoles(ctx) != nil {
			a.refused <- struct{}{}
		}
	})
	return nil
}

// retryRoles retries until the roles are reconciled.
func (a *APIServer) retryRoles(ctx context.Context) {
	select {
	case <-ctx.Done():
	case <-a.refused:
		_ = wait.PollUntilContextCancel(ctx, rolesTimeout, false, func(ctx context.Context) (bool, error) { return a.putRoles(ctx) == nil, nil })
	}
}

func (a *APIServer) putRoles(ctx context.Context) error {
	err := reconcileRoles(ctx, a.client, a.opts.Observe)
	if err == nil {
		a.noRoles.Store(nil)
		return nil
	}
	problem := err.Error()
	a.noRoles.Store(&problem)
	return err
}

// Notes implements component.Noted: while roles are missing, the components that use them are refused.
func (a *APIServer) Notes(context.Context) []string { return component.Present(a.noRoles.Load()) }
