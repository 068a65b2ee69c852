package node

import (
	"context"
	"fmt"
	"io"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"polymesh.dev/polymesh/pkg/condition"
)

// ExplainFailure prints what a user would inspect when the test fails. ForTest calls it; a test that shares a node calls it itself.
func (n *Node) ExplainFailure(t testing.TB) {
	t.Cleanup(func() { n.ExplainNow(t) })
}

// ExplainNow explains a test that has failed, once. Call it before removing what the test has created.
func (n *Node) ExplainNow(t testing.TB) {
	if !t.Failed() || n.explained == t.Name() {
		return
	}
	n.explained = t.Name()
	var text strings.Builder
	if n.Explain(&text); text.Len() > 0 {
		t.Log(text.String())
	}
}

// Explain prints what a user would inspect.
func (n *Node) Explain(w io.Writer) {
	// A broken node responds slowly or never.
	ctx, cancel := context.WithTimeout(context.Background(), 90*time.Second)
	defer cancel()
	show := func(command string, args ...string) {
		ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
		defer cancel()
		out, err := n.PolymeshCommand(ctx, append([]string{command}, args...)...).CombinedOutput()
		fmt.Fprintf(w, "\n--- %s: polymesh %s %s\n%s", n.Name, command, strings.Join(args, " "), out)
		if err != nil {
			fmt.Fprintf(w, "(%v)\n", err)
		}
	}
	if _, err := os.Stat(n.DataDir()); err == nil {
		show("status")
		// The server explains its pods.
		if n.agentOf() == nil && n.apiAnswers(ctx) {
			show("kubectl", "get", "nodes", "-o", "wide")
			show("kubectl", "get", "pods", "-A", "-o", "wide")
			out, err := n.PolymeshCommand(ctx, "kubectl", "get", "events", "-A", "--sort-by=.lastTimestamp").CombinedOutput()
			fmt.Fprintf(w, "\n--- %s: the last events\n%s", n.Name, lastLines(string(out), 40))
			if err != nil {
				fmt.Fprintf(w, "(%v)\n", err)
			}
			n.explainPods(ctx, w, show)
		}
	}
	if text := crash(n.Log()); text != "" {
		fmt.Fprintf(w, "\n--- the server has crashed: %s\n%s", n.Log(), text)
	}
	for _, file := range []string{n.Log(), n.Layout().Agent("containerd", "containerd.log")} {
		if text := tail(file, 60); text != "" {
			fmt.Fprintf(w, "\n--- the end of %s\n%s", file, text)
		}
	}
}

func (n *Node) apiAnswers(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	client, err := n.NewClient()
	if err != nil {
		return false
	}
	return client.RESTClient().Get().AbsPath("/readyz").Do(ctx).Error() == nil
}

// explainPods describes the pods that are not ready, with their containers' logs.
func (n *Node) explainPods(ctx context.Context, w io.Writer, show func(string, ...string)) {
	client, err := n.NewClient()
	if err != nil {
		return
	}
	pods, err := client.CoreV1().Pods(metav1.NamespaceAll).List(ctx, metav1.ListOptions{})
	if err != nil {
		fmt.Fprintf(w, "\nlist pods: %v\n", err)
		return
	}
	const most = 4
	shown := 0
	for _, p := range pods.Items {
		if why := NotReady(&p); why == "" || p.Status.Phase == corev1.PodSucceeded {
			continue
		}
		if shown++; shown > most {
			fmt.Fprintf(w, "\n(more pods that are not ready are left out)\n")
			return
		}
		show("kubectl", "describe", "pod", "-n", p.Namespace, p.Name)
		show("kubectl", "logs", "-n", p.Namespace, p.Name, "--all-containers", "--prefix", "--tail=30")
		for _, c := range p.Status.ContainerStatuses {
			if c.RestartCount > 0 {
				show("kubectl", "logs", "-n", p.Namespace, p.Name, "-c", c.Name, "--previous", "--tail=30")
			}
		}
	}
}

// NotReady returns why a pod is not ready, empty if it is.
func NotReady(p *corev1.Pod) string {
	name := p.Namespace + "/" + p.Name
	if p.DeletionTimestamp != nil {
		return name + " is being deleted"
	}
	if p.Status.Phase != corev1.PodRunning {
		return fmt.Sprintf("%s is %s %s", name, p.Status.Phase, p.Status.Message)
	}
	if c := meta.FindStatusCondition(condition.Of(p.Status.Conditions), string(corev1.PodReady)); c != nil && c.Status != metav1.ConditionTrue {
		return fmt.Sprintf("%s is not ready: %s", name, c.Message)
	}
	return ""
}

// crashed is the beginning of a crash of Go's runtime; hundreds of goroutines follow.
var crashed = regexp.MustCompile(`(?m)^(panic: |fatal error: |SIG[A-Z]+: |unexpected fault address )`)

// crash returns the beginning of the last crash in a log.
func crash(file string) string {
	text, err := os.ReadFile(file)
	if err != nil {
		return ""
	}
	places := crashed.FindAllIndex(text, -1)
	if places == nil {
		return ""
	}
	lines := strings.SplitAfter(string(text[places[len(places)-1][0]:]), "\n")
	return strings.Join(lines[:min(len(lines), 30)], "")
}

// tail returns the last lines of a file, nothing if there is none.
func tail(file string, lines int) string {
	f, err := os.Open(file)
	if err != nil {
		return ""
	}
	defer f.Close()
	const most = 64 << 10
	if info, err := f.Stat(); err == nil && info.Size() > most {
		if _, err := f.Seek(-most, io.SeekEnd); err != nil {
			return ""
		}
	}
	text, err := io.ReadAll(f)
	if err != nil {
		return ""
	}
	return lastLines(string(text), lines)
}

func lastLines(text string, n int) string {
	lines := strings.SplitAfter(strings.TrimSuffix(text, "\n"), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "") + "\n"
}
