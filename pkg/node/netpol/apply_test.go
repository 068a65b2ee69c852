package netpol

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"sigs.k8s.io/knftables"
)

// From any state to any other, the changes result in the same rules as writing all of them.
func TestChangesAddUp(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	k, fake := fakeKernel()
	for i := range 300 {
		c := randomCluster(random)
		if i%20 == 0 {
			c.Policies = nil
		}
		table := compile(t, c)
		if err := k.apply(t.Context(), table); err != nil {
			t.Fatalf("state %d: %v", i, err)
		}
		whole, other := fakeKernel()
		if err := whole.apply(t.Context(), compile(t, c)); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(lines(other), lines(fake)); diff != "" {
			t.Fatalf("state %d: the rules differ (- want, + is):\n%s", i, diff)
		}
		// An equal state writes nothing.
		tx := k.nft.NewTransaction()
		change(tx, k.have, compile(t, c))
		if tx.NumOperations() != 0 {
			t.Fatalf("state %d: without a change %d operations are written:\n%s", i, tx.NumOperations(), tx)
		}
	}
}

// lines returns the content of a kernel. Elements have no order.
func lines(fake *knftables.Fake) []string {
	var rules, elements []string
	for line := range strings.Lines(fake.Dump()) {
		if strings.HasPrefix(line, "add element ") {
			elements = append(elements, line)
		} else {
			rules = append(rules, line)
		}
	}
	slices.Sort(elements)
	return append(rules, elements...)
}

// counted is a kernel that counts what is written to it.
type counted struct {
	knftables.Interface
	operations int
	fail       error
}

func (c *counted) Run(ctx context.Context, tx *knftables.Transaction) error {
	if c.fail != nil {
		return c.fail
	}
	c.operations = tx.NumOperations()
	return c.Interface.Run(ctx, tx)
}

// big is a cluster with as many policies and pods; the policies have selectors of their own, all select pods of this node.
func big(n int) Cluster {
	c := Cluster{Namespaces: map[string]labels.Set{}}
	for i := range n {
		ns := fmt.Sprint("ns-", i%20)
		c.Namespaces[ns] = labels.Set{"kubernetes.io/metadata.name": ns}
		c.Pods = append(c.Pods, Pod{Namespace: ns, Name: fmt.Sprint("pod-", i), Labels: labels.Set{"app": fmt.Sprint("app-", i%100), "n": fmt.Sprint(i)},
			Addresses: []netip.Addr{netip.AddrFrom4([4]byte{10, 42, byte(i / 250), byte(i%250 + 2)})}, Local: i < 100})
		c.Policies = append(c.Policies, &networkingv1.NetworkPolicy{
			ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: fmt.Sprint("policy-", i)},
			Spec: networkingv1.NetworkPolicySpec{Ingress: []networkingv1.NetworkPolicyIngressRule{{From: []networkingv1.NetworkPolicyPeer{
				{PodSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"n": fmt.Sprint(i)}}},
				{NamespaceSelector: &metav1.LabelSelector{}, PodSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": fmt.Sprint("app-", i%100)}}},
			}}}},
		})
	}
	return c
}

// One change among a thousand policies and pods writes a handful of elements.
func TestSmallChanges(t *testing.T) {
	c := big(1000)
	k, fake := fakeKernel()
	count := &counted{Interface: fake}
	k.nft = count
	apply := func(what string, limit int) {
		t.Helper()
		if err := k.apply(t.Context(), compile(t, c)); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		t.Logf("%s: %d operations", what, count.operations)
		if count.operations > limit || count.operations == 0 {
			t.Errorf("%s: %d operations, want 1 to %d", what, count.operations, limit)
		}
	}
	apply("all", 1<<20)
	c.Pods = append(c.Pods, Pod{Namespace: "ns-3", Name: "new", Labels: labels.Set{"app": "app-7"}, Addresses: []netip.Addr{netip.MustParseAddr("10.42.99.1")}})
	apply("a pod of another node", 2)
	c.Pods[len(c.Pods)-1].Local = true
	apply("it is of this node", 4)
	c.Pods = c.Pods[:len(c.Pods)-1]
	apply("it ends", 6)
	c.Policies[5] = c.Policies[5].DeepCopy()
	c.Policies[5].Spec.Ingress[0].From = nil
	apply("a policy changes", 8)
	c.Policies = c.Policies[:len(c.Policies)-1]
	apply("a policy goes", 80) // the chain of its pods has 49 others
}

// A failed write, and rules that another program has removed, are written in full.
func TestAfterAFailure(t *testing.T) {
	text, err := os.ReadFile("testdata/shop.yaml")
	if err != nil {
		t.Fatal(err)
	}
	k, fake := fakeKernel()
	count := &counted{Interface: fake}
	k.nft = count
	if err := k.apply(t.Context(), compile(t, readCluster(t, text))); err != nil {
		t.Fatal(err)
	}
	want, all := fake.Dump(), count.operations
	if missing, err := k.missing(t.Context()); missing || err != nil {
		t.Errorf("missing: %v, %v", missing, err)
	}
	count.fail = fmt.Errorf("no nft")
	if err := k.apply(t.Context(), newTable()); err == nil {
		t.Error("no error")
	}
	if got := fake.Dump(); got != want {
		t.Errorf("after a failure the rules are %s", got)
	}
	count.fail = nil
	for _, remove := range []func(*knftables.Transaction){
		func(tx *knftables.Transaction) { tx.Delete(&knftables.Table{}) },
		func(tx *knftables.Transaction) { tx.Flush(&knftables.Chain{Name: ingressChain}) },
	} {
		if err := k.apply(t.Context(), compile(t, readCluster(t, text))); err != nil || fake.Dump() != want || count.operations < all {
			t.Errorf("%d operations, %v", count.operations, err)
		}
		tx := fake.NewTransaction()
		remove(tx)
		if err := fake.Run(t.Context(), tx); err != nil {
			t.Fatal(err)
		}
		noticed := false
		for range 3 {
			missing, err := k.missing(t.Context())
			if err != nil {
				t.Error(err)
			}
			noticed = noticed || missing
		}
		if !noticed {
			t.Error("removed rules are not noticed")
		}
	}
}

func BenchmarkCompile(b *testing.B) {
	for _, n := range []int{10, 100, 1000} {
		c := big(n)
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			for b.Loop() {
				if _, problems := Compile(c); problems != nil {
					b.Fatal(problems)
				}
			}
		})
	}
}
