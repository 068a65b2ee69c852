//go:build integration

package member

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"

	"polymesh.dev/polymesh/pkg/atomicfile"
	"polymesh.dev/polymesh/pkg/component"
	"polymesh.dev/polymesh/pkg/controlplane/controlplanetest"
	"polymesh.dev/polymesh/pkg/controlplane/datastore"
	"polymesh.dev/polymesh/pkg/controlplane/datastore/etcd/etcdtest"
	"polymesh.dev/polymesh/pkg/layout"
	"polymesh.dev/polymesh/pkg/status"
)

func TestMembers(t *testing.T) {
	kubeconfig := controlplanetest.Start(t, slog.New(slog.DiscardHandler))
	t.Run("FollowNodes", func(t *testing.T) { followNodes(t, kubeconfig) })
	t.Run("Leave", func(t *testing.T) { leave(t, kubeconfig) })
	t.Run("LeaveExternal", func(t *testing.T) { leaveExternal(t, kubeconfig) })
}

// The member of a removed server's node is removed, and never one without which the others would not be a majority.
func followNodes(t *testing.T, kubeconfig string) {
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	client := controlplanetest.Client(t, kubeconfig)
	servers := etcdtest.Cluster(t, log, "a", "b", "c")
	components := map[string]*Component{}
	start := func(s *etcdtest.Server) {
		c := New(Options{Node: s.Name, Etcd: s.Etcd, Kubeconfig: kubeconfig, Recheck: time.Second, Log: log})
		if err := c.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { end(t, c) })
		components[s.Name] = c
		controlplanetest.Eventually(t, s.Name+" is recorded", func() error { return c.Ready(t.Context()) })
	}
	for _, name := range []string{"a", "b", "c", "agent"} {
		create(t, client, name)
	}
	for _, s := range servers {
		id, _ := s.ID()
		m := &corev1.ConfigMap{
			ObjectMeta: metav1.ObjectMeta{Name: recordPrefix + memberID(id), Labels: map[string]string{recordLabel: "true"}}, Data: map[string]string{recordNode: s.Name, recordUID: "u"},
		}
		if _, err := client.CoreV1().ConfigMaps(metav1.NamespaceSystem).Create(t.Context(), m, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	for _, s := range servers {
		start(s)
	}
	// Neither a node without a record, nor one that someone else has written wrongly, is one of a member; nor in a ConfigMap, as a version before
	// has written them and istiod may, which are removed.
	for _, s := range []*corev1.Secret{
		{ObjectMeta: metav1.ObjectMeta{Name: recordPrefix + "x"}, Type: recordType, Data: map[string][]byte{recordNode: []byte("agent"), recordUID: []byte("u")}},
		{ObjectMeta: metav1.ObjectMeta{Name: "other"}, Type: recordType, Data: map[string][]byte{recordNode: []byte("agent"), recordUID: []byte("u")}},
	} {
		if _, err := client.CoreV1().Secrets(metav1.NamespaceSystem).Create(t.Context(), s, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	controlplanetest.Eventually(t, "ConfigMaps of members are removed", func() error {
		left, err := client.CoreV1().ConfigMaps(metav1.NamespaceSystem).List(t.Context(), metav1.ListOptions{LabelSelector: recordLabel})
		if err == nil && len(left.Items) > 0 {
			err = errors.New(left.Items[0].Name)
		}
		return err
	})
	remove(t, client, "agent")

	// One server is away: none of the others is removed until it is back.
	leader := leading(t, servers)
	var away, victim *etcdtest.Server
	for _, s := range servers {
		switch {
		case s == leader:
		case away == nil:
			away = s
		default:
			victim = s
		}
	}
	end(t, components[away.Name])
	away.Halt(t)
	remove(t, client, victim.Name)
	controlplanetest.Eventually(t, "the removal is refused", func() error {
		return event(t, client, victim.Name, NotRemoved, "2 of 3 members answer; removing "+victim.Name+" would leave 2 members of which 1 answers")
	})
	controlplanetest.Eventually(t, "the leader notes it", func() error {
		note := strings.Join(components[leading(t, servers).Name].Notes(t.Context()), "\n")
		if !strings.Contains(note, "node "+victim.Name+" was removed, and its member of etcd stays") {
			return fmt.Errorf("the note is %q", note)
		}
		return nil
	})
	if err := members(t, leader, 3); err != nil {
		t.Error(err)
	}
	create(t, client, victim.Name) // it registers again
	away.Start(t)
	start(away)
	controlplanetest.Eventually(t, "nothing is refused any more", func() error {
		leader = leading(t, servers)
		if note := strings.Join(components[leader.Name].Notes(t.Context()), "\n"); note != "" {
			return errors.New(note)
		}
		return members(t, leader, 3)
	})

	// The leader's node is removed.
	var left []*etcdtest.Server
	for _, s := range servers {
		if s != leader {
			left = append(left, s)
		}
	}
	remove(t, client, leader.Name)
	controlplanetest.Eventually(t, "the leader's member is removed", func() error { return members(t, left[0], 2) })
	controlplanetest.Eventually(t, "there is an event", func() error { return event(t, client, leader.Name, Removed, "was removed with its node") })
	select {
	case err := <-leader.Failed():
		if !strings.Contains(err.Error(), "this server was removed from the cluster: start it with --server") {
			t.Errorf("it ends with %v", err)
		}
	case <-time.After(time.Minute):
		t.Error("the removed member continues")
	}
	end(t, components[leader.Name])

	// Of those that are left one after the other.
	one, two := left[0], left[1]
	remove(t, client, one.Name)
	controlplanetest.Eventually(t, "the second member is removed", func() error { return members(t, two, 1) })
	end(t, components[one.Name])

	// The last one stays.
	remove(t, client, two.Name)
	controlplanetest.Eventually(t, "the last member is not removed", func() error {
		if note := strings.Join(components[two.Name].Notes(t.Context()), "\n"); !strings.Contains(note, "is the only member of etcd") {
			return fmt.Errorf("the note is %q", note)
		}
		return event(t, client, two.Name, NotRemoved, "is the only member of etcd")
	})
	if err := members(t, two, 1); err != nil {
		t.Error(err)
	}
	// The machine registers again.
	create(t, client, two.Name)
	controlplanetest.Eventually(t, "its member belongs to the new node", func() error {
		if note := strings.Join(components[two.Name].Notes(t.Context()), "\n"); note != "" {
			return errors.New(note)
		}
		records, err := Records(t.Context(), client)
		if err == nil && (len(records) != 1 || records[0].Node != two.Name) {
			err = fmt.Errorf("%v", records)
		}
		return err
	})
}

// A server leaves by itself (`polymesh reset`), one is removed by another (`polymesh node remove`), and a member without a node by its name
// (`polymesh etcd remove`), each only while the others are a majority.
func leave(t *testing.T, kubeconfig string) {
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	client := controlplanetest.Client(t, kubeconfig)
	servers := etcdtest.Cluster(t, log, "d", "e", "f", "g")
	d, e, g := servers[0], servers[1], servers[3]
	for _, s := range servers {
		create(t, client, s.Name)
		patch := []byte(`{"metadata":{"labels":{"node-role.kubernetes.io/control-plane":"true"}}}`)
		if _, err := client.CoreV1().Nodes().Patch(t.Context(), s.Name, types.MergePatchType, patch, metav1.PatchOptions{}); err != nil {
			t.Fatal(err)
		}
		text, err := os.ReadFile(kubeconfig)
		if err != nil {
			t.Fatal(err)
		}
		if err := atomicfile.Write(s.DataDir.Kubeconfig("polymesh"), text, 0o600); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = os.RemoveAll(s.DataDir.Run()) })
		socket, err := status.Serve(t.Context(), s.DataDir.StatusSocket(), status.Report{Role: status.RoleServer, Node: s.Name}, component.NewManager(log))
		if err != nil {
			t.Fatal(err)
		}
		Serve(socket, s.Etcd, status.EmbeddedEtcd)
		c := New(Options{Node: s.Name, Etcd: s.Etcd, Kubeconfig: kubeconfig, Recheck: time.Second, Log: log})
		if err := c.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { end(t, c) })
		controlplanetest.Eventually(t, s.Name+" is recorded", func() error { return c.Ready(t.Context()) })
	}

	// By itself.
	departure := Departing(t.Context(), g.DataDir)
	if departure == nil || departure.String() != "the node g from its cluster, which has other servers, and its member of etcd" {
		t.Fatalf("%v leaves", departure)
	}
	if err := departure.Leave(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := client.CoreV1().Nodes().Get(t.Context(), "g", metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("its node: %v", err)
	}
	if err := members(t, d, 3); err != nil {
		t.Error(err)
	}
	select {
	case <-g.Failed():
	case <-time.After(time.Minute):
		t.Error("the server that has left continues")
	}
	if again := Departing(t.Context(), g.DataDir); again != nil {
		t.Errorf("after it has left: %v leaves again", again)
	}

	// By another one, which is not itself.
	var done []string
	removal := Removal{Client: client, Local: Local{d.DataDir.StatusSocket()}, Self: "d", Done: func(what string) { done = append(done, what) }}
	if err := removal.Run(t.Context(), "d"); err == nil || !strings.Contains(err.Error(), "d is this machine") {
		t.Errorf("removing itself: %v", err)
	}
	if err := removal.Run(t.Context(), "f"); err != nil || len(done) != 2 || done[0] != "node f removed" {
		t.Errorf("removing f: %q, %v", done, err)
	}
	if err := members(t, d, 2); err != nil {
		t.Error(err)
	}

	// A member whose node exists stays; its server is away, and then nothing can be removed.
	local := Local{d.DataDir.StatusSocket()}
	if _, err := local.RemoveNamed(t.Context(), "e", d.DataDir.Kubeconfig("polymesh")); err == nil || !strings.Contains(err.Error(), "node e exists: `polymesh node remove e`") {
		t.Errorf("removing the member of a node: %v", err)
	}
	if err := local.Works(t.Context()); err != nil {
		t.Errorf("with all members: %v", err)
	}
	e.Halt(t)
	if err := removal.Run(t.Context(), "e"); err == nil || !strings.Contains(err.Error(), "node e stays: 1 of 2 members answers, which is no majority") {
		t.Errorf("removing e: %v", err)
	}
	if err := local.Works(t.Context()); err == nil || !strings.Contains(err.Error(), "1 of 2 members answers, which is no majority") {
		t.Errorf("without a majority: %v", err)
	}
	if err := Departing(t.Context(), d.DataDir).Leave(t.Context()); err == nil || !strings.Contains(err.Error(), "1 of 2 members answers") {
		t.Errorf("d leaves without a majority: %v", err)
	}
	list, self, err := local.Members(t.Context())
	if id, ok := d.ID(); err != nil || len(list) != 2 || !ok || self != id {
		t.Errorf("members are %v, own is %x, %v", list, self, err)
	}
	for _, m := range list {
		if strings.Contains(m.Problem, "://") {
			t.Errorf("the reason repeats the member's address: %s", m.Problem)
		}
	}
}

// A server on a database outside cannot tell whether it is the only one unless the API answers: until then, it is one of several.
func leaveExternal(t *testing.T, kubeconfig string) {
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	client := controlplanetest.Client(t, kubeconfig)
	dir := layout.DataDir(t.TempDir())
	t.Cleanup(func() { _ = os.RemoveAll(dir.Run()) })
	if Departing(t.Context(), dir) != nil {
		t.Error("a server that has never started leaves a cluster")
	}
	if err := (datastore.Endpoint{Servers: "unix:///kine.sock", LeaderElect: true}).Write(dir.DatastoreEndpoint()); err != nil {
		t.Fatal(err)
	}
	refused := func(why string) {
		t.Helper()
		departure := Departing(t.Context(), dir)
		if departure == nil {
			t.Fatalf("it is taken for the only one, although %s", why)
		}
		if err := departure.Leave(t.Context()); err == nil || !strings.Contains(err.Error(), "may be one of several") || !strings.Contains(err.Error(), why) {
			t.Errorf("it leaves with %v, want an error with %q", err, why)
		}
	}
	refused("it does not run")
	socket, err := status.Serve(t.Context(), dir.StatusSocket(), status.Report{Role: status.RoleServer, Node: "x"}, component.NewManager(log))
	if err != nil {
		t.Fatal(err)
	}
	Serve(socket, nil, "PostgreSQL")
	refused("no such file")

	text, err := os.ReadFile(kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	if err := atomicfile.Write(dir.Kubeconfig("polymesh"), text, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := client.CoreV1().Nodes().DeleteCollection(t.Context(), metav1.DeleteOptions{}, metav1.ListOptions{}); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"x", "y"} {
		node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{layout.ServerLabel: "true"}}}
		if _, err := client.CoreV1().Nodes().Create(t.Context(), node, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	departure := Departing(t.Context(), dir)
	if departure == nil || departure.String() != "the node x from its cluster, which has other servers" {
		t.Fatalf("%v leaves", departure)
	}
	if err := departure.Leave(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := client.CoreV1().Nodes().Get(t.Context(), "x", metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("its node: %v", err)
	}
	if again := Departing(t.Context(), dir); again != nil {
		t.Errorf("as the only one, %v leaves", again)
	}
}

// leading waits until one of the servers leads etcd, and returns it. An election can take place at any time.
func leading(t *testing.T, servers []*etcdtest.Server) (leader *etcdtest.Server) {
	t.Helper()
	controlplanetest.Eventually(t, "one leads", func() error {
		i := slices.IndexFunc(servers, func(s *etcdtest.Server) bool { return s.Leads() })
		if i < 0 {
			return errors.New("none does")
		}
		leader = servers[i]
		return nil
	})
	return leader
}

func create(t *testing.T, client kubernetes.Interface, name string) {
	t.Helper()
	if _, err := client.CoreV1().Nodes().Create(t.Context(), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
}

func remove(t *testing.T, client kubernetes.Interface, name string) {
	t.Helper()
	if err := client.CoreV1().Nodes().Delete(t.Context(), name, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
}

func members(t *testing.T, through *etcdtest.Server, want int) error {
	list, err := through.Members(t.Context())
	if err == nil && len(list) != want {
		err = fmt.Errorf("there are %d members", len(list))
	}
	return err
}

func event(t *testing.T, client kubernetes.Interface, node, reason, text string) error {
	events, err := client.CoreV1().Events(metav1.NamespaceDefault).List(t.Context(), metav1.ListOptions{})
	if err != nil {
		return err
	}
	for _, e := range events.Items {
		if e.InvolvedObject.Kind == "Node" && e.InvolvedObject.Name == node && e.Reason == reason && strings.Contains(e.Message, text) {
			return nil
		}
	}
	return fmt.Errorf("no event %s of node %s", reason, node)
}

func end(t *testing.T, c *Component) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := c.Stop(ctx); err != nil {
		t.Error(err)
	}
}
