package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"polymesh.dev/polymesh/test/e2e/node"
)

// startLimit ends a start that hangs; it is not a speed requirement.
const startLimit = 10 * time.Minute

// growLimit ends pods that never become ready. 5,000 of them take ten minutes beside PostgreSQL on two cores.
const growLimit = 30 * time.Minute

// milestone is a point during a start.
type milestone struct {
	figure  figureID
	reached func(ctx context.Context, begin time.Time) error
}

// start starts the server and records when it reaches each milestone.
func (b *bench) start(ctx context.Context, n *node.Node, milestones ...milestone) error {
	begin := time.Now()
	if err := n.Start(ctx); err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	for _, m := range milestones {
		g.Go(func() error {
			if err := eventually(ctx, n, startLimit, func() error { return m.reached(ctx, begin) }); err != nil {
				return fmt.Errorf("%s: %w", m.figure, err)
			}
			b.results.add(m.figure, time.Since(begin).Seconds())
			return nil
		})
	}
	return g.Wait()
}

// cluster is a client for a node's API server, available as soon as there is a kubeconfig.
type cluster struct {
	n      *node.Node
	client *kubernetes.Clientset
}

func (c *cluster) connect() (err error) {
	if c.client != nil {
		return nil
	}
	if _, err := os.Stat(c.n.Kubeconfig()); err != nil {
		return errors.New("there is no kubeconfig yet")
	}
	c.client, err = c.n.NewClient()
	return err
}

func apiReady(n *node.Node, figure figureID) milestone {
	c := &cluster{n: n}
	return milestone{figure, func(ctx context.Context, _ time.Time) error {
		if err := c.connect(); err != nil {
			return err
		}
		body, err := c.client.RESTClient().Get().AbsPath("/readyz").DoRaw(ctx)
		if err == nil && string(body) != "ok" {
			err = fmt.Errorf("/readyz returned %q", body)
		}
		return err
	}}
}

// nodeReady requires a report of this start: an earlier one may still be Ready.
func nodeReady(n *node.Node, figure figureID) milestone {
	c := &cluster{n: n}
	return milestone{figure, func(ctx context.Context, begin time.Time) error {
		if err := c.connect(); err != nil {
			return err
		}
		nodes, err := c.client.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
		if err != nil {
			return err
		}
		for _, node := range nodes.Items {
			for _, cond := range node.Status.Conditions {
				// Times in the API have no fractions of a second.
				if cond.Type == corev1.NodeReady && cond.Status == corev1.ConditionTrue && !cond.LastHeartbeatTime.Time.Before(begin.Truncate(time.Second)) {
					return nil
				}
			}
		}
		return errors.New("the node is not Ready")
	}}
}

func allReady(n *node.Node, figure figureID) milestone {
	return milestone{figure, func(ctx context.Context, _ time.Time) error {
		r, err := n.Report(ctx)
		if err != nil {
			return err
		}
		for _, c := range r.Components {
			if c.State != "Ready" {
				return fmt.Errorf("%s is %s: %s", c.Name, c.State, c.Message)
			}
		}
		return nil
	}}
}

func istiodReady(n *node.Node, figure figureID) milestone {
	c := &cluster{n: n}
	return milestone{figure, func(ctx context.Context, _ time.Time) error {
		if err := c.connect(); err != nil {
			return err
		}
		d, err := c.client.AppsV1().Deployments("istio-system").Get(ctx, "istiod", metav1.GetOptions{})
		if err == nil && d.Status.ReadyReplicas == 0 {
			err = errors.New("istiod is not Ready")
		}
		return err
	}}
}

// gateway makes the ingress gateway listen; without any Gateway its Envoy has no listener.
const gateway = `{"apiVersion": "networking.istio.io/v1", "kind": "Gateway", "metadata": {"name": "bench", "namespace": "default"},
	"spec": {"selector": {"istio": "ingressgateway"}, "servers": [{"port": {"number": 80, "name": "http", "protocol": "HTTP"}, "hosts": ["bench.example.com"]}]}}`

// ingressAnswers creates a Gateway as soon as it is accepted, and waits until Envoy responds from outside, with any
// status: there is no route.
func ingressAnswers(n *node.Node, figure figureID) milestone {
	c := &cluster{n: n}
	made := false
	web := n.HTTP(false)
	web.Timeout = 2 * time.Second
	return milestone{figure, func(ctx context.Context, _ time.Time) error {
		if err := c.connect(); err != nil {
			return err
		}
		if !made {
			err := c.client.RESTClient().Post().AbsPath("/apis/networking.istio.io/v1/namespaces/default/gateways").
				Body([]byte(gateway)).SetHeader("Content-Type", "application/json").Do(ctx).Error()
			if err != nil {
				return err
			}
			made = true
		}
		request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+n.Address()+"/", nil)
		if err != nil {
			return err
		}
		response, err := web.Do(request)
		if err != nil {
			return err
		}
		response.Body.Close()
		if server := response.Header.Get("Server"); server != "istio-envoy" {
			return fmt.Errorf("the response is from %q, not Envoy", server)
		}
		return nil
	}}
}

// bare is comparable to K3s's server: everything except Istio.
func (b *bench) bare(ctx context.Context) error {
	return b.on(ctx, node.Options{Args: []string{"--disable", "istio"}}, func(n *node.Node) error {
		if err := b.start(ctx, n, apiReady(n, bareAPI), nodeReady(n, bareNode), allReady(n, bareAll)); err != nil {
			return err
		}
		if err := b.rest(ctx, n, bareIdle); err != nil {
			return err
		}
		if err := n.Stop(ctx); err != nil {
			return err
		}
		return b.start(ctx, n, apiReady(n, bareAPIAgain), nodeReady(n, bareNodeAgain), allReady(n, bareAllAgain))
	})
}

func (b *bench) mesh(ctx context.Context) error {
	return b.on(ctx, node.Options{Args: []string{"--mesh-profile", "demo"}}, func(n *node.Node) error {
		if err := b.start(ctx, n, apiReady(n, meshAPI), nodeReady(n, meshNode), istiodReady(n, meshIstiod),
			ingressAnswers(n, meshIngress), allReady(n, meshAll)); err != nil {
			return err
		}
		if err := polymesh(ctx, n, "kubectl", "delete", "gateways.networking.istio.io", "bench"); err != nil {
			return err
		}
		if err := b.deployApp(ctx, n); err != nil {
			return err
		}
		if err := b.rest(ctx, n, meshIdle); err != nil {
			return err
		}
		if err := n.Stop(ctx); err != nil {
			return err
		}
		if err := b.start(ctx, n, apiReady(n, meshAPIAgain), nodeReady(n, meshNodeAgain), allReady(n, meshAllAgain)); err != nil {
			return err
		}
		return b.podStarts(ctx, n)
	})
}
