//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/time/rate"

	"polymesh.dev/polymesh/pkg/workflow/deploy"
	"polymesh.dev/polymesh/test/e2e/node"
)

// polyglotHost is the app's host at the gateway; the guide's app has api.example.com.
const polyglotHost = "five.example.com"

// chainOrder is who calls whom, and on which port each listens.
var chainOrder = []struct{ service, language, port string }{
	{"go-service", "Go", "8080"}, {"fastapi-service", "Python", "8000"}, {"java-service", "Java", "8080"},
	{"node-service", "JavaScript", "8080"}, {"rust-service", "Rust", "8080"},
}

// polyglot is the app in five languages in a separate namespace.
type polyglot struct {
	*scenario
	dir string // of the project
	env []string
}

// TestPolyglot deploys all of examples/polyglot and follows requests through its five services.
func TestPolyglot(t *testing.T) {
	n := app(t)
	importJaeger(t, n)
	p := &polyglot{scenario: newScenario(t, "polyglot")}
	p.prepare()
	// Its pods end slowly, as a user's do.
	t.Cleanup(func() { removeNamespaces(t, n, p.name) })
	result := p.deploy()
	for _, link := range chainOrder {
		if !slices.ContainsFunc(result.Images, func(i deploy.Image) bool { return i.Service == link.service && i.Moved }) {
			t.Errorf("%s was not brought to the node: %+v", link.service, result.Images)
		}
	}
	if len(result.Findings) > 0 {
		t.Errorf("findings: %v", result.Findings)
	}

	p.Eventually(t, 2*time.Minute, func() (bool, string) {
		_, detail, err := p.chain()
		return err == nil, detail
	})
	t.Run("mutual TLS", func(t *testing.T) { p.in(t).wantStrict() })
	t.Run("routes", func(t *testing.T) { p.in(t).wantRoutes() })
	t.Run("probes and metrics", func(t *testing.T) { p.in(t).wantProbes() })
	// Before the next part, which sends the spans elsewhere.
	t.Run("on the page", func(t *testing.T) { p.in(t).wantOnPage() })
	t.Run("one trace", func(t *testing.T) { p.in(t).wantOneTrace() })
	t.Run("orders", func(t *testing.T) { p.in(t).wantOrders() })
}

func (p *polyglot) in(t *testing.T) *polyglot {
	part := *p
	part.scenario = p.scenario.in(t)
	return &part
}

// prepare builds what the services are made of, and makes a copy of the project for another namespace and another host.
func (p *polyglot) prepare() {
	t := p.t
	t.Helper()
	// Here and not in deploy: that runs in the node's network, from where no package registry can be reached. What it
	// builds is in buildah's cache after this.
	p.env = append(exampleImages(t, "all"), "DATABASE_URL=postgresql://user:pass@postgres.external:5432/mydb")
	p.dir = filepath.Join(t.TempDir(), "polyglot")
	own := strings.NewReplacer("polyglot-services", p.name, appHost, polyglotHost)
	err := filepath.WalkDir(example(t), func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(example(t), path)
		if err != nil {
			return err
		}
		switch {
		case entry.IsDir() && slices.Contains([]string{"node_modules", "target", "__pycache__"}, entry.Name()):
			return fs.SkipDir
		case entry.IsDir():
			return os.MkdirAll(filepath.Join(p.dir, name), 0o755)
		// The mesh's own, which `make up` has applied.
		case name == filepath.Join("istio", "gateway.yaml"), name == filepath.Join("istio", "peerauthentication.yaml"):
			return nil
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if !strings.HasPrefix(name, "services") {
			text = []byte(own.Replace(string(text)))
		}
		return os.WriteFile(filepath.Join(p.dir, name), text, 0o644)
	})
	if err != nil {
		t.Fatal(err)
	}
}

func (p *polyglot) deploy() deploy.Result {
	p.t.Helper()
	return deployFive(p.t, p.Node, p.dir, p.env)
}

// deployFive deploys a project with services in five languages.
func deployFive(t *testing.T, n *node.Node, dir string, env []string) deploy.Result {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 15*time.Minute)
	defer cancel()
	cmd := n.PolymeshCommand(ctx, "deploy", "-o", "json", "--timeout", "8m", dir)
	cmd.Env = append(cmd.Env, env...)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := cmd.Run(); err != nil {
		t.Fatalf("polymesh deploy: %v: %s", err, &errOut)
	}
	t.Logf("polymesh deploy:\n%s", &errOut)
	var result deploy.Result
	if err := json.Unmarshal(out.Bytes(), &result); err != nil {
		t.Fatalf("polymesh deploy -o json: %v: %s", err, &out)
	}
	return result
}

// exampleImages builds all images of examples/polyglot, or those that they are made of (bases). It returns the environment
// in which buildah finds them.
func exampleImages(t *testing.T, which string) []string {
	t.Helper()
	top, err := node.Top()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Minute)
	defer cancel()
	if out, err := exec.CommandContext(ctx, filepath.Join(example(t), "images.sh"), which).CombinedOutput(); err != nil {
		t.Fatalf("images.sh %s: %v: %s", which, err, out)
	}
	return []string{"CONTAINERS_STORAGE_CONF=" + filepath.Join(top, ".build", "polyglot", "storage.conf")}
}

// ask sends a request through the gateway, from outside.
func (p *polyglot) ask(method, path, body string) (int, string, error) {
	return ask(p.HTTP(false), p.Node, method, polyglotHost, path, []byte(body))
}

// chain sends a request through all five, and returns the trace that all of them received; it may be empty.
func (p *polyglot) chain() (trace, detail string, err error) {
	status, text, err := p.ask(http.MethodGet, "/api/v1/chain", "")
	if err != nil || status != http.StatusOK {
		return "", fmt.Sprintf("%d %s %v", status, text, err), fmt.Errorf("status %d: %s (%v)", status, text, err)
	}
	var answer struct {
		Chain []struct {
			Service, Language, Work string
			TraceID                 string `json:"trace_id"`
		}
	}
	if err := json.Unmarshal([]byte(text), &answer); err != nil {
		return "", text, err
	}
	if len(answer.Chain) != len(chainOrder) {
		return "", text, fmt.Errorf("the chain is %s", text)
	}
	for i, link := range answer.Chain {
		if want := chainOrder[i]; link.Service != want.service || link.Language != want.language || link.TraceID != answer.Chain[0].TraceID {
			return "", text, fmt.Errorf("link %d is %+v: %s", i, link, text)
		}
	}
	return answer.Chain[0].TraceID, text, nil
}

// wantStrict queries each pod without a certificate, which the mesh refuses.
func (p *polyglot) wantStrict() {
	for _, link := range chainOrder {
		refusesPlainText(p.t, p.Node, p.name, link.service, link.port)
	}
}

// refusesPlainText queries an app's pod without a certificate, which a mesh that is STRICT refuses.
func refusesPlainText(t *testing.T, n *node.Node, namespace, app, port string) {
	t.Helper()
	pod := listPods(t, n, namespace, "app="+app)[0]
	if sidecar(&pod) == "" {
		t.Errorf("%s has no sidecar", pod.Name)
	}
	response, err := n.HTTPInside(false).Get("http://" + pod.Status.PodIP + ":" + port + "/health")
	if err == nil {
		response.Body.Close()
		t.Errorf("%s answers plain text with %s", app, response.Status)
	}
}

// wantRoutes checks the routes of the new services.
func (p *polyglot) wantRoutes() {
	for _, c := range []struct {
		path   string
		status int
		want   string
	}{
		{"/api/v1/primes?below=1000000", 200, `"primes":78498`},
		{"/api/v1/primes?below=100000000", 400, "below is at most"},
		{"/api/v1/orders/1", 503, "ORDERS_DATABASE_URL is not set"},
		{"/api/v1/gateway", 200, "Request processed by Go Gateway"},
	} {
		status, text, err := p.ask(http.MethodGet, c.path, "")
		if err != nil || status != c.status || !strings.Contains(text, c.want) {
			p.t.Errorf("%s: %d %s %v, want %d with %s", c.path, status, text, err, c.status, c.want)
		}
	}
	if status, text, err := p.ask(http.MethodPost, "/api/v1/predict", `{"data": [1, 2, 3]}`); err != nil || status != 200 || text != `{"prediction":2.0,"confidence":0.95}` {
		p.t.Errorf("predict: %d %s %v", status, text, err)
	}

	request, err := http.NewRequest(http.MethodGet, "http://"+p.Address()+"/api/v1/events?count=3&interval_ms=50", nil)
	if err != nil {
		p.t.Fatal(err)
	}
	request.Host = polyglotHost
	response, err := p.HTTP(false).Do(request)
	if err != nil {
		p.t.Fatal(err)
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil || response.Header.Get("Content-Type") != "text/event-stream" || strings.Count(string(text), "event: tick\n") != 3 {
		p.t.Errorf("events: %s %v %q %v", response.Status, response.Header, text, err)
	}
}

// wantProbes calls the paths of each service that Kubernetes and Prometheus use.
func (p *polyglot) wantProbes() {
	for _, link := range chainOrder {
		url := "http://" + link.service + ":" + link.port
		for path, want := range map[string]string{
			"/health": "healthy", "/ready": `"status"`,
			"/metrics": `http_requests_total{method="GET",path="/api/v1/chain",status="200"}`,
		} {
			// One of several pods may have had no request yet.
			p.Eventually(p.t, time.Minute, func() (bool, string) {
				out, err := p.call("client", "get", url+path)
				return err == nil && strings.Contains(out, want), fmt.Sprintf("%s%s: %s %v", url, path, out, err)
			})
		}
	}
}

// wantOneTrace checks the spans of one request: those of the proxies, and one of each service.
func (p *polyglot) wantOneTrace() {
	p.addProviders()
	p.apply("tracing.yaml")
	var spans []span
	traces := map[string]bool{}
	p.Eventually(p.t, 4*time.Minute, func() (bool, string) {
		trace, detail, err := p.chain()
		if err != nil {
			return false, err.Error()
		}
		if trace == "" {
			return false, "the services are in no trace: " + detail
		}
		traces[trace] = true
		seen := []int{}
		for trace := range traces {
			found, err := p.spans("traces/" + trace)
			if err != nil {
				return false, err.Error()
			}
			seen = append(seen, len(found))
			if p.wholeTrace(found) == "" {
				spans = found
				return true, ""
			}
			detail = p.wholeTrace(found)
		}
		return false, fmt.Sprintf("the numbers of spans are %v; %s", seen, detail)
	})
	p.t.Logf("%d spans", len(spans))
}

// wholeTrace reports what is missing in the trace of a request to the chain; empty if nothing is.
func (p *polyglot) wholeTrace(spans []span) string {
	byID := map[string]span{}
	for _, s := range spans {
		byID[s.ID] = s
	}
	var roots []string
	found := map[string]int{}
	for _, s := range spans {
		parent, known := byID[s.Parent]
		switch {
		case s.Parent == "":
			roots = append(roots, s.Service)
		case !known:
			return fmt.Sprintf("a span of %s has a parent that did not come", s.Service)
		}
		found[s.Tags["span.kind"]+" "+s.Service+" under "+parent.Service]++
	}
	const gateway = "istio-ingressgateway.istio-system"
	if len(roots) != 1 || roots[0] != gateway {
		return fmt.Sprintf("the roots are %v, want one of %s", roots, gateway)
	}
	caller := gateway // whose span is the parent
	for _, link := range chainOrder {
		proxy := link.service + "." + p.name
		want := []string{"server " + proxy + " under " + caller, "server " + link.service + " under " + proxy}
		if link != chainOrder[len(chainOrder)-1] {
			want = append(want, "client "+proxy+" under "+link.service)
		}
		for _, span := range want {
			if found[span] != 1 {
				return fmt.Sprintf("%d spans are %s: %v", found[span], span, found)
			}
		}
		caller = proxy
	}
	return ""
}

// restartUnderLoad renews the pods of all services while requests go through the whole chain, of which none is lost.
func (p *polyglot) restartUnderLoad() {
	t := p.t
	t.Helper()
	// What the autoscalers would add under load leaves a machine of two cores no room for a second JVM.
	p.Kubectl(t, "delete", "hpa", "--all", "-n", p.name)
	ctx, stop := context.WithCancel(t.Context())
	pace := rate.NewLimiter(10, 1) // what two cores answer while they start a JVM
	var sent, answered atomic.Int64
	var workers sync.WaitGroup
	for range 4 {
		workers.Go(func() {
			for pace.Wait(ctx) == nil {
				sent.Add(1)
				status, text, err := p.ask(http.MethodGet, "/api/v1/chain", "")
				if err != nil || status != http.StatusOK || strings.Count(text, `"service"`) != len(chainOrder) {
					t.Errorf("lost: %d %s %v", status, text, err)
					continue
				}
				answered.Add(1)
			}
		})
	}
	defer workers.Wait()
	defer stop()
	p.Eventually(t, time.Minute, func() (bool, string) { return answered.Load() >= 20, "no load" })
	before := map[string]bool{}
	for _, link := range chainOrder {
		for _, pod := range listPods(t, p.Node, p.name, "app="+link.service) {
			before[pod.Name] = true
		}
		p.Kubectl(t, "rollout", "restart", "deployment/"+link.service, "-n", p.name)
	}
	for _, link := range chainOrder {
		p.WaitRollout(t, p.name, "deployment/"+link.service)
	}
	p.Eventually(t, 2*time.Minute, func() (bool, string) {
		for _, pod := range listPods(t, p.Node, p.name, "") {
			if before[pod.Name] {
				return false, pod.Name + " is still there"
			}
		}
		return true, ""
	})
	stop()
	workers.Wait()
	t.Logf("%d of %d requests answered while all pods were renewed", answered.Load(), sent.Load())
}

// wantOrders gives java-service a database outside the cluster.
func (p *polyglot) wantOrders() {
	t := p.t
	long(t, "TestExternalDatabase has a database outside, TestRollingUpdate renews pods under load")
	db := startPostgres(t, p.Node, newAuthority(t), node.OutsideHost)
	p.Apply(t, fmt.Sprintf("apiVersion: v1\nkind: Secret\nmetadata: {name: orders-db, namespace: %s}\nstringData: {url: 'postgresql://app:%s@%s:5432/postgres?sslmode=require'}\n",
		p.name, db.password, node.OutsideHost))
	// The database goes with this part of the test.
	defer func() {
		p.Kubectl(t, "delete", "secret", "orders-db", "-n", p.name)
		p.Kubectl(t, "rollout", "restart", "deployment/java-service", "-n", p.name)
		p.WaitRollout(t, p.name, "deployment/java-service")
	}()
	p.restartUnderLoad()

	const order = `{"customer": "Ada", "lines": [{"product": "book", "quantity": 2, "price": 19.99}, {"product": "pen", "quantity": 1, "price": 1.5}]}`
	var added struct {
		Order struct {
			ID       int
			Customer string
			Lines    []struct{ Product string }
		}
		Total float64
	}
	p.Eventually(t, time.Minute, func() (bool, string) {
		status, text, err := p.ask(http.MethodPost, "/api/v1/orders", order)
		if err != nil || status != http.StatusCreated {
			return false, fmt.Sprintf("%d %s %v", status, text, err)
		}
		err = json.Unmarshal([]byte(text), &added)
		return err == nil && added.Total == 41.48 && added.Order.ID > 0, text
	})
	status, text, err := p.ask(http.MethodGet, fmt.Sprintf("/api/v1/orders/%d", added.Order.ID), "")
	if err != nil || status != http.StatusOK {
		t.Fatalf("%d %s %v", status, text, err)
	}
	if err := json.Unmarshal([]byte(text), &added); err != nil || added.Order.Customer != "Ada" || len(added.Order.Lines) != 2 || added.Order.Lines[1].Product != "pen" {
		t.Errorf("the order is %s, %v", text, err)
	}
	if status, text, err := p.ask(http.MethodGet, "/api/v1/orders/999999", ""); err != nil || status != http.StatusNotFound {
		t.Errorf("an order that is not there: %d %s %v", status, text, err)
	}
	// The second line is rejected by the database, and the first one and the order go with it.
	if status, text, err := p.ask(http.MethodPost, "/api/v1/orders", `{"customer": "Eve", "lines": [{"product": "book", "quantity": 1, "price": 1}, {"product": "gold", "quantity": 1, "price": 99999999999}]}`); err != nil || status < 400 {
		t.Errorf("an order that the database refuses: %d %s %v", status, text, err)
	}
	if status, text, err := p.ask(http.MethodGet, fmt.Sprintf("/api/v1/orders/%d", added.Order.ID+1), ""); err != nil || status != http.StatusNotFound {
		t.Errorf("half of an order was kept: %d %s %v", status, text, err)
	}
}
