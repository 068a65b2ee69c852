// Package kubeconfig determines which cluster a command line refers to, and explains errors if it is not reachable.
//
// kubectl, istioctl and Polymesh's own commands find a cluster in the same way, by client-go's rules
// (k8s.io/client-go/tools/clientcmd): --kubeconfig, KUBECONFIG, ~/.kube/config. If none of them has a cluster, client-go falls
// back to http://localhost:8080, where API servers have not listened for years, and its errors mention that address. This package
// owns the better errors. pkg/command calls it for kubectl and for the commands with kubectl's flags, pkg/mesh/istioctl for istioctl's,
// pkg/workflow/deploy and pkg/workflow/bridge for their errors.
package kubeconfig

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strings"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/version"
	"k8s.io/cli-runtime/pkg/genericclioptions"
	"k8s.io/client-go/discovery"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"polymesh.dev/polymesh/pkg/layout"
)

// askTimeout is the time for an API server to return its version.
const askTimeout = 5 * time.Second

// nowhere is client-go's default address (clientcmd, getDefaultServer).
const nowhere = "http://localhost:8080"

// missing means that no file contains a cluster.
type missing struct{ reason string }

func (m *missing) Error() string { return m.reason }

// None is the error for a command line without a cluster.
func None(err error) error {
	return fmt.Errorf("no cluster: %w (on a server: start it with `polymesh server`; elsewhere copy a server's kubeconfig, and set it with --kubeconfig or KUBECONFIG)", err)
}

// Unreachable is the error for a cluster that has not responded, or not like an API server.
func Unreachable(host string, err error) error {
	if none := new(missing); errors.As(err, &none) {
		return None(none)
	}
	return fmt.Errorf("the cluster at %s does not answer: %w (is `polymesh server` running? check with `polymesh status`)", host, err)
}

// Named returns an error that lists the searched files, if none contains the cluster that c, from the loader, is for.
func Named(loader clientcmd.ClientConfig, c *rest.Config) error {
	// The variable is client-go's own way to set another default.
	if c.Host != nowhere || os.Getenv("KUBERNETES_MASTER") != "" {
		return nil
	}
	raw, err := loader.RawConfig()
	if err != nil {
		return None(err)
	}
	for _, cluster := range raw.Clusters {
		if cluster.Server == nowhere {
			return nil
		}
	}
	rules := loader.ConfigAccess()
	files := rules.GetLoadingPrecedence()
	if !rules.IsExplicitFile() && os.Getenv(clientcmd.RecommendedConfigPathEnvVar) == "" {
		// In-cluster configuration takes precedence in commands.
		files = append([]string{layout.DefaultKubeconfig}, files...)
	}
	var reasons []string
	for _, file := range files {
		reason := "contains no cluster"
		if _, err := os.Stat(file); errors.Is(err, os.ErrNotExist) {
			reason = "does not exist"
		} else if len(raw.Clusters) > 0 {
			reason = "has no current context (kubectl config use-context)"
		}
		reasons = append(reasons, file+" "+reason)
	}
	return None(&missing{strings.Join(reasons, ", ")})
}

// Require makes every request fail with the error of Named, if flags select no cluster; onMissing is called before the first one.
// Commands without requests keep working.
func Require(flags *genericclioptions.ConfigFlags, onMissing func()) {
	wrap := flags.WrapConfigFn
	flags.WrapConfigFn = func(c *rest.Config) *rest.Config {
		if wrap != nil {
			c = wrap(c)
		}
		if flags.APIServer != nil && *flags.APIServer != "" {
			return c
		}
		if err := Named(flags.ToRawKubeConfigLoader(), c); err != nil {
			onMissing()
			c.Wrap(func(http.RoundTripper) http.RoundTripper { return refusal{err} })
		}
		return c
	}
}

// refusal returns an error for every request.
type refusal struct{ err error }

func (r refusal) RoundTrip(*http.Request) (*http.Response, error) { return nil, r.err }

// Ask returns an error unless the API server responds within seconds, and accepts the user. The user's permissions are not checked.
func Ask(ctx context.Context, c *rest.Config) error {
	ctx, cancel := context.WithTimeoutCause(ctx, askTimeout, fmt.Errorf("there is no response within %s", askTimeout))
	defer cancel()
	asked, known := rest.CopyConfig(c), true
	if c.ExecProvider != nil || c.AuthProvider != nil {
		// A login may ask for a password, which takes any time. Without credentials any response is good.
		asked, known = rest.AnonymousClientConfig(c), false
	}
	asked.Impersonate = rest.ImpersonationConfig{} // which needs a separate permission
	client, err := discovery.NewDiscoveryClientForConfig(asked)
	if err != nil {
		return None(err)
	}
	body, err := client.RESTClient().Get().AbsPath("/version").Do(ctx).Raw()
	switch {
	case apierrors.IsForbidden(err), apierrors.IsUnauthorized(err) && !known:
		return nil
	case apierrors.IsUnauthorized(err):
		return fmt.Errorf("the cluster at %s does not know the user of the kubeconfig: %w (was the server reset since that file was copied? `polymesh status` shows the new one)", c.Host, err)
	case ctx.Err() != nil:
		return Unreachable(c.Host, context.Cause(ctx))
	case err != nil:
		return Unreachable(c.Host, err)
	}
	if err := json.Unmarshal(body, &version.Info{}); err != nil {
		return Unreachable(c.Host, errors.New("the server there is not an API server"))
	}
	return nil
}
