package datastore

import (
	"fmt"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"go.etcd.io/etcd/client/pkg/v3/transport"
	"go.uber.org/zap"

	"polymesh.dev/polymesh/pkg/component"
)

// Store is the component "datastore", independent of its backend: SQLite in this process today.
type Store interface {
	component.Component
	// Endpoint is the datastore's address for clients. It does not change, and is known before the component starts.
	Endpoint() Endpoint
}

var _ Store = (*Datastore)(nil)

// Endpoint is the address of a datastore that serves etcd's API, and a client's credentials.
type Endpoint struct {
	// Servers are the addresses, separated by commas, as in the API server's --etcd-servers.
	Servers string
	// CA, Cert and Key are PEM files: the datastore's authority, and the client's certificate and key. Empty
	// if the connection does not use TLS, as on a Unix socket.
	CA, Cert, Key string
	// LeaderElect is set if other servers can use the datastore too, so that components that run only once need a leader.
	LeaderElect bool
}

// Flags returns the API server's flags for this endpoint.
func (e Endpoint) Flags() map[string]string {
	flags := map[string]string{"etcd-servers": e.Servers}
	for flag, value := range map[string]string{"etcd-cafile": e.CA, "etcd-certfile": e.Cert, "etcd-keyfile": e.Key} {
		if value != "" {
			flags[flag] = value
		}
	}
	return flags
}

// Client connects to the datastore. The caller closes it.
func (e Endpoint) Client() (*clientv3.Client, error) {
	config := clientv3.Config{Endpoints: strings.Split(e.Servers, ","), DialTimeout: dialTimeout, Logger: zap.NewNop()}
	if e.CA != "" || e.Cert != "" {
		info := transport.TLSInfo{TrustedCAFile: e.CA, CertFile: e.Cert, KeyFile: e.Key}
		var err error
		if config.TLS, err = info.ClientConfig(); err != nil {
			return nil, fmt.Errorf("read the datastore's certificates: %w", err)
		}
	}
	return clientv3.New(config)
}

const dialTimeout = 10 * time.Second
