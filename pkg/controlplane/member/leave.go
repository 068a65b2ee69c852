package member

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"polymesh.dev/polymesh/pkg/controlplane/datastore"
	"polymesh.dev/polymesh/pkg/controlplane/datastore/etcd"
	"polymesh.dev/polymesh/pkg/kubeconfig"
	"polymesh.dev/polymesh/pkg/layout"
	"polymesh.dev/polymesh/pkg/status"
)

// departTimeout is the time for each step to find out whether a server is one of several. A report takes up to 10 s (component.Manager) while
// the API server does not answer.
const departTimeout = 15 * time.Second

// Departure is how a server of several leaves its cluster before its data is removed.
type Departure struct {
	// Node is the name of its node; empty if it is not known.
	Node string

	dir layout.DataDir
	// unable is why it cannot leave: it does not run, for example.
	unable error
	local  Local
	// self is its member of etcd; 0 if the datastore is another one.
	self uint64
	// external is set if its datastore is one outside, where nothing on this machine shows whether there are other servers.
	external bool
}

// String is what a user reads before it happens.
func (d *Departure) String() string {
	switch {
	case d.external && d.unable != nil:
		return "this server from its cluster, which may have others"
	case d.Node == "":
		return "this server from its cluster, which has others"
	case d.self != 0 || d.unable != nil:
		return fmt.Sprintf("the node %s from its cluster, which has other servers, and its member of etcd", d.Node)
	}
	return fmt.Sprintf("the node %s from its cluster, which has other servers", d.Node)
}

// Departing returns how the server of a data dir leaves its cluster, nil if it is the only one, or no server. If it cannot be asked,
// a server on a datastore outside is taken for one of several.
func Departing(ctx context.Context, dir layout.DataDir) *Departure {
	d := &Departure{dir: dir, local: Local{Socket: dir.StatusSocket()}}
	// A damaged one must not keep its owner from removing it.
	membership, _ := etcd.ReadMembership(dir.Etcd())
	if membership.Removed {
		return nil
	}
	d.external = onExternal(dir)
	report, err := within(ctx, func(ctx context.Context) (*status.Report, error) { return status.Ask(ctx, d.local.Socket) })
	switch {
	case (err != nil || report.Role != status.RoleServer) && !membership.Shared && !d.external:
		return nil
	case err != nil && !errors.Is(err, status.ErrNotRunning):
		d.unable = err
		return d
	case err != nil || report.Role != status.RoleServer:
		d.unable = errors.New("it does not run: start it first")
		return d
	}
	d.Node = report.Node
	var self uint64
	members, err := within(ctx, func(ctx context.Context) (members []etcd.Member, err error) {
		members, self, err = d.local.Members(ctx)
		return members, err
	})
	var elsewhere *NotHereError
	switch {
	case errors.As(err, &elsewhere) && d.external:
		return d.fromExternal(ctx)
	case errors.As(err, &elsewhere):
		return nil
	case err != nil && (membership.Shared || d.external):
		d.unable = err
		return d
	case err != nil, etcd.QuorumOf(members).Voters <= 1:
		return nil
	}
	d.self = self
	return d
}

// within calls f, which has departTimeout.
func within[T any](ctx context.Context, f func(context.Context) (T, error)) (T, error) {
	ctx, cancel := context.WithTimeout(ctx, departTimeout)
	defer cancel()
	return f(ctx)
}

// onExternal reports whether the datastore of a server is one outside, which several servers can use.
func onExternal(dir layout.DataDir) bool {
	endpoint, err := datastore.ReadEndpoint(dir.DatastoreEndpoint())
	if err != nil || !endpoint.LeaderElect {
		return false
	}
	_, err = os.Stat(dir.Etcd())
	return errors.Is(err, fs.ErrNotExist)
}

// fromExternal returns nil if the server is the only one on its datastore.
func (d *Departure) fromExternal(ctx context.Context) *Departure {
	client, err := d.client()
	if err != nil {
		d.unable = err
		return d
	}
	servers, err := client.CoreV1().Nodes().List(ctx, metav1.ListOptions{LabelSelector: layout.ServerLabel})
	switch {
	case err != nil:
		d.unable = fmt.Errorf("list the servers: %w", err)
	case len(servers.Items) <= 1:
		return nil
	}
	return d
}

func (d *Departure) client() (kubernetes.Interface, error) {
	return kubeconfig.Client(d.dir.Kubeconfig("polymesh"), func(c *rest.Config) { c.Timeout = departTimeout })
}

// Leave removes the server's node from its cluster, and its member of etcd. It changes nothing if the others would not be a majority.
func (d *Departure) Leave(ctx context.Context) error {
	if d.unable != nil {
		several := "is"
		if d.external {
			several = "may be"
		}
		return fmt.Errorf("this server %s one of several, and cannot leave its cluster: %w", several, d.unable)
	}
	if d.self != 0 {
		members, _, err := d.local.Members(ctx)
		if err != nil {
			return err
		}
		if err := etcd.MayRemove(members, d.self); err != nil {
			return err
		}
	}
	client, err := d.client()
	if err != nil {
		return err
	}
	if err := client.CoreV1().Nodes().Delete(ctx, d.Node, metav1.DeleteOptions{}); err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("remove node %s: %w", d.Node, err)
	}
	if d.self == 0 {
		return nil
	}
	// The server that leads etcd removes the member too, and this one ends then: both may fail because of the other.
	ctx, cancel := context.WithTimeout(ctx, removeTimeout)
	defer cancel()
	err = d.local.Remove(ctx, d.self)
	knows := func() bool {
		membership, err := etcd.ReadMembership(d.dir.Etcd())
		return err == nil && membership.Removed
	}
	if d.local.gone(ctx, d.self, knows) != nil {
		return errors.Join(fmt.Errorf("node %s is removed, and its member of etcd is still one after %s", d.Node, removeTimeout), err)
	}
	return nil
}
