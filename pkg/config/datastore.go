package config

import (
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// DatastoreKind is what keeps the cluster's state.
type DatastoreKind string

const (
	// SQLite is in this server, and the default.
	SQLite     DatastoreKind = ""
	Etcd       DatastoreKind = "etcd"
	PostgreSQL DatastoreKind = "PostgreSQL"
	// MySQL is MariaDB as well.
	MySQL DatastoreKind = "MySQL"
)

// Datastore is the configuration of a datastore outside of this server, which several servers can share.
type Datastore struct {
	Kind DatastoreKind
	// Endpoint is the address, with the user and the password: for etcd URLs separated by commas, for PostgreSQL a URL without its
	// scheme, for MySQL the data source name of Go's driver (https://github.com/go-sql-driver/mysql#dsn-data-source-name).
	Endpoint Secret
	// CAFile, CertFile and KeyFile are PEM files: the datastore's authority, and this server's certificate and key. Each may be empty.
	CAFile, CertFile, KeyFile string
}

// Secret is a text that is not printed.
type Secret string

// String does not return the text.
func (Secret) String() string { return "(secret)" }

// GoString does not return the text.
func (s Secret) GoString() string { return s.String() }

// MarshalText does not return the text.
func (s Secret) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// examples of endpoints, for errors: an error about an endpoint does not contain it.
const (
	etcdExample     = "etcd://HOST:2379 or https://HOST:2379, several separated by commas"
	postgresExample = "postgres://USER:PASSWORD@HOST:5432/DATABASE, with special characters percent-encoded"
	mysqlExample    = "mysql://USER:PASSWORD@tcp(HOST:3306)/DATABASE"
)

// etcdPort is etcd's port for clients.
const etcdPort = 2379

// checkDatastore reads the endpoint, in the forms of K3s, and etcd:// for etcd.
func (r *raw) checkDatastore(s *Server) (err error) {
	d := &s.Datastore
	if s.ClusterInit = r.clusterInit; s.ClusterInit && s.DatastoreSync != SyncFull {
		return fmt.Errorf("--datastore-sync is for SQLite, and --cluster-init uses etcd: remove one of them")
	}
	if s.EtcdArgs, err = parseEtcdArgs(r.etcdArgs); err != nil {
		return err
	}
	s.ClusterReset, s.ClusterResetRestorePath = r.clusterReset, r.clusterResetPath
	if s.ClusterResetForce = r.clusterResetForce; s.ClusterResetForce && !s.ClusterReset {
		return fmt.Errorf("--cluster-reset-force needs --cluster-reset")
	}
	if s.ClusterResetRestorePath != "" && !s.ClusterReset {
		return fmt.Errorf("--cluster-reset-restore-path needs --cluster-reset; `polymesh snapshot restore` restores a snapshot too")
	}
	endpoint := r.datastoreEndpoint
	if r.datastoreEndpointFile != "" {
		if endpoint != "" {
			return fmt.Errorf("--datastore-endpoint and --datastore-endpoint-file are mutually exclusive: remove one of them")
		}
		text, err := os.ReadFile(r.datastoreEndpointFile)
		if err != nil {
			return fmt.Errorf("--datastore-endpoint-file: %w", err)
		}
		if endpoint = strings.TrimSpace(string(text)); endpoint == "" {
			return fmt.Errorf("--datastore-endpoint-file: %s is empty", r.datastoreEndpointFile)
		}
	}
	for flag, file := range map[string]struct {
		value string
		field *string
	}{
		"datastore-cafile": {r.datastoreCA, &d.CAFile}, "datastore-certfile": {r.datastoreCert, &d.CertFile}, "datastore-keyfile": {r.datastoreKey, &d.KeyFile},
	} {
		switch {
		case file.value == "":
		case endpoint == "":
			return fmt.Errorf("--%s is for a datastore outside of this server: set --datastore-endpoint too", flag)
		default:
			if *file.field, err = filepath.Abs(file.value); err != nil {
				return fmt.Errorf("--%s %q: %w", flag, file.value, err)
			}
		}
	}
	if (d.CertFile == "") != (d.KeyFile == "") {
		return fmt.Errorf("--datastore-certfile and --datastore-keyfile belong together: set both")
	}
	if endpoint == "" {
		return nil
	}
	if r.clusterReset {
		return fmt.Errorf("--cluster-reset is for etcd on the servers, not for --datastore-endpoint: remove one of them")
	}
	if len(r.etcdArgs) > 0 {
		return fmt.Errorf("--etcd-arg is for etcd on the servers, not for --datastore-endpoint: remove one of them")
	}
	if r.clusterInit {
		return fmt.Errorf("--cluster-init and --datastore-endpoint are mutually exclusive: servers that share a datastore outside need no etcd of their own")
	}
	if s.DatastoreSync != SyncFull {
		return fmt.Errorf("--datastore-sync is for the server's own SQLite, not for --datastore-endpoint: remove one of them")
	}
	scheme, rest, _ := strings.Cut(endpoint, "://")
	switch scheme {
	case "etcd", "http", "https":
		d.Kind = Etcd
		text, err := etcdURLs(endpoint, d.CAFile != "" || d.CertFile != "")
		d.Endpoint = Secret(text)
		return err
	case "postgres", "postgresql":
		d.Kind, d.Endpoint = PostgreSQL, Secret(rest)
		u, err := url.Parse("postgres://" + rest)
		if err != nil || u.Host == "" || strings.Count(strings.Trim(u.Path, "/"), "/") > 0 || u.Fragment != "" {
			return fmt.Errorf("--datastore-endpoint is not %s", postgresExample)
		}
		return nil
	case "mysql":
		d.Kind, d.Endpoint = MySQL, Secret(rest)
		// The driver's rule: the last slash ends the address.
		if !strings.Contains(rest, "/") {
			return fmt.Errorf("--datastore-endpoint is not %s", mysqlExample)
		}
		return nil
	}
	return fmt.Errorf("--datastore-endpoint is neither %s, nor %s, nor %s", etcdExample, postgresExample, mysqlExample)
}

// etcdURLs returns the members' URLs in the API server's form. etcd:// means TLS where there are certificates.
func etcdURLs(endpoint string, certificates bool) (string, error) {
	var urls []string
	first := ""
	for _, text := range strings.Split(endpoint, ",") {
		u, err := url.Parse(strings.TrimSpace(text))
		if err != nil || !slices.Contains([]string{"etcd", "http", "https"}, u.Scheme) || u.Hostname() == "" || strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.Fragment != "" {
			return "", fmt.Errorf("--datastore-endpoint is not %s", etcdExample)
		}
		if u.User != nil {
			return "", fmt.Errorf("--datastore-endpoint contains a user: the API server authenticates itself at etcd by --datastore-certfile and --datastore-keyfile only")
		}
		if first == "" {
			first = u.Scheme
		}
		if u.Scheme != first {
			return "", fmt.Errorf("--datastore-endpoint mixes %s:// and %s://: use one of them for all members", first, u.Scheme)
		}
		port := u.Port()
		if port == "" {
			port = strconv.Itoa(etcdPort)
		}
		if n, err := strconv.Atoi(port); err != nil || n < 1 || n > 65535 {
			return "", fmt.Errorf("--datastore-endpoint: %q is not a port", port)
		}
		switch {
		case u.Scheme == "etcd" && certificates:
			u.Scheme = "https"
		case u.Scheme == "etcd":
			u.Scheme = "http"
		case u.Scheme == "http" && certificates:
			return "", fmt.Errorf("--datastore-endpoint is http://, for which there are no certificates: use https://, or remove --datastore-cafile, --datastore-certfile and --datastore-keyfile")
		}
		urls = append(urls, u.Scheme+"://"+net.JoinHostPort(u.Hostname(), port))
	}
	return strings.Join(urls, ","), nil
}

// SecretVariables returns the environment variables that contain secrets. A server removes them from its environment, so that its child
// processes do not inherit them.
func SecretVariables() []string {
	return []string{envPrefix + "TOKEN", envPrefix + "DATASTORE_ENDPOINT", envPrefix + "S3_ACCESS_KEY", envPrefix + "S3_SECRET_KEY", passphraseVariable}
}

// hasPassword reports whether an endpoint may contain a password: in doubt it does.
func hasPassword(endpoint string) bool {
	return strings.Contains(endpoint, "@") || strings.Contains(strings.ToLower(endpoint), "password")
}

// visiblePassword reports whether the command line contains a password. It has to be called before fill.
func (f *Flags) visiblePassword() bool {
	flag := f.Lookup("datastore-endpoint")
	return flag != nil && flag.Changed && hasPassword(f.raw.datastoreEndpoint)
}
