package netpol

import (
	"encoding/json"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// Which pod has an address.
func TestRunning(t *testing.T) {
	start := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	pod := func(name, node, address string, change func(*corev1.Pod)) *corev1.Pod {
		p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "a", Name: name, UID: types.UID(name + "-uid")}, Spec: corev1.PodSpec{NodeName: node}}
		if address != "" {
			p.Status.PodIPs = []corev1.PodIP{{IP: address}, {IP: "2001:db8::1"}}
		}
		if change != nil {
			change(p)
		}
		return p
	}
	phase := func(phase corev1.PodPhase) func(*corev1.Pod) {
		return func(p *corev1.Pod) { p.Status.Phase = phase }
	}
	started := func(after time.Duration) func(*corev1.Pod) {
		return func(p *corev1.Pod) { p.Status.StartTime = &metav1.Time{Time: start.Add(after)} }
	}
	attached := func(name, uid, address string) attachment {
		return attachment{"a", name, uid, []netip.Addr{netip.MustParseAddr(address)}}
	}
	for what, c := range map[string]struct {
		pods     []*corev1.Pod
		attached []attachment
		want     map[string]string
	}{
		"by their status":          {[]*corev1.Pod{pod("p", "here", "10.42.0.2", nil), pod("q", "there", "10.42.1.2", nil)}, nil, map[string]string{"p": "10.42.0.2", "q": "10.42.1.2"}},
		"without an address":       {[]*corev1.Pod{pod("p", "here", "", nil), pod("q", "", "", nil)}, nil, map[string]string{}},
		"of the host's network":    {[]*corev1.Pod{pod("p", "here", "192.0.2.1", func(p *corev1.Pod) { p.Spec.HostNetwork = true })}, nil, map[string]string{}},
		"ended":                    {[]*corev1.Pod{pod("p", "here", "10.42.0.2", phase(corev1.PodSucceeded)), pod("q", "here", "10.42.0.2", phase(corev1.PodFailed))}, nil, map[string]string{}},
		"ended, and its successor": {[]*corev1.Pod{pod("p", "there", "10.42.1.2", phase(corev1.PodSucceeded)), pod("q", "there", "10.42.1.2", phase(corev1.PodRunning))}, nil, map[string]string{"q": "10.42.1.2"}},
		"the later of two":         {[]*corev1.Pod{pod("p", "there", "10.42.1.2", started(2)), pod("q", "there", "10.42.1.2", started(1)), pod("r", "there", "10.42.1.2", nil)}, nil, map[string]string{"p": "10.42.1.2"}},
		"before its status":        {[]*corev1.Pod{pod("p", "here", "", nil)}, []attachment{attached("p", "p-uid", "10.42.0.2")}, map[string]string{"p": "10.42.0.2"}},
		"a new sandbox":            {[]*corev1.Pod{pod("p", "here", "10.42.0.2", nil)}, []attachment{attached("p", "p-uid", "10.42.0.3")}, map[string]string{"p": "10.42.0.3"}},
		"the record decides":       {[]*corev1.Pod{pod("p", "here", "10.42.0.2", nil), pod("q", "here", "", nil)}, []attachment{attached("q", "q-uid", "10.42.0.2")}, map[string]string{"q": "10.42.0.2"}},
		"another pod of that name": {[]*corev1.Pod{pod("p", "here", "", nil)}, []attachment{attached("p", "old", "10.42.0.2")}, map[string]string{}},
		"an unknown pod's address": {[]*corev1.Pod{pod("p", "here", "10.42.0.2", nil)}, []attachment{attached("q", "q-uid", "10.42.0.2")}, map[string]string{}},
		"a record of another node": {[]*corev1.Pod{pod("p", "there", "", nil)}, []attachment{attached("p", "p-uid", "10.42.0.2")}, map[string]string{}},
		"a static pod": {[]*corev1.Pod{pod("p", "here", "", func(p *corev1.Pod) { p.Annotations = map[string]string{staticUID: "hash"} })},
			[]attachment{attached("p", "hash", "10.42.0.2")}, map[string]string{"p": "10.42.0.2"}},
		"a pod without that annotation": {[]*corev1.Pod{pod("p", "here", "", nil)}, []attachment{attached("p", "", "10.42.0.2")}, map[string]string{}},
	} {
		got := map[string]string{}
		for _, p := range running(c.pods, "here", c.attached) {
			for _, a := range p.Addresses {
				got[p.Name] += a.String()
			}
			if p.Local != (p.Addresses[0].As4()[2] == 0) {
				t.Errorf("%s: %s is local: %v", what, p.Name, p.Local)
			}
		}
		if !reflect.DeepEqual(got, c.want) {
			t.Errorf("%s: %v, want %v", what, got, c.want)
		}
	}
}

// What is kept of a pod is enough, and an update of the rest is none.
func TestStripPod(t *testing.T) {
	always := corev1.ContainerRestartPolicyAlways
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "a", Name: "p", UID: "1", ResourceVersion: "1", Labels: map[string]string{"a": "b"}, Annotations: map[string]string{"big": "text"}},
		Spec: corev1.PodSpec{NodeName: "n", Containers: []corev1.Container{
			{Name: "c", Image: "i", Ports: []corev1.ContainerPort{{ContainerPort: 1}, {Name: "http", ContainerPort: 80, Protocol: corev1.ProtocolTCP}}},
			{Name: "d", Ports: []corev1.ContainerPort{{Name: "dns", ContainerPort: 53, Protocol: corev1.ProtocolUDP}}}},
			InitContainers: []corev1.Container{{Name: "job", Ports: []corev1.ContainerPort{{Name: "no", ContainerPort: 1}}},
				{Name: "sidecar", RestartPolicy: &always, Ports: []corev1.ContainerPort{{Name: "admin", ContainerPort: 15000, Protocol: corev1.ProtocolTCP}}}}},
		Status: corev1.PodStatus{Phase: corev1.PodRunning, PodIPs: []corev1.PodIP{{IP: "10.42.0.2"}}, Conditions: []corev1.PodCondition{{Type: corev1.PodReady}}},
	}
	strip := func(p *corev1.Pod) *corev1.Pod {
		t.Helper()
		kept, err := stripPod(p)
		if err != nil {
			t.Fatal(err)
		}
		return kept.(*corev1.Pod)
	}
	kept := strip(p)
	got := running([]*corev1.Pod{kept}, "n", nil)
	want := []NamedPort{{"http", corev1.ProtocolTCP, 80}, {"dns", corev1.ProtocolUDP, 53}, {"admin", corev1.ProtocolTCP, 15000}}
	if len(got) != 1 || !slices.Equal(got[0].Ports, want) || kept.Annotations != nil || kept.Status.Conditions != nil {
		t.Errorf("kept is %+v", got)
	}
	later := p.DeepCopy()
	later.ResourceVersion, later.Status.Conditions, later.Annotations = "2", nil, nil
	if !same(kept, strip(later)) {
		t.Error("another condition is a change")
	}
	for what, change := range map[string]func(*corev1.Pod){
		"label": func(p *corev1.Pod) { p.Labels["a"] = "c" }, "phase": func(p *corev1.Pod) { p.Status.Phase = corev1.PodFailed },
		"address": func(p *corev1.Pod) { p.Status.PodIPs[0].IP = "10.42.0.3" }, "uid": func(p *corev1.Pod) { p.UID = "2" },
		"node": func(p *corev1.Pod) { p.Spec.NodeName = "m" }, "port": func(p *corev1.Pod) { p.Spec.Containers[1].Ports[0].Name = "x" },
	} {
		other := p.DeepCopy()
		change(other)
		if same(kept, strip(other)) {
			t.Errorf("another %s is no change", what)
		}
	}
}

func TestAttachments(t *testing.T) {
	dir := t.TempDir()
	write := func(name string, change func(map[string]any)) {
		record := map[string]any{
			"kind": "cniCacheV1", "containerId": name, "ifName": "eth0", "networkName": "pods", "netns": "/proc/self/ns/net",
			"cniArgs": [][2]string{{"K8S_POD_NAMESPACE", "a"}, {"K8S_POD_NAME", name}, {"K8S_POD_UID", "1"}},
			"result":  map[string]any{"cniVersion": "1.0.0", "ips": []any{map[string]any{"address": "10.42.0.2/24"}, map[string]any{"address": "2001:db8::1/64"}}},
		}
		if change != nil {
			change(record)
		}
		text, err := json.Marshal(record)
		if err != nil {
			t.Fatal(err)
		}
		if name == "half" {
			text = text[:len(text)/2]
		}
		if err := os.WriteFile(filepath.Join(dir, name), text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("good", nil)
	write("half", nil)
	write("other", func(r map[string]any) { r["networkName"] = "podsy" })
	write("ended", func(r map[string]any) { r["netns"] = filepath.Join(dir, "none") })
	write("empty", func(r map[string]any) { r["result"] = nil })
	got, err := attachments(dir, "pods")
	want := []attachment{{"a", "good", "1", []netip.Addr{netip.MustParseAddr("10.42.0.2")}}}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("attachments are %v, %v", got, err)
	}
	if got, err := attachments(filepath.Join(dir, "none"), "pods"); got != nil || err != nil {
		t.Errorf("without a folder: %v, %v", got, err)
	}
}
