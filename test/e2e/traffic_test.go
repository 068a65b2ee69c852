//go:build e2e

package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// myService is how a client in a scenario's namespace calls the guide's service.
const myService = "http://my-service/"

// tally is what `echo get -n` prints: how often each answer came, and from where.
type tally struct {
	Status                 map[int]int
	Versions, Pods, Errors map[string]int
}

// tally sends many requests from the scenario's Deployment "client". Responses that report a failure are counted too.
func (s *scenario) tally(args ...string) (tally, error) {
	out, err := s.call("client", append([]string{"get"}, args...)...)
	var seen tally
	if json.Unmarshal([]byte(out), &seen) != nil {
		return seen, fmt.Errorf("%q is not a tally: %w", out, err)
	}
	return seen, nil
}

// mustTally is tally, which must succeed.
func (s *scenario) mustTally(args ...string) tally {
	s.t.Helper()
	seen, err := s.tally(args...)
	if err != nil {
		s.t.Fatal(err)
	}
	return seen
}

// eventuallyTally sends the requests again and again until their tally is right.
func (s *scenario) eventuallyTally(right func(tally) bool, args ...string) {
	s.t.Helper()
	s.Eventually(s.t, time.Minute, func() (bool, string) {
		seen, err := s.tally(args...)
		return err == nil && right(seen), fmt.Sprintf("%v: %+v %v", args, seen, err)
	})
}

// stat reads a statistic of the client's Envoy about my-service or, unless it is empty, one of its subsets.
func (s *scenario) stat(subset, name string) int {
	s.t.Helper()
	filter := `^cluster\.outbound.80.` + subset + `.my-service\.` + s.name + `\..*\.` + name + "$"
	out := s.Kubectl(s.t, "exec", "-n", s.name, "deployment/client", "-c", "istio-proxy", "--",
		"pilot-agent", "request", "GET", "stats?filter="+filter)
	_, text, _ := strings.Cut(strings.TrimSpace(out), ": ")
	value, err := strconv.Atoi(text)
	if err != nil {
		s.t.Fatalf("the client's Envoy returns %q for %s", out, filter)
	}
	return value
}

// envoyCluster is how an Envoy calls a service or one of its subsets, as istioctl shows it.
type envoyCluster struct {
	Name            string
	LBPolicy        string `json:"lbPolicy"`
	CircuitBreakers struct {
		Thresholds []struct{ MaxConnections, MaxPendingRequests, MaxRequests int }
	}
	OutlierDetection struct {
		Consecutive5xx     int `json:"consecutive5xx"`
		Interval           string
		BaseEjectionTime   string
		MaxEjectionPercent int
	}
}

// clusters shows the clusters of a Deployment's Envoy that istioctl's filter lets through.
func (s *scenario) clusters(deployment string, filter ...string) []envoyCluster {
	s.t.Helper()
	args := append([]string{"proxy-config", "cluster", "deployment/" + deployment, "-n", s.name, "-o", "json"}, filter...)
	out := s.Istioctl(s.t, args...)
	var list []envoyCluster
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		s.t.Fatalf("istioctl %v shows %q: %v", args, out, err)
	}
	return list
}

// myServiceCluster is how the client's Envoy calls my-service or, unless it is empty, one of its subsets.
func (s *scenario) myServiceCluster(subset string) envoyCluster {
	s.t.Helper()
	host := "my-service." + s.name + ".svc.cluster.local"
	for _, c := range s.clusters("client", "--fqdn", host) {
		if c.Name == "outbound|80|"+subset+"|"+host {
			return c
		}
	}
	return envoyCluster{}
}

// Weights decide how many requests reach each version, and changing them loses none.
func TestTrafficCanary(t *testing.T) {
	s := newScenario(t, "canary")
	s.apply("subsets.yaml", "canary-90-10.yaml")
	const probe = 200
	s.eventuallyTally(func(seen tally) bool {
		return seen.Status[200] == probe && seen.Versions["v2"] < probe/4
	}, "-n", fmt.Sprint(probe), "-c", "4", myService)

	const count = 10_000
	seen := s.mustTally("-n", fmt.Sprint(count), "-c", "8", myService)
	t.Logf("90/10: %+v", seen)
	if v2 := seen.Versions["v2"]; v2 < 880 || v2 > 1120 || v2+seen.Versions["v1"] != count || seen.Status[200] != count {
		t.Errorf("90/10: %+v, want 880 to 1120 of %d from v2, all of them 200", seen, count)
	}

	sent, end := s.load(myService)
	s.apply("canary-50-50.yaml")
	s.eventuallyTally(func(seen tally) bool {
		return seen.Status[200] == probe && seen.Versions["v2"] > probe/4 && seen.Versions["v1"] > probe/4
	}, "-n", fmt.Sprint(probe), "-c", "4", myService)
	s.apply("canary-100-0.yaml")
	s.eventuallyTally(func(seen tally) bool {
		return seen.Status[200] == probe && seen.Versions["v1"] == probe
	}, "-n", fmt.Sprint(probe), "-c", "4", myService)
	end()
	t.Logf("under load: %+v", *sent)
	total := sent.Versions["v1"] + sent.Versions["v2"]
	if len(sent.Errors) > 0 || len(sent.Status) != 1 || total == 0 || sent.Status[200] != total || sent.Versions["v2"] == 0 {
		t.Errorf("while the weights moved: %+v, want nothing but 200, from both versions", *sent)
	}
}

// load sends requests from the client until end, after which the tally holds what became of them. There are few of them: the
// machine has other work meanwhile.
func (s *scenario) load(url string) (sent *tally, end func()) {
	sent = &tally{Status: map[int]int{}, Versions: map[string]int{}, Pods: map[string]int{}, Errors: map[string]int{}}
	ctx, stop := context.WithCancel(s.t.Context())
	var running sync.WaitGroup
	running.Go(func() {
		for ctx.Err() == nil {
			seen, err := s.tally("-n", "500", "-c", "4", "-r", "50", url)
			if err != nil {
				sent.Errors[err.Error()]++
			}
			sent.add(seen)
		}
	})
	end = func() {
		stop()
		running.Wait()
	}
	s.t.Cleanup(end)
	return sent, end
}

func (c *tally) add(more tally) {
	for status, count := range more.Status {
		c.Status[status] += count
	}
	for _, part := range [][2]map[string]int{{c.Versions, more.Versions}, {c.Pods, more.Pods}, {c.Errors, more.Errors}} {
		for what, count := range part[1] {
			part[0][what] += count
		}
	}
}

// The guide's three objects for my-service work together, as they are: the canary's weights and subsets, and the circuit
// breaker in a separate DestinationRule.
func TestTrafficGuide(t *testing.T) {
	s := newScenario(t, "guide")
	s.applyHere("canary-release.yaml", "circuit-breaker.yaml")
	for _, subset := range []string{"", "v1", "v2"} {
		s.Eventually(t, time.Minute, func() (bool, string) {
			c := s.myServiceCluster(subset)
			what := fmt.Sprintf("subset %q: %+v", subset, c)
			if len(c.CircuitBreakers.Thresholds) != 1 {
				return false, what
			}
			limits, outliers := c.CircuitBreakers.Thresholds[0], c.OutlierDetection
			return limits.MaxConnections == 100 && limits.MaxPendingRequests == 100 && limits.MaxRequests == 1000 &&
				outliers.Consecutive5xx == 5 && outliers.Interval == "30s" && outliers.BaseEjectionTime == "30s" && outliers.MaxEjectionPercent == 50, what
		})
	}
	const probe, count = 200, 2000
	s.eventuallyTally(func(seen tally) bool {
		return seen.Status[200] == probe && seen.Versions["v2"] < probe/4
	}, "-n", fmt.Sprint(probe), "-c", "4", myService)
	seen := s.mustTally("-n", fmt.Sprint(count), "-c", "8", myService)
	// Five standard deviations to both sides of 200.
	if v2 := seen.Versions["v2"]; v2 < 133 || v2 > 267 || v2+seen.Versions["v1"] != count || seen.Status[200] != count {
		t.Errorf("%+v, want about 200 of %d from v2, all of them 200", seen, count)
	}
	// h2UpgradePolicy of the one rule holds for the subsets of the other.
	for _, subset := range []string{"v1", "v2"} {
		if s.stat(subset, "upstream_cx_http2_total") == 0 {
			t.Errorf("there is no HTTP/2 connection to subset %s", subset)
		}
	}
}

// A mirrored request arrives twice, and the mirror's answer goes nowhere.
func TestTrafficMirror(t *testing.T) {
	s := newScenario(t, "mirror")
	s.apply("mirror.yaml")
	const count = 100
	s.eventuallyTally(func(seen tally) bool { return seen.Versions["v1"] == count }, "-n", fmt.Sprint(count), myService)
	if out, err := s.call("my-service-v2", "get", "http://127.0.0.1:8080/set?status=500"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	seen := s.mustTally("-n", fmt.Sprint(count), "-c", "4", myService+"mirrored")
	if seen.Status[200] != count || seen.Versions["v1"] != count {
		t.Errorf("%+v, want %d good answers from v1", seen, count)
	}
	for _, deployment := range []string{"my-service-v1", "my-service-v2"} {
		s.Eventually(t, time.Minute, func() (bool, string) {
			// Istio leaves the host as it was; before 1.28 the mirror saw it with -shadow behind it.
			arrived := strings.Count(s.Kubectl(t, "logs", "-n", s.name, "deployment/"+deployment, "-c", "echo"), "GET my-service/mirrored")
			return arrived == count, fmt.Sprintf("%s has got %d requests, want %d", deployment, arrived, count)
		})
	}
}
