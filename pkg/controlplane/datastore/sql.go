package datastore

import (
	"context"
	"database/sql/driver"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/go-sql-driver/mysql"
	"github.com/jackc/pgerrcode"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/stdlib"
	kinemysql "github.com/k3s-io/kine/pkg/drivers/mysql"
	"github.com/k3s-io/kine/pkg/drivers/pgsql"
	kine "github.com/k3s-io/kine/pkg/server"
	kinetls "github.com/k3s-io/kine/pkg/tls"

	"polymesh.dev/polymesh/pkg/config"
)

// SQLOptions are those of a datastore in a database server outside.
type SQLOptions struct {
	Database config.Datastore
	// Socket is the Unix socket to listen on.
	Socket string
	Log    *slog.Logger
}

// SQL is the component "datastore" on PostgreSQL, MySQL or MariaDB. Each server of a cluster has one, on the same database.
type SQL struct {
	Outside
	opts  SQLOptions
	log   *slog.Logger
	kine  kineServer
	place string // the database server, for messages

	backend atomic.Pointer[kine.Backend]
	problem atomic.Pointer[string] // why the database is not open yet
}

var _ Store = (*SQL)(nil)

// NewSQL returns a datastore that is not connected yet.
func NewSQL(o SQLOptions) *SQL {
	s := &SQL{opts: o, place: string(o.Database.Kind)}
	s.log = o.Log.With("component", s.Name())
	s.kine = kineServer{socket: o.Socket, open: s.open, writable: func() error { return nil }}
	return s
}

// Endpoint implements Store. Other servers can use the database too.
func (s *SQL) Endpoint() Endpoint {
	return Endpoint{Servers: "unix://" + s.opts.Socket, LeaderElect: true}
}

// Name implements component.Component.
func (*SQL) Name() string { return "datastore" }

// Version is kine's version.
func (s *SQL) Version() string { return kineVersion() + ", " + string(s.opts.Database.Kind) }

// Init checks the endpoint. An error does not contain it, because it contains the password.
func (s *SQL) Init(context.Context) error {
	endpoint := string(s.opts.Database.Endpoint)
	switch s.opts.Database.Kind {
	case config.PostgreSQL:
		parsed, err := pgconn.ParseConfig("postgres://" + endpoint)
		if err != nil {
			return errEndpoint
		}
		s.place = fmt.Sprintf("PostgreSQL at %s:%d", parsed.Host, parsed.Port)
	case config.MySQL:
		parsed, err := mysql.ParseDSN(endpoint)
		if err != nil {
			return errEndpoint
		}
		s.place = "MySQL at " + parsed.Addr
	default:
		return fmt.Errorf("%q is not an SQL database", s.opts.Database.Kind)
	}
	return nil
}

const (
	reconnectFirst = 500 * time.Millisecond
	reconnectMax   = 10 * time.Second
	// connectTimeout is the time for a connection. kine's own has five seconds.
	connectTimeout = 10 * time.Second
)

// Start connects in the background: the database may come up after this machine. Ready returns what it waits for.
func (s *SQL) Start(ctx context.Context) error {
	live := s.kine.live(ctx)
	s.kine.wait.Go(func() {
		pause := reconnectFirst
		for live.Err() == nil {
			err := s.kine.listen(live)
			if err == nil {
				return
			}
			problem := fmt.Sprintf("%s: %v", s.place, err)
			if last := s.problem.Swap(&problem); last == nil || *last != problem {
				s.log.Warn("the datastore cannot be opened yet, retrying", "err", problem)
			}
			select {
			case <-live.Done():
			case <-time.After(pause):
			}
			pause = min(2*pause, reconnectMax)
		}
	})
	return nil
}

// open connects to the database, and creates it and its table if they are missing.
func (s *SQL) open(ctx context.Context, wait *sync.WaitGroup) (kine.Backend, error) {
	d := s.opts.Database
	// kine itself tries for five minutes, logs why not, and then uses the connection that it does not have.
	if err := s.reach(ctx); err != nil {
		return nil, err
	}
	cfg := kineConfig(string(d.Endpoint))
	cfg.BackendTLSConfig = kinetls.Config{CAFile: d.CAFile, CertFile: d.CertFile, KeyFile: d.KeyFile}
	open := pgsql.New
	if d.Kind == config.MySQL {
		open = kinemysql.New
	}
	_, backend, err := open(ctx, wait, cfg)
	if err != nil {
		return nil, err
	}
	s.backend.Store(&backend)
	return backend, nil
}

// reach returns nil if the database server accepts this server's user. The database itself may still be missing.
func (s *SQL) reach(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	connector, err := s.connector()
	if err != nil {
		return err
	}
	conn, err := connector.Connect(ctx)
	var pg *pgconn.PgError
	var my *mysql.MySQLError
	switch {
	case err == nil:
		return conn.Close()
	case errors.As(err, &pg) && pg.Code == pgerrcode.InvalidCatalogName, errors.As(err, &my) && my.Number == unknownDatabase:
		return nil
	}
	return err
}

// unknownDatabase is MySQL's error ER_BAD_DB_ERROR.
const unknownDatabase = 1049

// connector returns what kine's drivers connect with (prepareConfig in each).
func (s *SQL) connector() (driver.Connector, error) {
	d := s.opts.Database
	if d.Kind == config.MySQL {
		parsed, err := mysql.ParseDSN(string(d.Endpoint))
		if err != nil {
			return nil, errEndpoint
		}
		parsed.Timeout = connectTimeout
		if parsed.TLS, err = (kinetls.Config{CAFile: d.CAFile, CertFile: d.CertFile, KeyFile: d.KeyFile}).ClientConfig(); err != nil {
			return nil, fmt.Errorf("read the certificates for the datastore: %w", err)
		}
		return mysql.NewConnector(parsed)
	}
	u, err := url.Parse("postgres://" + string(d.Endpoint))
	if err != nil {
		return nil, errEndpoint
	}
	if strings.Trim(u.Path, "/") == "" {
		u.Path = "/kubernetes"
	}
	values := u.Query()
	for name, file := range map[string]string{"sslrootcert": d.CAFile, "sslcert": d.CertFile, "sslkey": d.KeyFile} {
		if file == "" {
			continue
		}
		if !values.Has(name) {
			values.Set(name, file)
		}
		if !values.Has("sslmode") {
			values.Set("sslmode", "verify-full")
		}
	}
	u.RawQuery = values.Encode()
	parsed, err := pgx.ParseConfig(u.String())
	if err != nil {
		// It quotes the address, but reading the certificates is what can fail now.
		return nil, errors.New("read the certificates for the datastore: one of --datastore-cafile, --datastore-certfile and --datastore-keyfile cannot be read, or is not a PEM file")
	}
	return stdlib.GetConnector(*parsed), nil
}

var errEndpoint = errors.New("--datastore-endpoint is not an address that the database's driver accepts: for PostgreSQL see " +
	"https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-CONNSTRING-URIS, for MySQL https://github.com/go-sql-driver/mysql#dsn-data-source-name")

// Ready returns nil if the database answers a query.
func (s *SQL) Ready(ctx context.Context) error {
	backend := s.backend.Load()
	if backend == nil {
		if problem := s.problem.Load(); problem != nil {
			return errors.New(*problem)
		}
		return fmt.Errorf("connecting to %s", s.place)
	}
	if err := s.kine.answers(ctx); err != nil {
		return err
	}
	if _, err := (*backend).DbSize(ctx); err != nil {
		return fmt.Errorf("%s: %w", s.place, err)
	}
	return nil
}

// Stop closes the connections.
func (s *SQL) Stop(ctx context.Context) error { return s.kine.stop(ctx) }
