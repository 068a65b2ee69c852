// Package servers sends HTTP requests to the servers of one registry, in order until one responds: all have the same data.
//
// pkg/workflow/bridge/consul and pkg/workflow/bridge/eureka build the requests and parse the responses.
package servers

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
)

// maxAnswer is more than the response of a registry with ten thousand instances, in bytes.
const maxAnswer = 64 << 20

const maxRedirects = 3

// Servers are the servers of one registry.
type Servers struct {
	Client    *http.Client
	Addresses []*url.URL
	// Authorize adds the credentials for a server to a request.
	Authorize func(request *http.Request, server *url.URL)
}

// Request is a request to any server. The path is relative to the server's own and given in parts, each of which may
// contain any text. The body is JSON, or nil.
type Request struct {
	Method string
	Path   []string
	Query  string
	Body   []byte
}

// Reply is a server's response.
type Reply struct {
	Status int
	Header http.Header
	Body   []byte
}

// Text returns the server's reason, on one line, to be appended to an error.
func (r Reply) Text() string {
	text := strings.Join(strings.Fields(string(r.Body)), " ")
	if text == "" {
		return ""
	}
	return fmt.Sprintf(": %.300s", text)
}

// String lists the servers, without secrets.
func (s Servers) String() string {
	var list []string
	for _, server := range s.Addresses {
		shown := *server
		shown.User = nil
		list = append(list, shown.String())
	}
	return strings.Join(list, ",")
}

// Ask sends a request to the servers in order, until one responds.
func (s Servers) Ask(ctx context.Context, r Request) (Reply, error) {
	var failures []error
	for _, server := range s.Addresses {
		reply, err := s.AskOne(ctx, server, r)
		if err == nil {
			return reply, nil
		}
		failures = append(failures, err)
		if ctx.Err() != nil {
			break
		}
	}
	return Reply{}, errors.Join(failures...)
}

// sameServer follows redirects only within a server. The request and the credentials are for the configured address, not
// for one that a response names.
func sameServer(next *http.Request, before []*http.Request) error {
	if from := before[0].URL; next.URL.Scheme != from.Scheme || next.URL.Host != from.Host {
		return fmt.Errorf("it redirects to another server, %s://%s, which is not followed: if it is the right one, use its address instead", next.URL.Scheme, next.URL.Host)
	}
	if len(before) > maxRedirects {
		return fmt.Errorf("more than %d redirects", maxRedirects)
	}
	return nil
}

// AskOne sends a request to one server. A status of 500 or more is returned as an error: the registry could not answer.
func (s Servers) AskOne(ctx context.Context, server *url.URL, r Request) (Reply, error) {
	path := make([]string, len(r.Path))
	for i, part := range r.Path {
		path[i] = url.PathEscape(part)
	}
	u := server.JoinPath(path...)
	u.User, u.RawQuery = nil, r.Query
	request, err := http.NewRequestWithContext(ctx, r.Method, u.String(), bytes.NewReader(r.Body))
	if err != nil {
		return Reply{}, err
	}
	request.Header.Set("Accept", "application/json")
	if r.Body != nil {
		request.Header.Set("Content-Type", "application/json")
	}
	s.Authorize(request, server)
	client := *s.Client
	if client.CheckRedirect == nil {
		client.CheckRedirect = sameServer
	}
	response, err := client.Do(request)
	if err != nil {
		return Reply{}, err
	}
	defer response.Body.Close()
	reply := Reply{Status: response.StatusCode, Header: response.Header}
	if reply.Body, err = io.ReadAll(io.LimitReader(response.Body, maxAnswer+1)); err != nil {
		return Reply{}, fmt.Errorf("read the response of %s: %w", server.Redacted(), err)
	}
	if len(reply.Body) > maxAnswer {
		return Reply{}, fmt.Errorf("the response of %s has more than %d bytes", server.Redacted(), maxAnswer)
	}
	if reply.Status >= http.StatusInternalServerError {
		return Reply{}, fmt.Errorf("%s returned %d%s", server.Redacted(), reply.Status, reply.Text())
	}
	return reply, nil
}
