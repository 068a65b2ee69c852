package main

import (
	"context"
	"fmt"
	"slices"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"

	"polymesh.dev/polymesh/test/e2e/node"
)

const (
	manyPods = 30
	// singles is how often a single pod is started in each run.
	singles = 5
)

// podStarts measures from the creation of a Deployment to the readiness of its pods, with and without a sidecar.
func (b *bench) podStarts(ctx context.Context, n *node.Node) error {
	if err := b.importArchives(ctx, n, "e2e/echo.tar"); err != nil {
		return err
	}
	client, err := n.NewClient()
	if err != nil {
		return err
	}
	for _, kind := range []struct {
		namespace       string
		injection       string
		one, many, each figureID
	}{
		{"bench-plain", "disabled", plainOne, plainMany, plainEach},
		{"bench-sidecar", "enabled", sidecarOne, sidecarMany, sidecarEach},
	} {
		ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: kind.namespace, Labels: map[string]string{"istio-injection": kind.injection}}}
		if _, err := client.CoreV1().Namespaces().Create(ctx, ns, metav1.CreateOptions{}); err != nil {
			return err
		}
		// The first pod of a namespace also waits for its service account.
		if _, err := startPods(ctx, client, kind.namespace, 1); err != nil {
			return err
		}
		for range singles {
			took, err := startPods(ctx, client, kind.namespace, 1)
			if err != nil {
				return err
			}
			b.results.add(kind.one, took[0])
		}
		took, err := startPods(ctx, client, kind.namespace, manyPods)
		if err != nil {
			return err
		}
		b.results.add(kind.many, took[len(took)-1])
		b.results.add(kind.each, median(took))
	}
	return nil
}

// startPods starts a number of pods at once and removes them. It returns when each was Ready, in seconds, the
// first one first.
func startPods(ctx context.Context, client kubernetes.Interface, namespace string, count int32) (took []float64, err error) {
	ctx, cancel := context.WithTimeout(ctx, startLimit)
	defer cancel()
	labels := map[string]string{"app": "echo"}
	grace := int64(1)
	deployment := &appsv1.Deployment{
		ObjectMeta: metav1.ObjectMeta{Name: "echo", Namespace: namespace},
		Spec: appsv1.DeploymentSpec{
			Replicas: &count,
			Selector: &metav1.LabelSelector{MatchLabels: labels},
			Template: corev1.PodTemplateSpec{
				ObjectMeta: metav1.ObjectMeta{Labels: labels},
				Spec: corev1.PodSpec{
					TerminationGracePeriodSeconds: &grace,
					Containers: []corev1.Container{{
						Name: "echo", Image: echoImage,
						ReadinessProbe: &corev1.Probe{
							ProbeHandler:  corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Path: "/healthz", Port: intstr.FromInt32(8080)}},
							PeriodSeconds: 1,
						},
					}},
				},
			},
		},
	}
	// An informer reconnects when the API server ends its watch, which may happen under load.
	became := make(chan string, 1000)
	seen := func(o any) {
		if pod := o.(*corev1.Pod); pod.DeletionTimestamp == nil && slices.ContainsFunc(pod.Status.Conditions, isReady) {
			became <- pod.Name
		}
	}
	_, informer := cache.NewInformerWithOptions(cache.InformerOptions{
		ListerWatcher: cache.NewListWatchFromClient(client.CoreV1().RESTClient(), "pods", namespace, fields.Everything()),
		ObjectType:    &corev1.Pod{},
		Handler:       cache.ResourceEventHandlerFuncs{AddFunc: seen, UpdateFunc: func(_, o any) { seen(o) }},
	})
	go informer.RunWithContext(ctx)
	if !cache.WaitForCacheSync(ctx.Done(), informer.HasSynced) {
		return nil, fmt.Errorf("watch the pods in %s: %w", namespace, ctx.Err())
	}
	begin := time.Now()
	if _, err := client.AppsV1().Deployments(namespace).Create(ctx, deployment, metav1.CreateOptions{}); err != nil {
		return nil, err
	}
	ready := map[string]bool{}
	for len(took) < int(count) {
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("%d of %d pods in %s are Ready: %w", len(took), count, namespace, ctx.Err())
		case name := <-became:
			if !ready[name] {
				ready[name] = true
				took = append(took, time.Since(begin).Seconds())
			}
		}
	}
	return took, removePods(ctx, client, namespace)
}

func isReady(c corev1.PodCondition) bool {
	return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
}

func removePods(ctx context.Context, client kubernetes.Interface, namespace string) error {
	if err := client.AppsV1().Deployments(namespace).Delete(ctx, "echo", metav1.DeleteOptions{}); err != nil {
		return err
	}
	for {
		pods, err := client.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{})
		if err != nil {
			return err
		}
		if len(pods.Items) == 0 {
			return nil
		}
		if err := wait(ctx, 4*poll); err != nil {
			return fmt.Errorf("%d pods in %s do not end: %w", len(pods.Items), namespace, err)
		}
	}
}
