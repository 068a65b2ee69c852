//go:build integration

package datastore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	clientv3 "go.etcd.io/etcd/client/v3"

	"polymesh.dev/polymesh/pkg/certificate"
	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/porttest"
)

// nobodyID is the user that runs the database servers.
const nobodyID = 65534

const password = "p4ss:w0rd"

// database is Debian's PostgreSQL or MariaDB on loopback, which accepts TLS only.
type database struct {
	t       *testing.T
	dir     string
	port    int
	ca      string
	command func(d *database) *exec.Cmd
	server  *exec.Cmd
	log     *os.File
}

// newDatabase prepares a folder with a server certificate. init creates the database.
func newDatabase(t *testing.T, init, command func(*database) *exec.Cmd) *database {
	t.Helper()
	// Not t.TempDir, which only root may enter.
	dir, err := os.MkdirTemp("", "polymesh-database-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	d := &database{t: t, dir: dir, port: int(porttest.Loopback(t).Port()), command: command}
	store := certificate.Store(t.TempDir())
	if _, err := certificate.Ensure(certificate.Options{
		Dir: string(store), NodeName: "db", NodeIP: netip.MustParseAddr("127.0.0.1"), ServiceIP: netip.MustParseAddr("10.43.0.1"), ClusterDomain: "cluster.local", Now: time.Now(),
	}); err != nil {
		t.Fatal(err)
	}
	d.ca = store.Cert(certificate.ServerCA)
	for from, to := range map[string]string{store.Cert(certificate.APIServer): "server.crt", store.Key(certificate.APIServer): "server.key"} {
		text, err := os.ReadFile(from)
		if err != nil {
			t.Fatal(err)
		}
		d.write(to, string(text))
	}
	if err := os.Chown(dir, nobodyID, nobodyID); err != nil {
		t.Fatal(err)
	}
	if out, err := d.asNobody(init(d)).CombinedOutput(); err != nil {
		t.Fatalf("create the database: %v: %s", err, out)
	}
	if d.log, err = os.Create(filepath.Join(dir, "log")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		d.kill()
		if t.Failed() {
			text, _ := os.ReadFile(d.log.Name())
			t.Logf("the database server says:\n%s", text)
		}
		d.log.Close()
	})
	return d
}

func (d *database) write(name, content string) {
	d.t.Helper()
	path := filepath.Join(d.dir, name)
	if err := errors.Join(os.WriteFile(path, []byte(content), 0o600), os.Chown(path, nobodyID, nobodyID)); err != nil {
		d.t.Fatal(err)
	}
}

func (d *database) asNobody(cmd *exec.Cmd) *exec.Cmd {
	cmd.Dir = d.dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobodyID, Gid: nobodyID}, Pdeathsig: syscall.SIGKILL}
	return cmd
}

func (d *database) start() {
	d.t.Helper()
	d.server = d.asNobody(d.command(d))
	d.server.Stdout, d.server.Stderr = d.log, d.log
	if err := d.server.Start(); err != nil {
		d.t.Fatal(err)
	}
}

// kill ends the server like a power failure of its machine. The processes of PostgreSQL that serve clients end by themselves when they
// notice it, and until then none can start on the data.
func (d *database) kill() {
	if d.server == nil {
		return
	}
	pid := d.server.Process.Pid
	_ = d.server.Process.Signal(syscall.SIGSTOP) // no more of them
	children, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	_ = d.server.Process.Kill()
	_ = d.server.Wait()
	d.server = nil
	for _, child := range strings.Fields(string(children)) {
		for runs(child) {
			time.Sleep(10 * time.Millisecond)
		}
	}
}

// runs reports whether a process has not ended, also if no one has waited for it.
func runs(pid string) bool {
	stat, err := os.ReadFile("/proc/" + pid + "/stat")
	_, state, found := strings.Cut(string(stat), ") ")
	return err == nil && found && !strings.HasPrefix(state, "Z") && !strings.HasPrefix(state, "X")
}

// newPostgres is PostgreSQL with the user app.
func newPostgres(t *testing.T) *database {
	t.Helper()
	found, err := filepath.Glob("/usr/lib/postgresql/*/bin/postgres")
	if err != nil || len(found) == 0 {
		t.Fatalf("PostgreSQL is missing (%v): apt-get install postgresql", err)
	}
	programs := filepath.Dir(found[len(found)-1])
	return newDatabase(t, func(d *database) *exec.Cmd {
		d.write("password", password)
		d.write("pg_hba.conf", "hostssl all all all scram-sha-256\n")
		return exec.Command(filepath.Join(programs, "initdb"), "-D", filepath.Join(d.dir, "data"), "--username=app", "--pwfile="+filepath.Join(d.dir, "password"),
			"--auth=scram-sha-256", "--encoding=UTF8", "--no-locale", "--no-sync")
	}, func(d *database) *exec.Cmd {
		args := []string{"-D", filepath.Join(d.dir, "data")}
		for _, setting := range []string{
			"listen_addresses=127.0.0.1", fmt.Sprintf("port=%d", d.port), "unix_socket_directories=", "ssl=on",
			"ssl_cert_file=" + filepath.Join(d.dir, "server.crt"), "ssl_key_file=" + filepath.Join(d.dir, "server.key"), "hba_file=" + filepath.Join(d.dir, "pg_hba.conf"),
		} {
			args = append(args, "-c", setting)
		}
		return exec.Command(filepath.Join(programs, "postgres"), args...)
	})
}

// mariadbVar is the folder with an unpacked MariaDB; the machine's own without it.
const mariadbVar = "POLYMESH_TEST_MARIADB"

// newMariaDB is MariaDB with the user app, without mariadb-install-db, which needs more packages.
func newMariaDB(t *testing.T) *database {
	t.Helper()
	root := os.Getenv(mariadbVar)
	program, share := filepath.Join(root, "/usr/sbin/mariadbd"), filepath.Join(root, "/usr/share/mysql")
	if _, err := os.Stat(program); err != nil {
		t.Fatalf("MariaDB is missing (%v): apt-get install mariadb-server-core, or name a folder with it in %s", err, mariadbVar)
	}
	mariadbd := func(d *database, args ...string) *exec.Cmd {
		cmd := exec.Command(program, append([]string{"--no-defaults", "--datadir=" + filepath.Join(d.dir, "data"), "--lc-messages-dir=" + share, "--character-sets-dir=" + filepath.Join(share, "charsets")}, args...)...)
		cmd.Env = append(os.Environ(), "LD_LIBRARY_PATH="+filepath.Join(root, "/usr/lib/x86_64-linux-gnu"))
		return cmd
	}
	return newDatabase(t, func(d *database) *exec.Cmd {
		if err := errors.Join(os.Mkdir(filepath.Join(d.dir, "data"), 0o700), os.Chown(filepath.Join(d.dir, "data"), nobodyID, nobodyID)); err != nil {
			t.Fatal(err)
		}
		script := bytes.NewBufferString("CREATE DATABASE mysql;\nUSE mysql;\n")
		for _, name := range []string{"mysql_system_tables.sql", "mysql_system_tables_data.sql"} {
			text, err := os.ReadFile(filepath.Join(share, name))
			if err != nil {
				t.Fatal(err)
			}
			script.Write(text)
		}
		fmt.Fprintf(script, "\nFLUSH PRIVILEGES;\nCREATE USER app@'%%' IDENTIFIED BY '%s' REQUIRE SSL;\nGRANT ALL ON *.* TO app@'%%';\n", password)
		cmd := mariadbd(d, "--bootstrap")
		cmd.Stdin = script
		return cmd
	}, func(d *database) *exec.Cmd {
		return mariadbd(d, "--bind-address=127.0.0.1", fmt.Sprintf("--port=%d", d.port), "--socket="+filepath.Join(d.dir, "socket"), "--skip-name-resolve",
			"--ssl-cert="+filepath.Join(d.dir, "server.crt"), "--ssl-key="+filepath.Join(d.dir, "server.key"))
	})
}

// logged collects what is logged.
type logged struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *logged) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// waitReady waits for a component's readiness, or for its error to contain a text.
func waitReady(t *testing.T, s Store, want string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		err := s.Ready(ctx)
		if want == "" && err == nil || want != "" && err != nil && strings.Contains(err.Error(), want) {
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatalf("the datastore is %v, want %q", err, want)
		}
	}
}

// A cluster's state lies in a real database: of several servers, through its failure, and with nothing acknowledged lost.
func TestSQL(t *testing.T) {
	for name, d := range map[string]struct {
		start    func(*testing.T) *database
		kind     config.DatastoreKind
		endpoint string
		place    string
		denied   string
	}{
		"PostgreSQL": {newPostgres, config.PostgreSQL, "app:%s@127.0.0.1:%d/cluster", "PostgreSQL at 127.0.0.1:", "password authentication failed"},
		"MariaDB":    {newMariaDB, config.MySQL, "app:%s@tcp(127.0.0.1:%d)/cluster", "MySQL at 127.0.0.1:", "Access denied"},
	} {
		t.Run(name, func(t *testing.T) {
			var log logged
			logrus.SetOutput(&log)
			defer logrus.SetOutput(os.Stderr)
			server := d.start(t)
			secret := password
			if d.kind == config.PostgreSQL {
				secret = strings.ReplaceAll(secret, ":", "%3A")
			}
			open := func(secret string) *SQL {
				s := NewSQL(SQLOptions{
					Database: config.Datastore{Kind: d.kind, Endpoint: config.Secret(fmt.Sprintf(d.endpoint, secret, server.port)), CAFile: server.ca},
					Socket:   filepath.Join(t.TempDir(), "kine.sock"), Log: slog.New(slog.NewTextHandler(&log, nil)),
				})
				if err := s.Init(t.Context()); err != nil {
					t.Fatal(err)
				}
				if err := s.Start(t.Context()); err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { stopStore(t, s) })
				return s
			}
			one := open(secret)
			waitReady(t, one, d.place)
			waitReady(t, one, "connection refused")
			server.start()
			waitReady(t, one, "")
			if !one.Endpoint().LeaderElect {
				t.Error("several servers can use the database, but elect no leader")
			}
			two := open(secret)
			waitReady(t, two, "")
			first, second := clientOf(t, one), clientOf(t, two)

			watch := second.Watch(t.Context(), "/registry/", clientv3.WithPrefix())
			revisions := map[string]int64{}
			for i := range 50 {
				key := fmt.Sprintf("/registry/a/%02d", i)
				revisions[key] = put(t, []*clientv3.Client{first, second}[i%2], key, key, 0)
			}
			complete(t, second, revisions)
			waitEvents(t, watch, len(revisions))

			server.kill()
			waitReady(t, one, d.place)
			server.start()
			waitReady(t, one, "")
			waitReady(t, two, "")
			complete(t, first, revisions)
			const after = "/registry/a/after"
			revisions[after] = put(t, first, after, after, 0)
			waitEvents(t, watch, 1)

			stopStore(t, one)
			three := open(secret)
			waitReady(t, three, "")
			complete(t, clientOf(t, three), revisions)

			wrong := open("wr0ng-p4ss")
			waitReady(t, wrong, d.denied)
			if err := wrong.Ready(t.Context()); strings.Contains(err.Error(), "wr0ng") {
				t.Errorf("the password is in the error: %v", err)
			}
			for _, secret := range []string{password, "p4ss", "wr0ng"} {
				if strings.Contains(log.String(), secret) {
					t.Errorf("%s is in the log:\n%s", secret, &log)
				}
			}
		})
	}
}

func stopStore(t *testing.T, s Store) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := s.Stop(ctx); err != nil {
		t.Error(err)
	}
}

func clientOf(t *testing.T, s Store) *clientv3.Client {
	t.Helper()
	client, err := s.Endpoint().Client()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	return client
}

// complete checks that every acknowledged write is there.
func complete(t *testing.T, client *clientv3.Client, revisions map[string]int64) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	list, err := client.Get(ctx, "/registry/a/", clientv3.WithPrefix())
	if err != nil {
		t.Fatal(err)
	}
	have := map[string]int64{}
	for _, kv := range list.Kvs {
		have[string(kv.Key)] = kv.ModRevision
	}
	for key, revision := range revisions {
		if have[key] != revision {
			t.Errorf("%s is at revision %d, want %d", key, have[key], revision)
		}
	}
}

// waitEvents waits for a watch to report so many changes.
func waitEvents(t *testing.T, watch clientv3.WatchChan, n int) {
	t.Helper()
	timeout := time.After(time.Minute)
	for n > 0 {
		select {
		case r, ok := <-watch:
			if !ok || r.Err() != nil {
				t.Fatalf("the watch has ended: %v", r.Err())
			}
			n -= len(r.Events)
		case <-timeout:
			t.Fatalf("%d changes are missing", n)
		}
	}
}
