package rollout

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"golang.org/x/sync/errgroup"
	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"polymesh.dev/polymesh/pkg/diagnose"
)

// Istio's metrics (https://istio.io/latest/docs/reference/config/metrics/) and where each proxy's agent serves them.
const (
	requestsMetric = "istio_requests_total"
	durationMetric = "istio_request_duration_milliseconds"
	agentPort      = "15020"
	metricsPath    = "stats/prometheus"
)

// Limits for reading a proxy: the pods of callers belong to other users, and may respond with anything or not at all.
const (
	readTimeout = 10 * time.Second // the default of Options.ReadTimeout
	readAtOnce  = 16
	maxCallers  = 64  // workloads
	maxPods     = 256 // of callers, in one reading
	maxText     = 64 << 20
	maxKept     = 8 << 20  // of the lines that are about the rollout
	maxLine     = 64 << 10 // of one of them
)

// errForbidden means that the user may not read the proxies, which waiting does not change.
var errForbidden = errors.New("you may not read the proxies' metrics: this needs the verb get on pods/proxy")

// errUnread means that the canary's proxies could not be read, so nothing is known about its requests.
var errUnread = errors.New("the metrics of the canary cannot be read")

// reading is the result of reading one proxy.
type reading struct {
	pod      *corev1.Pod
	of       workload
	families map[string]*dto.MetricFamily
	err      error
}

// read reads all proxies. Later reads are compared with the first one. The error wraps errUnread if fewer than half of the canary's
// ready pods could be read; other proxies that could not be read are in unread.
func (m *meter) read(ctx context.Context) error {
	own, failed, err := m.readServers(ctx)
	if err != nil {
		return err
	}
	if failed = append(failed, m.readCallers(ctx, own)...); len(failed) > 0 {
		m.unread = fmt.Sprintf("%d proxies not read: %s", len(failed), failed[0])
	} else {
		m.unread = ""
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return nil
}

// readServers reads the proxies of both versions. It returns the pods of their namespace, and the errors of those that could not be
// read.
func (m *meter) readServers(ctx context.Context) (own []corev1.Pod, failed []string, err error) {
	list, err := m.client.CoreV1().Pods(m.namespace).List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, nil, fmt.Errorf("list the pods in %s: %w", m.namespace, err)
	}
	canary, stable := workload{m.namespace, m.canary}, workload{m.namespace, m.stable}
	read := m.readAll(ctx, slices.Concat(running(list.Items, canary), running(list.Items, stable)))
	if ctx.Err() != nil {
		return nil, nil, context.Cause(ctx)
	}
	var quorum struct {
		ready, read int
		err         error
	}
	for _, r := range read {
		if r.of == canary && diagnose.PodReady(r.pod) {
			quorum.ready++
			if r.err == nil {
				quorum.read++
			} else {
				quorum.err = cmp.Or(quorum.err, r.err)
			}
		}
		if r.err != nil {
			failed = append(failed, r.err.Error())
		}
	}
	switch {
	case errors.Is(quorum.err, errForbidden):
		return nil, nil, quorum.err
	case 2*quorum.read < quorum.ready:
		return nil, nil, fmt.Errorf("%w: %d of %d pods: %w", errUnread, quorum.ready-quorum.read, quorum.ready, quorum.err)
	}
	return list.Items, failed, nil
}

// readCallers reads the proxies of the callers of both versions, and returns the errors of those that could not be read.
func (m *meter) readCallers(ctx context.Context, own []corev1.Pod) (failed []string) {
	var callers []reading
	for _, caller := range slices.SortedFunc(maps.Keys(m.callers), func(a, b workload) int {
		return cmp.Or(cmp.Compare(a.namespace, b.namespace), cmp.Compare(a.name, b.name))
	}) {
		if caller.namespace == m.namespace && (caller.name == m.canary || caller.name == m.stable) {
			continue
		}
		pods := own
		if caller.namespace != m.namespace {
			list, err := m.client.CoreV1().Pods(caller.namespace).List(ctx, metav1.ListOptions{})
			if err != nil {
				failed = append(failed, fmt.Sprintf("list the pods in %s: %v", caller.namespace, err))
				continue
			}
			pods = list.Items
		}
		callers = append(callers, running(pods, caller)...)
	}
	if left := len(callers) - maxPods; left > 0 {
		callers = callers[:maxPods]
		failed = append(failed, fmt.Sprintf("%d more pods of callers", left))
	}
	for _, r := range m.readAll(ctx, callers) {
		if r.err != nil {
			failed = append(failed, r.err.Error())
		}
	}
	return failed
}

// running returns a workload's running pods, to be read.
func running(pods []corev1.Pod, of workload) (out []reading) {
	for i := range pods {
		if pod := &pods[i]; pod.Namespace == of.namespace && workloadOf(pod) == of.name && pod.Status.Phase == corev1.PodRunning {
			out = append(out, reading{pod: pod, of: of})
		}
	}
	return out
}

// readAll reads proxies in parallel, and adds what they report.
func (m *meter) readAll(ctx context.Context, proxies []reading) []reading {
	var group errgroup.Group
	group.SetLimit(readAtOnce)
	for i := range proxies {
		r := &proxies[i]
		group.Go(func() error {
			r.families, r.err = m.pod(ctx, r.pod)
			return nil
		})
	}
	_ = group.Wait()
	for _, r := range proxies {
		if r.err == nil {
			m.add(r.of, string(r.pod.UID), r.families)
		}
	}
	return proxies
}

// pod reads one proxy, through the API server. The client's own ProxyGet has no limit for the length of the response or the time.
func (m *meter) pod(ctx context.Context, pod *corev1.Pod) (map[string]*dto.MetricFamily, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, m.timeout, fmt.Errorf("no complete response within %s", m.timeout))
	defer cancel()
	families, err := func() (map[string]*dto.MetricFamily, error) {
		client, ok := m.client.CoreV1().RESTClient().(*rest.RESTClient)
		if !ok {
			return nil, errors.New("the client has no connection to an API server")
		}
		url := client.Get().Namespace(pod.Namespace).Resource("pods").Name("http:" + pod.Name + ":" + agentPort).SubResource("proxy").Suffix(metricsPath).URL()
		request, err := http.NewRequestWithContext(ctx, http.MethodGet, url.String(), nil)
		if err != nil {
			return nil, err
		}
		response, err := client.Client.Do(request)
		if err != nil {
			return nil, err
		}
		defer response.Body.Close()
		switch response.StatusCode {
		case http.StatusOK:
			return parseMetrics(response.Body, m.namespace)
		case http.StatusUnauthorized, http.StatusForbidden:
			// The status may also be the pod's.
			if allowed, err := m.mayRead(ctx, pod.Namespace); err == nil && !allowed {
				return nil, errForbidden
			}
		}
		return nil, fmt.Errorf("its agent cannot be reached: the response is %s", http.StatusText(response.StatusCode))
	}()
	if err != nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		return nil, fmt.Errorf("pod/%s -n %s: %w", pod.Name, pod.Namespace, err)
	}
	return families, nil
}

// mayRead reports whether the user may read pods' proxies in a namespace.
func (m *meter) mayRead(ctx context.Context, namespace string) (bool, error) {
	review, err := m.client.AuthorizationV1().SelfSubjectAccessReviews().Create(ctx, &authorizationv1.SelfSubjectAccessReview{
		Spec: authorizationv1.SelfSubjectAccessReviewSpec{ResourceAttributes: &authorizationv1.ResourceAttributes{
			Namespace: namespace, Verb: "get", Resource: "pods", Subresource: "proxy"}},
	}, metav1.CreateOptions{})
	if err != nil {
		return false, err
	}
	return review.Status.Allowed, nil
}

// parseMetrics reads the two metrics of a namespace from an agent's response, which also contains the app's own metrics.
func parseMetrics(text io.Reader, namespace string) (map[string]*dto.MetricFamily, error) {
	limited := &io.LimitedReader{R: text, N: maxText}
	lines := bufio.NewReaderSize(limited, maxLine)
	about := []byte(`namespace="` + namespace + `"`)
	var kept bytes.Buffer
	for {
		line, err := lines.ReadSlice('\n')
		name, isType := bytes.CutPrefix(line, []byte("# TYPE "))
		ours := (bytes.HasPrefix(name, []byte(requestsMetric)) || bytes.HasPrefix(name, []byte(durationMetric))) && (isType || errors.Is(err, bufio.ErrBufferFull) || bytes.Contains(line, about))
		switch {
		case ours && errors.Is(err, bufio.ErrBufferFull):
			return nil, fmt.Errorf("its metrics have a line of more than %d bytes", maxLine)
		case ours && kept.Len()+len(line) > maxKept:
			return nil, fmt.Errorf("its metrics have more than %d bytes about this rollout", maxKept)
		case ours:
			kept.Write(bytes.TrimRight(line, "\r\n"))
			kept.WriteByte('\n')
		}
		for errors.Is(err, bufio.ErrBufferFull) { // a long line of the app's
			_, err = lines.ReadSlice('\n')
		}
		switch {
		case limited.N <= 0:
			return nil, fmt.Errorf("its metrics have more than %d bytes", maxText)
		case errors.Is(err, io.EOF):
			parser := expfmt.NewTextParser(model.UTF8Validation)
			families, err := parser.TextToMetricFamilies(&kept)
			if err != nil {
				return nil, fmt.Errorf("its metrics cannot be read: %s", strings.TrimSpace(err.Error()))
			}
			return families, nil
		case err != nil:
			return nil, fmt.Errorf("read its metrics: %w", err)
		}
	}
}
