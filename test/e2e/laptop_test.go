//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/clientcmd"

	"polymesh.dev/polymesh/pkg/workflow/deploy"
	"polymesh.dev/polymesh/test/e2e/node"
)

// laptop is a machine outside of the cluster, with a builder, a project and a kubeconfig. It reaches the API server of one server.
type laptop struct {
	server *node.Node
	dir    string
	env    []string
	image  string // that it has deployed
}

func newLaptop(t *testing.T, server *node.Node) *laptop {
	t.Helper()
	if _, err := buildEcho(); err != nil {
		t.Fatal(err)
	}
	top, err := node.Top()
	if err != nil {
		t.Fatal(err)
	}
	echo, err := os.ReadFile(filepath.Join(top, ".build", "e2e", "echo"))
	if err != nil {
		t.Fatal(err)
	}
	l := &laptop{server: server, dir: filepath.Join(t.TempDir(), "laptop")}
	for name, content := range map[string][]byte{
		"services/api/Dockerfile": []byte("FROM scratch\nCOPY echo test /\nUSER 65532:65532\nENTRYPOINT [\"/echo\"]\nCMD [\"serve\"]\n"),
		"services/api/echo":       echo,
		// No other test's image is this one's.
		"services/api/test": []byte(t.Name() + time.Now().String()),
		"k8s/api.yaml":      []byte(laptopManifest),
	} {
		file := filepath.Join(l.dir, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, content, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	config, err := clientcmd.LoadFromFile(server.Kubeconfig())
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range config.Clusters {
		c.Server = "https://" + server.Address() + ":6443"
	}
	kubeconfig := filepath.Join(t.TempDir(), "kubeconfig")
	if err := clientcmd.WriteToFile(*config, kubeconfig); err != nil {
		t.Fatal(err)
	}
	none := filepath.Join(t.TempDir(), "none")
	l.env = append(builderStorage(t), "KUBECONFIG="+kubeconfig, "POLYMESH_DATA_DIR="+none, "KUBECACHEDIR="+none, "XDG_CACHE_HOME="+none)
	return l
}

// deploy deploys the project, whose pod runs on node-4, and waits until another server has a copy of the image.
func (l *laptop) deploy(t *testing.T, others ...*node.Node) {
	t.Helper()
	program, err := node.Program()
	if err != nil {
		t.Fatal(err)
	}
	run := func() deploy.Image {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
		defer cancel()
		cmd := l.server.OutsideCommand(ctx, program, "deploy", l.dir, "-o", "json")
		cmd.Env = append(cmd.Env, l.env...)
		var out, errOut bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &errOut
		if err := cmd.Run(); err != nil {
			t.Fatalf("polymesh deploy of a laptop: %v: %s", err, errOut.String())
		}
		if !strings.Contains(errOut.String(), "images are pushed to the cluster at https://"+l.server.Address()+":6443") {
			t.Errorf("it does not say where images go: %s", errOut.String())
		}
		var result deploy.Result
		if err := json.Unmarshal(out.Bytes(), &result); err != nil || len(result.Images) != 1 {
			t.Fatalf("polymesh deploy prints %s, %v", out.String(), err)
		}
		return result.Images[0]
	}
	first := run()
	l.image = first.Ref
	if !first.Built || !first.Moved {
		t.Errorf("the image was not pushed: %+v", first)
	}
	if again := run(); again.Built || again.Moved || again.Ref != first.Ref {
		t.Errorf("what has not changed: %+v, was %+v", again, first)
	}
	l.server.Eventually(t, time.Minute, func() (bool, string) {
		for _, n := range others {
			if strings.Contains(n.Ctr(t, "images", "ls", "name==docker.io/"+l.image), "polymesh.dev/copied-from=node-2") {
				return true, ""
			}
		}
		out, _ := l.server.Status(t)
		return false, "no other server keeps a copy of " + l.image + ":\n" + out
	})
}

// runs starts a pod with the image on a node.
func (l *laptop) runs(t *testing.T, n *node.Node, on string) {
	t.Helper()
	n.Apply(t, fmt.Sprintf(laptopPod, on, l.image))
	client := n.Client(t)
	n.Eventually(t, 2*time.Minute, func() (bool, string) {
		pod, err := client.CoreV1().Pods("default").Get(t.Context(), "laptop", metav1.GetOptions{})
		if err != nil {
			return false, err.Error()
		}
		why := node.NotReady(pod)
		return why == "", why
	})
	n.Delete(t, fmt.Sprintf(laptopPod, on, l.image))
}

const laptopManifest = `
apiVersion: apps/v1
kind: Deployment
metadata: {name: api}
spec:
  selector: {matchLabels: {app: api}}
  template:
    metadata: {labels: {app: api}}
    spec:
      nodeSelector: {kubernetes.io/hostname: node-4}
      containers: [{name: api, image: "laptop/api:1.0.0"}]
`

const laptopPod = `
apiVersion: v1
kind: Pod
metadata: {name: laptop, namespace: default}
spec:
  nodeName: %s
  terminationGracePeriodSeconds: 1
  containers: [{name: api, image: %q}]
`
