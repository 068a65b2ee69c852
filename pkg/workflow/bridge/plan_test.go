package bridge

import (
	"context"
	"flag"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/validation"
	"sigs.k8s.io/yaml"
)

var update = flag.Bool("update", false, "write the golden files again")

// world has both sides in memory and applies plans. Only the requests are left out.
type world struct {
	Options
	t        *testing.T
	services []Service
	view     view
	last     Report
	now      time.Time
}

const ownOwner = "this-cluster/bridges/eureka"

// bothWays stands for a registry of which only the type matters here.
type bothWays struct {
	Advertiser
	Holder
}

func (bothWays) String() string { return "http://eureka.test/" }

type readOnly struct{}

func (readOnly) String() string                              { return "DNS" }
func (readOnly) Services(context.Context) ([]Service, error) { return nil, nil }

func newWorld(t *testing.T, services ...Service) *world {
	o := Options{
		Name: "eureka", Namespace: "bridges", Domain: "eureka.internal", Port: 80, Interval: 10 * time.Second,
		StaleAfter: 5 * time.Minute, MaxLoss: 50, Guard: 5 * time.Minute, Registry: bothWays{},
	}
	if err := o.check(); err != nil {
		t.Fatal(err)
	}
	return &world{
		Options: o, t: t, services: services, view: view{name: o.Name, manager: o.fieldManager()},
		now: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC),
	}
}

// pass runs a pass of the bridge, and applies it to both sides.
func (w *world) pass() plan {
	w.now = w.now.Add(w.Interval)
	p := w.plan(w.services, w.view, ownOwner, w.now, w.last)
	for _, o := range p.remove {
		w.view.entries, w.view.workloads = without(w.view.entries, o), without(w.view.workloads, o)
	}
	for _, o := range p.apply {
		o.SetManagedFields([]metav1.ManagedFieldsEntry{{Manager: w.fieldManager(), Operation: metav1.ManagedFieldsOperationApply}})
		list := &w.view.entries
		if o.GetKind() == "WorkloadEntry" {
			list = &w.view.workloads
		}
		*list = append(without(*list, o), o)
	}
	for _, a := range p.register {
		if i := w.instance(a.ID); i == nil {
			w.service(a.Service).Instances = append(w.service(a.Service).Instances, Instance{ID: a.ID, Address: a.Address, Port: a.Port, State: Up, Owner: a.Owner, Shown: a})
		} else if p.altered[a.ID] {
			*i = Instance{ID: a.ID, Address: a.Address, Port: a.Port, State: Up, Owner: a.Owner, Shown: a}
		}
	}
	for _, r := range p.hold {
		w.instance(r.id).State = OutOfService
	}
	for _, r := range p.release {
		w.instance(r.id).State = Up
	}
	for _, r := range p.withdraw {
		w.forget(r.id)
	}
	w.last = w.last.next(w.Options, w.now)
	w.last.Answered, w.last.Services, w.last.Holding = w.now, p.services, p.holding
	return p
}

// noAnswer runs a pass in which the registry does not respond.
func (w *world) noAnswer() {
	w.now = w.now.Add(w.Interval)
	w.last = w.last.next(w.Options, w.now)
}

func without(list []*unstructured.Unstructured, o *unstructured.Unstructured) []*unstructured.Unstructured {
	return slices.DeleteFunc(list, func(other *unstructured.Unstructured) bool {
		return other.GetName() == o.GetName() && id(other) == id(o)
	})
}

func (w *world) service(name string) *Service {
	for i := range w.services {
		if strings.EqualFold(w.services[i].Name, name) {
			return &w.services[i]
		}
	}
	w.services = append(w.services, Service{Name: strings.ToUpper(name)})
	return &w.services[len(w.services)-1]
}

func (w *world) instance(id string) *Instance {
	for i := range w.services {
		for j := range w.services[i].Instances {
			if w.services[i].Instances[j].ID == id {
				return &w.services[i].Instances[j]
			}
		}
	}
	return nil
}

// forget removes an instance from the registry.
func (w *world) forget(id string) {
	for i := range w.services {
		w.services[i].Instances = slices.DeleteFunc(w.services[i].Instances, func(x Instance) bool { return x.ID == id })
	}
	w.services = slices.DeleteFunc(w.services, func(s Service) bool { return len(s.Instances) == 0 })
}

// inMesh lists the instances that have a WorkloadEntry, and marks hidden ones with a star.
func (w *world) inMesh() string {
	var ids []string
	for _, e := range w.view.workloads {
		id := e.GetAnnotations()[instanceAnnotation]
		if e.GetAnnotations()[heldAnnotation] == "true" {
			id += "*"
		}
		ids = append(ids, id)
	}
	slices.Sort(ids)
	return strings.Join(ids, " ")
}

func (w *world) hosts() string {
	var hosts []string
	for _, e := range w.view.entries {
		hosts = append(hosts, e.GetName())
	}
	slices.Sort(hosts)
	return strings.Join(hosts, " ")
}

func (w *world) want(what, got, want string) {
	w.t.Helper()
	if got != want {
		w.t.Errorf("%s: %q, want %q", what, got, want)
	}
}

// wantProblem expects one problem with this text, or none.
func (w *world) wantProblem(p plan, text string) {
	w.t.Helper()
	if text == "" && len(p.problems) == 0 {
		return
	}
	if text == "" || len(p.problems) != 1 || !strings.Contains(p.problems[0].Message, text) {
		w.t.Errorf("problems are %+v, want %q", p.problems, text)
	}
}

func up(id string) Instance { return Instance{ID: id, Address: "192.0.2.1", Port: 8080, State: Up} }

func (w *world) offer(name string, takesOver bool) {
	w.view.offers = append(w.view.offers, offer{
		service: types.NamespacedName{Namespace: "shop", Name: name}, name: name, takesOver: takesOver,
		advert: Advert{Service: name, ID: "mesh:" + name, Host: name + ".example.com", Address: "192.0.2.100", Port: 80, Owner: ownOwner},
	})
}

// TestObjects compares the objects written for a registry with golden files.
func TestObjects(t *testing.T) {
	for name, services := range map[string][]Service{
		"http": {{Name: "ORDER_SERVICE", Instances: []Instance{
			{ID: "b:order-service:8081", Address: "192.0.2.2", Port: 8081, State: Up, Version: "v2"},
			{ID: "a:order-service:8081", Address: "192.0.2.1", Port: 8081, State: Up, Version: "no label: (it has spaces)"},
			{ID: "down", Address: "192.0.2.3", Port: 8081, State: Down},
			{ID: "hidden", Address: "192.0.2.4", Port: 8081, State: OutOfService},
			{ID: "loopback", Address: "127.0.0.1", Port: 8081, State: Up},
			{ID: "name", Address: "orders.example.com", Port: 8081, State: Up},
			{ID: "no port", Address: "192.0.2.5", State: Up},
			{ID: "secure", Address: "192.0.2.6", Port: 8443, TLS: true, State: Up},
		}}},
		"tls":  {{Name: "billing", Instances: []Instance{{ID: "secure", Address: "2001:db8::1", Port: 8443, TLS: true, State: Up}}}},
		"none": {{Name: "asleep", Instances: []Instance{{ID: "down", Address: "192.0.2.3", Port: 8081, State: Down}}}},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, services...)
			p := w.plan(w.services, w.view, ownOwner, w.now, w.last)
			var got strings.Builder
			for _, o := range p.apply {
				text, err := yaml.Marshal(o)
				if err != nil {
					t.Fatal(err)
				}
				got.WriteString("---\n" + string(text))
			}
			report, err := yaml.Marshal(map[string]any{"report": p.services, "problems": p.problems})
			if err != nil {
				t.Fatal(err)
			}
			got.WriteString("---\n" + string(report))
			golden := filepath.Join("testdata", name+".yaml")
			if *update {
				if err := os.WriteFile(golden, []byte(got.String()), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if got.String() != string(want) {
				t.Errorf("%s (go test -update writes it again) is not:\n%s", golden, got.String())
			}
			// A second pass finds everything up to date.
			w.pass()
			if p := w.pass(); len(p.apply)+len(p.remove) > 0 {
				t.Errorf("the second pass changes %v, %v", p.apply, p.remove)
			}
		})
	}
}

func TestInstancesComeAndGo(t *testing.T) {
	w := newWorld(t, Service{"A", []Instance{up("a1"), up("a2")}}, Service{"B", []Instance{up("b1"), up("b2")}})
	w.pass()
	w.want("instances", w.inMesh(), "a1 a2 b1 b2")
	w.forget("a1")
	w.pass()
	w.want("one has gone", w.inMesh(), "a2 b1 b2")
	w.forget("a2")
	w.pass()
	w.want("the service has gone", w.inMesh(), "b1 b2")
	w.pass()
	w.want("and its entry", w.hosts(), "b.eureka.internal")
	w.instance("b1").State, w.instance("b2").State = Down, OutOfService
	w.pass()
	w.want("reported as down", w.inMesh(), "")
	w.want("the service is still registered", w.hosts(), "b.eureka.internal")
}

// Too many missed heartbeats at once are ignored for a limited time.
func TestGuard(t *testing.T) {
	all := func() []Service {
		return []Service{{"A", []Instance{up("a1"), up("a2")}}, {"B", []Instance{up("b1"), up("b2")}}}
	}
	w := newWorld(t, all()...)
	w.pass()
	w.services = nil
	p := w.pass()
	w.want("an empty registry", w.inMesh(), "a1 a2 b1 b2")
	if p.holding == nil || len(p.holding.Instances) != 4 || p.holding.Until.Sub(p.holding.Since) != w.Guard {
		t.Errorf("the report has %+v", p.holding)
	}
	// The return of some does not remove the others.
	w.services = all()[1:]
	w.pass()
	w.want("half of them back", w.inMesh(), "a1 a2 b1 b2")
	w.services = all()
	if p := w.pass(); p.holding != nil {
		t.Errorf("all are back, but still held: %+v", p.holding)
	}
	w.services = nil
	for end := w.now.Add(w.Guard); w.now.Before(end); {
		w.pass()
		w.want("while it is held", w.inMesh(), "a1 a2 b1 b2")
	}
	w.pass()
	w.want("after that", w.inMesh(), "")

	// With a maximum loss of 100 %, everything is removed at once.
	w = newWorld(t, all()...)
	w.MaxLoss = 100
	w.pass()
	w.services = nil
	w.pass()
	w.want("no guard", w.inMesh(), "")
}

// A registry may have lost its data during an outage: not even a single missing instance is removed.
func TestRegistryComesBack(t *testing.T) {
	w := newWorld(t, Service{"A", []Instance{up("a1"), up("a2"), up("a3"), up("a4")}})
	w.pass()
	for range 3 {
		w.noAnswer()
	}
	w.want("no answer", w.inMesh(), "a1 a2 a3 a4")
	w.forget("a4")
	for range 3 {
		w.pass()
		w.want("one is missing", w.inMesh(), "a1 a2 a3 a4")
	}
	w.service("A").Instances = append(w.service("A").Instances, up("a4"))
	w.pass()
	w.forget("a4")
	w.pass()
	w.want("one has gone later", w.inMesh(), "a1 a2 a3")
}

// In self-preservation mode, Eureka keeps instances without heartbeats.
func TestStale(t *testing.T) {
	at := func(id string, minutes int) Instance {
		i := up(id)
		i.Renewed = time.Date(2020, 1, 1, 0, minutes, 0, 0, time.UTC) // a clock that is off by years
		return i
	}
	w := newWorld(t, Service{"A", []Instance{at("a1", 10), at("a2", 10), at("a3", 5)}})
	w.pass()
	w.want("all were heard of", w.inMesh(), "a1 a2 a3")
	w.instance("a1").Renewed = w.instance("a1").Renewed.Add(time.Minute)
	p := w.pass()
	w.want("one is stale", w.inMesh(), "a1 a2")
	if left := p.services[0].LeftOut; len(left) != 1 || left[0].Instance != "a3" || !strings.Contains(left[0].Reason, "5m0s") {
		t.Errorf("left out: %+v", left)
	}
	// Only one sends heartbeats: the network is more likely broken than all others dead.
	w.instance("a2").Renewed, w.instance("a3").Renewed = w.instance("a1").Renewed, w.instance("a1").Renewed
	w.pass()
	w.want("all are heard of again", w.inMesh(), "a1 a2 a3")
	w.instance("a1").Renewed = w.instance("a1").Renewed.Add(time.Hour)
	p = w.pass()
	w.want("most are stale", w.inMesh(), "a1 a2 a3")
	if p.holding == nil {
		t.Error("no instances are held")
	}
}

func TestClashes(t *testing.T) {
	entry := func(namespace, name string, exportTo []any, hosts ...any) *unstructured.Unstructured {
		spec := map[string]any{"hosts": hosts}
		if exportTo != nil {
			spec["exportTo"] = exportTo
		}
		return &unstructured.Unstructured{Object: map[string]any{
			"kind": "ServiceEntry", "metadata": map[string]any{"namespace": namespace, "name": name}, "spec": spec,
		}}
	}
	t.Run("a host of someone else's", func(t *testing.T) {
		w := newWorld(t, Service{"A", []Instance{up("a1")}}, Service{"B", []Instance{up("b1")}})
		theirs := entry("shop", "theirs", nil, "x.example.com", "a.eureka.internal")
		w.view.entries = append(w.view.entries, theirs)
		w.wantProblem(w.pass(), "a host of ServiceEntry shop/theirs")
		w.want("the other service", w.inMesh(), "b1")
		w.view.entries = without(w.view.entries, theirs)
		w.wantProblem(w.pass(), "")
		w.want("once it is gone", w.inMesh(), "a1 b1")
		// The service that comes later gets the problem; the existing one keeps working.
		w.view.entries = append(w.view.entries, theirs)
		w.wantProblem(w.pass(), "")
		w.want("when it comes back", w.inMesh(), "a1 b1")
	})
	t.Run("an object of someone else's", func(t *testing.T) {
		w := newWorld(t, Service{"A", []Instance{up("a1")}})
		w.view.entries = append(w.view.entries, entry("bridges", "a.eureka.internal", nil, "other.example.com"))
		w.wantProblem(w.pass(), "foreign ServiceEntry")
		w.want("instances", w.inMesh(), "")
	})
	t.Run("a private host", func(t *testing.T) {
		w := newWorld(t, Service{"A", []Instance{up("a1")}})
		w.view.entries = append(w.view.entries, entry("shop", "theirs", []any{"."}, "a.eureka.internal"))
		w.wantProblem(w.pass(), "")
		w.want("instances", w.inMesh(), "a1")
	})
	t.Run("two names that are one host", func(t *testing.T) {
		w := newWorld(t, Service{"MY_A", []Instance{up("second")}})
		w.pass()
		w.services = append(w.services, Service{"MY-A", []Instance{up("first")}})
		w.wantProblem(w.pass(), "MY-A and MY_A are both my-a.eureka.internal in the mesh, so MY-A is not written")
		w.want("the one that was there", w.inMesh(), "second")
	})
	t.Run("a name that is no host", func(t *testing.T) {
		w := newWorld(t, Service{"com.example.A", []Instance{up("a1")}})
		w.wantProblem(w.pass(), "cannot be part of a host name")
	})
	t.Run("a name that is registered", func(t *testing.T) {
		w := newWorld(t, Service{"A", []Instance{up("a1")}})
		w.offer("a", false)
		p := w.pass()
		w.wantProblem(p, "kubectl annotate service -n shop a bridge.polymesh.dev/takes-over=true")
		if len(p.register) > 0 {
			t.Errorf("registered: %+v", p.register)
		}
	})
	t.Run("one name, two Services", func(t *testing.T) {
		w := newWorld(t)
		w.offer("a", false)
		w.offer("a", false)
		w.view.offers[1].service.Namespace = "elsewhere"
		p := w.pass()
		w.wantProblem(p, "Services shop/a and elsewhere/a both claim the name a")
		if len(p.register) != 1 {
			t.Errorf("registered: %+v", p.register)
		}
	})
	t.Run("one address, two Services", func(t *testing.T) {
		w := newWorld(t)
		w.offer("a", false)
		w.offer("b", false)
		w.view.offers[0].advert.Host, w.view.offers[1].advert.Host = "192.0.2.100", "192.0.2.100"
		w.wantProblem(w.pass(), "callers could not distinguish it from a")
	})
	t.Run("a registry that takes nothing", func(t *testing.T) {
		w := newWorld(t)
		w.Registry = readOnly{}
		w.offer("a", false)
		w.wantProblem(w.pass(), "this registry is read-only")
	})
}

func TestAdvertised(t *testing.T) {
	w := newWorld(t)
	w.MaxLoss = 100 // there are so few
	w.offer("a", false)
	p := w.pass()
	w.wantProblem(p, "")
	if len(p.register) != 1 || p.seen["mesh:a"] {
		t.Errorf("register %+v, seen %v", p.register, p.seen)
	}
	p = w.pass()
	if len(p.register) != 1 || !p.seen["mesh:a"] {
		t.Errorf("register %+v, seen %v", p.register, p.seen)
	}
	w.want("what the mesh has put there does not come back into it", w.inMesh(), "")
	w.want("its name works inside too", w.hosts(), "a.eureka.internal")

	// A gateway that briefly has no address.
	w.view.offers[0].problem = "no address"
	w.pass()
	if w.instance("mesh:a") == nil {
		t.Error("withdrawn although the Service is there")
	}
	// Others with the same name appear.
	w.view.offers[0].problem = ""
	w.service("a").Instances = append(w.service("a").Instances, up("a1"))
	w.wantProblem(w.pass(), "callers outside reach either")
	w.forget("a1")
	w.pass()

	w.view.offers = nil
	w.pass()
	if w.instance("mesh:a") != nil {
		t.Error("the Service is gone, but still registered")
	}
	w.pass()
	w.want("at the end", w.hosts(), "")
}

// A complete migration, with failures on the way.
func TestTakeOver(t *testing.T) {
	w := newWorld(t, Service{"A", []Instance{up("a1"), up("a2")}}, Service{"B", []Instance{up("b1"), up("b2")}})
	w.pass()
	state := func(id string) string { return string(w.instance(id).State) }
	w.offer("a", true)
	p := w.pass()
	w.wantProblem(p, "")
	w.want("in the mesh", w.inMesh(), "a1* a2* b1 b2")
	w.want("for callers outside", state("a1")+" "+state("mesh:a"), "OUT_OF_SERVICE UP")
	w.pass()
	w.want("and again", w.inMesh(), "a1* a2* b1 b2")

	// The registry loses all data; its clients register again.
	w.noAnswer()
	w.services = nil
	w.pass()
	w.want("an empty registry", w.inMesh(), "a1* a2* b1 b2")
	w.services = []Service{{"A", []Instance{up("a1"), up("a2"), up("a3")}}, {"B", []Instance{up("b1"), up("b2")}}}
	w.pass()
	w.want("all are back, and one more", w.inMesh(), "a1* a2* a3* b1 b2")
	w.want("for callers outside", state("a1")+" "+state("a3")+" "+state("mesh:a"), "OUT_OF_SERVICE OUT_OF_SERVICE UP")

	// Not hidden by the bridge: stays hidden from start to end.
	w.service("A").Instances = append(w.service("A").Instances, Instance{ID: "resting", Address: "192.0.2.9", Port: 1, State: OutOfService})
	w.pass()
	w.want("one that others have hidden", w.inMesh(), "a1* a2* a3* b1 b2")

	// A hidden instance misses its heartbeats, and recovers.
	w.instance("b1").Renewed = w.now
	w.instance("a2").Renewed = w.now.Add(-time.Hour)
	w.pass()
	w.want("one is stale", w.inMesh(), "a1* a3* b1 b2")
	w.pass()
	w.instance("a2").Renewed = w.now
	w.pass()
	w.want("and comes back hidden", w.inMesh(), "a1* a2* a3* b1 b2")

	// The migration is undone. The mesh stays in the registry until the old instances are visible again.
	w.view.offers = nil
	p = w.pass()
	if len(p.release) != 3 || len(p.withdraw) != 0 {
		t.Errorf("release %v, withdraw %v", p.release, p.withdraw)
	}
	w.pass()
	w.want("back", w.inMesh(), "a1 a2 a3 b1 b2")
	w.want("for callers outside", state("a1")+" "+state("a2")+" "+state("resting"), "UP UP OUT_OF_SERVICE")
	if w.instance("mesh:a") != nil {
		t.Error("the mesh is still registered")
	}

	// If two bridges hid each other's instances, none would be left.
	w.service("B").Instances = append(w.service("B").Instances, Instance{ID: "mesh2:b", Address: "192.0.2.200", Port: 80, State: Up, Owner: "another/bridge"})
	w.offer("b", true)
	w.wantProblem(w.pass(), "another bridge has also registered b")
	w.want("for callers outside", state("b1")+" "+state("mesh2:b"), "OUT_OF_SERVICE UP")
}

func TestOptionsAreChecked(t *testing.T) {
	good := newWorld(t).Options
	for want, change := range map[string]func(*Options){
		"lowercase letters":      func(o *Options) { o.Name = "Eureka" },
		"valid namespace name":   func(o *Options) { o.Namespace = "a/b" },
		"is not a domain":        func(o *Options) { o.Domain = "-" },
		"a domain is required":   func(o *Options) { o.Domain = "" },
		"Kubernetes' own":        func(o *Options) { o.Domain = "shop.svc.cluster.local" },
		"0 is not a port":        func(o *Options) { o.Port = 0 },
		"too short":              func(o *Options) { o.Interval = 0 },
		"cannot be negative":     func(o *Options) { o.Guard = -1 },
		"not a percentage":       func(o *Options) { o.MaxLoss = 101 },
		"neither HOST nor HOST:": func(o *Options) { o.AdvertiseAddress = "host:port:x" },
	} {
		o := good
		change(&o)
		if err := o.check(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: the error is %v", want, err)
		}
	}
}

// Addresses of the cluster itself, and those that do not belong to a single machine, are not added to the mesh.
func TestAddresses(t *testing.T) {
	own := []ownRange{{netip.MustParsePrefix("10.42.0.0/24"), "a pod's address"}, {netip.MustParsePrefix("10.43.0.0/16"), "the address of a Service"}, {netip.MustParsePrefix("192.0.2.7/32"), "the address of node a"}}
	for _, c := range []struct{ address, allow, why string }{
		{"192.0.2.1", "", ""},
		{"2001:db8::1", "", ""},
		{"169.254.169.254", "", "a link-local address"},
		{"::ffff:169.254.169.254", "", "a link-local address"},
		{"fe80::1", "", "a link-local address"},
		{"fe80::1%eth0", "", "not the address of a single machine"},
		{"224.0.0.1", "", "not the address of a single machine"},
		{"255.255.255.255", "", "not the address of a single machine"},
		{"ff02::1", "", "not the address of a single machine"},
		{"127.0.0.1", "", "refers to a different machine for every caller"},
		{"::ffff:127.0.0.1", "127.0.0.1/32", "refers to a different machine for every caller"},
		{"0.0.0.0", "", "refers to a different machine for every caller"},
		{"10.43.0.1", "", "the address of a Service"},
		{"10.42.0.17", "", "a pod's address"},
		{"192.0.2.7", "", "the address of node a"},
		{"192.0.2.7", "192.0.2.0/24", "to allow it, use --allow-cidr with a range no larger than 192.0.2.7/32"},
		{"192.0.2.7", "192.0.2.0/24,192.0.2.7/32", ""},
		{"10.43.0.1", "10.0.0.0/8", "the address of a Service"},
		{"10.1.2.3", "10.0.0.0/8", ""},
		{"198.51.100.1", "10.0.0.0/8,2001:db8::/32", "not in any range"},
		{"not an address", "", "is not an IP address"},
		{"0x7f.1", "", "is not an IP address"},
		{"010.0.0.1", "", "is not an IP address"},
	} {
		w := newWorld(t, Service{"A", []Instance{{ID: "a1", Address: c.address, Port: 80, State: Up}}})
		w.view.own = own
		for text := range strings.SplitSeq(c.allow, ",") {
			if text != "" {
				w.Allow = append(w.Allow, netip.MustParsePrefix(text))
			}
		}
		p := w.pass()
		left := p.services[0].LeftOut
		switch {
		case c.why == "" && w.inMesh() != "a1":
			t.Errorf("%s, allowed %q: it is left out: %v", c.address, c.allow, left)
		case c.why != "" && (w.inMesh() != "" || len(left) != 1 || !strings.Contains(left[0].Reason, c.why)):
			t.Errorf("%s, allowed %q: in the mesh is %q, left out %v; want %q", c.address, c.allow, w.inMesh(), left, c.why)
		}
	}
}

// Anyone with write access to the registry can change the mesh's own entry. The bridge restores it.
func TestHijacked(t *testing.T) {
	for what, change := range map[string]func(*Instance){
		"address \"203.0.113.66\"": func(i *Instance) { i.Shown.Address, i.Address = "203.0.113.66", "203.0.113.66" },
		"port \"666\"":             func(i *Instance) { i.Shown.Port, i.Port = 666, 666 },
		"host \"evil.example\"":    func(i *Instance) { i.Shown.Host = "evil.example" },
		"besides \"metadata x\"":   func(i *Instance) { i.Shown.Besides = "metadata x" },
		"owner \"\"":               func(i *Instance) { i.Shown.Owner, i.Owner = "", "" },
		"owner \"other\"":          func(i *Instance) { i.Shown.Owner, i.Owner = "other", "other" },
	} {
		w := newWorld(t)
		w.offer("a", false)
		w.pass()
		w.wantProblem(w.pass(), "")
		change(w.instance("mesh:a"))
		p := w.pass()
		w.wantProblem(p, what+" instead of")
		if !p.altered["mesh:a"] || len(p.register) != 1 {
			t.Errorf("%s: registered %v, altered %v", what, p.register, p.altered)
		}
		w.want(what+": it is no instance outside", w.inMesh(), "")
		w.wantProblem(w.pass(), "")
	}
}

// recorder counts the requests to a registry.
type recorder struct {
	Advertiser
	registered, renewed int
}

func (*recorder) RenewEvery() time.Duration { return time.Hour }
func (r *recorder) Register(context.Context, Advert) error {
	r.registered++
	return nil
}
func (r *recorder) Renew(context.Context, Advert) (bool, error) {
	r.renewed++
	return true, nil
}

func TestAlteredIsRegisteredAgain(t *testing.T) {
	r := &recorder{}
	b := &Bridge{Options: Options{Log: slog.New(slog.DiscardHandler)}, advertised: map[string]registered{}}
	a := Advert{ID: "mesh:a", Service: "a"}
	for i, altered := range []bool{false, false, true, true, false} {
		p := plan{register: []Advert{a}, seen: map[string]bool{a.ID: i > 0}, altered: map[string]bool{a.ID: altered}}
		if err := b.advertise(t.Context(), r, p, time.Now()); err != nil {
			t.Fatal(err)
		}
	}
	if r.registered != 3 || r.renewed != 0 {
		t.Errorf("registered %d times, renewed %d times", r.registered, r.renewed)
	}
}

// A registry may have any number of instances, with ids of any form and length.
func TestLimits(t *testing.T) {
	w := newWorld(t, Service{"z", []Instance{up("z1")}})
	w.pass()
	w.want("at first", w.inMesh(), "z1")
	var flood Service
	flood.Name = "a"
	for i := range maxOfService + 7 {
		flood.Instances = append(flood.Instances, up(fmt.Sprint("flood", i)))
	}
	w.services = append(w.services, flood, Service{"b", []Instance{up("twice"), up("twice"), up(strings.Repeat("x", maxID+1)), up("")}})
	p := w.pass()
	w.wantProblem(p, fmt.Sprintf("the limit is %d instances per registry and %d per service: 7 are left out", maxInstances, maxOfService))
	if n := len(w.view.workloads); n != maxOfService+2 {
		t.Errorf("%d instances are in the mesh", n)
	}
	w.pass()
	if n := len(w.view.workloads); n != maxOfService+2 || !strings.HasSuffix(w.inMesh(), "twice z1") {
		t.Errorf("%d instances are in the mesh", n)
	}
	if left := p.services[1].LeftOut; len(left) != 3 {
		t.Errorf("left out: %v", left)
	}
	w.services = w.services[:1]
	for i := range maxServices + 5 {
		w.services = append(w.services, Service{fmt.Sprint("flood", i), []Instance{up("x")}})
	}
	w.MaxLoss = 100
	p = w.pass()
	if !strings.Contains(w.hosts(), "z.eureka.internal") || len(w.view.entries) > maxServices+2 || len(p.problems) == 0 {
		t.Errorf("%d entries, problems %v", len(w.view.entries), p.problems)
	}
	w = newWorld(t, Service{strings.Repeat("a", 63), []Instance{up("a1")}})
	w.Domain = strings.Repeat("d.", 100) + "internal"
	w.wantProblem(w.pass(), "is not a host name")
}

// A report can always be written.
func TestReportFits(t *testing.T) {
	var r Report
	r.Error = strings.Repeat("e", 1<<20)
	id := strings.Repeat("\x01", maxID) // six bytes each in JSON
	for i := range maxServices {
		s := ServiceReport{Name: fmt.Sprintf("s%05d", i), Host: "h"}
		for range 20 {
			s.Instances, s.LeftOut = append(s.Instances, id), append(s.LeftOut, LeftOut{id, id})
		}
		if i == maxServices-1 {
			s.Held = []string{"held"}
		}
		r.Services = append(r.Services, s)
		r.Problems = append(r.Problems, Problem{"x", id})
	}
	r.Holding = &Holding{Instances: r.Services[0].Instances}
	text, err := r.text()
	if err != nil || len(text) > maxReport {
		t.Fatalf("%d bytes, %v", len(text), err)
	}
	read, err := parseReport(&corev1.ConfigMap{Data: map[string]string{reportKey: string(text)}})
	if err != nil {
		t.Fatal(err)
	}
	if read.Omitted == nil || read.Omitted.Services+len(read.Services) != maxServices || read.Omitted.Problems+len(read.Problems) != maxServices {
		t.Errorf("%d services, %d problems, omitted %+v", len(read.Services), len(read.Problems), read.Omitted)
	}
	if last := read.Services[len(read.Services)-1]; len(last.Held) != 1 {
		t.Errorf("the service with held instances is missing, got %s", last.Name)
	}
	if members, others, _ := read.Services[0].Counts(); members != 20 || others != 20 {
		t.Errorf("%d and %d instances are counted", members, others)
	}
	if len(r.Services[0].Instances) != 20 || r.Omitted != nil || len(r.Problems[0].Message) != maxID {
		t.Error("the report itself was shortened")
	}
	small := Report{Services: []ServiceReport{{Name: "a", Instances: []string{"b"}}}}
	if text, err := small.text(); err != nil || strings.Contains(string(text), "omitted") || strings.Contains(string(text), "members") {
		t.Errorf("%s, %v", text, err)
	}
}

// Whatever a registry returns, objects written to the mesh have valid names, and no refused addresses.
func FuzzPlan(f *testing.F) {
	f.Add("ORDER_SERVICE", "a:order-service:8081", "192.0.2.1", "v2", 8081)
	f.Add("../x", "\x00", "::ffff:169.254.169.254", "a b", -1)
	f.Add("kubernetes.default", "\x1b[2J", "fe80::1%lo", "", 70000)
	f.Fuzz(func(t *testing.T, name, id, address, version string, port int) {
		w := newWorld(t, Service{name, []Instance{{ID: id, Address: address, Port: port, State: Up, Version: version}}})
		p := w.pass()
		for _, o := range p.apply {
			if bad := validation.IsDNS1123Subdomain(o.GetName()); len(bad) > 0 {
				t.Errorf("%q: %v", o.GetName(), bad)
			}
			written, _, _ := unstructured.NestedStringMap(o.Object, "spec", "labels")
			for _, labels := range []map[string]string{o.GetLabels(), written} {
				for key, value := range labels {
					if bad := validation.IsValidLabelValue(value); len(bad) > 0 {
						t.Errorf("label %s=%q: %v", key, value, bad)
					}
				}
			}
			if o.GetKind() == "WorkloadEntry" {
				text, _, _ := unstructured.NestedString(o.Object, "spec", "address")
				if a, err := netip.ParseAddr(text); err != nil || w.refuse(a, nil) != "" || a.Is4In6() || len(o.GetAnnotations()[instanceAnnotation]) > maxID {
					t.Errorf("address %q: %v", text, err)
				}
			}
		}
		if text, err := w.last.text(); err != nil || len(text) > maxReport {
			t.Errorf("the report has %d bytes, %v", len(text), err)
		}
	})
}
