package netpol

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// Cluster is the state that the rules are compiled from.
type Cluster struct {
	Policies []*networkingv1.NetworkPolicy
	// Namespaces are the labels of all namespaces, by name.
	Namespaces map[string]labels.Set
	// Pods are the pods that have an address of their own and have not ended. Pods in the host's network are not among them: their
	// traffic is the node's, and selectors do not match it, as in most implementations
	// (https://kubernetes.io/docs/concepts/services-networking/network-policies/#networkpolicy-and-hostnetwork-pods).
	Pods []Pod
}

// Pod is one pod of the cluster.
type Pod struct {
	Namespace, Name string
	Labels          labels.Set
	// Addresses are the pod's IPv4 addresses.
	Addresses []netip.Addr
	// Local is set if the pod runs on this node.
	Local bool
	// Ports are the named ports of its containers.
	Ports []NamedPort
}

// NamedPort is a container port with a name.
type NamedPort struct {
	Name     string
	Protocol corev1.Protocol
	Number   uint16
}

// direction is the side of a pod that a policy isolates.
type direction string

const (
	ingress direction = "in"
	egress  direction = "out"
)

// Compile returns the rules for the pods of this node. It depends on nothing else than its argument, and equal states have
// equal tables. A table for a state without policies is empty. The errors report parts of policies that cannot be read, which
// select and allow nothing; the table is complete otherwise.
func Compile(c Cluster) (*Table, []error) {
	t := newTable()
	if len(c.Policies) == 0 {
		return t, nil
	}
	w := compiler{cluster: c, table: t, byNamespace: map[string][]*Pod{}}
	for i := range c.Pods {
		pod := &c.Pods[i]
		w.byNamespace[pod.Namespace] = append(w.byNamespace[pod.Namespace], pod)
		if pod.Local {
			for _, a := range pod.Addresses {
				t.set(knownSet, addressType).add(a.String())
			}
		}
	}
	t.set(knownSet, addressType)
	t.set(selfSet, pairType)
	t.verdicts(ingress)
	t.verdicts(egress)
	t.addBaseChains()

	policies := slices.SortedFunc(slices.Values(c.Policies), func(a, b *networkingv1.NetworkPolicy) int {
		return cmp.Or(strings.Compare(a.Namespace, b.Namespace), strings.Compare(a.Name, b.Name))
	})
	chains := map[direction]map[*Pod][]string{ingress: {}, egress: {}}
	for _, p := range policies {
		selected, err := w.selected(p)
		if err != nil {
			w.problem(p, err)
		}
		if len(selected) == 0 {
			continue
		}
		for _, d := range directions(p) {
			chain := w.policyChain(p, d)
			for _, pod := range selected {
				chains[d][pod] = append(chains[d][pod], chain)
			}
		}
	}
	isolated := map[*Pod]bool{}
	for d, pods := range chains {
		for pod, policies := range pods {
			isolated[pod] = true
			chain := w.podChain(d, policies)
			for _, a := range pod.Addresses {
				t.verdicts(d).put(a.String(), chain)
				t.set(selfSet, pairType).add(a.String(), a.String())
			}
		}
	}
	t.Isolated = len(isolated)
	return t, w.problems
}

// compiler holds what the steps of Compile share.
type compiler struct {
	cluster     Cluster
	table       *Table
	byNamespace map[string][]*Pod
	problems    []error
}

func (w *compiler) problem(p *networkingv1.NetworkPolicy, err error) {
	w.problems = append(w.problems, fmt.Errorf("NetworkPolicy %q in namespace %q: %w", p.Name, p.Namespace, err))
}

// directions returns what a policy isolates its pods for: policyTypes, or the API's default for them
// (SetDefaults_NetworkPolicy in k8s.io/kubernetes, pkg/apis/networking/v1/defaults.go).
func directions(p *networkingv1.NetworkPolicy) []direction {
	types := p.Spec.PolicyTypes
	if len(types) == 0 {
		types = []networkingv1.PolicyType{networkingv1.PolicyTypeIngress}
		if len(p.Spec.Egress) > 0 {
			types = append(types, networkingv1.PolicyTypeEgress)
		}
	}
	var out []direction
	if slices.Contains(types, networkingv1.PolicyTypeIngress) {
		out = append(out, ingress)
	}
	if slices.Contains(types, networkingv1.PolicyTypeEgress) {
		out = append(out, egress)
	}
	return out
}

// selected returns the pods of this node to which the policy applies.
func (w *compiler) selected(p *networkingv1.NetworkPolicy) ([]*Pod, error) {
	selector, err := metav1.LabelSelectorAsSelector(&p.Spec.PodSelector)
	if err != nil {
		return nil, fmt.Errorf("spec.podSelector: %w", err)
	}
	var out []*Pod
	for _, pod := range w.byNamespace[p.Namespace] {
		if pod.Local && len(pod.Addresses) > 0 && selector.Matches(pod.Labels) {
			out = append(out, pod)
		}
	}
	return out, nil
}

// policyChain adds the chain that accepts what a policy allows in one direction, and returns its name.
func (w *compiler) policyChain(p *networkingv1.NetworkPolicy, d direction) string {
	name := "policy-" + string(d) + "-" + hash(p.Namespace, p.Name)
	if _, ok := w.table.Chains[name]; ok {
		return name
	}
	type rule struct {
		ports []networkingv1.NetworkPolicyPort
		peers []networkingv1.NetworkPolicyPeer
	}
	var rules []rule
	if d == ingress {
		for _, r := range p.Spec.Ingress {
			rules = append(rules, rule{r.Ports, r.From})
		}
	} else {
		for _, r := range p.Spec.Egress {
			rules = append(rules, rule{r.Ports, r.To})
		}
	}
	chain := &Chain{Comment: comment(p.Namespace, p.Name)}
	for _, r := range rules {
		for _, peer := range w.peers(p, r.peers) {
			for _, port := range w.ports(p, d, r.ports) {
				rule := Rule{Direction: d, Verdict: "accept"}
				peer(&rule)
				port(&rule)
				chain.Rules = append(chain.Rules, rule)
			}
		}
	}
	w.table.Chains[name] = chain
	return name
}

// podChain adds the chain of all pods to which exactly these policies apply: what none of them accepts is dropped.
func (w *compiler) podChain(d direction, policies []string) string {
	name := "pods-" + string(d) + "-" + hash(policies...)
	if _, ok := w.table.Chains[name]; !ok {
		chain := &Chain{}
		for _, p := range policies {
			chain.Rules = append(chain.Rules, Rule{Verdict: "jump " + p})
		}
		chain.Rules = append(chain.Rules, Rule{Verdict: "drop"})
		w.table.Chains[name] = chain
	}
	return name
}

// condition restricts a rule.
type condition func(*Rule)

// peers returns one condition for each way to match a rule's peers; none match nothing. Without peers every address matches.
func (w *compiler) peers(p *networkingv1.NetworkPolicy, peers []networkingv1.NetworkPolicyPeer) []condition {
	if len(peers) == 0 {
		return []condition{func(*Rule) {}}
	}
	var out []condition
	var blocks []span
	var sets []string
	for _, peer := range peers {
		if peer.IPBlock != nil {
			spans, err := blockSpans(peer.IPBlock)
			if err != nil {
				w.problem(p, err)
				continue
			}
			blocks = append(blocks, spans...)
			continue
		}
		set, err := w.peerSet(p.Namespace, peer)
		if err != nil {
			w.problem(p, err)
			continue
		}
		if !slices.Contains(sets, set) {
			sets = append(sets, set)
		}
	}
	for _, set := range sets {
		out = append(out, func(r *Rule) { r.Peers = set })
	}
	if blocks = merge(blocks); len(blocks) > 0 {
		out = append(out, func(r *Rule) { r.Blocks = blocks })
	}
	return out
}

// peerSet returns the set with the addresses of the pods that a peer's selectors match. Policies with the same selectors share it.
func (w *compiler) peerSet(namespace string, peer networkingv1.NetworkPolicyPeer) (string, error) {
	pods := labels.Everything()
	if peer.PodSelector != nil {
		var err error
		if pods, err = metav1.LabelSelectorAsSelector(peer.PodSelector); err != nil {
			return "", fmt.Errorf("podSelector of a peer: %w", err)
		}
	}
	var namespaces []string
	scope := "namespace"
	key := namespace
	if peer.NamespaceSelector == nil {
		namespaces = []string{namespace}
	} else {
		selector, err := metav1.LabelSelectorAsSelector(peer.NamespaceSelector)
		if err != nil {
			return "", fmt.Errorf("namespaceSelector of a peer: %w", err)
		}
		scope, key = "selector", canonical(selector)
		for name, set := range w.cluster.Namespaces {
			if selector.Matches(set) {
				namespaces = append(namespaces, name)
			}
		}
	}
	name := "peers-" + hash(scope, key, canonical(pods))
	if _, ok := w.table.Sets[name]; ok {
		return name, nil
	}
	set := w.table.set(name, addressType)
	for _, ns := range namespaces {
		for _, pod := range w.byNamespace[ns] {
			if !pods.Matches(pod.Labels) {
				continue
			}
			for _, a := range pod.Addresses {
				set.add(a.String())
			}
		}
	}
	return name, nil
}

// canonical is a hash of a selector's requirements in their order as texts. The selector's own text has requirements of one key in any
// order.
func canonical(s labels.Selector) string {
	requirements, _ := s.Requirements()
	texts := make([]string, len(requirements))
	for i, r := range requirements {
		texts[i] = r.String()
	}
	slices.Sort(texts)
	return hash(texts...)
}

// ports returns one condition for each way to match a rule's ports. Without ports all traffic matches.
func (w *compiler) ports(p *networkingv1.NetworkPolicy, d direction, ports []networkingv1.NetworkPolicyPort) []condition {
	if len(ports) == 0 {
		return []condition{func(*Rule) {}}
	}
	var out []condition
	numbers := map[corev1.Protocol][]span{}
	var named []string
	for _, port := range ports {
		protocol := corev1.ProtocolTCP
		if port.Protocol != nil {
			protocol = *port.Protocol
		}
		if !slices.Contains(protocols, protocol) {
			w.problem(p, fmt.Errorf("the protocol %q is not one of %v", protocol, protocols))
			continue
		}
		switch {
		case port.Port == nil:
			numbers[protocol] = append(numbers[protocol], span{0, 65535})
		case port.Port.Type == intstr.String:
			set := w.portSet(d, port.Port.StrVal, protocol)
			if !slices.Contains(named, set) {
				named = append(named, set)
			}
		default:
			s := span{uint32(port.Port.IntVal), uint32(port.Port.IntVal)}
			if port.EndPort != nil {
				s.To = uint32(*port.EndPort)
			}
			if port.Port.IntVal < 0 || s.To > 65535 || s.From > s.To {
				w.problem(p, fmt.Errorf("the ports %d to %d are no range of ports", s.From, s.To))
				continue
			}
			numbers[protocol] = append(numbers[protocol], s)
		}
	}
	for _, protocol := range protocols {
		if spans := merge(numbers[protocol]); len(spans) > 0 {
			out = append(out, func(r *Rule) { r.Protocol, r.Ports = strings.ToLower(string(protocol)), spans })
		}
	}
	for _, set := range named {
		out = append(out, func(r *Rule) { r.NamedPorts = set })
	}
	return out
}

var protocols = []corev1.Protocol{corev1.ProtocolTCP, corev1.ProtocolUDP, corev1.ProtocolSCTP}

// portSet returns the set of the addresses and numbers behind a port's name, which can differ from pod to pod. The destination is
// always a pod of this node for ingress, and any pod for egress.
func (w *compiler) portSet(d direction, port string, protocol corev1.Protocol) string {
	name := "ports-" + string(d) + "-" + hash(port, string(protocol))
	if _, ok := w.table.Sets[name]; ok {
		return name
	}
	set := w.table.set(name, portType)
	for _, pod := range w.cluster.Pods {
		if d == ingress && !pod.Local {
			continue
		}
		for _, p := range pod.Ports {
			if p.Name != port || p.Protocol != protocol {
				continue
			}
			for _, a := range pod.Addresses {
				set.add(a.String(), strings.ToLower(string(protocol)), fmt.Sprint(p.Number))
			}
		}
	}
	return name
}

// span is a range of addresses or ports, both ends included.
type span struct{ From, To uint32 }

// blockSpans returns the IPv4 addresses of a block without its exceptions. A block of IPv6 has none.
func blockSpans(b *networkingv1.IPBlock) ([]span, error) {
	whole, ok, err := prefixSpan(b.CIDR)
	if err != nil || !ok {
		return nil, err
	}
	var except []span
	for _, text := range b.Except {
		s, ok, err := prefixSpan(text)
		if err != nil {
			return nil, err
		}
		if ok {
			except = append(except, s)
		}
	}
	var out []span
	next := uint64(whole.From)
	for _, e := range merge(except) {
		if e.To < whole.From || e.From > whole.To {
			continue
		}
		if uint64(e.From) > next {
			out = append(out, span{uint32(next), e.From - 1})
		}
		next = uint64(e.To) + 1
	}
	if next <= uint64(whole.To) {
		out = append(out, span{uint32(next), whole.To})
	}
	return out, nil
}

// prefixSpan returns the addresses of a CIDR; ok is false for IPv6.
func prefixSpan(text string) (s span, ok bool, err error) {
	p, err := netip.ParsePrefix(text)
	if err != nil {
		return span{}, false, fmt.Errorf("the ipBlock %q is not a CIDR", text)
	}
	if !p.Addr().Is4() {
		return span{}, false, nil
	}
	from := binary.BigEndian.Uint32(p.Masked().Addr().AsSlice())
	return span{from, from | uint32(1<<(32-p.Bits())-1)}, true, nil
}

// merge sorts spans and joins those that touch.
func merge(spans []span) []span {
	spans = slices.Clone(spans)
	slices.SortFunc(spans, func(a, b span) int { return cmp.Or(cmp.Compare(a.From, b.From), cmp.Compare(a.To, b.To)) })
	var out []span
	for _, s := range spans {
		if n := len(out); n > 0 && uint64(s.From) <= uint64(out[n-1].To)+1 {
			out[n-1].To = max(out[n-1].To, s.To)
			continue
		}
		out = append(out, s)
	}
	return out
}

// hash returns a name for a list of texts of others: they never become part of a rule themselves. Each is preceded by its length,
// so that two lists with the same letters differ.
func hash(texts ...string) string {
	h := sha256.New()
	for _, t := range texts {
		var length [8]byte
		binary.BigEndian.PutUint64(length[:], uint64(len(t)))
		h.Write(length[:])
		h.Write([]byte(t))
	}
	return hex.EncodeToString(h.Sum(nil)[:12])
}

// comment returns the text that shows an administrator of which policy a chain is; empty for names that are not plain, which the
// API server does not store.
func comment(namespace, name string) string {
	text := namespace + "/" + name
	plain := func(r rune) bool {
		return r >= 'a' && r <= 'z' || r >= '0' && r <= '9' || strings.ContainsRune("-./", r)
	}
	if strings.ContainsFunc(text, func(r rune) bool { return !plain(r) }) {
		return ""
	}
	return text[:min(len(text), maxComment)]
}

// maxComment is the longest comment that nft accepts, in bytes (NFTNL_UDATA_COMMENT_MAXLEN).
const maxComment = 128

// sorted returns the keys of a map in order.
func sorted[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }
