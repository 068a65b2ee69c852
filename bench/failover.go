package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"slices"
	"strconv"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"polymesh.dev/polymesh/test/e2e/node"
)

const (
	failoverNamespace = "bench-failover"
	failoverHost      = "failover.example.com"
	// streamRate is requests per second through the gateway. One that has no answer after lostAfter is lost.
	streamRate = 50
	lostAfter  = 5 * time.Second
	// writePace and writeLimit are of the writes to the API.
	writePace, writeLimit = 100 * time.Millisecond, 2 * time.Second
	// quickSeconds is the tolerationSeconds of pods that do not wait for Kubernetes' five minutes.
	quickSeconds = 10
	// apiBalancer is where a node reaches the API servers.
	apiBalancer = "127.0.0.1:6444"
)

// incident is what happens to a machine. Its name is a part of the figures' ids.
type incident struct{ name, what string }

var (
	serverKilled = incident{"server killed", "the only server is killed (SIGKILL) and starts again"}
	agentDies    = incident{"agent dies", "an agent loses its power"}
	oneOfThree   = incident{"one of three servers dies", "one of three servers loses its power"}
)

func (i incident) figure(what string) figureID { return figureID("failover, " + i.name + ": " + what) }

// failoverManifests is an app behind the ingress gateway, with sidecars, on agents only: as it is by default, and the same pods that do not wait
// on a dead node. Its parameters are the image and the seconds.
const failoverManifests = `
apiVersion: v1
kind: Namespace
metadata: {name: bench-failover, labels: {istio-injection: enabled}}
---
apiVersion: v1
kind: Service
metadata: {name: app, namespace: bench-failover}
spec: {selector: {app: default}, ports: [{name: http, port: 8080}]}
---
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {name: app, namespace: bench-failover}
spec: {selector: {istio: ingressgateway}, servers: [{port: {number: 80, name: http, protocol: HTTP}, hosts: [failover.example.com]}]}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: app, namespace: bench-failover}
spec: {hosts: [failover.example.com], gateways: [app], http: [{route: [{destination: {host: app, port: {number: 8080}}}]}]}
`

const failoverDeployment = `
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: %[1]s, namespace: bench-failover}
spec:
  replicas: 2
  selector: {matchLabels: {app: %[1]s}}
  template:
    metadata: {labels: {app: %[1]s}}
    spec:
      affinity:
        nodeAffinity: {requiredDuringSchedulingIgnoredDuringExecution: {nodeSelectorTerms: [{matchExpressions: [{key: node-role.kubernetes.io/control-plane, operator: DoesNotExist}]}]}}
        podAntiAffinity: {preferredDuringSchedulingIgnoredDuringExecution: [{weight: 100, podAffinityTerm: {topologyKey: kubernetes.io/hostname, labelSelector: {matchLabels: {app: %[1]s}}}}]}
%[3]s
      containers:
      - name: app
        image: "%[2]s"
        imagePullPolicy: IfNotPresent
        command: [sh, -c, "mkdir -p /tmp/www && echo answered >/tmp/www/index.html && exec httpd -f -p 8080 -h /tmp/www"]
        readinessProbe: {tcpSocket: {port: 8080}, periodSeconds: 1}
`

// failoverServer measures what it costs that the only server ends and starts again.
func (b *bench) failoverServer(ctx context.Context) error {
	return b.failoverCluster(ctx, 1, func(ctx context.Context, _ *node.Cluster, servers, _ []*node.Node) error {
		client, err := servers[0].NewClient()
		if err != nil {
			return err
		}
		return b.incident(ctx, serverKilled, servers[0], client, func(ctx context.Context) error {
			if err := servers[0].Kill(); err != nil {
				return err
			}
			return startReady(ctx, servers[0])
		})
	})
}

// failoverAgent measures what it costs that one of two agents dies. With Kubernetes' five minutes it lasts seven.
func (b *bench) failoverAgent(ctx context.Context) error {
	return b.failoverCluster(ctx, 1, func(ctx context.Context, c *node.Cluster, servers, agents []*node.Node) error {
		client, err := servers[0].NewClient()
		if err != nil {
			return err
		}
		return b.incident(ctx, agentDies, servers[0], client, func(ctx context.Context) error {
			return b.agentDies(ctx, c, servers[0], client, agents[0])
		})
	})
}

// failoverServers measures what the loss of one of three servers costs, as clients see it that reach the others through the balancer of a node.
func (b *bench) failoverServers(ctx context.Context) error {
	return b.failoverCluster(ctx, 3, func(ctx context.Context, c *node.Cluster, servers, agents []*node.Node) error {
		config, err := servers[1].ClientConfig()
		if err != nil {
			return err
		}
		config.Dial = func(ctx context.Context, network, _ string) (net.Conn, error) {
			return agents[0].Dial(ctx, network, apiBalancer)
		}
		balanced, err := kubernetes.NewForConfig(config)
		if err != nil {
			return err
		}
		// The first one, which is the leader of etcd and of the controllers unless they have changed it.
		return b.incident(ctx, oneOfThree, servers[1], balanced, func(ctx context.Context) error {
			if err := c.PowerOff(servers[0]); err != nil {
				return err
			}
			if err := wait(ctx, b.load); err != nil {
				return err
			}
			begin := time.Now()
			if err := c.PowerOn(ctx, servers[0]); err != nil {
				return err
			}
			if err := servers[0].Ready(ctx); err != nil {
				return err
			}
			b.results.add(oneOfThree.figure("back"), time.Since(begin).Seconds())
			return nil
		})
	})
}

// failoverCluster starts servers and two agents, with Istio and the app, and calls f.
func (b *bench) failoverCluster(ctx context.Context, count int, f func(context.Context, *node.Cluster, []*node.Node, []*node.Node) error) (err error) {
	c, err := node.NewCluster()
	if err != nil {
		return err
	}
	defer closeCluster(ctx, c, &err)
	var servers, agents []*node.Node
	for i := range count {
		var o node.Options
		switch {
		case i > 0:
			o = node.Options{Joins: servers[0], Serves: true}
		case count > 1:
			o.Args = []string{"--cluster-init"}
		}
		n, err := c.Add(o)
		if err != nil {
			return err
		}
		servers = append(servers, n)
		if err := startReady(ctx, n); err != nil {
			return err
		}
	}
	server := servers[0]
	defer func() {
		if err != nil && ctx.Err() == nil {
			server.Explain(os.Stderr)
		}
	}()
	for range 2 {
		n, err := c.Add(node.Options{Joins: server})
		if err != nil {
			return err
		}
		agents = append(agents, n)
		if err := startReady(ctx, n); err != nil {
			return err
		}
	}
	image, err := shippedImage(ctx, server, "busybox")
	if err != nil {
		return err
	}
	tolerations := "      tolerations:"
	for _, key := range []string{corev1.TaintNodeNotReady, corev1.TaintNodeUnreachable} {
		tolerations += fmt.Sprintf("\n      - {key: %s, operator: Exists, effect: NoExecute, tolerationSeconds: %d}", key, quickSeconds)
	}
	manifests := failoverManifests + fmt.Sprintf(failoverDeployment, "default", image, "") + fmt.Sprintf(failoverDeployment, "quick", image, tolerations)
	if err := apply(ctx, server, manifests); err != nil {
		return err
	}
	for _, name := range []string{"default", "quick"} {
		if err := polymesh(ctx, server, "kubectl", "rollout", "status", "-n", failoverNamespace, "deployment/"+name, "--timeout=300s"); err != nil {
			return err
		}
	}
	answers := func() error {
		_, err := ask(ctx, server, http.MethodGet, failoverHost, "/", "")
		return err
	}
	if err := eventually(ctx, server, 2*time.Minute, answers); err != nil {
		return err
	}
	return f(ctx, c, servers, agents)
}

// incident measures the API and the gateway while f lets it happen. The requests go to the gateway at the address of that node.
func (b *bench) incident(ctx context.Context, i incident, at *node.Node, client kubernetes.Interface, f func(context.Context) error) error {
	b.say("  %s", i.what)
	during, cancel := context.WithCancel(ctx)
	defer cancel()
	s, w := stream{node: at, begin: time.Now()}, writes{}
	var running sync.WaitGroup
	running.Go(func() { s.run(during) })
	running.Go(func() { w.run(during, client) })
	// Before and after, all is well: what is measured begins and ends in between.
	err := wait(ctx, b.settle)
	if err == nil {
		s.mark()
		err = f(ctx)
	}
	if err == nil {
		err = wait(ctx, b.settle)
	}
	cancel()
	running.Wait()
	if err != nil {
		return err
	}
	if w.done == 0 || s.sent == 0 {
		return fmt.Errorf("%d writes and %d requests were sent", w.done, s.sent)
	}
	b.results.add(i.figure("API away"), w.longest.Seconds())
	b.results.add(i.figure("sent"), float64(s.sent))
	b.results.add(i.figure("lost"), float64(s.lost))
	b.results.add(i.figure("last lost"), s.last.Seconds())
	return nil
}

// agentDies takes an agent's power, and waits until its pods run elsewhere.
func (b *bench) agentDies(ctx context.Context, c *node.Cluster, server *node.Node, client kubernetes.Interface, dead *node.Node) error {
	report, err := dead.Report(ctx)
	if err != nil {
		return err
	}
	name := report.Node
	if err := runsOnBoth(ctx, client, name); err != nil {
		return err
	}
	begin := time.Now()
	if err := c.PowerOff(dead); err != nil {
		return err
	}
	for _, step := range []struct {
		figure string
		check  func() error
	}{
		{"NotReady", func() error { return nodeIsAway(ctx, client, name) }},
		{"endpoints", func() error { return endpointsLeft(ctx, client, name) }},
		{"quick elsewhere", func() error { return runsElsewhere(ctx, client, "quick", name) }},
		{"default elsewhere", func() error { return runsElsewhere(ctx, client, "default", name) }},
	} {
		if err := eventually(ctx, server, startLimit, step.check); err != nil {
			return err
		}
		b.results.add(agentDies.figure(step.figure), time.Since(begin).Seconds())
	}
	return nil
}

// runsOnBoth returns an error unless each Deployment has a pod on the node that is to die, and the gateway none.
func runsOnBoth(ctx context.Context, client kubernetes.Interface, name string) error {
	for _, app := range []string{"default", "quick"} {
		if err := runsElsewhere(ctx, client, app, name); err == nil {
			return fmt.Errorf("the Deployment %s has no pod on %s", app, name)
		}
	}
	gateways, err := client.CoreV1().Pods("istio-system").List(ctx, metav1.ListOptions{LabelSelector: "istio=ingressgateway"})
	if err != nil {
		return err
	}
	if slices.ContainsFunc(gateways.Items, func(p corev1.Pod) bool {
		return p.Spec.NodeName != name && slices.ContainsFunc(p.Status.Conditions, isReady)
	}) {
		return nil
	}
	return fmt.Errorf("no gateway is elsewhere than on %s", name)
}

func nodeIsAway(ctx context.Context, client kubernetes.Interface, name string) error {
	n, err := client.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return err
	}
	for _, c := range n.Status.Conditions {
		if c.Type == corev1.NodeReady && c.Status != corev1.ConditionTrue {
			return nil
		}
	}
	return fmt.Errorf("node %s is still Ready", name)
}

// endpointsLeft returns an error while the service still has a ready endpoint on the node.
func endpointsLeft(ctx context.Context, client kubernetes.Interface, name string) error {
	slicesOf, err := client.DiscoveryV1().EndpointSlices(failoverNamespace).List(ctx, metav1.ListOptions{LabelSelector: discoveryv1.LabelServiceName + "=app"})
	if err != nil {
		return err
	}
	for _, s := range slicesOf.Items {
		for _, e := range s.Endpoints {
			if e.NodeName != nil && *e.NodeName == name && (e.Conditions.Ready == nil || *e.Conditions.Ready) {
				return fmt.Errorf("the service has an endpoint on %s", name)
			}
		}
	}
	return nil
}

// runsElsewhere returns an error unless both pods of a Deployment are Ready on other nodes than this one.
func runsElsewhere(ctx context.Context, client kubernetes.Interface, app, name string) error {
	pods, err := client.CoreV1().Pods(failoverNamespace).List(ctx, metav1.ListOptions{LabelSelector: "app=" + app})
	if err != nil {
		return err
	}
	ready := 0
	for _, p := range pods.Items {
		if p.Spec.NodeName != name && p.DeletionTimestamp == nil && slices.ContainsFunc(p.Status.Conditions, isReady) {
			ready++
		}
	}
	if ready < 2 {
		return fmt.Errorf("%d pods of %s run elsewhere than on %s", ready, app, name)
	}
	return nil
}

// stream sends requests through the gateway at a fixed rate, each on a new connection, whether or not those before have been answered.
type stream struct {
	node *node.Node

	mu         sync.Mutex
	begin      time.Time
	sent, lost int
	last       time.Duration // from mark to when the last lost request was sent
}

// mark is when the incident begins.
func (s *stream) mark() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.begin = time.Now()
}

func (s *stream) run(ctx context.Context) {
	client := s.node.HTTP(false)
	client.Timeout = lostAfter
	var pending sync.WaitGroup
	defer pending.Wait()
	pace := time.NewTicker(time.Second / streamRate)
	defer pace.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-pace.C:
		}
		pending.Go(func() {
			sent := time.Now()
			// Not ctx: a request that is on its way at the end is answered or lost, too.
			request, err := http.NewRequestWithContext(context.WithoutCancel(ctx), http.MethodGet, "http://"+s.node.Address()+"/", nil)
			if err == nil {
				request.Host = failoverHost
				var response *http.Response
				if response, err = client.Do(request); err == nil {
					response.Body.Close()
					if response.StatusCode != http.StatusOK {
						err = errors.New(response.Status)
					}
				}
			}
			s.mu.Lock()
			defer s.mu.Unlock()
			s.sent++
			if err != nil {
				s.lost++
				s.last = max(s.last, sent.Sub(s.begin))
			}
		})
	}
}

// writes writes to the API again and again, and measures the longest time without a success.
type writes struct {
	done    int
	longest time.Duration
}

func (w *writes) run(ctx context.Context, client kubernetes.Interface) {
	last := time.Now()
	for i := 0; ctx.Err() == nil; i++ {
		limited, cancel := context.WithTimeout(ctx, writeLimit)
		object := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{GenerateName: "write-"}, Data: map[string]string{"number": strconv.Itoa(i)}}
		_, err := client.CoreV1().ConfigMaps(failoverNamespace).Create(limited, object, metav1.CreateOptions{})
		cancel()
		if err == nil {
			now := time.Now()
			w.longest = max(w.longest, now.Sub(last))
			w.done++
			last = now
		}
		_ = wait(ctx, writePace)
	}
	w.longest = max(w.longest, time.Since(last))
}

// failoverRows are what was lost.
func failoverRows() (rows []row) {
	for _, i := range []incident{serverKilled, agentDies, oneOfThree} {
		rows = append(rows,
			row{i.figure("API away"), i.what + ": longest time without a write to the API", "s", "", ""},
			row{i.figure("sent"), i.what + ": requests sent through the gateway", "", "", ""},
			row{i.figure("lost"), i.what + ": of them lost", "", "", ""},
			row{i.figure("last lost"), i.what + ": the last lost one was sent after", "s", "", ""})
		switch i {
		case agentDies:
			rows = append(rows,
				row{i.figure("NotReady"), "its node is NotReady after", "s", "", ""},
				row{i.figure("endpoints"), "its pods are no endpoints after", "s", "", ""},
				row{i.figure("quick elsewhere"), fmt.Sprintf("its pods with tolerationSeconds %d run elsewhere after", quickSeconds), "s", "", ""},
				row{i.figure("default elsewhere"), "its other pods run elsewhere after", "s", "", ""})
		case oneOfThree:
			rows = append(rows, row{i.figure("back"), "with power again, the server is ready after", "s", "", ""})
		}
	}
	return rows
}
