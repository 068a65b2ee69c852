//go:build e2e

package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"regexp"
	"strconv"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"polymesh.dev/polymesh/test/e2e/node"
)

// noRejects looks for configuration that an Envoy has refused, on both sides: each proxy that runs counts what it refused
// (update_rejected), and istiod what any proxy ever refused (pilot_total_xds_rejects).
func noRejects(ctx context.Context, n *node.Node) error {
	client, err := n.NewClient()
	if err != nil {
		return err
	}
	pods, err := client.CoreV1().Pods(metav1.NamespaceAll).List(ctx, metav1.ListOptions{})
	if err != nil {
		return err
	}
	var failures []error
	proxies, planes := 0, 0
	for _, p := range pods.Items {
		name := p.Namespace + "/" + p.Name
		if p.Labels["app"] == "istiod" {
			planes++
			failures = append(failures, noRejectsByPlane(n, name, p.Status.PodIP))
		}
		if p.DeletionTimestamp != nil {
			continue
		}
		for _, c := range append(p.Spec.InitContainers, p.Spec.Containers...) {
			if c.Name != "istio-proxy" {
				continue
			}
			proxies++
			stats, err := n.Exec(p.Namespace, p.Name, c.Name, "pilot-agent", "request", "GET", "stats?filter=update_rejected|update_success")
			if err != nil {
				failures = append(failures, err)
				continue
			}
			failures = append(failures, noRejectsByProxy(name, stats))
		}
	}
	if proxies == 0 || planes == 0 {
		failures = append(failures, fmt.Errorf("%d proxies and %d control planes: there must be some of each", proxies, planes))
	}
	return errors.Join(failures...)
}

// noRejectsByProxy reads lines such as `cluster_manager.cds.update_rejected: 0` of Envoy's admin interface.
func noRejectsByProxy(name, stats string) error {
	accepted := false
	var failures []error
	for line := range strings.Lines(stats) {
		stat, value, ok := strings.Cut(strings.TrimSpace(line), ": ")
		if !ok {
			continue
		}
		if strings.HasSuffix(stat, "update_success") && value != "0" {
			accepted = true
		}
		if strings.HasSuffix(stat, "update_rejected") && value != "0" {
			failures = append(failures, fmt.Errorf("the Envoy of %s has refused %s updates: %s", name, value, stat))
		}
	}
	if !accepted {
		failures = append(failures, fmt.Errorf("the Envoy of %s has accepted nothing either:\n%s", name, stats))
	}
	return errors.Join(failures...)
}

var (
	rejectsMetric = regexp.MustCompile(`(?m)^pilot_total_xds_rejects(?:\{[^}]*\})? (\S+)$`)
	pushesMetric  = regexp.MustCompile(`(?m)^pilot_xds_pushes\{[^}]*\} [1-9]`)
)

func noRejectsByPlane(n *node.Node, name, address string) error {
	resp, err := n.HTTPInside(false).Get("http://" + address + ":15014/metrics")
	if err != nil {
		return fmt.Errorf("metrics of %s: %w", name, err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return fmt.Errorf("metrics of %s: %w", name, err)
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("metrics of %s: %s", name, resp.Status)
	}
	if !pushesMetric.Match(text) {
		return fmt.Errorf("the metrics of %s know of no push: they are not those of a control plane at work", name)
	}
	// A counter that was never raised may not be there.
	for _, m := range rejectsMetric.FindAllStringSubmatch(string(text), -1) {
		if count, err := strconv.ParseFloat(m[1], 64); err != nil || count != 0 {
			return fmt.Errorf("%s counts %s refused pushes", name, m[1])
		}
	}
	return nil
}

// The last check of the shared node would show it.
func TestRejectsAreSeen(t *testing.T) {
	ownNodes(t, 0)
	for stats, want := range map[string]string{
		"cluster_manager.cds.update_success: 3\ncluster_manager.cds.update_rejected: 0\n":             "",
		"cluster_manager.cds.update_success: 3\nlistener_manager.lds.update_rejected: 2\n":            "refused 2 updates: listener_manager.lds",
		"cluster_manager.cds.update_success: 0\nlistener_manager.lds.update_rejected: 0\n":            "accepted nothing",
		"upstream connect error or disconnect/reset before headers. reset reason: connection failure": "accepted nothing",
	} {
		err := noRejectsByProxy("pod", stats)
		if got := fmt.Sprint(err); want == "" && err != nil || want != "" && !strings.Contains(got, want) {
			t.Errorf("%q: got %s, want %q", stats, got, want)
		}
	}
}
