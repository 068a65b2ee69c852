package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"polymesh.dev/polymesh/pkg/status"
	"polymesh.dev/polymesh/test/e2e/node"
	"polymesh.dev/polymesh/test/e2e/postgres"
)

// store is a datastore of the server.
type store struct {
	name string
	args []string
	// outside is set for the database in the outside world.
	outside bool
}

var stores = []store{
	{name: "SQLite"},
	{name: "etcd", args: []string{"--cluster-init"}},
	{name: "PostgreSQL", outside: true},
}

const (
	growthNamespace = "bench-growth"
	// podsEach is the number of pods of a hollow node, fakePodsEach that of a node that kwok pretends.
	podsEach, fakePodsEach = 50, 100
	// probePace is the time from one round of the probe to the next.
	probePace = 100 * time.Millisecond
	// probePage is how many pods the probe lists, which is how many kubectl asks for at once.
	probePage = 500
)

var (
	hollowSizes = []int{10, 100}
	fakeSizes   = []int{1000, 5000}
	probeKinds  = []string{"create", "get", "list"}
)

// stage is a size at which a server is measured. Its name is a part of the figures' ids.
type stage string

const emptyStage stage = "no pods"

func hollowStage(nodes int) stage {
	return stage(fmt.Sprintf("%d hollow nodes, %s pods", nodes, thousands(nodes*podsEach)))
}
func fakeStage(pods int) stage { return stage(thousands(pods) + " pods of kwok") }

func thousands(n int) string {
	if n < 1000 {
		return strconv.Itoa(n)
	}
	return fmt.Sprintf("%d,%03d", n/1000, n%1000)
}

func (s store) figure(at stage, what string) figureID {
	return figureID("growth, " + s.name + ", " + string(at) + ": " + what)
}

// growing is a server with its datastore.
type growing struct {
	store
	*node.Node
	client   kubernetes.Interface
	database *postgres.Server // nil unless outside
}

// hollow measures servers with this many hollow nodes, one datastore after the other.
func (b *bench) hollow(nodes int, on ...store) func(context.Context) error {
	return func(ctx context.Context) error {
		return b.growth(ctx, on, func(c *node.Cluster, g *growing) error { return b.growHollow(ctx, c, g, nodes) })
	}
}

// fakes measures servers with this many pods of kwok.
func (b *bench) fakes(pods int) func(context.Context) error {
	return func(ctx context.Context) error {
		return b.growth(ctx, stores, func(_ *node.Cluster, g *growing) error { return b.growFakes(ctx, g, pods) })
	}
}

// growth calls f with a server of each of these datastores: two at the same time would share the cores.
func (b *bench) growth(ctx context.Context, on []store, f func(*node.Cluster, *growing) error) error {
	// Another one begins in each run.
	for i := range on {
		s := on[(i+b.run)%len(on)]
		b.say("  %s", s.name)
		if err := b.withStore(ctx, s, f); err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
	}
	return nil
}

func (b *bench) withStore(ctx context.Context, s store, f func(*node.Cluster, *growing) error) (err error) {
	c, err := node.NewCluster()
	if err != nil {
		return err
	}
	defer closeCluster(ctx, c, &err)
	endpoint, ca := filepath.Join(c.Dir, "endpoint"), filepath.Join(c.Dir, "ca.crt")
	// Only what every cluster has: the add-ons would be measured too.
	args := append([]string{"--disable", "istio,metrics-server,local-storage,servicelb"}, s.args...)
	if s.outside {
		args = append(args, "--datastore-endpoint-file", endpoint, "--datastore-cafile", ca)
	}
	n, err := c.Add(node.Options{Args: args})
	if err != nil {
		return err
	}
	g := &growing{store: s, Node: n}
	if s.outside {
		certificate, key, err := selfSigned(node.OutsideHost)
		if err != nil {
			return err
		}
		if g.database, err = postgres.New(ctx, n, certificate, key); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, n.Stop(context.WithoutCancel(ctx)), g.database.Close()) }()
		url := fmt.Sprintf("postgres://app:%s@%s:5432/cluster\n", g.database.Password, node.OutsideHost)
		if err := errors.Join(os.WriteFile(endpoint, []byte(url), 0o600), os.WriteFile(ca, certificate, 0o600), g.database.Start()); err != nil {
			return err
		}
	}
	defer func() {
		if err != nil && ctx.Err() == nil {
			n.Explain(os.Stderr)
		}
	}()
	if err := startReady(ctx, n); err != nil {
		return err
	}
	if g.client, err = n.NewClient(); err != nil {
		return err
	}
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: growthNamespace}}
	if _, err := g.client.CoreV1().Namespaces().Create(ctx, ns, metav1.CreateOptions{}); err != nil {
		return err
	}
	err = eventually(ctx, n, startLimit, func() error {
		_, err := g.client.CoreV1().ServiceAccounts(growthNamespace).Get(ctx, "default", metav1.GetOptions{})
		return err
	})
	if err != nil {
		return err
	}
	return f(c, g)
}

// growHollow measures how pods start on hollow nodes, and the server when they run: all of Kubernetes works but containers.
func (b *bench) growHollow(ctx context.Context, c *node.Cluster, g *growing, nodes int) (err error) {
	machine, err := c.Add(node.Options{Hostname: "hollow"})
	if err != nil {
		return err
	}
	k, err := b.startKubelets(ctx, machine, g.Node, g.client, nodes)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, k.stop()) }()
	err = eventually(ctx, g.Node, startLimit, func() error { return nodesReady(ctx, g.client, "kubemark", nodes) })
	if err != nil {
		return err
	}
	at := hollowStage(nodes)
	err = b.grow(ctx, g, at, func(ctx context.Context) error {
		deployment := hollowDeployment(int32(nodes * podsEach))
		if _, err := g.client.AppsV1().Deployments(growthNamespace).Create(ctx, deployment, metav1.CreateOptions{}); err != nil {
			return err
		}
		return eventually(ctx, g.Node, growLimit, func() error {
			found, err := g.client.AppsV1().Deployments(growthNamespace).Get(ctx, deployment.Name, metav1.GetOptions{})
			if err == nil && found.Status.ReadyReplicas < *deployment.Spec.Replicas {
				err = fmt.Errorf("%d of %d pods are Ready", found.Status.ReadyReplicas, *deployment.Spec.Replicas)
			}
			return err
		})
	})
	if err != nil {
		return err
	}
	b.results.add(g.figure(at, "kubelet"), k.anonymous()/float64(nodes))
	return b.restUnderProbe(ctx, g, at)
}

// nodesReady returns an error unless a program pretends so many ready nodes.
func nodesReady(ctx context.Context, client kubernetes.Interface, program string, count int) error {
	list, err := client.CoreV1().Nodes().List(ctx, metav1.ListOptions{LabelSelector: pretends + "=" + program})
	if err != nil {
		return err
	}
	ready := 0
	for _, n := range list.Items {
		for _, c := range n.Status.Conditions {
			if c.Type == corev1.NodeReady && c.Status == corev1.ConditionTrue {
				ready++
			}
		}
	}
	if ready < count {
		return fmt.Errorf("%d of %d nodes are Ready", ready, count)
	}
	return nil
}

func hollowDeployment(replicas int32) *appsv1.Deployment {
	labels := map[string]string{"app": "hollow"}
	return &appsv1.Deployment{
		ObjectMeta: metav1.ObjectMeta{Name: "hollow", Namespace: growthNamespace},
		Spec: appsv1.DeploymentSpec{
			Replicas: &replicas,
			Selector: &metav1.LabelSelector{MatchLabels: labels},
			Template: corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: labels}, Spec: pretendedPod("kubemark")},
		},
	}
}

// pretendedPod is a pod for the nodes of a program. It has requests and a token, as others have.
func pretendedPod(program string) corev1.PodSpec {
	return corev1.PodSpec{
		NodeSelector: map[string]string{pretends: program},
		Tolerations:  []corev1.Toleration{{Key: pretends, Operator: corev1.TolerationOpExists}},
		Containers: []corev1.Container{{
			Name: "app", Image: "registry.polymesh.dev/test/pretended:1",
			Env: []corev1.EnvVar{{Name: "LOG_LEVEL", Value: "info"}},
			Resources: corev1.ResourceRequirements{Requests: corev1.ResourceList{
				corev1.ResourceCPU: resource.MustParse("1m"), corev1.ResourceMemory: resource.MustParse("1Mi")}},
		}},
	}
}

// growFakes measures the server with pods whose kubelets are all in one process of kwok. They are created with their node, by several
// clients: the scheduler and the controllers would limit the rate, to 50 and 20 pods per second.
func (b *bench) growFakes(ctx context.Context, g *growing, pods int) (err error) {
	if pods == fakeSizes[0] {
		if err := b.restUnderProbe(ctx, g, emptyStage); err != nil {
			return err
		}
	}
	log, err := os.Create(filepath.Join(g.Dir, "kwok.log"))
	if err != nil {
		return err
	}
	defer log.Close()
	tools := filepath.Join(b.top, ".build", "bench")
	kwok := g.Command(ctx, filepath.Join(tools, "kwok"), "--kubeconfig="+g.Kubeconfig(), "--config="+filepath.Join(tools, "stages.yaml"),
		"--manage-nodes-with-label-selector="+pretends+"=kwok", "--node-lease-duration-seconds=40", "--node-ip="+node.OutsideHost)
	kwok.Env = append(kwok.Env, "HOME="+g.Dir) // where it looks for more configuration
	kwok.Stdout, kwok.Stderr = log, log
	if err := kwok.Start(); err != nil {
		return err
	}
	defer func() {
		if ended := kill(kwok); ended != nil {
			text, _ := os.ReadFile(log.Name())
			err = errors.Join(err, ended, errors.New(string(text)))
		}
	}()
	for i := range pods / fakePodsEach {
		if _, err := g.client.CoreV1().Nodes().Create(ctx, pretendedNode(fakeNodeName(i), "kwok"), metav1.CreateOptions{}); err != nil {
			return err
		}
	}
	err = eventually(ctx, g.Node, startLimit, func() error { return nodesReady(ctx, g.client, "kwok", pods/fakePodsEach) })
	if err != nil {
		return err
	}
	at := fakeStage(pods)
	err = b.grow(ctx, g, at, func(ctx context.Context) error {
		if err := createPods(ctx, g.Node, pods); err != nil {
			return err
		}
		return eventually(ctx, g.Node, growLimit, func() error {
			err := podsRun(ctx, g.client)
			if err != nil {
				_ = wait(ctx, 10*poll) // each time the server reads all pods
			}
			return err
		})
	})
	if err != nil {
		return err
	}
	return b.restUnderProbe(ctx, g, at)
}

// pretendedNode is a node of a program. No other pods run on it.
func pretendedNode(name, program string) *corev1.Node {
	size := corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("32"), corev1.ResourceMemory: resource.MustParse("256Gi"), corev1.ResourcePods: resource.MustParse("110")}
	return &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{pretends: program, corev1.LabelHostname: name}},
		Spec:       corev1.NodeSpec{Taints: []corev1.Taint{{Key: pretends, Value: program, Effect: corev1.TaintEffectNoSchedule}}},
		Status:     corev1.NodeStatus{Capacity: size, Allocatable: size},
	}
}

func fakeNodeName(number int) string { return fmt.Sprintf("kwok-%d", number+1) }

// createPods creates pods, each on its node.
func createPods(ctx context.Context, n *node.Node, count int) error {
	return createEach(ctx, n, 0, count, func(ctx context.Context, client kubernetes.Interface, i int) error {
		pod := &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("fake-%d", i+1), Labels: map[string]string{"app": "fake"}},
			Spec:       pretendedPod("kwok"),
		}
		pod.Spec.NodeName = fakeNodeName(i / fakePodsEach)
		_, err := client.CoreV1().Pods(growthNamespace).Create(ctx, pod, metav1.CreateOptions{})
		return err
	})
}

// podsRun returns an error unless all pods run. It does not read them all.
func podsRun(ctx context.Context, client kubernetes.Interface) error {
	list, err := client.CoreV1().Pods(growthNamespace).List(ctx, metav1.ListOptions{FieldSelector: "status.phase!=Running", Limit: 1})
	if err == nil && len(list.Items) > 0 {
		err = fmt.Errorf("pod %s does not run yet", list.Items[0].Name)
	}
	return err
}

// grow measures the server while f makes it grow.
func (b *bench) grow(ctx context.Context, g *growing, at stage, f func(context.Context) error) error {
	spent, begin := g.cpu(), time.Now()
	before, err := g.served(ctx)
	if err != nil {
		return err
	}
	var took time.Duration
	times, err := g.probe(ctx, func(ctx context.Context) error {
		err := f(ctx)
		took = time.Since(begin)
		return err
	})
	if err != nil {
		return err
	}
	after, err := g.served(ctx)
	if err != nil {
		return err
	}
	b.results.add(g.figure(at, "until ready"), took.Seconds())
	b.results.add(g.figure(at, "CPU until ready"), g.cpu()-spent)
	b.results.add(g.figure(at, "slow"), after.slow-before.slow)
	b.results.add(g.figure(at, "calls"), after.all-before.all)
	for kind, all := range times {
		b.results.add(g.figure(at, "growing, "+kind+" p99"), quantile(all, 0.99))
	}
	return nil
}

// restUnderProbe measures a server that has nothing to do but the probe.
func (b *bench) restUnderProbe(ctx context.Context, g *growing, at stage) error {
	if err := wait(ctx, b.settle); err != nil {
		return err
	}
	spent, begin := g.cpu(), time.Now()
	times, err := g.probe(ctx, func(ctx context.Context) error { return wait(ctx, b.load) })
	if err != nil {
		return err
	}
	b.results.add(g.figure(at, "CPU"), 100*(g.cpu()-spent)/time.Since(begin).Seconds())
	for kind, all := range times {
		b.results.add(g.figure(at, kind+" p50"), quantile(all, 0.5))
		b.results.add(g.figure(at, kind+" p99"), quantile(all, 0.99))
	}
	own, others := g.memory()
	b.results.add(g.figure(at, "anonymous"), own)
	b.results.add(g.figure(at, "others' anonymous"), others)
	disk, err := g.disk()
	b.results.add(g.figure(at, "disk"), disk)
	return err
}

// probe sends requests of a client that does little, until f returns: it creates a ConfigMap of 1 KB, gets it, lists pods, a page as
// kubectl asks for, and deletes the ConfigMap. The times are in milliseconds, the shortest first.
func (g *growing) probe(ctx context.Context, f func(context.Context) error) (map[string][]float64, error) {
	config, err := g.ClientConfig()
	if err != nil {
		return nil, err
	}
	config.ContentType = "application/vnd.kubernetes.protobuf"
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return nil, err
	}
	maps := client.CoreV1().ConfigMaps(growthNamespace)
	object := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "probe"}, Data: map[string]string{"value": strings.Repeat("x", 1024)}}
	requests := map[string]func() error{
		"create": func() error { _, err := maps.Create(ctx, object, metav1.CreateOptions{}); return err },
		"get":    func() error { _, err := maps.Get(ctx, object.Name, metav1.GetOptions{}); return err },
		// Not decoded: that would be the client's time.
		"list": func() error {
			_, err := client.CoreV1().RESTClient().Get().Namespace(growthNamespace).Resource("pods").Param("limit", strconv.Itoa(probePage)).DoRaw(ctx)
			return err
		},
	}
	times := map[string][]float64{}
	stop := make(chan struct{})
	var probing sync.WaitGroup
	var failed error
	probing.Go(func() {
		pace := time.NewTicker(probePace)
		defer pace.Stop()
		for {
			for _, kind := range probeKinds {
				begin := time.Now()
				if failed = requests[kind](); failed != nil {
					failed = fmt.Errorf("the probe's %s: %w", kind, failed)
					return
				}
				times[kind] = append(times[kind], time.Since(begin).Seconds()*1000)
			}
			if failed = maps.Delete(ctx, object.Name, metav1.DeleteOptions{}); failed != nil && !apierrors.IsNotFound(failed) {
				return
			}
			failed = nil
			select {
			case <-stop:
				return
			case <-ctx.Done():
				failed = ctx.Err()
				return
			case <-pace.C:
			}
		}
	})
	err = f(ctx)
	close(stop)
	probing.Wait()
	for _, all := range times {
		slices.Sort(all)
	}
	return times, errors.Join(err, failed)
}

// calls are the API server's own counts.
type calls struct{ all, slow float64 }

// servedLine is a line of the metric of Kubernetes' objective, which is without the time of webhooks.
var servedLine = regexp.MustCompile(`^apiserver_request_sli_duration_seconds_(bucket|count)\{(.*)\} ([0-9.e+]+)$`)

// served counts what the API server has answered, without lists, for which Kubernetes' objective is another one, and without requests
// that last. Its objective for the others is that 99 % of them take at most a second.
func (g *growing) served(ctx context.Context) (c calls, err error) {
	text, err := g.client.CoreV1().RESTClient().Get().AbsPath("/metrics").DoRaw(ctx)
	if err != nil {
		return c, err
	}
	for line := range strings.Lines(string(text)) {
		found := servedLine.FindStringSubmatch(strings.TrimSpace(line))
		if found == nil || strings.Contains(found[2], `verb="LIST"`) || strings.Contains(found[2], `verb="WATCH"`) || strings.Contains(found[2], `verb="CONNECT"`) {
			continue
		}
		value, err := strconv.ParseFloat(found[3], 64)
		if err != nil {
			return c, err
		}
		switch {
		case found[1] == "count":
			c.all += value
			c.slow += value
		case strings.Contains(found[2], `le="1"`):
			c.slow -= value
		}
	}
	if c.all == 0 {
		return c, errors.New("the API server's metrics do not count requests")
	}
	return c, nil
}

// processes are the server, its controllers if they are separate processes, and the database.
func (g *growing) processes() (pids []int) {
	report, err := g.Report(context.Background())
	if err != nil {
		return []int{g.PID()}
	}
	pids = []int{report.PID}
	for _, c := range report.Components {
		if c.PID != 0 && c.PID != report.PID && c.Name != containerdProcess {
			pids = append(pids, c.PID)
		}
	}
	if g.database != nil {
		pids = append(pids, g.database.PID())
		pids = append(pids, children(g.database.PID())...)
	}
	return pids
}

// children lists the child processes of a process.
func children(pid int) (pids []int) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	if err != nil {
		return nil
	}
	for _, f := range strings.Fields(string(text)) {
		if child, err := strconv.Atoi(f); err == nil {
			pids = append(pids, child)
		}
	}
	return pids
}

// cpu is the CPU time of the server with its controllers and its datastore, in seconds.
func (g *growing) cpu() (sum float64) {
	for _, pid := range g.processes() {
		sum += cpuSeconds(pid)
	}
	if g.database != nil {
		sum += endedSeconds(g.database.PID())
	}
	return sum
}

// memory is the anonymous memory of the server, and of the controllers and the database if they are separate processes, in MB.
func (g *growing) memory() (server, others float64) {
	for i, pid := range g.processes() {
		if i == 0 {
			server = anonymousMemory(pid)
		} else {
			others += anonymousMemory(pid)
		}
	}
	return server, others
}

func anonymousMemory(pid int) float64 {
	_, anonymous := status.Memory(pid)
	return float64(anonymous) / 1e6
}

// disk is what the datastore takes of the disk, in MB.
func (g *growing) disk() (float64, error) {
	dir := g.Layout().Server("db")
	if g.database != nil {
		dir = g.database.Data()
	}
	var sum int64
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // the database has just removed it
		}
		if err != nil {
			return err
		}
		info, err := d.Info()
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err == nil {
			sum += info.Sys().(*syscall.Stat_t).Blocks * 512
		}
		return err
	})
	return float64(sum) / 1e6, err
}

// grownStages are those that the report has.
func grownStages() []stage {
	all := []stage{emptyStage}
	for _, n := range hollowSizes {
		all = append(all, hollowStage(n))
	}
	for _, n := range fakeSizes {
		all = append(all, fakeStage(n))
	}
	return all
}

// growthMatrix has the times of the probe, in milliseconds, at rest and while the pods were created.
func growthMatrix() matrix {
	m := matrix{heads: []string{"p99 of the probe, ms"}}
	m.heads = append(m.heads, probeKinds...)
	for _, kind := range probeKinds {
		m.heads = append(m.heads, kind+" while pods start")
	}
	return growthLines(m, append(each(probeKinds, "%s p99"), each(probeKinds, "growing, %s p99")...))
}

// growthCostMatrix has what the server takes.
func growthCostMatrix() matrix {
	m := matrix{heads: []string{"server with its datastore", "pods start, s", "CPU for that, s", "calls but lists", "of them over 1 s", "CPU under the probe, % of a core",
		"server, anonymous, MB", "its other processes, anonymous, MB", "disk, MB"}}
	return growthLines(m, []string{"until ready", "CPU until ready", "calls", "slow", "CPU", "anonymous", "others' anonymous", "disk"})
}

func each(names []string, format string) (all []string) {
	for _, n := range names {
		all = append(all, fmt.Sprintf(format, n))
	}
	return all
}

func growthLines(m matrix, figures []string) matrix {
	for _, at := range grownStages() {
		for _, s := range stores {
			l := line{name: string(at) + ": " + s.name}
			for _, f := range figures {
				l.ids = append(l.ids, s.figure(at, f))
			}
			m.lines = append(m.lines, l)
		}
	}
	return m
}

// growthRatios compare the datastores, and the sizes, figure by figure.
func growthRatios() (all []ratio) {
	for _, at := range grownStages()[1:] {
		for _, s := range stores[1:] {
			for _, what := range []string{"create p99", "list p99", "growing, create p99", "CPU until ready", "until ready", "anonymous", "disk"} {
				all = append(all, ratio{string(at) + ", " + what + ": " + s.name + " to " + stores[0].name, s.figure(at, what), stores[0].figure(at, what)})
			}
		}
	}
	for _, s := range stores {
		for _, what := range []string{"create p99", "anonymous", "CPU"} {
			all = append(all, ratio{s.name + ", " + what + ": 5,000 pods to 1,000", s.figure(fakeStage(5000), what), s.figure(fakeStage(1000), what)})
		}
	}
	return all
}
