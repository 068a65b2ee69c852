package command

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"polymesh.dev/polymesh/pkg/workflow/bridge"
)

func TestBridgeCommandLines(t *testing.T) {
	for args, want := range map[string]string{
		"bridge run": "no registry is specified",
		"bridge run --eureka http://u:secret@host/":           "command-line arguments are visible to all local users",
		"bridge run --eureka http://u:sec/ret@host/":          "is not a valid URL",
		"bridge run --eureka host:8761":                       "not an address of Eureka",
		"bridge run --eureka http://a --dns b=c":              "a bridge has one registry",
		"bridge run --consul http://u:secret@host":            "without a user and without a token",
		"bridge run --consul http://host:8500/?token=secret":  "without a user and without a token",
		"bridge run --consul host:8500":                       "not an address of Consul",
		"bridge run --consul http://a --eureka http://b":      "a bridge has one registry",
		"bridge run --consul http://a --user u":               "Consul uses --token-file",
		"bridge run --consul http://a --token-file /no/is":    "read the token",
		"bridge run --eureka http://a --token-file x":         "Eureka uses --user",
		"bridge run --dns orders":                             "should be SERVICE=NAME",
		"bridge run --eureka http://a --gateway x":            `--gateway "x" is not NAMESPACE/NAME`,
		"bridge run --eureka http://a --client-cert x":        "must be used together",
		"bridge run --eureka http://a --password-file /no/is": "read the password",
		"bridge run --eureka http://a --ca-file /no/is":       "read the authorities",
		"bridge status -o xml":                                `--output "xml" is not one of json, yaml`,
	} {
		_, _, err := call(strings.Fields(args)...)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: error is %v, want %s", args, err, want)
		}
		if err != nil && strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: the error shows the password: %v", args, err)
		}
	}
}

func TestPrintBridges(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	well := bridge.Report{
		Name: "eureka", Namespace: "polymesh-bridge", Registry: "http://eureka.test/", Written: now.Add(-time.Second), Answered: now.Add(-5 * time.Second), Interval: 10,
		Services: []bridge.ServiceReport{{Name: "ORDERS", Host: "orders.eureka.internal", Instances: []string{"a", "b"}, LeftOut: []bridge.LeftOut{{Instance: "c", Reason: "it is out of service"}}, Held: []string{"a"}}},
		Advertised: []bridge.AdvertReport{
			{Name: "stock", Service: "shop/stock", Address: "192.0.2.1:80", TakesOver: true}, {Name: "bills", Service: "shop/bills"},
		},
	}
	var out bytes.Buffer
	if err := printBridges(&out, []bridge.Report{well}, now); err != nil {
		t.Fatal(err)
	}
	want := `bridge eureka in namespace polymesh-bridge to http://eureka.test/, which answered 5s ago

REGISTERED   IN THE MESH AS           INSTANCES   LEFT OUT   TAKEN OVER
ORDERS       orders.eureka.internal   2           1          1

SERVICE OF THE MESH   REGISTERED AS   AT             TAKES OVER
shop/stock            stock           192.0.2.1:80   true
shop/bills            bills           -              false

c of ORDERS is not in the mesh: it is out of service
`
	if out.String() != want {
		t.Errorf("it prints\n%s\nwant\n%s", out.String(), want)
	}
	if !well.Healthy(now) {
		t.Error("a healthy bridge is not reported as healthy")
	}
	for text, change := range map[string]func(*bridge.Report){
		"! the bridge is not running: its last report was 60m ago": func(r *bridge.Report) { r.Written = now.Add(-time.Hour) },
		"! broken": func(r *bridge.Report) { r.Error = "broken" },
		"! bills: taken": func(r *bridge.Report) {
			r.Problems = []bridge.Problem{{Service: "bills", Message: "taken"}}
		},
		"! 2 instances are missing in the registry; they stay in the mesh until 2026-01-02T03:04:05Z: a, b": func(r *bridge.Report) {
			r.Holding = &bridge.Holding{Until: now, Instances: []string{"a", "b"}}
		},
	} {
		r := well
		change(&r)
		out.Reset()
		if err := printBridges(&out, []bridge.Report{r}, now); err != nil || !strings.Contains(out.String(), text+"\n") {
			t.Errorf("it does not print %q, but\n%s%v", text, out.String(), err)
		}
		if r.Healthy(now) {
			t.Errorf("%q counts as healthy", text)
		}
	}
}
