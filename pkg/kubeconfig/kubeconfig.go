// Package kubeconfig says which cluster a command line means, whether it answers, and, if not, why.
//
// kubectl, istioctl and Polymesh's own commands look for a cluster at the same places, by client-go's rules
// (k8s.io/client-go/tools/clientcmd): --kubeconfig, KUBECONFIG, ~/.kube/config. Where none of them names a cluster, client-go goes
// to http://localhost:8080, where for years no API server has listened, and its errors speak of that. This package owns what is
// said instead. pkg/command calls it for kubectl and for the commands with kubectl's flags, pkg/mesh/istioctl for istioctl's,
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

// askTimeout is how long an API server may take to say its version.
const askTimeout = 5 * time.Second

// nowhere is the address that client-go takes when no cluster is named (clientcmd, getDefaultServer).
const nowhere = "http://localhost:8080"

// missing is that no file names a cluster.
type missing struct{ reason string }

func (m *missing) Error() string { return m.reason }

// None is the error for a command line that means no cluster.
func None(err error) error {
	return fmt.Errorf("no cluster: %w (start one with `polymesh server`, or name one with --kubeconfig or KUBECONFIG)", err)
}

// Unreachable is the error for a cluster that has not answered, or not as an API server does.
func Unreachable(host string, err error) error {
	if none := new(missing); errors.As(err, &none) {
		return None(none)
	}
	return fmt.Errorf("the cluster at %s does not answer: %w (is `polymesh server` running? `polymesh status` says so)", host, err)
}

// Named returns an error that lists where was looked, if nothing names the cluster that c, from the loader, is for.
func Named(loader clientcmd.ClientConfig, c *rest.Config) error {
	// The variable is client-go's own way to name another default.
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
		// Commands take this one first.
		files = append([]string{layout.DefaultKubeconfig}, files...)
	}
	var reasons []string
	for _, file := range files {
		reason := "names no cluster"
		if _, err := os.Stat(file); errors.Is(err, os.ErrNotExist) {
			reason = "does not exist"
		} else if len(raw.Clusters) > 0 {
			reason = "has no current context (kubectl config use-context)"
		}
		reasons = append(reasons, file+" "+reason)
	}
	return None(&missing{strings.Join(reasons, ", ")})
}

// Require has every request fail with the error of Named, if flags name no cluster; onMissing is called before the first one.
// What asks no server goes on without one.
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

// refusal answers every request with an error.
type refusal struct{ err error }

func (r refusal) RoundTrip(*http.Request) (*http.Response, error) { return nil, r.err }

// Ask returns an error unless the API server answers within seconds, and knows the user. What the user may do is not looked at.
func Ask(ctx context.Context, c *rest.Config) error {
	ctx, cancel := context.WithTimeoutCause(ctx, askTimeout, fmt.Errorf("there is no answer within %s", askTimeout))
	defer cancel()
	asked, known := rest.CopyConfig(c), true
	if c.ExecProvider != nil || c.AuthProvider != nil {
		// A login may ask for a password, and takes as long as that takes. Without one any answer is good.
		asked, known = rest.AnonymousClientConfig(c), false
	}
	asked.Impersonate = rest.ImpersonationConfig{} // which needs a right of its own
	client, err := discovery.NewDiscoveryClientForConfig(asked)
	if err != nil {
		return None(err)
	}
	body, err := client.RESTClient().Get().AbsPath("/version").Do(ctx).Raw()
	switch {
	case apierrors.IsForbidden(err), apierrors.IsUnauthorized(err) && !known:
		return nil
	case apierrors.IsUnauthorized(err):
		return fmt.Errorf("the cluster at %s does not know the user of the kubeconfig: %w (was the server reset since that file was copied? `polymesh status` names the new one)", c.Host, err)
	case ctx.Err() != nil:
		return Unreachable(c.Host, context.Cause(ctx))
	case err != nil:
		return Unreachable(c.Host, err)
	}
	if err := json.Unmarshal(body, &version.Info{}); err != nil {
		return Unreachable(c.Host, errors.New("what listens there is no API server"))
	}
	return nil
}
