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

// Store is the component "datastore", whatever is behind it: SQLite in this process today.
type Store interface {
	component.Component
	// Endpoint is how others reach it. It does not change, and is known before the component starts.
	Endpoint() Endpoint
}

var _ Store = (*Datastore)(nil)

// Endpoint is where a datastore serves etcd's API, and what a client needs to be let in.
type Endpoint struct {
	// Servers are the addresses, with commas between them, as the API server's --etcd-servers takes them.
	Servers string
	// CA, Cert and Key are files in PEM: the authority of the datastore, and the client's own certificate and key. Empty
	// where the connection has no TLS, as on a UNIX socket.
	CA, Cert, Key string
	// LeaderElect says that other servers may reach the datastore too, so that what only one server may do needs a leader.
	LeaderElect bool
}

// Flags are the API server's for this endpoint.
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
