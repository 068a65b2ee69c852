// Package registries makes the registry of a bridge from what a user gives: addresses, files with secrets, certificates.
//
// It owns where secrets come from: files and the environment, never an argument. `polymesh bridge run` calls it.
package registries

import (
	"cmp"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"os"
	"slices"
	"strings"
	"time"

	"polymesh.dev/polymesh/pkg/workflow/bridge"
	"polymesh.dev/polymesh/pkg/workflow/bridge/consul"
	"polymesh.dev/polymesh/pkg/workflow/bridge/dns"
	"polymesh.dev/polymesh/pkg/workflow/bridge/eureka"
)

// Options say which registry, one of Eureka, Consul and DNS, and how it is reached.
type Options struct {
	// Eureka and Consul are addresses of one registry, the first that answers is asked. DNS are services: SERVICE=NAME with SRV
	// records, or SERVICE=NAME:PORT.
	Eureka, Consul, DNS []string
	// DNSServer is asked instead of this machine's name servers.
	DNSServer string
	// User and PasswordFile are for Eureka, TokenFile is for Consul.
	User, PasswordFile, TokenFile string
	// CAFile, ClientCert and ClientKey are files in PEM for TLS.
	CAFile, ClientCert, ClientKey string
	// Interval is how often the bridge asks.
	Interval time.Duration
}

// New connects to the registry that the options name, and returns its kind as well: eureka, consul or dns.
func New(o Options) (registry bridge.Registry, kind string, err error) {
	if slices.ContainsFunc(o.Eureka, hasPassword) {
		return nil, "", errors.New("command-line arguments are visible to all local users: use --user and --password-file for the password, or POLYMESH_BRIDGE_EUREKA for the complete address")
	}
	if text := os.Getenv("POLYMESH_BRIDGE_EUREKA"); text != "" && len(o.Eureka) == 0 && len(o.Consul) == 0 && len(o.DNS) == 0 {
		o.Eureka = strings.Split(text, ",")
	}
	named := 0
	for _, addresses := range [][]string{o.Eureka, o.Consul, o.DNS} {
		named += min(len(addresses), 1)
	}
	switch {
	case named > 1:
		return nil, "", errors.New("a bridge has one registry: run one for each of --eureka, --consul and --dns")
	case o.TokenFile != "" && len(o.Consul) == 0:
		return nil, "", errors.New("--token-file is for --consul: Eureka uses --user and --password-file")
	case (o.User != "" || o.PasswordFile != "") && len(o.Eureka) == 0:
		return nil, "", errors.New("--user and --password-file are for --eureka: Consul uses --token-file")
	case len(o.Consul) > 0:
		token, err := o.token()
		if err != nil {
			return nil, "", err
		}
		client, err := o.client()
		if err != nil {
			return nil, "", err
		}
		registry, err = consul.New(client, o.Consul, token, o.Interval)
		return registry, "consul", err
	case len(o.Eureka) > 0:
		password, err := o.password()
		if err != nil {
			return nil, "", err
		}
		client, err := o.client()
		if err != nil {
			return nil, "", err
		}
		registry, err = eureka.New(client, o.Eureka, o.User, password)
		return registry, "eureka", err
	case len(o.DNS) > 0:
		registry, err = dns.New(o.DNS, o.DNSServer)
		return registry, "dns", err
	}
	return nil, "", errors.New("no registry is specified: use --eureka http://HOST:8761/eureka/, --consul http://HOST:8500, or --dns SERVICE=NAME")
}

// hasPassword reports whether an address has one, also one that is otherwise not well-formed.
func hasPassword(address string) bool {
	_, rest, _ := strings.Cut(address, "://")
	authority, _, _ := strings.Cut(rest, "/")
	return strings.Contains(authority, "@")
}

func (o *Options) password() (string, error) {
	if o.PasswordFile == "" {
		return os.Getenv("POLYMESH_BRIDGE_PASSWORD"), nil
	}
	return readSecret("password", o.PasswordFile)
}

// token is Consul's. The second variable is that of its own programs.
func (o *Options) token() (string, error) {
	if o.TokenFile == "" {
		return cmp.Or(os.Getenv("POLYMESH_BRIDGE_CONSUL_TOKEN"), os.Getenv("CONSUL_HTTP_TOKEN")), nil
	}
	return readSecret("token", o.TokenFile)
}

// readSecret reads a file with a secret, with the end of the line that editors write or without.
func readSecret(what, file string) (string, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return "", fmt.Errorf("read the %s: %w", what, err)
	}
	return strings.TrimRight(string(text), "\r\n"), nil
}

// client is for HTTP, with the files that TLS needs. One request has less time than a pass.
func (o *Options) client() (*http.Client, error) {
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.TLSClientConfig = &tls.Config{MinVersion: tls.VersionTLS12}
	if o.CAFile != "" {
		pem, err := os.ReadFile(o.CAFile)
		if err != nil {
			return nil, fmt.Errorf("read the authorities: %w", err)
		}
		transport.TLSClientConfig.RootCAs = x509.NewCertPool()
		if !transport.TLSClientConfig.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("%s contains no PEM certificate", o.CAFile)
		}
	}
	if (o.ClientCert == "") != (o.ClientKey == "") {
		return nil, errors.New("--client-cert and --client-key must be used together")
	}
	if o.ClientCert != "" {
		pair, err := tls.LoadX509KeyPair(o.ClientCert, o.ClientKey)
		if err != nil {
			return nil, fmt.Errorf("read the client's certificate: %w", err)
		}
		transport.TLSClientConfig.Certificates = []tls.Certificate{pair}
	}
	return &http.Client{Transport: transport, Timeout: 10 * time.Second}, nil
}
