//go:build e2e

package e2e

import (
	"fmt"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"polymesh.dev/polymesh/test/e2e/node"
)

// One server has the store. Another server and an agent send to it: by either API server, and after the store was away as well, each line once.
func TestObserveNodes(t *testing.T) {
	ownNodes(t, 3)
	c := node.ClusterForTest(t)
	first := c.AddForTest(t, node.Options{Observe: true, Args: []string{"--cluster-init", "--disable", "istio,metrics-server,local-storage,coredns", "--observe-cluster-access", "off"}})
	if err := first.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	first.WaitReady(t, 3*time.Minute)
	second := c.AddForTest(t, node.Options{Joins: first, Serves: true})
	agent := c.AddForTest(t, node.Options{Joins: first})
	senders := []*node.Node{second, agent}
	for _, n := range senders {
		if err := n.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	for _, n := range senders {
		n.WaitReady(t, 4*time.Minute)
	}
	s := &store{first}
	s.waitReady(t)
	image := busyboxImage(t, first)
	pods := []string{"node-2", "node-3"}
	for _, name := range pods {
		first.Apply(t, fmt.Sprintf(beating, name, name, image))
	}

	// A line is found as one of its node, and so are the numbers of each machine, of its containers and of its pods.
	for _, name := range pods {
		first.Eventually(t, 2*time.Minute, func() (bool, string) {
			return len(s.beats(t, name)) > 0, "no line of the pod on " + name + " is in the store"
		})
	}
	for expression, want := range map[string]float64{
		`count(node_memory_MemTotal_bytes)`: 3, `count(up{job="kubelet"} == 1)`: 3,
		`count(count by (node) (container_memory_working_set_bytes{namespace="default"}))`: 2, `count(kube_pod_status_ready{namespace="default",condition="true"} == 1)`: 2,
		// cAdvisor knows pods only if it asks the node's containerd.
		`count(count by (node) (container_network_receive_bytes_total{namespace="default"}))`: 2, `count(container_memory_rss{namespace="default",container!=""})`: 2,
	} {
		first.Eventually(t, 2*time.Minute, func() (bool, string) {
			got := s.count(t, expression)
			return got == want, fmt.Sprintf("%s is %g, want %g", expression, got, want)
		})
	}
	for _, n := range senders {
		n.Eventually(t, time.Minute, func() (bool, string) {
			message := observed(t, n)
			return strings.HasPrefix(message, "to the store on node-1: last sent "), "observe: " + message
		})
	}

	// The agent does not reach the server with the store: the other one passes on what it sends.
	if err := c.Partition(agent, first); err != nil {
		t.Fatal(err)
	}
	cut := time.Now()
	first.Eventually(t, 2*time.Minute, func() (bool, string) {
		beats := s.beats(t, "node-3")
		return len(beats) > 0 && beats[len(beats)-1].at.After(cut.Add(5*time.Second)), "without a way to the first server, nothing of the agent comes"
	})
	if err := c.Heal(agent, first); err != nil {
		t.Fatal(err)
	}

	// Without power, the store misses what the others keep for it, until it is back.
	if err := c.PowerOff(first); err != nil {
		t.Fatal(err)
	}
	off := time.Now()
	for _, n := range senders {
		n.Eventually(t, 2*time.Minute, func() (bool, string) {
			message := observed(t, n)
			return time.Since(off) > 15*time.Second && strings.HasSuffix(message, " wait") && !strings.Contains(message, ", 0 KiB"), "observe: " + message
		})
	}
	if err := c.PowerOn(t.Context(), first); err != nil {
		t.Fatal(err)
	}
	on := time.Now()
	first.WaitReady(t, 4*time.Minute)
	s.waitReady(t)
	for _, name := range pods {
		first.Eventually(t, 3*time.Minute, func() (bool, string) {
			beats := s.beats(t, name)
			newest := beat{}
			if len(beats) > 0 {
				newest = beats[len(beats)-1]
			}
			return newest.at.After(on), fmt.Sprintf("the last line of the pod on %s is beat %d of %s; the store is back since %s", name, newest.number, newest.at, on)
		})
		// From the first to the last one, each once.
		want := 1
		for _, b := range s.beats(t, name) {
			if b.number != want {
				t.Errorf("the pod on %s: after beat %d comes beat %d", name, want-1, b.number)
				break
			}
			want++
		}
	}
	for _, n := range append(senders, first) {
		n.WaitReady(t, 2*time.Minute)
		if out, code := n.Status(t); code != 0 {
			t.Errorf("polymesh status of %s ends with %d:\n%s", n.Name, code, out)
		}
	}
}

// observed is what a node's status says of what it sends.
func observed(t *testing.T, n *node.Node) string {
	t.Helper()
	report, err := n.Report(t.Context())
	if err != nil {
		return err.Error()
	}
	for _, c := range report.Components {
		if c.Name == "observe" {
			return c.Message
		}
	}
	return "the status has no observe"
}

// beat is a line of the pod "beating".
type beat struct {
	number int
	at     time.Time
}

// beats are those of the pod on a node in the store, in the order of their numbers, which is that of their times.
func (s *store) beats(t *testing.T, node string) []beat {
	t.Helper()
	var answer struct {
		Data struct {
			Result []struct {
				Values [][2]string `json:"values"`
			} `json:"result"`
		} `json:"data"`
	}
	query := url.Values{
		"query": {fmt.Sprintf(`{job="pods",namespace="default",pod=%q,node=%q} |= "beat "`, node, node)},
		"start": {strconv.FormatInt(time.Now().Add(-time.Hour).UnixNano(), 10)}, "limit": {"5000"},
	}
	if err := s.get("/loki/api/v1/query_range", query, &answer); err != nil {
		t.Log(err)
		return nil
	}
	var all []beat
	for _, stream := range answer.Data.Result {
		for _, v := range stream.Values {
			nanoseconds, err := strconv.ParseInt(v[0], 10, 64)
			number, err2 := strconv.Atoi(strings.TrimPrefix(v[1], "beat "))
			if err != nil || err2 != nil {
				t.Fatalf("the store has the line %q", v)
			}
			all = append(all, beat{number, time.Unix(0, nanoseconds)})
		}
	}
	slices.SortFunc(all, func(a, b beat) int { return a.number - b.number })
	return all
}

// beating is a pod, called as its node, that writes a number each second.
const beating = `apiVersion: v1
kind: Pod
metadata: {name: %s, namespace: default}
spec:
  nodeName: %s
  terminationGracePeriodSeconds: 0
  containers:
  - name: beating
    image: %s
    command: [sh, -c, "i=0; while true; do i=$((i+1)); echo beat $i; sleep 1; done"]
`
