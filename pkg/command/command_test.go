package command

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"polymesh.dev/polymesh/pkg/component"
	"polymesh.dev/polymesh/pkg/controlplane/member"
	"polymesh.dev/polymesh/pkg/layout"
	"polymesh.dev/polymesh/pkg/payload"
	"polymesh.dev/polymesh/pkg/reset"
	"polymesh.dev/polymesh/pkg/service"
	"polymesh.dev/polymesh/pkg/status"
	polymesh "polymesh.dev/polymesh/pkg/version"
	"polymesh.dev/polymesh/pkg/workflow/rollout"
)

// call runs a command line as Run does, and returns what it printed.
func call(args ...string) (stdout, stderr string, err error) {
	var out, errOut bytes.Buffer
	cmd := newRoot()
	cmd.SetArgs(args)
	cmd.SetOut(&out)
	cmd.SetErr(&errOut)
	cmd.SilenceUsage, cmd.SilenceErrors = true, true
	err = cmd.Execute()
	return out.String(), errOut.String(), err
}

func TestCommands(t *testing.T) {
	var names []string
	for _, c := range newRoot().Commands() {
		names = append(names, c.Name())
		if c.Short == "" {
			t.Errorf("%s has no description", c.Name())
		}
	}
	slices.Sort(names)
	if want := []string{"agent", "bridge", "completion", "ctr", "dashboard", "datastore", "deploy", "dev", "etcd", "image", "install", "istioctl", "kubectl", "new", "node", "reset", "rollout", "schema", "secrets-encrypt", "server", "snapshot", "status", "token", "undeploy", "uninstall", "version"}; !slices.Equal(names, want) {
		t.Errorf("commands are %q, want %q", names, want)
	}
}

func TestVersionFlag(t *testing.T) {
	out, _, err := call("--version")
	if err != nil || out != "polymesh "+polymesh.Version+"\n" {
		t.Errorf("got %q, %v", out, err)
	}
	if out, _, err := call("status", "--help"); err != nil || strings.Contains(out, "--version") {
		t.Errorf("%v, but Kubernetes' own flag is shown: %s", err, out)
	}
}

func TestBadCommandLines(t *testing.T) {
	for args, want := range map[string]string{
		"no-such":                         `unknown command "no-such" for "polymesh"`,
		"status --no-such":                "unknown flag: --no-such (see `polymesh status --help`)",
		"status extra":                    `unknown command "extra" for "polymesh status"`,
		"reset extra":                     `unknown command "extra" for "polymesh reset"`,
		"install extra":                   `"extra" is neither server nor agent (see ` + "`polymesh install --help`)",
		"install --output xml":            `--output "xml" is not one of json, yaml`,
		"install --mesh-profil demo":      "unknown flag: --mesh-profil (see `polymesh install --help`)",
		"uninstall extra":                 `unknown command "extra" for "polymesh uninstall"`,
		"image scan":                      "give an image: its name, or a file (see `polymesh image scan --help`)",
		"image scan x --from y":           `--from "y" is not one of archive, node, engine, registry`,
		"image verify x":                  `required flag(s) "key" not set`,
		"version -o xml":                  `--output "xml" is not one of json, yaml`,
		"rollout canary api --steps ten":  `--steps "ten" is not a list of percentages such as 10,50,100`,
		"rollout canary api --timeout 1m": "--timeout needs --image: a running rollout keeps its plan",
		"rollout canary":                  "give the name of a deployment (see `polymesh rollout canary --help`)",
		"token revoke":                    "give the id of a token, as `polymesh token list` shows it (see `polymesh token revoke --help`)",
		"node remove a b":                 "give the name of a node, as `polymesh node list` shows it (see `polymesh node remove --help`)",
		"new thing":                       `unknown command "thing" for "polymesh new"`,
		"new project":                     "give the project's name, or its folder (see `polymesh new project --help`)",
		"new service a b":                 "give the service's name (see `polymesh new service --help`)",
		"server --mesh-profile":           "flag needs an argument: --mesh-profile (see `polymesh server --help`)",
	} {
		_, _, err := call(strings.Fields(args)...)
		if err == nil || err.Error() != want {
			t.Errorf("%s: error is %v, want %s", args, err, want)
		}
	}
}

// Every group of commands, including cobra's own, rejects unknown subcommands.
func TestGroupsRefuseUnknownCommands(t *testing.T) {
	var groups []string
	var walk func(c *cobra.Command)
	walk = func(c *cobra.Command) {
		if !c.HasSubCommands() {
			return
		}
		groups = append(groups, c.CommandPath())
		path := strings.Fields(c.CommandPath())[1:]
		want := fmt.Sprintf("unknown command %q for %q", "nosuchthing", c.CommandPath())
		if _, _, err := call(append(path, "nosuchthing")...); err == nil || err.Error() != want {
			t.Errorf("%s nosuchthing: error is %v, want %s", c.CommandPath(), err, want)
		}
		if out, _, err := call(path...); err != nil || !strings.Contains(out, "Available Commands:") {
			t.Errorf("%s alone: %v\n%s", c.CommandPath(), err, out)
		}
		for _, sub := range c.Commands() {
			walk(sub)
		}
	}
	walk(newRoot())
	for _, group := range []string{"polymesh", "polymesh bridge", "polymesh completion", "polymesh image", "polymesh image db", "polymesh new", "polymesh rollout", "polymesh secrets-encrypt"} {
		if !slices.Contains(groups, group) {
			t.Errorf("%s is not a group; there are %q", group, groups)
		}
	}
	if _, _, err := call("secrets-encrypt", "enabel"); err == nil || !strings.Contains(err.Error(), "\n\nDid you mean this?\n\tenable") {
		t.Errorf("nothing is suggested: %v", err)
	}
}

// A data dir is the same one in all spellings: see layout.ParseDataDir.
func TestDataDirs(t *testing.T) {
	here := t.TempDir()
	t.Chdir(here)
	want := filepath.Join(here, "data")
	for _, text := range []string{"data", "data/", "./data", want + "/", want + "/."} {
		t.Setenv("POLYMESH_DATA_DIR", text)
		if got := dataDirFromEnv(); string(got) != want {
			t.Errorf("POLYMESH_DATA_DIR=%s is %q", text, got)
		}
		for _, args := range [][]string{{"status"}, {"status", "-d", text}} {
			_, stderr, err := call(args...)
			if err != exitError(3) || !strings.Contains(stderr, "no node is running on "+want+":") {
				t.Errorf("%q with %s: %v: %s", args, text, err, stderr)
			}
		}
	}
	if _, _, err := call("status", "-d", ""); err == nil || !strings.Contains(err.Error(), "it is empty") {
		t.Errorf("an empty one: %v", err)
	}
}

func TestServerRefusesArguments(t *testing.T) {
	_, _, err := call("server", "extra")
	if err == nil || !strings.Contains(err.Error(), `"extra"`) {
		t.Errorf("error is %v", err)
	}
}

// What is wrong is refused before the machine is looked at; what is given completes as it does for a server.
func TestInstallFlags(t *testing.T) {
	for line, want := range map[string]string{"install --mesh-profile ": "demo\n", "install --output ": "yaml\n"} {
		if out, _, err := call(append([]string{"__complete"}, strings.Split(line, " ")...)...); err != nil || !strings.Contains(out, want) {
			t.Errorf("completion of %q: %v: %s", line, err, out)
		}
	}
	if os.Geteuid() != 0 {
		for _, name := range []string{"install", "uninstall"} {
			if _, _, err := call(name); err == nil || !strings.Contains(err.Error(), "needs root") {
				t.Errorf("%s: error is %v", name, err)
			}
		}
		return
	}
	for args, want := range map[string]string{
		"install --no-service --now":           "--no-service goes neither with --now nor with flags",
		"install --no-service --node-name a":   "--no-service goes neither with --now nor with flags",
		"install --dry-run --mesh-profile nil": "the program was not started by its launcher",
	} {
		t.Setenv(payload.EnvFile, "")
		if _, _, err := call(strings.Fields(args)...); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: error is %v, want %s", args, err, want)
		}
	}
}

func TestRemovalIsListed(t *testing.T) {
	removal := &service.Removal{Changes: []service.Change{
		{Target: "polymesh.service", Action: service.Stop}, {Target: service.Unit, Action: service.Delete},
		{Target: service.Program, Action: service.Leave, Reason: "it has been changed\x1b[2J"},
	}}
	var out bytes.Buffer
	listRemoval(&out, removal, &reset.Plan{}, "/var/lib/polymesh", 4711)
	want := `These will be removed:
  the service polymesh.service (stopped, and not started with the machine any more)
  /etc/systemd/system/polymesh.service
  the store of metrics, logs and traces, process 4711 (stopped; what it has recorded stays)
These stay:
  /usr/local/bin/polymesh: it has been changed\x1b[2J
  pods and data, in /var/lib/polymesh: ` + "`polymesh reset`" + `, while there is a polymesh file, or --reset removes them
`
	if out.String() != want {
		t.Errorf("got:\n%s", out.String())
	}
	out.Reset()
	listRemoval(&out, removal, &reset.Plan{Remove: []string{"the data dir /var/lib/polymesh: server"}}, "", 0)
	if got := out.String(); !strings.HasPrefix(got, "This stops all pods. All volumes, the datastore, and snapshots in the data dir are lost. These will be removed:\n  the data dir") || strings.Contains(got, "pods and data") {
		t.Errorf("got:\n%s", got)
	}
}

func TestHelpNamesEveryFlag(t *testing.T) {
	out, _, err := call("server", "--help")
	if err != nil {
		t.Fatal(err)
	}
	for _, flag := range []string{"--data-dir", "--kube-apiserver-arg", "--tls-san", "--mesh-profile", "POLYMESH_DATA_DIR"} {
		if !strings.Contains(out, flag) {
			t.Errorf("help lacks %s", flag)
		}
	}
}

func TestVersion(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "payload.json"), []byte(`{"images":["registry.example/pause:1"]}`), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv(payload.EnvDir, dir)
	for format, want := range map[string]string{"": "image       registry.example/pause:1\n", "json": `"polymesh": "dev"`, "yaml": "polymesh: dev\n"} {
		out, _, err := call("version", "-o", format)
		if err != nil || !strings.Contains(out, want) {
			t.Errorf("-o %q: %v\n%s", format, err, out)
		}
	}
}

// piece is a component of a test.
type piece struct{ sick error }

func (p *piece) Name() string                { return "coredns" }
func (p *piece) Init(context.Context) error  { return nil }
func (p *piece) Start(context.Context) error { return nil }
func (p *piece) Ready(context.Context) error { return p.sick }
func (p *piece) Stop(context.Context) error  { return nil }

func TestStatusExitCodes(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("the run directory lies below /run")
	}
	dataDir := t.TempDir()
	code := func(args ...string) int {
		_, stderr, err := call(append([]string{"status", "-d", dataDir}, args...)...)
		var exit exitError
		switch {
		case err == nil:
			return 0
		case !errors.As(err, &exit):
			t.Fatal(err)
		case exit == 3 && !strings.Contains(stderr, "no node is running on "+dataDir+": start it with `polymesh server` or `polymesh agent`"):
			t.Errorf("stderr is %q", stderr)
		}
		return int(exit)
	}
	if got := code(); got != 3 {
		t.Errorf("without a server: %d", got)
	}
	defer os.RemoveAll(layout.DataDir(dataDir).Run())
	for _, sick := range []error{nil, errors.New("no room")} {
		m := component.NewManager(slog.New(slog.DiscardHandler))
		coredns := m.Add(&piece{sick})
		ctx, cancel := context.WithCancel(t.Context())
		if _, err := status.Serve(ctx, layout.DataDir(dataDir).StatusSocket(), status.Report{}, m); err != nil {
			t.Fatal(err)
		}
		done := make(chan error, 1)
		go func() { done <- m.Run(ctx) }()
		want := 1
		if sick == nil {
			<-coredns.Ready()
			want = 0
		}
		for _, format := range []string{"", "json", "yaml"} {
			if got := code("-o", format); got != want {
				t.Errorf("-o %q, %v: %d, want %d", format, sick, got, want)
			}
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

func TestReport(t *testing.T) {
	now := time.Date(2030, 1, 1, 12, 0, 0, 0, time.UTC)
	row := func(name string, state component.State, ago time.Duration, version, message string) status.Component {
		return status.Component{Status: component.Status{Name: name, State: state, Since: now.Add(-ago), Version: version, Message: message}, InServer: true}
	}
	noted := func(c status.Component, notes ...string) status.Component {
		c.Notes = notes
		return c
	}
	r := &status.Report{Version: "1.0.0", PID: 42, Since: now.Add(-3 * time.Hour), Node: "n1", NodeIP: "192.0.2.1", Memory: 300 << 20, Anonymous: 150 << 20,
		Components: []status.Component{
			row("kube-apiserver", component.Ready, 3*time.Hour, "v1.36.3", ""),
			{Status: component.Status{Name: "containerd", State: component.Ready, Since: now.Add(-time.Minute), Version: "v2.3.7", PID: 43}, Memory: 64 << 20},
			{Status: component.Status{Name: "broken", State: component.NotReady, Since: now}},
			row("coredns", component.Starting, 90*time.Second, "", "pod coredns-1 cannot be scheduled: 0/1 nodes are available"),
			noted(row("pod-network", component.Ready, time.Second, "", ""), "no route to the pods of node b; c", "put back\nthe route"),
			noted(row("network-policy", component.Ready, time.Second, "", "3 NetworkPolicies are enforced"), "a policy has a problem"),
		}}
	var out bytes.Buffer
	if err := printReport(&out, r, now); err != nil {
		t.Fatal(err)
	}
	want := `polymesh 1.0.0 on node n1 (192.0.2.1), process 42, up 3h, 300 MiB of memory (150 MiB anonymous)

COMPONENT        STATE      SINCE   VERSION   MEMORY      MESSAGE
kube-apiserver   Ready      3h      v1.36.3   in server   
containerd       Ready      60s     v2.3.7    64 MiB      
broken           NotReady   0s      -         -           
coredns          Starting   90s     -         in server   pod coredns-1 cannot be scheduled: 0/1 nodes are available
pod-network      Ready      1s      -         in server   no route to the pods of node b; c
                                                          put back\nthe route
network-policy   Ready      1s      -         in server   3 NetworkPolicies are enforced
                                                          a policy has a problem
`
	if out.String() != want {
		t.Errorf("got:\n%s", out.String())
	}
}

// Users choose the names and the texts.
func TestReportNamesTroubledWorkloads(t *testing.T) {
	now := time.Date(2030, 1, 1, 12, 0, 0, 0, time.UTC)
	crash := status.Problem{Kind: "Deployment", Namespace: "shop", Name: "api", Container: "app", Reason: "Crash", Message: "ended with exit code 3", Replicas: 2}
	bare := status.Problem{Kind: "Deployment", Namespace: "shop", Name: "full", Reason: "Refused", Message: "exceeded quota\x1b[2J\nx", Replicas: 1, Checked: now.Add(-45 * time.Second)}
	late := status.Problem{Kind: "CronJob", Namespace: "shop", Name: "night", Reason: "NotReady", Message: "the job failed"}
	for name, c := range map[string]struct {
		of   *status.Workloads
		page bool
		want string
	}{
		"an agent":  {},
		"all well":  {of: &status.Workloads{}},
		"not known": {of: &status.Workloads{Unknown: "no\x1b time"}, want: "\n? whether workloads have problems: no\\x1b time\n"},
		"one, with a page": {of: &status.Workloads{Troubled: 1, Problems: []status.Problem{crash}}, page: true, want: `
! 1 workload has problems:
    deployment shop/api: 0 of 2 pods are ready: container app: Crash: ended with exit code 3
  see ` + "`polymesh dashboard`, or `polymesh kubectl get pods -A`" + `
`},
		"a namespace": {of: &status.Workloads{Troubled: 1, Problems: []status.Problem{{Kind: "Namespace", Name: "shop", Reason: "Deleting", Message: "it was deleted and still exists"}}}, want: `
! 1 workload or namespace has problems:
    namespace shop: Deleting: it was deleted and still exists
  see ` + "`polymesh kubectl get pods -A`" + `
`},
		"many": {of: &status.Workloads{Troubled: 30, Problems: []status.Problem{bare, late, crash, crash}}, want: `
! 30 workloads have problems:
    deployment shop/full: 0 of 1 pod is ready: Refused: exceeded quota\x1b[2J\nx (not checked again for 45s)
    cronjob shop/night: NotReady: the job failed
    deployment shop/api: 0 of 2 pods are ready: container app: Crash: ended with exit code 3
    and 27 more
  see ` + "`polymesh kubectl get pods -A`" + `
`},
	} {
		t.Run(name, func(t *testing.T) {
			r := &status.Report{Ready: true, Workloads: c.of}
			if c.page {
				r.Components = []status.Component{{Status: component.Status{Name: "observe"}}}
			}
			var out bytes.Buffer
			if err := printWorkloads(&out, r, now); err != nil || out.String() != c.want {
				t.Errorf("%v, got:\n%s", err, out.String())
			}
			if r.Ready = false; c.of != nil && c.of.Unknown != "" {
				out.Reset()
				if err := printWorkloads(&out, r, now); err != nil || out.Len() > 0 {
					t.Errorf("while it starts: %v, got:\n%s", err, out.String())
				}
			}
		})
	}
}

func TestAsk(t *testing.T) {
	for answer, want := range map[string]bool{"y\n": true, "YES \n": true, "n\n": false, "\n": false, "yeah\n": false} {
		var out strings.Builder
		if ok, err := ask(strings.NewReader(answer), &out, "Go on? "); err != nil || ok != want || out.String() != "Go on? " {
			t.Errorf("%q: %v, %v", answer, ok, err)
		}
	}
	if ok, err := ask(strings.NewReader(""), io.Discard, ""); ok || err == nil || !strings.Contains(err.Error(), "use --yes if there is no terminal") {
		t.Errorf("without an answer: %v, %v", ok, err)
	}
}

func TestNew(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "shop")
	out, _, err := call("new", "project", dir, "--dry-run", "--lang", "go")
	if err != nil || !strings.Contains(out, "create     services/go-service/main.go\n") || strings.Contains(out, "Next:") {
		t.Errorf("%v:\n%s", err, out)
	}
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a dry run has made something: %v", err)
	}
	out, _, err = call("new", "project", dir)
	if err != nil || !strings.Contains(out, "create     polymesh.yaml\n") || !strings.Contains(out, "\nNext:\n  cd "+dir+"\n  polymesh new service NAME --lang go\n  polymesh deploy\n") {
		t.Errorf("%v:\n%s", err, out)
	}

	// The project is that of the current folder.
	below := filepath.Join(dir, "k8s")
	t.Chdir(below)
	out, _, err = call("new", "service", "orders", "--lang", "rust")
	if err != nil || !strings.Contains(out, "curl -H 'Host: shop.example.com' http://NODE/orders\n") {
		t.Errorf("%v:\n%s", err, out)
	}
	var plan struct {
		Project  string
		Services []struct{ Name, Path string }
		Files    []struct{ Path, Action string }
	}
	out, _, err = call("new", "service", "orders", "--lang", "rust", "-C", dir, "-o", "json")
	if err == nil {
		err = json.Unmarshal([]byte(out), &plan)
	}
	if err != nil || plan.Project != "shop" || plan.Services[0].Path != "/orders" || plan.Files[0].Action != "unchanged" {
		t.Errorf("%v: %s", err, out)
	}
	if _, _, err := call("new", "service", "orders", "--lang", "go"); err == nil || !strings.Contains(err.Error(), "services/orders/Dockerfile") || !strings.Contains(err.Error(), "--force") {
		t.Errorf("error is %v", err)
	}
	if _, _, err := call("new", "service", "orders", "--lang", "go", "--force"); err != nil {
		t.Error(err)
	}
	t.Chdir(dir)
	if out, _, err := call("new", "project", "."); err != nil || strings.Contains(out, "cd ") || !strings.Contains(out, "unchanged  polymesh.yaml\n") {
		t.Errorf("%v:\n%s", err, out)
	}
	t.Chdir(t.TempDir())
	if _, _, err := call("new", "service", "orders", "--lang", "go"); err == nil || !strings.Contains(err.Error(), "create a project (polymesh new project NAME)") {
		t.Errorf("error is %v", err)
	}

	for line, want := range map[string]string{"new service x --lang ": "rust\tRust with axum", "new project x --lang ": "go\tGo's own net/http"} {
		if out, _, err := call(append([]string{"__complete"}, strings.Split(line, " ")...)...); err != nil || !strings.Contains(out, want) {
			t.Errorf("completion of %q: %v: %s", line, err, out)
		}
	}
}

func TestRolloutStatus(t *testing.T) {
	now := time.Date(2030, 1, 1, 12, 0, 0, 0, time.UTC)
	s := &rollout.State{Name: "api", Namespace: "shop", Phase: rollout.Running, Weight: 50,
		Spec: rollout.Spec{Image: "shop/api:1.1.0", Previous: "shop/api:1.0.0", Started: metav1.NewTime(now.Add(-5 * time.Minute))}, Done: []rollout.StepDone{{Weight: 10,
			Canary: rollout.Measure{Requests: 31, ErrorRate: 0.5, P99: metav1.Duration{Duration: 24 * time.Millisecond}, Timed: 30}, Stable: rollout.Measure{}}}}
	var out bytes.Buffer
	if err := printRollout(&out, s, now); err != nil {
		t.Fatal(err)
	}
	if err := printRollouts(&out, []*rollout.State{s}, now); err != nil {
		t.Fatal(err)
	}
	want := "deployment.apps/api -n shop, image shop/api:1.1.0 in place of shop/api:1.0.0, begun 5m ago\n" +
		"Running at 50 %, driven by none\n\n" +
		"STEP   CANARY                                STABLE\n" +
		"10 %   31 requests, 0.5 % errors, p99 24ms   no requests\n\n" +
		"No command drives it: `polymesh rollout canary api -n shop` continues it, `polymesh rollout promote api -n shop` and `polymesh rollout abort api -n shop` end it\n" +
		"NAME   PHASE     WEIGHT   IMAGE            AGE   DRIVEN BY\n" +
		"api    Running   50 %     shop/api:1.1.0   5m    none\n"
	if out.String() != want {
		t.Errorf("got:\n%s", out.String())
	}
	// Writers of ConfigMaps and Leases control these.
	out.Reset()
	s.Reason, s.Driver = "\x1b[2J\nall is well", "\x1b]0;title\a"
	if err := errors.Join(printRollout(&out, s, now), printRollouts(&out, []*rollout.State{s}, now)); err != nil || strings.ContainsAny(out.String(), "\x1b\a") || strings.Contains(out.String(), "\nall is well") {
		t.Errorf("%v: %q", err, out.String())
	}
}

// The cluster's part of the status, as a user reads it; hostile text stays in its line.
func TestClusterReport(t *testing.T) {
	now := time.Date(2030, 1, 1, 12, 0, 0, 0, time.UTC)
	c := &status.Cluster{
		Problem: "2 of 3 servers are away", Warnings: []string{"a warning"}, Unknown: []string{"nodes: no answer within 2s"},
		Nodes: []status.Node{
			{Name: "a", Role: status.RoleServer, Ready: true, Since: now.Add(-time.Hour), Version: "v1.36.3", Address: "192.0.2.1"},
			{Name: "w", Role: status.RoleAgent, Unschedulable: true, Version: "v1.35.0", Skew: "1 minor older", Reason: "line\nforged"},
		},
		Datastore: status.Datastore{Kind: status.EmbeddedEtcd, Size: 5 << 20, Revision: 42, Members: []status.Member{
			{ID: "a1", Node: "a", URL: "https://192.0.2.1:2380", Leader: true, Version: "3.6.13"},
			{ID: "b1", URL: "https://192.0.2.2:2380", Learner: true, Problem: "no answer"},
		}},
		Leaders: []status.Leader{{Lease: "polymesh", Holder: "a_x"}, {Lease: "kube-scheduler", Holder: "b_y", Expired: true, Renewed: now.Add(-time.Minute)}},
		Certificates: []status.Certificate{
			{Name: "serving-kubelet", Node: "a", Expires: now.Add(240 * time.Hour)}, {Name: "server-ca", Authority: true, Expires: now.Add(2400 * time.Hour)},
		},
		Snapshot: &status.Snapshot{File: "scheduled-a", Created: now.Add(-3 * time.Hour), Size: 110159, Failure: "the disk is full"},
	}
	var out bytes.Buffer
	if err := printCluster(&out, c, now); err != nil {
		t.Fatal(err)
	}
	want := `
The cluster does not work: 2 of 3 servers are away

NODE   ROLE     STATUS                        SINCE   VERSION                   ADDRESS     MESSAGE
a      server   Ready                         60m     v1.36.3                   192.0.2.1   
w      agent    NotReady,SchedulingDisabled   -       v1.35.0 (1 minor older)   -           line\nforged

MEMBER   NODE   ROLE      ADDRESS                  VERSION   MESSAGE
a1       a      leader    https://192.0.2.1:2380   3.6.13    
b1       -      learner   https://192.0.2.2:2380   -         no answer

datastore       etcd, 5 MiB, revision 42
leaders         polymesh a_x, kube-scheduler b_y (not renewed for 60s)
certificates    next to expire: serving-kubelet of a in 10d, server-ca, an authority, in 100d
last snapshot   scheduled-a, 3h ago, 108 KiB; the last scheduled one failed: the disk is full
! a warning
? nodes: no answer within 2s
`
	if out.String() != want {
		t.Errorf("got\n%s\nwant\n%s", out.String(), want)
	}
	out.Reset()
	if err := printServers(&out, []status.APIServer{{Address: "192.0.2.1:6443", Current: true, Connections: 5}, {Address: "192.0.2.2:6443"}, {Address: "192.0.2.3:6443", Problem: "refused"}}); err != nil {
		t.Fatal(err)
	}
	want = `
API SERVER       STATE       CONNECTIONS   MESSAGE
192.0.2.1:6443   connected   5             
192.0.2.2:6443   healthy     0             
192.0.2.3:6443   away        0             refused
`
	if out.String() != want {
		t.Errorf("got\n%s\nwant\n%s", out.String(), want)
	}
	got := describeDatastore(status.Datastore{Kind: status.SQLite, Size: 3 << 20, Rows: 9, Revision: 8, Compacted: 7, LastCompaction: now.Add(-4 * time.Minute)}, now)
	if text := strings.Join(got, ", "); text != "SQLite, 3 MiB, 9 rows, revision 8, compacted to revision 7, 4m ago" {
		t.Errorf("SQLite is %q", text)
	}
}

// Where there is no etcd, the commands for its members explain why not, and where to run them.
func TestEtcdCommands(t *testing.T) {
	dataDir := t.TempDir()
	defer os.RemoveAll(layout.DataDir(dataDir).Run())
	run := func(args ...string) error {
		_, stderr, err := call(append([]string{"etcd"}, append(args, "--data-dir", dataDir)...)...)
		var exit exitError
		if errors.As(err, &exit) {
			return fmt.Errorf("%d: %s", exit, stderr)
		}
		return err
	}
	check := func(want string) {
		t.Helper()
		for _, args := range [][]string{{"members"}, {"member-list"}, {"remove", "a"}} {
			if err := run(args...); err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %v, want %q", args, err, want)
			}
		}
	}
	check("3: polymesh: no server is running on " + dataDir + ": run it on a server")
	serve := func(role string, also func(*status.Server)) {
		ctx, cancel := context.WithCancel(t.Context())
		m := component.NewManager(slog.New(slog.DiscardHandler))
		s, err := status.Serve(ctx, layout.DataDir(dataDir).StatusSocket(), status.Report{Role: role}, m)
		if err != nil {
			t.Fatal(err)
		}
		also(s)
		t.Cleanup(cancel)
	}
	serve(status.RoleAgent, func(*status.Server) {})
	check("this node is an agent, and has no member of etcd: run it on a server")
	serve(status.RoleServer, func(s *status.Server) { member.Serve(s, nil, status.SQLite) })
	check("the datastore of this server is SQLite, and not etcd on the servers: there are no members")
}

func TestToolOf(t *testing.T) {
	for line, want := range map[string]string{
		"polymesh":                                "",
		"polymesh status":                         "",
		"polymesh status kubectl":                 "",
		"polymesh kubectl":                        "kubectl",
		"polymesh kubectl get -n x pods":          "kubectl get -n x pods",
		"/usr/local/bin/kubectl get kubectl":      "kubectl get kubectl",
		"istioctl kubectl":                        "istioctl kubectl",
		"polymesh __complete":                     "",
		"polymesh __complete kubectl":             "",
		"polymesh __complete status -":            "",
		"polymesh __complete kubectl get po":      "kubectl __complete get po",
		"polymesh __completeNoDesc istioctl vers": "istioctl __completeNoDesc vers",
		"kubectl __complete get":                  "kubectl __complete get",
	} {
		args := strings.Fields(line)
		name, its := toolOf(args)
		if got := strings.TrimSpace(name + " " + strings.Join(its, " ")); got != want {
			t.Errorf("%s: %q, want %q", line, got, want)
		}
		if strings.Join(args, " ") != line {
			t.Errorf("%s became %q", line, args)
		}
	}
}
