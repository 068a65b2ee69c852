//go:build integration

package netpol

import (
	"encoding/json"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"testing"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// oracleCase is the input of build/upstream/kube-network-policies.
type oracleCase struct {
	Namespaces []*corev1.Namespace
	Pods       []*corev1.Pod
	Policies   []*networkingv1.NetworkPolicy
	Packets    []packet
}

// objects are the cluster's objects as the API server has them.
func (c Cluster) objects() (out oracleCase) {
	for name, labels := range c.Namespaces {
		out.Namespaces = append(out.Namespaces, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels}})
	}
	for _, p := range c.Pods {
		pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: p.Namespace, Name: p.Name, UID: types.UID(p.Name), Labels: p.Labels}, Spec: corev1.PodSpec{NodeName: "other"}}
		if p.Local {
			pod.Spec.NodeName = "node"
		}
		container := corev1.Container{Name: "c"}
		for _, port := range p.Ports {
			container.Ports = append(container.Ports, corev1.ContainerPort{Name: port.Name, Protocol: port.Protocol, ContainerPort: int32(port.Number)})
		}
		pod.Spec.Containers = []corev1.Container{container}
		for _, a := range p.Addresses {
			pod.Status.PodIPs = append(pod.Status.PodIPs, corev1.PodIP{IP: a.String()})
		}
		out.Pods = append(out.Pods, pod)
	}
	out.Policies = c.Policies
	return out
}

// of is the cluster as the other node sees it.
func (c Cluster) of(local bool) Cluster {
	c.Pods = slices.Clone(c.Pods)
	for i := range c.Pods {
		c.Pods[i].Local = c.Pods[i].Local == local
	}
	return c
}

// The same packets are allowed as kube-network-policies' evaluator allows: all packets between the pods and outside, for random
// policies. A pod's packets to itself are left out, which never reach the rules there.
func TestLikeKubeNetworkPolicies(t *testing.T) {
	const program = "../../../.build/test/kube-network-policies"
	if _, err := os.Stat(program); err != nil {
		t.Skipf("run `make %s` first: %v", program[len("../../../"):], err)
	}
	random := rand.New(rand.NewPCG(3, 4))
	const cases = 400
	cmd := exec.CommandContext(t.Context(), program)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	asks, answers := json.NewEncoder(in), json.NewDecoder(out)
	compared, denied := 0, 0
	for range cases {
		c := randomCluster(random)
		q := c.objects()
		var addrs []netip.Addr
		for _, p := range c.Pods {
			addrs = append(addrs, p.Addresses...)
		}
		addrs = append(addrs, netip.MustParseAddr("198.18.0.2"), netip.MustParseAddr("203.0.113.9"))
		for _, from := range addrs {
			for _, to := range addrs {
				if from == to {
					continue
				}
				for _, protocol := range randomProtocols {
					for _, port := range append([]int32{1, 82, 444}, randomPorts...) {
						q.Packets = append(q.Packets, packet{from, to, protocol, uint16(port)})
					}
				}
			}
		}
		if err := asks.Encode(q); err != nil {
			t.Fatal(err)
		}
		var want []bool
		if err := answers.Decode(&want); err != nil {
			t.Fatal(err)
		}
		// Each node decides for its own pods.
		here, there := compile(t, c), compile(t, c.of(false))
		for i, p := range q.Packets {
			compared++
			if !want[i] {
				denied++
			}
			if got := here.allows(p) && there.allows(p); got != want[i] {
				text, _ := json.Marshal(q.Policies)
				pods, _ := json.Marshal(c.Pods)
				t.Fatalf("%s: allowed is %v, upstream's is %v: pods %s, namespaces %v, policies %s", p, got, want[i], pods, c.Namespaces, text)
			}
		}
	}
	if err := in.Close(); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	t.Logf("%d packets, %d of them denied", compared, denied)
	if denied < compared/20 || denied > compared*19/20 {
		t.Errorf("%d of %d packets are denied: the cases show too little", denied, compared)
	}
}
