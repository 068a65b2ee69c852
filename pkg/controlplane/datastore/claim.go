package datastore

import (
	"context"
	"fmt"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

const (
	// claimKey is outside of the API server's prefix, /registry.
	claimKey = "/polymesh/cluster"
	// claimTimeout is the time for all requests.
	claimTimeout = 30 * time.Second
)

// Claim records which cluster the datastore belongs to, and returns an error if it belongs to another one. cluster identifies the
// authorities with which its certificates and tokens are signed: a server with others would damage it.
func (e Endpoint) Claim(ctx context.Context, cluster string) error {
	ctx, cancel := context.WithTimeout(ctx, claimTimeout)
	defer cancel()
	client, err := e.Client()
	if err != nil {
		return fmt.Errorf("find out whose the datastore is: %w", err)
	}
	defer client.Close()
	got, err := client.Get(ctx, claimKey)
	if err == nil && len(got.Kvs) == 0 {
		// Only now: a datastore that is full refuses each request that may write.
		create := client.Txn(ctx).If(clientv3.Compare(clientv3.ModRevision(claimKey), "=", 0)).Then(clientv3.OpPut(claimKey, cluster))
		if _, err = create.Commit(); err == nil {
			got, err = client.Get(ctx, claimKey)
		}
	}
	if err != nil {
		return fmt.Errorf("find out whose the datastore is: %w", err)
	}
	if len(got.Kvs) != 1 || string(got.Kvs[0].Value) != cluster {
		return fmt.Errorf("the datastore holds another cluster, whose certificate authorities this server does not have: start the server that has them, copy its server/tls and server/cred here, or use an empty datastore")
	}
	return nil
}
