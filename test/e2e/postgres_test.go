//go:build e2e

package e2e

import (
	"context"
	"crypto/rand"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"polymesh.dev/polymesh/test/e2e/node"
)

// nobodyID is the user and the group without permissions.
const nobodyID = 65534

// database is Debian's PostgreSQL in the outside world, at node.OutsideHost, which takes nothing but TLS.
type database struct {
	node     *node.Node
	ca       *authority
	dir      string
	programs string // the folder
	password string // of its user app
	server   *exec.Cmd
	log      *os.File
}

// startPostgres starts a database whose certificate has these names. It ends with the test.
func startPostgres(t *testing.T, n *node.Node, ca *authority, names ...string) *database {
	t.Helper()
	found, err := filepath.Glob("/usr/lib/postgresql/*/bin/postgres")
	if err != nil || len(found) == 0 {
		t.Fatalf("PostgreSQL is missing (%v): apt-get install postgresql", err)
	}
	// Below a folder that everyone can pass through, as t.TempDir is not.
	d := &database{node: n, ca: ca, dir: filepath.Join(n.Dir, "postgres"), programs: filepath.Dir(found[len(found)-1]), password: rand.Text()}
	if err := os.Mkdir(d.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(d.dir); err != nil {
			t.Error(err)
		}
	})
	if err := os.Chown(d.dir, nobodyID, nobodyID); err != nil {
		t.Fatal(err)
	}
	d.writeCertificate(t, names...)
	d.write(t, "password", d.password)
	d.write(t, "pg_hba.conf", "hostssl all all all scram-sha-256\n")
	initialize := d.command(t, "initdb", "--username=app", "--pwfile="+filepath.Join(d.dir, "password"),
		"--auth=scram-sha-256", "--encoding=UTF8", "--no-locale", "--no-sync")
	if out, err := initialize.CombinedOutput(); err != nil {
		t.Fatalf("initdb: %v: %s", err, out)
	}
	if d.log, err = os.Create(filepath.Join(d.dir, "log")); err != nil {
		t.Fatal(err)
	}
	d.start(t)
	t.Cleanup(func() {
		if d.server != nil {
			d.stop(t)
		}
		if t.Failed() {
			t.Logf("PostgreSQL logs:\n%s", d.said(t))
		}
		if err := d.log.Close(); err != nil {
			t.Error(err)
		}
	})
	return d
}

// start starts the server, which takes a moment to answer.
func (d *database) start(t *testing.T) {
	t.Helper()
	args := []string{}
	for _, setting := range []string{
		"listen_addresses=" + node.OutsideHost, "unix_socket_directories=", "ssl=on", "log_connections=on",
		"ssl_cert_file=" + filepath.Join(d.dir, "server.crt"), "ssl_key_file=" + filepath.Join(d.dir, "server.key"),
		"hba_file=" + filepath.Join(d.dir, "pg_hba.conf"),
	} {
		args = append(args, "-c", setting)
	}
	d.server = d.command(t, "postgres", args...)
	d.server.Stdout, d.server.Stderr = d.log, d.log
	if err := d.server.Start(); err != nil {
		t.Fatal(err)
	}
}

// stop ends the server. SIGINT is its "fast shutdown": clients are disconnected.
func (d *database) stop(t *testing.T) {
	t.Helper()
	d.signal(t, syscall.SIGINT)
	if err := d.server.Wait(); err != nil {
		t.Error(err)
	}
	d.server = nil
}

// certify gives the server a certificate with these names, which it shows to who connects from then on.
func (d *database) certify(t *testing.T, names ...string) {
	t.Helper()
	d.writeCertificate(t, names...)
	d.signal(t, syscall.SIGHUP)
}

func (d *database) signal(t *testing.T, signal os.Signal) {
	t.Helper()
	if err := d.server.Process.Signal(signal); err != nil {
		t.Error(err)
	}
}

// said is the server's log.
func (d *database) said(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile(d.log.Name())
	if err != nil {
		t.Error(err)
	}
	return string(text)
}

func (d *database) writeCertificate(t *testing.T, names ...string) {
	t.Helper()
	certificate, key := d.ca.issue(t, names...)
	d.write(t, "server.crt", string(certificate))
	d.write(t, "server.key", string(key))
}

// write writes a file of the server's own: PostgreSQL does not run as root, and its key must be its own.
func (d *database) write(t *testing.T, name, content string) {
	t.Helper()
	path := filepath.Join(d.dir, name)
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(path, nobodyID, nobodyID); err != nil {
		t.Fatal(err)
	}
}

// command is one of PostgreSQL's programs. It may run until the cleanup, after the test's own context.
func (d *database) command(t *testing.T, program string, args ...string) *exec.Cmd {
	id := fmt.Sprint(nobodyID)
	cmd := d.node.OutsideCommand(context.WithoutCancel(t.Context()), "setpriv", append([]string{
		"--reuid", id, "--regid", id, "--clear-groups", "--", filepath.Join(d.programs, program), "-D", filepath.Join(d.dir, "data")}, args...)...)
	cmd.Dir = d.dir
	return cmd
}
