package encryption

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	clientv3 "go.etcd.io/etcd/client/v3"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/kubernetes/scheme"

	"polymesh.dev/polymesh/pkg/controlplane/datastore"
	"polymesh.dev/polymesh/pkg/layout"
)

// nodesPath is the prefix of Nodes in the datastore.
const nodesPath = "/registry/minions/"

// OtherServers returns the names of the servers in a datastore whose address is not this one's, also of those that do not run. It asks the
// datastore itself, before there is an API server.
func OtherServers(ctx context.Context, at datastore.Endpoint, own netip.Addr) ([]string, error) {
	if !at.LeaderElect {
		return nil, nil // no other server can use it
	}
	store, err := at.Client()
	if err != nil {
		return nil, fmt.Errorf("connect to the datastore: %w", err)
	}
	defer store.Close()
	return servers(ctx, store, own)
}

// servers returns the names of the servers, sorted, without the one that has an address.
func servers(ctx context.Context, store *clientv3.Client, own netip.Addr) ([]string, error) {
	got, err := store.Get(ctx, nodesPath, clientv3.WithPrefix())
	if err != nil {
		return nil, fmt.Errorf("read the nodes in the datastore: %w", err)
	}
	var names []string
	for _, kv := range got.Kvs {
		obj, _, err := scheme.Codecs.UniversalDeserializer().Decode(kv.Value, nil, nil)
		if err != nil {
			return nil, fmt.Errorf("read %s in the datastore: %w", kv.Key, err)
		}
		node, ok := obj.(*corev1.Node)
		if !ok {
			return nil, fmt.Errorf("%s in the datastore is a %T", kv.Key, obj)
		}
		_, server := node.Labels[layout.ServerLabel]
		if !server || slices.ContainsFunc(node.Status.Addresses, func(a corev1.NodeAddress) bool { return own.IsValid() && a.Address == own.String() }) {
			continue
		}
		names = append(names, node.Name)
	}
	slices.Sort(names)
	return names, nil
}

// severalServers is why the keys of a cluster with several servers are not changed: each has its own file, and what one writes with a key
// that another does not have yet, that one cannot read.
func severalServers(names []string) error {
	return fmt.Errorf("the keys of Secrets can be changed in a cluster with one server only, and this one has %s: remove the other servers (`polymesh node remove NAME`), change the keys, and let them join again",
		strings.Join(names, ", "))
}
