package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"polymesh.dev/polymesh/test/e2e/node"
)

const (
	networkNamespace = "bench-network"
	// keptRate and newRate are requests per second, on connections that are kept and each on a new one.
	keptRate, newRate = 1000, 200
	// networkRounds is how often each way is measured in a run: other work on the machine shows in a few of them.
	networkRounds = 3
	// role is the label by which policies select pods.
	role = "bench-role"
)

// policyCounts are the numbers of NetworkPolicies that apply to the server's pod. Only the last one lets the client in, which is the
// longest way through the rules.
var policyCounts = []int{10, 100, 1000}

// spot is a place in a network: a machine or a pod.
type spot struct {
	command func(ctx context.Context, program string, args ...string) *exec.Cmd
	address string
}

// wire is a way from a client to a server. Its name is a part of the figures' ids.
type wire struct{ name, what string }

var (
	plainWire = wire{"plain", "two machines, without Kubernetes"}
	nearWire  = wire{"near", "two pods of one node"}
	farWire   = wire{"far", "two pods on two nodes"}
)

func policyWire(count int) wire {
	return wire{fmt.Sprintf("far, %d policies", count), fmt.Sprintf("two pods on two nodes, %s NetworkPolicies", thousands(count))}
}

func wires() []wire {
	all := []wire{plainWire, nearWire, farWire}
	for _, count := range policyCounts {
		all = append(all, policyWire(count))
	}
	return all
}

func (w wire) figure(what string) figureID { return figureID("network, " + w.name + ": " + what) }

// network measures pods on two nodes: the programs run in the network namespaces of machines and pods, and nothing else changes.
func (b *bench) network(ctx context.Context) (err error) {
	c, err := node.NewCluster()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer closeCluster(ctx, c, &err)
	defer cancel()
	server, err := c.Add(node.Options{Args: []string{"--disable", "istio,metrics-server,local-storage,servicelb"}})
	if err != nil {
		return err
	}
	if err := startReady(ctx, server); err != nil {
		return err
	}
	agent, err := c.Add(node.Options{Joins: server})
	if err != nil {
		return err
	}
	if err := startReady(ctx, agent); err != nil {
		return err
	}
	var plain [2]spot
	for i := range plain {
		machine, err := c.Add(node.Options{})
		if err != nil {
			return err
		}
		plain[i] = spot{machine.Command, machine.Address()}
	}
	client, err := server.NewClient()
	if err != nil {
		return err
	}
	pods, err := b.startPods(ctx, client, server, agent)
	if err != nil {
		return err
	}
	tools := filepath.Join(b.top, ".build", "bench")
	for _, s := range []spot{plain[1], pods["near"], pods["server"]} {
		for _, cmd := range []*exec.Cmd{s.command(ctx, "iperf3", "--server"), s.command(ctx, filepath.Join(tools, "echo"), "serve")} {
			if err := cmd.Start(); err != nil {
				return err
			}
			go func() { _ = cmd.Wait() }() // until ctx ends; without it, what it serves fails
		}
	}
	ways := []struct {
		wire
		from, to spot
	}{{plainWire, plain[0], plain[1]}, {nearWire, pods["client"], pods["near"]}, {farWire, pods["client"], pods["server"]}}
	for range networkRounds {
		for _, w := range ways {
			if err := b.measureWire(ctx, server, w.wire, w.from, w.to); err != nil {
				return fmt.Errorf("%s: %w", w.what, err)
			}
		}
	}
	made := 0
	for _, count := range policyCounts {
		w := policyWire(count)
		begin := time.Now()
		if err := createPolicies(ctx, server, made, count); err != nil {
			return err
		}
		made = count
		err := eventually(ctx, server, startLimit, func() error {
			return policiesEnforced(ctx, server, count)
		})
		if err != nil {
			return err
		}
		b.results.add(w.figure("in force"), time.Since(begin).Seconds())
		// The measurement is of something only if the policies are in force.
		if err := reach(ctx, pods["near"], pods["server"]); err == nil {
			return fmt.Errorf("with %d policies, a pod that none of them allows reaches the server", count)
		}
		for range networkRounds {
			if err := b.measureWire(ctx, server, w, pods["client"], pods["server"]); err != nil {
				return fmt.Errorf("%s: %w", w.what, err)
			}
		}
	}
	return nil
}

// startPods starts a client and a server next to it on the agent, and a server on the other node.
func (b *bench) startPods(ctx context.Context, client kubernetes.Interface, server, agent *node.Node) (map[string]spot, error) {
	image, err := shippedImage(ctx, server, "busybox")
	if err != nil {
		return nil, err
	}
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: networkNamespace}}
	if _, err := client.CoreV1().Namespaces().Create(ctx, ns, metav1.CreateOptions{}); err != nil {
		return nil, err
	}
	places := map[string]*node.Node{"client": agent, "near": agent, "server": server}
	pods := map[string]spot{}
	for name, place := range places {
		report, err := place.Report(ctx)
		if err != nil {
			return nil, err
		}
		pod := &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{role: name}},
			Spec: corev1.PodSpec{
				NodeName:   report.Node,
				Containers: []corev1.Container{{Name: "network", Image: image, Command: []string{"sleep", "100000"}}},
			},
		}
		err = eventually(ctx, server, startLimit, func() error { // its service account comes a moment after the namespace
			_, err := client.CoreV1().Pods(networkNamespace).Create(ctx, pod, metav1.CreateOptions{})
			return err
		})
		if err != nil {
			return nil, err
		}
		err = eventually(ctx, server, startLimit, func() error {
			found, err := client.CoreV1().Pods(networkNamespace).Get(ctx, name, metav1.GetOptions{})
			if err != nil {
				return err
			}
			if found.Status.Phase != corev1.PodRunning || found.Status.PodIP == "" {
				return fmt.Errorf("pod %s is %s", name, found.Status.Phase)
			}
			processes, err := processesOf(ctx, place)
			if err != nil {
				return err
			}
			for _, p := range processes {
				if p.Name == name+": sleep" {
					pods[name] = spot{inside(p.PID), found.Status.PodIP}
					return nil
				}
			}
			return fmt.Errorf("pod %s has no process", name)
		})
		if err != nil {
			return nil, err
		}
	}
	return pods, nil
}

// inside returns commands in the network namespace of a process.
func inside(pid int) func(context.Context, string, ...string) *exec.Cmd {
	return func(ctx context.Context, program string, args ...string) *exec.Cmd {
		return exec.CommandContext(ctx, "nsenter", append([]string{fmt.Sprintf("--net=/proc/%d/ns/net", pid), "--", program}, args...)...)
	}
}

// shippedImage returns the name of an image that the program brings.
func shippedImage(ctx context.Context, n *node.Node, name string) (string, error) {
	out, err := n.PolymeshCommand(ctx, "version", "-o", "json").Output()
	if err != nil {
		return "", err
	}
	var versions struct{ Images []string }
	if err := json.Unmarshal(out, &versions); err != nil {
		return "", err
	}
	for _, image := range versions.Images {
		if strings.Contains(image, "/"+name+":") {
			return image, nil
		}
	}
	return "", fmt.Errorf("polymesh version lists no image %s", name)
}

// measureWire measures the throughput of one connection, and the times of requests of 1 KB.
func (b *bench) measureWire(ctx context.Context, n *node.Node, w wire, from, to spot) error {
	if err := eventually(ctx, n, startLimit, func() error { return reach(ctx, from, to) }); err != nil {
		return err
	}
	cmd := from.command(ctx, "iperf3", "--client", to.address, "--json", "--time", fmt.Sprint(int(b.load.Seconds())))
	out, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("iperf3: %w: %s", err, out)
	}
	var measured struct {
		End struct {
			Received struct {
				Rate float64 `json:"bits_per_second"`
			} `json:"sum_received"`
		} `json:"end"`
	}
	if err := json.Unmarshal(out, &measured); err != nil || measured.End.Received.Rate == 0 {
		return fmt.Errorf("iperf3 reports %s (%w)", out, err)
	}
	b.results.add(w.figure("throughput"), measured.End.Received.Rate/1e9)
	for _, kind := range []struct {
		name string
		args []string
	}{
		{"kept", []string{fmt.Sprintf("-rate=%d", keptRate), "-connections=" + connections, "-max-connections=" + connections}},
		{"new", []string{fmt.Sprintf("-rate=%d", newRate), "-keepalive=false"}},
	} {
		found, err := b.vegeta(ctx, from, to, kind.args...)
		if err != nil {
			return fmt.Errorf("%s connections: %w", kind.name, err)
		}
		b.results.add(w.figure(kind.name+" p50"), found.Latencies.P50/1e6)
		b.results.add(w.figure(kind.name+" p99"), found.Latencies.P99/1e6)
	}
	return nil
}

// vegeta sends requests of 1 KB from one spot to another.
func (b *bench) vegeta(ctx context.Context, from, to spot, args ...string) (*attackReport, error) {
	tools := filepath.Join(b.top, ".build", "bench")
	attack := from.command(ctx, filepath.Join(tools, "vegeta"), append([]string{"attack", "-duration=" + b.load.String(), "-max-body=0"}, args...)...)
	attack.Stdin = strings.NewReader("POST http://" + to.address + ":8080/\n@" + filepath.Join(tools, "body") + "\n")
	var results, failure bytes.Buffer
	attack.Stdout, attack.Stderr = &results, &failure
	if err := attack.Run(); err != nil {
		return nil, fmt.Errorf("vegeta: %w: %s", err, failure.String())
	}
	report := exec.CommandContext(ctx, filepath.Join(tools, "vegeta"), "report", "-type=json")
	report.Stdin = &results
	out, err := report.Output()
	if err != nil {
		return nil, fmt.Errorf("vegeta report: %w", err)
	}
	return readAttack(out)
}

// reach sends one request, which must be answered soon.
func reach(ctx context.Context, from, to spot) error {
	out, err := from.command(ctx, "curl", "-sS", "--max-time", "3", "-o", os.DevNull, "http://"+to.address+":8080/").CombinedOutput()
	if err != nil {
		return fmt.Errorf("curl: %w: %s", err, out)
	}
	return nil
}

// createPolicies creates policies that apply to the server's pod: with the numbers from first up to, but not including, end. Number 0
// allows the client, and has the last name: rules are in the order of names.
func createPolicies(ctx context.Context, n *node.Node, first, end int) error {
	allow := func(name, who string) *networkingv1.NetworkPolicy {
		return &networkingv1.NetworkPolicy{
			ObjectMeta: metav1.ObjectMeta{Name: name},
			Spec: networkingv1.NetworkPolicySpec{
				PodSelector: metav1.LabelSelector{MatchLabels: map[string]string{role: "server"}},
				Ingress: []networkingv1.NetworkPolicyIngressRule{{From: []networkingv1.NetworkPolicyPeer{{
					PodSelector: &metav1.LabelSelector{MatchLabels: map[string]string{role: who}}}}}},
			},
		}
	}
	return createEach(ctx, n, first, end, func(ctx context.Context, client kubernetes.Interface, i int) error {
		policy := allow("z-client", "client")
		if i > 0 {
			policy = allow(fmt.Sprintf("other-%04d", i), fmt.Sprintf("other-%d", i))
		}
		_, err := client.NetworkingV1().NetworkPolicies(networkNamespace).Create(ctx, policy, metav1.CreateOptions{})
		return err
	})
}

// policiesEnforced returns an error unless the node reports that so many policies are in force.
func policiesEnforced(ctx context.Context, n *node.Node, count int) error {
	report, err := n.Report(ctx)
	if err != nil {
		return err
	}
	for _, c := range report.Components {
		if c.Name == "network-policy" {
			if strings.Contains(c.Message, fmt.Sprintf("%d NetworkPolicies are enforced", count)) {
				return nil
			}
			return fmt.Errorf("network-policy is %s: %s %q", c.State, c.Message, c.Notes)
		}
	}
	return errors.New("polymesh status has no network-policy")
}

// networkMatrix has a line for each way.
func networkMatrix() matrix {
	m := matrix{heads: []string{"from … to …", "one connection, Gbit/s", "kept connections: p50, ms", "p99, ms", "new connections: p50, ms", "p99, ms", "policies in force after, s"}}
	for _, w := range wires() {
		l := line{name: w.what}
		for _, what := range []string{"throughput", "kept p50", "kept p99", "new p50", "new p99", "in force"} {
			l.ids = append(l.ids, w.figure(what))
		}
		m.lines = append(m.lines, l)
	}
	return m
}

// networkRatios compare pods with plain machines, and policies with none.
func networkRatios() (all []ratio) {
	compare := func(a, b wire) {
		for _, what := range []string{"throughput", "kept p50", "kept p99", "new p50", "new p99"} {
			all = append(all, ratio{what + ": " + a.what + " to " + b.what, a.figure(what), b.figure(what)})
		}
	}
	compare(nearWire, plainWire)
	compare(farWire, plainWire)
	for _, count := range policyCounts {
		compare(policyWire(count), farWire)
	}
	return all
}
