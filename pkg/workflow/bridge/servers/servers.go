// Package servers asks the servers of one registry by HTTP, in their order until one answers: they all know the same.
//
// pkg/workflow/bridge/consul and pkg/workflow/bridge/eureka say what is asked and read what is answered.
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

// maxAnswer is more than a registry of ten thousand instances sends, in bytes.
const maxAnswer = 64 << 20

const maxRedirects = 3

// Servers are those of one registry.
type Servers struct {
	Client    *http.Client
	Addresses []*url.URL
	// Authorize puts the credentials for a server into a request.
	Authorize func(request *http.Request, server *url.URL)
}

// Request is what is asked. The path is below a server's own, part by part: a part may hold anything. The body is JSON, or nil.
type Request struct {
	Method string
	Path   []string
	Query  string
	Body   []byte
}

// Reply is what a server has said.
type Reply struct {
	Status int
	Header http.Header
	Body   []byte
}

// Text is the reason that a server gives, in one line, to be put behind an error.
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

// Ask asks the servers in their order, until one answers.
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

// sameServer follows redirects within a server. What is asked, and the credentials, are for the address that was named, and not
// for another one that an answer names.
func sameServer(next *http.Request, before []*http.Request) error {
	if from := before[0].URL; next.URL.Scheme != from.Scheme || next.URL.Host != from.Host {
		return fmt.Errorf("it redirects to another server, %s://%s, which is not asked: if that is right, name it in place of this one", next.URL.Scheme, next.URL.Host)
	}
	if len(before) > maxRedirects {
		return fmt.Errorf("it redirects more than %d times", maxRedirects)
	}
	return nil
}

// AskOne asks one server. An answer of 500 and more is none, but an error: a registry says so when it does not know.
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
		return Reply{}, fmt.Errorf("read the answer of %s: %w", server.Redacted(), err)
	}
	if len(reply.Body) > maxAnswer {
		return Reply{}, fmt.Errorf("the answer of %s has more than %d bytes", server.Redacted(), maxAnswer)
	}
	if reply.Status >= http.StatusInternalServerError {
		return Reply{}, fmt.Errorf("%s answers %d%s", server.Redacted(), reply.Status, reply.Text())
	}
	return reply, nil
}
