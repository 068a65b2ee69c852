// Package postgres runs Debian's PostgreSQL in the outside world of a node, at node.OutsideHost, for the end-to-end tests and the
// measurements. It takes nothing but TLS. It owns its folder and its processes, until Close.
package postgres

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"

	"polymesh.dev/polymesh/test/e2e/node"
)

// nobodyID is the user and the group without permissions.
const nobodyID = 65534

// Server is a database server.
type Server struct {
	// Password is that of its user app, the superuser.
	Password string

	node     *node.Node
	dir      string
	programs string // the folder
	process  *exec.Cmd
	log      *os.File
}

// New creates a database in the folder of a node. Certificate and key are PEM. The server does not run yet.
func New(ctx context.Context, n *node.Node, certificate, key []byte) (s *Server, err error) {
	found, err := filepath.Glob("/usr/lib/postgresql/*/bin/postgres")
	if err != nil || len(found) == 0 {
		return nil, errors.Join(errors.New("PostgreSQL is missing: apt-get install postgresql"), err)
	}
	// Below a folder that everyone can pass through, as that of a test is not.
	s = &Server{Password: rand.Text(), node: n, dir: filepath.Join(n.Dir, "postgres"), programs: filepath.Dir(found[len(found)-1])}
	if err := os.Mkdir(s.dir, 0o700); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	if err := os.Chown(s.dir, nobodyID, nobodyID); err != nil {
		return nil, err
	}
	for name, content := range map[string]string{
		"server.crt": string(certificate), "server.key": string(key),
		"password": s.Password, "pg_hba.conf": "hostssl all all all scram-sha-256\n",
	} {
		if err := s.write(name, content); err != nil {
			return nil, err
		}
	}
	initialize := s.command(ctx, "initdb", "--username=app", "--pwfile="+filepath.Join(s.dir, "password"),
		"--auth=scram-sha-256", "--encoding=UTF8", "--no-locale", "--no-sync")
	if out, err := initialize.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("initdb: %w: %s", err, out)
	}
	s.log, err = os.Create(filepath.Join(s.dir, "log"))
	return s, err
}

// Start starts the server, which takes a moment to answer.
func (s *Server) Start() error {
	args := []string{}
	for _, setting := range []string{
		"listen_addresses=" + node.OutsideHost, "unix_socket_directories=", "ssl=on", "log_connections=on",
		"ssl_cert_file=" + filepath.Join(s.dir, "server.crt"), "ssl_key_file=" + filepath.Join(s.dir, "server.key"),
		"hba_file=" + filepath.Join(s.dir, "pg_hba.conf"),
	} {
		args = append(args, "-c", setting)
	}
	// It may run until the cleanup, after the context of a test.
	process := s.command(context.Background(), "postgres", args...)
	process.Stdout, process.Stderr = s.log, s.log
	if err := process.Start(); err != nil {
		return err
	}
	s.process = process
	return nil
}

// Stop ends a running server. SIGINT is its "fast shutdown": it disconnects its clients.
func (s *Server) Stop() error {
	if s.process == nil {
		return nil
	}
	if err := s.Signal(syscall.SIGINT); err != nil {
		return err
	}
	err := s.process.Wait()
	s.process = nil
	return err
}

// Close ends the server and removes the database.
func (s *Server) Close() error {
	err := s.Stop()
	if s.log != nil {
		err = errors.Join(err, s.log.Close())
	}
	return errors.Join(err, os.RemoveAll(s.dir))
}

// Certify replaces the certificate, which the server shows to who connects from then on.
func (s *Server) Certify(certificate, key []byte) error {
	if err := errors.Join(s.write("server.crt", string(certificate)), s.write("server.key", string(key))); err != nil {
		return err
	}
	return s.Signal(syscall.SIGHUP)
}

// Signal sends a signal to the running server.
func (s *Server) Signal(signal os.Signal) error { return s.process.Process.Signal(signal) }

// PID returns the process id of the running server, whose children are the database's other processes.
func (s *Server) PID() int { return s.process.Process.Pid }

// Data returns the folder of the database.
func (s *Server) Data() string { return filepath.Join(s.dir, "data") }

// Log returns the server's log.
func (s *Server) Log() (string, error) {
	text, err := os.ReadFile(s.log.Name())
	return string(text), err
}

// write writes a file of the server's own: PostgreSQL does not run as root, and its key must be its own.
func (s *Server) write(name, content string) error {
	path := filepath.Join(s.dir, name)
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		return err
	}
	return os.Chown(path, nobodyID, nobodyID)
}

func (s *Server) command(ctx context.Context, program string, args ...string) *exec.Cmd {
	id := fmt.Sprint(nobodyID)
	cmd := s.node.OutsideCommand(ctx, "setpriv", append([]string{
		"--reuid", id, "--regid", id, "--clear-groups", "--", filepath.Join(s.programs, program), "-D", s.Data()}, args...)...)
	cmd.Dir = s.dir
	return cmd
}
