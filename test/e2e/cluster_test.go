//go:build e2e

package e2e

import (
	"bufio"
	"crypto/tls"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"polymesh.dev/polymesh/test/e2e/node"
)

// Two servers on one network, each a cluster for itself: what several nodes of one cluster will be tested with. The network
// itself is tested in package node.
func TestClusterOfMachines(t *testing.T) {
	ownNodes(t, 2)
	c := node.ClusterForTest(t)
	var servers []*node.Node
	for _, site := range []string{"a", "b"} {
		n := c.AddForTest(t, node.Options{
			Args: []string{"--disable", "istio,metrics-server,local-storage", "--node-label", "site=" + site},
			Env:  []string{"POLYMESH_NODE_TAINT=from=" + site + ":PreferNoSchedule"},
		})
		if err := n.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		servers = append(servers, n)
	}
	a, b := servers[0], servers[1]
	for i, site := range []string{"a", "b"} {
		n := servers[i]
		n.WaitReady(t, 3*time.Minute)
		report, err := n.Report(t.Context())
		if want := fmt.Sprintf("node-%d", i+1); err != nil || report.Node != want || report.NodeIP != n.Address() {
			t.Errorf("polymesh status says that the server of site %s is %+v (%v), want %s at %s", site, report, err, want, n.Address())
		}
		line := n.Kubectl(t, "get", "nodes", "--no-headers", "-o", "custom-columns=NAME:.metadata.name,SITE:.metadata.labels.site,FROM:.spec.taints[*].value")
		if got, want := strings.Fields(line), []string{report.Node, site, site}; !slices.Equal(got, want) {
			t.Errorf("the cluster of site %s has the nodes %q, want %q", site, got, want)
		}
	}

	inside, err := a.Dial(t.Context(), "tcp", b.Address()+":6443")
	if err != nil {
		t.Fatal(err)
	}
	outside, err := a.DialOutside(t.Context(), "tcp", b.Address()+":6443")
	if err != nil {
		t.Fatal(err)
	}
	fromA, fromOutside := newAPIConnection(t, inside, b.Address()), newAPIConnection(t, outside, b.Address())
	fromA.ask(t)
	fromA.answer(t)

	if err := c.Partition(a, b); err != nil {
		t.Fatal(err)
	}
	fromA.ask(t)
	fromA.isSilent(t)
	fromOutside.ask(t)
	fromOutside.answer(t)
	if err := c.Heal(a, b); err != nil {
		t.Fatal(err)
	}
	fromA.answer(t)

	const wait = 20 * time.Millisecond
	if err := c.Delay(b, wait); err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	fromA.ask(t)
	fromA.answer(t)
	if took := time.Since(begin); took < 2*wait {
		t.Errorf("an answer took %s, with a delay of %s each way", took, wait)
	}

	b.Apply(t, `{"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "kept", "namespace": "default"}, "data": {"key": "value"}}`)
	if len(processesOf(t, b)) < 3 {
		t.Errorf("only these processes are the node's: %q", processesOf(t, b))
	}
	if err := c.PowerOff(b); err != nil {
		t.Fatal(err)
	}
	if found := processesOf(t, b); len(found) > 0 {
		t.Errorf("without power there run %q", found)
	}
	fromA.ask(t)
	fromA.isSilent(t)
	if report, err := a.Report(t.Context()); err != nil || !report.Ready {
		t.Errorf("the other server is not ready: %+v, %v", report, err)
	}
	if err := c.PowerOn(t.Context(), b); err != nil {
		t.Fatal(err)
	}
	b.WaitReady(t, 3*time.Minute)
	if err := fromA.wait(t); err == nil || !strings.Contains(err.Error(), "connection reset by peer") {
		t.Errorf("a connection from before the power went ends with %v, want a reset", err)
	}
	if value := b.Kubectl(t, "get", "configmap", "kept", "-o", "jsonpath={.data.key}"); value != "value" {
		t.Errorf("the ConfigMap holds %q", value)
	}
	client := b.Client(t)
	b.Eventually(t, 2*time.Minute, func() (bool, string) {
		n, err := client.CoreV1().Nodes().Get(t.Context(), "node-2", metav1.GetOptions{})
		if err != nil {
			return false, err.Error()
		}
		for _, condition := range n.Status.Conditions {
			if condition.Type == corev1.NodeReady && condition.Status != corev1.ConditionTrue {
				return false, condition.Message
			}
		}
		pods, err := client.CoreV1().Pods("kube-system").List(t.Context(), metav1.ListOptions{LabelSelector: "k8s-app=kube-dns"})
		if err != nil || len(pods.Items) != 1 {
			return false, fmt.Sprintf("CoreDNS has %d pods, %v", len(pods.Items), err)
		}
		why := node.NotReady(&pods.Items[0])
		return why == "", why
	})
}

// apiConnection is a connection to an API server, without a certificate: every answer is 401.
type apiConnection struct {
	*tls.Conn
	answers *bufio.Reader
	host    string
	heard   chan error // of the answer that is awaited
}

func newAPIConnection(t *testing.T, connection net.Conn, host string) *apiConnection {
	t.Helper()
	secure := tls.Client(connection, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"http/1.1"}})
	t.Cleanup(func() { connection.Close() })
	if err := secure.HandshakeContext(t.Context()); err != nil {
		t.Fatal(err)
	}
	return &apiConnection{Conn: secure, answers: bufio.NewReader(secure), host: host}
}

// ask sends a request and begins to wait for the answer.
func (c *apiConnection) ask(t *testing.T) {
	t.Helper()
	if _, err := fmt.Fprintf(c, "GET /readyz HTTP/1.1\r\nHost: %s\r\n\r\n", c.host); err != nil {
		t.Fatal(err)
	}
	c.heard = make(chan error, 1)
	go func() {
		response, err := http.ReadResponse(c.answers, nil)
		if err == nil {
			response.Body.Close()
		}
		if err == nil && response.StatusCode != http.StatusUnauthorized {
			err = fmt.Errorf("the API server says %s", response.Status)
		}
		c.heard <- err
	}()
}

// answer waits for the answer.
func (c *apiConnection) answer(t *testing.T) {
	t.Helper()
	if err := c.wait(t); err != nil {
		t.Fatal(err)
	}
}

// wait waits for the answer, or for how the connection ends.
func (c *apiConnection) wait(t *testing.T) error {
	t.Helper()
	select {
	case err := <-c.heard:
		return err
	case <-time.After(2 * time.Minute):
		t.Fatalf("no answer from %s", c.host)
		return nil
	}
}

// isSilent waits until the request was sent again in vain, and finds that the connection has not ended.
func (c *apiConnection) isSilent(t *testing.T) {
	t.Helper()
	before := -1
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(100 * time.Millisecond) {
		again, err := node.Retransmissions(c.NetConn())
		if err != nil {
			t.Fatal(err)
		}
		if before < 0 {
			before = again
		}
		select {
		case err := <-c.heard:
			t.Fatalf("the connection to %s has ended or answered (%v), want silence", c.host, err)
		default:
		}
		if again >= before+2 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("the request to %s was sent again %d times only", c.host, again-before)
		}
	}
}

// processesOf lists the programs that run from a node's folder, or name it in their command lines.
func processesOf(t *testing.T, n *node.Node) (found []string) {
	t.Helper()
	for _, pid := range pids(t) {
		dir := filepath.Join("/proc", strconv.Itoa(pid))
		program, _ := os.Readlink(filepath.Join(dir, "exe"))
		line, _ := os.ReadFile(filepath.Join(dir, "cmdline"))
		if strings.HasPrefix(program, n.Dir+"/") || strings.Contains(string(line), n.Dir+"/") {
			found = append(found, strings.ReplaceAll(string(line), "\x00", " "))
		}
	}
	return found
}
