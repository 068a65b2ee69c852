package netpol

import (
	"encoding/binary"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/util/intstr"
	"sigs.k8s.io/knftables"
	"sigs.k8s.io/yaml"

	"polymesh.dev/polymesh/pkg/layout"
)

var update = flag.Bool("update", false, "write the golden files")

// readCluster reads a state in the form of testdata/shop.yaml.
func readCluster(t *testing.T, text []byte) Cluster {
	t.Helper()
	var file struct {
		Namespaces map[string]labels.Set
		Pods       []struct {
			Namespace, Name string
			Labels          labels.Set
			Address         netip.Addr
			Ports           []NamedPort
		}
		Policies []*networkingv1.NetworkPolicy
	}
	if err := yaml.UnmarshalStrict(text, &file); err != nil {
		t.Fatal(err)
	}
	c := Cluster{Policies: file.Policies, Namespaces: file.Namespaces}
	here := netip.MustParsePrefix("10.42.0.0/24")
	for _, p := range file.Pods {
		c.Pods = append(c.Pods, Pod{Namespace: p.Namespace, Name: p.Name, Labels: p.Labels, Addresses: []netip.Addr{p.Address}, Local: here.Contains(p.Address), Ports: p.Ports})
	}
	return c
}

func compile(t *testing.T, c Cluster) *Table {
	t.Helper()
	table, problems := Compile(c)
	if problems != nil {
		t.Fatal(problems)
	}
	return table
}

// fakeKernel is knftables' own model of the kernel, which refuses what refers to something that is not there.
func fakeKernel() (*kernel, *knftables.Fake) {
	fake := knftables.NewFake(knftables.InetFamily, layout.PolicyTable)
	return &kernel{nft: fake}, fake
}

func TestGolden(t *testing.T) {
	text, err := os.ReadFile("testdata/shop.yaml")
	if err != nil {
		t.Fatal(err)
	}
	table := compile(t, readCluster(t, text))
	k, fake := fakeKernel()
	if err := k.apply(t.Context(), table); err != nil {
		t.Fatal(err)
	}
	got := fake.Dump()
	if *update {
		if err := os.WriteFile("testdata/shop.nft", []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile("testdata/shop.nft")
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("the rules differ from testdata/shop.nft (-update writes it):\n%s", got)
	}
	if table.Isolated != 4 {
		t.Errorf("%d pods are isolated, want 4", table.Isolated)
	}
}

// packet is the first one of a connection.
type packet struct {
	From, To netip.Addr
	Protocol corev1.Protocol
	Port     uint16
}

func (p packet) String() string {
	return fmt.Sprintf("%s to %s %s %d", p.From, p.To, p.Protocol, p.Port)
}

// allows interprets the table as the kernel does, for a packet that another node or a pod sends.
func (t *Table) allows(p packet) bool {
	if _, ok := t.Sets[selfSet].elements()[p.From.String()+" . "+p.To.String()]; ok {
		return true
	}
	return t.side(egress, p.From, p) && t.side(ingress, p.To, p)
}

func (s *Set) elements() map[string][]string {
	if s == nil {
		return nil
	}
	return s.Elements
}

func (t *Table) side(d direction, pod netip.Addr, p packet) bool {
	m := t.Maps["isolated-"+string(d)]
	if m == nil {
		return true
	}
	verdict, ok := m.Elements[pod.String()]
	return !ok || t.chain(strings.TrimPrefix(verdict, "jump "), p) == "accept"
}

func (t *Table) chain(name string, p packet) string {
	for _, r := range t.Chains[name].Rules {
		if !t.matches(r, p) {
			continue
		}
		if next, ok := strings.CutPrefix(r.Verdict, "jump "); ok {
			if verdict := t.chain(next, p); verdict != "" {
				return verdict
			}
			continue
		}
		return r.Verdict
	}
	return ""
}

func (t *Table) matches(r Rule, p packet) bool {
	other := p.From
	if r.Direction == egress {
		other = p.To
	}
	in := func(spans []span, n uint32) bool {
		return slices.ContainsFunc(spans, func(s span) bool { return s.From <= n && n <= s.To })
	}
	if r.Peers != "" {
		if _, ok := t.Sets[r.Peers].Elements[other.String()]; !ok {
			return false
		}
	}
	if len(r.Blocks) > 0 && !in(r.Blocks, binary.BigEndian.Uint32(other.AsSlice())) {
		return false
	}
	protocol := strings.ToLower(string(p.Protocol))
	if r.Protocol != "" && (r.Protocol != protocol || !in(r.Ports, uint32(p.Port))) {
		return false
	}
	if r.NamedPorts != "" {
		if _, ok := t.Sets[r.NamedPorts].Elements[fmt.Sprintf("%s . %s . %d", p.To, protocol, p.Port)]; !ok {
			return false
		}
	}
	return true
}

// The rules of the API, by hand.
func TestSemantics(t *testing.T) {
	const state = `
namespaces: {a: {name: a}, b: {name: b, special: "yes"}}
pods:
- {namespace: a, name: web, labels: {app: web}, address: 10.42.0.2, ports: [{name: http, protocol: TCP, number: 8080}]}
- {namespace: a, name: web-2, labels: {app: web}, address: 10.42.0.3, ports: [{name: http, protocol: TCP, number: 9090}, {name: same, protocol: UDP, number: 53}]}
- {namespace: a, name: client, labels: {app: client}, address: 10.42.0.4}
- {namespace: b, name: client, labels: {app: client}, address: 10.42.1.4}
- {namespace: b, name: web, labels: {app: web}, address: 10.42.1.5, ports: [{name: http, protocol: TCP, number: 1234}]}
policies: []
`
	const web, web2, client, clientB, webB, outside = "10.42.0.2", "10.42.0.3", "10.42.0.4", "10.42.1.4", "10.42.1.5", "192.0.2.1"
	all := []string{web, web2, client, clientB, webB, outside}
	for what, c := range map[string]struct {
		specs string // of policies in namespace a
		ports []string
		// denied are the pairs "from>to:port" that fail; of all pairs with the ports.
		denied func(from, to, port string) bool
	}{
		"no policy":     {"[]", []string{"tcp/80"}, func(string, string, string) bool { return false }},
		"deny all":      {"[{podSelector: {}}]", []string{"tcp/80", "sctp/80", "udp/80"}, func(_, to, _ string) bool { return to == web || to == web2 || to == client }},
		"no such pod":   {"[{podSelector: {matchLabels: {app: none}}}]", []string{"tcp/80"}, func(string, string, string) bool { return false }},
		"deny egress":   {"[{podSelector: {}, policyTypes: [Egress]}]", []string{"tcp/80"}, func(from, _, _ string) bool { return from == web || from == web2 || from == client }},
		"types default": {"[{podSelector: {}, egress: [{to: [{ipBlock: {cidr: 192.0.2.0/24}}]}]}]", []string{"tcp/80"}, func(from, to, _ string) bool { return to != outside && (from[:7] == "10.42.0" || to[:7] == "10.42.0") }},
		"namespace and pod selector": {"[{podSelector: {matchLabels: {app: web}}, ingress: [{from: [{namespaceSelector: {matchLabels: {special: 'yes'}}, podSelector: {matchLabels: {app: client}}}]}]}]",
			[]string{"tcp/80"}, func(from, to, _ string) bool { return (to == web || to == web2) && from != clientB }},
		"namespace or pod selector": {"[{podSelector: {matchLabels: {app: web}}, ingress: [{from: [{namespaceSelector: {matchLabels: {special: 'yes'}}}, {podSelector: {matchLabels: {app: client}}}]}]}]",
			[]string{"tcp/80"}, func(from, to, _ string) bool {
				return (to == web || to == web2) && from != clientB && from != webB && from != client
			}},
		"pod selector is of the own namespace": {"[{podSelector: {matchLabels: {app: web}}, ingress: [{from: [{podSelector: {}}]}]}]",
			[]string{"tcp/80"}, func(from, to, _ string) bool { return (to == web || to == web2) && from[:7] != "10.42.0" }},
		"ports add up": {"[{podSelector: {matchLabels: {app: web}}, ingress: [{ports: [{port: 80}, {port: 85, endPort: 87}, {port: 86, endPort: 90}]}]}, {podSelector: {matchLabels: {app: web}}, ingress: [{ports: [{protocol: UDP, port: 80}]}]}]",
			[]string{"tcp/79", "tcp/80", "tcp/84", "tcp/85", "tcp/90", "tcp/91", "udp/80", "udp/85"}, func(_, to, port string) bool {
				return (to == web || to == web2) && !slices.Contains([]string{"tcp/80", "tcp/85", "tcp/90", "udp/80"}, port)
			}},
		"a protocol without a port": {"[{podSelector: {matchLabels: {app: web}}, ingress: [{ports: [{protocol: SCTP}]}]}]",
			[]string{"tcp/80", "sctp/1", "sctp/65535"}, func(_, to, port string) bool { return (to == web || to == web2) && port == "tcp/80" }},
		"a name is each pod's own": {"[{podSelector: {matchLabels: {app: web}}, ingress: [{ports: [{port: http}]}]}]",
			[]string{"tcp/8080", "tcp/9090", "udp/8080"}, func(_, to, port string) bool {
				return to == web && port != "tcp/8080" || to == web2 && port != "tcp/9090"
			}},
		"a name of the destination": {"[{podSelector: {matchLabels: {app: client}}, policyTypes: [Egress], egress: [{to: [{namespaceSelector: {}}], ports: [{port: http}]}]}]",
			[]string{"tcp/8080", "tcp/9090", "tcp/1234"}, func(from, to, port string) bool {
				return from == client && !(to == web && port == "tcp/8080" || to == web2 && port == "tcp/9090" || to == webB && port == "tcp/1234")
			}},
		"exceptions": {"[{podSelector: {matchLabels: {app: web}}, ingress: [{from: [{ipBlock: {cidr: 0.0.0.0/0, except: [10.42.1.0/24, 10.42.1.4/32]}}]}]}]",
			[]string{"tcp/80"}, func(from, to, _ string) bool { return (to == web || to == web2) && from[:7] == "10.42.1" }},
		"an exception of another block is none": {"[{podSelector: {matchLabels: {app: web}}, ingress: [{from: [{ipBlock: {cidr: 10.42.0.0/16, except: [10.42.1.0/24]}}, {ipBlock: {cidr: 10.42.1.4/32}}]}]}]",
			[]string{"tcp/80"}, func(from, to, _ string) bool { return (to == web || to == web2) && (from == webB || from == outside) }},
		"an exception of all": {"[{podSelector: {matchLabels: {app: web}}, ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.0.0.0/8]}}]}]}]",
			[]string{"tcp/80"}, func(_, to, _ string) bool { return to == web || to == web2 }},
	} {
		t.Run(what, func(t *testing.T) {
			cluster := readCluster(t, []byte(state))
			var specs []networkingv1.NetworkPolicySpec
			if err := yaml.UnmarshalStrict([]byte(c.specs), &specs); err != nil {
				t.Fatal(err)
			}
			for i, spec := range specs {
				cluster.Policies = append(cluster.Policies, &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: "a", Name: fmt.Sprint("p", i)}, Spec: spec})
			}
			table := compile(t, cluster)
			if table.Empty() != (len(specs) == 0) {
				t.Errorf("%d policies, and a table is needed: %v", len(specs), !table.Empty())
			}
			for _, from := range all {
				for _, to := range all {
					for _, port := range c.ports {
						protocol, number, _ := strings.Cut(port, "/")
						p := packet{From: netip.MustParseAddr(from), To: netip.MustParseAddr(to), Protocol: corev1.Protocol(strings.ToUpper(protocol))}
						fmt.Sscan(number, &p.Port)
						// No policy keeps a pod from itself.
						if want := from == to || !c.denied(from, to, port); table.allows(p) != want {
							t.Errorf("%s: allowed is %v, want %v", p, !want, want)
						}
					}
				}
			}
		})
	}
}

// Equal states have equal tables, or each pass would write sets again.
func TestEqualTables(t *testing.T) {
	read := func() *Table {
		return compile(t, readCluster(t, []byte(`
namespaces: {a: {name: a}}
pods: [{namespace: a, name: web, labels: {app: web}, address: 10.42.0.2}]
policies:
- metadata: {namespace: a, name: p}
  spec:
    podSelector: {}
    ingress:
    - from:
      - podSelector: {matchLabels: {app: web, x: y, z: "1"}, matchExpressions: [{key: app, operator: NotIn, values: [c, b]}, {key: app, operator: Exists}, {key: x, operator: Exists}]}
`)))
	}
	first := read()
	for range 100 {
		if again := read(); !reflect.DeepEqual(first, again) {
			t.Fatalf("the sets are %v and %v", sorted(first.Sets), sorted(again.Sets))
		}
	}
}

// hostileCluster has texts that break out of a rule if they become a part of it.
func hostileCluster() Cluster {
	const evil = "evil\" accept }\nadd rule inet polymesh-policy forward-in accept # @'`;{}"
	peer := networkingv1.NetworkPolicyPeer{
		NamespaceSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"a": "b"}},
		PodSelector:       &metav1.LabelSelector{MatchLabels: map[string]string{"app": "web"}},
	}
	evilProtocol, udp := corev1.Protocol(evil), corev1.ProtocolUDP
	name, number, negative := intstr.FromString(evil), intstr.FromInt32(80), intstr.FromInt32(-5)
	end := int32(70000)
	return Cluster{
		Namespaces: map[string]labels.Set{evil: {"a": evil}, "a/b": {"a": "b"}},
		Pods: []Pod{
			{Namespace: evil, Name: evil, Labels: labels.Set{"app": evil}, Addresses: []netip.Addr{netip.MustParseAddr("10.42.0.2")}, Local: true,
				Ports: []NamedPort{{evil, corev1.ProtocolTCP, 80}}},
			{Namespace: "a/b", Name: "c", Labels: labels.Set{"app": "web"}, Addresses: []netip.Addr{netip.MustParseAddr("10.42.0.3")}, Local: true},
		},
		Policies: []*networkingv1.NetworkPolicy{
			{ObjectMeta: metav1.ObjectMeta{Namespace: evil, Name: evil}, Spec: networkingv1.NetworkPolicySpec{
				Ingress: []networkingv1.NetworkPolicyIngressRule{
					{From: []networkingv1.NetworkPolicyPeer{peer}, Ports: []networkingv1.NetworkPolicyPort{{Port: &name}}},
					{From: []networkingv1.NetworkPolicyPeer{{IPBlock: &networkingv1.IPBlock{CIDR: evil}}}},
					{From: []networkingv1.NetworkPolicyPeer{{IPBlock: &networkingv1.IPBlock{CIDR: "10.0.0.0/8", Except: []string{evil}}}}},
					{From: []networkingv1.NetworkPolicyPeer{{PodSelector: &metav1.LabelSelector{MatchLabels: map[string]string{evil: evil}}}}},
					{From: []networkingv1.NetworkPolicyPeer{{NamespaceSelector: &metav1.LabelSelector{MatchExpressions: []metav1.LabelSelectorRequirement{{Key: "a", Operator: metav1.LabelSelectorOperator(evil)}}}}}},
					{Ports: []networkingv1.NetworkPolicyPort{{Protocol: &evilProtocol}}},
					{Ports: []networkingv1.NetworkPolicyPort{{Protocol: &udp, Port: &negative}}},
					{Ports: []networkingv1.NetworkPolicyPort{{Protocol: &udp, Port: &number, EndPort: &end}}},
				},
			}},
			{ObjectMeta: metav1.ObjectMeta{Namespace: evil, Name: "selects nothing"}, Spec: networkingv1.NetworkPolicySpec{PodSelector: metav1.LabelSelector{MatchLabels: map[string]string{evil: evil}}}},
			// Two policies whose names are equal when they are joined.
			{ObjectMeta: metav1.ObjectMeta{Namespace: "a/b", Name: "c"}},
			{ObjectMeta: metav1.ObjectMeta{Namespace: "a", Name: "b/c"}},
			{ObjectMeta: metav1.ObjectMeta{Namespace: "a/b", Name: strings.Repeat("long", 500)}},
		},
	}
}

// Objects that the API server does not store, in case that it does one day: texts of others never become part of a rule, and what
// cannot be read selects and allows nothing.
func TestHostileTexts(t *testing.T) {
	table, problems := Compile(hostileCluster())
	if len(problems) != 8 {
		t.Errorf("the problems are %q", problems)
	}
	plain := regexp.MustCompile(`^[a-zA-Z0-9@{}.,=!" -]+$`)
	names := regexp.MustCompile(`^[a-z0-9-]{1,64}$`)
	check := func(what, text string, form *regexp.Regexp) {
		t.Helper()
		if !form.MatchString(text) {
			t.Errorf("%s: %q", what, text)
		}
	}
	for name, chain := range table.Chains {
		check("chain", name, names)
		if len(chain.Comment) > 128 {
			t.Errorf("a comment of %d bytes", len(chain.Comment))
		}
		check("comment", chain.Comment+"-", regexp.MustCompile(`^[a-z0-9./-]*$`))
		for _, r := range chain.Rules {
			check("rule", r.nft(), plain)
		}
	}
	for name, set := range table.Sets {
		check("set", name, names)
		for key := range set.Elements {
			check("element", key, regexp.MustCompile(`^[a-z0-9. ]+$`))
		}
	}
	// The last rules of evil are of no port.
	from, to := netip.MustParseAddr("10.42.0.3"), netip.MustParseAddr("10.42.0.2")
	for protocol, ports := range map[corev1.Protocol][]uint16{corev1.ProtocolTCP: {1, 81, 443}, corev1.ProtocolUDP: {0, 1, 80, 65535}} {
		for _, port := range ports {
			if p := (packet{from, to, protocol, port}); table.allows(p) {
				t.Errorf("%s is allowed", p)
			}
		}
	}
	if p := (packet{from, to, corev1.ProtocolTCP, 80}); !table.allows(p) {
		t.Errorf("%s is not allowed: the rule that can be read has no effect", p)
	}
	if hash("a/b", "c") == hash("a", "b/c") || hash("ab") == hash("a", "b") {
		t.Error("two names have one hash")
	}
	k, _ := fakeKernel()
	if err := k.apply(t.Context(), table); err != nil {
		t.Error(err)
	}
}
