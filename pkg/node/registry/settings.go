package registry

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"net/url"
	"os"
	"path"
	"regexp"
	"slices"
	"strings"

	"github.com/google/go-containerregistry/pkg/authn"
	"sigs.k8s.io/yaml"
)

// every is the name of all registries without an entry of their own.
const every = "*"

// dockerHub is Docker Hub's name in images, and hubHosts its others.
const dockerHub = "docker.io"

func hubHosts() []string { return []string{"registry-1.docker.io", "index.docker.io"} }

// file is registries.yaml, in K3s's form (https://docs.k3s.io/installation/private-registry).
type file struct {
	Mirrors map[string]mirrorEntry `json:"mirrors"`
	Configs map[string]configEntry `json:"configs"`
}

type mirrorEntry struct {
	Endpoints []string          `json:"endpoint"`
	Rewrites  map[string]string `json:"rewrite"`
}

type configEntry struct {
	Auth *authEntry `json:"auth"`
	TLS  *tlsEntry  `json:"tls"`
}

type authEntry struct {
	Username      string `json:"username"`
	Password      string `json:"password"`
	Auth          string `json:"auth"`
	IdentityToken string `json:"identity_token"`
}

type tlsEntry struct {
	CAFile             string `json:"ca_file"`
	CertFile           string `json:"cert_file"`
	KeyFile            string `json:"key_file"`
	InsecureSkipVerify bool   `json:"insecure_skip_verify"`
}

// settings are those of registries.yaml, checked.
type settings struct {
	mirrors map[string]mirror
	configs map[string]access
}

// mirror is what is asked in the place of a registry.
type mirror struct {
	endpoints []endpoint
	rewrites  []rewrite
}

// endpoint is the address of a registry's API: https://HOST/v2.
type endpoint struct{ url url.URL }

func (e endpoint) String() string { return e.url.String() }

// usual reports whether the API is where the specification has it.
func (e endpoint) usual() bool { return e.url.Path == "/v2" }

type rewrite struct {
	from *regexp.Regexp
	to   string
}

// access is how a host is talked to.
type access struct {
	auth authn.Authenticator
	tls  *tls.Config
}

// readSettings reads registries.yaml; a missing file has no settings.
func readSettings(path string) (*settings, error) {
	out := &settings{mirrors: map[string]mirror{}, configs: map[string]access{}}
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return out, nil
	}
	if err != nil {
		return nil, err
	}
	var f file
	if err := yaml.UnmarshalStrict(text, &f); err != nil {
		return nil, fmt.Errorf("read %s: %s", path, firstLine(err))
	}
	for name, m := range f.Mirrors {
		if err := checkRegistry(name); err != nil {
			return nil, fmt.Errorf("%s: mirrors: %w", path, err)
		}
		var parsed mirror
		for _, text := range m.Endpoints {
			e, err := parseEndpoint(text)
			if err != nil {
				return nil, fmt.Errorf("%s: mirrors: %s: %w", path, name, err)
			}
			if !slices.Contains(parsed.endpoints, e) {
				parsed.endpoints = append(parsed.endpoints, e)
			}
		}
		for _, from := range slices.Sorted(maps.Keys(m.Rewrites)) {
			exp, err := regexp.Compile(from)
			if err != nil {
				return nil, fmt.Errorf("%s: mirrors: %s: rewrite: %w", path, name, err)
			}
			parsed.rewrites = append(parsed.rewrites, rewrite{exp, m.Rewrites[from]})
		}
		out.mirrors[registryName(name)] = parsed
	}
	for name, c := range f.Configs {
		if err := checkRegistry(name); err != nil {
			return nil, fmt.Errorf("%s: configs: %w", path, err)
		}
		a := access{auth: authn.Anonymous}
		if c.Auth != nil {
			if a.auth, err = login(c.Auth.Username, c.Auth.Password, c.Auth.Auth, c.Auth.IdentityToken); err != nil {
				return nil, fmt.Errorf("%s: configs: %s: %w", path, name, err)
			}
		}
		if c.TLS != nil {
			if a.tls, err = trust(c.TLS.CAFile, c.TLS.CertFile, c.TLS.KeyFile, c.TLS.InsecureSkipVerify); err != nil {
				return nil, fmt.Errorf("%s: configs: %s: tls: %w", path, name, err)
			}
		}
		out.configs[registryName(name)] = a
	}
	return out, nil
}

// firstLine leaves out what a parser shows of the file: it may be a password.
func firstLine(err error) string {
	line, _, _ := strings.Cut(err.Error(), "\n")
	return line
}

// isHost matches what may be a registry's name, which is that of a folder too.
var isHost = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9.-]*(:[0-9]{1,5})?$`)

func checkRegistry(name string) error {
	if name == every {
		return nil
	}
	if len(name) > maxName || !isHost.MatchString(name) {
		return fmt.Errorf("%q is not the name of a registry: write HOST or HOST:PORT, or %q", name, every)
	}
	return nil
}

// registryName returns the name that images have.
func registryName(name string) string {
	if slices.Contains(hubHosts(), name) {
		return dockerHub
	}
	return name
}

// parseEndpoint reads an endpoint as K3s does: without a scheme it is https, but http for a port of localhost; a path other than /v2 is
// that of the API.
func parseEndpoint(text string) (endpoint, error) {
	full := text
	if !strings.Contains(text, "://") {
		host, _, _ := strings.Cut(text, "/")
		full = "https://" + text
		if name, port, err := net.SplitHostPort(host); err == nil && port != "443" && isLocalhost(name) {
			full = "http://" + text
		}
	}
	u, err := url.Parse(full)
	if err != nil {
		return endpoint{}, errors.New("an endpoint is not a URL") // the error has the text, which may have a password
	}
	if u.User != nil {
		return endpoint{}, fmt.Errorf("endpoint %s has a user: write it below configs", u.Redacted())
	}
	if u.Scheme != "https" && u.Scheme != "http" || u.Host == "" || u.RawQuery != "" || u.Fragment != "" {
		return endpoint{}, fmt.Errorf("endpoint %s is not https://HOST, with a port or path if it has one", (&url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path}).String())
	}
	if u.Path = path.Clean("/" + u.Path); u.Path == "/" {
		u.Path = "/v2"
	}
	return endpoint{url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path}}, nil
}

func isLocalhost(name string) bool {
	ip := net.ParseIP(name)
	return name == "localhost" || ip != nil && ip.IsLoopback()
}

// login returns the credentials of a config's auth.
func login(username, password, basic, token string) (authn.Authenticator, error) {
	if basic != "" && username == "" {
		text, err := base64.StdEncoding.DecodeString(basic)
		if err != nil {
			return nil, errors.New("auth: it is not base64 of USER:PASSWORD")
		}
		var ok bool
		if username, password, ok = strings.Cut(strings.TrimRight(string(text), "\x00"), ":"); !ok {
			return nil, errors.New("auth: it is not base64 of USER:PASSWORD")
		}
	}
	return authn.FromConfig(authn.AuthConfig{Username: username, Password: password, IdentityToken: token}), nil
}

// trust returns the settings of a config's tls.
func trust(ca, cert, key string, skip bool) (*tls.Config, error) {
	c := &tls.Config{MinVersion: tls.VersionTLS12, InsecureSkipVerify: skip} //nolint:gosec // the user's choice, as in K3s
	if ca != "" {
		text, err := os.ReadFile(ca)
		if err != nil {
			return nil, err
		}
		if c.RootCAs, err = x509.SystemCertPool(); err != nil {
			c.RootCAs = x509.NewCertPool()
		}
		if !c.RootCAs.AppendCertsFromPEM(text) {
			return nil, fmt.Errorf("%s has no certificate", ca)
		}
	}
	if (cert == "") != (key == "") {
		return nil, errors.New("cert_file and key_file need each other")
	}
	if cert != "" {
		pair, err := tls.LoadX509KeyPair(cert, key)
		if err != nil {
			return nil, err
		}
		c.Certificates = []tls.Certificate{pair}
	}
	return c, nil
}

// mirrorOf returns what is asked in the place of a registry.
func (s *settings) mirrorOf(host string) (mirror, bool) {
	if m, ok := s.mirrors[registryName(host)]; ok {
		return m, true
	}
	m, ok := s.mirrors[every]
	return m, ok
}

// accessTo returns how a host is talked to, and whether the file says so.
func (s *settings) accessTo(host string) (access, bool) {
	for _, name := range []string{host, registryName(host), every} {
		if a, ok := s.configs[name]; ok {
			return a, true
		}
	}
	return access{auth: authn.Anonymous}, false
}

// defaultEndpoint is the registry itself.
func defaultEndpoint(host string) endpoint {
	if registryName(host) == dockerHub {
		host = hubHosts()[0]
	}
	e := endpoint{url.URL{Scheme: "https", Host: host, Path: "/v2"}}
	if name, port, err := net.SplitHostPort(host); err == nil && port != "443" && isLocalhost(name) {
		e.url.Scheme = "http"
	}
	return e
}

// repository returns the repository's path at a mirror.
func (m mirror) repository(path string) string {
	for _, r := range m.rewrites {
		path = r.from.ReplaceAllString(path, r.to)
	}
	return path
}
