package command

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/duration"
	"k8s.io/client-go/kubernetes"

	"polymesh.dev/polymesh/pkg/kubeconfig"
	"polymesh.dev/polymesh/pkg/progress"
	"polymesh.dev/polymesh/pkg/workflow/bridge"
	"polymesh.dev/polymesh/pkg/workflow/bridge/registries"
)

// bridgeNamespace is the default namespace of a bridge's objects.
const bridgeNamespace = "polymesh-bridge"

func newBridge() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "bridge",
		Short: "Connect the mesh with the service registry of an older system",
		Long: `Bridge keeps the mesh and the service registry of an older system (Eureka, Consul, DNS) in sync, in both directions: services
registered outside can be called from the mesh by name, and Services of the mesh with the label
bridge.polymesh.dev/eureka, or bridge.polymesh.dev/consul, appear in that registry like any other service.`,
	}
	cmd.AddCommand(newBridgeRun(), newBridgeStatus())
	return cmd
}

func newBridgeRun() *cobra.Command {
	var f registries.Options
	var allow []string
	var gateway string
	o := bridge.Options{}
	cmd := &cobra.Command{
		Use:   "run",
		Short: "Keep the mesh and a registry in sync, until it is stopped",
		Long: `Run keeps the mesh and a registry in sync until it is stopped. Stopping changes nothing: its objects stay, and the
next run continues with them. If the registry does not respond, nothing is removed.

A password is read from --password-file or POLYMESH_BRIDGE_PASSWORD, the addresses of Eureka also from POLYMESH_BRIDGE_EUREKA.
Consul's token is read from --token-file, POLYMESH_BRIDGE_CONSUL_TOKEN, or CONSUL_HTTP_TOKEN as by Consul's own programs.`,
		Example: `  polymesh bridge run --eureka http://eureka.example.com:8761/eureka/
  polymesh bridge run --eureka https://a:8761/eureka/,https://b:8761/eureka/ --user mesh --password-file /etc/polymesh/eureka
  polymesh bridge run --consul http://consul.example.com:8500 --token-file /etc/polymesh/consul-token
  polymesh bridge run --dns orders=_http._tcp.orders.example.com --dns billing=billing.example.com:8080`,
		Args: cobra.NoArgs,
	}
	flags := cmd.Flags()
	flags.SortFlags = false
	flags.StringSliceVar(&f.Eureka, "eureka", nil, "addresses of a Eureka: http://HOST:8761/eureka/; the first that responds is used")
	flags.StringSliceVar(&f.Consul, "consul", nil, "addresses of Consul agents of one datacenter: http://HOST:8500; the first that responds is used")
	flags.StringArrayVar(&f.DNS, "dns", nil, "a service in DNS: SERVICE=NAME with SRV records, or SERVICE=NAME:PORT with addresses; can be given more than once")
	flags.StringVar(&f.DNSServer, "dns-server", "", "the name server to use (default: this machine's)")
	flags.StringVar(&o.Name, "name", "", "distinguishes the bridges of a cluster (default: eureka, consul or dns)")
	flags.StringVar(&o.Domain, "domain", "", "suffix of service names in the mesh (default: NAME.internal)")
	flags.IntVar(&o.Port, "port", 80, "port of services in the mesh, whatever their own ports are")
	flags.DurationVar(&o.Interval, "interval", 10*time.Second, "how often to sync")
	flags.DurationVar(&o.StaleAfter, "stale-after", 5*time.Minute, "leave out an instance without heartbeats for this long; 0: never")
	flags.IntVar(&o.MaxLoss, "max-loss", 50, "if more than this percentage of the instances vanish at once, keep them for now")
	flags.DurationVar(&o.Guard, "guard", 5*time.Minute, "how long to keep instances that vanished like that, or while the registry was unreachable")
	flags.StringSliceVar(&allow, "allow-cidr", nil, "ranges of addresses that instances may have (default: all but link-local ones and the cluster's own); the smallest range that contains an address decides")
	flags.StringVar(&gateway, "gateway", "istio-system/istio-ingressgateway", "the Service through which callers outside reach the mesh")
	flags.StringVar(&o.AdvertiseAddress, "advertise-address", "", "HOST or HOST:PORT of the gateway as callers outside see it (default: the Service's address)")
	flags.StringVar(&o.AdvertiseDomain, "advertise-domain", "", "callers outside use NAME.DOMAIN for the mesh's services, which their name servers must resolve (default: the address)")
	flags.StringVar(&f.User, "user", "", "user of Eureka")
	flags.StringVar(&f.PasswordFile, "password-file", "", "file with the user's password")
	flags.StringVar(&f.TokenFile, "token-file", "", "file with a token of Consul's ACLs")
	flags.StringVar(&f.CAFile, "ca-file", "", "certificate authorities of the registry (default: those of the machine)")
	flags.StringVar(&f.ClientCert, "client-cert", "", "client certificate for the registry")
	flags.StringVar(&f.ClientKey, "client-key", "", "its key")
	cluster := clusterFlags(cmd)
	flags.Lookup("namespace").Usage = "where the bridge keeps its objects (default: " + bridgeNamespace + ")"
	for _, name := range []string{"password-file", "token-file", "ca-file", "client-cert", "client-key"} {
		_ = cmd.MarkFlagFilename(name)
	}
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		var err error
		f.Interval = o.Interval
		kind := ""
		if o.Registry, kind, err = registries.New(f); err != nil {
			return err
		}
		o.Name = cmp.Or(o.Name, kind)
		for _, text := range allow {
			prefix, err := netip.ParsePrefix(text)
			if err != nil {
				return fmt.Errorf("--allow-cidr %q is not a range of addresses such as 192.0.2.0/24: %w", text, err)
			}
			o.Allow = append(o.Allow, prefix.Masked())
		}
		namespace, name, ok := strings.Cut(gateway, "/")
		if !ok || namespace == "" || name == "" {
			return fmt.Errorf("--gateway %q is not NAMESPACE/NAME", gateway)
		}
		o.Gateway = types.NamespacedName{Namespace: namespace, Name: name}
		if o.Namespace = *cluster.Namespace; o.Namespace == "" {
			o.Namespace = bridgeNamespace
		}
		if o.Domain == "" {
			o.Domain = o.Name + ".internal"
		}
		if err := useClusterKubeconfig(); err != nil {
			return err
		}
		if o.REST, err = cluster.ToRESTConfig(); err != nil {
			return kubeconfig.None(err)
		}
		o.REST.QPS, o.REST.Burst = 50, 100
		o.Log = slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), nil))
		ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
		defer stop()
		b, err := bridge.New(ctx, o)
		if err != nil {
			return err
		}
		return b.Run(ctx)
	}
	return cmd
}

func newBridgeStatus() *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show the status of a cluster's bridges",
		Long: `Show the status of a cluster's bridges: which services are in the mesh, which are in the registry, and what needs a
decision.

The exit code is 0 if all bridges are healthy, 1 if one has a problem or is not running, 3 if there is none.`,
		Args: cobra.NoArgs,
	}
	cluster := clusterFlags(cmd)
	cmd.Flags().Lookup("namespace").Usage = "only bridges of this namespace"
	outputFlag(cmd, &output)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := checkOutput(output); err != nil {
			return err
		}
		if err := useClusterKubeconfig(); err != nil {
			return err
		}
		config, err := cluster.ToRESTConfig()
		if err != nil {
			return kubeconfig.None(err)
		}
		client, err := kubernetes.NewForConfig(config)
		if err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(cmd.Context(), 20*time.Second)
		defer cancel()
		if err := kubeconfig.Ask(ctx, config); err != nil {
			return err
		}
		reports, err := bridge.ReadReports(ctx, client, *cluster.Namespace)
		if err != nil {
			return err
		}
		done, err := printAs(cmd.OutOrStdout(), output, reports)
		if !done {
			err = printBridges(cmd.OutOrStdout(), reports, time.Now())
		}
		switch {
		case err != nil:
			return err
		case len(reports) == 0:
			fmt.Fprintln(cmd.ErrOrStderr(), "polymesh: no bridge has run in this cluster: start one with `polymesh bridge run`")
			return exitError(3)
		case slices.ContainsFunc(reports, func(r bridge.Report) bool { return !r.Healthy(time.Now()) }):
			return exitError(1)
		}
		return nil
	}
	return cmd
}

func printBridges(w io.Writer, reports []bridge.Report, now time.Time) error {
	// The registry controls names and ids, and writers of ConfigMaps control the rest.
	w = progress.Escaping(w)
	line := progress.Line
	ago := func(t time.Time) string {
		if t.IsZero() {
			return "never"
		}
		return duration.HumanDuration(now.Sub(t)) + " ago"
	}
	for i, r := range reports {
		if i > 0 {
			fmt.Fprintln(w)
		}
		fmt.Fprintf(w, "bridge %s in namespace %s to %s, which answered %s\n", line(r.Name), line(r.Namespace), line(r.Registry), ago(r.Answered))
		if r.Old(now) {
			fmt.Fprintf(w, "! the bridge is not running: its last report was %s\n", ago(r.Written))
		}
		if r.Error != "" {
			fmt.Fprintf(w, "! %s\n", line(r.Error))
		}
		if h := r.Holding; h != nil {
			fmt.Fprintf(w, "! %d instances are missing in the registry; they stay in the mesh until %s: %s\n", len(h.Instances), h.Until.Format(time.RFC3339), line(strings.Join(h.Instances, ", ")))
		}
		for _, p := range r.Problems {
			fmt.Fprintf(w, "! %s: %s\n", line(cmp.Or(p.Service, "the registry")), line(p.Message))
		}
		t := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
		fmt.Fprintln(t, "\nREGISTERED\tIN THE MESH AS\tINSTANCES\tLEFT OUT\tTAKEN OVER")
		for _, s := range r.Services {
			members, others, held := s.Counts()
			fmt.Fprintf(t, "%s\t%s\t%d\t%d\t%d\n", line(s.Name), line(s.Host), members, others, held)
		}
		fmt.Fprintln(t, "\nSERVICE OF THE MESH\tREGISTERED AS\tAT\tTAKES OVER")
		for _, a := range r.Advertised {
			at := a.Address
			if at == "" {
				at = "-"
			}
			fmt.Fprintf(t, "%s\t%s\t%s\t%t\n", line(a.Service), line(a.Name), line(at), a.TakesOver)
		}
		if err := t.Flush(); err != nil {
			return err
		}
		if o := r.Omitted; o != nil {
			fmt.Fprintf(w, "\nnot shown: %d services, %d instances, %d problems, which did not fit into the report\n", o.Services, o.Instances, o.Problems)
		}
		for _, s := range r.Services {
			for _, l := range s.LeftOut {
				fmt.Fprintf(w, "\n%s of %s is not in the mesh: %s\n", line(l.Instance), line(s.Name), line(l.Reason))
			}
		}
	}
	return nil
}
