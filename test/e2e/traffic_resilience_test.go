//go:build e2e

package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// The guide's circuit breaker lets 1,000 requests pass at once. What comes above that is rejected by the client's own
// sidecar, and its statistics, its access log and Istio's metric agree with the client about how many these were.
func TestTrafficCircuitBreaker(t *testing.T) {
	s := newScenario(t, "circuit-breaker")
	s.eventuallyTally(func(seen tally) bool { return seen.Status[200] == 10 }, "-n", "10", myService)
	if count := s.stat("", "upstream_cx_http2_total"); count != 0 {
		t.Errorf("%d HTTP/2 connections without h2UpgradePolicy", count)
	}
	s.applyHere("circuit-breaker.yaml")
	// The client speaks HTTP/1.1 to its sidecar, which from now on speaks HTTP/2 to the server's.
	s.Eventually(t, time.Minute, func() (bool, string) {
		seen, err := s.tally("-n", "10", "-k=false", myService)
		count := s.stat("", "upstream_cx_http2_total")
		return err == nil && seen.Status[200] == 10 && count > 0, fmt.Sprintf("%+v %v, %d HTTP/2 connections", seen, err, count)
	})
	// limit waits for the limit on requests that wait, in the server's sidecar.
	limit := func(want int) {
		t.Helper()
		s.Eventually(t, time.Minute, func() (bool, string) {
			list := s.clusters("my-service", "--direction", "inbound", "--port", "8080")
			ok := len(list) == 1 && len(list[0].CircuitBreakers.Thresholds) == 1
			return ok && list[0].CircuitBreakers.Thresholds[0].MaxPendingRequests == want, fmt.Sprintf("the server's sidecar has %+v, want %d", list, want)
		})
	}
	// refusals are the lines with the response flag UO, upstream overflow, in the access log of a Deployment's sidecar.
	refusals := func(deployment string) int {
		t.Helper()
		return strings.Count(s.Kubectl(t, "logs", "-n", s.name, "deployment/"+deployment, "-c", "istio-proxy", "--tail=-1"), " 503 UO ")
	}
	const count = 1500
	// burst sends all at once to a server that takes its time, and returns how many of them were refused.
	burst := func() int {
		t.Helper()
		seen := s.mustTally("-n", fmt.Sprint(count), "-c", fmt.Sprint(count), "-timeout", "90s", myService+"?delay=10s")
		t.Logf("%+v", seen)
		if seen.Status[503] == 0 || seen.Status[200] == 0 || seen.Status[503]+seen.Status[200] != count {
			t.Fatalf("%d requests at once: %+v, want 200 for some of them and 503 for the rest", count, seen)
		}
		return seen.Status[503]
	}

	// Istio gives the rule to the server's sidecar too. That speaks HTTP/1.1 to the app, so that its limit is 100
	// connections and 100 requests that wait for one.
	limit(100)
	refused := burst()
	byServer, byClient := 0, 0
	s.Eventually(t, time.Minute, func() (bool, string) {
		byServer, byClient = refusals("my-service"), refusals("client")
		return byServer > 0 && byServer+byClient == refused,
			fmt.Sprintf("of %d refused requests %d have UO in the server's access log and %d in the client's", refused, byServer, byClient)
	})

	// With that out of the way it is the client's sidecar that refuses.
	s.apply("server.yaml")
	limit(10_000)
	refused = burst()
	s.Eventually(t, time.Minute, func() (bool, string) {
		logged := refusals("client")
		// Envoy has two counters: for requests that find no place among those under way, and among those that wait.
		active, pending := s.stat("", "upstream_rq_active_overflow"), s.stat("", "upstream_rq_pending_overflow")
		metric := int(requestsIn(t, s.Node, s.name, "client", map[string]string{
			"reporter": "source", "destination_service_name": "my-service", "response_code": "503", "response_flags": "UO",
		}))
		return logged == byClient+refused && active+pending == logged && metric == logged,
			fmt.Sprintf("%d requests were refused, %d before; the client's access log has %d with UO, its Envoy %d and %d overflows, istio_requests_total %d with UO",
				refused, byClient, logged, active, pending, metric)
	})
	if again := refusals("my-service"); again != byServer {
		t.Errorf("the server's sidecar has refused %d more requests", again-byServer)
	}
	// There is room again.
	if seen := s.mustTally("-n", "100", "-c", "4", myService); seen.Status[200] != 100 {
		t.Errorf("after the load: %+v, want 100 times 200", seen)
	}
}

// podNames returns the names of the scenario's pods of my-service.
func (s *scenario) podNames() []string {
	s.t.Helper()
	pods, err := s.Client(s.t).CoreV1().Pods(s.name).List(s.t.Context(), metav1.ListOptions{LabelSelector: "app=my-service"})
	if err != nil {
		s.t.Fatal(err)
	}
	var names []string
	for _, p := range pods.Items {
		names = append(names, p.Name)
	}
	return names
}

// set changes the responses of one pod of the scenario: a query for the echo image's /set.
func (s *scenario) set(pod, query string) {
	s.t.Helper()
	if _, err := s.Exec(s.name, pod, "echo", "/echo", "get", "http://127.0.0.1:8080/set?"+query); err != nil {
		s.t.Fatal(err)
	}
}

// Who of three pods gets how many requests is the load balancer's choice.
func TestTrafficLoadBalancing(t *testing.T) {
	s := newScenario(t, "load-balancing")
	pods := s.podNames()
	policy := func(file, name string) {
		t.Helper()
		s.apply(file)
		s.Eventually(t, time.Minute, func() (bool, string) {
			// Envoy's JSON leaves the first value of an enumeration out.
			have := s.myServiceCluster("").LBPolicy
			return have == name || have == "" && name == "ROUND_ROBIN", fmt.Sprintf("%s: the client's Envoy has the policy %q", file, have)
		})
		s.eventuallyTally(func(seen tally) bool { return seen.Status[200] == 30 }, "-n", "30", myService)
	}
	const count = 300
	// shares sends requests and wants each pod to answer a number of them between least and most.
	shares := func(least, most int, args ...string) {
		t.Helper()
		seen := s.mustTally(append(args, "-n", fmt.Sprint(count), myService)...)
		t.Logf("%+v", seen)
		for _, pod := range pods {
			if got := seen.Pods[pod]; got < least || got > most {
				t.Errorf("%+v, want %d to %d for each pod", seen, least, most)
				break
			}
		}
	}

	policy("round-robin.yaml", "ROUND_ROBIN")
	// One connection of the client is one thread of its Envoy, which goes round on its own.
	shares(98, 102)

	policy("random.yaml", "RANDOM")
	// Five standard deviations to both sides of 100.
	shares(59, 141, "-c", "4")

	slow := pods[0]
	s.set(slow, "delay=500ms")
	policy("least-request.yaml", "LEAST_REQUEST")
	seen := s.mustTally("-n", fmt.Sprint(count), "-c", "4", myService)
	t.Logf("%+v", seen)
	// Of two random pods, which may be the same, the one with fewer open requests: for the slow one a ninth and not much
	// more, 33.
	if seen.Pods[slow] > 70 || seen.Status[200] != count {
		t.Errorf("%+v, want at most 70 for the slow pod %s", seen, slow)
	}

	s.set(slow, "")
	policy("consistent-hash.yaml", "RING_HASH")
	used := map[string]bool{}
	for user := range 12 {
		seen := s.mustTally("-n", "10", "-c", "2", "-H", fmt.Sprintf("x-user: user-%d", user), myService)
		if len(seen.Pods) != 1 || seen.Status[200] != 10 {
			t.Errorf("user %d: %+v, want always the same pod", user, seen)
		}
		for pod := range seen.Pods {
			used[pod] = true
		}
	}
	if len(used) < 2 {
		t.Errorf("all users reach %v", used)
	}
}

// A pod that answers 500 gets no requests for a while, and gets its share again when it is healthy.
func TestTrafficOutlier(t *testing.T) {
	s := newScenario(t, "outlier")
	s.apply("outlier.yaml")
	s.Eventually(t, time.Minute, func() (bool, string) {
		have := s.myServiceCluster("").OutlierDetection
		return have.Consecutive5xx == 3, fmt.Sprintf("the client's Envoy has %+v", have)
	})
	const count = 60
	everyPod := func(seen tally) bool { return seen.Status[200] == count && len(seen.Pods) == 3 }
	s.eventuallyTally(everyPod, "-n", fmt.Sprint(count), myService)

	failing := s.podNames()[0]
	s.set(failing, "status=500")
	s.Eventually(t, time.Minute, func() (bool, string) {
		seen, err := s.tally("-n", fmt.Sprint(count), myService)
		ejected := s.stat("", "outlier_detection.ejections_active")
		return err == nil && seen.Status[200] == count && seen.Pods[failing] == 0 && len(seen.Pods) == 2 && ejected == 1,
			fmt.Sprintf("%s fails: %+v %v, %d pods are ejected", failing, seen, err, ejected)
	})
	if count := s.stat("", "outlier_detection.ejections_enforced_consecutive_5xx"); count == 0 {
		t.Error("the client's Envoy has counted no ejection for 5xx")
	}

	s.set(failing, "")
	s.Eventually(t, 2*time.Minute, func() (bool, string) {
		seen, err := s.tally("-n", fmt.Sprint(count), myService)
		ejected := s.stat("", "outlier_detection.ejections_active")
		return err == nil && everyPod(seen) && ejected == 0, fmt.Sprintf("%s works: %+v %v, %d pods are ejected", failing, seen, err, ejected)
	})
}

// The client's sidecar answers in the server's place, or holds a request back.
func TestTrafficFault(t *testing.T) {
	s := newScenario(t, "fault")
	s.apply("fault.yaml")
	// flagged is how many requests the client's sidecar has counted with a response flag.
	flagged := func(flag string) int {
		t.Helper()
		return int(requestsIn(t, s.Node, s.name, "client", map[string]string{
			"reporter": "source", "destination_service_name": "my-service", "response_flags": flag,
		}))
	}
	aborted := 0
	s.eventuallyTally(func(seen tally) bool {
		aborted += seen.Status[503]
		return aborted > 0
	}, "-n", "50", "-H", "x-fault: abort", myService)
	const count = 1000
	seen := s.mustTally("-n", fmt.Sprint(count), "-c", "4", "-H", "x-fault: abort", myService)
	aborted += seen.Status[503]
	// Five standard deviations to both sides of 300.
	if got := seen.Status[503]; got < 228 || got > 372 || got+seen.Status[200] != count {
		t.Errorf("%+v, want 503 for about 300 of %d", seen, count)
	}
	// The metric follows an answer a moment later.
	s.Eventually(t, time.Minute, func() (bool, string) {
		metric := flagged("FI")
		return metric == aborted, fmt.Sprintf("istio_requests_total has %d requests with FI, the client has got %d times 503", metric, aborted)
	})

	begin := time.Now()
	if out, err := s.call("client", "get", "-timeout", "60s", "-H", "x-fault: delay", myService); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if took := time.Since(begin); took < 3*time.Second {
		t.Errorf("the answer came after %s, want 3 s", took)
	}
	s.Eventually(t, time.Minute, func() (bool, string) {
		metric := flagged("DI")
		return metric == 1, fmt.Sprintf("istio_requests_total has %d requests with DI, want 1", metric)
	})

	// Without the header nothing happens to a request.
	if seen := s.mustTally("-n", "100", myService); seen.Status[200] != 100 {
		t.Errorf("%+v, want 100 times 200", seen)
	}
}
