// Command pilot-agent is Istio's agent next to each Envoy: Istio's own program, which also serves Prometheus metrics in Envoy's
// place. It replaces Istio's binary in the proxyv2 image and takes the same flags.
package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"runtime/debug"
	"strconv"

	_ "github.com/KimMachineGun/automemlimit" // as in upstream's main: the Go heap follows the container's limit

	"github.com/spf13/cobra"
	meshconfig "istio.io/api/mesh/v1alpha1"
	"istio.io/istio/pilot/cmd/pilot-agent/app"
	"istio.io/istio/pilot/cmd/pilot-agent/config"
	"istio.io/istio/pilot/cmd/pilot-agent/options"
	"istio.io/istio/pkg/bootstrap"
	istioagent "istio.io/istio/pkg/istio-agent"
	"istio.io/istio/pkg/kube/labels"
	"istio.io/istio/pkg/log"
	"istio.io/istio/pkg/security"
	"istio.io/istio/security/pkg/nodeagent/sds"

	"polymesh.dev/polymesh/pkg/mesh/exposition"
	"polymesh.dev/polymesh/pkg/mesh/workload"
)

func main() {
	// The agent has little to do, and there is one in every pod: memory matters more than GC time.
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(50)
	}
	log.EnableKlogWithCobra()
	root, err := newCommand()
	if err == nil {
		err = root.Execute()
	}
	if err != nil {
		log.Error(err)
		os.Exit(-1)
	}
}

// newCommand returns Istio's command, in which `proxy` also serves Envoy's statistics.
func newCommand() (*cobra.Command, error) {
	root := app.NewRootCommand(func(o *security.Options, cache security.SecretManager, keys *meshconfig.PrivateKeyProvider) istioagent.SDSService {
		return sds.NewServer(o, cache, keys)
	})
	proxy, _, err := root.Find([]string{"proxy"})
	if err != nil {
		return nil, fmt.Errorf("find Istio's proxy command: %w", err)
	}
	run := proxy.RunE
	proxy.RunE = func(c *cobra.Command, args []string) error {
		settings, err := proxyConfig(c)
		if err != nil {
			return err
		}
		self, err := workloadOf(settings)
		if err != nil {
			return err
		}
		admin := net.JoinHostPort("localhost", strconv.Itoa(int(settings.ProxyAdminPort)))
		if err := os.MkdirAll("./etc/istio/proxy", 0o755); err != nil {
			return err
		}
		go func() {
			if err := exposition.Serve(context.Background(), exposition.Socket, admin, self); err != nil {
				log.Errorf("the metrics of this proxy are not available: %v", err)
			}
		}()
		return run(c, args)
	}
	return root, nil
}

// proxyConfig returns the settings of the proxy, from the same source as Istio's command.
func proxyConfig(c *cobra.Command) (*meshconfig.ProxyConfig, error) {
	flags := c.Flags()
	file, err := flags.GetString("meshConfig")
	if err != nil {
		return nil, err
	}
	cluster, err := flags.GetString("serviceCluster")
	if err != nil {
		return nil, err
	}
	concurrency, err := flags.GetInt("concurrency")
	if err != nil {
		return nil, err
	}
	settings, err := config.ConstructProxyConfig(file, cluster, options.ProxyConfigEnv, concurrency)
	if err != nil {
		return nil, fmt.Errorf("read the proxy's settings: %w", err)
	}
	return settings, nil
}

// workloadOf returns the proxy's workload in Istio's metrics, from what the proxy sends to istiod about itself, if it is
// a valid name: injection copies an owner reference, which is free text.
func workloadOf(settings *meshconfig.ProxyConfig) (workload.Workload, error) {
	node, err := bootstrap.GetNodeMetaData(bootstrap.MetadataOptions{Envs: os.Environ(), ProxyConfig: settings})
	if err != nil {
		return workload.Workload{}, fmt.Errorf("read the proxy's workload: %w", err)
	}
	service, revision := labels.CanonicalService(node.Metadata.Labels, node.Metadata.WorkloadName)
	return workload.Workload{
		Name:              node.Metadata.WorkloadName,
		Namespace:         node.Metadata.Namespace,
		App:               node.Metadata.Labels["app"],
		Version:           node.Metadata.Labels["version"],
		CanonicalService:  service,
		CanonicalRevision: revision,
		Cluster:           string(node.Metadata.ClusterID),
	}.Named(), nil
}
