package config

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/pflag"

	"polymesh.dev/polymesh/pkg/layout"
)

// raw holds the settings as written, before validation.
type raw struct {
	config             string
	dataDir            string
	kubeconfig         string
	kubeconfigMode     string
	kubeconfigGroup    string
	datastoreSync      string
	nodeName           string
	nodeIP             string
	externalIP         string
	nodeLabels         []string
	nodeTaints         []string
	bindAddress        string
	advertiseAddress   string
	httpsPort          int
	tlsSANs            []string
	clusterCIDR        string
	serviceCIDR        string
	clusterDNS         string
	clusterDomain      string
	nodePortRange      string
	flannelBackend     string
	flannelPort        int
	flannelExternal    bool
	flannelIface       string
	resolvConf         string
	privateRegistry    string
	noDefaultRegistry  bool
	embeddedRegistry   bool
	disable            []string
	disablePolicy      bool
	pool               []string
	meshProfile        string
	observeAccess      string
	observeDisk        string
	observeRetention   string
	observeMemory      string
	observeRemoteWrite bool
	imagePolicyKeys    []string
	encrypt            bool
	encryptProvider    string
	auditLog           bool
	auditPolicy        string
	podSecurity        string
	protectKernel      bool
	apiserverArgs      []string
	controllerArgs     []string
	schedulerArgs      []string
	kubeletArgs        []string
	proxyArgs          []string
	logLevel           int
	debug              bool
	snapshots          rawSnapshots

	clusterInit           bool
	clusterReset          bool
	clusterResetForce     bool
	clusterResetPath      string
	etcdArgs              []string
	datastoreEndpoint     string
	datastoreEndpointFile string
	datastoreCA           string
	datastoreCert         string
	datastoreKey          string

	server    string
	token     string
	tokenFile string
	caHash    string
}

// Flags is the set of flags of `polymesh server`. Every flag can also be set in the config file under the same name, and
// in the environment as POLYMESH_ plus the name in uppercase with _ for -. A flag overrides the environment, which overrides the
// file, which overrides the default.
type Flags struct {
	*pflag.FlagSet
	raw *raw
	// of are all flags of a server, if these are some of them.
	of *Flags
}

// ServerFlags returns the flags of `polymesh server`, not yet parsed.
func ServerFlags() *Flags {
	f := &Flags{FlagSet: pflag.NewFlagSet("server", pflag.ContinueOnError), raw: &raw{}}
	f.SortFlags = false
	f.Usage = func() {}
	f.SetNormalizeFunc(ServerNames)
	r := f.raw
	f.StringVarP(&r.config, "config", "c", layout.DefaultConfigFile, "config file (YAML, keys as these flags)")
	f.StringVarP(&r.dataDir, "data-dir", "d", string(layout.DefaultDataDir), "folder for all data")
	f.StringVarP(&r.kubeconfig, "write-kubeconfig", "o", layout.DefaultKubeconfig, "write the administrator's kubeconfig to this file")
	f.StringVar(&r.kubeconfigMode, "write-kubeconfig-mode", "0600", "mode of that file, octal; with 0644 every local user is the cluster's administrator")
	f.StringVar(&r.kubeconfigGroup, "write-kubeconfig-group", "", "group that may read that file, by name or number; its members are the cluster's administrators")

	f.StringVar(&r.datastoreSync, "datastore-sync", string(SyncFull), "when a write is on disk: full, before it is acknowledged; normal, some time later, so that a power failure loses the last ones")
	f.BoolVar(&r.clusterInit, "cluster-init", false, "keep the cluster's state in etcd, on this server, instead of SQLite")
	f.BoolVar(&r.clusterReset, "cluster-reset", false, "make this server the only member of etcd, with the data on its disk, and exit: when a majority of the servers is lost for good")
	f.BoolVar(&r.clusterResetForce, "cluster-reset-force", false, "with --cluster-reset, do it although a majority of the other servers runs")
	f.StringVar(&r.clusterResetPath, "cluster-reset-restore-path", "", "snapshot to restore with --cluster-reset, instead of the data on the disk: a file, or a name that polymesh snapshot ls shows")
	f.StringArrayVar(&r.etcdArgs, "etcd-arg", nil, "further setting of etcd on this server, name=value: "+strings.Join(EtcdArgNames(), ", ")+"; may be repeated")
	f.StringVar(&r.datastoreEndpoint, "datastore-endpoint", "", "datastore outside of this server: etcd://…, https://…, postgres://… or mysql://… (default: the server's own SQLite)")
	f.StringVar(&r.datastoreEndpointFile, "datastore-endpoint-file", "", "file with the datastore's endpoint, for one with a password")
	f.StringVar(&r.datastoreCA, "datastore-cafile", "", "file of the authority that has signed the datastore's certificate")
	f.StringVar(&r.datastoreCert, "datastore-certfile", "", "file of this server's certificate for the datastore")
	f.StringVar(&r.datastoreKey, "datastore-keyfile", "", "file of the key of that certificate")

	f.snapshotFlags()

	f.StringVarP(&r.server, "server", "s", "", "URL of a server of the cluster that this machine joins: https://HOST:6443")
	f.StringVarP(&r.token, "token", "t", "", "token with which this machine joins, or on the first server the secret of servers; other users of this machine can read it in the list of processes")
	f.StringVar(&r.tokenFile, "token-file", "", "file with the token")
	f.StringVar(&r.caHash, "token-ca-hash", "", "hash of the cluster's authority, for a token without it")

	f.StringVar(&r.nodeName, "node-name", "", "name of this node (default: the host's name)")
	f.StringVarP(&r.nodeIP, "node-ip", "i", "", "address of this node (default: of the interface with the default route, or else the first that is up)")
	f.StringVar(&r.externalIP, "node-external-ip", "", "address under which the node is known outside")
	f.StringSliceVar(&r.nodeLabels, "node-label", nil, "label for this node, key=value; may be repeated")
	f.StringSliceVar(&r.nodeTaints, "node-taint", nil, "taint for this node, key=value:effect; may be repeated")

	f.StringVar(&r.bindAddress, "bind-address", "0.0.0.0", "address on which the API server listens")
	f.StringVar(&r.advertiseAddress, "advertise-address", "", "address of the API server for cluster members (default: node-ip)")
	f.IntVar(&r.httpsPort, "https-listen-port", layout.APIServerPort, "port of the API server")
	f.StringSliceVar(&r.tlsSANs, "tls-san", nil, "further name or address for the API server's certificate; may be repeated")

	f.StringVar(&r.clusterCIDR, "cluster-cidr", "10.42.0.0/16", "addresses for pods")
	f.StringVar(&r.serviceCIDR, "service-cidr", "10.43.0.0/16", "addresses for services")
	f.StringVar(&r.clusterDNS, "cluster-dns", "", "address of the cluster's DNS service (default: the tenth of service-cidr)")
	f.StringVar(&r.clusterDomain, "cluster-domain", "cluster.local", "domain of the cluster's names")
	f.StringVar(&r.nodePortRange, "service-node-port-range", "30000-32767", "ports for NodePort services")
	f.StringVar(&r.flannelBackend, "flannel-backend", string(VXLAN), "how packets reach the pods of other nodes: "+join(FlannelBackends())+" (you install a pod network)")
	f.IntVar(&r.flannelPort, "flannel-port", 0, fmt.Sprintf("UDP port for packets between nodes' pods (default: %d with vxlan, %d with wireguard-native)", layout.VXLANPort, layout.WireGuardPort))
	f.BoolVar(&r.flannelExternal, "flannel-external-ip", false, "reach the pods of other nodes by the nodes' external addresses")
	f.StringVar(&r.flannelIface, "flannel-iface", "", "network interface for packets between nodes' pods (default: that of node-ip)")
	f.StringVar(&r.resolvConf, "resolv-conf", "", "file with the name servers for pods (default: the host's, without those on loopback)")
	f.StringVar(&r.privateRegistry, "private-registry", layout.DefaultRegistries, "file with mirrors, logins and certificates of registries (registries.yaml)")
	f.BoolVar(&r.noDefaultRegistry, "disable-default-registry-endpoint", false, "do not ask a registry itself that has mirrors in that file")
	f.BoolVar(&r.embeddedRegistry, "embedded-registry", false, "nodes give each other also the images of registries that have mirrors in that file")

	f.StringSliceVar(&r.disable, "disable", nil, "do not install these: "+join(Addons())+"; may be repeated")
	f.BoolVar(&r.disablePolicy, "disable-network-policy", false, "do not enforce NetworkPolicies, for a controller that you install yourself")
	f.StringSliceVar(&r.pool, "loadbalancer-pool", nil, "addresses for LoadBalancer services, one for each service: CIDR or first-last; may be repeated (default: the nodes' addresses for all)")
	f.StringVar(&r.meshProfile, "mesh-profile", "default", "Istio's profile: "+strings.Join(MeshProfiles(), ", "))
	f.StringVar(&r.observeDisk, "observe-disk", "", "how much of the disk the store of metrics, logs and traces may take, such as 2GiB (default: 2GiB, or a twentieth of the disk if that is less)")
	f.StringVar(&r.observeMemory, "observe-memory", "150MB", "how much memory the store may use, such as 512MiB: with 150MB it keeps 20,000 series of metrics, and with each MiB more another 128")
	f.StringVar(&r.observeRetention, "observe-retention", "7d", "how long the store keeps something, such as 7d or 36h; less if --observe-disk is reached before")
	f.BoolVar(&r.observeRemoteWrite, "observe-remote-write", false, "pods may write metrics to the store by Prometheus' remote write, where they may query it")
	f.StringVar(&r.observeAccess, "observe-cluster-access", string(ObserveAll), "what pods reach of the store of metrics, logs and traces: all; ingest, to send spans, and logs and metrics by OTLP; off")

	f.StringSliceVar(&r.imagePolicyKeys, "image-policy-key", nil, "file of a public key, or base64: and the key: in namespaces labelled polymesh.dev/image-policy=enforce only images signed by it run; may be repeated")

	f.BoolVar(&r.encrypt, "secrets-encryption", false, "encrypt Secrets in the datastore")
	f.StringVar(&r.encryptProvider, "secrets-encryption-provider", EncryptionProviders()[0], "how Secrets are encrypted: "+strings.Join(EncryptionProviders(), ", "))
	f.BoolVar(&r.auditLog, "audit-log", false, "log the requests to the API server, in server/logs of the data dir")
	f.StringVar(&r.auditPolicy, "audit-policy-file", "", "file of an audit policy for the audit log, which it turns on (default: metadata of all requests that are not routine)")
	f.StringVar(&r.podSecurity, "pod-security", PodSecurityLevels()[0], "Pod Security Standard for namespaces that have no label for it: "+strings.Join(PodSecurityLevels(), ", "))
	f.BoolVar(&r.protectKernel, "protect-kernel-defaults", false, "do not start when kernel settings differ from the kubelet's, instead of changing them")

	f.StringArrayVar(&r.apiserverArgs, "kube-apiserver-arg", nil, "further flag for kube-apiserver, name=value; may be repeated")
	f.StringArrayVar(&r.controllerArgs, "kube-controller-manager-arg", nil, "further flag for kube-controller-manager; may be repeated")
	f.StringArrayVar(&r.schedulerArgs, "kube-scheduler-arg", nil, "further flag for kube-scheduler; may be repeated")
	f.StringArrayVar(&r.kubeletArgs, "kubelet-arg", nil, "further flag for kubelet; may be repeated")
	f.StringArrayVar(&r.proxyArgs, "kube-proxy-arg", nil, "further flag for kube-proxy; may be repeated")

	f.IntVarP(&r.logLevel, "v", "v", 0, "verbosity of the Kubernetes components' logs")
	f.BoolVar(&r.debug, "debug", false, "log debugging messages")
	return f
}

// nodeFlags are those of every node, server or agent.
func nodeFlags() []string {
	return []string{
		"config", "data-dir", "server", "token", "token-file", "token-ca-hash", "node-name", "node-ip", "node-external-ip", "node-label", "node-taint", "flannel-iface", "resolv-conf",
		"private-registry", "disable-default-registry-endpoint", "protect-kernel-defaults", "kubelet-arg", "kube-proxy-arg", "v", "debug",
	}
}

// AgentFlags returns the flags of an agent, not yet parsed: those of every node, and K3s's for how it joins.
func AgentFlags() *Flags {
	_, agent := RoleFlags()
	return agent
}

// RoleFlags returns the flags of a server and of an agent for a command that takes either: what both have is one flag.
func RoleFlags() (server, agent *Flags) {
	server = ServerFlags()
	agent = &Flags{FlagSet: pflag.NewFlagSet("agent", pflag.ContinueOnError), raw: server.raw}
	agent.SortFlags, agent.Usage = false, server.Usage
	for _, name := range nodeFlags() {
		agent.AddFlag(server.Lookup(name))
	}
	return server, agent
}

// ParseAgent is Parse for `polymesh agent`.
func ParseAgent(args []string, environ []string) (*Agent, error) {
	f := AgentFlags()
	if err := f.parse(args); err != nil {
		return nil, err
	}
	return f.Agent(environ)
}

// Parse reads args (everything after `polymesh server`), the environment and the config file. It returns pflag.ErrHelp if
// help was requested.
func Parse(args []string, environ []string) (*Server, error) {
	f := ServerFlags()
	if err := f.parse(args); err != nil {
		return nil, err
	}
	return f.Server(environ)
}

func (f *Flags) parse(args []string) error {
	err := f.FlagSet.Parse(args)
	if err == nil || errors.Is(err, pflag.ErrHelp) {
		return err
	}
	return fmt.Errorf("%w (see `polymesh %s --help`)", plain(err), f.Name())
}

// Server completes the parsed flags from the environment and the config file, and validates them.
func (f *Flags) Server(environ []string) (*Server, error) {
	if f.of != nil {
		return f.of.Server(environ)
	}
	visible := f.visiblePassword()
	if err := f.fill(environ); err != nil {
		return nil, err
	}
	s, err := f.raw.checkServer()
	if err != nil {
		return nil, err
	}
	if visible {
		s.Notes = append(s.Notes, "other users of this machine can read the password of --datastore-endpoint in the list of processes: use POLYMESH_DATASTORE_ENDPOINT, the config file or --datastore-endpoint-file")
	}
	s.flags = f
	s.ClusterFlags = s.given()
	return s, nil
}

// Agent is Server for an agent.
func (f *Flags) Agent(environ []string) (*Agent, error) {
	if err := f.fill(environ); err != nil {
		return nil, err
	}
	return f.raw.checkAgent()
}

// fill sets the flags that are not given from the environment, and what is left from the config file.
func (f *Flags) fill(environ []string) error {
	if rest := f.Args(); len(rest) > 0 {
		return fmt.Errorf("unexpected argument %q: `polymesh %s` takes flags only", rest[0], f.Name())
	}
	if err := f.readEnvironment(environ); err != nil {
		return err
	}
	return f.readFile()
}

func (f *Flags) readEnvironment(environ []string) error {
	for _, kv := range environ {
		key, value, _ := strings.Cut(kv, "=")
		if key == passphraseVariable {
			f.raw.snapshots.passphrase = value
		}
		flag := f.variable(key)
		// Our other programs have their own variables, so a name that is not a flag is not an error.
		if flag == nil || flag.Changed || value == "" {
			continue
		}
		if err := f.Set(flag.Name, value); err != nil {
			return fmt.Errorf("environment variable %s: %w", key, plain(err))
		}
	}
	return nil
}

// keys returns the valid keys of the config file.
func (f *Flags) keys() []string {
	var names []string
	f.VisitAll(func(flag *pflag.Flag) {
		if flag.Name != "config" {
			names = append(names, flag.Name)
		}
	})
	slices.Sort(names)
	return names
}

// plain rewords a flag error so that it names the expected value; pflag quotes Go's parser there.
func plain(err error) error {
	var bad *pflag.InvalidValueError
	if !errors.As(err, &bad) {
		return err
	}
	want := map[string]string{
		"int": "a whole number", "bool": "true or false", "duration": "a time such as 5m", "stringSlice": "a comma-separated list of values",
	}[bad.GetFlag().Value.Type()]
	if want == "" {
		return err
	}
	return fmt.Errorf("--%s %q is not %s", bad.GetFlag().Name, bad.GetValue(), want)
}

func oneLine(err error) string { return strings.Join(strings.Fields(err.Error()), " ") }

func join[T ~string](items []T) string {
	s := make([]string, len(items))
	for i, item := range items {
		s[i] = string(item)
	}
	return strings.Join(s, ", ")
}
