// Command pilot-discovery is Istio's control plane for upstream Envoy: Istio's own program, with the dialect around its
// generators. It replaces Istio's binary in the pilot image and takes the same flags.
package main

import (
	"fmt"
	"os"
	_ "unsafe" // for go:linkname

	_ "github.com/KimMachineGun/automemlimit" // as in upstream's main: the Go heap follows the container's limit

	"github.com/spf13/cobra"
	"istio.io/istio/pilot/cmd/pilot-discovery/app"
	"istio.io/istio/pilot/pkg/bootstrap"
	"istio.io/istio/pkg/cmd"
	"istio.io/istio/pkg/log"

	"polymesh.dev/polymesh/pkg/mesh/certify"
	"polymesh.dev/polymesh/pkg/mesh/dialect"
	"polymesh.dev/polymesh/pkg/mesh/istiod"
)

// serverArgs is the destination of the discovery command's flags. It is not exported, and a copy of the flags' hundred
// lines would diverge from Istio's; a link that is no longer valid fails the build.
//
//go:linkname serverArgs istio.io/istio/pilot/cmd/pilot-discovery/app.serverArgs
var serverArgs *bootstrap.PilotArgs

func main() {
	log.EnableKlogWithCobra()
	root, err := newCommand()
	if err == nil {
		err = root.Execute()
	}
	if err != nil {
		log.Error(err)
		os.Exit(1)
	}
}

// newCommand returns Istio's command with another RunE for `discovery`.
func newCommand() (*cobra.Command, error) {
	root := app.NewRootCommand()
	discovery, _, err := root.Find([]string{"discovery"})
	if err != nil {
		return nil, fmt.Errorf("find Istio's discovery command: %w", err)
	}
	discovery.RunE = runDiscovery
	return root, nil
}

// runDiscovery follows newDiscoveryCommand in istio.io/istio/pilot/cmd/pilot-discovery/app/cmd.go, with three additional steps.
func runDiscovery(c *cobra.Command, _ []string) error {
	cmd.PrintFlags(c.Flags())
	for name, want := range dialect.IstiodEnv() {
		if got := os.Getenv(name); got != want {
			log.Infof("%s is %q; %q saves work, as the proxies are upstream Envoys", name, got, want)
		}
	}
	stop := make(chan struct{})
	server, err := bootstrap.NewServer(serverArgs)
	if err != nil {
		return fmt.Errorf("create discovery service: %w", err)
	}
	translator := dialect.NewTranslator(dialect.ShippedEnvoy(), dialect.EndpointsOf(server.XDSServer.Env.EndpointIndex))
	if err := dialect.Wrap(server.XDSServer, translator); err != nil {
		return fmt.Errorf("install the dialect: %w", err)
	}
	if err := certify.Install(server, string(serverArgs.RegistryOptions.KubeOptions.ClusterID)); err != nil {
		return fmt.Errorf("install the certificates' workloads: %w", err)
	}
	if err := istiod.KeepStatusApart(server.XDSServer); err != nil {
		return fmt.Errorf("separate the proxy status from pushes: %w", err)
	}
	if err := server.Start(stop); err != nil {
		return fmt.Errorf("start discovery service: %w", err)
	}
	cmd.WaitSignal(stop)
	server.WaitUntilCompletion()
	return nil
}
