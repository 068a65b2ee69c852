package server

import (
	"crypto/rand"
	"maps"
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
	"polymesh.dev/polymesh/pkg/dashboard"
	"polymesh.dev/polymesh/pkg/imagestore"
	"polymesh.dev/polymesh/pkg/join"
	"polymesh.dev/polymesh/pkg/kubeflags"
	"polymesh.dev/polymesh/pkg/layout"
	"polymesh.dev/polymesh/pkg/mesh/install"
	"polymesh.dev/polymesh/pkg/node"
	"polymesh.dev/polymesh/pkg/observe"
	"polymesh.dev/polymesh/pkg/observe/route"
	"polymesh.dev/polymesh/pkg/process"
	"polymesh.dev/polymesh/pkg/worker"
)

// addComponents is the list of a server's components and their dependencies. It returns the component whose readiness is reported to
// a service manager: the node. Add-ons are ordinary pods, and a taint may keep them from running.
func (s *server) addComponents(m *component.Manager) (up component.Handle) {
	dir := s.cfg.DataDir
	certs := certificate.Store(dir.TLS())
	kubeconfig := dir.Kubeconfig("polymesh")
	endpoint := s.datastore.Endpoint()
	local := s.etcd()
	joining := join.NewServer(join.Options{
		Name: s.Name, Address: s.IP, Kubeconfig: kubeconfig, Certificates: certs, TokenFile: dir.NodeToken(), Version: kubernetes.Get().GitVersion, Log: s.Log,
		Cluster: join.ClusterOf(s.cfg), Shared: s.shared(),
	})
	parts := worker.New(s.worker())
	handlers := joining.Handlers()
	maps.Copy(handlers, parts.Registry.Handlers())
	way := route.New(s.route())
	if s.clusterObserves() {
		handlers[layout.ObserveIngestPath] = way.Ingest()
		handlers[dashboard.Path] = dashboard.Elsewhere(way.Pass)
	}
	if s.observes() {
		handlers[dashboard.Path] = dashboard.Gateway(dir.ObserveSocket(), s.Log)
	}
	plane := controlplane.Options{Config: s.cfg, Node: s.Name, ServerID: s.id, NodeIP: s.IP, Certificates: certs, Datastore: endpoint, Handlers: handlers, Authenticator: joining.Authenticator, Filter: joining.Filter, Observe: s.clusterObserves()}

	certificates := m.Add(s.renewal)
	var before []component.Handle
	if local != nil {
		before = append(before, certificates)
	}
	db := m.Add(s.datastore, before...)
	containerd := m.Add(parts.Containerd)
	images := m.Add(parts.Images, containerd)
	api := m.Add(controlplane.NewAPIServer(plane), certificates, db)
	// If the user sets another API server configuration, with a KMS for example, Secrets use keys that we do not know.
	if !kubeflags.Sets(s.cfg.APIServerArgs, "encryption-provider-config") {
		m.Add(encryption.New(s.encryption(plane), plane.Self(), plane.Provider(), s.Log), api)
	}
	controllers := m.Add(controlplane.Separate(plane, controlplane.NewControllerManager(plane), s.Log), api)
	m.Add(controlplane.Separate(plane, controlplane.NewScheduler(plane), s.Log), api)
	kubelet := []component.Handle{api, containerd, m.Add(parts.Registry, containerd)}
	if endpoint.LeaderElect {
		m.Add(parts.Balancer)
	} else {
		// In one process, the kubelet must come second: see ControllerManager.Ready.
		kubelet = append(kubelet, controllers)
	}
	kubelet = append(kubelet, m.Add(parts.NetworkPolicy, api))
	m.Add(parts.Kubelet, kubelet...)
	m.Add(parts.Proxy, api)
	m.Add(parts.PoolAddresses, api)
	if parts.ExternalAddress != nil {
		m.Add(parts.ExternalAddress, api)
	}
	up = m.Add(parts.PodNetwork, api, controllers)
	m.Add(joining, api)
	m.Add(noderole.New(noderole.Options{Node: s.Name, Kubeconfig: kubeconfig, Nameservers: parts.Nameservers.Servers, Log: s.Log}), api)
	if local != nil {
		m.Add(member.New(member.Options{Node: s.Name, Etcd: local, Kubeconfig: kubeconfig, Log: s.Log}), api)
	}
	m.Add(imagepolicy.New(s.imagePolicy()), api, images)
	schedule := snapshotSchedule(s.cfg.Snapshots)
	if local != nil {
		schedule.Healthy = local.Ready
	}
	s.schedule = snapshot.NewComponent(s.snapshots, schedule, kubeconfig, s.Log)
	m.Add(s.schedule, api)
	switch {
	case s.observes():
		m.Add(observe.New(s.store(up.Ready())))
	case s.collects():
		m.Add(observe.New(s.collector(up.Ready())))
	}
	if endpoint.LeaderElect {
		m.Add(way, api)
	}

	// The rest is cluster-wide and runs on one server.
	serving := api
	var leadership component.Leadership
	if endpoint.LeaderElect {
		l := leader.New(leader.Options{Identity: s.Name + "_" + rand.Text(), Kubeconfig: kubeconfig, Log: s.Log})
		leadership, api = l, m.Add(l, api)
	}
	elected := func(build func() component.Component) {
		m.Add(component.Elected(leadership, build, s.Log), api)
	}
	elected(func() component.Component {
		return servingcert.New(servingcert.Options{Kubeconfig: kubeconfig, ServiceCIDR: s.cfg.ServiceCIDR, Joined: join.Addresses, Log: s.Log})
	})
	for _, name := range []config.Addon{config.CoreDNS, config.MetricsServer, config.LocalStorage} {
		elected(func() component.Component { return s.addon(name, kubeconfig, parts.Nameservers) })
	}
	if s.cfg.Enabled(config.ServiceLB) {
		elected(func() component.Component { return loadbalancer.New(s.loadBalancer()) })
	}
	if s.cfg.Enabled(config.Istio) {
		elected(func() component.Component { return install.New(s.mesh(kubeconfig)) })
	}
	switch {
	case !s.accessible():
		elected(func() component.Component { return s.observeAccess(kubeconfig) })
	case s.observes():
		// Where the store is, and not where the leader is.
		m.Add(s.observeAccess(kubeconfig), serving)
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
func newDatastore(cfg *config.Server, p *process.Process, membership *join.ServerMembership) ownDatastore {
	dir := cfg.DataDir
	if files, err := os.ReadDir(dir.Server("db")); err == nil && len(files) > 0 && cfg.Datastore.Kind != config.SQLite {
		p.Log.Warn("this server has a datastore of its own, which is not used with --datastore-endpoint", "folder", dir.Server("db"))
	}
	switch cfg.Datastore.Kind {
	case config.Etcd:
		return datastore.NewExternal(cfg.Datastore)
	case config.PostgreSQL, config.MySQL:
		return datastore.NewSQL(datastore.SQLOptions{Database: cfg.Datastore, Socket: dir.DatastoreSocket(), Log: p.Log})
	}
	// A member of etcd stays one, whatever the flags are: the cluster's state is there.
	if exists, err := etcd.Exists(dir.Etcd()); cfg.ClusterInit || membership != nil && !hasSQLite(cfg) || exists || err != nil {
		return etcd.New(etcd.Options{
			Dir: dir.Etcd(), SQLite: dir.Server("db", datastore.CopyName), Args: cfg.EtcdArgs, Node: p.Name, Certificates: certificate.Store(dir.TLS()), Log: p.Log,
			Client: layout.Loopback(layout.EtcdClientPort), HTTP: layout.Loopback(layout.EtcdHTTPPort), Peer: netip.AddrPortFrom(p.IP, layout.EtcdPeerPort),
			Join: addMember(cfg, p, membership),
		})
	}
	return datastore.New(datastore.Options{Dir: dir.Server("db"), Socket: dir.DatastoreSocket(), Sync: cfg.DatastoreSync})
}

// worker returns the options of the components that every node has.
func (s *server) worker() worker.Options {
	dir, certs := s.cfg.DataDir, certificate.Store(s.cfg.DataDir.TLS())
	pair := func(name string) worker.Pair { return worker.Pair{Cert: certs.Cert(name), Key: certs.Key(name)} }
	return worker.Options{
		Process: s.Process, Settings: s.cfg.Node, Cluster: join.ClusterOf(s.cfg), Own: s.apiAddress(),
		Identity: worker.Identity{
			Kubelet: dir.Kubeconfig("kubelet"), Proxy: dir.Kubeconfig("kube-proxy"), ServerCA: certs.Cert(certificate.ServerCA), ClientCA: certs.Cert(certificate.ClientCA),
			Client: pair(certificate.Kubelet), Serving: pair(certificate.KubeletServing),
			KubeletCA: func() ([]byte, error) { return os.ReadFile(certs.Cert(certificate.KubeletCA)) },
		},
	}
}

// apiAddress is that of this server's API server for other machines.
func (s *server) apiAddress() netip.AddrPort {
	own := s.IP
	if s.cfg.AdvertiseAddress.IsValid() {
		own = s.cfg.AdvertiseAddress
	}
	return netip.AddrPortFrom(own, uint16(s.cfg.HTTPSPort))
}

// observes reports whether this server has the cluster's store of metrics, logs and traces. One that has joined others has none.
func (s *server) observes() bool { return s.clusterObserves() && s.membership == nil }

// collects reports whether this server sends what is on its machine to the store on another one.
func (s *server) collects() bool { return s.clusterObserves() && s.membership != nil }

// clusterObserves reports whether the cluster has a store, for what one server does for all: it is on, and the program is in the file, which
// all servers of a cluster have.
func (s *server) clusterObserves() bool {
	_, has := s.Manifest.Files["bin/"+observe.Program]
	return has && s.cfg.Enabled(config.Observe)
}

// store returns the options of the store, which is started when up is closed.
func (s *server) store(up <-chan struct{}) observe.Options {
	dir := s.cfg.DataDir
	certs := certificate.Store(dir.TLS())
	o := observe.Options{
		DataDir: dir, Program: s.Programs.Bin(observe.Program), Node: s.Name, Disk: s.cfg.Observe.Disk, Memory: s.cfg.Observe.Memory, Retention: s.cfg.Observe.Retention, RemoteWrite: s.cfg.Observe.RemoteWrite,
		Kubeconfig: dir.Kubeconfig("observe"), PodLogs: dir.PodLogs(), LogFiles: observe.LogFiles(dir, "server"), Debug: s.cfg.Debug, Up: up, Log: s.Log,
	}
	o.Ports = []int{int(s.apiAddress().Port())}
	for _, p := range layout.Ports() {
		if !p.UDP {
			o.Ports = append(o.Ports, p.Number)
		}
	}
	o.Kubelets.CA, o.Kubelets.Cert, o.Kubelets.Key = certs.Cert(certificate.KubeletCA), certs.Cert(certificate.Observe), certs.Key(certificate.Observe)
	return o
}

// collector returns the options of what sends to the store on another server, which is started when up is closed.
func (s *server) collector(up <-chan struct{}) observe.Options {
	dir, certs := s.cfg.DataDir, certificate.Store(s.cfg.DataDir.TLS())
	return observe.Options{
		DataDir: dir, Program: s.Programs.Bin(observe.Program), Node: s.Name, PodLogs: dir.PodLogs(), LogFiles: observe.LogFiles(dir, "server"), Debug: s.cfg.Debug, Up: up, Log: s.Log,
		Collect: &route.Node{Server: worker.BalancerURL(), CA: certs.Cert(certificate.ServerCA), Cert: certs.Cert(certificate.Kubelet), Key: certs.Key(certificate.Kubelet)},
	}
}

// route returns the options of the way to the store.
func (s *server) route() route.Options {
	certs := certificate.Store(s.cfg.DataDir.TLS())
	o := route.Options{
		Server: s.Name, Address: s.apiAddress(), Kubeconfig: s.cfg.DataDir.Kubeconfig("polymesh"),
		CA: certs.Cert(certificate.ServerCA), Cert: certs.Cert(certificate.Polymesh), Key: certs.Key(certificate.Polymesh), Log: s.Log,
	}
	if s.observes() {
		o.Socket = s.cfg.DataDir.ObserveSocket()
	}
	return o
}

// encryption returns the cluster whose Secrets are rewritten.
func (s *server) encryption(plane controlplane.Options) encryption.Cluster {
	c := encryption.Cluster{Place: plane.Keys(), Kubeconfig: s.cfg.DataDir.Kubeconfig("polymesh")}
	if !s.cfg.Snapshots.Disabled {
		c.Before = s.snapshots.Before(snapshot.BeforeSecretsEncrypt)
	}
	return c
}

// imagePolicy returns the options of what decides which images may run.
func (s *server) imagePolicy() imagepolicy.Options {
	dir := s.cfg.DataDir
	return imagepolicy.Options{
		Keys: s.cfg.ImagePolicyKeys, Kubeconfig: dir.Kubeconfig("image-policy"), Certificates: certificate.Store(dir.TLS()), Port: layout.ImagePolicyPort,
		Open:         func() (imagepolicy.Node, error) { return imagestore.OpenSignatures(dir.ContainerdSocket()) },
		RegistryDirs: dir.RegistryDirs(), Server: s.Name, Several: s.datastore.Endpoint().LeaderElect, Log: s.Log,
	}
}

// loadBalancer returns the options of what gives LoadBalancer services their addresses.
func (s *server) loadBalancer() loadbalancer.Options {
	return loadbalancer.Options{
		Kubeconfig: s.cfg.DataDir.Kubeconfig("servicelb"), NodeName: s.Name, Addresses: s.addresses(),
		Internal: []netip.Prefix{s.cfg.ClusterCIDR, s.cfg.ServiceCIDR},
		Reserved: loadbalancer.ReservedPorts(s.cfg.HTTPSPort), Pool: s.cfg.LoadBalancerPool, Log: s.Log,
	}
}

// mesh returns the options of what installs Istio.
func (s *server) mesh(kubeconfig string) install.Options {
	return install.Options{
		Kubeconfig: kubeconfig, Profile: s.cfg.MeshProfile, ClusterDomain: s.cfg.ClusterDomain,
		GatewayAPI: s.Programs.Path("manifests/gateway-api.yaml"), Telemetry: s.telemetry(), Log: s.Log,
	}
}

// telemetry returns what the proxies report for the store, which pods reach by observeAccess.
func (s *server) telemetry() install.Telemetry {
	return install.Telemetry{Traces: s.accessible(), AccessLogs: s.clusterObserves()}
}

// accessible reports whether pods reach the store of the cluster.
func (s *server) accessible() bool {
	return s.clusterObserves() && s.cfg.ObserveAccess != config.ObserveOff
}

// observeAccess returns the add-on by which pods reach the store on this server, or what removes it.
func (s *server) observeAccess(kubeconfig string) component.Component {
	return addon.New(addon.Options{
		Name: addon.ObserveAccess, Disabled: !s.accessible(), Kubeconfig: kubeconfig, Image: s.Manifest.Image,
		NodeName: s.Name, Access: s.cfg.ObserveAccess, Sockets: s.cfg.DataDir.ObserveSockets(), Log: s.Log,
	})
}

// addon returns an add-on; a disabled one is added too, so that an earlier installation is removed.
func (s *server) addon(name config.Addon, kubeconfig string, names *node.Nameservers) component.Component {
	return addon.New(addon.Options{
		Name: name, Disabled: !s.cfg.Enabled(name), Kubeconfig: kubeconfig, Image: s.Manifest.Image,
		ClusterDNS: s.cfg.ClusterDNS, ClusterDomain: s.cfg.ClusterDomain, Nameservers: names.Servers,
		NodeName: s.Name, NodeAddress: s.IP, External: s.cfg.FlannelExternalIP, Internal: []netip.Prefix{s.cfg.ClusterCIDR, s.cfg.ServiceCIDR}, StorageDir: s.cfg.DataDir.Storage(),
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
