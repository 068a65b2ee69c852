package config

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"os"
	"os/user"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"polymesh.dev/polymesh/pkg/layout"
	"polymesh.dev/polymesh/pkg/token"
)

// Kubernetes' rules for names, labels and taints (k8s.io/apimachinery/pkg/util/validation), simple enough to repeat
// here: the launcher does not link the Kubernetes libraries.
var (
	dns1123  = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$`)
	labelKey = regexp.MustCompile(`^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$`)
	labelVal = regexp.MustCompile(`^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$`)
	argName  = regexp.MustCompile(`^[a-z0-9][-A-Za-z0-9._]*$`)
)

var taintEffects = []string{"NoSchedule", "PreferNoSchedule", "NoExecute"}

// absent are parts of K3s that Polymesh does not have: disabling them is accepted, so that a K3s command line works.
var absent = map[string]string{
	"traefik":         "Polymesh has no Traefik; Istio's ingress gateway serves Ingress and Gateway resources",
	"helm-controller": "Polymesh has no Helm controller",
}

func (r *raw) checkServer() (*Server, error) {
	s := &Server{
		TLSSANs: r.tlsSANs, HTTPSPort: r.httpsPort,
		APIServerArgs: r.apiserverArgs, ControllerManagerArgs: r.controllerArgs, SchedulerArgs: r.schedulerArgs,
	}
	for _, step := range []func() error{
		func() error { return r.checkNode(&s.Node) },
		func() error { return r.checkFiles(s) },
		func() error { return r.checkDatastore(s) },
		func() error { return r.checkServerJoining(s) },
		func() error { return r.checkListener(s) },
		func() error { return r.checkCluster(&s.Cluster) },
		func() error { return r.checkAddons(s) },
		func() error { return r.checkHardening(s) },
		func() error { return r.snapshots.check(&s.Snapshots) },
		r.checkArgs,
	} {
		if err := step(); err != nil {
			return nil, err
		}
	}
	return s, nil
}

func (r *raw) checkAgent() (*Agent, error) {
	a := &Agent{}
	if err := r.checkNode(&a.Node); err != nil {
		return nil, err
	}
	if err := r.checkArgs(); err != nil {
		return nil, err
	}
	if r.server == "" {
		return nil, fmt.Errorf("--server is missing: give the URL of a server, https://HOST:%d", layout.APIServerPort)
	}
	return a, r.checkJoining(&a.Joining, token.Agent, false)
}

// checkJoining checks how the machine joins a cluster, in this role. chooses is set if its token may be a secret that the user has chosen: no other machine is
// asked by it.
func (r *raw) checkJoining(j *Joining, role token.Role, chooses bool) error {
	if r.server != "" {
		server, err := url.Parse(r.server)
		if err != nil || server.Scheme != "https" || server.Hostname() == "" || server.User != nil || strings.Trim(server.Path, "/") != "" || server.RawQuery != "" || server.Fragment != "" {
			return fmt.Errorf("--server %q is not the URL of a server, such as https://HOST:%d", r.server, layout.APIServerPort)
		}
		port := server.Port()
		if port == "" {
			port = strconv.Itoa(layout.APIServerPort)
		}
		if n, err := strconv.Atoi(port); err != nil || n < 1 || n > 65535 {
			return fmt.Errorf("--server %q: %q is not a port", r.server, port)
		}
		j.Server = "https://" + net.JoinHostPort(server.Hostname(), port)
	}
	switch {
	case r.token != "" && r.tokenFile != "":
		return fmt.Errorf("--token (or POLYMESH_TOKEN) and --token-file are mutually exclusive: remove one of them")
	case r.token == "" && r.tokenFile == "" && r.caHash != "":
		return fmt.Errorf("--token-ca-hash is for a token without a hash: give --token-file, too")
	case r.token == "" && r.tokenFile == "":
		return nil // a machine that has joined needs none: see preflight
	}
	where, text := "--token", r.token
	if r.tokenFile != "" {
		var err error
		if text, err = secretFile("token-file", r.tokenFile); err != nil {
			return err
		}
		where = "--token-file " + r.tokenFile
	}
	if err := r.readToken(j, text, role, chooses); err != nil {
		return fmt.Errorf("%s: %w", where, err)
	}
	return nil
}

func (r *raw) readToken(j *Joining, text string, role token.Role, chooses bool) (err error) {
	text = strings.TrimSpace(text)
	switch whole := token.IsWhole(text); {
	case text == "", whole && r.caHash == "", !whole && r.caHash == "" && !chooses:
		if j.Token, err = token.Parse(text); err != nil {
			advice := printsToken(role)
			if text != "" && !whole {
				advice += ", or give --token-ca-hash, too"
			}
			return fmt.Errorf("%w: %s", err, advice)
		}
		return nil
	case whole:
		return errors.New("it has the hash of the cluster's authority: remove --token-ca-hash")
	case r.caHash == "":
		// The first server's authority does not exist yet.
		j.Secret = text
		return token.CheckSecret(text)
	}
	hash, err := token.ParseHash(r.caHash)
	if err != nil {
		return fmt.Errorf("--token-ca-hash: %w", err)
	}
	j.Token, err = token.OfSecret(hash, text)
	return err
}

// printsToken names the commands that print a token of this role.
func printsToken(role token.Role) string {
	file, create := layout.DefaultDataDir.NodeToken(), "polymesh token create"
	if role == token.Server {
		file, create = layout.DefaultDataDir.ServerToken(), create+" --role server"
	}
	return fmt.Sprintf("on a server, `cat %s` or `%s` print the whole token", file, create)
}

// checkServerJoining checks how a server joins the servers of a cluster.
func (r *raw) checkServerJoining(s *Server) error {
	if err := r.checkJoining(&s.Joining, token.Server, r.server == ""); err != nil {
		return err
	}
	switch {
	case s.Server != "" && s.ClusterInit:
		return fmt.Errorf("--server joins a cluster, and --cluster-init begins one: remove one of them")
	case s.Server != "" && s.DatastoreSync != SyncFull:
		return fmt.Errorf("--datastore-sync is for SQLite, which only one server can use: remove it, or --server")
	case s.Secret != "" && s.Datastore.Kind == SQLite && !s.ClusterInit:
		return fmt.Errorf("a token is for servers of a cluster: give --server to join one, or --cluster-init, for which it is the secret with which others join. SQLite is for one server, which writes a token for agents to %s", s.DataDir.NodeToken())
	case s.Token.ID == "":
		return nil
	case s.Server == "" && s.Datastore.Kind == SQLite:
		return fmt.Errorf("a whole token is for a server that joins others: give --server, too. The first server of a cluster makes its own, in %s, or one of a secret without a hash, which you choose", s.DataDir.ServerToken())
	case s.Token.Role() != token.Server:
		return fmt.Errorf("the token is one for agents, and a server has to have a server's: on a server of the cluster, `cat %s` or `polymesh token create --role server` print one. A single server on SQLite has none: start it once with --cluster-init", layout.DefaultDataDir.ServerToken())
	}
	return nil
}

func (r *raw) checkFiles(s *Server) (err error) {
	if s.ConfigFile, err = filepath.Abs(r.config); err != nil {
		return fmt.Errorf("--config %q: %w", r.config, err)
	}
	if s.Kubeconfig, err = filepath.Abs(r.kubeconfig); err != nil || r.kubeconfig == "" {
		return fmt.Errorf("--write-kubeconfig %q is not a file name", r.kubeconfig)
	}
	mode, err := strconv.ParseUint(r.kubeconfigMode, 8, 32)
	if err != nil || mode > 0o777 || mode&0o600 != 0o600 {
		return fmt.Errorf("--write-kubeconfig-mode %q is not an octal file mode of at least 600, such as 0600 or 0644", r.kubeconfigMode)
	}
	s.KubeconfigMode = os.FileMode(mode)
	if s.KubeconfigGroup, err = groupID(r.kubeconfigGroup); err != nil {
		return err
	}
	if s.KubeconfigGroup >= 0 {
		s.KubeconfigMode |= 0o040
	}
	if !slices.Contains(DatastoreSyncs(), r.datastoreSync) {
		return fmt.Errorf("--datastore-sync %q is not one of %s", r.datastoreSync, join(DatastoreSyncs()))
	}
	s.DatastoreSync = DatastoreSync(r.datastoreSync)
	return nil
}

// groupID returns the id of a group; -1 for an empty name.
func groupID(name string) (int, error) {
	if name == "" {
		return -1, nil
	}
	group, err := user.LookupGroup(name)
	if err != nil {
		if group, err = user.LookupGroupId(name); err != nil {
			return 0, fmt.Errorf("--write-kubeconfig-group %q is not a group of this machine: create it first (groupadd), or use its number", name)
		}
	}
	return strconv.Atoi(group.Gid)
}

func (r *raw) checkNode(n *Node) (err error) {
	*n = Node{
		NodeName: r.nodeName, NodeLabels: r.nodeLabels, NodeTaints: r.nodeTaints, ProtectKernelDefaults: r.protectKernel,
		KubeletArgs: r.kubeletArgs, ProxyArgs: r.proxyArgs, LogLevel: r.logLevel, Debug: r.debug,
	}
	if r.privateRegistry == "" {
		return errors.New("--private-registry is empty: name a file, which need not exist, or leave it out")
	}
	if n.PrivateRegistry, err = filepath.Abs(r.privateRegistry); err != nil {
		return fmt.Errorf("--private-registry %q: %w", r.privateRegistry, err)
	}
	n.DisableDefaultEndpoint = r.noDefaultRegistry
	if r.resolvConf != "" {
		if n.ResolvConf, err = filepath.Abs(r.resolvConf); err != nil {
			return fmt.Errorf("--resolv-conf %q: %w", r.resolvConf, err)
		}
	}
	if n.DataDir, err = layout.ParseDataDir(r.dataDir); err != nil {
		return fmt.Errorf("--data-dir: %w", err)
	}
	if n.DataDir == "/" {
		return fmt.Errorf("--data-dir / is refused: use a separate folder")
	}
	// Overlay mounts separate folders by : and , and the datastore's address ends at ?.
	if strings.ContainsFunc(string(n.DataDir), func(r rune) bool { return r <= ' ' || r == 0x7f || strings.ContainsRune(`:,?%#"'\\`, r) }) {
		return fmt.Errorf("--data-dir %q is refused: mounts and the datastore cannot take white space or any of : , ? %% # \" ' \\ in it", n.DataDir)
	}
	// 15 bytes, no white space, no slash (dev_valid_name in the kernel's net/core/dev.c).
	if n.FlannelIface = r.flannelIface; len(n.FlannelIface) > 15 || strings.ContainsFunc(n.FlannelIface, func(r rune) bool { return r <= ' ' || r == 0x7f || r == '/' || r == ':' }) {
		return fmt.Errorf("--flannel-iface %q is not the name of a network interface", r.flannelIface)
	}
	if r.nodeName != "" && !ValidNodeName(r.nodeName) {
		return fmt.Errorf("--node-name %q is not a DNS name: lowercase letters, digits, '-' and '.'", r.nodeName)
	}
	if n.NodeIP, err = hostIPv4("node-ip", r.nodeIP); err != nil {
		return err
	}
	if n.ExternalIP, err = optionalAddr("node-external-ip", r.externalIP); err != nil {
		return err
	}
	for _, label := range r.nodeLabels {
		key, value, ok := strings.Cut(label, "=")
		if !ok || !labelKey.MatchString(key) || !labelVal.MatchString(value) {
			return fmt.Errorf("--node-label %q is not key=value with a valid label key and value", label)
		}
	}
	for _, taint := range r.nodeTaints {
		kv, effect, ok := strings.Cut(taint, ":")
		key, value, _ := strings.Cut(kv, "=")
		if !ok || !labelKey.MatchString(key) || !labelVal.MatchString(value) || !slices.Contains(taintEffects, effect) {
			return fmt.Errorf("--node-taint %q is not key=value:effect with effect one of %s", taint, strings.Join(taintEffects, ", "))
		}
	}
	return nil
}

// checkListener checks the API server's address and additional names.
func (r *raw) checkListener(s *Server) (err error) {
	if s.BindAddress, err = netip.ParseAddr(r.bindAddress); err != nil {
		return fmt.Errorf("--bind-address %q is not an IP address", r.bindAddress)
	}
	if s.AdvertiseAddress, err = hostIPv4("advertise-address", r.advertiseAddress); err != nil {
		return err
	}
	if r.httpsPort < 1 || r.httpsPort > 65535 {
		return fmt.Errorf("--https-listen-port %d is not a port: 1 to 65535", r.httpsPort)
	}
	for _, san := range r.tlsSANs {
		if _, err := netip.ParseAddr(san); err != nil && !dns1123.MatchString(strings.TrimPrefix(strings.ToLower(san), "*.")) {
			return fmt.Errorf("--tls-san %q is neither a DNS name nor an IP address", san)
		}
	}
	from, to, ok := portRange(r.nodePortRange)
	if !ok {
		return fmt.Errorf("--service-node-port-range %q is not a port range such as 30000-32767", r.nodePortRange)
	}
	if from <= r.httpsPort && r.httpsPort <= to {
		return fmt.Errorf("--https-listen-port %d lies in --service-node-port-range %s", r.httpsPort, r.nodePortRange)
	}
	for _, p := range layout.Ports() {
		if p.Number == r.httpsPort && !p.Unused && !p.UDP {
			return fmt.Errorf("--https-listen-port %d is the port of %s: choose another", r.httpsPort, p.What)
		}
	}
	return nil
}

// checkCluster checks the cluster's address ranges and names.
func (r *raw) checkCluster(c *Cluster) (err error) {
	*c = Cluster{ClusterDomain: r.clusterDomain, NodePortRange: r.nodePortRange, MeshProfile: r.meshProfile, Disabled: map[Addon]bool{}}
	for _, value := range r.imagePolicyKeys {
		key, err := publicKey(value)
		if err != nil {
			return err
		}
		if !slices.ContainsFunc(c.ImagePolicyKeys, func(have []byte) bool { return bytes.Equal(have, key) }) {
			c.ImagePolicyKeys = append(c.ImagePolicyKeys, key)
		}
	}
	if c.ClusterCIDR, err = ipv4Prefix("cluster-cidr", r.clusterCIDR, 24); err != nil {
		return err
	}
	if c.ServiceCIDR, err = ipv4Prefix("service-cidr", r.serviceCIDR, 28); err != nil {
		return err
	}
	if c.ClusterCIDR.Overlaps(c.ServiceCIDR) {
		return fmt.Errorf("--cluster-cidr %s and --service-cidr %s overlap", c.ClusterCIDR, c.ServiceCIDR)
	}
	c.ClusterDNS = nthAddr(c.ServiceCIDR, 10)
	if r.clusterDNS != "" {
		if c.ClusterDNS, err = optionalAddr("cluster-dns", r.clusterDNS); err != nil {
			return err
		}
		if !c.ServiceCIDR.Contains(c.ClusterDNS) {
			return fmt.Errorf("--cluster-dns %s is not in --service-cidr %s", c.ClusterDNS, c.ServiceCIDR)
		}
		if c.ClusterDNS == c.ServiceCIDR.Addr() || c.ClusterDNS == nthAddr(c.ServiceCIDR, 1) {
			return fmt.Errorf("--cluster-dns %s is taken: the first address of --service-cidr %s is the API server's, and the network address is not usable", c.ClusterDNS, c.ServiceCIDR)
		}
	}
	if !dns1123.MatchString(r.clusterDomain) {
		return fmt.Errorf("--cluster-domain %q is not a DNS name", r.clusterDomain)
	}
	return r.checkFlannel(c)
}

// otherBackends are K3s's and flannel's backends that Polymesh does not have, with what to do.
var otherBackends = map[string]string{
	"wireguard": "use wireguard-native",
	"ipsec":     "use wireguard-native",
	"udp":       "use vxlan",
	"ipip":      "use vxlan, or host-gw if all nodes are in one subnet",
}

// checkFlannel checks how packets reach other nodes.
func (r *raw) checkFlannel(c *Cluster) error {
	c.FlannelBackend, c.FlannelPort, c.FlannelExternalIP = FlannelBackend(r.flannelBackend), r.flannelPort, r.flannelExternal
	if hint, ok := otherBackends[r.flannelBackend]; ok {
		return fmt.Errorf("--flannel-backend %s is not supported: %s", r.flannelBackend, hint)
	}
	if !slices.Contains(FlannelBackends(), c.FlannelBackend) {
		return fmt.Errorf("--flannel-backend %q is not one of %s", r.flannelBackend, join(FlannelBackends()))
	}
	if c.FlannelPort == 0 {
		c.FlannelPort = layout.VXLANPort
		if c.FlannelBackend == WireGuard {
			c.FlannelPort = layout.WireGuardPort
		}
	}
	if c.FlannelPort < 1 || c.FlannelPort > 65535 {
		return fmt.Errorf("--flannel-port %d is not a port: 1 to 65535", r.flannelPort)
	}
	if from, to, ok := portRange(r.nodePortRange); ok && from <= c.FlannelPort && c.FlannelPort <= to {
		return fmt.Errorf("--flannel-port %d lies in --service-node-port-range %s", c.FlannelPort, r.nodePortRange)
	}
	if r.flannelExternal && c.FlannelBackend == HostGW {
		return fmt.Errorf("--flannel-external-ip does not work with --flannel-backend host-gw, which routes between the nodes' own addresses")
	}
	return nil
}

// networkPolicy is the value of --disable that turns NetworkPolicies off, in earlier versions the warning that they are not enforced.
const networkPolicy = "network-policy"

func (r *raw) checkAddons(s *Server) error {
	s.DisableNetworkPolicy, s.EmbeddedRegistry = r.disablePolicy, r.embeddedRegistry
	for _, name := range r.disable {
		if name == networkPolicy {
			s.DisableNetworkPolicy = true
			s.Notes = append(s.Notes, "--disable network-policy is --disable-network-policy: NetworkPolicies are not enforced")
			continue
		}
		if note, ok := absent[name]; ok {
			s.Notes = append(s.Notes, fmt.Sprintf("--disable %s does nothing: %s", name, note))
			continue
		}
		if !slices.Contains(Addons(), Addon(name)) {
			return fmt.Errorf("--disable %q is not one of %s", name, join(Addons()))
		}
		s.Disabled[Addon(name)] = true
	}
	for _, text := range r.pool {
		rng, err := addressRange(text)
		if err != nil {
			return fmt.Errorf("--loadbalancer-pool %q: %w", text, err)
		}
		for _, cidr := range []netip.Prefix{s.ClusterCIDR, s.ServiceCIDR} {
			if cidr.Contains(rng.From) || cidr.Contains(rng.To) || rng.Contains(cidr.Addr()) {
				return fmt.Errorf("--loadbalancer-pool %q overlaps the cluster's own addresses %s", text, cidr)
			}
		}
		s.LoadBalancerPool = append(s.LoadBalancerPool, rng)
	}
	if len(s.LoadBalancerPool) > 0 && s.Disabled[ServiceLB] {
		return fmt.Errorf("--loadbalancer-pool needs servicelb, which is disabled")
	}
	if !slices.Contains(MeshProfiles(), r.meshProfile) {
		return fmt.Errorf("--mesh-profile %q is not one of %s", r.meshProfile, strings.Join(MeshProfiles(), ", "))
	}
	if s.ObserveAccess = ObserveAccess(r.observeAccess); !slices.Contains(ObserveAccesses(), s.ObserveAccess) {
		return fmt.Errorf("--observe-cluster-access %q is not one of %s", r.observeAccess, join(ObserveAccesses()))
	}
	return r.checkObserve(&s.Observe)
}

func (r *raw) checkHardening(s *Server) (err error) {
	s.AuditLog, s.PodSecurity = r.auditLog || r.auditPolicy != "", r.podSecurity
	if !slices.Contains(EncryptionProviders(), r.encryptProvider) {
		return fmt.Errorf("--secrets-encryption-provider %q is not one of %s", r.encryptProvider, strings.Join(EncryptionProviders(), ", "))
	}
	s.SecretsEncryption, s.EncryptionProvider = r.encrypt, r.encryptProvider
	if r.auditPolicy != "" {
		if s.AuditPolicyFile, err = filepath.Abs(r.auditPolicy); err != nil {
			return fmt.Errorf("--audit-policy-file: %w", err)
		}
	}
	if !slices.Contains(PodSecurityLevels(), r.podSecurity) {
		return fmt.Errorf("--pod-security %q is not one of %s", r.podSecurity, strings.Join(PodSecurityLevels(), ", "))
	}
	// Settings that the API server accepts only once, but both flags would set.
	for _, arg := range r.apiserverArgs {
		switch name, _, _ := strings.Cut(strings.TrimPrefix(arg, "--"), "="); {
		case name == "encryption-provider-config" && r.encrypt:
			return fmt.Errorf("--secrets-encryption and --kube-apiserver-arg=%s are mutually exclusive: remove one of them", name)
		case name == "admission-control-config-file" && r.podSecurity != PodSecurityLevels()[0]:
			return fmt.Errorf("--pod-security and --kube-apiserver-arg=%s are mutually exclusive: set the level in that file, or remove it", name)
		}
	}
	return nil
}

func (r *raw) checkArgs() error {
	for flag, args := range map[string][]string{
		"kube-apiserver-arg": r.apiserverArgs, "kube-controller-manager-arg": r.controllerArgs,
		"kube-scheduler-arg": r.schedulerArgs, "kubelet-arg": r.kubeletArgs, "kube-proxy-arg": r.proxyArgs,
	} {
		for _, arg := range args {
			if name, _, _ := strings.Cut(strings.TrimPrefix(arg, "--"), "="); !argName.MatchString(name) {
				return fmt.Errorf("--%s %q is not name=value", flag, arg)
			}
		}
	}
	if r.logLevel < 0 || r.logLevel > 10 {
		return fmt.Errorf("--v %d is not a verbosity from 0 to 10", r.logLevel)
	}
	return nil
}

func optionalAddr(flag, text string) (netip.Addr, error) {
	if text == "" {
		return netip.Addr{}, nil
	}
	a, err := netip.ParseAddr(text)
	if err != nil || a.IsUnspecified() || a.IsMulticast() {
		return netip.Addr{}, fmt.Errorf("--%s %q is not the IP address of a host", flag, text)
	}
	return a, nil
}

// hostIPv4 parses an address that the kubelet and the API server advertise. Both reject loopback
// (pkg/kubelet/kubelet_node_status.go), and the cluster's ranges are IPv4.
func hostIPv4(flag, text string) (netip.Addr, error) {
	a, err := optionalAddr(flag, text)
	if err == nil && a.IsValid() && (!a.Is4() || a.IsLoopback()) {
		err = fmt.Errorf("--%s %q is not the IPv4 address of a host that others can reach", flag, text)
	}
	return a, err
}

// ValidNodeName reports whether a node can have this name, given by --node-name or the host.
func ValidNodeName(name string) bool { return len(name) <= 253 && dns1123.MatchString(name) }

// ipv4Prefix parses an IPv4 CIDR with at least the addresses of a /maxBits.
func ipv4Prefix(flag, text string, maxBits int) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(text)
	if err != nil || p.Masked() != p {
		return p, fmt.Errorf("--%s %q is not a CIDR such as 10.42.0.0/16", flag, text)
	}
	if !p.Addr().Is4() {
		return p, fmt.Errorf("--%s %q: only IPv4 is supported", flag, text)
	}
	if p.Bits() > maxBits || p.Bits() < 8 {
		return p, fmt.Errorf("--%s %q: the prefix must be from /8 to /%d", flag, text, maxBits)
	}
	if a := p.Addr(); a.IsUnspecified() || a.IsLoopback() || a.IsLinkLocalUnicast() || !a.Less(netip.AddrFrom4([4]byte{224})) {
		return p, fmt.Errorf("--%s %q: these addresses cannot be used for pods or services", flag, text)
	}
	return p, nil
}

func addressRange(text string) (AddressRange, error) {
	if from, to, ok := strings.Cut(text, "-"); ok {
		a, errA := netip.ParseAddr(strings.TrimSpace(from))
		b, errB := netip.ParseAddr(strings.TrimSpace(to))
		if errA != nil || errB != nil || !a.Is4() || !b.Is4() || b.Less(a) {
			return AddressRange{}, fmt.Errorf("not a range of IPv4 addresses first-last")
		}
		return AddressRange{a, b}, nil
	}
	p, err := netip.ParsePrefix(text)
	if err != nil || !p.Addr().Is4() || p.Masked() != p {
		return AddressRange{}, fmt.Errorf("neither an IPv4 CIDR nor a range first-last")
	}
	first := binary.BigEndian.Uint32(p.Addr().AsSlice())
	last := first | (1<<(32-p.Bits()) - 1)
	// Hosts cannot use the network and broadcast addresses of a subnet.
	if p.Bits() <= 30 {
		first, last = first+1, last-1
	}
	return AddressRange{addr4(first), addr4(last)}, nil
}

func nthAddr(p netip.Prefix, n uint32) netip.Addr {
	return addr4(binary.BigEndian.Uint32(p.Addr().AsSlice()) + n)
}

func addr4(v uint32) netip.Addr {
	return netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, v)))
}

// APIServiceIP returns the address of the `kubernetes` service: the first of the service range.
func (c *Cluster) APIServiceIP() netip.Addr { return nthAddr(c.ServiceCIDR, 1) }

func portRange(text string) (from, to int, ok bool) {
	a, b, found := strings.Cut(text, "-")
	from, errA := strconv.Atoi(a)
	to, errB := strconv.Atoi(b)
	return from, to, found && errA == nil && errB == nil && 1 <= from && from <= to && to <= 65535
}
