package cluster

import (
	"context"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/watch"
	dynamicfake "k8s.io/client-go/dynamic/fake"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"

	"polymesh.dev/polymesh/pkg/diagnose"
	"polymesh.dev/polymesh/pkg/progress"
	"polymesh.dev/polymesh/pkg/workflow/project"
)

var deployments = appsv1.SchemeGroupVersion.WithResource("deployments")

// deployment has one replica, ready or not.
func deployment(ready bool) *unstructured.Unstructured {
	status := map[string]any{"replicas": int64(1), "updatedReplicas": int64(1)}
	if ready {
		status["availableReplicas"], status["readyReplicas"] = int64(1), int64(1)
	}
	return &unstructured.Unstructured{Object: map[string]any{"apiVersion": "apps/v1", "kind": "Deployment", "metadata": map[string]any{"name": "api", "namespace": "default"},
		"spec": map[string]any{"replicas": int64(1), "selector": map[string]any{"matchLabels": map[string]any{"app": "api"}}}, "status": status}}
}

func newCluster(t *testing.T, live ...runtime.Object) (*Cluster, *dynamicfake.FakeDynamicClient) {
	t.Helper()
	client := dynamicfake.NewSimpleDynamicClient(runtime.NewScheme(), live...)
	mapper := meta.NewDefaultRESTMapper(nil)
	mapper.Add(appsv1.SchemeGroupVersion.WithKind("Deployment"), meta.RESTScopeNamespace)
	return &Cluster{Client: fake.NewClientset(), Dynamic: client, Mapper: mapper}, client
}

// named is the workload as a caller names it, without a namespace.
func named() project.Object {
	return project.NewObject(map[string]any{"apiVersion": "apps/v1", "kind": "Deployment", "metadata": map[string]any{"name": "api"}})
}

// opened returns a channel that is closed when a watch of the client is open.
func opened(client *dynamicfake.FakeDynamicClient) <-chan struct{} {
	open := make(chan struct{})
	client.PrependWatchReactor("deployments", func(action clienttesting.Action) (bool, watch.Interface, error) {
		w, err := client.Tracker().Watch(action.GetResource(), action.GetNamespace())
		select {
		case <-open:
		default:
			close(open)
		}
		return true, w, err
	})
	return open
}

// A workload that becomes ready is noticed when it does: it is read once, and then watched.
func TestAwaitWatches(t *testing.T) {
	c, client := newCluster(t, deployment(false))
	open := opened(client)
	o := named()
	done := make(chan error, 1)
	go func() {
		_, err := c.Await(t.Context(), progress.New(io.Discard), o, nil)
		done <- err
	}()
	<-open
	if _, err := client.Resource(deployments).Namespace("default").Update(t.Context(), deployment(true), metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	reads := 0
	for _, action := range client.Actions() {
		if action.GetVerb() == "get" {
			reads++
		}
	}
	if reads != 1 {
		t.Errorf("it was read %d times", reads)
	}
	if o.GetNamespace() != "" {
		t.Errorf("the caller's object was changed: namespace %q", o.GetNamespace())
	}
}

// A user who may not watch waits nevertheless.
func TestAwaitWithoutWatch(t *testing.T) {
	c, client := newCluster(t, deployment(false))
	client.PrependWatchReactor("deployments", func(clienttesting.Action) (bool, watch.Interface, error) {
		return true, nil, apierrors.NewForbidden(schema.GroupResource{Resource: "deployments"}, "", errors.New("no watch"))
	})
	reads := 0
	client.PrependReactor("get", "deployments", func(clienttesting.Action) (bool, runtime.Object, error) {
		reads++
		return true, deployment(reads > 1), nil
	})
	if _, err := c.Await(t.Context(), progress.New(io.Discard), named(), nil); err != nil {
		t.Error(err)
	}
}

// When the time is over, the findings say why, with their places.
func TestAwaitExpires(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, _ := newCluster(t, deployment(false))
		c.Client = fake.NewClientset(&corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "api-1", Namespace: "default", Labels: map[string]string{"app": "api"}},
			Status: corev1.PodStatus{Conditions: []corev1.PodCondition{{Type: corev1.PodScheduled, Status: corev1.ConditionFalse, Message: "0/1 nodes are available: 1 Insufficient cpu."}}},
			Spec:   corev1.PodSpec{Containers: []corev1.Container{{Name: "api"}}}})
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		findings, err := c.Await(ctx, progress.New(io.Discard), named(), func([]diagnose.Place) string { return "k8s/a.yaml:7" })
		if !errors.Is(err, ErrNotReady) || len(findings) != 1 || findings[0].Reason != diagnose.Unschedulable || findings[0].At != "k8s/a.yaml:7" {
			t.Errorf("%v, %v", findings, err)
		}
	})
}

func TestAwaitMissing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, _ := newCluster(t)
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		findings, err := c.Await(ctx, progress.New(io.Discard), named(), nil)
		if !errors.Is(err, ErrNotReady) || len(findings) != 1 || findings[0].Reason != diagnose.NotReady {
			t.Errorf("%v, %v", findings, err)
		}
		ctx, cancel = context.WithCancel(t.Context())
		cancel()
		if _, err := c.Await(ctx, progress.New(io.Discard), named(), nil); !errors.Is(err, context.Canceled) {
			t.Errorf("given up: %v", err)
		}
	})
}

func TestAwaitGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, client := newCluster(t, deployment(true))
		m, err := c.Mapper.RESTMapping(schema.GroupKind{Group: "apps", Kind: "Deployment"}, "v1")
		if err != nil {
			t.Fatal(err)
		}
		open := opened(client)
		done := make(chan error, 1)
		go func() { done <- c.AwaitGone(t.Context(), m, "default", "api") }()
		<-open
		if err := client.Resource(deployments).Namespace("default").Delete(t.Context(), "api", metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		if err := <-done; err != nil {
			t.Error(err)
		}
		if err := c.AwaitGone(t.Context(), m, "default", "none"); err != nil {
			t.Errorf("what does not exist: %v", err)
		}
		if _, err := client.Resource(deployments).Namespace("default").Create(t.Context(), deployment(true), metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		if err := c.AwaitGone(ctx, m, "default", "api"); err == nil || !strings.HasPrefix(err.Error(), "deployment.apps/api -n default is still there") {
			t.Errorf("what stays: %v", err)
		}
	})
}

func TestFailsForGood(t *testing.T) {
	since := map[diagnose.Reason]time.Time{}
	final := []diagnose.Finding{{Reason: diagnose.Crash, Final: true}}
	if failsForGood(final, since) {
		t.Error("a finding ends the wait at once")
	}
	since[diagnose.Crash] = time.Now().Add(-permanentFailureGrace)
	if !failsForGood(final, since) {
		t.Error("a finding that stays does not end the wait")
	}
	since[diagnose.Crash] = time.Now().Add(-permanentFailureGrace)
	if failsForGood(nil, since) || failsForGood(final, since) {
		t.Error("a finding that was gone in between ends the wait")
	}
}
