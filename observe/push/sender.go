package push

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"polymesh.dev/polymesh/observe/wire"
)

const (
	// pushBytes is how many bytes of chunks a push has, unless a single chunk is larger.
	pushBytes = 1 << 20
	// pushPause is the time between two pushes while there is little to send.
	pushPause = 2 * time.Second
	// retryMin and retryMax bound the pause after a failed push; absentPause is the pause if the cluster has no store.
	retryMin, retryMax = time.Second, 20 * time.Second
	absentPause        = time.Minute
	// pushTimeout is how long one push may take, dialTimeout its connection.
	pushTimeout = 45 * time.Second
	dialTimeout = 5 * time.Second
	// maxAnswer is how much is read of an answer.
	maxAnswer = 4 << 10
)

// SenderOptions are the options of a Sender.
type SenderOptions struct {
	// URL is where chunks are posted: an API server's, through the node's load balancer.
	URL string
	// CA is the file with the authority of the API servers' certificates, Cert and Key are the node's own. They are read again when a connection fails.
	CA, Cert, Key string
	Buffer        *Buffer
	Log           *slog.Logger
}

// Sender posts the chunks of a buffer.
type Sender struct {
	opts SenderOptions

	mu      sync.Mutex
	pushed  time.Time
	problem string
}

// NewSender returns a Sender that does not send yet.
func NewSender(o SenderOptions) *Sender {
	return &Sender{opts: o}
}

// Problem says why pushes fail.
func (s *Sender) Problem() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.problem
}

// Numbers returns when the store last accepted something, in milliseconds since 1970; 0 for never.
func (s *Sender) Numbers() map[string]int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.pushed.IsZero() {
		return map[string]int64{"pushed": 0}
	}
	return map[string]int64{"pushed": s.pushed.UnixMilli()}
}

// report records the result of a push.
func (s *Sender) report(err error) {
	text := ""
	if err != nil {
		text = err.Error()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case err == nil:
		s.pushed = time.Now()
		if s.problem != "" {
			s.opts.Log.Info("the store accepts again what this node sends")
		}
	case text != s.problem:
		s.opts.Log.Warn("the store does not get what this node sends", "err", err)
	}
	s.problem = text
}

// Run sends until ctx ends.
func (s *Sender) Run(ctx context.Context) error {
	var client *http.Client
	defer func() {
		if client != nil {
			client.CloseIdleConnections()
		}
	}()
	retry := retryMin
	for ctx.Err() == nil {
		b, err := s.opts.Buffer.next(pushBytes)
		if err == nil && b == nil {
			select {
			case <-s.opts.Buffer.more:
				continue
			case <-ctx.Done():
				return nil
			}
		}
		if err == nil && client == nil {
			client, err = s.client()
		}
		var answer wire.Answer
		pause := time.Duration(0)
		if err == nil {
			answer, pause, err = s.post(ctx, client, b)
		}
		if ctx.Err() != nil {
			return nil
		}
		s.report(err)
		if err != nil {
			// With the current certificates, to the server that the load balancer chooses now.
			if client != nil {
				client.CloseIdleConnections()
				client = nil
			}
			// Not all nodes should retry at the same moment.
			pause = max(pause, retry/2+rand.N(retry))
			retry = min(2*retry, retryMax)
		} else {
			retry = retryMin
			before := s.opts.Buffer.progress()
			s.opts.Buffer.answered(b, answer)
			switch {
			case pause > 0:
			case answer.Missing && s.opts.Buffer.progress() != before:
			case answer.Missing || answer.Position < b.header.First:
				pause = retryMin // nothing was accepted
			case len(b.chunks) < pushBytes/2:
				pause = pushPause
			}
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
		}
	}
	return nil
}

// progress returns up to where the store has the chunks.
func (b *Buffer) progress() place {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.sent
}

// client returns one that authenticates as the node.
func (s *Sender) client() (*http.Client, error) {
	ca, err := os.ReadFile(s.opts.CA)
	if err != nil {
		return nil, fmt.Errorf("read the authority of the API servers: %w", err)
	}
	pair, err := tls.LoadX509KeyPair(s.opts.Cert, s.opts.Key)
	if err != nil {
		return nil, fmt.Errorf("read the node's certificate: %w", err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(ca) {
		return nil, fmt.Errorf("%s has no certificate", s.opts.CA)
	}
	return &http.Client{
		Timeout:       pushTimeout,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		// Without the environment's proxies: the address is on this machine.
		Transport: &http.Transport{
			DialContext: (&net.Dialer{Timeout: dialTimeout}).DialContext, TLSHandshakeTimeout: dialTimeout, MaxIdleConnsPerHost: 1, IdleConnTimeout: 2 * time.Minute,
			MaxResponseHeaderBytes: 64 << 10, DisableCompression: true,
			TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: roots, Certificates: []tls.Certificate{pair}},
		},
	}, nil
}

// post sends a batch. pause is what the server asks for, also after an error.
func (s *Sender) post(ctx context.Context, client *http.Client, b *batch) (a wire.Answer, pause time.Duration, err error) {
	body, err := wire.AppendHeader(make([]byte, 0, wire.MaxHeader+len(b.chunks)), b.header)
	if err != nil {
		return a, 0, err
	}
	body = append(body, b.chunks...)
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, s.opts.URL, bytes.NewReader(body))
	if err != nil {
		return a, 0, fmt.Errorf("send to the store: %w", err)
	}
	r.Header.Set("Content-Type", "application/vnd.polymesh.observe")
	resp, err := client.Do(r)
	var wrapped *url.Error
	if errors.As(err, &wrapped) {
		err = wrapped.Err
	}
	if err != nil {
		return a, 0, fmt.Errorf("send to the store: %w", err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return a, 0, fmt.Errorf("read the store's answer: %w", err)
	}
	if seconds, err := strconv.Atoi(resp.Header.Get("Retry-After")); err == nil && seconds > 0 {
		pause = min(time.Duration(seconds)*time.Second, retryMax)
	}
	switch resp.StatusCode {
	case http.StatusOK:
		if err := json.Unmarshal(text, &a); err != nil {
			return a, pause, fmt.Errorf("read the store's answer: %w", err)
		}
		return a, pause, nil
	case http.StatusNotFound:
		pause = max(pause, absentPause)
	}
	return a, pause, fmt.Errorf("the store's answer is %s: %.300q", resp.Status, strings.TrimSpace(string(text)))
}
