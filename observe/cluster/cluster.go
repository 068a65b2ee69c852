// Package cluster watches the objects of the cluster for the store: which workload a pod belongs to, what is there, what changes.
//
// It owns the only watches of objects in the process. They feed the metrics of package kubestate, the lookup of a pod's workload (for logs
// and spans), and entries in the log store, from which the page shows the cluster even after it is gone: a document for each workload with its pods
// (job "objects"), Kubernetes' events and the changes that every chart shows as a mark (job "events"), the states of rollouts (job "rollouts").
// ConfigMaps in which users configure the store go to a callback. Their problems are written back as events, which is the only thing it
// writes to the cluster. It starts without an API server, and continues when the API server is away.
//
// What users write into objects is only trusted about their own namespace: an owner counts if the object with that UID exists, texts
// are cut where they enter, and only the names of namespaces, workloads and nodes become labels. Secrets are not watched. The environment
// and commands of pods are not kept. Package server creates the Cluster and runs it.
package cluster

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	autoscalingv2 "k8s.io/api/autoscaling/v2"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"

	"polymesh.dev/polymesh/observe/logstore"
)

// Options of a Cluster.
type Options struct {
	// Kubeconfig is read when it exists, and again when it changes. See rbac.yaml for the permissions it needs.
	Kubeconfig string
	// Store gets the entries. At the start, existing entries are read from it.
	Store *logstore.Store
	// Configs is called with the ConfigMaps of users once they are known, and after each change. It may be nil.
	Configs func(context.Context, []Config)
	Log     *slog.Logger
}

// Cluster is what is known about the cluster. Its methods may be called from any goroutine, also before Run.
type Cluster struct {
	opts Options
	log  *slog.Logger

	mu     sync.Mutex
	client kubernetes.Interface // nil before there is a kubeconfig
	conn   connection

	nodes        *table[corev1.Node]
	namespaces   *table[corev1.Namespace]
	pods         *table[corev1.Pod]
	services     *table[corev1.Service]
	claims       *table[corev1.PersistentVolumeClaim]
	deployments  *table[appsv1.Deployment]
	replicaSets  *table[appsv1.ReplicaSet]
	statefulSets *table[appsv1.StatefulSet]
	daemonSets   *table[appsv1.DaemonSet]
	jobs         *table[batchv1.Job]
	cronJobs     *table[batchv1.CronJob]
	autoscalers  *table[autoscalingv2.HorizontalPodAutoscaler]
	configs      *table[corev1.ConfigMap]
	rollouts     *table[rollout]

	owners    owners
	places    places
	documents documents
	marks     marks
	events    events
	users     users

	dropped int64  // entries that were not written
	unsaved string // why
}

// New returns a Cluster. It reads nothing yet.
func New(o Options) *Cluster {
	c := &Cluster{opts: o, log: o.Log}
	c.owners = newOwners()
	c.places = newPlaces()
	c.documents = newDocuments()
	c.marks = newMarks()
	c.events = newEvents(c)
	c.users = newUsers()
	c.nodes = newTable(c, trimNode, c.nodeChanged)
	c.namespaces = newTable(c, trimNamespace, nil)
	c.pods = newTable(c, trimPod, c.podChanged)
	c.services = newTable(c, trimService, nil)
	c.claims = newTable(c, trimClaim, nil)
	c.deployments = newTable(c, trimDeployment, c.deploymentChanged)
	c.replicaSets = newTable(c, trimReplicaSet, c.replicaSetChanged)
	c.statefulSets = newTable(c, trimStatefulSet, c.statefulSetChanged)
	c.daemonSets = newTable(c, trimDaemonSet, c.daemonSetChanged)
	c.jobs = newTable(c, trimJob, c.jobChanged)
	c.cronJobs = newTable(c, trimCronJob, c.cronJobChanged)
	c.autoscalers = newTable(c, trimAutoscaler, nil)
	c.configs = newTable(c, trimConfig, c.configChanged)
	c.rollouts = newTable(c, readRollout, c.rolloutChanged)
	return c
}

// Run watches the cluster and writes entries until ctx ends.
func (c *Cluster) Run(ctx context.Context) error {
	if err := c.recall(ctx, time.Now()); err != nil {
		// Some changes are then written a second time.
		c.log.Warn("what the store has of the cluster cannot be read", "err", err)
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { c.write(ctx) })
	wg.Go(func() { c.deliver(ctx) })
	c.connect(ctx)
	return nil
}

// State says whether the API server answers.
type State struct {
	Reachable bool
	// Since is the time of the last change. It is zero before the first answer or failure.
	Since time.Time
}

// State returns whether the API server answers.
func (c *Cluster) State() State {
	c.mu.Lock()
	defer c.mu.Unlock()
	return State{c.conn.reachable, c.conn.since}
}

// Problem returns why something is not known or not written, empty if all is well.
func (c *Cluster) Problem() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	var list []string
	switch {
	case c.conn.failure != "":
		list = append(list, c.conn.failure)
	case !c.conn.reachable && !c.conn.since.IsZero():
		list = append(list, "the API server does not answer")
	}
	// With an expired token, all kinds are refused for the same reason.
	byReason := map[string][]string{}
	for _, kind := range slices.Sorted(maps.Keys(c.conn.refused)) {
		byReason[c.conn.refused[kind]] = append(byReason[c.conn.refused[kind]], kind)
	}
	for _, reason := range slices.Sorted(maps.Keys(byReason)) {
		list = append(list, fmt.Sprintf("%s cannot be read: %s", strings.Join(byReason[reason], ", "), reason))
	}
	if c.unsaved != "" {
		list = append(list, c.unsaved)
	}
	return strings.Join(list, "; ")
}

// Numbers returns how much is held and how much was dropped.
func (c *Cluster) Numbers() map[string]int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return map[string]int64{
		"pods": int64(len(c.pods.items)), "objects": c.held(), "entries_dropped": c.dropped, "events_left_out": c.events.leftOut, "objects_left_out": c.leftOut(),
	}
}

// tables returns all of them.
func (c *Cluster) tables() []interface{ size() (held, leftOut int) } {
	return []interface{ size() (held, leftOut int) }{
		c.nodes, c.namespaces, c.pods, c.services, c.claims, c.deployments, c.replicaSets, c.statefulSets, c.daemonSets, c.jobs, c.cronJobs, c.autoscalers,
		c.configs, c.rollouts,
	}
}

func (c *Cluster) held() (n int64) {
	for _, t := range c.tables() {
		held, _ := t.size()
		n += int64(held)
	}
	return n
}

func (c *Cluster) leftOut() (n int64) {
	for _, t := range c.tables() {
		_, left := t.size()
		n += int64(left)
	}
	return n
}

// The objects, for kubestate.Objects. They must not be changed.

func (c *Cluster) Nodes() []*corev1.Node                                   { return c.nodes.all() }
func (c *Cluster) Namespaces() []*corev1.Namespace                         { return c.namespaces.all() }
func (c *Cluster) Pods() []*corev1.Pod                                     { return c.pods.all() }
func (c *Cluster) Services() []*corev1.Service                             { return c.services.all() }
func (c *Cluster) PersistentVolumeClaims() []*corev1.PersistentVolumeClaim { return c.claims.all() }
func (c *Cluster) Deployments() []*appsv1.Deployment                       { return c.deployments.all() }
func (c *Cluster) ReplicaSets() []*appsv1.ReplicaSet                       { return c.replicaSets.all() }
func (c *Cluster) StatefulSets() []*appsv1.StatefulSet                     { return c.statefulSets.all() }
func (c *Cluster) DaemonSets() []*appsv1.DaemonSet                         { return c.daemonSets.all() }
func (c *Cluster) Jobs() []*batchv1.Job                                    { return c.jobs.all() }
func (c *Cluster) CronJobs() []*batchv1.CronJob                            { return c.cronJobs.all() }
func (c *Cluster) HorizontalPodAutoscalers() []*autoscalingv2.HorizontalPodAutoscaler {
	return c.autoscalers.all()
}

// ref names an object.
type ref struct {
	kind, namespace, name string
	uid                   types.UID
}
