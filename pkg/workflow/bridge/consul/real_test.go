//go:build integration

package consul

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"sigs.k8s.io/yaml"

	"polymesh.dev/polymesh/pkg/porttest"
	"polymesh.dev/polymesh/pkg/workflow/bridge"
)

// program returns the Consul for tests: POLYMESH_CONSUL, or the result of `make .build/test/consul`.
func program(t *testing.T) string {
	t.Helper()
	if path := os.Getenv("POLYMESH_CONSUL"); path != "" {
		return path
	}
	path, err := filepath.Abs("../../../../.build/test/consul")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); err != nil {
		t.Skipf("no Consul: set POLYMESH_CONSUL or run make .build/test/consul (%v)", err)
	}
	return path
}

// startAgent runs a Consul agent on the loopback interface, with additional settings, and returns its address.
func startAgent(t *testing.T, settings map[string]any) string {
	t.Helper()
	path := program(t)
	ports := map[string]int{"dns": -1, "grpc": -1, "grpc_tls": -1, "serf_wan": -1}
	for _, name := range []string{"http", "server", "serf_lan"} {
		ports[name] = int(porttest.Loopback(t).Port())
	}
	settings["ports"] = ports
	settings["performance"] = map[string]any{"raft_multiplier": 1, "rpc_hold_timeout": "1s"} // a leader within two seconds, or an error
	text, err := json.Marshal(settings)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "consul.json")
	if err := os.WriteFile(file, text, 0o600); err != nil {
		t.Fatal(err)
	}
	log, err := os.Create(filepath.Join(t.TempDir(), "consul.log"))
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(path, "-config-file="+file)
	cmd.Stdout, cmd.Stderr = log, log
	// The agent ends with the test, even if the test is killed.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		log.Close()
		if output, err := os.ReadFile(log.Name()); t.Failed() {
			t.Logf("Consul's log (%v):\n%s", err, output[max(0, len(output)-3000):])
		}
	})
	return "http://127.0.0.1:" + strconv.Itoa(ports["http"])
}

func newClient(t *testing.T, token string, agents ...string) *Client {
	t.Helper()
	c, err := New(&http.Client{Timeout: 20 * time.Second}, agents, token, 10*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// eventually retries until try returns nil; its last error is the failure.
func eventually(t *testing.T, try func() error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		err := try()
		if err == nil {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatal(err)
		case <-tick.C:
		}
	}
}

// send sends a request to the agent, like the old system's programs.
func (c *Client) send(t *testing.T, method, path, body string) []byte {
	t.Helper()
	r, err := c.ask(t.Context(), method, strings.Split(path, "/"), nil, []byte(body))
	if err == nil {
		err = r.check(path)
	}
	if err != nil {
		t.Fatal(err)
	}
	return r.Body
}

// want compares Consul's services with this YAML.
func (c *Client) want(t *testing.T, want string) {
	t.Helper()
	services, err := c.Services(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	type line struct {
		Service, Instance, Address, Version, Owner string
		State                                      bridge.State
		TLS                                        bool
	}
	var lines []line
	for _, s := range services {
		for _, i := range s.Instances {
			if !i.Renewed.IsZero() {
				t.Errorf("%s was renewed at %s, which Consul does not report", i.ID, i.Renewed)
			}
			lines = append(lines, line{s.Name, i.ID, net.JoinHostPort(i.Address, strconv.Itoa(i.Port)), i.Version, i.Owner, i.State, i.TLS})
		}
	}
	var wanted []line
	if err := yaml.UnmarshalStrict([]byte(want), &wanted); err != nil {
		t.Fatal(err)
	}
	got, err := yaml.Marshal(lines)
	if err != nil {
		t.Fatal(err)
	}
	if text, err := yaml.Marshal(wanted); err != nil || string(got) != string(text) {
		t.Errorf("Consul has\n%s\nwant (%v)\n%s", got, err, text)
	}
}

func devAgent(t *testing.T) *Client {
	t.Helper()
	c := newClient(t, "", startAgent(t, map[string]any{"node_name": "old-machine", "server": true, "bootstrap": true,
		"data_dir": t.TempDir(), "bind_addr": "127.0.0.1", "advertise_addr": "127.0.0.1", "disable_update_check": true}))
	eventually(t, func() error {
		_, err := c.Services(t.Context())
		return err
	})
	return c
}

// TestCatalog reads services that the old system's programs have registered in all possible ways.
func TestCatalog(t *testing.T) {
	c := devAgent(t)
	c.want(t, "")
	for _, service := range []string{
		`{"ID": "orders-1", "Name": "orders", "Address": "192.0.2.1", "Port": 8081, "Meta": {"version": "v2", "secure": "false"}, "Check": {"TTL": "10m", "Status": "passing"}}`,
		`{"ID": "orders-2", "Name": "orders", "Address": "192.0.2.2", "Port": 8081, "Tags": ["version=v1", "secure=true"], "Check": {"TTL": "10m", "Status": "warning"}}`,
		`{"ID": "orders-3", "Name": "orders", "Address": "orders.example.com", "Port": 8081, "Meta": {"secure": "true"}, "Check": {"TTL": "10m", "Status": "critical"}}`,
		`{"ID": "orders/4", "Name": "orders", "Address": "2001:db8::1", "Port": 8081, "Checks": [{"TTL": "10m", "Status": "passing"}, {"TTL": "10m", "Status": "critical"}]}`,
		`{"ID": "unchecked", "Name": "Stock_Keeper", "Port": 80}`,
		`{"Kind": "connect-proxy", "ID": "proxy", "Name": "orders-sidecar-proxy", "Port": 20000, "Proxy": {"DestinationServiceName": "orders"}}`,
	} {
		c.send(t, http.MethodPut, "agent/service/register", service)
	}
	// An agent on another machine has used the same id.
	c.send(t, http.MethodPut, "catalog/register", `{"Node": "other-machine", "Address": "192.0.2.9", "Service": {"ID": "orders-1", "Service": "orders", "Port": 8081}}`)
	const shown = `
- {service: Stock_Keeper, instance: old-machine/unchecked, address: "127.0.0.1:80", state: UP}
- {service: orders, instance: old-machine/orders-1, address: "192.0.2.1:8081", version: v2, state: UP}
- {service: orders, instance: old-machine/orders-2, address: "192.0.2.2:8081", version: v1, state: UP, tls: true}
- {service: orders, instance: old-machine/orders-3, address: "orders.example.com:8081", state: DOWN, tls: true}
- {service: orders, instance: old-machine/orders/4, address: "[2001:db8::1]:8081", state: DOWN}
- {service: orders, instance: other-machine/orders-1, address: "192.0.2.9:8081", state: UP}
`
	c.want(t, shown)

	// The mesh takes instances over, and gives them back.
	for range 2 {
		if err := c.Hold(t.Context(), "orders", "old-machine/orders-1"); err != nil {
			t.Error(err)
		}
	}
	c.want(t, strings.Replace(shown, "v2, state: UP", "v2, state: OUT_OF_SERVICE", 1))
	for range 2 {
		if err := c.Release(t.Context(), "orders", "old-machine/orders-1"); err != nil {
			t.Error(err)
		}
	}
	c.want(t, shown)
	if err := c.Hold(t.Context(), "orders", "old-machine/gone"); err != nil {
		t.Errorf("holding an instance that is gone: %v", err)
	}
	if err := c.Hold(t.Context(), "orders", "other-machine/orders-1"); err == nil || !strings.Contains(err.Error(), "the agent of node other-machine, which alone can") {
		t.Errorf("holding another agent's instance: %v", err)
	}
	// A whole machine can also be in maintenance mode, and leaves it only on its owner's request.
	r, err := c.ask(t.Context(), http.MethodPut, []string{"agent", "maintenance"}, map[string][]string{"enable": {"true"}}, nil)
	if err := errors.Join(err, r.check("maintenance")); err != nil {
		t.Fatal(err)
	}
	out := strings.NewReplacer("state: UP", "state: OUT_OF_SERVICE", "state: DOWN", "state: OUT_OF_SERVICE").Replace(shown)
	c.want(t, strings.Replace(out, "192.0.2.9:8081\", state: OUT_OF_SERVICE", "192.0.2.9:8081\", state: UP", 1))
}

// TestAdvertise registers an instance of the mesh in Consul, and goes through a bridge's lifecycle.
func TestAdvertise(t *testing.T) {
	c := devAgent(t)
	a := bridge.Advert{Service: "inventory", ID: "polymesh-1:shop:inventory", Host: "inventory.mesh.example.com", Address: "192.0.2.100", Port: 80, Owner: "cluster/bridges/consul"}
	renew := func(want bool) {
		t.Helper()
		if known, err := c.Renew(t.Context(), a); err != nil || known != want {
			t.Errorf("renewed: %t, %v; want %t", known, err, want)
		}
	}
	register := func() {
		t.Helper()
		if err := c.Register(t.Context(), a); err != nil {
			t.Fatal(err)
		}
	}
	withdraw := func(service string) {
		t.Helper()
		if err := c.Withdraw(t.Context(), service, a.ID); err != nil {
			t.Error(err)
		}
	}
	renew(false)
	withdraw(a.Service)
	for range 2 {
		register()
		renew(true)
		c.want(t, `[{service: inventory, instance: "polymesh-1:shop:inventory", address: "inventory.mesh.example.com:80", owner: cluster/bridges/consul, state: UP}]`)
	}
	// Anyone with write access to Consul can change the entry. The change is visible, and registering again restores it.
	shown := func() bridge.Advert {
		t.Helper()
		services, err := c.Services(t.Context())
		if err != nil || len(services) != 1 || len(services[0].Instances) != 1 || services[0].Instances[0].ID != a.ID {
			t.Fatalf("Consul has %+v, %v", services, err)
		}
		return services[0].Instances[0].Shown
	}
	was := bridge.Advert{Service: a.Service, ID: a.ID, Host: a.Host, Port: a.Port, Owner: a.Owner}
	for _, host := range []string{a.Host, "192.0.2.100"} {
		a.Host, was.Host = host, host
		register()
		if got := shown(); got != was {
			t.Errorf("Consul has %+v for the registered instance, want %+v", got, was)
		}
		for _, hijacked := range []string{
			`"Address": "203.0.113.66", "Port": 666, "Meta": {"polymesh-bridge": "cluster/bridges/consul"}`,
			`"Address": "` + host + `", "Port": 80`,
			`"Address": "` + host + `", "Port": 80, "Meta": {"polymesh-bridge": "cluster/bridges/consul", "secure": "true"}`,
			`"Address": "` + host + `", "Port": 80, "Meta": {"polymesh-bridge": "cluster/bridges/consul"}, "Tags": ["secure=true"]`,
			`"Address": "` + host + `", "Port": 80, "Meta": {"polymesh-bridge": "cluster/bridges/consul"}, "TaggedAddresses": {"wan": {"Address": "203.0.113.66", "Port": 666}}`,
		} {
			c.send(t, http.MethodPut, "agent/service/register", `{"ID": "`+serviceID(a.Service, a.ID)+`", "Name": "inventory", `+hijacked+`}`)
			if got := shown(); got == was {
				t.Errorf("after %s the entry is unchanged", hijacked)
			}
			register()
			if got := shown(); got != was {
				t.Errorf("registered again after %s the entry is %+v", hijacked, got)
			}
		}
	}
	a.Host = "inventory.mesh.example.com"
	register()
	// Consul removes it without heartbeats, and the bridge restores it.
	var checks map[string]struct{ Status string }
	read := func() {
		t.Helper()
		clear(checks)
		if err := json.Unmarshal(c.send(t, http.MethodGet, "agent/checks", ""), &checks); err != nil {
			t.Fatal(err)
		}
		if len(checks) != 1 {
			t.Fatalf("the agent has the checks %v, want one", checks)
		}
	}
	read()
	c.send(t, http.MethodPut, "agent/check/fail/"+checkID(a), "")
	c.want(t, `[{service: inventory, instance: "polymesh-1:shop:inventory", address: "inventory.mesh.example.com:80", owner: cluster/bridges/consul, state: DOWN}]`)
	renew(true)
	read()
	if got := checks[checkID(a)].Status; got != "passing" {
		t.Errorf("after a renewal the check is %s", got)
	}
	// Without a heartbeat Consul itself stops showing it.
	c.ttl = time.Second
	register()
	eventually(t, func() error {
		read()
		if got := checks[checkID(a)].Status; got != "critical" {
			return fmt.Errorf("without a heartbeat the check is %s", got)
		}
		return nil
	})
	c.ttl = leastTTL
	register()
	renew(true)
	// A dead agent has left it in the catalog too: it is still one instance.
	c.send(t, http.MethodPut, "catalog/register", `{"Node": "dead-machine", "Address": "192.0.2.9", "Service": {"ID": "`+serviceID(a.Service, a.ID)+`", "Service": "inventory", "Address": "192.0.2.9", "Port": 81, "Meta": {"polymesh-bridge": "cluster/bridges/consul"}}, "Check": {"Name": "serfHealth", "Status": "critical"}}`)
	c.want(t, `[{service: inventory, instance: "polymesh-1:shop:inventory", address: "inventory.mesh.example.com:80", owner: cluster/bridges/consul, state: UP}]`)
	// The Service gets another name in the registry: the new one appears before the old one is removed.
	a.Service = "stock"
	renew(false)
	register()
	withdraw("inventory")
	c.want(t, `[{service: stock, instance: "polymesh-1:shop:inventory", address: "inventory.mesh.example.com:80", owner: cluster/bridges/consul, state: UP}]`)
	renew(true)
	withdraw("stock")
	withdraw("stock")
	c.want(t, "")
	renew(false)
}

// TestNoLeader: an agent whose servers have no leader returns an error.
func TestNoLeader(t *testing.T) {
	c := newClient(t, "", startAgent(t, map[string]any{"server": true, "bootstrap_expect": 3, "data_dir": t.TempDir(),
		"bind_addr": "127.0.0.1", "advertise_addr": "127.0.0.1", "disable_update_check": true}))
	eventually(t, func() error {
		services, err := c.Services(t.Context())
		if err == nil {
			t.Fatalf("without a leader, Consul has %v", services)
		}
		if !strings.Contains(err.Error(), "500") || !strings.Contains(err.Error(), "No cluster leader") {
			return err // it does not listen yet
		}
		return nil
	})
}

// TestACL: without permissions, Consul returns empty lists. The bridge must not take these for an empty registry.
func TestACL(t *testing.T) {
	const manager = "4f35b5f1-8f4c-4c64-9d2c-8c3f0f2b1a11"
	address := startAgent(t, map[string]any{"node_name": "old-machine", "server": true, "bootstrap": true, "data_dir": t.TempDir(),
		"bind_addr": "127.0.0.1", "advertise_addr": "127.0.0.1", "disable_update_check": true,
		"acl": map[string]any{"enabled": true, "default_policy": "deny", "tokens": map[string]any{"initial_management": manager, "agent": manager}}})
	m := newClient(t, manager, address)
	eventually(t, func() error {
		_, err := m.Services(t.Context())
		return err
	})
	m.send(t, http.MethodPut, "agent/service/register", `{"ID": "orders-1", "Name": "orders", "Address": "192.0.2.1", "Port": 8081}`)
	policies := 0
	token := func(rules string) string {
		t.Helper()
		policies++
		text, err := json.Marshal(map[string]string{"Name": "policy-" + strconv.Itoa(policies), "Rules": rules})
		if err != nil {
			t.Fatal(err)
		}
		var policy struct{ ID string }
		if err := json.Unmarshal(m.send(t, http.MethodPut, "acl/policy", string(text)), &policy); err != nil {
			t.Fatal(err)
		}
		var made struct{ SecretID string }
		if err := json.Unmarshal(m.send(t, http.MethodPut, "acl/token", `{"Policies": [{"ID": "`+policy.ID+`"}]}`), &made); err != nil {
			t.Fatal(err)
		}
		return made.SecretID
	}
	a := bridge.Advert{Service: "inventory", ID: "mesh", Host: "192.0.2.100", Address: "192.0.2.100", Port: 80, Owner: "mesh"}
	for want, secret := range map[string]string{
		`the bridge needs a token with the rule service_prefix "" {policy = "read"}`: "",
		`ACL not found (is the token right`:                                          "4f35b5f1-0000-0000-0000-000000000000",
		`the token needs the rule service_prefix`:                                    token(`node_prefix "" {policy = "read"}`),
		`it needs the rule node_prefix "" {policy = "read"}`:                         token(`service_prefix "" {policy = "read"}`),
	} {
		c := newClient(t, secret, address)
		services, err := c.Services(t.Context())
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, %v; want an error with %s", services, err, want)
		}
		if secret != "" && err != nil && strings.Contains(err.Error(), secret) {
			t.Errorf("the error shows the token: %v", err)
		}
		if err := c.Register(t.Context(), a); err == nil {
			t.Error("it can register a service")
		}
	}
	reader := newClient(t, token(`service_prefix "" {policy = "read"} node_prefix "" {policy = "read"}`), address)
	const orders = `[{service: orders, instance: old-machine/orders-1, address: "192.0.2.1:8081", state: UP}]`
	reader.want(t, orders)
	if err := reader.Register(t.Context(), a); err == nil || !strings.Contains(err.Error(), "service:write") {
		t.Errorf("a read-only token has registered a service: %v", err)
	}
	// The rules in docs/deploy/spring-cloud.md.
	writer := newClient(t, token(`service_prefix "" {policy = "write"} node_prefix "" {policy = "read"} agent_prefix "" {policy = "read"}`), address)
	if err := writer.Register(t.Context(), a); err != nil {
		t.Error(err)
	}
	if known, err := writer.Renew(t.Context(), a); err != nil || !known {
		t.Errorf("renewed: %t, %v", known, err)
	}
	if err := writer.Hold(t.Context(), "orders", "old-machine/orders-1"); err != nil {
		t.Error(err)
	}
	writer.want(t, `
- {service: inventory, instance: mesh, address: "192.0.2.100:80", owner: mesh, state: UP}
- {service: orders, instance: old-machine/orders-1, address: "192.0.2.1:8081", state: OUT_OF_SERVICE}
`)
	if err := writer.Release(t.Context(), "orders", "old-machine/orders-1"); err != nil {
		t.Error(err)
	}
	if err := writer.Withdraw(t.Context(), a.Service, a.ID); err != nil {
		t.Error(err)
	}
	writer.want(t, orders)
	// A token for some services works for these, and not for others.
	some := newClient(t, token(`service "orders" {policy = "read"} service "consul" {policy = "read"} node_prefix "" {policy = "read"}`), address)
	some.want(t, orders)
}
