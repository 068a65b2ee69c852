//go:build integration

package node

import (
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/controlplane/controlplanetest"
)

// privateVar is set in the process of a test that has a network namespace of its own.
const privateVar = "POLYMESH_TEST_PRIVATE"

// The test's program is also kube-proxy, as the shipped one.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == ProxyCommand {
		os.Exit(RunProxy(os.Args[2:]))
	}
	os.Exit(m.Run())
}

// Rules that another program has removed come back, all of them, and kube-proxy continues from there. It has its own identity and no other.
func TestServiceRulesComeBack(t *testing.T) {
	if os.Getenv(privateVar) == "" {
		nft, err := filepath.Abs("../../.build/host/bin")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(filepath.Join(nft, "nft")); err != nil {
			t.Skip("make has not built it yet: ", err)
		}
		if os.Geteuid() != 0 {
			t.Skip("a network namespace needs root")
		}
		cmd := exec.Command("unshare", "--net", os.Args[0], "-test.run=^TestServiceRulesComeBack$", "-test.v", "-test.timeout=4m")
		cmd.Env = append(os.Environ(), privateVar+"=1", "PATH="+nft+":"+os.Getenv("PATH"))
		if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "--- PASS: TestServiceRulesComeBack") {
			t.Fatalf("%v\n%s", err, out)
		}
		return
	}
	nft := func(args ...string) string {
		t.Helper()
		out, err := exec.Command("nft", args...).CombinedOutput()
		if err != nil {
			t.Fatalf("nft %s: %v: %s", strings.Join(args, " "), err, out)
		}
		return string(out)
	}
	for _, args := range []string{"link set lo up", "link add eth0 type bridge", "address add 192.0.2.1/24 dev eth0", "link set eth0 up", "route add default via 192.0.2.254"} {
		if out, err := exec.Command("ip", strings.Fields(args)...).CombinedOutput(); err != nil {
			t.Fatalf("ip %s: %v: %s", args, err, out)
		}
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	kubeconfig := controlplanetest.Start(t, log)
	admin := controlplanetest.Client(t, kubeconfig)
	node, err := admin.CoreV1().Nodes().Create(t.Context(), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "none"}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	node.ResourceVersion = "" // whatever the controllers write meanwhile
	node.Status.Addresses = []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: "192.0.2.1"}}
	if _, err := admin.CoreV1().Nodes().UpdateStatus(t.Context(), node, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	create := func(name string, n int) {
		t.Helper()
		if _, err := admin.CoreV1().Services("default").Create(t.Context(), &corev1.Service{
			ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.ServiceSpec{ClusterIP: fmt.Sprintf("10.43.7.%d", n), Ports: []corev1.ServicePort{{Port: 80}}},
		}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	for n := range 20 {
		create(fmt.Sprintf("s%d", n), n+1)
	}

	p := NewProxy(Options{
		Settings: config.Node{}, Name: "none", IP: netip.MustParseAddr("192.0.2.1"), ClusterCIDR: netip.MustParsePrefix("10.42.0.0/16"),
		APIServiceIP: netip.MustParseAddr("10.43.0.1"), Identity: Identity{Proxy: filepath.Join(filepath.Dir(kubeconfig), "kube-proxy.kubeconfig")}, Log: log,
	})
	if err := p.Init(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := p.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	rules := func() string {
		out, _ := exec.Command("nft", "list", "table", "ip", "kube-proxy").CombinedOutput()
		return string(out)
	}
	eventually := func(what string, has, not string) {
		t.Helper()
		controlplanetest.Eventually(t, what, func() error {
			if text := rules(); !strings.Contains(text, has) || not != "" && strings.Contains(text, not) {
				return fmt.Errorf("the rules are:\n%s", text)
			}
			return nil
		})
	}
	// The services have no endpoints: their addresses are rejected.
	eventually("the last service is there", "10.43.7.20 . tcp . 80", "")
	// A check that finds the rules is what makes their absence a loss.
	if err := p.keeper.Check(t.Context()); err != nil {
		t.Fatal(err)
	}
	want := lines(rules())

	for i, harm := range []string{"flush ruleset", "delete table ip kube-proxy", "flush table ip kube-proxy"} {
		before := strings.Join(p.Notes(t.Context()), "\n")
		nft(strings.Fields(harm)...)
		if i > 0 { // the first time, the keeper sees it by itself
			p.keeper.Kick()
		}
		controlplanetest.Eventually(t, harm, func() error {
			if got := lines(rules()); !slices.Equal(got, want) {
				return fmt.Errorf("the rules are\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
			}
			// What comes next must not meet the second kube-proxy.
			if note := strings.Join(p.Notes(t.Context()), "\n"); note == before || !strings.Contains(note, "put back what another program had removed: the rules of service addresses") {
				return fmt.Errorf("the note is %q", note)
			}
			return p.keeper.Check(t.Context())
		})
	}
	create("after", 100)
	eventually("a service that came later", "10.43.7.100 . tcp . 80", "")
	if err := admin.CoreV1().Services("default").Delete(t.Context(), "s0", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually("a service that was there before is deleted", "10.43.7.20 . tcp . 80", "10.43.7.1 . tcp . 80")
	if out, err := exec.Command("pgrep", "-P", fmt.Sprint(os.Getpid()), "-f", ProxyCommand).CombinedOutput(); err == nil {
		t.Errorf("a second kube-proxy is left: %s", out)
	}
}

// lines returns the lines of a table in a fixed order: nft lists the elements of a map in any. It omits the rule that drops packets to addresses
// of no service: a kube-proxy whose first rules precede what it reads about the range of these addresses writes that one with its next full
// sync, within the hour (OnServiceCIDRsChanged in pkg/proxy/nftables/proxier.go).
func lines(table string) (out []string) {
	for _, line := range strings.FieldsFunc(table, func(r rune) bool { return r == '\n' || r == ',' }) {
		if !strings.Contains(line, "Drop traffic to unallocated ClusterIPs") {
			out = append(out, strings.Trim(strings.TrimPrefix(strings.TrimSpace(line), "elements = {"), " }"))
		}
	}
	slices.Sort(out)
	return out
}
