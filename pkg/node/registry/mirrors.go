package registry

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	lru "github.com/hashicorp/golang-lru/v2/expirable"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"polymesh.dev/polymesh/pkg/imagestore"
)

const (
	// lookInterval is how often registries.yaml is looked at.
	lookInterval = 2 * time.Second
	// answerTimeout is how long a mirror may take until it begins to answer, probeTimeout how long a registry may when only its being there
	// matters.
	answerTimeout = 30 * time.Second
	probeTimeout  = 4 * time.Second
	maxRedirects  = 5
	// maxClients is the number of logins to repositories that are kept, and clientTime how long.
	maxClients = 256
	clientTime = 10 * time.Minute
	// maxFailures is how many failures `polymesh status` shows, and failureTime how long.
	maxFailures = 3
	failureTime = 10 * time.Minute
)

// mirrors asks what registries.yaml names.
type mirrors struct {
	opts Options
	log  *slog.Logger

	mu       sync.Mutex
	settings *settings
	seen     string // which file was read
	problem  string // why its present content is not used
	clients  *lru.LRU[string, *http.Client]
	failures []failure
}

// failure is that of an endpoint.
type failure struct {
	endpoint, why string
	at            time.Time
}

func newMirrors(o Options, log *slog.Logger) *mirrors {
	return &mirrors{opts: o, log: log, settings: &settings{}, clients: lru.NewLRU[string, *http.Client](maxClients, nil, clientTime)}
}

// watch reads the file again when it changes, until ctx ends; changed is called after that.
func (m *mirrors) watch(ctx context.Context, changed func() error) {
	ticker := time.NewTicker(lookInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		m.mu.Lock()
		same := m.seen == m.look()
		m.mu.Unlock()
		if same {
			continue
		}
		err := m.reload()
		if err == nil {
			m.log.Info("the settings of registries have changed", "file", m.opts.Registries)
			err = changed()
		}
		if err != nil {
			m.log.Error("the settings of registries are not used; the ones before stay", "err", err)
		}
	}
}

// look identifies the file's content.
func (m *mirrors) look() string {
	info, err := os.Stat(m.opts.Registries)
	if err != nil {
		return "none"
	}
	return fmt.Sprint(info.Size(), info.ModTime().UnixNano())
}

// reload reads the file. After an error the settings of before stay.
func (m *mirrors) reload() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.seen = m.look()
	s, err := readSettings(m.opts.Registries)
	if err != nil {
		m.problem = err.Error()
		return err
	}
	m.settings, m.problem, m.failures = s, "", nil
	m.clients.Purge()
	return nil
}

func (m *mirrors) current() *settings {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.settings
}

// names reports whether the file has mirrors of a registry.
func (m *mirrors) names(host string) bool {
	_, ok := m.current().mirrorOf(host)
	return ok
}

// closed are the registries that must not be asked themselves, as folders of containerd's settings.
func (m *mirrors) closed() (list []string) {
	if !m.opts.DisableDefaultEndpoint {
		return nil
	}
	for host := range m.current().mirrors {
		if host == every {
			host = "_default"
		}
		list = append(list, host)
	}
	return list
}

// notes is what the user should know.
func (m *mirrors) notes() (notes []string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.problem != "" {
		notes = append(notes, m.problem)
	}
	for _, f := range m.failures {
		if time.Since(f.at) < failureTime {
			notes = append(notes, f.endpoint+": "+f.why)
		}
	}
	return notes
}

// attempt is one endpoint for a request.
type attempt struct {
	endpoint endpoint
	path     string
}

// attempts are the endpoints for a request, in order. Without mirrors and settings, containerd asks the registry itself.
func (m *mirrors) attempts(s *settings, q request) (list []attempt) {
	own := defaultEndpoint(q.host)
	mirror, mirrored := s.mirrorOf(q.host)
	for _, e := range mirror.endpoints {
		if e != own {
			list = append(list, attempt{e, mirror.repository(q.path)})
		}
	}
	// The registry itself is last, and its repositories have their own names.
	if _, set := s.accessTo(own.url.Host); set && !(mirrored && m.opts.DisableDefaultEndpoint) {
		list = append(list, attempt{own, q.path})
	}
	return list
}

// serve answers with what a mirror has. It reports whether it has answered.
func (m *mirrors) serve(w http.ResponseWriter, h *http.Request, q request) bool {
	if q.host == imagestore.ShippedRegistry && !m.namesOnly(imagestore.ShippedRegistry) {
		return false
	}
	s := m.current()
	for _, a := range m.attempts(s, q) {
		begin := time.Now()
		answer, err := m.fetch(h, s, a, q)
		if err != nil {
			if h.Context().Err() != nil {
				return false
			}
			m.failed(a.endpoint, q, err)
			continue
		}
		m.worked(a.endpoint)
		m.log.Info("an image comes from a mirror", "image", q.name(), "endpoint", a.endpoint, "method", h.Method, "after", time.Since(begin).Round(time.Millisecond))
		defer answer.Body.Close()
		for _, key := range []string{"Content-Type", "Docker-Content-Digest"} {
			if v := answer.Header.Get(key); v != "" {
				w.Header().Set(key, v)
			}
		}
		if q.kind == blobs {
			passOn(w, q, answer, h.Method)
			return true
		}
		w.Header().Set("Content-Length", strconv.FormatInt(answer.ContentLength, 10))
		if h.Method == http.MethodGet {
			_, _ = io.Copy(w, answer.Body)
		}
		return true
	}
	return false
}

// passOn answers with another's answer.
func passOn(w http.ResponseWriter, q request, answer *http.Response, method string) {
	describe(w, q, ocispec.Descriptor{Digest: q.digest})
	w.Header().Set("Accept-Ranges", "bytes")
	if answer.ContentLength >= 0 {
		w.Header().Set("Content-Length", strconv.FormatInt(answer.ContentLength, 10))
	}
	if text := answer.Header.Get("Content-Range"); answer.StatusCode == http.StatusPartialContent {
		w.Header().Set("Content-Range", text)
	}
	w.WriteHeader(answer.StatusCode)
	if method == http.MethodHead {
		return
	}
	if _, err := io.Copy(w, answer.Body); err != nil {
		// Only a broken connection says that the answer is not complete; containerd goes on from where it was.
		panic(http.ErrAbortHandler)
	}
}

// namesOnly reports whether the file has mirrors of exactly this registry.
func (m *mirrors) namesOnly(host string) bool {
	_, ok := m.current().mirrors[host]
	return ok
}

// errNotThere is an endpoint's answer that it does not have an image.
var errNotThere = errors.New("it does not have the image")

// fetch asks an endpoint. A manifest is read and verified, so that the next endpoint can be asked if it is wrong.
func (m *mirrors) fetch(h *http.Request, s *settings, a attempt, q request) (*http.Response, error) {
	client, err := m.client(h.Context(), s, a)
	if err != nil {
		return nil, err
	}
	ask := func(method string) (*http.Response, error) {
		target := a.endpoint.url
		target.Path += "/" + a.path + "/" + string(q.kind) + "/" + q.ref()
		if q.host != target.Host {
			target.RawQuery = url.Values{"ns": {q.host}}.Encode()
		}
		out, err := http.NewRequestWithContext(h.Context(), method, target.String(), nil)
		if err != nil {
			return nil, err
		}
		if q.kind == manifests {
			out.Header["Accept"] = h.Header.Values("Accept")
		} else if q.span != "" {
			out.Header.Set("Range", q.span)
		}
		answer, err := client.Do(out)
		if err != nil {
			return nil, withoutURL(err)
		}
		switch answer.StatusCode {
		case http.StatusOK, http.StatusPartialContent:
			return answer, nil
		case http.StatusNotFound:
			err = errNotThere
		default:
			err = errors.New(answer.Status)
		}
		answer.Body.Close()
		return nil, err
	}
	if q.kind == blobs {
		return ask(h.Method)
	}
	answer, err := ask(h.Method)
	if err != nil {
		return nil, err
	}
	if sum := digest.Digest(answer.Header.Get("Docker-Content-Digest")); h.Method == http.MethodHead && sum.Validate() == nil && answer.ContentLength > 0 {
		if q.digest != "" && sum != q.digest {
			answer.Body.Close()
			return nil, fmt.Errorf("it answers with %s for %s", sum, q.digest)
		}
		return answer, nil
	}
	if h.Method == http.MethodHead {
		answer.Body.Close()
		if answer, err = ask(http.MethodGet); err != nil {
			return nil, err
		}
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(io.LimitReader(answer.Body, maxManifest+1))
	if err != nil {
		return nil, err
	}
	sum := digest.FromBytes(text)
	if q.digest != "" {
		sum = q.digest.Algorithm().FromBytes(text)
	}
	if len(text) > maxManifest || q.digest != "" && sum != q.digest {
		return nil, fmt.Errorf("it sends %d bytes with the digest %s for %s", len(text), sum, q.ref())
	}
	answer.Header.Set("Docker-Content-Digest", sum.String())
	answer.Body, answer.ContentLength = io.NopCloser(bytes.NewReader(text)), int64(len(text))
	return answer, nil
}

// client returns a client that is logged in for a repository at an endpoint.
func (m *mirrors) client(ctx context.Context, s *settings, a attempt) (*http.Client, error) {
	key := a.endpoint.String() + " " + a.path
	m.mu.Lock()
	known, ok := m.clients.Get(key)
	m.mu.Unlock()
	if ok {
		return known, nil
	}
	access, _ := s.accessTo(a.endpoint.url.Host)
	plain := &http.Transport{
		Proxy: http.ProxyFromEnvironment, DialContext: (&net.Dialer{Timeout: answerTimeout}).DialContext, TLSClientConfig: access.tls.Clone(),
		ForceAttemptHTTP2: true, TLSHandshakeTimeout: answerTimeout, ResponseHeaderTimeout: answerTimeout, IdleConnTimeout: time.Minute,
		MaxResponseHeaderBytes: 64 << 10, DisableCompression: true,
	}
	guarded := guard{a.endpoint, plain}
	var tr http.RoundTripper
	if a.endpoint.usual() {
		var options []name.Option
		if a.endpoint.url.Scheme == "http" {
			options = append(options, name.Insecure)
		}
		registry, err := name.NewRegistry(a.endpoint.url.Host, options...)
		if err != nil {
			return nil, err
		}
		ping, cancel := context.WithTimeout(ctx, answerTimeout)
		defer cancel()
		if tr, err = transport.NewWithContext(ping, registry, access.auth, guarded, []string{"repository:" + a.path + ":pull"}); err != nil {
			return nil, withoutURL(err)
		}
	} else {
		tr = basic{a.endpoint, access.auth, guarded}
	}
	client := &http.Client{Transport: tr, CheckRedirect: func(next *http.Request, before []*http.Request) error {
		switch {
		case len(before) > maxRedirects:
			return fmt.Errorf("more than %d redirects", maxRedirects)
		case before[0].URL.Scheme == "https" && next.URL.Scheme != "https":
			return errors.New("a redirect from https to " + next.URL.Scheme)
		}
		return nil
	}}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.settings == s {
		m.clients.Add(key, client)
	}
	return client, nil
}

// guard sends what is for the endpoint's host with the endpoint's scheme: go-containerregistry tries https first, and for private addresses
// http too. Nothing is sent without TLS that the user wants with it.
type guard struct {
	endpoint endpoint
	next     http.RoundTripper
}

func (g guard) RoundTrip(r *http.Request) (*http.Response, error) {
	scheme := g.endpoint.url.Scheme
	if r.URL.Scheme != "https" && scheme == "https" {
		return nil, fmt.Errorf("%s is not asked without TLS", r.URL.Host)
	}
	if r.URL.Host == g.endpoint.url.Host && r.URL.Scheme != scheme {
		r = r.Clone(r.Context())
		r.URL.Scheme = scheme
	}
	return g.next.RoundTrip(r)
}

// basic sends a user name and password to an endpoint with a path of its own, where nothing says how to log in.
type basic struct {
	endpoint endpoint
	auth     authn.Authenticator
	next     http.RoundTripper
}

func (b basic) RoundTrip(r *http.Request) (*http.Response, error) {
	c, err := b.auth.Authorization()
	if err != nil {
		return nil, err
	}
	if c.Username != "" && r.URL.Host == b.endpoint.url.Host {
		r = r.Clone(r.Context())
		r.SetBasicAuth(c.Username, c.Password)
	}
	return b.next.RoundTrip(r)
}

// withoutURL leaves the URL out of an error: one of a login or of a redirect may have a secret in its query.
func withoutURL(err error) error {
	var u *url.Error
	if errors.As(err, &u) {
		return u.Err
	}
	var answer *transport.Error
	if errors.As(err, &answer) {
		return fmt.Errorf("%d %s", answer.StatusCode, http.StatusText(answer.StatusCode))
	}
	return err
}

// failed notes an attempt that failed.
func (m *mirrors) failed(e endpoint, q request, err error) {
	if errors.Is(err, errNotThere) {
		m.log.Info("a mirror does not have an image", "image", q.name(), "endpoint", e)
		return
	}
	m.log.Warn("a mirror fails", "image", q.name(), "endpoint", e, "err", err)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.forget(e)
	m.failures = append(m.failures, failure{e.String(), fmt.Sprintf("%s (%s)", err, q.name()), time.Now()})
	if len(m.failures) > maxFailures {
		m.failures = m.failures[1:]
	}
}

// worked forgets an endpoint's failure.
func (m *mirrors) worked(e endpoint) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.forget(e)
}

func (m *mirrors) forget(e endpoint) {
	m.failures = slices.DeleteFunc(m.failures, func(f failure) bool { return f.endpoint == e.String() })
}

// unreachable says why a registry cannot be reached, as containerd would; empty if it answers anything. containerd reports the first
// host's answer when the last one gives none (Resolve in core/remotes/docker/resolver.go), so without this a name that does not resolve
// would be "not found".
func (m *mirrors) unreachable(ctx context.Context, host string) string {
	e := defaultEndpoint(host)
	if e.url.Scheme != "https" {
		return "" // containerd tries both schemes
	}
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, http.MethodHead, e.String()+"/", nil)
	if err != nil {
		return ""
	}
	tr := &http.Transport{Proxy: http.ProxyFromEnvironment, DialContext: (&net.Dialer{Timeout: probeTimeout - time.Second}).DialContext, DisableKeepAlives: true}
	answer, err := tr.RoundTrip(r)
	if err == nil {
		answer.Body.Close()
		return ""
	}
	return strings.TrimSpace(host + ": " + withoutURL(err).Error())
}
