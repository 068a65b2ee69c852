package bootstrap

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"polymesh.dev/polymesh/pkg/atomicfile"
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
	// ID is that of the data dir that has the name; empty where servers do not find each other in the datastore. See Take.
	ID string `json:"id,omitempty"`

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
		if written, err = s.write(ctx, r); err != nil {
			return err
		}
	}
	return nil
}

// write writes a record that has not changed since it was read. written is false if it has.
func (s Store) write(ctx context.Context, r Server) (written bool, err error) {
	text, err := json.Marshal(r)
	if err == nil {
		written, err = s.put(ctx, serverPath+r.Name, text, r.revision)
	}
	if err != nil {
		return false, fmt.Errorf("write the record of server %s: %w", r.Name, err)
	}
	return written, nil
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

// First is the server that begins a cluster. It has no ID if a version before has written it.
type First struct {
	Name string `json:"name"`
	ID   string `json:"id,omitempty"`
}

// First returns the server that begins the cluster: this one, unless another has asked before. The answer stays the same for as long as the
// datastore has it, since only that server has the cluster's authorities until it has saved the bundle.
func (s Store) First(ctx context.Context, self First) (First, error) {
	own, err := json.Marshal(self)
	for err == nil {
		var have []byte
		var revision int64
		if have, revision, err = s.get(ctx, firstPath); err == nil && revision > 0 {
			var first First
			if json.Unmarshal(have, &first) != nil || first.Name == "" {
				first = First{Name: string(have)} // of a version before
			}
			return first, nil
		}
		if err == nil {
			_, err = s.put(ctx, firstPath, own, 0)
		}
	}
	return First{}, fmt.Errorf("find out which server is the cluster's first: %w", err)
}

// idPattern is an ID.
var idPattern = regexp.MustCompile(`^[A-Z2-7]{26}$`)

// EnsureID reads the id of a server's data dir, and makes it if there is none.
func EnsureID(file string) (string, error) {
	text, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		id := rand.Text()
		if err = atomicfile.MkdirAll(filepath.Dir(file), 0o700); err == nil {
			err = atomicfile.Write(file, []byte(id+"\n"), 0o600)
		}
		if err != nil {
			return "", fmt.Errorf("write the id of this server's data dir: %w", err)
		}
		return id, nil
	}
	if err != nil {
		return "", fmt.Errorf("read the id of this server's data dir: %w", err)
	}
	id := strings.TrimSpace(string(text))
	if !idPattern.MatchString(id) {
		return "", fmt.Errorf("the id of this server's data dir, %s, is damaged: remove the file, and start the server again", file)
	}
	return id, nil
}

// IsShared reports whether a key of the datastore is the bundle, a record, or the name of the first server. A datastore that only one server
// can use may have those of servers that the cluster had before: they are old if it has several again.
func IsShared(key string) bool {
	return key == bundlePath || key == firstPath || strings.HasPrefix(key, serverPath)
}
