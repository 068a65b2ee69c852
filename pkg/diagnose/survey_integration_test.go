//go:build integration

package diagnose_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/transport"

	"polymesh.dev/polymesh/pkg/controlplane/controlplanetest"
	"polymesh.dev/polymesh/pkg/diagnose"
	"polymesh.dev/polymesh/pkg/kubeconfig"
)

// counted counts requests.
type counted struct {
	http.RoundTripper
	n *atomic.Int64
}

func (c counted) RoundTrip(r *http.Request) (*http.Response, error) {
	c.n.Add(1)
	return c.RoundTripper.RoundTrip(r)
}

// A real API server with its controllers and scheduler; the test is the kubelet.
func TestSurvey(t *testing.T) {
	file := controlplanetest.Start(t, slog.New(slog.NewTextHandler(os.Stderr, nil)))
	client := controlplanetest.Client(t, file)
	c := &cluster{t, client}
	for _, name := range []string{"n1", "n3"} {
		controlplanetest.ReadyNode(t, client, name)
	}
	c.node("n1", hasRoom)
	for name, labels := range map[string]map[string]string{"shop": nil, "mesh": {"istio-injection": "enabled"}, "full": nil} {
		if _, err := client.CoreV1().Namespaces().Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels}}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := client.CoreV1().ResourceQuotas("full").Create(t.Context(), &corev1.ResourceQuota{
		ObjectMeta: metav1.ObjectMeta{Name: "none"}, Spec: corev1.ResourceQuotaSpec{Hard: corev1.ResourceList{corev1.ResourcePods: resource.MustParse("0")}},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}

	var requests atomic.Int64
	s := surveyor(t, file, func(next http.RoundTripper) http.RoundTripper { return counted{next, &requests} })
	later := time.Duration(0)
	s.SetClock(func() time.Time { return time.Now().Add(later) })
	survey := func() *diagnose.Survey {
		t.Helper()
		got, err := s.Survey(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return got
	}

	c.deployment("shop", "well", nil)
	c.deployment("mesh", "plain", nil)
	c.deployment("mesh", "out", func(p *corev1.PodTemplateSpec) { p.Labels["sidecar.istio.io/inject"] = "false" })
	for _, at := range [][2]string{{"shop", "well"}, {"mesh", "plain"}, {"mesh", "out"}} {
		c.status(at[0], at[1], running)
		c.ready(at[0], at[1])
	}
	controlplanetest.Eventually(t, "what is healthy is read", func() error {
		later += 16 * time.Second
		first := survey()
		if len(first.Findings) != 1 {
			return fmt.Errorf("it finds %+v", first.Findings)
		}
		return nil
	})
	before := requests.Load()
	later += 16 * time.Second
	first := survey()
	if f := first.Findings[0]; f.Reason != diagnose.InjectionMissing || f.Name != "plain" || f.Bad || f.Ready != 1 || !strings.Contains(f.Advice, "kubectl rollout restart deployment/plain -n mesh") {
		t.Errorf("of what is healthy but for one sidecar it finds %+v", f)
	}
	// Seven lists, and two for the one that it examines.
	if n := requests.Load() - before; n > 9 {
		t.Errorf("it needs %d requests", n)
	}
	before = requests.Load()
	if survey() != first || requests.Load() != before {
		t.Error("it looks again at once")
	}

	c.deployment("shop", "crashing", nil)
	c.status("shop", "crashing", crashed)
	c.deployment("shop", "huge", func(p *corev1.PodTemplateSpec) {
		p.Spec.Containers[0].Resources.Requests = corev1.ResourceList{corev1.ResourceMemory: resource.MustParse("999Ti")}
	})
	c.deployment("full", "refused", nil)
	c.deployment("shop", "starting", nil)
	c.pod("shop", "lonely")
	c.status("shop", "lonely", func(p *corev1.Pod) {
		running(p)
		p.Status.ContainerStatuses[0].Ready = false
		p.Status.ContainerStatuses[0].State = corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "ImagePullBackOff", Message: "Back-off pulling image \"x\": not found"}}
		unready(p)
	})
	c.job("shop", "migrate")
	c.status("shop", "migrate", func(p *corev1.Pod) {
		running(p)
		unready(p)
		p.Status.Phase = corev1.PodFailed
		p.Status.ContainerStatuses[0].Ready = false
		p.Status.ContainerStatuses[0].State = corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{ExitCode: 7, Message: "no such table", FinishedAt: metav1.Now()}}
	})
	if _, err := client.CoreV1().Nodes().Create(t.Context(), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n2"}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	c.node("n2", func(n *corev1.Node) {
		n.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionFalse, Message: "container runtime is down", LastTransitionTime: metav1.NewTime(time.Now().Add(-time.Hour))}}
	})
	c.node("n3", func(n *corev1.Node) {
		n.Status.Conditions = append(n.Status.Conditions, corev1.NodeCondition{Type: corev1.NodeDiskPressure, Status: corev1.ConditionTrue, Message: "kubelet has disk pressure"})
	})

	type want struct {
		reason          diagnose.Reason
		kind            string
		bad             bool
		message, advice string
	}
	wants := map[string]want{
		"plain":    {diagnose.InjectionMissing, "Deployment", false, "the pod has no sidecar", "kubectl rollout restart"},
		"crashing": {diagnose.Crash, "Deployment", true, "ended with exit code 3 (4 restarts)", "kubectl logs crashing-"},
		"huge":     {diagnose.Unschedulable, "Deployment", true, "Insufficient memory", "lower the requests"},
		"refused":  {diagnose.Refused, "Deployment", true, "exceeded quota: none", "ResourceQuota is used up"},
		"lonely":   {diagnose.ImagePull, "Pod", true, "not found", "image"},
		"migrate":  {diagnose.Crash, "Job", true, "ended with exit code 7, its last output: no such table", "kubectl logs migrate-"},
		"n2":       {diagnose.NodeNotReady, "Node", true, "container runtime is down", "polymesh node remove n2"},
		"n3":       {diagnose.NodePressure, "Node", false, "kubelet has disk pressure", "free space"},
	}
	var found map[string]diagnose.Found
	controlplanetest.Eventually(t, "everything is found", func() error {
		later += 16 * time.Second
		found = map[string]diagnose.Found{}
		var names []string
		for _, f := range survey().Findings {
			found[f.Name] = f
			names = append(names, f.Name)
		}
		for name := range wants {
			if _, ok := found[name]; !ok {
				return fmt.Errorf("nothing is found about %s: %q", name, names)
			}
		}
		return nil
	})
	for name, w := range wants {
		f := found[name]
		if f.Reason != w.reason || f.Kind != w.kind || f.Bad != w.bad || !strings.Contains(f.Message, w.message) || !strings.Contains(f.Advice, w.advice) {
			t.Errorf("%s: %+v, want %+v", name, f, w)
		}
		if f.Since.IsZero() || f.Since.After(time.Now().Add(later)) {
			t.Errorf("%s: since %s", name, f.Since)
		}
	}
	if since := found["n2"].Since; time.Since(since) < 59*time.Minute {
		t.Errorf("n2 is not ready since %s", since)
	}
	sorted := survey().Findings
	if i := slices.IndexFunc(sorted, func(f diagnose.Found) bool { return !f.Bad }); i < 0 || slices.ContainsFunc(sorted[i:], func(f diagnose.Found) bool { return f.Bad }) {
		t.Errorf("what does not work at all is not first: %+v", sorted)
	}
	for _, name := range []string{"well", "out", "n1"} {
		if f, ok := found[name]; ok {
			t.Errorf("what is well is reported: %+v", f)
		}
	}

	// What only needs time gets some.
	controlplanetest.Eventually(t, "what has not started for a minute is found", func() error {
		later += 20 * time.Second
		for _, f := range survey().Findings {
			if f.Name == "starting" {
				found["starting"] = f
				return nil
			}
		}
		return fmt.Errorf("nothing after %s", later)
	})
	if f := found["starting"]; f.Reason != diagnose.NotReady || !strings.Contains(f.Message, "is starting") || !strings.Contains(f.Advice, "kubectl describe deployment/starting -n shop") {
		t.Errorf("of what does not start it finds %+v", f)
	}
	// A program that runs for a while between two crashes has crashed all the time.
	since := found["crashing"].Since
	c.status("shop", "crashing", running)
	c.ready("shop", "crashing")
	later += 16 * time.Second
	if slices.ContainsFunc(survey().Findings, func(f diagnose.Found) bool { return f.Name == "crashing" }) {
		t.Error("what is well again is reported")
	}
	c.status("shop", "crashing", crashed)
	controlplanetest.Eventually(t, "the next crash is found", func() error {
		later += 16 * time.Second
		for _, f := range survey().Findings {
			if f.Name == "crashing" {
				found["crashing"] = f
				return nil
			}
		}
		return fmt.Errorf("nothing yet")
	})
	if got := found["crashing"].Since; !got.Equal(since) {
		t.Errorf("it crashes since %s, and not since %s", got, since)
	}
	// What failed long ago is history.
	controlplanetest.Eventually(t, "the job has failed", func() error {
		j, err := client.BatchV1().Jobs("shop").Get(t.Context(), "migrate", metav1.GetOptions{})
		if err == nil && !slices.ContainsFunc(j.Status.Conditions, func(c batchv1.JobCondition) bool {
			return c.Type == batchv1.JobFailed && c.Status == corev1.ConditionTrue
		}) {
			err = fmt.Errorf("it has %+v", j.Status)
		}
		return err
	})
	later += 16 * time.Second
	if !slices.ContainsFunc(survey().Findings, func(f diagnose.Found) bool { return f.Name == "migrate" }) {
		t.Error("a job that has just failed is not reported")
	}
	later += 2 * time.Hour
	for _, f := range survey().Findings {
		if f.Name == "migrate" {
			t.Errorf("a job that failed two hours ago is reported: %+v", f)
		}
	}
}

// held holds requests until their time is over, while it is set for them.
type held struct {
	http.RoundTripper
	these *atomic.Pointer[string]
}

func (h held) RoundTrip(r *http.Request) (*http.Response, error) {
	if these := *h.these.Load(); these != "" && strings.Contains(r.URL.String(), these) {
		<-r.Context().Done()
		return nil, r.Context().Err()
	}
	return h.RoundTripper.RoundTrip(r)
}

// surveyor is one whose requests pass through wrap.
func surveyor(t *testing.T, file string, wrap transport.WrapperFunc) *diagnose.Surveyor {
	t.Helper()
	client, err := kubeconfig.Client(file, func(r *rest.Config) {
		r.QPS = -1
		r.Wrap(wrap)
	})
	if err != nil {
		t.Fatal(err)
	}
	return diagnose.NewSurveyor(client)
}

// TestServer is the other process of TestSurveyWithoutTime.
func TestServer(t *testing.T) { controlplanetest.ServeProcess(t) }

// hasRoom gives a node room for pods.
func hasRoom(n *corev1.Node) {
	n.Status.Allocatable = corev1.ResourceList{corev1.ResourcePods: resource.MustParse("50"), corev1.ResourceCPU: resource.MustParse("4"), corev1.ResourceMemory: resource.MustParse("8Gi")}
	n.Status.Capacity = n.Status.Allocatable
}

// What cannot be found out in time is as it was found last, or is said to be unknown. What is deleted is not wrong.
func TestSurveyWithoutTime(t *testing.T) {
	// A process has its controllers once, and TestSurvey has them.
	file, _ := controlplanetest.StartProcess(t)
	client := controlplanetest.Client(t, file)
	c := &cluster{t, client}
	controlplanetest.ReadyNode(t, client, "n1")
	c.node("n1", hasRoom)
	for _, name := range []string{"shop", "old"} {
		if _, err := client.CoreV1().Namespaces().Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	var hold atomic.Pointer[string]
	hold.Store(new(string))
	s := surveyor(t, file, func(next http.RoundTripper) http.RoundTripper { return held{next, &hold} })
	var ahead atomic.Int64
	pass := func(d time.Duration) { ahead.Add(int64(d)) }
	s.SetClock(func() time.Time { return time.Now().Add(time.Duration(ahead.Load())) })
	survey := func() map[string]diagnose.Found {
		t.Helper()
		pass(16 * time.Second)
		got, err := s.Survey(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		found := map[string]diagnose.Found{}
		for _, f := range got.Findings {
			found[f.Name] = f
		}
		if got.More != 0 {
			t.Errorf("%d are not named", got.More)
		}
		return found
	}
	lonely := func() {
		c.status("shop", "lonely", func(p *corev1.Pod) {
			running(p)
			unready(p)
			p.Status.ContainerStatuses[0].Ready = false
			p.Status.ContainerStatuses[0].State = corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "ImagePullBackOff", Message: "Back-off pulling image \"x\": not found"}}
		})
	}
	c.deployment("shop", "crashing", nil)
	c.status("shop", "crashing", crashed)
	c.pod("shop", "lonely")
	lonely()
	var first map[string]diagnose.Found
	controlplanetest.Eventually(t, "both are found", func() error {
		first = survey()
		if first["crashing"].Reason != diagnose.Crash || first["lonely"].Reason != diagnose.ImagePull {
			return fmt.Errorf("it finds %+v", first)
		}
		return nil
	})
	if !first["crashing"].Checked.IsZero() {
		t.Errorf("what has just been found: %+v", first["crashing"])
	}

	// The API server lists no pods in time.
	c.deployment("shop", "later", nil)
	c.status("shop", "later", crashed)
	pods := "/pods"
	hold.Store(&pods)
	begin := time.Now().Add(time.Duration(ahead.Load()))
	var got map[string]diagnose.Found
	controlplanetest.Eventually(t, "the new one is named", func() error {
		pass(time.Minute)
		got = survey()
		if _, ok := got["later"]; !ok {
			return fmt.Errorf("it finds %+v", got)
		}
		return nil
	})
	for name, want := range first {
		f := got[name]
		if f.Checked.IsZero() || f.Checked.After(begin) {
			t.Errorf("%s was last found at %s, not before %s", name, f.Checked, begin)
		}
		if f.Checked = (time.Time{}); f != want {
			t.Errorf("of %s it is known\n%+v, and now it says\n%+v", name, want, f)
		}
	}
	if f := got["later"]; f.Reason != diagnose.Undetermined || !f.Bad || f.Replicas != 1 || f.Message != "there was no time to find out why" {
		t.Errorf("of what could not be examined it says %+v", f)
	}
	// Who has no time gets no answer, and the survey goes on.
	pass(16 * time.Second)
	short, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if _, err := s.Survey(short); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("without time: %v", err)
	}
	hold.Store(new(string))
	controlplanetest.Eventually(t, "everything is found again", func() error {
		got = survey()
		if f := got["later"]; f.Reason != diagnose.Crash || !f.Checked.IsZero() || !got["crashing"].Checked.IsZero() {
			return fmt.Errorf("it finds %+v", got)
		}
		return nil
	})
	if got["crashing"] != first["crashing"] {
		t.Errorf("it was\n%+v, and is\n%+v", first["crashing"], got["crashing"])
	}

	// Something holds what is deleted.
	for _, at := range [][2]string{{"old", "first"}, {"old", "second"}, {"shop", "third"}} {
		c.deployment(at[0], at[1], nil)
		c.status(at[0], at[1], crashed)
		if _, err := client.AppsV1().Deployments(at[0]).Patch(t.Context(), at[1], types.MergePatchType, []byte(`{"metadata":{"finalizers":["example.com/hold"]}}`), metav1.PatchOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	controlplanetest.Eventually(t, "they crash", func() error {
		if got = survey(); got["first"].Reason != diagnose.Crash || got["second"].Reason != diagnose.Crash || got["third"].Reason != diagnose.Crash {
			return fmt.Errorf("it finds %+v", got)
		}
		return nil
	})
	if err := client.CoreV1().Namespaces().Delete(t.Context(), "old", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := client.AppsV1().Deployments("shop").Delete(t.Context(), "third", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	controlplanetest.Eventually(t, "what is being deleted is not wrong", func() error {
		got = survey()
		for name, f := range got {
			if name == "old" || f.Namespace == "old" || strings.HasPrefix(name, "third") {
				return fmt.Errorf("it finds %+v", f)
			}
		}
		return nil
	})
	controlplanetest.Eventually(t, "the namespace says why it stays", func() error {
		// As a kubelet does when the containers have ended.
		now := int64(0)
		if err := client.CoreV1().Pods("old").DeleteCollection(t.Context(), metav1.DeleteOptions{GracePeriodSeconds: &now}, metav1.ListOptions{}); err != nil {
			return err
		}
		ns, err := client.CoreV1().Namespaces().Get(t.Context(), "old", metav1.GetOptions{})
		if err == nil && !strings.Contains(fmt.Sprint(ns.Status.Conditions), "example.com/hold") {
			err = fmt.Errorf("it has %+v", ns.Status)
		}
		return err
	})
	pass(11 * time.Minute)
	got = survey()
	if f := got["old"]; f.Reason != diagnose.Deleting || f.Kind != "Namespace" || !f.Bad || !strings.Contains(f.Message, "example.com/hold") || time.Since(f.Since) > time.Minute {
		t.Errorf("of the namespace it says %+v", f)
	}
	if f := got["third"]; f.Reason != diagnose.Deleting || f.Kind != "Deployment" || f.Message != "it was deleted and still exists, held by its finalizers: example.com/hold" {
		t.Errorf("of the Deployment it says %+v", f)
	}
	for _, name := range []string{"first", "second"} {
		if f, ok := got[name]; ok {
			t.Errorf("in the namespace it finds %+v", f)
		}
	}
}

type cluster struct {
	t      *testing.T
	client kubernetes.Interface
}

func spec() corev1.PodSpec {
	return corev1.PodSpec{Containers: []corev1.Container{{Name: "app", Image: "x"}}}
}

func (c *cluster) deployment(namespace, name string, change func(*corev1.PodTemplateSpec)) {
	c.t.Helper()
	template := corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: map[string]string{"app": name}}, Spec: spec()}
	if change != nil {
		change(&template)
	}
	d := &appsv1.Deployment{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: appsv1.DeploymentSpec{Selector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": name}}, Template: template}}
	if _, err := c.client.AppsV1().Deployments(namespace).Create(c.t.Context(), d, metav1.CreateOptions{}); err != nil {
		c.t.Fatal(err)
	}
}

func (c *cluster) job(namespace, name string) {
	c.t.Helper()
	template := corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: map[string]string{"app": name}}, Spec: spec()}
	template.Spec.RestartPolicy = corev1.RestartPolicyNever
	j := &batchv1.Job{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: batchv1.JobSpec{BackoffLimit: new(int32), Template: template}}
	if _, err := c.client.BatchV1().Jobs(namespace).Create(c.t.Context(), j, metav1.CreateOptions{}); err != nil {
		c.t.Fatal(err)
	}
}

func (c *cluster) pod(namespace, name string) {
	c.t.Helper()
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"app": name}}, Spec: spec()}
	// The controller of service accounts may need a moment.
	controlplanetest.Eventually(c.t, "create pod "+name, func() error {
		_, err := c.client.CoreV1().Pods(namespace).Create(c.t.Context(), p, metav1.CreateOptions{})
		return err
	})
}

// node sets the status of a node.
func (c *cluster) node(name string, change func(*corev1.Node)) {
	c.t.Helper()
	nodes := c.client.CoreV1().Nodes()
	controlplanetest.Eventually(c.t, "set the status of node "+name, func() error {
		node, err := nodes.Get(c.t.Context(), name, metav1.GetOptions{})
		if err == nil {
			change(node)
			_, err = nodes.UpdateStatus(c.t.Context(), node, metav1.UpdateOptions{})
		}
		return err
	})
}

// status sets the status of the pod of a workload, once it is on a node.
func (c *cluster) status(namespace, app string, change func(*corev1.Pod)) {
	c.t.Helper()
	pods := c.client.CoreV1().Pods(namespace)
	controlplanetest.Eventually(c.t, "set the status of the pod of "+app, func() error {
		list, err := pods.List(c.t.Context(), metav1.ListOptions{LabelSelector: "app=" + app})
		if err != nil {
			return err
		}
		if len(list.Items) == 0 || list.Items[0].Spec.NodeName == "" {
			return fmt.Errorf("it has no node")
		}
		change(&list.Items[0])
		_, err = pods.UpdateStatus(c.t.Context(), &list.Items[0], metav1.UpdateOptions{})
		return err
	})
}

func (c *cluster) ready(namespace, name string) {
	c.t.Helper()
	controlplanetest.Eventually(c.t, name+" is ready", func() error {
		d, err := c.client.AppsV1().Deployments(namespace).Get(c.t.Context(), name, metav1.GetOptions{})
		if err == nil && d.Status.AvailableReplicas != 1 {
			err = fmt.Errorf("it has %+v", d.Status)
		}
		return err
	})
}

func running(p *corev1.Pod) {
	p.Status.Phase = corev1.PodRunning
	p.Status.Conditions = []corev1.PodCondition{
		{Type: corev1.PodScheduled, Status: corev1.ConditionTrue}, {Type: corev1.PodReady, Status: corev1.ConditionTrue, LastTransitionTime: metav1.Now()},
	}
	p.Status.ContainerStatuses = []corev1.ContainerStatus{{Name: "app", Ready: true, State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: metav1.Now()}}}}
}

func unready(p *corev1.Pod) {
	p.Status.Conditions[1].Status = corev1.ConditionFalse
}

func crashed(p *corev1.Pod) {
	running(p)
	unready(p)
	s := &p.Status.ContainerStatuses[0]
	s.Ready, s.RestartCount = false, 4
	s.State = corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "CrashLoopBackOff"}}
	s.LastTerminationState = corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{ExitCode: 3, FinishedAt: metav1.Now()}}
}
