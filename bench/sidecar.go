package main

import (
	"context"
	_ "embed"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"polymesh.dev/polymesh/pkg/status"
	"polymesh.dev/polymesh/test/e2e/node"
)

//go:embed sidecar.yaml
var sidecarManifests string

const (
	restNamespace     = "bench-rest"
	servicesNamespace = "bench-services"
	// endpointsEach is the number of endpoints per service.
	endpointsEach = 2
)

// serviceCounts are the numbers of services in the mesh, besides the node's own.
var serviceCounts = []int{0, 100, 1000}

// sidecarKind is a Deployment in sidecar.yaml.
type sidecarKind struct{ name, what string }

var sidecarKinds = []sidecarKind{{"all", "no Sidecar resource"}, {"scoped", "a Sidecar resource for its own namespace"}}

func (k sidecarKind) figure(services int, what string) figureID {
	return figureID(fmt.Sprintf("sidecar %s %d %s", k.name, services, what))
}

// sidecarFigures are the columns of the table.
var sidecarFigures = []string{"envoy RSS", "envoy anonymous", "agent RSS", "agent anonymous", "RSS", "anonymous", "working set"}

func sidecarMatrix() matrix {
	m := matrix{heads: []string{"one sidecar at rest, MB", "Envoy: RSS", "anonymous", "agent: RSS", "anonymous", "both: RSS", "anonymous", "working set"}}
	for _, k := range sidecarKinds {
		for _, count := range serviceCounts {
			l := line{name: fmt.Sprintf("%d services, %s", count, k.what)}
			for _, what := range sidecarFigures {
				l.ids = append(l.ids, k.figure(count, what))
			}
			m.lines = append(m.lines, l)
		}
	}
	return m
}

// sidecars measures the memory of sidecars without traffic, started in meshes of different sizes.
func (b *bench) sidecars(ctx context.Context) error {
	return b.on(ctx, node.Options{}, func(n *node.Node) error {
		if err := startReady(ctx, n); err != nil {
			return err
		}
		made := 0
		for _, count := range serviceCounts {
			// Imported each time: when the disk is nearly full, the kubelet removes an image that no pod uses.
			if err := b.importArchives(ctx, n, "bench/load.tar"); err != nil {
				return err
			}
			if err := makeServices(ctx, n, made, count); err != nil {
				return fmt.Errorf("make %d services: %w", count, err)
			}
			made = count
			if err := b.measureSidecars(ctx, n, count); err != nil {
				return fmt.Errorf("%d services: %w", count, err)
			}
		}
		return nil
	})
}

// makeServices creates the services with the numbers from first up to, but not including, end. Their endpoints are not reachable.
func makeServices(ctx context.Context, n *node.Node, first, end int) error {
	client, err := n.NewClient()
	if err != nil {
		return err
	}
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: servicesNamespace}}
	if _, err := client.CoreV1().Namespaces().Create(ctx, ns, metav1.CreateOptions{}); err != nil && !apierrors.IsAlreadyExists(err) {
		return err
	}
	return createEach(ctx, n, first, end, func(ctx context.Context, client kubernetes.Interface, i int) error {
		name, port, portName, protocol := fmt.Sprintf("service-%d", i), int32(8080), "http", corev1.ProtocolTCP
		service := &corev1.Service{
			ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: servicesNamespace},
			Spec:       corev1.ServiceSpec{Ports: []corev1.ServicePort{{Name: portName, Port: port}}},
		}
		if _, err := client.CoreV1().Services(servicesNamespace).Create(ctx, service, metav1.CreateOptions{}); err != nil {
			return err
		}
		slice := &discoveryv1.EndpointSlice{
			ObjectMeta:  metav1.ObjectMeta{Name: name, Namespace: servicesNamespace, Labels: map[string]string{discoveryv1.LabelServiceName: name}},
			AddressType: discoveryv1.AddressTypeIPv4,
			Ports:       []discoveryv1.EndpointPort{{Name: &portName, Port: &port, Protocol: &protocol}},
		}
		for e := range endpointsEach {
			address := fmt.Sprintf("198.18.%d.%d", (i*endpointsEach+e)/250, (i*endpointsEach+e)%250+1)
			slice.Endpoints = append(slice.Endpoints, discoveryv1.Endpoint{Addresses: []string{address}})
		}
		_, err := client.DiscoveryV1().EndpointSlices(servicesNamespace).Create(ctx, slice, metav1.CreateOptions{})
		return err
	})
}

// measureSidecars starts a pod of each kind, measures its sidecar, and removes it.
func (b *bench) measureSidecars(ctx context.Context, n *node.Node, services int) error {
	if err := apply(ctx, n, sidecarManifests); err != nil {
		return err
	}
	for _, k := range sidecarKinds {
		if err := polymesh(ctx, n, "kubectl", "rollout", "status", "-n", restNamespace, "deployment/"+k.name, "--timeout=300s"); err != nil {
			return err
		}
		if err := eventually(ctx, n, 2*time.Minute, func() error { return k.check(ctx, n, services) }); err != nil {
			return err
		}
	}
	if err := wait(ctx, b.settle); err != nil {
		return err
	}
	found, err := processesOf(ctx, n)
	if err != nil {
		return err
	}
	sets, err := workingSets(ctx, n)
	if err != nil {
		return err
	}
	for _, k := range sidecarKinds {
		var both process
		for of, name := range map[string]string{"envoy": k.name + ": envoy", "agent": k.name + ": pilot-agent"} {
			p, err := onlyProcess(found, name)
			if err != nil {
				return err
			}
			rss, anonymous := status.Memory(p.PID)
			b.results.add(k.figure(services, of+" RSS"), float64(rss)/1e6)
			b.results.add(k.figure(services, of+" anonymous"), float64(anonymous)/1e6)
			both.RSS += float64(rss) / 1e6
			both.Anonymous += float64(anonymous) / 1e6
		}
		b.results.add(k.figure(services, "RSS"), both.RSS)
		b.results.add(k.figure(services, "anonymous"), both.Anonymous)
		set, ok := sets[k.name]
		if !ok {
			return fmt.Errorf("the kubelet has no statistics of the sidecar of %s", k.name)
		}
		b.results.add(k.figure(services, "working set"), set)
	}
	return polymesh(ctx, n, "kubectl", "delete", "-n", restNamespace, "deployments", "--all", "--cascade=foreground", "--timeout=120s")
}

// onlyProcess returns the only process with this name.
func onlyProcess(found []process, name string) (process, error) {
	var all []process
	for _, p := range found {
		if p.Name == name {
			all = append(all, p)
		}
	}
	if len(all) != 1 {
		return process{}, fmt.Errorf("there are %d processes %q, want one", len(all), name)
	}
	return all[0], nil
}

// check verifies that a sidecar knows the services unless a Sidecar resource excludes them.
func (k sidecarKind) check(ctx context.Context, n *node.Node, services int) error {
	const stat = "cluster_manager.active_clusters: "
	out, err := inPod(ctx, n, restNamespace, k.name, "istio-proxy", "pilot-agent", "request", "GET", "stats?filter=cluster_manager.active_clusters")
	if err != nil {
		return err
	}
	clusters, err := strconv.Atoi(strings.TrimSpace(strings.TrimPrefix(out, stat)))
	if err != nil {
		return fmt.Errorf("the number of clusters of Envoy is %q", out)
	}
	if knows := clusters > services; services > 0 && knows != (k.name == "all") {
		return fmt.Errorf("%s: Envoy has %d clusters, but there are %d services", k.what, clusters, services)
	}
	return nil
}

// workingSets returns the kubelet's values for the sidecars' containers, by Deployment, in MB.
func workingSets(ctx context.Context, n *node.Node) (map[string]float64, error) {
	client, err := n.NewClient()
	if err != nil {
		return nil, err
	}
	nodes, err := client.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, err
	}
	sets := map[string]float64{}
	for _, machine := range nodes.Items {
		text, err := client.CoreV1().RESTClient().Get().Resource("nodes").Name(machine.Name).SubResource("proxy").Suffix("stats/summary").DoRaw(ctx)
		if err != nil {
			return nil, fmt.Errorf("get the kubelet's statistics: %w", err)
		}
		var summary struct {
			Pods []struct {
				PodRef     struct{ Name, Namespace string }
				Containers []struct {
					Name   string
					Memory struct{ WorkingSetBytes float64 }
				}
			}
		}
		if err := json.Unmarshal(text, &summary); err != nil {
			return nil, fmt.Errorf("read the kubelet's statistics: %w", err)
		}
		for _, pod := range summary.Pods {
			for _, c := range pod.Containers {
				if pod.PodRef.Namespace == restNamespace && c.Name == "istio-proxy" && c.Memory.WorkingSetBytes > 0 {
					deployment, _, _ := strings.Cut(pod.PodRef.Name, "-")
					sets[deployment] = c.Memory.WorkingSetBytes / 1e6
				}
			}
		}
	}
	return sets, nil
}
