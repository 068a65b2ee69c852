//go:build e2e

package e2e

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"polymesh.dev/polymesh/test/e2e/node"
)

const storageNamespace = "e2e-storage"

const storageManifest = `
apiVersion: v1
kind: Namespace
metadata: {name: ` + storageNamespace + `}
`

func TestPersistentVolume(t *testing.T) {
	n := app(t)
	importEcho(t, n)
	// No class is named: local-path is the default.
	const claim = `
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: data, namespace: ` + storageNamespace + `}
spec: {accessModes: [ReadWriteOnce], resources: {requests: {storage: 10Mi}}}
`
	const pod = `
apiVersion: v1
kind: Pod
metadata: {name: writer, namespace: ` + storageNamespace + `}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: echo
    image: "` + echoImage + `"
    readinessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1}
    volumeMounts: [{name: data, mountPath: /data}]
  volumes: [{name: data, persistentVolumeClaim: {claimName: data}}]
`
	t.Cleanup(func() { n.Delete(t, storageManifest) })
	n.Apply(t, storageManifest+"---"+claim+"---"+pod)
	address := echoAddress(readyPod(t, n, storageNamespace, "writer"))
	got := n.Kubectl(t, "get", "pvc", "data", "-n", storageNamespace, "-o", "jsonpath={.spec.storageClassName} {.status.phase}")
	if got != "local-path Bound" {
		t.Errorf("the claim is %q, want local-path Bound", got)
	}
	const file, text = "/file?path=/data/f", "kept over a restart"
	mustFetch(t, n, http.MethodPost, address, file, text)

	n.Delete(t, pod)
	n.Apply(t, pod)
	address = echoAddress(readyPod(t, n, storageNamespace, "writer"))
	if got := mustFetch(t, n, http.MethodGet, address, file, ""); got != text {
		t.Errorf("a new pod reads %q, want %q", got, text)
	}

	volume := n.Kubectl(t, "get", "pvc", "data", "-n", storageNamespace, "-o", "jsonpath={.spec.volumeName}")
	dirs, err := filepath.Glob(n.Layout().Path("storage", "*", "*", "f"))
	if flat, _ := filepath.Glob(n.Layout().Path("storage", "*", "f")); err == nil {
		dirs = append(dirs, flat...)
	}
	if len(dirs) != 1 {
		t.Fatalf("the file is in %v (%v), want it in one place below %s/storage", dirs, err, n.DataDir())
	}
	n.Delete(t, pod)
	n.Delete(t, claim)
	n.Eventually(t, 2*time.Minute, func() (bool, string) {
		if out, err := n.KubectlErr("get", "pv", volume, "--ignore-not-found", "-o", "name"); err != nil || out != "" {
			return false, fmt.Sprintf("the volume is still there: %s%v", out, err)
		}
		_, err := os.Stat(dirs[0])
		return os.IsNotExist(err), dirs[0] + " is still there"
	})
}

// A claim gets no folder that is not its own: the StorageClass that would allow it is rejected, and where one is there from
// before, the provisioner can neither make nor remove anything outside of the storage folder.
func TestVolumesStayBelow(t *testing.T) {
	n := app(t)
	outside := t.TempDir()
	precious := filepath.Join(outside, "precious")
	if err := os.WriteFile(precious, []byte("kept"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(outside, 0o755); err != nil {
		t.Fatal(err)
	}
	class := fmt.Sprintf(`
apiVersion: storage.k8s.io/v1
kind: StorageClass
metadata: {name: e2e-evil}
provisioner: rancher.io/local-path
parameters: {pathPattern: "../../../../../../../../../..%s/{{ .PVC.Annotations.dir }}"}
volumeBindingMode: Immediate
reclaimPolicy: Delete
`, outside)
	file := filepath.Join(t.TempDir(), "class.yaml")
	if err := os.WriteFile(file, []byte(class), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := n.KubectlErr("apply", "-f", file); err == nil || !strings.Contains(out+err.Error(), "a claim can get a folder that is not its own") {
		t.Errorf("the class is let through: %s %v", out, err)
	}

	// As a class that was made before the policy was there.
	const policy = "local-path-pattern.polymesh.dev"
	n.Kubectl(t, "annotate", "validatingadmissionpolicybinding", policy, "addon.polymesh.dev/ignore=true")
	n.Kubectl(t, "patch", "validatingadmissionpolicybinding", policy, "--type", "merge", "-p", `{"spec": {"validationActions": ["Audit"]}}`)
	t.Cleanup(func() {
		n.Delete(t, storageManifest)
		n.Delete(t, class)
		n.Kubectl(t, "patch", "validatingadmissionpolicybinding", policy, "--type", "merge", "-p", `{"spec": {"validationActions": ["Deny"]}}`)
		n.Kubectl(t, "annotate", "validatingadmissionpolicybinding", policy, "addon.polymesh.dev/ignore-")
	})
	n.Eventually(t, time.Minute, func() (bool, string) {
		out, err := n.KubectlErr("apply", "-f", file)
		return err == nil, fmt.Sprintf("the class cannot be made without the policy: %s %v", out, err)
	})
	report, err := n.Report(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	n.Apply(t, storageManifest+fmt.Sprintf(`---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: below, namespace: %s, annotations: {dir: made-by-pvc, volume.kubernetes.io/selected-node: %s}}
spec: {storageClassName: e2e-evil, accessModes: [ReadWriteOnce], resources: {requests: {storage: 1Mi}}}
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: taken, namespace: %s, annotations: {dir: "", volume.kubernetes.io/selected-node: %s}}
spec: {storageClassName: e2e-evil, accessModes: [ReadWriteOnce], resources: {requests: {storage: 1Mi}}}
`, storageNamespace, report.Node, storageNamespace, report.Node))
	for _, claim := range []string{"below", "taken"} {
		n.Eventually(t, 2*time.Minute, func() (bool, string) {
			out, err := n.KubectlErr("get", "events", "-n", storageNamespace, "--field-selector", "involvedObject.name="+claim, "-o", "jsonpath={.items[*].message}")
			return err == nil && strings.Contains(out, "may use folders below"), fmt.Sprintf("no event of claim %s says that its folder is refused: %s %v", claim, out, err)
		})
	}
	n.Delete(t, storageManifest)
	entries, err := os.ReadDir(outside)
	if err != nil || len(entries) != 1 {
		t.Errorf("the folder outside holds %v (%v), want precious alone", entries, err)
	}
	if text, err := os.ReadFile(precious); err != nil || string(text) != "kept" {
		t.Errorf("the file outside is %q (%v)", text, err)
	}
	if info, err := os.Stat(outside); err != nil || info.Mode().Perm() != 0o755 {
		t.Errorf("the folder outside: %v (%v), want mode 755 as before", info, err)
	}
}

func TestStatefulSet(t *testing.T) {
	n := app(t)
	importEcho(t, n)
	const set = storageManifest + `
---
apiVersion: v1
kind: Service
metadata: {name: db, namespace: ` + storageNamespace + `}
spec: {clusterIP: None, selector: {app: db}, ports: [{port: 8080}]}
---
apiVersion: apps/v1
kind: StatefulSet
metadata: {name: db, namespace: ` + storageNamespace + `}
spec:
  serviceName: db
  replicas: 3
  selector: {matchLabels: {app: db}}
  template:
    metadata: {labels: {app: db}}
    spec:
      terminationGracePeriodSeconds: 1
      containers:
      - name: echo
        image: "` + echoImage + `"
        readinessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1}
        volumeMounts: [{name: data, mountPath: /data}]
  volumeClaimTemplates:
  - metadata: {name: data}
    spec: {storageClassName: local-path, accessModes: [ReadWriteOnce], resources: {requests: {storage: 10Mi}}}
---
apiVersion: v1
kind: Pod
metadata: {name: client, namespace: ` + storageNamespace + `}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - {name: echo, image: "` + echoImage + `"}
`
	t.Cleanup(func() { n.Delete(t, storageManifest) })
	n.Apply(t, set)
	n.WaitRollout(t, storageNamespace, "statefulset/db")
	readyPod(t, n, storageNamespace, "client")

	members := listPods(t, n, storageNamespace, "app=db")
	for i, p := range members {
		if want := fmt.Sprintf("db-%d", i); p.Name != want {
			t.Fatalf("pod %d is %s, want %s", i, p.Name, want)
		}
		if i > 0 && p.CreationTimestamp.Time.Before(readySince(&members[i-1])) {
			t.Errorf("%s was made before %s was ready", p.Name, members[i-1].Name)
		}
	}
	// Each has a name that stays, and a volume that stays.
	for _, p := range members {
		if out, err := byName(n, p.Name, "-X", "POST", "-d", "data of "+p.Name); err != nil {
			t.Fatalf("%s: %v", out, err)
		}
	}
	n.Kubectl(t, "delete", "pods", "-n", storageNamespace, "-l", "app=db")
	n.WaitRollout(t, storageNamespace, "statefulset/db")
	for _, p := range members {
		if now := readyPod(t, n, storageNamespace, p.Name); now.UID == p.UID {
			t.Errorf("%s was deleted and is the same", p.Name)
		}
		// A name server may know the old address for its time to live.
		n.Eventually(t, 2*time.Minute, func() (bool, string) {
			out, err := byName(n, p.Name)
			return err == nil && out == "data of "+p.Name, fmt.Sprintf("%s answers %q (%v)", p.Name, out, err)
		})
	}
}

// byName calls a member of the StatefulSet by its DNS name, from a pod, for its file.
func byName(n *node.Node, member string, args ...string) (string, error) {
	url := fmt.Sprintf("http://%s.db.%s.svc.cluster.local:8080/file?path=/data/f", member, storageNamespace)
	out, err := fromPod(n, storageNamespace, append(append([]string{"get"}, args...), url)...)
	return strings.TrimSpace(out), err
}

// readySince is when a pod became ready, to the second.
func readySince(p *corev1.Pod) time.Time {
	for _, c := range p.Status.Conditions {
		if c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue {
			return c.LastTransitionTime.Time
		}
	}
	return time.Now() // not at all: later than what came before
}
