// Command kube-network-policies prints which packets NetworkPolicies allow, as the evaluator of sigs.k8s.io/kube-network-policies
// decides. It reads JSON cases on standard input and writes one JSON list of verdicts for each. The tests of pkg/node/netpol run it; it does
// not ship.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/kube-network-policies/pkg/api"
	"sigs.k8s.io/kube-network-policies/pkg/network"
	"sigs.k8s.io/kube-network-policies/pkg/networkpolicy"
)

// testCase is the state of a cluster, and packets in it.
type testCase struct {
	Namespaces []*corev1.Namespace
	Pods       []*corev1.Pod
	Policies   []*networkingv1.NetworkPolicy
	Packets    []packet
}

type packet struct {
	From, To net.IP
	Protocol corev1.Protocol
	Port     int
}

// provider finds pods by their address.
type provider map[string]*api.PodInfo

func (p provider) GetPodInfoByIP(ip string) (*api.PodInfo, bool) {
	pod, ok := p[ip]
	return pod, ok
}

func main() {
	in, out := json.NewDecoder(os.Stdin), json.NewEncoder(os.Stdout)
	for {
		var c testCase
		err := in.Decode(&c)
		if errors.Is(err, io.EOF) {
			return
		}
		var allowed []bool
		if err == nil {
			allowed, err = evaluate(context.Background(), c)
		}
		if err == nil {
			err = out.Encode(allowed)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
}

func evaluate(ctx context.Context, c testCase) ([]bool, error) {
	client, err := kubernetes.NewForConfig(&rest.Config{Host: "127.0.0.1"})
	if err != nil {
		return nil, err
	}
	// Never started: their stores are filled here.
	factory := informers.NewSharedInformerFactory(client, 0)
	namespaces, pods, policies := factory.Core().V1().Namespaces(), factory.Core().V1().Pods(), factory.Networking().V1().NetworkPolicies()
	labels, byAddress := map[string]map[string]string{}, provider{}
	for _, n := range c.Namespaces {
		if err := namespaces.Informer().GetStore().Add(n); err != nil {
			return nil, err
		}
		labels[n.Name] = n.Labels
	}
	for _, p := range c.Pods {
		if err := pods.Informer().GetStore().Add(p); err != nil {
			return nil, err
		}
		for _, ip := range p.Status.PodIPs {
			byAddress[ip.IP] = api.NewPodInfo(p, labels[p.Namespace], nil, "")
		}
	}
	for _, p := range c.Policies {
		if err := policies.Informer().GetStore().Add(p); err != nil {
			return nil, err
		}
	}
	engine := networkpolicy.NewPolicyEngine(byAddress, []api.PolicyEvaluator{networkpolicy.NewStandardNetworkPolicy("node", namespaces, pods, policies)})
	allowed := make([]bool, len(c.Packets))
	for i, p := range c.Packets {
		allowed[i], err = engine.EvaluatePacket(ctx, &network.Packet{Family: corev1.IPv4Protocol, SrcIP: p.From, DstIP: p.To, Proto: p.Protocol, SrcPort: 40000, DstPort: p.Port})
		if err != nil {
			return nil, err
		}
	}
	return allowed, nil
}
