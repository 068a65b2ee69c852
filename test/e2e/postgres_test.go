//go:build e2e

package e2e

import (
	"os"
	"testing"

	"polymesh.dev/polymesh/test/e2e/node"
	"polymesh.dev/polymesh/test/e2e/postgres"
)

// database is PostgreSQL in the outside world, with the tests' failures.
type database struct {
	*postgres.Server
	ca       *authority
	password string // of its user app
}

// startPostgres starts a database whose certificate has these names. It ends with the test.
func startPostgres(t *testing.T, n *node.Node, ca *authority, names ...string) *database {
	t.Helper()
	certificate, key := ca.issue(t, names...)
	server, err := postgres.New(t.Context(), n, certificate, key)
	if err != nil {
		t.Fatal(err)
	}
	d := &database{Server: server, ca: ca, password: server.Password}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("PostgreSQL logs:\n%s", d.serverLog(t))
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	d.start(t)
	return d
}

// start starts the server, which takes a moment to answer.
func (d *database) start(t *testing.T) {
	t.Helper()
	if err := d.Start(); err != nil {
		t.Fatal(err)
	}
}

// stop ends the server: clients are disconnected.
func (d *database) stop(t *testing.T) {
	t.Helper()
	if err := d.Stop(); err != nil {
		t.Error(err)
	}
}

// certify gives the server a certificate with these names, which it shows to who connects from then on.
func (d *database) certify(t *testing.T, names ...string) {
	t.Helper()
	certificate, key := d.ca.issue(t, names...)
	if err := d.Certify(certificate, key); err != nil {
		t.Error(err)
	}
}

func (d *database) signal(t *testing.T, signal os.Signal) {
	t.Helper()
	if err := d.Signal(signal); err != nil {
		t.Error(err)
	}
}

// serverLog returns the server's log.
func (d *database) serverLog(t *testing.T) string {
	t.Helper()
	text, err := d.Log()
	if err != nil {
		t.Error(err)
	}
	return text
}
