package bootstrap

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// Server is the record of a server. It is in the datastore before the server reads the bundle for the first time: whoever changes the
// bundle and then reads the records sees every server that may have read it before the change.
type Server struct {
	// Name is its node's.
	Name string `json:"name"`
	// Address is the one that its API server advertises.
	Address netip.Addr `json:"address"`
	// Started is when its API server was started, by its own clock.
	Started time.Time `json:"started"`
	// Registered is set if its node has been there since.
	Registered bool `json:"registered,omitempty"`
	// Loaded is the hash of the encryption configuration that its API server has loaded, sha256:HEX; empty if none is known.
	Loaded string `json:"loaded,omitempty"`
	// Version is that of its Kubernetes, v1.36.3; empty if a version before has written the record.
	Version string `json:"version,omitempty"`

	revision int64
}

// Server returns a server's record, the zero one if there is none.
func (s Store) Server(ctx context.Context, name string) (r Server, err error) {
	text, revision, err := s.get(ctx, serverPath+name)
	if err == nil && revision > 0 {
		err = json.Unmarshal(text, &r)
	}
	if err != nil {
		return Server{}, fmt.Errorf("read the record of server %s: %w", name, err)
	}
	r.revision = revision
	return r, nil
}

// Record writes the record that change makes of a server's present one.
func (s Store) Record(ctx context.Context, name string, change func(*Server)) error {
	for written := false; !written; {
		r, err := s.Server(ctx, name)
		if err != nil {
			return err
		}
		before := r
		r.Name = name
		if change(&r); r == before {
			return nil
		}
		text, err := json.Marshal(r)
		if err == nil {
			written, err = s.put(ctx, serverPath+name, text, r.revision)
		}
		if err != nil {
			return fmt.Errorf("write the record of server %s: %w", name, err)
		}
	}
	return nil
}

// Servers returns all records.
func (s Store) Servers(ctx context.Context) (all []Server, err error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	got, err := s.Client.Get(ctx, serverPath, clientv3.WithPrefix())
	if err != nil {
		return nil, fmt.Errorf("read the records of the servers: %w", err)
	}
	for _, kv := range got.Kvs {
		r := Server{revision: kv.ModRevision}
		if err := json.Unmarshal(kv.Value, &r); err != nil {
			return nil, fmt.Errorf("read the record of server %s: %w", strings.TrimPrefix(string(kv.Key), serverPath), err)
		}
		r.Name = strings.TrimPrefix(string(kv.Key), serverPath)
		all = append(all, r)
	}
	return all, nil
}

// Forget removes a record, unless it has been written since it was read.
func (s Store) Forget(ctx context.Context, r Server) error {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	if err := s.remove(ctx, serverPath+r.Name, r.revision); err != nil {
		return fmt.Errorf("remove the record of server %s: %w", r.Name, err)
	}
	return nil
}

// First returns the name of the server that begins the cluster: this one's, unless another has asked before. The answer stays the same for as
// long as the datastore has it, since only that server has the cluster's authorities until it has saved the bundle.
func (s Store) First(ctx context.Context, name string) (string, error) {
	for {
		first, revision, err := s.get(ctx, firstPath)
		if err == nil && revision > 0 {
			return string(first), nil
		}
		if err == nil {
			_, err = s.put(ctx, firstPath, []byte(name), 0)
		}
		if err != nil {
			return "", fmt.Errorf("find out which server is the cluster's first: %w", err)
		}
	}
}

// IsShared reports whether a key of the datastore is the bundle, a record, or the name of the first server. A datastore that only one server
// can use may have those of servers that the cluster had before: they are old if it has several again.
func IsShared(key string) bool {
	return key == bundlePath || key == firstPath || strings.HasPrefix(key, serverPath)
}
