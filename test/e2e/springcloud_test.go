//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"polymesh.dev/polymesh/pkg/workflow/bridge"
	"polymesh.dev/polymesh/test/e2e/node"
)

// The example examples/spring-cloud.
const (
	shopNamespace = "shop"
	// bridgeNamespace is the default namespace of a bridge.
	bridgeNamespace = "polymesh-bridge"
	// The old machine's programs say this as who has answered, and the pod that.
	oldPlace, newPlace = "the old machine", "the mesh"
	eurekaURL          = "http://" + node.OutsideHost + ":8761/eureka/"
)

// TestSpringCloud runs the old system outside of the cluster, connects it with the mesh, and moves one of its services, by the
// commands of the example's README.
func TestSpringCloud(t *testing.T) {
	n := app(t)
	importEcho(t, n)
	s := &springCloud{Node: n, t: t, dir: filepath.Join(filepath.Dir(example(t)), "spring-cloud"), programs: map[string]*exec.Cmd{}}
	readme, err := os.ReadFile(filepath.Join(s.dir, "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	s.readme = string(readme)
	s.build()
	t.Cleanup(s.cleanUp)
	s.startOldSystem()
	s.deploy()

	t.Run("the old system by itself", func(t *testing.T) { s.in(t).alone() })
	t.Run("a name that is taken", func(t *testing.T) { s.in(t).clash() })
	t.Run("called from the mesh", func(t *testing.T) { s.in(t).calledFromMesh() })
	t.Run("take over", func(t *testing.T) { s.in(t).takeOver() })
	t.Run("plain DNS", func(t *testing.T) { s.in(t).plainDNS() })
	t.Run("move", func(t *testing.T) { s.in(t).move() })
	t.Run("Eureka is away", func(t *testing.T) { s.in(t).eurekaAway() })
	t.Run("the old service is switched off", func(t *testing.T) { s.in(t).switchedOff() })
	t.Run("an instance dies", func(t *testing.T) { s.in(t).killed() })
	t.Run("the mesh gives the name back", func(t *testing.T) { s.in(t).giveBack() })
}

// springCloud is the example: the old system in the outside world, and what is in the mesh.
type springCloud struct {
	*node.Node
	t      *testing.T
	dir    string
	readme string
	// programs are the processes that run: the old system's by their names, and the bridge.
	programs map[string]*exec.Cmd
}

func (s *springCloud) in(t *testing.T) *springCloud {
	part := *s
	part.t = t
	return &part
}

// oldPrograms are the old system's, with their ports.
var oldPrograms = map[string]string{"eureka-server": "8761", "inventory-service": "8082", "order-service": "8081", "gateway": "8080"}

// build makes the jars, and meanwhile the image on which the pod's is built.
func (s *springCloud) build() {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), 15*time.Minute)
	defer cancel()
	base := make(chan error, 1)
	go func() {
		out, err := exec.CommandContext(ctx, filepath.Join(example(s.t), "images.sh"), "jre").CombinedOutput()
		if err != nil {
			err = fmt.Errorf("images.sh jre: %w: %s", err, out)
		}
		base <- err
	}()
	s.wantInReadme("mvn package")
	mvn := exec.CommandContext(ctx, "mvn", "--batch-mode", "--no-transfer-progress", "package")
	mvn.Dir = s.dir
	out, err := mvn.CombinedOutput()
	if err != nil {
		err = fmt.Errorf("mvn package: %w: %s", err, out)
	}
	if err := errors.Join(err, <-base); err != nil {
		s.t.Fatal(err)
	}
}

// wantInReadme wants the README to have a command, so that it documents what was tested.
func (s *springCloud) wantInReadme(command string) {
	s.t.Helper()
	if !strings.Contains(s.readme, command) {
		s.t.Errorf("the README does not have %q", command)
	}
}

// step runs a command of the README, as a reader does.
func (s *springCloud) step(command string) {
	s.t.Helper()
	s.wantInReadme(command)
	if out, err := s.command(command).CombinedOutput(); err != nil {
		s.t.Fatalf("%s: %v: %s", command, err, out)
	}
}

// command is a command line that begins with polymesh or kubectl, in the example's folder.
func (s *springCloud) command(line string) *exec.Cmd {
	fields := strings.Fields(line)
	if fields[0] == "polymesh" {
		fields = fields[1:]
	}
	cmd := s.PolymeshCommand(context.WithoutCancel(s.t.Context()), fields...)
	cmd.Dir = s.dir
	return cmd
}

func (s *springCloud) startOldSystem() {
	s.t.Helper()
	// In place of a name server that knows *.eureka.internal. With such a file Java asks no one else.
	host, err := os.Hostname()
	if err != nil {
		s.t.Fatal(err)
	}
	hosts := fmt.Sprintf("127.0.0.1 localhost %s\n%s inventory-service.eureka.internal\n", host, s.Address())
	if err := os.WriteFile(filepath.Join(s.Dir, "hosts"), []byte(hosts), 0o644); err != nil {
		s.t.Fatal(err)
	}
	for name := range oldPrograms {
		s.start(name)
	}
}

// start starts one of the old programs, as it was built. Its settings are for a machine with little memory, and make Eureka
// and its clients notice within seconds what takes them minutes by default.
func (s *springCloud) start(name string) {
	s.t.Helper()
	cmd := s.OutsideCommand(context.WithoutCancel(s.t.Context()), "java", "-Xmx96m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1",
		"-Djdk.net.hosts.file="+filepath.Join(s.Dir, "hosts"), "-jar", filepath.Join(s.dir, name, "target", name+".jar"))
	cmd.Env = append(cmd.Env, "EUREKA_URL="+eurekaURL, "EUREKA_INSTANCE_IP_ADDRESS="+node.OutsideHost, "EUREKA_INSTANCE_INSTANCE_ID="+name,
		"EUREKA_SERVER_RESPONSE_CACHE_UPDATE_INTERVAL_MS=500", "EUREKA_SERVER_EVICTION_INTERVAL_TIMER_IN_MS=1000",
		"EUREKA_SERVER_ENABLE_SELF_PRESERVATION=false",
		"EUREKA_INSTANCE_LEASE_RENEWAL_INTERVAL_IN_SECONDS=1", "EUREKA_INSTANCE_LEASE_EXPIRATION_DURATION_IN_SECONDS=5",
		"EUREKA_CLIENT_REGISTRY_FETCH_INTERVAL_SECONDS=1", "SPRING_CLOUD_LOADBALANCER_CACHE_TTL=1s")
	s.run(name, cmd)
}

func (s *springCloud) run(name string, cmd *exec.Cmd) {
	s.t.Helper()
	log, err := os.OpenFile(s.log(name), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		s.t.Fatal(err)
	}
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	s.programs[name] = cmd
}

func (s *springCloud) log(name string) string { return filepath.Join(s.Dir, name+".log") }

// stop ends a program if it runs, and waits for that. It returns how it ended: Java exits with 143 on SIGTERM.
func (s *springCloud) stop(name string, signal os.Signal) error {
	s.t.Helper()
	cmd := s.programs[name]
	if cmd == nil {
		return nil
	}
	delete(s.programs, name)
	if err := cmd.Process.Signal(signal); err != nil {
		s.t.Errorf("stop %s: %v", name, err)
	}
	return cmd.Wait()
}

func (s *springCloud) startBridge() {
	s.t.Helper()
	const readme = "polymesh bridge run --eureka http://localhost:8761/eureka/ --advertise-domain eureka.internal"
	s.wantInReadme(readme)
	s.run("bridge", s.command(strings.Replace(readme, "http://localhost:8761/eureka/", eurekaURL, 1)+" --interval 1s --guard 10m"))
}

// stopBridge ends the bridge, which is a good end.
func (s *springCloud) stopBridge() {
	if err := s.stop("bridge", syscall.SIGTERM); err != nil {
		s.t.Errorf("the bridge ends with %v", err)
	}
}

func (s *springCloud) cleanUp() {
	s.ExplainNow(s.t)
	s.stopBridge()
	s.remove([]string{"bridge", "eureka-server", "inventory-service", "order-service", "gateway"}, shopNamespace)
}

// remove ends what still runs, shows the last of these logs if the test has failed, and removes these namespaces and the
// bridge's.
func (s *springCloud) remove(logs []string, namespaces ...string) {
	for name := range maps.Clone(s.programs) {
		_ = s.stop(name, syscall.SIGKILL)
	}
	if s.t.Failed() {
		for _, name := range logs {
			text, err := os.ReadFile(s.log(name))
			s.t.Logf("the last of %s.log (%v):\n%s", name, err, text[max(0, len(text)-3000):])
		}
	}
	removeNamespaces(s.t, s.Node, append(namespaces, bridgeNamespace)...)
}

func (s *springCloud) deploy() {
	s.t.Helper()
	top, err := node.Top()
	if err != nil {
		s.t.Fatal(err)
	}
	s.wantInReadme("polymesh deploy")
	cmd := s.command("polymesh deploy")
	cmd.Env = append(cmd.Env, "CONTAINERS_STORAGE_CONF="+filepath.Join(top, ".build", "polyglot", "storage.conf"))
	if out, err := cmd.CombinedOutput(); err != nil {
		s.t.Fatalf("polymesh deploy: %v: %s", err, out)
	}
	s.step("kubectl apply -f move/0-percent.yaml")
}

// stock is what the inventory answers.
type stock struct {
	Item     string `json:"item"`
	Count    int    `json:"count"`
	ServedBy string `json:"servedBy"`
}

// outside queries the old system's gateway.
func (s *springCloud) outside(path string, into any) error {
	// The old gateway's own machine, and a connection for each question.
	client := http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			return s.DialOutside(ctx, network, address)
		}}}
	resp, err := client.Get("http://" + net.JoinHostPort(node.OutsideHost, oldPrograms["gateway"]) + path)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", resp.Status, text)
	}
	if err != nil {
		return err
	}
	return json.Unmarshal(text, into)
}

// byFeign lets the order service ask the inventory by its Feign client, and byRest by RestTemplate.
func (s *springCloud) byFeign() (stock, error) {
	var order struct {
		Stock stock `json:"stock"`
	}
	err := s.outside("/orders/bolt", &order)
	return order.Stock, err
}

func (s *springCloud) byRest() (stock, error) {
	var got stock
	err := s.outside("/orders/bolt/stock", &got)
	return got, err
}

// fromMesh calls from the client's pod, by the name that the bridge has given to a service.
func (s *springCloud) fromMesh(host, path string) (string, error) {
	return s.KubectlErr("exec", "-n", shopNamespace, "deployment/client", "-c", "client", "--", "/echo", "get", "http://"+host+path)
}

func (s *springCloud) stockFromMesh() (stock, error) {
	var got stock
	out, err := s.fromMesh("inventory-service.eureka.internal", "/stock/bolt")
	if err == nil {
		err = json.Unmarshal([]byte(out), &got)
	}
	return got, err
}

// callers are the ways to the inventory: the old system's clients, unchanged, and a program in the mesh.
func (s *springCloud) callers() map[string]func() (stock, error) {
	return map[string]func() (stock, error){"Feign": s.byFeign, "RestTemplate": s.byRest, "the mesh": s.stockFromMesh}
}

// wantServedBy waits until every caller is served from there.
func (s *springCloud) wantServedBy(place string, callers ...string) {
	s.t.Helper()
	for _, caller := range callers {
		s.Eventually(s.t, 2*time.Minute, func() (bool, string) {
			got, err := s.callers()[caller]()
			return err == nil && got.ServedBy == place, fmt.Sprintf("%s gets %+v, %v; want it served by %s", caller, got, err, place)
		})
	}
}

var everyCaller = []string{"Feign", "RestTemplate", "the mesh"}

// alone: without the bridge, and before it.
func (s *springCloud) alone() {
	s.wantServedBy(oldPlace, "Feign", "RestTemplate")
	if _, printed, code := s.Polymesh(s.t, "bridge", "status"); code != 3 {
		s.t.Errorf("without a bridge, status ends with %d: %s", code, printed)
	}
}

// status is the own report of the bridge of a namespace, which is empty (code 3) where none has begun.
func (s *springCloud) status(namespace string) (bridge.Report, int) {
	out, printed, code := s.Polymesh(s.t, "bridge", "status", "-n", namespace, "-o", "json")
	var reports []bridge.Report
	if code == 3 {
		return bridge.Report{}, code
	}
	if err := json.Unmarshal([]byte(out), &reports); err != nil || len(reports) != 1 {
		s.t.Fatalf("polymesh bridge status: %v: %s%s", err, out, printed)
	}
	return reports[0], code
}

// wantStatus waits for the bridge's exit code, and for its report of a problem.
func (s *springCloud) wantStatus(code int, problem string) bridge.Report {
	s.t.Helper()
	var last bridge.Report
	s.Eventually(s.t, 2*time.Minute, func() (bool, string) {
		r, got := s.status(bridgeNamespace)
		last = r
		problems := r.Error
		for _, p := range r.Problems {
			problems += p.Message
		}
		return got == code && strings.Contains(problems, problem), fmt.Sprintf("status ends with %d: %+v; want %d and %q", got, r, code, problem)
	})
	return last
}

// workloads are the instances in the mesh, with the ids of their objects.
func (s *springCloud) workloads() map[string]string {
	s.t.Helper()
	out := s.Kubectl(s.t, "get", "workloadentries", "-n", bridgeNamespace, "-o", "json")
	var list struct {
		Items []struct {
			Metadata struct {
				UID         string            `json:"uid"`
				Annotations map[string]string `json:"annotations"`
			} `json:"metadata"`
		} `json:"items"`
	}
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		s.t.Fatal(err)
	}
	found := make(map[string]string)
	for _, item := range list.Items {
		found[item.Metadata.Annotations["bridge.polymesh.dev/instance"]] = item.Metadata.UID
	}
	return found
}

// wantWorkloads waits until just these instances are in the mesh.
func (s *springCloud) wantWorkloads(want ...string) {
	s.t.Helper()
	s.Eventually(s.t, 2*time.Minute, func() (bool, string) {
		var got []string
		for id := range s.workloads() {
			got = append(got, id)
		}
		slices.Sort(got)
		return slices.Equal(got, want), fmt.Sprintf("the mesh has %q, want %q", got, want)
	})
}

// clash: the mesh has one of the names already when the bridge begins.
func (s *springCloud) clash() {
	const theirs = `
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: theirs, namespace: shop}
spec:
  hosts: [gateway.eureka.internal]
  resolution: DNS
  ports: [{number: 80, name: http, protocol: HTTP}]
  endpoints: [{address: elsewhere.example.com}]
`
	s.Apply(s.t, theirs)
	s.startBridge()
	s.wantStatus(1, "gateway.eureka.internal is a host of ServiceEntry shop/theirs already")
	s.wantWorkloads("inventory-service", "order-service")
	s.Delete(s.t, theirs)
	s.wantStatus(0, "")
	s.wantWorkloads("gateway", "inventory-service", "order-service")
}

// calledFromMesh: a program in the mesh calls a service outside by name, and its sidecar knows whom.
func (s *springCloud) calledFromMesh() {
	begin := time.Now()
	s.Eventually(s.t, 2*time.Minute, func() (bool, string) {
		out, err := s.fromMesh("order-service.eureka.internal", "/orders/bolt")
		return err == nil && strings.Contains(out, oldPlace), fmt.Sprintf("the order service answers %q, %v", out, err)
	})
	s.wantServedBy(oldPlace, everyCaller...)
	s.Eventually(s.t, time.Minute, func() (bool, string) {
		lines := connectionLog(s.t, s.Node, shopNamespace, "client", "outbound|80||order-service.eureka.internal", begin)
		ok := slices.ContainsFunc(lines, func(line string) bool {
			return strings.Contains(line, node.OutsideHost+":"+oldPrograms["order-service"])
		})
		return ok, fmt.Sprintf("the sidecar's log has %q", lines)
	})
}

// registered is what Eureka returns for a service: the status of each instance.
func (s *springCloud) registered(service string) map[string]string {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(s.t.Context()), 20*time.Second)
	defer cancel()
	out, err := s.OutsideCommand(ctx, "curl", "--silent", "--show-error", "--header", "Accept: application/json", eurekaURL+"apps/"+strings.ToUpper(service)).Output()
	var answer struct {
		Application struct {
			Instance []struct {
				ID     string `json:"instanceId"`
				Status string `json:"status"`
			} `json:"instance"`
		} `json:"application"`
	}
	if err == nil {
		err = json.Unmarshal(bytes.TrimSpace(out), &answer)
	}
	if err != nil {
		s.t.Fatalf("ask Eureka for %s: %v: %s", service, err, out)
	}
	found := make(map[string]string)
	for _, i := range answer.Application.Instance {
		if strings.HasPrefix(i.ID, "polymesh-") {
			i.ID = "the mesh"
		}
		found[i.ID] = i.Status
	}
	return found
}

// wantRegistered waits until Eureka returns exactly this for the inventory.
func (s *springCloud) wantRegistered(want map[string]string) {
	s.t.Helper()
	s.Eventually(s.t, 2*time.Minute, func() (bool, string) {
		got := s.registered("inventory-service")
		return fmt.Sprint(got) == fmt.Sprint(want), fmt.Sprintf("Eureka has %v, want %v", got, want)
	})
}

// takeOver: the mesh is to answer for the inventory, which no one notices yet.
func (s *springCloud) takeOver() {
	s.step("kubectl label service -n shop inventory-service bridge.polymesh.dev/eureka=inventory-service")
	s.wantStatus(1, "the registry has inventory-service already")
	s.wantRegistered(map[string]string{"inventory-service": "UP"})

	s.step("kubectl annotate service -n shop inventory-service bridge.polymesh.dev/takes-over=true")
	s.wantRegistered(map[string]string{"inventory-service": "OUT_OF_SERVICE", "the mesh": "UP"})
	report := s.wantStatus(0, "")
	want := bridge.AdvertReport{Name: "inventory-service", Service: "shop/inventory-service", Address: "inventory-service.eureka.internal:80", TakesOver: true}
	if !slices.Equal(report.Advertised, []bridge.AdvertReport{want}) {
		s.t.Errorf("the bridge advertises %+v, want %+v", report.Advertised, want)
	}
	// Once the clients have heard of it, they come in by the mesh's gateway.
	begin := time.Now()
	s.Eventually(s.t, 2*time.Minute, func() (bool, string) {
		got, err := s.byFeign()
		if err != nil || got.ServedBy != oldPlace {
			return false, fmt.Sprintf("Feign gets %+v, %v", got, err)
		}
		lines := connectionLog(s.t, s.Node, "istio-system", "istio-ingressgateway", "outbound|80||inventory-service.eureka.internal", begin)
		return len(lines) > 0, "nothing has come in by the gateway"
	})
	s.wantServedBy(oldPlace, everyCaller...)
}

// plainDNS: a second bridge, to a name server. The inventory is what its SRV record points to.
func (s *springCloud) plainDNS() {
	const records = "ns 1 IN A " + node.OutsideHost + "\nmachine 1 IN A " + node.OutsideHost + "\n"
	zone, corefile := filepath.Join(s.Dir, "corp.test.zone"), filepath.Join(s.Dir, "Corefile")
	write := func(name, text string) {
		s.t.Helper()
		if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
			s.t.Fatal(err)
		}
	}
	writeZone := func(serial int, records string) {
		write(zone, fmt.Sprintf("$ORIGIN corp.test.\n@ 1 IN SOA ns hostmaster %d 60 60 60 1\n@ 1 IN NS ns\n", serial)+records)
	}
	writeZone(1, records+"_http._tcp.inventory 1 IN SRV 0 0 8082 machine\n")
	write(corefile, "corp.test:5353 {\n  bind "+node.OutsideHost+"\n  file "+zone+" {\n    reload 1s\n  }\n}\n")
	top, err := node.Top()
	if err != nil {
		s.t.Fatal(err)
	}
	serve := func() {
		s.run("coredns", s.OutsideCommand(context.WithoutCancel(s.t.Context()), filepath.Join(top, ".build", "images", "bin", "coredns"), "-conf", corefile))
	}
	serve()
	defer func() { _ = s.stop("coredns", syscall.SIGKILL) }()
	s.run("dns", s.command("polymesh bridge run --dns stock=_http._tcp.inventory.corp.test --dns direct=machine.corp.test:8082 --dns-server "+node.OutsideHost+":5353 -n shop --interval 1s"))
	defer func() { _ = s.stop("dns", syscall.SIGKILL) }()
	ask := func(host string) {
		s.t.Helper()
		s.Eventually(s.t, 2*time.Minute, func() (bool, string) {
			out, err := s.fromMesh(host, "/stock/bolt")
			return err == nil && strings.Contains(out, oldPlace), fmt.Sprintf("%s answers %q, %v", host, out, err)
		})
	}
	ask("stock.dns.internal")
	ask("direct.dns.internal")

	// If a name server does not respond, nothing is removed from the mesh; if it reports that a name does not exist, it is.
	report := func() bridge.Report {
		out, _, _ := s.Polymesh(s.t, "bridge", "status", "-n", shopNamespace, "-o", "json")
		var reports []bridge.Report
		if err := json.Unmarshal([]byte(out), &reports); err != nil || len(reports) != 1 {
			s.t.Fatalf("polymesh bridge status: %v: %s", err, out)
		}
		return reports[0]
	}
	entries := func() string {
		return s.Kubectl(s.t, "get", "workloadentries", "-n", shopNamespace, "-o", "name")
	}
	_ = s.stop("coredns", syscall.SIGKILL)
	s.Eventually(s.t, time.Minute, func() (bool, string) {
		r := report()
		return strings.Contains(r.Error, "does not answer"), fmt.Sprintf("the report is %+v", r)
	})
	if got := entries(); strings.Count(got, "workloadentry") != 2 {
		s.t.Errorf("without a name server, the mesh has %q, want two instances", got)
	}
	serve()
	s.Eventually(s.t, time.Minute, func() (bool, string) {
		r := report()
		return r.Error == "" && r.Holding == nil, fmt.Sprintf("the report is %+v", r)
	})
	ask("stock.dns.internal")
	writeZone(2, records)
	s.Eventually(s.t, time.Minute, func() (bool, string) {
		got := entries()
		return strings.Count(got, "workloadentry") == 1 && strings.Contains(got, "/direct-"), "the record is gone, and the mesh has " + got
	})
}

// share asks often, and counts who has answered. No one may be without an answer.
func (s *springCloud) share(ask func() (stock, error), times int) (byMesh int) {
	s.t.Helper()
	for range times {
		got, err := ask()
		switch {
		case err != nil || got.ServedBy != oldPlace && got.ServedBy != newPlace:
			s.t.Fatalf("the answer is %+v, %v", got, err)
		case got.ServedBy == newPlace:
			byMesh++
		}
	}
	return byMesh
}

// wantShare waits until a step is in force for callers outside: of 200 requests the mesh answers so many. The bounds are five
// standard deviations away.
func (s *springCloud) wantShare(least, most int) {
	s.t.Helper()
	s.Eventually(s.t, time.Minute, func() (bool, string) {
		got := s.share(s.byFeign, 200)
		return got >= least && got <= most, fmt.Sprintf("the mesh has answered %d of 200 requests, want %d to %d", got, least, most)
	})
}

// mirrored is how many requests the mesh's pod has been sent under the name that callers outside use. While the old machines
// answer everything, these are copies.
func (s *springCloud) mirrored() int {
	s.t.Helper()
	out, err := s.KubectlErr("logs", "-n", shopNamespace, "deployment/inventory-service", "-c", "istio-proxy", "--tail=-1")
	if err != nil {
		s.t.Fatal(err)
	}
	return strings.Count(out, `"inventory-service.eureka.internal" `)
}

// move: step by step, and back.
func (s *springCloud) move() {
	s.step("kubectl apply -f move/mirror.yaml")
	s.Eventually(s.t, time.Minute, func() (bool, string) {
		byMesh := s.share(s.byFeign, 5)
		return byMesh == 0 && s.mirrored() > 0, "no copy of a request has come to the mesh"
	})
	s.step("kubectl apply -f move/10-percent.yaml")
	s.wantShare(1, 42)
	s.step("kubectl apply -f move/50-percent.yaml")
	s.wantShare(65, 135)
	s.step("kubectl apply -f move/100-percent.yaml")
	s.wantServedBy(newPlace, everyCaller...)
	s.wantShare(200, 200)

	// Each step can be taken back.
	s.step("kubectl apply -f move/50-percent.yaml")
	s.wantShare(65, 135)
	s.step("kubectl apply -f move/0-percent.yaml")
	s.wantShare(0, 0)
	s.wantServedBy(oldPlace, everyCaller...)
}

// eurekaAway: nothing is taken from the mesh by a registry that does not answer, nor by one that begins again.
func (s *springCloud) eurekaAway() {
	long(s.t, "TestConsul has a registry that is away")
	before := s.workloads()
	_ = s.stop("eureka-server", syscall.SIGKILL)
	s.wantStatus(1, "the registry does not answer, so nothing is changed")
	if out, err := s.fromMesh("order-service.eureka.internal", "/orders/bolt"); err != nil || !strings.Contains(out, oldPlace) {
		s.t.Errorf("the order service answers %q, %v", out, err)
	}
	s.wantServedBy(oldPlace, everyCaller...)
	// A bridge that begins now knows no more than the cluster does.
	s.stopBridge()
	s.startBridge()

	s.start("eureka-server")
	s.wantStatus(0, "")
	s.wantRegistered(map[string]string{"inventory-service": "OUT_OF_SERVICE", "the mesh": "UP"})
	if after := s.workloads(); fmt.Sprint(after) != fmt.Sprint(before) {
		s.t.Errorf("the mesh had %v, and has %v", before, after)
	}
	s.wantServedBy(oldPlace, everyCaller...)
}

// switchedOff: the last step of the move.
func (s *springCloud) switchedOff() {
	s.step("kubectl apply -f move/100-percent.yaml")
	s.wantServedBy(newPlace, everyCaller...)
	_ = s.stop("inventory-service", syscall.SIGTERM)
	s.wantWorkloads("gateway", "order-service")
	s.wantRegistered(map[string]string{"the mesh": "UP"})
	s.wantServedBy(newPlace, everyCaller...)
	s.wantStatus(0, "")
}

// killed: an instance that no longer responds is removed, and with the last one its service.
func (s *springCloud) killed() {
	_ = s.stop("gateway", syscall.SIGKILL)
	s.wantWorkloads("order-service")
	s.Eventually(s.t, time.Minute, func() (bool, string) {
		out := s.Kubectl(s.t, "get", "serviceentries", "-n", bridgeNamespace, "-o", "name")
		return !strings.Contains(out, "/gateway.eureka.internal"), "its ServiceEntry is still there: " + out
	})
}

// giveBack: what the mesh has put into Eureka goes with the label.
func (s *springCloud) giveBack() {
	s.step("kubectl label service -n shop inventory-service bridge.polymesh.dev/eureka-")
	// Eureka answers from caches, which it renews every 30 seconds each.
	s.Eventually(s.t, 3*time.Minute, func() (bool, string) {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(s.t.Context()), 20*time.Second)
		defer cancel()
		out, err := s.OutsideCommand(ctx, "curl", "--silent", "--output", "/dev/null", "--write-out", "%{http_code}", eurekaURL+"apps/INVENTORY-SERVICE").Output()
		return string(out) == "404", fmt.Sprintf("Eureka answers %s, %v", out, err)
	})
}
