//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"polymesh.dev/polymesh/pkg/controlplane/encryption"
	"polymesh.dev/polymesh/pkg/status"
	"polymesh.dev/polymesh/pkg/token"
	"polymesh.dev/polymesh/test/e2e/node"
)

// Three servers and two agents, from empty data dirs. Any server can be lost, also the one that leads etcd: what was acknowledged stays, and
// requests to pods on other nodes are answered. Without a majority the cluster stops, reports it, and comes back.
func TestServers(t *testing.T) {
	ownNodes(t, 5)
	c := node.ClusterForTest(t)
	// The user has chosen the servers' secret, as with K3S_TOKEN.
	secret := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(secret, []byte("chosen-by-the-user-0123456789\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	first := c.AddForTest(t, node.Options{Args: []string{"--cluster-init", "--token-file", secret, "--disable", "istio,metrics-server,local-storage", "--pod-security", "baseline"}})
	if err := first.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	first.WaitReady(t, 3*time.Minute)
	whole, err := os.ReadFile(first.Layout().ServerToken())
	if err != nil {
		t.Fatal(err)
	}
	mine, err := token.Parse(string(whole))
	if err != nil {
		t.Fatal(err)
	}
	// One server has the whole token, one the secret and the hash.
	servers := []*node.Node{
		first, c.AddForTest(t, node.Options{Joins: first, Serves: true}),
		c.AddForTest(t, node.Options{Joins: first, Serves: true, Args: []string{"--token-file", secret, "--token-ca-hash", mine.CAHash}}),
	}
	var agents []*node.Node
	for range 2 {
		agents = append(agents, c.AddForTest(t, node.Options{Joins: first}))
	}

	t.Run("join", func(t *testing.T) {
		// At the same time: one after the other becomes a member of etcd.
		for _, n := range append(servers[1:], agents...) {
			if err := n.Start(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		for _, n := range append(servers[1:], agents...) {
			n.WaitReady(t, 4*time.Minute)
		}
		lines := strings.Split(strings.TrimSpace(servers[2].Kubectl(t, "get", "nodes", "--no-headers")), "\n")
		if len(lines) != 5 {
			t.Fatalf("kubectl get nodes lists %q", lines)
		}
		for i, line := range lines {
			roles := "control-plane,master"
			if i >= 3 {
				roles = "<none>"
			}
			if f := strings.Fields(line); f[0] != fmt.Sprintf("node-%d", i+1) || f[1] != "Ready" || f[2] != roles {
				t.Errorf("kubectl get nodes shows %q, want node-%d Ready %s", line, i+1, roles)
			}
		}
		// The token of servers is the same on all, and what a server is configured with is the cluster's.
		var tokens []string
		for _, n := range servers {
			text, err := os.ReadFile(n.Layout().ServerToken())
			if err != nil {
				t.Fatal(err)
			}
			tokens = append(tokens, string(text))
			if info, err := os.Stat(n.Layout().ServerToken()); err != nil || info.Mode().Perm() != 0o600 {
				t.Errorf("%v, %v", info, err)
			}
			report, err := n.Report(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			for _, part := range report.Components {
				if part.Name == "istio" {
					t.Errorf("%s installs Istio, which the cluster has disabled", n.Name)
				}
			}
		}
		if tokens[0] != tokens[1] || tokens[0] != tokens[2] {
			t.Error("the servers have different tokens")
		}
		out, _, code := servers[1].Polymesh(t, "token", "create", "--role", "server", "--ttl", "1h", "--data-dir", servers[1].DataDir())
		if code != 0 || len(strings.TrimSpace(out)) != len(strings.TrimSpace(tokens[0])) {
			t.Errorf("polymesh token create --role server: %d %q", code, out)
		}
	})
	if t.Failed() {
		return
	}

	t.Run("refused", func(t *testing.T) {
		spare := c.AddForTest(t, node.Options{})
		text, err := os.ReadFile(first.Layout().ServerToken())
		if err != nil {
			t.Fatal(err)
		}
		forAgents, err := os.ReadFile(first.Layout().NodeToken())
		if err != nil {
			t.Fatal(err)
		}
		mine := strings.TrimSpace(string(text))
		for want, args := range map[string][]string{
			"the token is one for agents":  {"--token", string(forAgents)},
			"does not accept token aaaaaa": {"--token", mine[:69] + "aaaaaa" + mine[75:]},
			"here --cluster-cidr=10.99.0.0/16, in the cluster --cluster-cidr=10.42.0.0/16": {"--token", mine, "--cluster-cidr", "10.99.0.0/16"},
			"has a node node-4 already":              {"--token", mine, "--node-name", "node-4"},
			"is in etcd on its servers":              {"--token", mine, "--datastore-endpoint", "postgres://u:p@127.0.0.1/d"},
			"--cluster-init begins one":              {"--token", mine, "--cluster-init"},
			"a token is missing: give --token-file":  {},
			"it is a secret alone, without the hash": {"--token-file", secret},
			"is not a server of the token's cluster": {"--token", "K10" + strings.Repeat("0", 64) + mine[67:]},
		} {
			dir := filepath.Join(t.TempDir(), "data")
			line := append([]string{"server", "--data-dir", dir, "--write-kubeconfig", filepath.Join(dir, "k"), "--server", "https://" + first.Address() + ":6443"}, args...)
			_, errOut, code := spare.Polymesh(t, line...)
			if code == 0 || !strings.Contains(errOut, want) {
				t.Errorf("polymesh %q ends with %d: %s, want %q", args, code, errOut, want)
			}
			if strings.Contains(errOut, mine[76:]) {
				t.Errorf("the secret is in the output: %s", errOut)
			}
			if _, err := os.Stat(filepath.Join(dir, "server", "tls", "server-ca.key")); err == nil {
				t.Errorf("polymesh %q leaves the cluster's keys on a machine that has not joined", args)
			}
		}
	})

	t.Run("the keys of Secrets", func(t *testing.T) { rotateKeys(t, servers) })
	if t.Failed() {
		return
	}

	book := &writeBook{acknowledged: map[string]bool{}}
	first.Kubectl(t, "create", "namespace", writesNamespace)
	first.Apply(t, fmt.Sprintf(serversPods, busyboxImage(t, first)))
	first.Kubectl(t, "rollout", "status", "deployment/echo", "--timeout=2m")
	first.Eventually(t, time.Minute, func() (bool, string) {
		got := first.Kubectl(t, "get", "service", "echo", "-o", "jsonpath={.status.loadBalancer.ingress[*].ip}")
		return strings.Contains(got, agents[0].Address()) && strings.Contains(got, agents[1].Address()), "the service has the addresses " + got
	})

	urls := []string{"http://" + agents[0].Address() + ":8000/", "http://" + agents[1].Address() + ":8000/"}
	answer(t, first, urls...)

	away := newLaptop(t, servers[1])
	t.Run("deploy from outside", func(t *testing.T) { away.deploy(t, first, servers[2]) })
	if t.Failed() {
		return
	}

	// lose runs what takes servers away and brings them back, with writes and requests meanwhile.
	lose := func(name string, do func(t *testing.T)) {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			var running sync.WaitGroup
			for i, n := range servers {
				client := n.Client(t)
				running.Go(func() { book.write(ctx, client, fmt.Sprintf("%s-%d", strings.ReplaceAll(name, " ", "-"), i)) })
			}
			answers := sendRequests(ctx, first, 20*time.Millisecond, urls...)
			do(t)
			for _, n := range servers {
				n.WaitReady(t, 3*time.Minute)
			}
			cancel()
			running.Wait()
			answers.none(t, 100)
			for _, n := range servers {
				book.check(t, n)
			}
			t.Log(book.summary())
		})
		if t.Failed() {
			t.FailNow()
		}
	}
	writes := func(t *testing.T, n *node.Node, count int) {
		t.Helper()
		n.Eventually(t, 2*time.Minute, func() (bool, string) {
			have := book.count()
			return have >= count, fmt.Sprintf("%d writes are acknowledged, want %d", have, count)
		})
	}

	lose("the leader of etcd is killed", func(t *testing.T) {
		writes(t, first, 50)
		leads := etcdLeader(t, first, servers, nil)
		other := otherThan(leads, servers)
		if err := leads.Kill(); err != nil {
			t.Fatal(err)
		}
		writes(t, other, book.count()+50)
		t.Logf("etcd was led by %s, and is led by %s", leads.Name, etcdLeader(t, other, servers, leads).Name)
		if err := leads.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
	})
	lose("a server without power", func(t *testing.T) {
		if err := c.PowerOff(servers[1]); err != nil {
			t.Fatal(err)
		}
		writes(t, first, book.count()+50)
		// The image was pushed to the server that is away, and node-5 has never had it.
		away.runs(t, first, "node-5")
		notReady(t, first, "node-2")
		if err := c.PowerOn(t.Context(), servers[1]); err != nil {
			t.Fatal(err)
		}
	})
	lose("a partition", func(t *testing.T) {
		others := []*node.Node{first, servers[1], agents[0], agents[1]}
		if err := c.Partition(servers[2], others...); err != nil {
			t.Fatal(err)
		}
		writes(t, first, book.count()+50)
		if err := c.Heal(servers[2], others...); err != nil {
			t.Fatal(err)
		}
	})
	slowDisk := func(t *testing.T) {
		leads := etcdLeader(t, first, servers, nil)
		before := count(t, leads, "slow fdatasync")
		if err := leads.SlowDisk(1); err != nil {
			t.Fatal(err)
		}
		writes(t, otherThan(leads, servers), book.count()+20) // each waits for its disk
		leads.Eventually(t, time.Minute, func() (bool, string) {
			return count(t, leads, "slow fdatasync") > before, "etcd does not notice that its disk is slow"
		})
		t.Logf("etcd was led by %s, with the slow disk, and is led by %s", leads.Name, etcdLeader(t, otherThan(leads, servers), servers, nil).Name)
		if err := leads.SlowDisk(0); err != nil {
			t.Fatal(err)
		}
	}
	if !testing.Short() { // a leader that is killed is replaced in the same way
		lose("a slow disk under the leader of etcd", slowDisk)
	}
	lose("no majority", func(t *testing.T) {
		for _, n := range servers[1:] {
			if err := n.Kill(); err != nil {
				t.Fatal(err)
			}
		}
		first.Eventually(t, time.Minute, func() (bool, string) {
			out, code := first.Status(t)
			return code != 0 && strings.Contains(out, "a majority of its 3 members must run"), fmt.Sprintf("polymesh status ends with %d:\n%s", code, out)
		})
		for _, n := range servers[1:] {
			if err := n.Start(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
	})
	lose("all servers without power", func(t *testing.T) {
		for _, n := range servers {
			if err := c.PowerOff(n); err != nil {
				t.Fatal(err)
			}
		}
		for _, n := range servers {
			if err := c.PowerOn(t.Context(), n); err != nil {
				t.Fatal(err)
			}
		}
	})
}

// rotateKeys changes the key of Secrets on three servers, the last of which ends meanwhile and comes back, except with -short. Each reads
// every Secret afterwards.
func rotateKeys(t *testing.T, servers []*node.Node) {
	first, second, last := servers[0], servers[1], servers[2]
	encrypt := func(n *node.Node, args ...string) (string, int) {
		out, errOut, code := n.Polymesh(t, append([]string{"secrets-encrypt", args[0], "--data-dir", n.DataDir()}, args[1:]...)...)
		return out + errOut, code
	}
	report := func(n *node.Node) (s encryption.Status) {
		t.Helper()
		out, code := encrypt(n, "status", "--output", "json")
		if code != 0 {
			t.Fatalf("secrets-encrypt status on %s ends with %d: %s", n.Name, code, out)
		}
		if err := json.Unmarshal([]byte(out), &s); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		return s
	}
	sealed := map[string]string{}
	create := func(n *node.Node, name string) {
		t.Helper()
		sealed[name] = "of " + n.Name
		s := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: name}, StringData: map[string]string{"password": sealed[name]}}
		n.Eventually(t, time.Minute, func() (bool, string) { // etcd may elect a leader
			_, err := n.Client(t).CoreV1().Secrets("default").Create(t.Context(), s, metav1.CreateOptions{})
			return err == nil || apierrors.IsAlreadyExists(err), fmt.Sprintf("create Secret %s on %s: %v", name, n.Name, err)
		})
	}
	create(second, "before-encryption")
	if out, code := encrypt(second, "enable"); code != 0 {
		t.Fatalf("secrets-encrypt enable ends with %d: %s", code, out)
	}
	create(last, "encrypted")
	before := report(first)
	if !before.Enabled || before.Plain != 0 || len(before.Keys) != 1 || len(before.Servers) != 3 {
		t.Fatalf("the Secrets are not encrypted on all servers: %+v", before)
	}

	var said bytes.Buffer
	rotation := first.PolymeshCommand(t.Context(), "secrets-encrypt", "rotate-keys", "--data-dir", first.DataDir())
	rotation.Stdout, rotation.Stderr = &said, &said
	if err := rotation.Start(); err != nil {
		t.Fatal(err)
	}
	second.Eventually(t, time.Minute, func() (bool, string) {
		s := report(second)
		return len(s.Keys) > 1 || s.Keys[0].Name != before.Keys[0].Name, fmt.Sprintf("the rotation does not begin: %+v", s)
	})
	if !testing.Short() {
		if err := last.Kill(); err != nil {
			t.Fatal(err)
		}
	}
	create(second, "during-the-rotation")
	if !testing.Short() {
		if err := last.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if err := rotation.Wait(); err != nil {
		t.Fatalf("secrets-encrypt rotate-keys: %v: %s", err, said.String())
	}
	last.WaitReady(t, 3*time.Minute)
	var after encryption.Status
	first.Eventually(t, time.Minute, func() (bool, string) {
		after = report(first)
		current := len(after.Servers) == 3
		for _, s := range after.Servers {
			current = current && s.State == encryption.Current
		}
		return current, fmt.Sprintf("the servers have different keys: %+v", after)
	})
	if after.Unfinished || after.Plain != 0 || len(after.Keys) != 1 || after.Keys[0].Name == before.Keys[0].Name {
		t.Errorf("after the rotation: %+v", after)
	}
	reads := func() {
		t.Helper()
		for _, n := range servers {
			for name, want := range sealed {
				s, err := n.Client(t).CoreV1().Secrets("default").Get(t.Context(), name, metav1.GetOptions{})
				if err != nil || string(s.Data["password"]) != want {
					t.Errorf("%s reads Secret %s: %v, %v, want %q", n.Name, name, s.Data, err, want)
				}
			}
		}
	}
	reads()
	if testing.Short() { // TestSeveralServers in pkg/controlplane/encryption has servers that are away
		return
	}

	// Nothing changes while a server is away.
	if err := last.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	if out, code := encrypt(first, "rotate-keys"); code == 0 || !strings.Contains(out, "node-3 is away: start it") {
		t.Errorf("secrets-encrypt rotate-keys without node-3 ends with %d: %s", code, out)
	}
	if s := report(first); s.Unfinished || s.Hash != after.Hash {
		t.Errorf("after a rotation that was refused: %+v", s)
	}
	if err := last.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	last.WaitReady(t, 3*time.Minute)
	reads()
}

// etcdMembers returns the members of etcd that `polymesh etcd members` lists on a server that runs.
func etcdMembers(t *testing.T, n *node.Node) (members []status.Member, err error) {
	t.Helper()
	out, errOut, code := n.Polymesh(t, "etcd", "members", "--output", "json")
	if err := json.Unmarshal([]byte(out), &members); err != nil || code != 0 {
		return nil, fmt.Errorf("polymesh etcd members ends with %d (%v): %s%s", code, err, out, errOut)
	}
	return members, nil
}

// etcdLeader returns which of the servers, node-1 and so on, leads etcd, as a server that runs knows it. It waits until one leads that is
// not the former one.
func etcdLeader(t *testing.T, asked *node.Node, servers []*node.Node, former *node.Node) (leads *node.Node) {
	t.Helper()
	asked.Eventually(t, time.Minute, func() (bool, string) {
		members, err := etcdMembers(t, asked)
		for _, m := range members {
			for i, n := range servers {
				if m.Leader && n != former && m.Node == fmt.Sprintf("node-%d", i+1) {
					leads = n
				}
			}
		}
		return leads != nil, fmt.Sprintf("no server leads etcd: %+v, %v", members, err)
	})
	return leads
}

// otherThan returns another one of the nodes.
func otherThan(n *node.Node, nodes []*node.Node) *node.Node {
	for _, other := range nodes {
		if other != n {
			return other
		}
	}
	return nil
}

// notReady waits until the cluster has noticed that a node is away.
func notReady(t *testing.T, n *node.Node, name string) {
	t.Helper()
	n.Eventually(t, 2*time.Minute, func() (bool, string) {
		out, err := n.KubectlErr("get", "node", name, "-o", `jsonpath={.status.conditions[?(@.type=="Ready")].status}`)
		return err == nil && out == "Unknown", fmt.Sprintf("%s is Ready %s (%v)", name, out, err)
	})
}

// count returns how often the node's log contains a text.
func count(t *testing.T, n *node.Node, text string) int {
	t.Helper()
	log, err := os.ReadFile(n.Log())
	if err != nil {
		t.Fatal(err)
	}
	return strings.Count(string(log), text)
}

const writesNamespace = "e2e-writes"

// writeBook is what the API servers have acknowledged.
type writeBook struct {
	mu           sync.Mutex
	acknowledged map[string]bool
	unanswered   int
}

// write creates objects through one server until ctx ends. A write without an answer may have been done or not.
func (l *writeBook) write(ctx context.Context, client kubernetes.Interface, writer string) {
	maps := client.CoreV1().ConfigMaps(writesNamespace)
	for i := 0; ctx.Err() == nil; i++ {
		name := fmt.Sprintf("%s-%d", writer, i)
		attempt, cancel := context.WithTimeout(ctx, 10*time.Second)
		_, err := maps.Create(attempt, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{})
		cancel()
		l.mu.Lock()
		if err == nil {
			l.acknowledged[name] = true
		} else {
			l.unanswered++
		}
		l.mu.Unlock()
		// The pace of a writer: these are not tests of load.
		select {
		case <-ctx.Done():
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func (l *writeBook) count() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.acknowledged)
}

func (l *writeBook) summary() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return fmt.Sprintf("%d writes acknowledged, %d without an answer", len(l.acknowledged), l.unanswered)
}

// check reads every acknowledged write back from a server.
func (l *writeBook) check(t *testing.T, n *node.Node) {
	t.Helper()
	list, err := n.Client(t).CoreV1().ConfigMaps(writesNamespace).List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	have := map[string]bool{}
	for _, m := range list.Items {
		have[m.Name] = true
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	lost := 0
	for name := range l.acknowledged {
		if !have[name] {
			lost++
		}
	}
	if lost > 0 {
		t.Errorf("%d of %d acknowledged writes are lost on %s", lost, len(l.acknowledged), n.Name)
	}
}

// answer waits until each URL answers a client outside.
func answer(t *testing.T, n *node.Node, urls ...string) {
	t.Helper()
	for _, url := range urls {
		n.Eventually(t, 2*time.Minute, func() (bool, string) {
			resp, err := n.HTTP(false).Get(url)
			if err != nil {
				return false, err.Error()
			}
			resp.Body.Close()
			return resp.StatusCode == http.StatusOK, url + " answers " + resp.Status
		})
	}
}

// stream is requests that were sent from outside, until its context ended.
type stream struct {
	running  sync.WaitGroup
	mu       sync.Mutex
	answered int
	lost     []string
}

// sendRequests sends requests to each URL, one after the other, on kept and on new connections.
func sendRequests(ctx context.Context, n *node.Node, pace time.Duration, urls ...string) *stream {
	s := &stream{}
	for _, url := range urls {
		for _, keep := range []bool{true, false} {
			client := n.HTTP(keep)
			client.Timeout = 10 * time.Second
			s.running.Go(func() {
				for ctx.Err() == nil {
					resp, err := client.Get(url)
					if err == nil {
						_, err = io.Copy(io.Discard, resp.Body)
						resp.Body.Close()
						if err == nil && resp.StatusCode != http.StatusOK {
							err = errors.New(resp.Status)
						}
					}
					s.note(url, err)
					select {
					case <-ctx.Done():
					case <-time.After(pace):
					}
				}
			})
		}
	}
	return s
}

func (s *stream) note(url string, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err == nil {
		s.answered++
	} else {
		s.lost = append(s.lost, fmt.Sprintf("%s %s: %v", time.Now().Format(time.TimeOnly), url, err))
	}
}

// none waits for the end, and checks that none was lost of at least this many.
func (s *stream) none(t *testing.T, least int) {
	t.Helper()
	s.running.Wait()
	if len(s.lost) > 0 || s.answered < least {
		t.Errorf("%d requests were answered, want %d, and %d were lost: %.1000q", s.answered, least, len(s.lost), s.lost)
		return
	}
	t.Logf("%d requests were answered, none lost", s.answered)
}

const serversPods = `
apiVersion: apps/v1
kind: Deployment
metadata: {name: echo}
spec:
  replicas: 2
  selector: {matchLabels: {app: echo}}
  template:
    metadata: {labels: {app: echo}}
    spec:
      affinity:
        nodeAffinity: {requiredDuringSchedulingIgnoredDuringExecution: {nodeSelectorTerms: [{matchExpressions: [{key: node-role.kubernetes.io/control-plane, operator: DoesNotExist}]}]}}
        podAntiAffinity: {requiredDuringSchedulingIgnoredDuringExecution: [{topologyKey: kubernetes.io/hostname, labelSelector: {matchLabels: {app: echo}}}]}
      containers:
      - name: echo
        image: %s
        command: [sh, -c, "mkdir -p /tmp/w && echo ok >/tmp/w/index.html && exec httpd -f -p 8080 -h /tmp/w"]
        readinessProbe: {httpGet: {path: /, port: 8080}}
---
apiVersion: v1
kind: Service
metadata: {name: echo}
spec:
  type: LoadBalancer
  selector: {app: echo}
  ports: [{port: 8000, targetPort: 8080}]
`
