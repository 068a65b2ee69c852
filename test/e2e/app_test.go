//go:build e2e

package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net/http"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"polymesh.dev/polymesh/test/e2e/node"
)

const (
	appNamespace = "polyglot-services"
	appHost      = "api.example.com"
)

// ask sends one request through the gateway, from outside, and returns status and body.
func ask(client *http.Client, n *node.Node, method, host, path string, body []byte) (int, string, error) {
	request, err := http.NewRequest(method, "http://"+n.Address()+path, bytes.NewReader(body))
	if err != nil {
		return 0, "", err
	}
	request.Host = host
	request.Header.Set("Content-Type", "application/json")
	response, err := client.Do(request)
	if err != nil {
		return 0, "", err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	return response.StatusCode, string(text), err
}

// predict requests a prediction of data.
func predict(client *http.Client, n *node.Node, data []float64) (status int, prediction, confidence float64, err error) {
	body, err := json.Marshal(map[string]any{"data": data})
	if err != nil {
		return 0, 0, 0, err
	}
	status, text, err := ask(client, n, http.MethodPost, appHost, "/api/v1/predict", body)
	if err != nil || status != http.StatusOK {
		return status, 0, 0, err
	}
	var answer struct{ Prediction, Confidence *float64 }
	if err := json.Unmarshal([]byte(text), &answer); err != nil || answer.Prediction == nil || answer.Confidence == nil {
		return status, 0, 0, fmt.Errorf("the answer is %q (%v)", text, err)
	}
	return status, *answer.Prediction, *answer.Confidence, nil
}

func TestPredict(t *testing.T) {
	n := app(t)
	client := n.HTTP(true)
	for range 30 {
		data := make([]float64, 1+rand.IntN(50))
		sum := 0.0
		for i := range data {
			data[i] = rand.NormFloat64() * 1000
			sum += data[i]
		}
		want := sum / float64(len(data))
		status, got, confidence, err := predict(client, n, data)
		if err != nil || status != http.StatusOK {
			t.Fatalf("predict %v: status %d, %v", data, status, err)
		}
		if math.Abs(got-want) > 1e-9 || confidence != 0.95 {
			t.Errorf("predict %v: got %v and %v, want %v and 0.95", data, got, confidence, want)
		}
	}
}

// The answers come from the FastAPI pods and from nowhere else.
func TestPredictNeedsItsPods(t *testing.T) {
	n := app(t)
	client := n.HTTP(false)
	k8s := n.Client(t)
	t.Cleanup(func() {
		n.Kubectl(t, "scale", "deployment/fastapi-service", "-n", appNamespace, "--replicas=2")
		n.WaitRollout(t, appNamespace, "deployment/fastapi-service")
		n.Eventually(t, time.Minute, func() (bool, string) {
			status, _, _, err := predict(client, n, []float64{1, 2})
			return status == http.StatusOK, fmt.Sprintf("predict again: status %d, %v", status, err)
		})
	})
	n.Kubectl(t, "scale", "deployment/fastapi-service", "-n", appNamespace, "--replicas=0")
	n.Eventually(t, 2*time.Minute, func() (bool, string) {
		pods, err := k8s.CoreV1().Pods(appNamespace).List(t.Context(), metav1.ListOptions{LabelSelector: "app=fastapi-service"})
		if err != nil {
			return false, err.Error()
		}
		return len(pods.Items) == 0, fmt.Sprintf("%d FastAPI pods are still there", len(pods.Items))
	})
	n.Eventually(t, time.Minute, func() (bool, string) {
		status, _, _, err := predict(client, n, []float64{1, 2})
		return status == http.StatusServiceUnavailable, fmt.Sprintf("predict without pods: status %d, %v", status, err)
	})
}

func TestBadRequest(t *testing.T) {
	n := app(t)
	for body, want := range map[string]int{`{"data": []}`: 422, `{"data": "x"}`: 422, `{`: 422} {
		if status, text, err := ask(n.HTTP(false), n, http.MethodPost, appHost, "/api/v1/predict", []byte(body)); err != nil || status != want {
			t.Errorf("predict %s: status %d %s %v, want %d", body, status, text, err, want)
		}
	}
	if status, _, err := ask(n.HTTP(false), n, http.MethodGet, "other.test", "/api/v1/call-go", nil); err != nil || status != http.StatusNotFound {
		t.Errorf("a host that the gateway does not serve: status %d %v, want 404", status, err)
	}
}

// A request to FastAPI that calls the Go service is seen by both sidecars, and arrives at the second one over mTLS with
// the identity of the caller.
func TestCallGo(t *testing.T) {
	n := app(t)
	const caller = "spiffe://cluster.local/ns/polyglot-services/sa/default"
	left := func() float64 {
		return requests(t, n, "fastapi-service", map[string]string{
			"reporter": "source", "destination_service_name": "go-service", "response_code": "200",
		})
	}
	arrived := func() float64 {
		return requests(t, n, "go-service", map[string]string{
			"reporter": "destination", "source_principal": caller, "connection_security_policy": "mutual_tls", "response_code": "200",
		})
	}
	leftBefore, arrivedBefore := left(), arrived()
	const count = 20
	client := n.HTTP(true)
	for range count {
		status, text, err := ask(client, n, http.MethodGet, appHost, "/api/v1/call-go", nil)
		if err != nil || status != http.StatusOK {
			t.Fatalf("call-go: status %d %s, %v", status, text, err)
		}
		var answer struct {
			Response struct {
				Status    string
				Timestamp time.Time
			} `json:"go_service_response"`
		}
		if err := json.Unmarshal([]byte(text), &answer); err != nil || answer.Response.Status != "healthy" || time.Since(answer.Response.Timestamp).Abs() > time.Hour {
			t.Fatalf("call-go answers %s (%v)", text, err)
		}
	}
	// A proxy counts a request when its stream has ended, which may be a moment after the answer.
	n.Eventually(t, 30*time.Second, func() (bool, string) {
		l, a := left()-leftBefore, arrived()-arrivedBefore
		return l >= count && a >= count, fmt.Sprintf("FastAPI's sidecars have counted %v requests to the Go service, and its sidecars %v from there over mTLS; want %d", l, a, count)
	})
}

// requests is requestsIn for the guide's app.
func requests(t *testing.T, n *node.Node, app string, labels map[string]string) float64 {
	t.Helper()
	return requestsIn(t, n, appNamespace, app, labels)
}

// requestsIn sums istio_requests_total of all sidecars of an app, where the labels have these values. It asks where
// Prometheus does: injection has moved the pods' annotations to this port and path.
func requestsIn(t *testing.T, n *node.Node, namespace, app string, labels map[string]string) float64 {
	t.Helper()
	pods, err := n.Client(t).CoreV1().Pods(namespace).List(t.Context(), metav1.ListOptions{LabelSelector: "app=" + app})
	if err != nil || len(pods.Items) == 0 {
		t.Fatalf("%d pods of %s, %v", len(pods.Items), app, err)
	}
	total := 0.0
	for _, p := range pods.Items {
		total += requestsOf(t, n, &p, labels)
	}
	return total
}

// requestsOf is requestsIn for one pod.
func requestsOf(t *testing.T, n *node.Node, p *corev1.Pod, labels map[string]string) float64 {
	t.Helper()
	resp, err := n.HTTPInside(false).Get("http://" + p.Status.PodIP + ":15020/stats/prometheus")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	stats, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("metrics of %s: %s, %v", p.Name, resp.Status, err)
	}
	return sum(string(stats), labels)
}

var (
	requestsSample = regexp.MustCompile(`^istio_requests_total\{(.*)\} (\S+)$`)
	label          = regexp.MustCompile(`([a-z_]+)="([^"]*)"`)
)

func sum(stats string, want map[string]string) float64 {
	total := 0.0
	for line := range strings.Lines(stats) {
		m := requestsSample.FindStringSubmatch(strings.TrimSpace(line))
		if m == nil {
			continue
		}
		have := map[string]string{}
		for _, l := range label.FindAllStringSubmatch(m[1], -1) {
			have[l[1]] = l[2]
		}
		match := true
		for k, v := range want {
			match = match && have[k] == v
		}
		if value, err := strconv.ParseFloat(m[2], 64); match && err == nil {
			total += value
		}
	}
	return total
}
