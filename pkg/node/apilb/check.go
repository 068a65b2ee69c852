package apilb

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/netip"
	"net/url"
	"os"
	"syscall"
)

// prober asks one server for /readyz. It keeps its connection: a handshake every two seconds from each node of a cluster would
// be a considerable part of the servers' work.
type prober struct {
	b      *Balancer
	url    string
	client *http.Client
}

func newProber(b *Balancer, addr netip.AddrPort) *prober {
	p := &prober{b: b, url: "https://" + addr.String() + "/readyz"}
	p.client = &http.Client{
		Transport: &http.Transport{DialTLSContext: p.dial, MaxIdleConns: 1, MaxResponseHeaderBytes: 64 << 10},
		// An API server does not redirect, and whatever answers in its place does not choose whom to ask.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return p
}

// silence is the error of a check without an answer: none at all, or not in time.
type silence struct{ error }

// local is the error of a check that this node could not make.
type local struct{ error }

// answered reports whether something answered the check that failed with err, even if only by refusing the connection.
func answered(err error) bool { return !errors.As(err, new(silence)) && !errors.As(err, new(local)) }

// check returns nil if the server is ready for this node.
func (p *prober) check(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, p.b.timeout)
	defer cancel()
	reused, err := p.ask(ctx)
	if err != nil && reused && ctx.Err() == nil {
		// The server has closed the connection meanwhile, or does not accept the certificate of that time any more.
		p.close()
		_, err = p.ask(ctx)
	}
	if err != nil {
		p.close()
	}
	var late net.Error
	switch {
	case err == nil:
		return nil
	case errors.Is(ctx.Err(), context.DeadlineExceeded), errors.As(err, &late) && late.Timeout():
		return silence{fmt.Errorf("no answer within %s", p.b.timeout)}
	case errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.ENETUNREACH):
		return silence{err}
	}
	return err
}

func (p *prober) ask(ctx context.Context) (reused bool, err error) {
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{GotConn: func(c httptrace.GotConnInfo) { reused = c.Reused }})
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, p.url, nil)
	if err != nil {
		return false, err
	}
	response, err := p.client.Do(request)
	if err != nil {
		return reused, plain(err)
	}
	defer response.Body.Close()
	// The body has to be read for the connection to be kept; what a server that is not ready says in it is long.
	if _, err := io.Copy(io.Discard, io.LimitReader(response.Body, 64<<10)); err != nil {
		return reused, plain(err)
	}
	switch response.StatusCode {
	case http.StatusOK:
		return reused, nil
	case http.StatusUnauthorized:
		return reused, errors.New("/readyz returned 401: it does not accept this node's certificate")
	}
	return reused, fmt.Errorf("/readyz returned %d", response.StatusCode)
}

// plain removes from an error what the list of servers contains already: the URL and the address.
func plain(err error) error {
	var op *net.OpError
	var request *url.Error
	switch {
	case errors.As(err, &op) && op.Err != nil:
		return op.Err
	case errors.As(err, &request):
		return request.Err
	}
	return err
}

// dial connects with the certificates as they are on disk now.
func (p *prober) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	config, err := p.b.tlsConfig()
	if err != nil {
		return nil, local{err}
	}
	return (&tls.Dialer{NetDialer: p.b.dialer(), Config: config}).DialContext(ctx, network, addr)
}

// tlsConfig returns the node's side of a connection to any API server.
func (b *Balancer) tlsConfig() (*tls.Config, error) {
	pem, err := os.ReadFile(b.opts.CA)
	if err != nil {
		return nil, fmt.Errorf("read the cluster's authority: %w", err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("read the cluster's authority: %s contains no certificate", b.opts.CA)
	}
	pair, err := tls.LoadX509KeyPair(b.opts.Cert, b.opts.Key)
	if err != nil {
		return nil, fmt.Errorf("read the node's certificate: %w", err)
	}
	return &tls.Config{
		RootCAs: roots, Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS12,
		// The name that clients check: they connect to the balancer's address, which each API server's certificate contains.
		ServerName: b.opts.Listen.Addr().String(),
	}, nil
}

func (p *prober) close() { p.client.CloseIdleConnections() }
