package route

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"time"

	"polymesh.dev/polymesh/pkg/config"
	"polymesh.dev/polymesh/pkg/layout"
)

// Node is a node, and the API server that it uses.
type Node struct {
	// Server is https://HOST:PORT.
	Server string
	// CA is the file with the authority of the API servers; Cert and Key are the node's client certificate and key.
	CA, Cert, Key string
}

const askTimeout = 10 * time.Second

// ErrNone means that the cluster has no store, or that its servers have an earlier version.
var ErrNone = errors.New("the cluster has no store of metrics, logs and traces")

// Ask returns the name of the server that has the store. The error is ErrNone if there is none.
func Ask(ctx context.Context, n Node) (server string, err error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	ca, err := os.ReadFile(n.CA)
	if err != nil {
		return "", fmt.Errorf("read the authority of the API servers: %w", err)
	}
	pair, err := tls.LoadX509KeyPair(n.Cert, n.Key)
	if err != nil {
		return "", fmt.Errorf("read the node's certificate: %w", err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	client := &http.Client{
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Transport: &http.Transport{
			DialContext: dialer.DialContext, TLSHandshakeTimeout: dialTimeout, DisableKeepAlives: true,
			TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: roots, Certificates: []tls.Certificate{pair}},
		},
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, n.Server+layout.ObserveIngestPath, nil)
	if err != nil {
		return "", err
	}
	response, err := client.Do(request)
	if err != nil {
		var wrapped *url.Error
		if errors.As(err, &wrapped) {
			err = wrapped.Err
		}
		return "", fmt.Errorf("ask for the store: %w", err)
	}
	defer response.Body.Close()
	const maxAnswer = 4 << 10
	text, err := io.ReadAll(io.LimitReader(response.Body, maxAnswer))
	if err != nil {
		return "", fmt.Errorf("ask for the store: %w", err)
	}
	switch response.StatusCode {
	case http.StatusOK:
		var w Where
		if err := json.Unmarshal(text, &w); err != nil || !config.ValidNodeName(w.Server) {
			return "", errors.New("ask for the store: the answer is not one of a server of this version")
		}
		return w.Server, nil
	// A server without a store gives nodes no permission, and an earlier one does not know the path.
	case http.StatusNotFound, http.StatusForbidden:
		return "", ErrNone
	}
	return "", fmt.Errorf("ask for the store: the answer is %s", response.Status)
}
