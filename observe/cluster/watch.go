package cluster

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/go-logr/logr"
	appsv1 "k8s.io/api/apps/v1"
	autoscalingv2 "k8s.io/api/autoscaling/v2"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/klog/v2"

	"polymesh.dev/polymesh/observe/excerpt"
)

// Name is the store's name in requests to the cluster, and as the reporter of events.
const Name = "polymesh-observe"

// Labels of ConfigMaps.
const (
	// ConfigLabel is on ConfigMaps with which users configure the store; its value is Scrape or Rules.
	ConfigLabel = "polymesh.dev/observe"
	// rolloutLabel is on the ConfigMaps in which `polymesh rollout` records states.
	rolloutLabel = "polymesh.dev/rollout"
)

const (
	// kubeconfigPoll is how often the kubeconfig is checked for changes.
	kubeconfigPoll = 5 * time.Second
	// retryMax is the longest pause before the next attempt to reach the API server; client-go's is a minute.
	retryMax = 5 * time.Second
)

// connection is the state of the connection to the API server.
type connection struct {
	reachable bool
	since     time.Time
	failure   string            // why there is no client
	refused   map[string]string // by kind: why the API server does not return it
	told      bool              // a mark that it does not answer was written
}

// connect watches until ctx ends. It starts again when the kubeconfig has changed.
func (c *Cluster) connect(ctx context.Context) {
	var text []byte
	for ctx.Err() == nil {
		now, err := os.ReadFile(c.opts.Kubeconfig)
		var client kubernetes.Interface
		if err == nil {
			client, err = newClient(now, c.opts.Kubeconfig)
		}
		if err != nil {
			c.setFailure(fmt.Sprintf("read kubeconfig %s: %v", c.opts.Kubeconfig, err))
			sleep(ctx, kubeconfigPoll)
			continue
		}
		text = now
		c.setFailure("")
		session, cancel := context.WithCancel(ctx)
		var wg sync.WaitGroup
		wg.Go(func() { c.watch(session, client) })
		for session.Err() == nil {
			sleep(session, kubeconfigPoll)
			// A file that cannot be read for a moment is being replaced.
			if now, err := os.ReadFile(c.opts.Kubeconfig); err == nil && string(now) != string(text) {
				cancel()
			}
		}
		cancel()
		wg.Wait()
	}
}

func (c *Cluster) setFailure(text string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if text != "" && text != c.conn.failure {
		c.log.Warn("the cluster is not watched", "err", text)
	}
	c.conn.failure = text
}

func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// newClient returns a client that gets objects as protobuf, which takes half as much work as JSON.
func newClient(text []byte, file string) (kubernetes.Interface, error) {
	loaded, err := clientcmd.Load(text)
	if err != nil {
		return nil, err
	}
	// Paths in the kubeconfig are relative to its folder.
	for _, cluster := range loaded.Clusters {
		cluster.LocationOfOrigin = file
	}
	for _, user := range loaded.AuthInfos {
		user.LocationOfOrigin = file
	}
	if err := clientcmd.ResolveLocalPaths(loaded); err != nil {
		return nil, err
	}
	config, err := clientcmd.NewDefaultClientConfig(*loaded, nil).ClientConfig()
	if err != nil {
		return nil, err
	}
	config.UserAgent = Name
	config.QPS, config.Burst = 20, 40
	config.AcceptContentTypes, config.ContentType = runtime.ContentTypeProtobuf+","+runtime.ContentTypeJSON, runtime.ContentTypeProtobuf
	return kubernetes.NewForConfig(config)
}

// watch keeps the tables up to date until ctx ends.
func (c *Cluster) watch(ctx context.Context, client kubernetes.Interface) {
	c.mu.Lock()
	c.client = client
	c.conn.refused = map[string]string{}
	c.mu.Unlock()
	core, apps, batch := client.CoreV1().RESTClient(), client.AppsV1().RESTClient(), client.BatchV1().RESTClient()
	var wg sync.WaitGroup
	run := func(kind string, lw cache.ListerWatcher, example runtime.Object, store cache.ReflectorStore) {
		// observed records errors.
		quiet := logr.Discard()
		r := cache.NewReflectorWithOptions(&observed{ListerWatcherWithContext: cache.ToListerWatcherWithContext(lw), c: c, kind: kind}, example, store, cache.ReflectorOptions{
			Name: kind, Logger: &quiet, Backoff: &wait.Backoff{Duration: 500 * time.Millisecond, Cap: retryMax, Steps: 10, Factor: 2, Jitter: 1},
		})
		wg.Go(func() { r.RunWithContext(klog.NewContext(ctx, quiet)) })
	}
	of := func(group rest.Interface, resource, label string) cache.ListerWatcher {
		return cache.NewFilteredListWatchFromClient(group, resource, metav1.NamespaceAll, func(o *metav1.ListOptions) { o.LabelSelector = label })
	}
	run("nodes", of(core, "nodes", ""), &corev1.Node{}, c.nodes)
	run("namespaces", of(core, "namespaces", ""), &corev1.Namespace{}, c.namespaces)
	run("pods", of(core, "pods", ""), &corev1.Pod{}, c.pods)
	run("services", of(core, "services", ""), &corev1.Service{}, c.services)
	run("persistentvolumeclaims", of(core, "persistentvolumeclaims", ""), &corev1.PersistentVolumeClaim{}, c.claims)
	run("deployments", of(apps, "deployments", ""), &appsv1.Deployment{}, c.deployments)
	run("replicasets", of(apps, "replicasets", ""), &appsv1.ReplicaSet{}, c.replicaSets)
	run("statefulsets", of(apps, "statefulsets", ""), &appsv1.StatefulSet{}, c.statefulSets)
	run("daemonsets", of(apps, "daemonsets", ""), &appsv1.DaemonSet{}, c.daemonSets)
	run("jobs", of(batch, "jobs", ""), &batchv1.Job{}, c.jobs)
	run("cronjobs", of(batch, "cronjobs", ""), &batchv1.CronJob{}, c.cronJobs)
	run("horizontalpodautoscalers", of(client.AutoscalingV2().RESTClient(), "horizontalpodautoscalers", ""), &autoscalingv2.HorizontalPodAutoscaler{}, c.autoscalers)
	run("configmaps of users", of(core, "configmaps", ConfigLabel), &corev1.ConfigMap{}, c.configs)
	run("configmaps of rollouts", of(core, "configmaps", rolloutLabel), &corev1.ConfigMap{}, c.rollouts)
	run("events", of(client.EventsV1().RESTClient(), "events", ""), &eventsv1.Event{}, &c.events)
	wg.Wait()
}

// observed lists and watches a kind, and records from the answers whether the API server is reachable.
type observed struct {
	cache.ListerWatcherWithContext
	c    *Cluster
	kind string
}

// List and Watch are for client-go's older interface, which it does not call.
func (o *observed) List(options metav1.ListOptions) (runtime.Object, error) {
	return o.ListWithContext(context.Background(), options)
}

func (o *observed) Watch(options metav1.ListOptions) (watch.Interface, error) {
	return o.WatchWithContext(context.Background(), options)
}

func (o *observed) ListWithContext(ctx context.Context, options metav1.ListOptions) (runtime.Object, error) {
	list, err := o.ListerWatcherWithContext.ListWithContext(ctx, options)
	o.note(ctx, err)
	return list, err
}

func (o *observed) WatchWithContext(ctx context.Context, options metav1.ListOptions) (watch.Interface, error) {
	w, err := o.ListerWatcherWithContext.WatchWithContext(ctx, options)
	o.note(ctx, err)
	if err != nil && options.SendInitialEvents != nil {
		// After a refused connection, the reflector would wait longer than ctx.
		return nil, errors.New(err.Error())
	}
	return w, err
}

// note records whether the API server has answered.
func (o *observed) note(ctx context.Context, err error) {
	if ctx.Err() != nil {
		return
	}
	var status apierrors.APIStatus
	answered := err == nil || errors.As(err, &status) && status.Status().Code < http.StatusInternalServerError
	o.c.mu.Lock()
	defer o.c.mu.Unlock()
	conn := &o.c.conn
	if conn.reachable != answered || conn.since.IsZero() {
		conn.reachable, conn.since = answered, time.Now()
	}
	switch {
	case err == nil:
		delete(conn.refused, o.kind)
	case apierrors.IsTooManyRequests(err), apierrors.IsResourceExpired(err), apierrors.IsGone(err):
		// The reflector tries again, or lists everything.
	case answered:
		text := excerpt.Of(err.Error(), maxMessage)
		if !slices.Contains(slices.Collect(maps.Values(conn.refused)), text) {
			o.c.log.Warn("objects of the cluster cannot be read", "kind", o.kind, "err", text)
		}
		conn.refused[o.kind] = text
	}
}
