package datastore

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"go.etcd.io/etcd/client/pkg/v3/transport"
	"go.uber.org/zap"

	"polymesh.dev/polymesh/pkg/atomicfile"
	"polymesh.dev/polymesh/pkg/component"
)

// Store is the component "datastore", independent of its backend.
type Store interface {
	component.Component
	// Endpoint is the datastore's address for clients. It does not change, and is known before the component starts.
	Endpoint() Endpoint
}

var _ Store = (*Datastore)(nil)

// Endpoint is the address of a datastore that serves etcd's API, and a client's credentials.
type Endpoint struct {
	// Servers are the addresses, separated by commas, as in the API server's --etcd-servers.
	Servers string `json:"servers"`
	// CA, Cert and Key are PEM files: the datastore's authority, and the client's certificate and key. Empty
	// if the connection does not use TLS, as on a Unix socket.
	CA   string `json:"ca,omitempty"`
	Cert string `json:"cert,omitempty"`
	Key  string `json:"key,omitempty"`
	// LeaderElect is set if other servers can use the datastore too, so that components that run only once need a leader.
	LeaderElect bool `json:"leaderElect,omitempty"`
}

// Write writes the endpoint to a file, for commands that work next to the running server. It contains no secret, only the names of files.
func (e Endpoint) Write(file string) error {
	text, err := json.Marshal(e)
	if err == nil {
		err = atomicfile.Write(file, text, 0o600)
	}
	if err != nil {
		return fmt.Errorf("write the datastore's endpoint: %w", err)
	}
	return nil
}

// ReadEndpoint reads a file of Write's.
func ReadEndpoint(file string) (e Endpoint, err error) {
	text, err := os.ReadFile(file)
	if err == nil {
		err = json.Unmarshal(text, &e)
	}
	if err != nil {
		return Endpoint{}, fmt.Errorf("read the datastore's endpoint: %w", err)
	}
	return e, nil
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
