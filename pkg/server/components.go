package server

import (
	"context"
	"crypto/rand"
	"net/netip"
	"os"

	kubernetes "k8s.io/component-base/version"

	"polymesh.dev/polymesh/pkg/certificate"
	"polymesh.dev/polymesh/pkg/component"
	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/controlplane"
	"polymesh.dev/polymesh/pkg/controlplane/addon"
	"polymesh.dev/polymesh/pkg/controlplane/datastore"
	"polymesh.dev/polymesh/pkg/controlplane/datastore/etcd"
	"polymesh.dev/polymesh/pkg/controlplane/encryption"
	"polymesh.dev/polymesh/pkg/controlplane/imagepolicy"
	"polymesh.dev/polymesh/pkg/controlplane/leader"
	"polymesh.dev/polymesh/pkg/controlplane/loadbalancer"
	"polymesh.dev/polymesh/pkg/controlplane/member"
	"polymesh.dev/polymesh/pkg/controlplane/noderole"
	"polymesh.dev/polymesh/pkg/controlplane/servingcert"
	"polymesh.dev/polymesh/pkg/controlplane/snapshot"
	"polymesh.dev/polymesh/pkg/imagestore"
	"polymesh.dev/polymesh/pkg/join"
	"polymesh.dev/polymesh/pkg/kubeflags"
	"polymesh.dev/polymesh/pkg/layout"
	"polymesh.dev/polymesh/pkg/mesh/install"
	"polymesh.dev/polymesh/pkg/node"
	"polymesh.dev/polymesh/pkg/node/announce"
	"polymesh.dev/polymesh/pkg/node/apilb"
	"polymesh.dev/polymesh/pkg/node/netpol"
	"polymesh.dev/polymesh/pkg/node/network"
	"polymesh.dev/polymesh/pkg/node/registry"
	"polymesh.dev/polymesh/pkg/process"
)

// addComponents is the list of a server's components and their dependencies. It returns the component whose readiness is reported to
// a service manager: the node. Add-ons are ordinary pods, and a taint may keep them from running.
func (s *server) addComponents(m *component.Manager) (up component.Handle) {
	dir := s.cfg.DataDir
	certs := certificate.Store(dir.TLS())
	kubeconfig := dir.Kubeconfig("polymesh")
	store := s.datastore
	joining := join.NewServer(join.Options{
		Name: s.Name, Kubeconfig: kubeconfig, Certificates: certs, TokenFile: dir.NodeToken(), Version: kubernetes.Get().GitVersion, Log: s.Log,
		Cluster: join.ClusterOf(s.cfg), Shared: s.shared(),
	})
	plane := controlplane.Options{Config: s.cfg, Node: s.Name, NodeIP: s.IP, Certificates: certs, Datastore: store.Endpoint(), Handlers: joining.Handlers(), Authenticator: joining.Authenticator}
	machine := s.node()

	certificates := m.Add(s.renewal)
	var before []component.Handle
	if _, ok := store.(*etcd.Etcd); ok {
		before = append(before, certificates)
	}
	db := m.Add(store, before...)
	containerd := m.Add(node.NewContainerd(machine))
	shipped := node.NewImages(machine)
	images := m.Add(shipped, containerd)
	api := m.Add(controlplane.NewAPIServer(plane), certificates, db)
	var snapshotBefore func(context.Context) error
	if !s.cfg.Snapshots.Disabled {
		snapshotBefore = s.snapshots.Before(snapshot.BeforeSecretsEncrypt)
	}
	// If the user sets another API server configuration, with a KMS for example, Secrets use keys that we do not know.
	if !kubeflags.Sets(s.cfg.APIServerArgs, "encryption-provider-config") {
		m.Add(encryption.New(encryption.Cluster{Place: plane.Keys(), Kubeconfig: kubeconfig, Before: snapshotBefore}, plane.Self(), plane.Provider(), s.Log), api)
	}
	controllers := m.Add(controlplane.Separate(plane, controlplane.NewControllerManager(plane), s.Log), api)
	m.Add(controlplane.Separate(plane, controlplane.NewScheduler(plane), s.Log), api)
	pulls := s.registry()
	pulls.Await = shipped.Await
	kubelet := []component.Handle{api, containerd, m.Add(registry.New(pulls), containerd)} // it waits itself for the images that every pod needs
	if plane.Datastore.LeaderElect {
		m.Add(apilb.New(s.balancer()))
	}
	if !plane.Datastore.LeaderElect {
		// In one process, the kubelet must come second: see ControllerManager.Ready.
		kubelet = append(kubelet, controllers)
	}
	// Before the kubelet: no pod starts before its policies are in force.
	kubelet = append(kubelet, m.Add(netpol.New(netpol.Options{
		Node: s.Name, Kubeconfig: machine.Identity.Kubelet, Network: dir.PodNetwork(), Disabled: s.cfg.DisableNetworkPolicy, Log: s.Log,
	}), api))
	m.Add(node.NewKubelet(machine, shipped), kubelet...)
	m.Add(node.NewProxy(machine), api)
	m.Add(announce.New(announce.Options{
		Node: s.Name, Kubeconfig: machine.Identity.Kubelet, Pool: s.cfg.LoadBalancerPool, LinkAlias: s.Marker.Alias(), Log: s.Log,
	}), api)
	up = m.Add(network.New(s.network()), api, controllers)
	m.Add(joining, api)
	m.Add(noderole.New(noderole.Options{Node: s.Name, Kubeconfig: kubeconfig, Log: s.Log}), api)
	if own, ok := store.(*etcd.Etcd); ok {
		m.Add(member.New(member.Options{Node: s.Name, Etcd: own, Kubeconfig: kubeconfig, Log: s.Log}), api)
	}
	m.Add(imagepolicy.New(imagepolicy.Options{
		Keys: s.cfg.ImagePolicyKeys, Kubeconfig: dir.Kubeconfig("image-policy"), Certificates: certs, Port: layout.ImagePolicyPort,
		Open:         func() (imagepolicy.Node, error) { return imagestore.OpenSignatures(dir.ContainerdSocket()) },
		RegistryDirs: dir.RegistryDirs(), Server: s.Name, Several: store.Endpoint().LeaderElect, Log: s.Log,
	}), api, images)

	schedule := snapshotSchedule(s.cfg.Snapshots)
	if member, ok := s.datastore.(*etcd.Etcd); ok {
		schedule.Healthy = member.Ready
	}
	s.schedule = snapshot.NewComponent(s.snapshots, schedule, kubeconfig, s.Log)
	m.Add(s.schedule, api)

	// The rest is cluster-wide and runs on one server.
	var leadership component.Leadership
	if store.Endpoint().LeaderElect {
		l := leader.New(leader.Options{Identity: s.Name + "_" + rand.Text(), Kubeconfig: kubeconfig, Log: s.Log})
		leadership, api = l, m.Add(l, api)
	}
	elected := func(build func() component.Component) {
		m.Add(component.Elected(leadership, build, s.Log), api)
	}
	elected(func() component.Component {
		return servingcert.New(servingcert.Options{Kubeconfig: kubeconfig, ServiceCIDR: s.cfg.ServiceCIDR, Log: s.Log})
	})
	for _, name := range []config.Addon{config.CoreDNS, config.MetricsServer, config.LocalStorage} {
		elected(func() component.Component { return s.addon(name, kubeconfig, machine.Nameservers) })
	}
	if s.cfg.Enabled(config.ServiceLB) {
		elected(func() component.Component {
			return loadbalancer.New(loadbalancer.Options{
				Kubeconfig: dir.Kubeconfig("servicelb"), NodeName: s.Name, Addresses: s.addresses(),
				Internal: []netip.Prefix{s.cfg.ClusterCIDR, s.cfg.ServiceCIDR},
				Reserved: loadbalancer.ReservedPorts(s.cfg.HTTPSPort), Pool: s.cfg.LoadBalancerPool, Log: s.Log,
			})
		})
	}
	if s.cfg.Enabled(config.Istio) {
		elected(func() component.Component {
			return install.New(install.Options{
				Kubeconfig: kubeconfig, Profile: s.cfg.MeshProfile, ClusterDomain: s.cfg.ClusterDomain,
				GatewayAPI: s.Programs.Path("manifests/gateway-api.yaml"), Log: s.Log,
			})
		})
	}
	return up
}

// snapshotSchedule returns the schedule of snapshots. Without one, the component only completes a restore.
func snapshotSchedule(s config.Snapshots) snapshot.Schedule {
	if s.Disabled {
		return snapshot.Schedule{}
	}
	return snapshot.Schedule{Cron: s.Schedule, Retention: s.Retention}
}

// newDatastore returns the datastore: the configured one outside, or this server's own.
func newDatastore(cfg *config.Server, p *process.Process, member *join.ServerMembership) own {
	dir := cfg.DataDir
	if own, err := os.ReadDir(dir.Server("db")); err == nil && len(own) > 0 && cfg.Datastore.Kind != config.SQLite {
		p.Log.Warn("this server has a datastore of its own, which is not used with --datastore-endpoint", "folder", dir.Server("db"))
	}
	switch cfg.Datastore.Kind {
	case config.Etcd:
		return datastore.NewExternal(cfg.Datastore)
	case config.PostgreSQL, config.MySQL:
		return datastore.NewSQL(datastore.SQLOptions{Database: cfg.Datastore, Socket: dir.DatastoreSocket(), Log: p.Log})
	}
	// A member of etcd stays one, whatever the flags are: the cluster's state is there.
	if exists, err := etcd.Exists(dir.Etcd()); cfg.ClusterInit || member != nil && !hasSQLite(cfg) || exists || err != nil {
		return etcd.New(etcd.Options{
			Dir: dir.Etcd(), SQLite: dir.Server("db", datastore.CopyName), Args: cfg.EtcdArgs, Node: p.Name, Certificates: certificate.Store(dir.TLS()), Log: p.Log,
			Client: onLoopback(layout.EtcdClientPort), HTTP: onLoopback(layout.EtcdHTTPPort), Peer: netip.AddrPortFrom(p.IP, layout.EtcdPeerPort),
			Join: addMember(cfg, p, member),
		})
	}
	return datastore.New(datastore.Options{Dir: dir.Server("db"), Socket: dir.DatastoreSocket(), Sync: cfg.DatastoreSync})
}

func onLoopback(port uint16) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), port)
}

// balancerAddress is where the node's parts reach an API server, where there are several.
func balancerAddress() netip.AddrPort { return onLoopback(layout.APIBalancerPort) }

// balancer returns the options of what finds an API server that works: this server's own, and others' while it does not.
func (s *server) balancer() apilb.Options {
	dir, certs := s.cfg.DataDir, certificate.Store(s.cfg.DataDir.TLS())
	own := s.IP
	if s.cfg.AdvertiseAddress.IsValid() {
		own = s.cfg.AdvertiseAddress
	}
	return apilb.Options{
		Listen: balancerAddress(), Own: netip.AddrPortFrom(own, uint16(s.cfg.HTTPSPort)),
		CA: certs.Cert(certificate.ServerCA), Cert: certs.Cert(certificate.Kubelet), Key: certs.Key(certificate.Kubelet), State: dir.APIServers(), Log: s.Log,
	}
}

// node returns the options shared by this machine's node components.
func (s *server) node() node.Options {
	dir, certs := s.cfg.DataDir, certificate.Store(s.cfg.DataDir.TLS())
	return node.Options{
		Settings: s.cfg.Node, Name: s.Name, IP: s.IP,
		ClusterCIDR: s.cfg.ClusterCIDR, ClusterDNS: s.cfg.ClusterDNS, ClusterDomain: s.cfg.ClusterDomain, APIServiceIP: s.cfg.APIServiceIP(),
		OwnNetwork: s.cfg.FlannelBackend != config.NoBackend, StorageDir: join.ClusterOf(s.cfg).StorageDir,
		Identity: node.Identity{
			Kubelet: dir.Kubeconfig("kubelet"), Proxy: dir.Kubeconfig("kube-proxy"),
			ClientCA: certs.Cert(certificate.ClientCA), ServingCert: certs.Cert(certificate.KubeletServing), ServingKey: certs.Key(certificate.KubeletServing),
		},
		Programs: s.Programs, Manifest: s.Manifest, Session: node.NewSession(dir), Marker: s.Marker, Lock: s.Lock,
		Nameservers: node.NewNameservers(s.cfg.Node, s.Log), Log: s.Log,
	}
}

// network returns the options of this machine's pod network.
func (s *server) network() network.Options {
	dir := s.cfg.DataDir
	return network.Options{
		Settings: s.cfg.Node, Name: s.Name, IP: s.IP, ClusterCIDR: s.cfg.ClusterCIDR,
		Backend: s.cfg.FlannelBackend, Port: s.cfg.FlannelPort, External: s.cfg.FlannelExternalIP,
		Kubeconfig: dir.Kubeconfig("kubelet"), Plugins: s.Programs.CNIDir(), Marker: s.Marker, Lock: s.Lock, Log: s.Log,
	}
}

// registry returns the options of what brings images to this machine, and serves its own to other nodes.
func (s *server) registry() registry.Options {
	dir, certs := s.cfg.DataDir, certificate.Store(s.cfg.DataDir.TLS())
	return registry.Options{
		Node: s.Name, IP: s.IP, LocalPort: layout.RegistryPort, PeerPort: layout.RegistryPeerPort, External: s.cfg.FlannelExternalIP,
		Socket: dir.ContainerdSocket(), HostsDir: dir.NodeRegistryDir(), UserHostsDir: dir.RegistryDir(),
		Registries: s.cfg.PrivateRegistry, DisableDefaultEndpoint: s.cfg.DisableDefaultEndpoint, Embedded: s.cfg.EmbeddedRegistry,
		Kubeconfig: dir.Kubeconfig("kubelet"), Log: s.Log,
		Identity: registry.Identity{
			ClientCert: certs.Cert(certificate.Kubelet), ClientKey: certs.Key(certificate.Kubelet),
			ServingCert: certs.Cert(certificate.KubeletServing), ServingKey: certs.Key(certificate.KubeletServing), ClientCA: certs.Cert(certificate.ClientCA),
			ServingCA: func() ([]byte, error) { return os.ReadFile(certs.Cert(certificate.KubeletCA)) },
		},
	}
}

// addon returns an add-on; a disabled one is added too, so that an earlier installation is removed.
func (s *server) addon(name config.Addon, kubeconfig string, names *node.Nameservers) component.Component {
	return addon.New(addon.Options{
		Name: name, Disabled: !s.cfg.Enabled(name), Kubeconfig: kubeconfig, Image: s.Manifest.Image,
		ClusterDNS: s.cfg.ClusterDNS, ClusterDomain: s.cfg.ClusterDomain, Nameservers: names.Servers,
		NodeName: s.Name, NodeAddress: s.IP, Internal: []netip.Prefix{s.cfg.ClusterCIDR, s.cfg.ServiceCIDR}, StorageDir: s.cfg.DataDir.Storage(),
		KubeletCA: certificate.Store(s.cfg.DataDir.TLS()).Cert(certificate.KubeletCA), Log: s.Log,
	})
}

// addresses returns the addresses of LoadBalancer services, external one first.
func (s *server) addresses() []netip.Addr {
	if s.cfg.ExternalIP.IsValid() && s.cfg.ExternalIP != s.IP {
		return []netip.Addr{s.cfg.ExternalIP, s.IP}
	}
	return []netip.Addr{s.IP}
}
