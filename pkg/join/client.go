package join

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"slices"
	"time"

	"polymesh.dev/polymesh/pkg/token"
)

const (
	// requestTimeout is how long one try may take; retryInterval is the time between two.
	requestTimeout = 15 * time.Second
	retryInterval  = 2 * time.Second
	// settling is the default of Machine.Settling.
	settling = 8 * time.Second
	// maxAnswer is the limit of a server's answer, in bytes.
	maxAnswer = 1 << 20
)

// withToken sends a request with the token until a server answers.
func (m Machine) withToken(ctx context.Context, path string, r Request, answer any) error {
	hc := &http.Client{Timeout: requestTimeout, CheckRedirect: noRedirect, Transport: &http.Transport{TLSClientConfig: pinned(m.Token.CAHash, m.Server, m.now), DisableKeepAlives: true}}
	err := m.retry(ctx, func() error {
		r.Now = m.now()
		return call(ctx, hc, http.MethodPost, m.Server+path, m.Token.Bearer(), r, answer)
	})
	if unauthorized(err) {
		return fmt.Errorf("the cluster does not accept token %s, which has expired or was revoked: `polymesh token create%s` on a server makes another", m.Token.ID, map[bool]string{true: " --role server"}[path == ServerPath])
	}
	return err
}

// unauthorized reports whether the API server does not accept who asks.
func unauthorized(err error) bool {
	var refusal *Refusal
	return errors.As(err, &refusal) && refusal.Status == http.StatusUnauthorized
}

// retry calls a server until it answers.
func (m Machine) retry(ctx context.Context, try func() error) error {
	begin := time.Now()
	for last := ""; ; {
		err := try()
		var refusal *Refusal
		var other *otherServerError
		hint, settle := "", cmp.Or(m.Settling, settling)
		switch {
		case err == nil:
			return nil
		// A server that has just started knows neither tokens nor roles for a moment.
		case errors.As(err, &refusal) && slices.Contains([]int{http.StatusUnauthorized, http.StatusForbidden, http.StatusNotFound}, refusal.Status) && time.Since(begin) < settle:
			hint = fmt.Sprintf(" (tried again for %s, because a server that has just started accepts no token for a moment)", settle)
		case errors.As(err, &refusal) && refusal.Status < 500 && refusal.Status != http.StatusTooManyRequests, errors.As(err, &other):
			return err
		case ctx.Err() != nil:
			return fmt.Errorf("join by %s: %w", m.Server, err)
		}
		if text := err.Error() + hint; text != last {
			m.Log.Info("waiting for a server", "server", m.Server, "err", text)
			m.Waiting(text)
			last = text
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("join by %s: %w", m.Server, err)
		case <-time.After(retryInterval):
		}
	}
}

// call sends JSON and reads JSON. An answer other than 200 is a Refusal.
func call(ctx context.Context, client *http.Client, method, url, bearer string, body, answer any) error {
	var text []byte
	if body != nil {
		var err error
		if text, err = json.Marshal(body); err != nil {
			return err
		}
	}
	req, err := http.NewRequestWithContext(ctx, method, url, bytes.NewReader(text))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	if bearer != "" {
		req.Header.Set("Authorization", "Bearer "+bearer)
	}
	resp, err := client.Do(req)
	if err != nil {
		return reason(err)
	}
	defer resp.Body.Close()
	got, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		refusal := &Refusal{Status: resp.StatusCode}
		refusal.at, _ = http.ParseTime(resp.Header.Get("Date"))
		// The API server's own answers are a Status, which has a message too.
		if json.Unmarshal(got, refusal) != nil || refusal.Message == "" {
			refusal.Message = fmt.Sprintf("the server answered %s", resp.Status)
		}
		return refusal
	}
	return json.Unmarshal(got, answer)
}

// noRedirect: a token is for one server.
func noRedirect(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }

// reason removes the URL from net/http's errors: the log line has it.
func reason(err error) error {
	var wrapped *url.Error
	if errors.As(err, &wrapped) {
		return wrapped.Err
	}
	return err
}

// otherServerError means that the server is not one of the token's cluster.
type otherServerError struct{ message string }

func (e *otherServerError) Error() string { return e.message }

// pinned accepts a server whose chain contains the authority with the hash, and whose certificate is for the host.
func pinned(hash, server string, now func() time.Time) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS12,
		// The standard check needs the authority beforehand; this one takes it from the handshake. Nothing is sent before it.
		InsecureSkipVerify: true,
		VerifyConnection: func(state tls.ConnectionState) error {
			chain := state.PeerCertificates
			roots := x509.NewCertPool()
			found := false
			for _, c := range chain[1:] {
				if c.IsCA && token.Hash(c) == hash {
					roots.AddCert(c)
					found = true
				}
			}
			if !found {
				return &otherServerError{fmt.Sprintf("%s is not a server of the token's cluster: none of its certificates is the authority with the hash %.12s…: check --server and the token, and what is between this machine and the server", server, hash)}
			}
			u, err := url.Parse(server)
			if err != nil {
				return err
			}
			_, err = chain[0].Verify(x509.VerifyOptions{Roots: roots, DNSName: u.Hostname(), CurrentTime: now(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}})
			var invalid x509.CertificateInvalidError
			var host x509.HostnameError
			switch {
			case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
				return &otherServerError{fmt.Sprintf("this machine's clock shows %s, but the server's certificate is valid from %s to %s: set the clock",
					now().UTC().Format(time.DateTime), chain[0].NotBefore.UTC().Format(time.DateTime), chain[0].NotAfter.UTC().Format(time.DateTime))}
			case errors.As(err, &host):
				return &otherServerError{fmt.Sprintf("the server's certificate is not for %s: start the servers with --tls-san %s, or join by another of their addresses", u.Hostname(), u.Hostname())}
			case err != nil:
				return &otherServerError{err.Error()}
			}
			return nil
		},
	}
}

// client is one that authenticates as the node.
func client(f Files) (*http.Client, error) { return clientWith(f.ServerCA, f.Client, f.Client) }

func clientWith(caFile, certFile, keyFile string) (*http.Client, error) {
	identity, err := identityOf(caFile, certFile, keyFile)
	if err != nil {
		return nil, err
	}
	return clientAs(identity), nil
}

// identityOf authenticates with a certificate to servers that the authority in a file has certified, and to no others.
func identityOf(caFile, certFile, keyFile string) (*tls.Config, error) {
	ca, err := os.ReadFile(caFile)
	if err != nil {
		return nil, err
	}
	pair, err := tls.LoadX509KeyPair(certFile, keyFile)
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	return &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: roots, Certificates: []tls.Certificate{pair}}, nil
}

func clientAs(identity *tls.Config) *http.Client {
	const dial = 3 * time.Second
	return &http.Client{Timeout: requestTimeout, CheckRedirect: noRedirect, Transport: &http.Transport{
		DialContext: (&net.Dialer{Timeout: dial}).DialContext, TLSHandshakeTimeout: dial, DisableKeepAlives: true,
		TLSClientConfig: identity,
	}}
}
