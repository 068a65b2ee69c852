package istioctl

import (
	"context"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"istio.io/istio/istioctl/pkg/cli"
	"istio.io/istio/pkg/kube"
	"k8s.io/client-go/tools/clientcmd"

	"polymesh.dev/polymesh/pkg/kubeconfig"
)

// withCluster makes every command below c that needs the cluster first check that it is reachable. Upstream does not: most
// commands wait silently and without a timeout for the informer that determines the default revision (istioctl/pkg/cli,
// RevisionOrDefault).
func withCluster(c *cobra.Command) {
	for _, sub := range c.Commands() {
		withCluster(sub)
	}
	if !c.Runnable() {
		return
	}
	run := c.RunE
	if run == nil {
		plain := c.Run
		run = func(c *cobra.Command, args []string) error { plain(c, args); return nil }
	}
	c.RunE = func(c *cobra.Command, args []string) error {
		if !needsCluster(name(c), c.Flags()) {
			return run(c, args)
		}
		err := askCluster(c.Context(), c.Flags())
		if err == nil {
			return run(c, args)
		}
		if remote := c.Flags().Lookup("remote"); remote != nil && name(c) == "version" {
			// As in kubectl, this program's own version is printed in any case.
			if remote.Value.Set("false") == nil {
				_ = run(c, args)
			}
		}
		return err
	}
}

// name returns a command's path without the prefixes that upstream's commands have only sometimes.
func name(c *cobra.Command) string {
	words := strings.Fields(c.CommandPath())[1:]
	if len(words) > 1 && (words[0] == "experimental" || words[0] == "legacy") {
		words = words[1:]
	}
	return strings.Join(words, " ")
}

// needsCluster reports whether a command uses the API server, based on upstream's code (istioctl/pkg, operator/cmd/mesh).
// A test lists all commands, so that new ones are noticed.
func needsCluster(name string, flags *pflag.FlagSet) bool {
	given := func(flag string) bool {
		f := flags.Lookup(flag)
		return f != nil && f.Value.String() != "" && f.Value.String() != "false"
	}
	switch name {
	case "admin", "dashboard", "describe", "injector", "profile", "tag", "waypoint": // only print help
		return false
	case "authz", "bug-report version", "collateral", "config list", "manifest translate", "profile dump", "profile list", "validate", "waypoint generate", "workload group create":
		return false
	case "manifest generate":
		return given("cluster-specific")
	case "analyze":
		return given("use-kube") && !given("list-analyzers")
	case "authz check":
		return !given("file")
	case "kube-inject":
		operator := given("operatorFileName")
		return !given("revision") || !given("injectConfigFile") || !operator && !(given("meshConfigFile") && given("valuesFile"))
	case "precheck":
		return !given("skip-controlplane") || given("from-version")
	case "version":
		return given("remote") && !direct(given)
	case "proxy-status", "internal-debug":
		return !given("revision") || !direct(given)
	}
	if strings.HasPrefix(name, "proxy-config ") || strings.HasPrefix(name, "ztunnel-config ") {
		return !given("file")
	}
	return true
}

// direct reports whether istiod is contacted without the API server: by address, and without a token for it
// (istioctl/pkg/xds).
func direct(given func(string) bool) bool {
	return given("xds-address") && (given("cert-dir") || given("plaintext"))
}

// askCluster contacts the cluster that upstream's commands would use (istio.io/istio/pkg/kube, BuildClientCmd).
func askCluster(ctx context.Context, flags *pflag.FlagSet) error {
	text := func(flag string) string {
		if f := flags.Lookup(flag); f != nil {
			return f.Value.String()
		}
		return ""
	}
	rules := kube.ConfigLoadingRules(text(cli.FlagKubeConfig))
	rules.WarnIfAllMissing = false // the error below covers it
	loader := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, &clientcmd.ConfigOverrides{
		ClusterDefaults: clientcmd.ClusterDefaults, CurrentContext: text(cli.FlagContext),
	})
	config, err := loader.ClientConfig()
	if err != nil {
		return kubeconfig.None(err)
	}
	if err := kubeconfig.Named(loader, config); err != nil {
		return err
	}
	return kubeconfig.Ask(ctx, config)
}
