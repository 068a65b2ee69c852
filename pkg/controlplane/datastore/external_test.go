//go:build integration

package datastore

import (
	"fmt"
	"net/netip"
	"net/url"
	"strings"
	"testing"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/transport"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"

	"polymesh.dev/polymesh/pkg/certificate"
	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/porttest"
)

// outside is an etcd of the user's, with TLS and a client certificate.
type outside struct {
	t      *testing.T
	config *embed.Config
	etcd   *embed.Etcd
}

func (o *outside) start() {
	o.t.Helper()
	var err error
	if o.etcd, err = embed.StartEtcd(o.config); err != nil {
		o.t.Fatal(err)
	}
}

func (o *outside) stop() {
	if o.etcd != nil {
		o.etcd.Close()
		o.etcd = nil
	}
}

// An etcd outside is used with TLS. While it is away the component is not ready, and afterwards everything acknowledged is there.
func TestExternalEtcd(t *testing.T) {
	store := certificate.Store(t.TempDir())
	if _, err := certificate.Ensure(certificate.Options{
		Dir: string(store), NodeName: "db", NodeIP: netip.MustParseAddr("127.0.0.1"), ServiceIP: netip.MustParseAddr("10.43.0.1"), ClusterDomain: "cluster.local", Now: time.Now(),
	}); err != nil {
		t.Fatal(err)
	}
	cfg := embed.NewConfig()
	cfg.Dir = t.TempDir()
	var hosts []string
	for range 2 {
		hosts = append(hosts, porttest.Loopback(t).String())
	}
	cfg.ListenClientUrls = []url.URL{{Scheme: "https", Host: hosts[0]}}
	cfg.AdvertiseClientUrls = cfg.ListenClientUrls
	cfg.ListenPeerUrls = []url.URL{{Scheme: "http", Host: hosts[1]}}
	cfg.AdvertisePeerUrls = cfg.ListenPeerUrls
	cfg.InitialCluster = cfg.Name + "=http://" + hosts[1]
	cfg.ClientTLSInfo = transport.TLSInfo{
		CertFile: store.Cert(certificate.EtcdServing), KeyFile: store.Key(certificate.EtcdServing), TrustedCAFile: store.Cert(certificate.EtcdCA), ClientCertAuth: true,
	}
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.NewNop())
	server := &outside{t: t, config: cfg}
	t.Cleanup(server.stop)

	e := NewExternal(config.Datastore{
		Kind: config.Etcd, Endpoint: config.Secret("https://" + hosts[0]), CAFile: store.Cert(certificate.EtcdCA),
		CertFile: store.Cert(certificate.EtcdClient), KeyFile: store.Key(certificate.EtcdClient),
	})
	if err := e.Init(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := e.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stopStore(t, e) })
	waitReady(t, e, "etcd has no majority that answers: https://"+hosts[0])
	server.start()
	waitReady(t, e, "")
	if !e.Endpoint().LeaderElect || !strings.HasPrefix(e.Version(), "etcd 3.") {
		t.Errorf("%+v, version %s", e.Endpoint(), e.Version())
	}
	client := clientOf(t, e)
	watch := client.Watch(t.Context(), "/registry/", clientv3.WithPrefix())
	revisions := map[string]int64{}
	for i := range 20 {
		key := fmt.Sprintf("/registry/a/%02d", i)
		revisions[key] = put(t, client, key, key, 0)
	}
	waitEvents(t, watch, len(revisions))
	server.stop()
	waitReady(t, e, "etcd has no majority that answers")
	server.start()
	waitReady(t, e, "")
	complete(t, client, revisions)
	put(t, client, "/registry/a/after", "", 0)
	waitEvents(t, watch, 1)
}
