// Package dashboard opens the page of the store of metrics, logs and traces (observe/page) in a browser of this machine.
//
// It owns the way there: a port on the loopback, for as long as the command runs, behind a guard that lets one user in; and the path of the
// API server by which the command reaches the store from another machine (Gateway). The store itself listens on a socket that only root
// can use. `polymesh dashboard` calls Run; pkg/server adds Gateway to the API server.
package dashboard

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"time"

	"k8s.io/client-go/rest"

	"polymesh.dev/polymesh/pkg/layout"
)

// Options are those of `polymesh dashboard`.
type Options struct {
	DataDir layout.DataDir
	// Local is set if the data dir is meant, and Remote if the cluster is. Without either, the cluster is where this machine has no store, or the
	// user may not use it.
	Local, Remote bool
	// Cluster returns the cluster of the command line.
	Cluster func(context.Context) (*rest.Config, error)
	// Program returns the file of the store's program.
	Program func() (string, error)
	// Address is one of the loopback; Port 0 is a free one.
	Address netip.Addr
	Port    uint16
	// Browser opens a browser, if this user has one.
	Browser bool
	// Out gets the address, Log what is worth knowing.
	Out, Log io.Writer
}

// Run serves the dashboard until ctx ends.
func Run(ctx context.Context, o Options) error {
	if !o.Address.IsLoopback() {
		return fmt.Errorf("--address %s is not one of this machine's loopback: from another machine, use `ssh -L`, or a kubeconfig there", o.Address)
	}
	s, err := open(ctx, o)
	if err != nil {
		return err
	}
	defer s.close()
	l, err := net.Listen("tcp", netip.AddrPortFrom(o.Address, o.Port).String())
	if err != nil {
		return fmt.Errorf("open the dashboard's port: %w", err)
	}
	port := l.Addr().(*net.TCPAddr).AddrPort().Port()
	g := newGuard(s.proxy(), port, ownerOf(os.Geteuid()))
	address := fmt.Sprintf("http://%s/#t=%s", netip.AddrPortFrom(o.Address, port), g.token)
	server := &http.Server{
		Handler: g, ConnContext: withConn, ReadHeaderTimeout: 10 * time.Second, MaxHeaderBytes: 64 << 10, IdleTimeout: 5 * time.Minute,
		ErrorLog: log.New(io.Discard, "", 0),
	}
	failed := make(chan error, 1)
	go func() { failed <- server.Serve(l) }()
	defer server.Close()
	fmt.Fprintln(o.Out, address)
	fmt.Fprintf(o.Log, "This shows %s. The address works once; Ctrl-C ends the dashboard.\n", s.what)
	if o.Browser && browsable() {
		if err := openBrowser(ctx, address); err != nil {
			fmt.Fprintln(o.Log, "No browser was opened:", err)
		}
	}
	select {
	case <-ctx.Done():
		return nil
	case err := <-failed:
		if errors.Is(err, http.ErrServerClosed) {
			return nil
		}
		return fmt.Errorf("serve the dashboard: %w", err)
	}
}

// openBrowser opens the user's browser. Other users can read the command line, but the guard does not let them in.
func openBrowser(ctx context.Context, address string) error {
	cmd := exec.CommandContext(ctx, "xdg-open", address)
	if err := cmd.Start(); err != nil {
		return err
	}
	go func() { _ = cmd.Wait() }()
	return nil
}
