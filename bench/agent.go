package main

import (
	"context"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"polymesh.dev/polymesh/test/e2e/node"
)

// agent measures how a machine joins a server as an agent, from an empty data dir and again, and the agent at rest.
func (b *bench) agent(ctx context.Context) (err error) {
	c, err := node.NewCluster()
	if err != nil {
		return err
	}
	defer closeCluster(ctx, c, &err)
	server, err := c.Add(node.Options{Args: []string{"--disable", "istio"}})
	if err != nil {
		return err
	}
	if err := server.Start(ctx); err != nil {
		return err
	}
	if err := eventually(ctx, server, startLimit, func() error { return server.Ready(ctx) }); err != nil {
		return err
	}
	n, err := c.Add(node.Options{Joins: server})
	if err != nil {
		return err
	}
	if err := b.start(ctx, n, joined(n, agentReady), allReady(n, agentAll)); err != nil {
		return err
	}
	if err := b.rest(ctx, n, agentIdle); err != nil {
		return err
	}
	if err := n.Stop(ctx); err != nil {
		return err
	}
	return b.start(ctx, n, joined(n, agentReadyAgain), allReady(n, agentAllAgain))
}

// joined requires a report of this start from the agent's node.
func joined(n *node.Node, figure figureID) milestone {
	name := ""
	c := &cluster{n: n}
	return milestone{figure, func(ctx context.Context, begin time.Time) (err error) {
		if name == "" {
			r, err := n.Report(ctx)
			if err != nil {
				return err
			}
			name = r.Node
		}
		if c.client == nil {
			if c.client, err = n.NewClient(); err != nil {
				return err
			}
		}
		found, err := c.client.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		for _, cond := range found.Status.Conditions {
			if cond.Type == corev1.NodeReady && cond.Status == corev1.ConditionTrue && !cond.LastHeartbeatTime.Time.Before(begin.Truncate(time.Second)) {
				return nil
			}
		}
		return fmt.Errorf("node %s is not Ready", name)
	}}
}
