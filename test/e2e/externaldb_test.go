//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"polymesh.dev/polymesh/pkg/workflow/deploy"
	"polymesh.dev/polymesh/test/e2e/node"
)

// The example examples/external-db.
const (
	externalNamespace = "external-db"
	externalHost      = "postgres.external.example.com" // the database's own name
	externalAlias     = "external-postgres"             // its Service in the cluster
	externalAddress   = "10.0.0.100"                    // what the manifests say in place of the real address
)

// way is a folder of the example, deployed.
type way struct {
	*node.Node
	t    *testing.T
	name string
	db   *database
	// host is what the app dials, and cluster how its sidecar calls that.
	host, cluster string
	// gateway is the egress gateway's cluster, if the connection goes through it.
	gateway string
	// limited is set where a DestinationRule limits the wait for a connection.
	limited bool
	// alike is set where another way fails in the same manner: with -short, that one is enough.
	alike bool
}

// TestExternalDatabase deploys each folder of the example, as it is but for the database's address, and lets the app ask
// the database while it is healthy, and while it is not.
func TestExternalDatabase(t *testing.T) {
	n := app(t)
	importEcho(t, n)
	learned := tellOutsideNames(t, n)
	ca := newAuthority(t)
	db := startPostgres(t, n, ca, externalHost)
	learned(externalHost)

	project := filepath.Join(t.TempDir(), "external-db")
	t.Cleanup(func() {
		n.ExplainNow(t)
		if _, printed, code := n.Polymesh(t, "undeploy", "--delete-namespace", filepath.Join(project, "externalname")); code != 0 {
			t.Errorf("polymesh undeploy: exit code %d: %s", code, printed)
		}
	})
	copyExample(t, project, ca)

	for _, w := range []way{
		{name: "externalname", host: externalAlias, cluster: "PassthroughCluster"},
		{name: "endpointslice", host: externalAlias, cluster: "outbound|5432||external-postgres.external-db.svc.cluster.local", limited: true, alike: true},
		{name: "serviceentry", host: externalHost, cluster: "outbound|5432||" + externalHost, limited: true},
		{name: "egress", host: externalHost, cluster: "outbound|5432||egress-external-db.istio-system.svc.cluster.local", gateway: "outbound|5432||" + externalHost, limited: true},
	} {
		t.Run(w.name, func(t *testing.T) {
			w.Node, w.t, w.db = n, t, db
			w.deploy(filepath.Join(project, w.name))
			w.wantAnswer()
			w.certificate()
			w.wantError("sslmode=disable", "no encryption (SQLSTATE 28000)")
			w.wantError("password=wrong", `FATAL: password authentication failed for user "app" (SQLSTATE 28P01)`)
			if w.alike && testing.Short() {
				return
			}
			w.slowQuery()
			w.down()
			w.silent()
			w.frozen()
		})
	}

	// The database's own list of all connections.
	entered := regexp.MustCompile(`(?m)^.*connection authorized:.*$`).FindAllString(db.serverLog(t), -1)
	if len(entered) == 0 {
		t.Error("the database has accepted no connection")
	}
	for _, line := range entered {
		if !strings.Contains(line, "SSL enabled (protocol=TLSv1.3") {
			t.Errorf("the database has let in: %s", line)
		}
	}
}

// copyExample copies the example, and follows its README: it writes the authority's file, and the database's address.
func copyExample(t *testing.T, dir string, ca *authority) {
	t.Helper()
	top, err := node.Top()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.CopyFS(dir, os.DirFS(filepath.Join(top, "examples", "external-db"))); err != nil {
		t.Fatal(err)
	}
	folders, err := filepath.Glob(filepath.Join(dir, "*", "polymesh.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	for _, folder := range folders {
		if err := os.WriteFile(filepath.Join(filepath.Dir(folder), "ca.crt"), []byte(ca.pem()), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	path := filepath.Join(dir, "endpointslice", "database.yaml")
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	const before, after = "addresses: [" + externalAddress + "]", "addresses: [" + node.OutsideHost + "]"
	if !strings.Contains(string(text), before) {
		t.Fatalf("%s does not have %q", path, before)
	}
	if err := os.WriteFile(path, []byte(strings.Replace(string(text), before, after, 1)), 0o600); err != nil {
		t.Fatal(err)
	}
}

// deploy deploys the folder. The password comes from the environment and is not to be seen.
func (w *way) deploy(dir string) {
	t := w.t
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	cmd := w.PolymeshCommand(ctx, "deploy", "-o", "json", dir)
	cmd.Env = append(cmd.Env, "POSTGRES_PASSWORD="+w.db.password)
	var out, printed bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &printed
	if err := cmd.Run(); err != nil {
		t.Fatalf("polymesh deploy %s: %v: %s%s", w.name, err, printed.String(), out.String())
	}
	if strings.Contains(out.String()+printed.String(), w.db.password) {
		t.Error("polymesh deploy shows the password")
	}
	var result deploy.Result
	if err := json.Unmarshal(out.Bytes(), &result); err != nil {
		t.Fatalf("polymesh deploy -o json: %v: %s", err, out.String())
	}
	for _, f := range result.Findings {
		// Istio's analyzer does not read a pod's annotations, where DNS capture is configured.
		if !strings.Contains(f.Advice, "/ist0134/") {
			t.Errorf("polymesh deploy finds %+v", f)
		}
	}
}

// query queries the database from the app, with settings that go before those of the pod.
func (w *way) query(settings, sql string) (string, error) {
	return w.KubectlErr("exec", "-n", externalNamespace, "deployment/client", "-c", "client", "--", "/echo", "postgres", settings, sql)
}

// session is what the database returns about the current session.
const session = "SELECT current_user, ssl, version FROM pg_stat_ssl WHERE pid = pg_backend_pid()"

// wantAnswer waits until the app has its answer, over the way that the folder is about.
func (w *way) wantAnswer() {
	w.t.Helper()
	begin := time.Now()
	w.Eventually(w.t, 2*time.Minute, func() (bool, string) {
		out, err := w.query("", session)
		if err != nil || out != "app|t|TLSv1.3\n" {
			return false, fmt.Sprintf("the database answers %q, %v", out, err)
		}
		return w.logged(begin, node.OutsideHost+":5432")
	})
}

// logged reports whether the sidecar and, last, the gateway have logged a connection since then, the last one with this text.
func (w *way) logged(begin time.Time, text string) (bool, string) {
	w.t.Helper()
	lines := connectionLog(w.t, w.Node, externalNamespace, "client", w.cluster, begin)
	if w.gateway != "" && len(lines) > 0 {
		lines = connectionLog(w.t, w.Node, "istio-system", "istio-egressgateway", w.gateway, begin)
	}
	found := slices.ContainsFunc(lines, func(line string) bool { return strings.Contains(line, text) })
	return found, fmt.Sprintf("no connection to %s %s with %q is in the log: %s", w.cluster, w.gateway, text, lines)
}

// wantError waits until the app gets this error, and ends with exit code 1.
func (w *way) wantError(settings, want string) {
	w.t.Helper()
	w.wantErrorFor(settings, session, want)
}

func (w *way) wantErrorFor(settings, sql, want string) {
	w.t.Helper()
	w.Eventually(w.t, time.Minute, func() (bool, string) {
		out, err := w.query(settings, sql)
		ok := err != nil && strings.Contains(err.Error(), want) && strings.Contains(err.Error(), "exit code 1")
		return ok, fmt.Sprintf("%q: got %q %v, want %q and exit code 1", settings, out, err, want)
	})
}

// certificate checks the name in the certificate: verify-full needs the one that the app dials.
func (w *way) certificate() {
	if w.host == externalHost {
		w.wantError("host="+node.OutsideHost, "cannot validate certificate for "+node.OutsideHost)
		return
	}
	const verify = "sslmode=verify-full"
	w.wantError(verify, "certificate is valid for "+externalHost+", not "+externalAlias)
	w.db.certify(w.t, externalHost, externalAlias)
	defer w.db.certify(w.t, externalHost)
	w.Eventually(w.t, time.Minute, func() (bool, string) {
		out, err := w.query(verify, session)
		return err == nil && out == "app|t|TLSv1.3\n", fmt.Sprintf("with a certificate for both names: %q %v", out, err)
	})
}

// slowQuery is ended by the database, if it is configured.
func (w *way) slowQuery() {
	w.wantErrorFor("options='-c statement_timeout=1s'", "SELECT pg_sleep(60)", "ERROR: canceling statement due to statement timeout (SQLSTATE 57014)")
}

// What the app sees when its sidecar takes the connection and then reaches no one, and when the app itself gives up.
var (
	cut      = regexp.MustCompile(`tls error: (EOF|.*connection reset by peer)`)
	timedOut = regexp.MustCompile(`tls error: timeout: context deadline exceeded`)
)

// down: nothing listens on the port.
func (w *way) down() {
	w.db.stop(w.t)
	func() {
		defer w.db.start(w.t)
		w.wantFailure(cut, " UF,URX - - \"delayed_connect_error:_Connection_refused\" ")
	}()
	w.wantAnswer()
}

// silent: nothing comes back, as when a firewall drops what it does not like. Where the sidecar has a limit, it is the
// first to give up; elsewhere the app is.
func (w *way) silent() {
	route := func(verb string) {
		if out, err := w.OutsideCommand(context.WithoutCancel(w.t.Context()), "ip", "route", verb, "blackhole", w.Address()+"/32").CombinedOutput(); err != nil {
			w.t.Errorf("ip route %s: %v: %s", verb, err, out)
		}
	}
	route("add")
	func() {
		defer route("delete")
		want := timedOut
		if w.limited {
			want = cut
		}
		w.wantFailure(want, " UF,URX - - \"-\" ")
	}()
	w.wantAnswer()
}

// frozen: the database's machine accepts connections, but the database does not respond. For the proxies the connection is open
// until the database continues, so their logs do not have it yet.
func (w *way) frozen() {
	w.db.signal(w.t, syscall.SIGSTOP)
	func() {
		defer w.db.signal(w.t, syscall.SIGCONT)
		w.wantError("", "timeout: context deadline exceeded")
	}()
	w.wantAnswer()
}

// wantFailure waits until the app gets this error, and the last proxy has logged the connection with that text.
func (w *way) wantFailure(want *regexp.Regexp, text string) {
	w.t.Helper()
	begin := time.Now()
	w.Eventually(w.t, 2*time.Minute, func() (bool, string) {
		out, err := w.query("", session)
		if err == nil || !want.MatchString(err.Error()) {
			return false, fmt.Sprintf("got %q %v, want %s", out, err, want)
		}
		return w.logged(begin, text)
	})
}
