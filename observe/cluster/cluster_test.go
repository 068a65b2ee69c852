package cluster

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/tools/cache"

	"polymesh.dev/polymesh/observe/document"
	"polymesh.dev/polymesh/observe/kubestate"
	"polymesh.dev/polymesh/observe/logstore"
	"polymesh.dev/polymesh/observe/logstore/logstoretest"
	"polymesh.dev/polymesh/observe/rowstore"
)

var _ kubestate.Objects = (*Cluster)(nil)

func openStore(t testing.TB, dir string) *logstore.Store {
	t.Helper()
	return logstoretest.Open(t, rowstore.Options{Dir: dir})
}

// watched returns a Cluster, as Run makes it ready, that has the first list of every kind, which is empty, and no API server.
func watched(t testing.TB, store *logstore.Store) *Cluster {
	t.Helper()
	c := New(Options{Store: store, Log: slog.New(slog.DiscardHandler)})
	if store != nil {
		require.NoError(t, c.recall(context.Background(), time.Now()))
	}
	c.conn.reachable, c.conn.since = true, time.Now().Add(-time.Hour)
	for _, s := range []cache.ReflectorStore{
		c.nodes, c.namespaces, c.pods, c.services, c.claims, c.deployments, c.replicaSets, c.statefulSets, c.daemonSets, c.jobs, c.cronJobs, c.autoscalers,
		c.configs, c.rollouts,
	} {
		require.NoError(t, s.Replace(nil, "1"))
	}
	return c
}

// table returns where objects of a kind go.
func (c *Cluster) storeFor(object any) cache.ReflectorStore {
	switch o := object.(type) {
	case *corev1.Node:
		return c.nodes
	case *corev1.Pod:
		return c.pods
	case *corev1.Service:
		return c.services
	case *corev1.ConfigMap:
		if o.Labels[ConfigLabel] != "" {
			return c.configs
		}
		return c.rollouts
	case *appsv1.Deployment:
		return c.deployments
	case *appsv1.ReplicaSet:
		return c.replicaSets
	case *appsv1.StatefulSet:
		return c.statefulSets
	case *appsv1.DaemonSet:
		return c.daemonSets
	case *batchv1.Job:
		return c.jobs
	case *batchv1.CronJob:
		return c.cronJobs
	case *eventsv1.Event:
		return &c.events
	}
	panic(fmt.Sprintf("%T", object))
}

func (c *Cluster) give(t testing.TB, objects ...runtime.Object) {
	t.Helper()
	for _, o := range objects {
		// The reflector's objects are nobody else's.
		require.NoError(t, c.storeFor(o).Update(o.DeepCopyObject()))
	}
}

func (c *Cluster) take(t testing.TB, objects ...runtime.Object) {
	t.Helper()
	for _, o := range objects {
		require.NoError(t, c.storeFor(o).Delete(o.DeepCopyObject()))
	}
}

// read reads the objects in testdata.
func read(t testing.TB) []runtime.Object {
	t.Helper()
	all, err := os.ReadFile("testdata/objects.yaml")
	require.NoError(t, err)
	var objects []runtime.Object
	for part := range strings.SplitSeq(string(all), "\n---\n") {
		o, _, err := scheme.Codecs.UniversalDeserializer().Decode([]byte(part), nil, nil)
		require.NoError(t, err, part)
		objects = append(objects, o)
	}
	return objects
}

// in returns the first object of a type with a name.
func in[T runtime.Object](t testing.TB, objects []runtime.Object, name string) T {
	t.Helper()
	for _, o := range objects {
		if typed, ok := o.(T); ok && any(o).(metav1.Object).GetName() == name {
			return typed.DeepCopyObject().(T)
		}
	}
	t.Fatalf("no %s", name)
	panic("")
}

// stored returns the entries of a job, the oldest first.
func stored(t testing.TB, s *logstore.Store, job string) []logstore.Entry {
	t.Helper()
	var entries []logstore.Entry
	require.NoError(t, s.Select(context.Background(), logstore.Selector{Matchers: []logstore.Matcher{{Name: "job", Value: job}}}, func(e logstore.Entry) bool {
		entries = append(entries, e)
		return true
	}))
	return entries
}

// textOf returns entries as one line each: labels, metadata and line, without what is another one in each run.
func textOf(entries []logstore.Entry) string {
	var lines []string
	for _, e := range entries {
		var b strings.Builder
		for _, f := range e.Labels {
			fmt.Fprintf(&b, "%s=%s ", f.Name, f.Value)
		}
		b.WriteString("| ")
		for _, f := range slices.SortedFunc(slices.Values(e.Metadata), func(a, b logstore.Field) int { return strings.Compare(a.Name, b.Name) }) {
			if f.Name != "id" {
				fmt.Fprintf(&b, "%s=%s ", f.Name, f.Value)
			}
		}
		b.WriteString("| " + e.Line)
		lines = append(lines, b.String())
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n") + "\n"
}

func golden(t *testing.T, file string, got []byte) {
	t.Helper()
	if *update {
		require.NoError(t, os.WriteFile(file, got, 0o644))
	}
	want, err := os.ReadFile(file)
	require.NoError(t, err)
	require.Equal(t, string(want), string(got), "run the test with -update if this is intended")
}

// TestDocuments shows what is written of the objects in testdata.
func TestDocuments(t *testing.T) {
	store := openStore(t, t.TempDir())
	c := watched(t, store)
	c.give(t, read(t)...)
	c.flush(time.Now())
	entries := stored(t, store, document.Objects)
	var out bytes.Buffer
	for line := range strings.Lines(textOf(entries)) {
		head, doc, ok := strings.Cut(line, "| {")
		require.True(t, ok, line)
		out.WriteString(head + "\n")
		require.NoError(t, json.Indent(&out, []byte("{"+doc), "", "  "))
	}
	golden(t, "testdata/documents.txt", out.Bytes())
	require.NotContains(t, out.String(), "hunter2")
}

// TestTrim: nothing of what is secret, large or others' is kept, neither by the first list nor by a change.
func TestTrim(t *testing.T) {
	c := watched(t, nil)
	objects := read(t)
	c.give(t, objects...)
	kept := func() string {
		var all []any
		for _, p := range c.Pods() {
			all = append(all, p)
		}
		for _, d := range c.Deployments() {
			all = append(all, d)
		}
		for _, n := range c.Nodes() {
			all = append(all, n)
		}
		text, err := json.Marshal(all)
		require.NoError(t, err)
		return string(text)
	}
	require.NotContains(t, kept(), "hunter2")

	// The reflector gives a store its objects trimmed already.
	pod := in[*corev1.Pod](t, objects, "api-7f9c-x1")
	once, err := c.pods.Transformer()(pod)
	require.NoError(t, err)
	text, err := json.Marshal(once)
	require.NoError(t, err)
	twice, err := json.Marshal(trimPod(once))
	require.NoError(t, err)
	require.JSONEq(t, string(text), string(twice))

	huge := in[*corev1.Pod](t, objects, "bare")
	huge.Name = "huge"
	for i := range 5000 {
		huge.Spec.Containers = append(huge.Spec.Containers, corev1.Container{Name: fmt.Sprint("c", i), Image: strings.Repeat("i", 5000)})
		huge.Status.Conditions = append(huge.Status.Conditions, corev1.PodCondition{Type: corev1.PodReady, Reason: strings.Repeat("r", 5000)})
		huge.OwnerReferences = append(huge.OwnerReferences, metav1.OwnerReference{Kind: "Deployment", Name: "x", UID: types.UID(strings.Repeat("u", 5000))})
	}
	huge.Status.Message = strings.Repeat("ü", 50_000)
	before := len(kept())
	c.give(t, huge)
	require.Less(t, len(kept())-before, 128<<10)
	require.NotContains(t, kept(), `\ufffd`)
}

func TestWorkload(t *testing.T) {
	c := watched(t, nil)
	objects := read(t)
	owned := func(name, kind, owner string, uid types.UID) *corev1.Pod {
		p := in[*corev1.Pod](t, objects, "bare")
		p.Name, p.UID, p.OwnerReferences = name, types.UID("uid-"+name), []metav1.OwnerReference{{Kind: kind, Name: owner, UID: uid, Controller: new(true)}}
		return p
	}
	falseSet := in[*appsv1.ReplicaSet](t, objects, "api-7f9c")
	falseSet.Name, falseSet.UID, falseSet.OwnerReferences[0].UID = "false", "uid-false", "uid-of-a-former-api"
	alien := in[*appsv1.ReplicaSet](t, objects, "api-7f9c")
	alien.Name, alien.UID, alien.OwnerReferences[0] = "alien", "uid-alien", metav1.OwnerReference{Kind: "Rollout", Name: "argo", UID: "uid-argo", Controller: new(true)}
	other := owned("elsewhere", kindReplicaSet, "api-7f9c", "uid-api-7f9c")
	other.Namespace = "other"
	follower := owned("follower", kindReplicaSet, "api-7f9c", "uid-api-7f9c")
	follower.OwnerReferences[0].Controller = nil
	c.give(t, objects...)
	c.give(t, falseSet, alien, other, follower,
		owned("right", kindStatefulSet, "db", "uid-db"),
		owned("wrong-uid", kindReplicaSet, "api-7f9c", "uid-of-another"),
		owned("no-owner", kindReplicaSet, "nothing", "uid-api-7f9c"),
		owned("directly", kindDeployment, "api", "uid-api"),
		owned("static", "Node", "node-1", "uid-node"),
		owned("of-false", kindReplicaSet, "false", "uid-false"),
		owned("of-alien", kindReplicaSet, "alien", "uid-alien"),
		owned("circle", kindPod, "circle", "uid-circle"),
	)
	for _, test := range []struct {
		namespace, pod string
		want           Workload
	}{
		{"shop", "api-7f9c-x1", Workload{kindDeployment, "api"}},
		{"shop", "nightly-1-a", Workload{kindCronJob, "nightly"}},
		{"shop", "bare", Workload{kindPod, "bare"}},
		{"shop", "right", Workload{kindStatefulSet, "db"}},
		{"shop", "wrong-uid", Workload{kindPod, "wrong-uid"}},
		{"shop", "no-owner", Workload{kindPod, "no-owner"}},
		{"shop", "directly", Workload{kindPod, "directly"}},
		{"shop", "static", Workload{kindPod, "static"}},
		{"shop", "of-false", Workload{kindReplicaSet, "false"}},
		{"shop", "of-alien", Workload{kindReplicaSet, "alien"}},
		{"shop", "circle", Workload{kindPod, "circle"}},
		{"shop", "follower", Workload{kindPod, "follower"}},
		{"other", "elsewhere", Workload{kindPod, "elsewhere"}},
	} {
		got, ok := c.Workload(test.namespace, test.pod)
		require.True(t, ok, test.pod)
		require.Equal(t, test.want, got, test.pod)
	}
	_, ok := c.Workload("shop", "unknown")
	require.False(t, ok)

	// The owners are deleted first, as by `kubectl delete deployment`, and then the pod.
	c.take(t, in[*appsv1.Deployment](t, objects, "api"), in[*appsv1.ReplicaSet](t, objects, "api-7f9c"))
	x1 := in[*corev1.Pod](t, objects, "api-7f9c-x1")
	x1.ResourceVersion = "2"
	c.give(t, x1)
	got, _ := c.Workload("shop", "api-7f9c-x1")
	require.Equal(t, Workload{kindDeployment, "api"}, got)
	c.take(t, x1)
	got, ok = c.Workload("shop", "api-7f9c-x1")
	require.True(t, ok)
	require.Equal(t, Workload{kindDeployment, "api"}, got)
}

// TestOwnerComesLater: the API server tells of each kind by itself. A new pod has no workload until its owners are there, and no document.
func TestOwnerComesLater(t *testing.T) {
	store := openStore(t, t.TempDir())
	c := watched(t, store)
	objects := read(t)
	pod := in[*corev1.Pod](t, objects, "api-7f9c-x1")
	pod.CreationTimestamp = metav1.Now()
	now := time.Now()
	c.give(t, pod)
	_, ok := c.Workload("shop", pod.Name)
	require.False(t, ok)
	c.flush(now)
	require.Empty(t, stored(t, store, document.Objects))
	c.give(t, in[*appsv1.ReplicaSet](t, objects, "api-7f9c"))
	_, ok = c.Workload("shop", pod.Name)
	require.False(t, ok)
	c.give(t, in[*appsv1.Deployment](t, objects, "api"))
	c.flush(now.Add(tick))
	got, ok := c.Workload("shop", pod.Name)
	require.True(t, ok)
	require.Equal(t, Workload{kindDeployment, "api"}, got)
	entries := stored(t, store, document.Objects)
	require.Len(t, entries, 1)
	require.Contains(t, entries[0].Line, pod.Name)
}

// TestGoneIsBounded: not every pod that ever was is remembered.
func TestGoneIsBounded(t *testing.T) {
	c := watched(t, nil)
	p := in[*corev1.Pod](t, read(t), "bare")
	for i := range maxGone + 100 {
		p.Name, p.UID = fmt.Sprint("p", i), types.UID(fmt.Sprint("uid", i))
		c.give(t, p)
		c.take(t, p)
	}
	require.Len(t, c.owners.gone, maxGone)
	require.Len(t, c.owners.order, maxGone)
	require.Empty(t, c.owners.of)
	require.Empty(t, c.owners.pods)
	_, ok := c.Workload("shop", "p0")
	require.False(t, ok)
	_, ok = c.Workload("shop", fmt.Sprint("p", maxGone+99))
	require.True(t, ok)
}

// TestRhythm shows when documents are written.
func TestRhythm(t *testing.T) {
	store := openStore(t, t.TempDir())
	c := watched(t, store)
	objects := read(t)
	start := time.Now()
	deployment, pod := in[*appsv1.Deployment](t, objects, "api"), in[*corev1.Pod](t, objects, "api-7f9c-x2")
	c.flush(start) // of nothing
	c.give(t, deployment, in[*appsv1.ReplicaSet](t, objects, "api-7f9c"), pod)
	at := func(after time.Duration) []string {
		before := len(stored(t, store, document.Objects))
		c.flush(start.Add(after))
		var lines []string
		// Entries of the same time have no order.
		for _, e := range stored(t, store, document.Objects)[before:] {
			lines = append(lines, e.Line)
		}
		return lines
	}
	require.Len(t, at(time.Second), 1)
	require.Empty(t, at(2*time.Second), "nothing has changed")

	deployment.Status.ReadyReplicas = 3
	c.give(t, deployment)
	require.Empty(t, at(3*time.Second), "too early")
	require.Len(t, at(6*time.Second), 1)

	deployment.ResourceVersion, deployment.Annotations["x"] = "7", "y"
	c.give(t, deployment)
	require.Empty(t, at(12*time.Second), "a change that is not shown")

	// A pod that ended is in one document as such, and not in the next.
	c.take(t, pod)
	lines := at(18 * time.Second)
	require.Len(t, lines, 1)
	require.Contains(t, lines[0], `"deleted":true`)
	lines = at(24 * time.Second)
	require.Len(t, lines, 1)
	require.NotContains(t, lines[0], pod.Name)

	require.Len(t, at(snapshotEvery), 1, "all objects, changed or not")
	require.Empty(t, at(snapshotEvery+6*time.Second))

	// Pods that are deleted with their owner.
	c.give(t, pod)
	require.Len(t, at(snapshotEvery+12*time.Second), 1)
	c.take(t, deployment)
	lines = at(snapshotEvery + 18*time.Second)
	require.Len(t, lines, 1)
	require.Contains(t, lines[0], `"deleted":"`)
	require.Contains(t, lines[0], pod.Name)
	c.take(t, pod)
	require.Len(t, at(snapshotEvery+24*time.Second), 1)
	require.Empty(t, at(2*snapshotEvery+30*time.Second), "it is gone")
	require.Empty(t, c.documents.records)
}

// TestManyPods: a document has room for some.
func TestManyPods(t *testing.T) {
	store := openStore(t, t.TempDir())
	c := watched(t, store)
	objects := read(t)
	c.give(t, in[*appsv1.Deployment](t, objects, "api"), in[*appsv1.ReplicaSet](t, objects, "api-7f9c"))
	pod := in[*corev1.Pod](t, objects, "api-7f9c-x1")
	pod.Status.Conditions[0].Status = corev1.ConditionTrue
	for i := range 1000 {
		pod.Name, pod.UID = fmt.Sprint("p", i), types.UID(fmt.Sprint("uid", i))
		c.give(t, pod)
	}
	bad := in[*corev1.Pod](t, objects, "api-7f9c-x2")
	c.give(t, bad)
	c.flush(time.Now())
	entries := stored(t, store, document.Objects)
	require.Len(t, entries, 1)
	require.LessOrEqual(t, len(entries[0].Line), maxDocument)
	require.Greater(t, len(entries[0].Line), maxDocument/2)
	var doc document.Workload
	require.NoError(t, json.Unmarshal([]byte(entries[0].Line), &doc))
	require.Equal(t, 1001, len(doc.Pods)+doc.More)
	require.Equal(t, bad.Name, doc.Pods[0].Name, "what is not ready is shown first")
}

// TestMarks shows what is written when something happens.
func TestMarks(t *testing.T) {
	store := openStore(t, t.TempDir())
	c := watched(t, store)
	objects := read(t)
	c.give(t, objects...)
	c.flush(time.Now())
	require.Empty(t, stored(t, store, document.Events), "what was before the store is no news")

	ago := func(d time.Duration) metav1.Time { return metav1.NewTime(time.Now().Add(-d).Truncate(time.Second)) }
	pod := in[*corev1.Pod](t, objects, "api-7f9c-x1")
	app := &pod.Status.ContainerStatuses[0]
	// Killed for memory: first its state, then that it is started again.
	killed := &corev1.ContainerStateTerminated{ExitCode: 137, Reason: "OOMKilled", FinishedAt: ago(30 * time.Second)}
	app.State = corev1.ContainerState{Terminated: killed}
	c.give(t, pod)
	app.State = corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "CrashLoopBackOff"}}
	app.LastTerminationState = corev1.ContainerState{Terminated: killed}
	c.give(t, pod)
	app.RestartCount = 5
	c.give(t, pod)
	// Ended by itself, with the next status only.
	app.RestartCount = 6
	app.LastTerminationState = corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{ExitCode: 1, Reason: "Error", FinishedAt: ago(10 * time.Second)}}
	c.give(t, pod, pod)

	evicted := in[*corev1.Pod](t, objects, "bare")
	evicted.Status.Phase, evicted.Status.Reason, evicted.Status.Message = corev1.PodFailed, "Evicted", "the node was low on memory"
	c.give(t, evicted, evicted)

	deployment := in[*appsv1.Deployment](t, objects, "api")
	deployment.Spec.Template.Spec.Containers[0].Image = "shop/api:3"
	c.give(t, deployment)
	deployment.Annotations[revisionAnnotation] = "4"
	c.give(t, deployment, deployment)

	set := in[*appsv1.StatefulSet](t, objects, "db")
	set.Status.UpdateRevision = "db-6"
	c.give(t, set)

	created := in[*appsv1.DaemonSet](t, objects, "agent")
	created.Name, created.UID, created.CreationTimestamp = "new", "uid-new", ago(5*time.Second)
	c.give(t, created)

	node := in[*corev1.Node](t, objects, "node-1")
	node.Status.Conditions[0] = corev1.NodeCondition{Type: corev1.NodeReady, Status: corev1.ConditionUnknown, Message: "Kubelet stopped posting node status.", LastTransitionTime: ago(20 * time.Second)}
	c.give(t, node, node)
	node.Status.Conditions[0] = corev1.NodeCondition{Type: corev1.NodeReady, Status: corev1.ConditionTrue, LastTransitionTime: ago(time.Second)}
	c.give(t, node)

	c.flush(time.Now())
	golden(t, "testdata/marks.txt", []byte(textOf(stored(t, store, document.Events))))

	// The next process has the same objects, and nothing to tell.
	n := len(stored(t, store, document.Events))
	next := watched(t, store)
	next.give(t, objects...)
	next.give(t, pod, evicted, deployment, set, created, node)
	next.flush(time.Now())
	require.Len(t, stored(t, store, document.Events), n)
}

// TestWhileAway: what has happened while the store was not there.
func TestWhileAway(t *testing.T) {
	store := openStore(t, t.TempDir())
	c := watched(t, store)
	objects := read(t)
	c.give(t, objects...)
	c.flush(time.Now())

	next := watched(t, store)
	// Before there is an API server.
	got, ok := next.Workload("shop", "api-7f9c-x1")
	require.True(t, ok)
	require.Equal(t, Workload{kindDeployment, "api"}, got)

	deployment := in[*appsv1.Deployment](t, objects, "api")
	deployment.Spec.Template.Spec.Containers[0].Image, deployment.Annotations[revisionAnnotation] = "shop/api:3", "4"
	pod := in[*corev1.Pod](t, objects, "api-7f9c-x1")
	pod.Status.ContainerStatuses[0].RestartCount++
	pod.Status.ContainerStatuses[0].LastTerminationState.Terminated.FinishedAt = metav1.Now()
	next.give(t, deployment, in[*appsv1.ReplicaSet](t, objects, "api-7f9c"), pod)
	n := len(stored(t, store, document.Objects))
	next.flush(time.Now().Add(time.Second))
	var lines []string
	for _, e := range stored(t, store, document.Events) {
		lines = append(lines, e.Line)
	}
	require.ElementsMatch(t, []string{"deployment api: shop/api:2 → shop/api:3", "container app of pod api-7f9c-x1 was killed at its memory limit"}, lines)
	// All the other workloads are gone.
	var gone []string
	for _, e := range stored(t, store, document.Objects)[n:] {
		if strings.Contains(e.Line, `"deleted":"`) {
			gone = append(gone, logstore.Value(e.Metadata, "kind")+" "+logstore.Value(e.Labels, "workload"))
		}
	}
	slices.Sort(gone)
	require.Equal(t, []string{"CronJob nightly", "DaemonSet agent", "Job import", "Pod bare", "StatefulSet db"}, gone)
}

func TestRollout(t *testing.T) {
	store := openStore(t, t.TempDir())
	c := watched(t, store)
	c.give(t, in[*appsv1.Deployment](t, read(t), "api"))
	started := time.Now().Add(-time.Minute).UTC().Truncate(time.Second)
	state := map[string]any{
		"name": "api", "namespace": "shop", "container": "app", "image": "shop/api:3", "previous": "shop/api:2", "versionLabel": "version", "started": started, "phase": "Starting",
		"step": -1, "weight": 0, "plan": map[string]any{"steps": []int{10, 100}, "interval": "30s", "maxErrorRate": 1.5, "maxP99": "500ms", "minRequests": 10, "timeout": "5m"},
	}
	record := func(change map[string]any) *corev1.ConfigMap {
		for k, v := range change {
			state[k] = v
		}
		text, err := json.Marshal(state)
		require.NoError(t, err)
		return &corev1.ConfigMap{
			ObjectMeta: metav1.ObjectMeta{Name: "polymesh-rollout-api", Namespace: "shop", UID: "uid-rollout", Labels: map[string]string{rolloutLabel: "api"}},
			Data:       map[string]string{"state": string(text)},
		}
	}
	now := time.Now()
	var last *corev1.ConfigMap
	for i, change := range []map[string]any{
		{},
		{"phase": "Running", "step": 0, "weight": 10},
		{"phase": "Running"},
		{"step": 1, "weight": 100, "done": []any{map[string]any{"weight": 10, "canary": map[string]any{"requests": 5, "errorRate": 50, "p99": "12ms", "timed": 5}, "stable": map[string]any{"p99": "1s"}}}},
		{"phase": "RolledBack", "reason": "50 % of the requests failed", "ended": now.UTC().Truncate(time.Second), "final": "shop/api:2"},
	} {
		last = record(change)
		c.give(t, last)
		c.flush(now.Add(time.Duration(i) * time.Second))
	}
	lines := func(job string) (text string) {
		for _, e := range stored(t, store, job) {
			require.Equal(t, "shop", logstore.Value(e.Labels, "namespace"))
			require.Equal(t, "api", logstore.Value(e.Labels, "workload"))
			text += logstore.Value(e.Metadata, "reason") + " " + e.Line + "\n"
		}
		return text
	}
	want := `RolloutStarted rollout of api: canary with shop/api:3 beside shop/api:2
RolloutStep rollout of api: the canary gets 10 % of the requests
RolloutStep rollout of api: the canary gets 100 % of the requests
RolloutEnded rollout of api: rolled back to shop/api:2: 50 % of the requests failed
`
	sorted := func(s string) []string { return slices.Sorted(strings.Lines(s)) }
	require.Equal(t, sorted(want), sorted(lines(document.Events)))
	states := stored(t, store, document.Rollouts)
	require.Len(t, states, 5)
	var s document.Rollout
	require.NoError(t, json.Unmarshal([]byte(states[4].Line), &s))
	require.Equal(t, "RolledBack", s.Phase)
	require.Equal(t, 12*time.Millisecond, s.Done[0].Canary.P99.Duration)

	next := watched(t, store)
	next.give(t, last)
	next.flush(time.Now())
	require.Equal(t, sorted(want), sorted(lines(document.Events)))
	require.Len(t, stored(t, store, document.Rollouts), 5)

	// Whoever may write ConfigMaps can write these.
	for name, change := range map[string]func(*corev1.ConfigMap){
		"another namespace": func(m *corev1.ConfigMap) { m.Namespace = "other" },
		"another name":      func(m *corev1.ConfigMap) { m.Name = "polymesh-rollout-web" },
		"no JSON":           func(m *corev1.ConfigMap) { m.Data["state"] = "{" },
		"nothing":           func(m *corev1.ConfigMap) { m.Data = nil },
		"no numbers": func(m *corev1.ConfigMap) {
			m.Data["state"] = `{"name":"api","namespace":"shop","phase":"Running","step":"x"}`
		},
		"too large": func(m *corev1.ConfigMap) { m.Data["state"] += strings.Repeat(" ", maxRollout) },
	} {
		m := record(nil)
		change(m)
		require.Nil(t, readRollout(m), name)
	}
	long := record(map[string]any{"reason": strings.Repeat("x", 60_000), "plan": map[string]any{"steps": make([]int, 1000)}})
	r := readRollout(long)
	require.NotNil(t, r)
	require.Less(t, len(encode(r.state)), 8<<10)
}

func event(name string, count int32) *eventsv1.Event {
	e := &eventsv1.Event{
		ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "shop", UID: types.UID("uid-" + name), CreationTimestamp: metav1.Now()},
		EventTime:  metav1.NowMicro(), Regarding: corev1.ObjectReference{Kind: "Pod", Namespace: "shop", Name: "api-7f9c-x1", UID: "uid-x1", FieldPath: "spec.containers{app}"},
		Reason: "BackOff", Type: "Warning", Note: "Back-off restarting failed container", ReportingController: "kubelet", Action: "Start",
	}
	if count > 1 {
		e.Series = &eventsv1.EventSeries{Count: count, LastObservedTime: metav1.NowMicro()}
	}
	return e
}

func TestEvents(t *testing.T) {
	store := openStore(t, t.TempDir())
	c := watched(t, store)
	c.give(t, read(t)...)
	c.give(t, event("a", 1), event("a", 1))
	c.flush(time.Now())
	golden(t, "testdata/event.txt", []byte(textOf(stored(t, store, document.Events))))

	for n := int32(2); n <= 20; n++ {
		c.give(t, event("a", n))
	}
	c.flush(time.Now())
	var counts []string
	for _, e := range stored(t, store, document.Events) {
		counts = append(counts, logstore.Value(e.Metadata, "count"))
	}
	require.Equal(t, []string{"1", "2", "4", "8", "16"}, counts, "one that repeats itself is written when there are twice as many")

	next := watched(t, store)
	next.give(t, read(t)...)
	require.NoError(t, next.events.Replace([]any{event("a", 16), event("b", 1)}, "9"))
	next.flush(time.Now())
	entries := stored(t, store, document.Events)
	require.Len(t, entries, 6, "the next process writes only the new one")
	require.NoError(t, next.events.Delete(event("a", 16)))
	require.Len(t, next.events.seen, 1)
}

// TestHostileEvents: any user can write events, about anything and as many as they like.
func TestHostileEvents(t *testing.T) {
	store := openStore(t, t.TempDir())
	c := watched(t, store)
	c.give(t, read(t)...)
	other := event("other", 1)
	other.Namespace, other.Regarding.Namespace = "evil", "shop"
	wrong := event("wrong", 1)
	wrong.Regarding.UID = "uid-of-another"
	deployment := event("deployment", 1)
	deployment.Regarding = corev1.ObjectReference{Kind: "Deployment", Name: "api", UID: "uid-api"}
	forged := event("forged", 1)
	forged.Regarding = corev1.ObjectReference{Kind: "Deployment", Name: "api"}
	forged.Reason, forged.ReportingController = Deployed, document.Polymesh
	future := event("future", 1)
	future.EventTime = metav1.NewMicroTime(time.Now().Add(1000 * time.Hour))
	past := event("past", 1)
	past.EventTime = metav1.NewMicroTime(time.Unix(0, 0))
	long := event("long", 1)
	long.Note, long.Reason, long.Regarding.Name, long.Regarding.Kind = strings.Repeat("\xff", 100_000), strings.Repeat("r", 100_000), strings.Repeat("n", 100_000), strings.Repeat("k", 100_000)
	c.give(t, other, wrong, deployment, forged, future, past, long)
	c.flush(time.Now().Add(ownerWait + time.Second))
	got := map[string]logstore.Entry{}
	for _, e := range stored(t, store, document.Events) {
		require.WithinDuration(t, time.Now(), e.Time, time.Minute)
		require.Equal(t, document.Kubernetes, logstore.Value(e.Metadata, "source"))
		got[logstore.Value(e.Labels, "namespace")+" "+logstore.Value(e.Labels, "workload")+" "+logstore.Value(e.Metadata, "kind")] = e
	}
	require.Len(t, stored(t, store, document.Events), 7)
	require.Contains(t, got, "evil  Pod", "an event is of its namespace")
	require.Contains(t, got, "shop  Pod", "not about this pod")
	require.Contains(t, got, "shop api Deployment")
	require.Contains(t, got, "shop  Deployment")

	before := len(stored(t, store, document.Events))
	for i := range 5000 {
		c.give(t, event(fmt.Sprint("flood", i), 1))
	}
	c.flush(time.Now().Add(2 * time.Minute))
	entries := stored(t, store, document.Events)
	require.Less(t, len(entries)-before, 2*eventsBurst)
	require.True(t, slices.ContainsFunc(entries, func(e logstore.Entry) bool { return strings.Contains(e.Line, "events of namespace shop are left out") }))
	require.Positive(t, c.Numbers()["events_left_out"])
}

func TestConfigs(t *testing.T) {
	m := func(name, kind, data string, age time.Duration) *corev1.ConfigMap {
		return trimConfig(&corev1.ConfigMap{
			ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "shop", Labels: map[string]string{ConfigLabel: kind, "other": "x"}, CreationTimestamp: metav1.NewTime(time.Now().Add(-age))},
			Data:       map[string]string{"prometheus.yml": data}, BinaryData: map[string][]byte{"x": make([]byte, 1<<20)},
		})
	}
	configs, problems := chooseConfigs([]*corev1.ConfigMap{
		m("b", Scrape, "scrape_configs: []", time.Hour), m("a", Rules, "groups: []", time.Minute), m("c", "other", "", time.Hour), m("d", Scrape, strings.Repeat("x", maxConfigBytes+1), time.Hour),
	})
	require.Equal(t, []Config{
		{"shop", "a", Rules, map[string]string{"prometheus.yml": "groups: []"}}, {"shop", "b", Scrape, map[string]string{"prometheus.yml": "scrape_configs: []"}},
	}, configs)
	require.Len(t, problems, 2)
	require.Contains(t, problems[0].message, `must be "scrape" or "rules"`)
	require.Contains(t, problems[1].message, "nothing of it is used")

	// Those that were first stay.
	var many []*corev1.ConfigMap
	for i := range 200 {
		many = append(many, m(fmt.Sprintf("m%03d", i), Scrape, "x", time.Duration(i)*time.Minute))
	}
	configs, problems = chooseConfigs(many)
	require.Len(t, configs, maxConfigs)
	require.Len(t, problems, 200-maxConfigs)
	require.Equal(t, "m199", configs[maxConfigs-1].Name)
	var large []*corev1.ConfigMap
	for i := range 20 {
		large = append(large, m(fmt.Sprintf("l%03d", i), Scrape, strings.Repeat("x", maxConfigBytes-100), time.Duration(i)*time.Minute))
	}
	configs, problems = chooseConfigs(large)
	require.Len(t, configs, maxConfigsSum/maxConfigBytes)
	require.Len(t, problems, 20-maxConfigsSum/maxConfigBytes)
}

// TestStoreRefuses: with a full disk entries are dropped and counted, and the documents are written when there is room.
func TestStoreRefuses(t *testing.T) {
	dir := t.TempDir()
	full := openStore(t, dir)
	require.NoError(t, full.Close())
	readOnly := logstoretest.Open(t, rowstore.Options{Dir: dir, ReadOnly: true})
	c := watched(t, readOnly)
	c.give(t, read(t)...)
	now := time.Now()
	c.flush(now)
	require.NotEmpty(t, c.Problem())
	require.Positive(t, c.Numbers()["entries_dropped"])
	dropped := c.Numbers()["entries_dropped"]
	c.flush(now.Add(30 * time.Second))
	require.Equal(t, dropped, c.Numbers()["entries_dropped"], "not again and again")
	require.NoError(t, readOnly.Close())

	c.opts.Store = openStore(t, dir)
	c.flush(now.Add(writeRetry + time.Second))
	require.Empty(t, c.Problem())
	require.NotEmpty(t, stored(t, c.opts.Store, document.Objects))
}

// TestTableIsBounded: a user who may create objects cannot make the store large.
func TestTableIsBounded(t *testing.T) {
	c := watched(t, nil)
	s := in[*corev1.Service](t, read(t), "api")
	for i := range maxObjects + 10 {
		s.Name = fmt.Sprint("s", i)
		c.give(t, s)
	}
	require.Len(t, c.Services(), maxObjects)
	require.EqualValues(t, 10, c.Numbers()["objects_left_out"])
}

func BenchmarkDocuments(b *testing.B) {
	c := watched(b, openStore(b, b.TempDir()))
	objects := read(b)
	pod := in[*corev1.Pod](b, objects, "api-7f9c-x1")
	for i := range 1000 {
		d, r := in[*appsv1.Deployment](b, objects, "api"), in[*appsv1.ReplicaSet](b, objects, "api-7f9c")
		if i%4 == 0 {
			d.Name, r.Name = fmt.Sprint("d", i), fmt.Sprint("r", i)
			d.UID, r.UID = types.UID("uid-"+d.Name), types.UID("uid-"+r.Name)
			r.OwnerReferences[0].Name, r.OwnerReferences[0].UID = d.Name, d.UID
			c.give(b, d, r)
			pod.OwnerReferences[0].Name, pod.OwnerReferences[0].UID = r.Name, r.UID
		}
		pod.Name, pod.UID = fmt.Sprint("p", i), types.UID(fmt.Sprint("uid", i))
		pod.Spec.Containers[0].Resources.Requests = corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("1")}
		c.give(b, pod)
	}
	b.ReportAllocs()
	now := time.Now()
	for b.Loop() {
		now = now.Add(snapshotEvery)
		c.mu.Lock()
		entries := c.dueDocuments(now)
		c.mu.Unlock()
		if len(entries) != 250 {
			b.Fatal(len(entries))
		}
	}
}
