//go:build integration

package network

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/controlplane/controlplanetest"
	"polymesh.dev/polymesh/pkg/datadir"
	"polymesh.dev/polymesh/pkg/layout"
)

// privateVar is set in the process of a test that has a network namespace of its own.
const privateVar = "POLYMESH_TEST_PRIVATE"

// The component on a real control plane, with the identity of a node and nothing else.
func TestComponent(t *testing.T) {
	if os.Getenv(privateVar) == "" {
		if os.Geteuid() != 0 {
			t.Skip("a network namespace needs root")
		}
		plugins(t)
		cmd := exec.Command("unshare", "--net", os.Args[0], "-test.run=^TestComponent$", "-test.v", "-test.timeout=4m")
		cmd.Env = append(os.Environ(), privateVar+"=1")
		if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "--- PASS: TestComponent") {
			t.Fatalf("%v\n%s", err, out)
		}
		return
	}
	run(t, "ip", "link", "set", "lo", "up")
	run(t, "ip", "link", "add", "eth0", "type", "bridge")
	run(t, "ip", "address", "add", "192.0.2.1/24", "dev", "eth0")
	run(t, "ip", "link", "set", "eth0", "up")
	run(t, "ip", "route", "add", "default", "via", "192.0.2.254")
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	kubeconfig := controlplanetest.Start(t, log)
	admin := controlplanetest.Client(t, kubeconfig)
	// A node registers as its kubelet does.
	kubelet := filepath.Join(filepath.Dir(kubeconfig), "kubelet.kubeconfig")
	self := controlplanetest.Client(t, kubelet)
	if _, err := self.CoreV1().Nodes().Create(t.Context(), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "none"}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}

	dir := layout.DataDir(filepath.Join(t.TempDir(), "data-dir"))
	marker, err := datadir.Claim(dir)
	if err != nil {
		t.Fatal(err)
	}
	lock, err := datadir.Acquire(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir.Run()) })
	defer lock.Release()
	n := New(Options{
		Settings: config.Node{DataDir: dir}, Name: "none", IP: netip.MustParseAddr("192.0.2.1"), ClusterCIDR: netip.MustParsePrefix("10.42.0.0/16"),
		Backend: config.VXLAN, Port: layout.VXLANPort, Kubeconfig: kubelet, Plugins: plugins(t), Marker: marker, Lock: lock, Log: log,
	})
	if err := n.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := n.Stop(t.Context()); err != nil {
			t.Error(err)
		}
	}()

	mac := hardwareAddr(marker.ID, "none")
	var pods netip.Prefix
	announced := func() error {
		node, err := admin.CoreV1().Nodes().Get(t.Context(), "none", metav1.GetOptions{})
		if err != nil {
			return err
		}
		if node.Spec.PodCIDR == "" {
			return errors.New("no range yet")
		}
		pods = netip.MustParsePrefix(node.Spec.PodCIDR)
		for key, want := range map[string]string{publicIP: "192.0.2.1", backendType: "vxlan", backendData: fmt.Sprintf(`{"VNI":1,"VtepMAC":"%s"}`, mac), kubeSubnetManager: "true"} {
			if node.Annotations[key] != want {
				return fmt.Errorf("annotation %s is %q, want %q", key, node.Annotations[key], want)
			}
		}
		return nil
	}
	controlplanetest.Eventually(t, "the node is announced", announced)
	if pods.Bits() != 24 || !n.opts.ClusterCIDR.Contains(pods.Addr()) {
		t.Errorf("the controller manager gave it %s, want a /24 of the cluster's range", pods)
	}
	conflist := func(mtu int) func() error {
		return func() error {
			text, err := os.ReadFile(filepath.Join(dir.CNIConfDir(), "10-polymesh.conflist"))
			if err == nil && !(strings.Contains(string(text), fmt.Sprintf(`"mtu": %d,`, mtu)) && strings.Contains(string(text), `"subnet": "`+pods.String()+`"`)) {
				err = fmt.Errorf("it is %s", text)
			}
			return err
		}
	}
	controlplanetest.Eventually(t, "the CNI configuration", conflist(1450))
	// A single node has the device, and nothing else.
	if out := run(t, "ip", "-d", "link", "show", "flannel.1"); !strings.Contains(out, "mtu 1450") || !strings.Contains(out, "vxlan id 1 local 192.0.2.1 dev eth0") || !strings.Contains(out, "dstport 8472 nolearning") {
		t.Errorf("the device is\n%s", out)
	}
	if out := run(t, "ip", "route", "show", "proto", "111"); out != "" {
		t.Errorf("routes of a single node:\n%s", out)
	}

	// The kubelet reports: then it is ready.
	if err := n.Ready(t.Context()); err == nil || !strings.Contains(err.Error(), "has not reported yet") {
		t.Errorf("before the kubelet reports: %v", err)
	}
	ready, err := json.Marshal(map[string]any{"status": map[string]any{"conditions": []corev1.NodeCondition{{
		Type: corev1.NodeReady, Status: corev1.ConditionTrue, LastHeartbeatTime: metav1.NewTime(time.Now().Add(time.Second)),
	}}}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := self.CoreV1().Nodes().Patch(t.Context(), "none", types.StrategicMergePatchType, ready, metav1.PatchOptions{}, "status"); err != nil {
		t.Fatal(err)
	}
	controlplanetest.Eventually(t, "the component is ready", func() error { return n.Ready(t.Context()) })

	// Someone removes the announcement.
	if _, err := admin.CoreV1().Nodes().Patch(t.Context(), "none", types.MergePatchType, []byte(`{"metadata":{"annotations":{"`+publicIP+`":null,"`+backendData+`":"x"}}}`), metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	controlplanetest.Eventually(t, "the announcement comes back", announced)

	// Another node comes, and one that claims the first one's addresses; then the first one goes.
	join := func(name, mac string) netip.Prefix {
		node := other(name, "", "192.0.2.7", mac, 0)
		if _, err := admin.CoreV1().Nodes().Create(t.Context(), node, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		var pods netip.Prefix
		controlplanetest.Eventually(t, "a range for "+name, func() error {
			node, err := admin.CoreV1().Nodes().Get(t.Context(), name, metav1.GetOptions{})
			if err == nil {
				pods, err = netip.ParsePrefix(node.Spec.PodCIDR)
			}
			return err
		})
		return pods
	}
	theirs := join("other", "02:00:00:00:00:07")
	routes := func(want string) func() error {
		return func() error {
			if out := strings.Join(strings.Fields(run(t, "ip", "route", "show", "proto", "111")), " "); out != want {
				return fmt.Errorf("the routes are %q, want %q", out, want)
			}
			return nil
		}
	}
	controlplanetest.Eventually(t, "the route", routes(fmt.Sprintf("%s via %s dev flannel.1 onlink", theirs, theirs.Addr())))
	if out := run(t, "bridge", "fdb", "show", "dev", "flannel.1"); !strings.Contains(out, "02:00:00:00:00:07 dst 192.0.2.7 self permanent") {
		t.Errorf("the forwarding entries are\n%s", out)
	}
	join("thief", "02:00:00:00:00:07")
	controlplanetest.Eventually(t, "the thief is reported", func() error {
		if note := strings.Join(n.Notes(t.Context()), "\n"); !strings.Contains(note, "no route to the pods of node thief: it claims the hardware address 02:00:00:00:00:07 of node other") {
			return fmt.Errorf("the note is %q", note)
		}
		return n.keeper.Check(t.Context())
	})
	run(t, "ip", "link", "delete", "flannel.1")
	controlplanetest.Eventually(t, "the device comes back, with the route", routes(fmt.Sprintf("%s via %s dev flannel.1 onlink", theirs, theirs.Addr())))
	controlplanetest.Eventually(t, "it is noted", func() error {
		if note := strings.Join(n.Notes(t.Context()), "\n"); !strings.Contains(note, "put back what another program had removed: the interface flannel.1") {
			return fmt.Errorf("the note is %q", note)
		}
		return n.keeper.Check(t.Context())
	})
	for _, name := range []string{"thief", "other"} {
		if err := admin.CoreV1().Nodes().Delete(t.Context(), name, metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	controlplanetest.Eventually(t, "the route is gone", routes(""))

	// The interface below gets another MTU: the next pods do too.
	run(t, "ip", "link", "set", "eth0", "mtu", "1400")
	controlplanetest.Eventually(t, "another MTU", conflist(1350))
	// And another address, before a restart.
	run(t, "ip", "address", "delete", "192.0.2.1/24", "dev", "eth0")
	run(t, "ip", "address", "add", "192.0.2.9/24", "dev", "eth0")
	controlplanetest.Eventually(t, "another address", func() error {
		// The device is made again.
		if out, err := exec.Command("ip", "-d", "link", "show", "flannel.1").CombinedOutput(); err != nil || !strings.Contains(string(out), "local 192.0.2.9") {
			return fmt.Errorf("the device: %v: %s", err, out)
		}
		node, err := admin.CoreV1().Nodes().Get(t.Context(), "none", metav1.GetOptions{})
		if err == nil && node.Annotations[publicIP] != "192.0.2.9" {
			err = fmt.Errorf("it is announced as %q", node.Annotations[publicIP])
		}
		return err
	})
	if err := n.hasAddress(); err == nil || !strings.Contains(err.Error(), "restart the server") {
		t.Errorf("with another address: %v", err)
	}
}
