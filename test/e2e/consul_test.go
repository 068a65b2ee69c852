//go:build e2e

package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"polymesh.dev/polymesh/pkg/workflow/bridge"
	"polymesh.dev/polymesh/test/e2e/node"
)

const (
	consulNamespace = "e2e-consul"
	// securedNamespace is that of a second bridge.
	securedNamespace = "e2e-consul-secured"
	consulURL        = "http://" + node.OutsideHost + ":8500"
	ordersURL        = "http://" + node.OutsideHost + ":8481"
	// ordersID is the old system's instance, as the bridge calls it.
	ordersID = "old-machine/orders-1"
	// callerID is how Spring calls its own program, by name and port.
	callerID  = "old-machine/caller-8484"
	callerURL = "http://" + node.OutsideHost + ":8484"
)

const consulManifests = `
apiVersion: v1
kind: Namespace
metadata: {name: ` + consulNamespace + `, labels: {istio-injection: enabled}}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: inventory, namespace: ` + consulNamespace + `}
spec:
  selector: {matchLabels: {app: inventory}}
  template:
    metadata:
      labels: {app: inventory}
      annotations:
        proxy.istio.io/config: |
          proxyMetadata: {ISTIO_META_DNS_CAPTURE: "true"}
    spec:
      terminationGracePeriodSeconds: 1
      containers:
      - name: echo
        image: ` + echoImage + `
        env: [{name: VERSION, value: the mesh}]
        readinessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1}
---
apiVersion: v1
kind: Service
metadata: {name: inventory, namespace: ` + consulNamespace + `}
spec:
  type: LoadBalancer
  selector: {app: inventory}
  ports: [{name: http, port: 8480, targetPort: 8080}]
---
# Callers outside have no sidecar.
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: inventory, namespace: ` + consulNamespace + `}
spec:
  selector: {matchLabels: {app: inventory}}
  mtls: {mode: PERMISSIVE}
`

// TestConsul connects the mesh with a Consul outside of the cluster, and with a service that is registered there.
func TestConsul(t *testing.T) {
	n := app(t)
	importEcho(t, n)
	top, err := node.Top()
	if err != nil {
		t.Fatal(err)
	}
	s := &consulSystem{
		springCloud: &springCloud{Node: n, t: t, dir: n.Dir, programs: map[string]*exec.Cmd{}},
		consul:      filepath.Join(top, ".build", "test", "consul"),
		echo:        filepath.Join(top, ".build", "e2e", "echo"),
	}
	if _, err := os.Stat(s.consul); err != nil {
		t.Fatalf("no Consul: run `make .build/test/consul` (%v)", err)
	}
	t.Cleanup(s.cleanUp)
	s.startConsul("consul", 8500, map[string]any{})
	s.startOrders()
	s.register()
	n.Apply(t, consulManifests)
	n.WaitRollout(t, consulNamespace, "deployment/inventory")
	s.startBridge()

	t.Run("called from the mesh", func(t *testing.T) { s.in(t).calledFromMesh() })
	t.Run("a check fails", func(t *testing.T) { s.in(t).checkFails() })
	t.Run("maintenance mode", func(t *testing.T) { s.in(t).maintenance() })
	t.Run("called from outside", func(t *testing.T) { s.in(t).calledFromOutside() })
	t.Run("take over", func(t *testing.T) { s.in(t).takeOver() })
	t.Run("Consul is away", func(t *testing.T) { s.in(t).consulAway() })
	t.Run("the bridge dies", func(t *testing.T) { s.in(t).bridgeDies() })
	t.Run("Spring's client", func(t *testing.T) { s.in(t).springClient(filepath.Join(top, "test", "e2e", "springconsul")) })
	t.Run("the name goes", func(t *testing.T) { s.in(t).withdrawn() })
}

// consulSystem is an old system with Consul in the outside world. What the example's bridge to Eureka needs is the same here.
type consulSystem struct {
	*springCloud
	consul, echo string // programs
}

func (s *consulSystem) in(t *testing.T) *consulSystem {
	part := *s
	part.springCloud = s.springCloud.in(t)
	return &part
}

func (s *consulSystem) cleanUp() {
	s.ExplainNow(s.t)
	s.remove([]string{"bridge", "secured", "caller", "consul", "secured-consul", "orders"}, consulNamespace, securedNamespace)
}

// startConsul starts a server that keeps its state, with its HTTP interface at this port.
func (s *consulSystem) startConsul(name string, port int, settings map[string]any) {
	s.t.Helper()
	ports := map[string]int{"http": port, "server": port + 1, "serf_lan": port + 2, "serf_wan": -1, "dns": -1, "grpc": -1, "grpc_tls": -1}
	if settings["tls"] != nil {
		ports["https"] = port + 3
	}
	maps.Copy(settings, map[string]any{
		"ports": ports, "node_name": "old-machine", "server": true, "bootstrap": true, "data_dir": filepath.Join(s.Dir, name),
		"bind_addr": node.OutsideHost, "client_addr": node.OutsideHost, "disable_update_check": true,
		"performance": map[string]any{"raft_multiplier": 1}, // it becomes the leader within two seconds
	})
	text, err := json.Marshal(settings)
	if err != nil {
		s.t.Fatal(err)
	}
	file := filepath.Join(s.Dir, name+".json")
	if err := os.WriteFile(file, text, 0o600); err != nil {
		s.t.Fatal(err)
	}
	s.run(name, s.OutsideCommand(context.WithoutCancel(s.t.Context()), s.consul, "-config-file="+file))
}

// startOrders starts the old system's service.
func (s *consulSystem) startOrders() {
	s.t.Helper()
	cmd := s.OutsideCommand(context.WithoutCancel(s.t.Context()), s.echo, "serve", "-http="+strings.TrimPrefix(ordersURL, "http://"),
		"-grpc="+node.OutsideHost+":8482", "-tcp="+node.OutsideHost+":8483")
	cmd.Env = append(cmd.Env, "VERSION=the old machine")
	s.run("orders", cmd)
}

// register registers the old system's service as Spring's client does.
func (s *consulSystem) register() {
	s.t.Helper()
	const orders = `{"ID": "orders-1", "Name": "orders", "Address": "` + node.OutsideHost + `", "Port": 8481, "Meta": {"secure": "false", "version": "v1"},
		"Check": {"HTTP": "` + ordersURL + `/healthz", "Interval": "1s", "Timeout": "5s"}}`
	s.Eventually(s.t, time.Minute, func() (bool, string) {
		_, err := s.ask(http.MethodPut, consulURL+"/v1/agent/service/register", "", orders)
		return err == nil, fmt.Sprintf("Consul does not take the service: %v", err)
	})
}

func (s *consulSystem) startBridge() {
	s.t.Helper()
	s.run("bridge", s.command("polymesh bridge run --consul "+consulURL+" --interval 1s"))
}

// ask calls from the outside world.
func (s *consulSystem) ask(method, url, token, body string) ([]byte, error) {
	req, err := http.NewRequestWithContext(context.WithoutCancel(s.t.Context()), method, url, strings.NewReader(body))
	if err != nil {
		return nil, err
	}
	if token != "" {
		req.Header.Set("X-Consul-Token", token)
	}
	resp, err := s.HTTP(false).Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s %s: %s: %s", method, url, resp.Status, text)
	}
	return text, err
}

// must is ask, and the response must be a success.
func (s *consulSystem) must(method, url, token, body string) []byte {
	s.t.Helper()
	answer, err := s.ask(method, url, token, body)
	if err != nil {
		s.t.Fatal(err)
	}
	return answer
}

// shown is whom Consul shows to callers: the addresses of a service's instances, and the state of all their checks.
func (s *consulSystem) shown(service string) (addresses []string, checks string) {
	s.t.Helper()
	var list []struct {
		Service struct {
			Address string
			Port    int
		}
		Checks []struct{ ServiceID, Status string }
	}
	for _, query := range []string{"?passing", ""} {
		if err := json.Unmarshal(s.must(http.MethodGet, consulURL+"/v1/health/service/"+service+query, "", ""), &list); err != nil {
			s.t.Fatal(err)
		}
		if query != "" {
			for _, e := range list {
				addresses = append(addresses, net.JoinHostPort(e.Service.Address, strconv.Itoa(e.Service.Port)))
			}
			continue
		}
		for _, e := range list {
			for _, c := range e.Checks {
				if c.ServiceID != "" {
					checks += c.Status + " "
				}
			}
		}
	}
	return addresses, strings.TrimSpace(checks)
}

// wantShown waits until Consul shows just these addresses.
func (s *consulSystem) wantShown(service string, want ...string) {
	s.t.Helper()
	s.Eventually(s.t, time.Minute, func() (bool, string) {
		got, checks := s.shown(service)
		return slices.Equal(got, want), fmt.Sprintf("of %s Consul shows %q (%s), want %q", service, got, checks, want)
	})
}

// wantAnswer waits until a program of the mesh that calls the old service has this answer: that of a place, or no one's.
func (s *consulSystem) wantAnswer(place string) {
	s.t.Helper()
	s.Eventually(s.t, time.Minute, func() (bool, string) {
		out, err := s.KubectlErr("exec", "-n", consulNamespace, "deployment/inventory", "-c", "echo", "--", "/echo", "get", "http://orders.consul.internal/")
		if place == "" {
			return err != nil, "the old service still answers: " + out
		}
		return err == nil && strings.Contains(out, `"version":"`+place+`"`), fmt.Sprintf("the answer is %q, %v", out, err)
	})
}

func (s *consulSystem) meshAddress() string { return net.JoinHostPort(s.Address(), "8480") }

// calledFromMesh: a program in the mesh calls a service outside by name.
func (s *consulSystem) calledFromMesh() {
	s.wantWorkloads(ordersID)
	s.wantAnswer("the old machine")
	report := s.wantStatus(0, "")
	if len(report.Services) != 1 || report.Services[0].Name != "orders" || report.Registry != consulURL {
		s.t.Errorf("the bridge reports %+v", report)
	}
	if out := s.Kubectl(s.t, "get", "workloadentries", "-n", bridgeNamespace, "-o", "jsonpath={.items[*].spec.labels.version}"); out != "v1" {
		s.t.Errorf("the instance has the version %q", out)
	}
}

// checkFails: who is critical in Consul is not in the mesh.
func (s *consulSystem) checkFails() {
	s.must(http.MethodGet, ordersURL+"/fail", "", "")
	s.wantWorkloads()
	s.wantAnswer("")
	s.must(http.MethodGet, ordersURL+"/ok", "", "")
	s.wantWorkloads(ordersID)
	s.wantAnswer("the old machine")
}

// maintenance: someone takes an instance out of service for a while, which the bridge respects.
func (s *consulSystem) maintenance() {
	s.must(http.MethodPut, consulURL+"/v1/agent/service/maintenance/orders-1?enable=true", "", "")
	s.wantWorkloads()
	s.Eventually(s.t, time.Minute, func() (bool, string) {
		r, _ := s.status(bridgeNamespace)
		ok := len(r.Services) == 1 && slices.Equal(r.Services[0].LeftOut, []bridge.LeftOut{{Instance: ordersID, Reason: "it is out of service"}})
		return ok, fmt.Sprintf("the report is %+v", r)
	})
	s.must(http.MethodPut, consulURL+"/v1/agent/service/maintenance/orders-1?enable=false", "", "")
	s.wantWorkloads(ordersID)
}

// calledFromOutside: a program outside finds a Service of the mesh in Consul, and reaches it at the address it finds.
func (s *consulSystem) calledFromOutside() {
	s.Kubectl(s.t, "label", "service", "-n", consulNamespace, "inventory", "bridge.polymesh.dev/consul=inventory")
	s.wantShown("inventory", s.meshAddress())
	found, _ := s.shown("inventory")
	s.Eventually(s.t, time.Minute, func() (bool, string) {
		out, err := s.ask(http.MethodGet, "http://"+found[0]+"/", "", "")
		return err == nil && strings.Contains(string(out), `"version":"the mesh"`), fmt.Sprintf("%s answers %q, %v", found[0], out, err)
	})
}

// takeOver: callers outside come to the mesh, and the old instance stays in it, until the name is given back.
func (s *consulSystem) takeOver() {
	s.Kubectl(s.t, "label", "service", "-n", consulNamespace, "inventory", "--overwrite", "bridge.polymesh.dev/consul=orders")
	s.wantStatus(1, "the registry has orders already")
	s.wantShown("inventory")
	s.annotateTakeOver()
	s.wantWorkloads(ordersID)
	s.wantStatus(0, "")
	s.wantAnswer("the old machine")
	s.giveBack()
	s.wantWorkloads(ordersID)
}

func (s *consulSystem) annotateTakeOver() {
	s.t.Helper()
	s.Kubectl(s.t, "annotate", "service", "-n", consulNamespace, "inventory", "bridge.polymesh.dev/takes-over=true")
	s.wantShown("orders", s.meshAddress())
}

// giveBack ends the take-over: the mesh's service has its own name again.
func (s *consulSystem) giveBack() {
	s.t.Helper()
	s.Kubectl(s.t, "annotate", "service", "-n", consulNamespace, "inventory", "bridge.polymesh.dev/takes-over-")
	s.Kubectl(s.t, "label", "service", "-n", consulNamespace, "inventory", "--overwrite", "bridge.polymesh.dev/consul=inventory")
	s.wantShown("orders", node.OutsideHost+":8481")
	s.wantShown("inventory", s.meshAddress())
	s.wantStatus(0, "")
}

// consulAway: nothing is taken from the mesh by a registry that does not answer.
func (s *consulSystem) consulAway() {
	before := s.workloads()
	_ = s.stop("consul", syscall.SIGKILL)
	s.wantStatus(1, "the registry does not answer, so nothing is changed")
	s.wantAnswer("the old machine")
	if after := s.workloads(); !maps.Equal(after, before) {
		s.t.Errorf("the mesh had %v, and has %v", before, after)
	}
	s.startConsul("consul", 8500, map[string]any{})
	s.wantStatus(0, "")
	// Consul calls what has a check critical when it starts, until it has checked it.
	s.wantWorkloads(ordersID)
	s.wantAnswer("the old machine")
	s.wantShown("inventory", s.meshAddress())
}

// bridgeDies: Consul hides what no bridge speaks for, and another bridge takes it up. The time until then is for another one.
func (s *consulSystem) bridgeDies() {
	died := time.Now()
	_ = s.stop("bridge", syscall.SIGKILL)
	s.secured()
	if !testing.Short() { // Consul waits for a minute; pkg/workflow/bridge/consul tests the same with a shorter time
		s.Eventually(s.t, 3*time.Minute, func() (bool, string) {
			addresses, checks := s.shown("inventory")
			return len(addresses) == 0 && checks == "critical", fmt.Sprintf("Consul shows %q (%s), and no bridge has run for %s", addresses, checks, time.Since(died))
		})
	}
	s.wantWorkloads(ordersID)
	s.startBridge()
	s.wantShown("inventory", s.meshAddress())
	if _, checks := s.shown("inventory"); checks != "passing" {
		s.t.Errorf("the checks of the mesh's instances are %q, want one that passes", checks)
	}
}

// secured: a Consul that shows nothing to strangers is not an empty one. It is asked over TLS, with a client's certificate.
func (s *consulSystem) secured() {
	const manager = "4f35b5f1-8f4c-4c64-9d2c-8c3f0f2b1a11"
	const url = "http://" + node.OutsideHost + ":8600"
	ca := newAuthority(s.t)
	certificate, key := ca.issue(s.t, node.OutsideHost)
	file := func(name string, text []byte) string {
		path := filepath.Join(s.Dir, name)
		if err := os.WriteFile(path, text, 0o600); err != nil {
			s.t.Fatal(err)
		}
		return path
	}
	caFile, certFile, keyFile := file("consul-ca.pem", []byte(ca.pem())), file("consul-cert.pem", certificate), file("consul-key.pem", key)
	s.startConsul("secured-consul", 8600, map[string]any{
		"tls": map[string]any{"https": map[string]any{"ca_file": caFile, "cert_file": certFile, "key_file": keyFile, "verify_incoming": true}},
		"acl": map[string]any{"enabled": true, "default_policy": "deny", "tokens": map[string]any{"initial_management": manager, "agent": manager}}})
	defer func() { _ = s.stop("secured-consul", syscall.SIGKILL) }()
	s.Eventually(s.t, time.Minute, func() (bool, string) {
		_, err := s.ask(http.MethodPut, url+"/v1/agent/service/register", manager, `{"ID": "bills-1", "Name": "bills", "Address": "`+node.OutsideHost+`", "Port": 8481}`)
		return err == nil, fmt.Sprintf("Consul does not take the service: %v", err)
	})
	var policy struct{ ID string }
	rules := `{"Name": "bridge", "Rules": "service_prefix \"\" {policy = \"write\"} node_prefix \"\" {policy = \"read\"} agent_prefix \"\" {policy = \"read\"}"}`
	if err := json.Unmarshal(s.must(http.MethodPut, url+"/v1/acl/policy", manager, rules), &policy); err != nil {
		s.t.Fatal(err)
	}
	var token struct{ SecretID string }
	if err := json.Unmarshal(s.must(http.MethodPut, url+"/v1/acl/token", manager, `{"Policies": [{"ID": "`+policy.ID+`"}]}`), &token); err != nil {
		s.t.Fatal(err)
	}
	run := "polymesh bridge run --consul https://" + node.OutsideHost + ":8603 -n " + securedNamespace + " --name secured --interval 1s" +
		" --ca-file " + caFile + " --client-cert " + certFile + " --client-key " + keyFile
	s.run("secured", s.command(run))
	defer func() { _ = s.stop("secured", syscall.SIGKILL) }()
	s.Eventually(s.t, time.Minute, func() (bool, string) {
		r, _ := s.status(securedNamespace)
		return strings.Contains(r.Error, `the bridge needs a token with the rule service_prefix "" {policy = "read"}, by --token-file`), fmt.Sprintf("without a token, the report is %+v", r)
	})
	if err := s.stop("secured", syscall.SIGTERM); err != nil {
		s.t.Errorf("the bridge ends with %v", err)
	}
	s.run("secured", s.command(run+" --token-file "+file("consul-token", []byte(token.SecretID+"\n"))))
	s.Eventually(s.t, time.Minute, func() (bool, string) {
		r, _ := s.status(securedNamespace)
		return r.Error == "" && len(r.Services) == 1 && slices.Equal(r.Services[0].Instances, []string{"old-machine/bills-1"}), fmt.Sprintf("with a token, the report is %+v", r)
	})
	if text, err := os.ReadFile(s.log("secured")); err != nil || strings.Contains(string(text), token.SecretID) {
		s.t.Errorf("the bridge's log shows the token, or is not there (%v)", err)
	}
}

// springClient: an unmodified program of Spring Cloud is called from the mesh, and calls the mesh at the address from Consul.
func (s *consulSystem) springClient(dir string) {
	long(s.t, "TestSpringCloud has Spring's clients, and the other parts of this test say to Consul what this one does")
	ctx, cancel := context.WithTimeout(context.WithoutCancel(s.t.Context()), 10*time.Minute)
	defer cancel()
	mvn := exec.CommandContext(ctx, "mvn", "--batch-mode", "--no-transfer-progress", "package")
	mvn.Dir = dir
	if out, err := mvn.CombinedOutput(); err != nil {
		s.t.Fatalf("mvn package: %v: %s", err, out)
	}
	// Addresses and ports, what docs/deploy/spring-cloud.md asks for, and seconds in place of what takes half a minute by default.
	s.run("caller", s.OutsideCommand(context.WithoutCancel(s.t.Context()), "java", "-Xmx96m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1",
		"-jar", filepath.Join(dir, "target", "caller.jar"), "--spring.application.name=caller", "--server.port=8484",
		"--spring.cloud.consul.host="+node.OutsideHost, "--spring.cloud.consul.discovery.prefer-ip-address=true", "--spring.cloud.consul.discovery.ip-address="+node.OutsideHost,
		"--spring.cloud.consul.discovery.query-passing=true",
		"--spring.cloud.consul.discovery.health-check-interval=1s", "--spring.cloud.loadbalancer.cache.ttl=1s"))
	s.wantWorkloads(callerID, ordersID)
	s.Eventually(s.t, time.Minute, func() (bool, string) {
		out, err := s.KubectlErr("exec", "-n", consulNamespace, "deployment/inventory", "-c", "echo", "--", "/echo", "get", "http://caller.consul.internal/")
		return err == nil && strings.Contains(out, "the caller is here"), fmt.Sprintf("the caller answers %q, %v", out, err)
	})
	answers := func(service, place string) {
		s.t.Helper()
		s.Eventually(s.t, time.Minute, func() (bool, string) {
			out, err := s.ask(http.MethodGet, callerURL+"/call/"+service, "", "")
			return err == nil && strings.Contains(string(out), `"version":"`+place+`"`), fmt.Sprintf("Spring is answered %q by %s, %v", out, service, err)
		})
	}
	answers("inventory", "the mesh")
	answers("orders", "the old machine")
	s.Kubectl(s.t, "label", "service", "-n", consulNamespace, "inventory", "--overwrite", "bridge.polymesh.dev/consul=orders")
	s.annotateTakeOver()
	answers("orders", "the mesh")
	s.giveBack()
	answers("orders", "the old machine")
	// Spring takes its program out of Consul when it ends.
	_ = s.stop("caller", syscall.SIGTERM)
	s.wantWorkloads(ordersID)
}

// withdrawn: what the mesh has put into Consul goes with the label.
func (s *consulSystem) withdrawn() {
	s.Kubectl(s.t, "label", "service", "-n", consulNamespace, "inventory", "bridge.polymesh.dev/consul-")
	s.wantShown("inventory")
	s.Eventually(s.t, time.Minute, func() (bool, string) {
		_, checks := s.shown("inventory")
		return checks == "", "Consul still has its check: " + checks
	})
	s.wantStatus(0, "")
	s.stopBridge()
}
