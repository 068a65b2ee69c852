package datastore

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	kine "github.com/k3s-io/kine/pkg/server"
	"github.com/sirupsen/logrus"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	etcd "go.etcd.io/etcd/api/v3/version"
	"go.etcd.io/etcd/server/v3/embed"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"

	"polymesh.dev/polymesh/pkg/component"
)

// The limits of kine's own server (pkg/endpoint/endpoint.go), which are etcd's.
const (
	requestOverhead = 512 << 10
	mostSent        = 1<<31 - 1
)

// notifyInterval is how often a watch receives the newest revision; kine's default, which is sufficient for the API server's watch
// caches.
const notifyInterval = 5 * time.Second

// stopTimeout is the time for requests to finish; kine's own.
const stopTimeout = 2 * time.Second

// kineServer serves etcd's API from one of kine's backends, on a Unix socket. It replaces kine's endpoint.Listen, which links all of
// kine's drivers, with NATS and S3.
type kineServer struct {
	socket string
	// open opens the database. It is closed when ctx ends, which wait waits for.
	open func(ctx context.Context, wait *sync.WaitGroup) (kine.Backend, error)
	// writable returns nil if the database should accept writes.
	writable func() error

	compacted atomic.Pointer[time.Time]

	cancel context.CancelFunc
	wait   sync.WaitGroup
}

// live returns the context of a server that runs, which stop ends.
func (k *kineServer) live(start context.Context) context.Context {
	live, cancel := component.Running(start)
	k.cancel = cancel
	return live
}

// listen opens the database and serves it on the socket until ctx ends.
func (k *kineServer) listen(ctx context.Context) (err error) {
	// kine logs each compaction and slow query in its own format; only warnings and errors are useful.
	logrus.SetLevel(logrus.WarnLevel)
	logrus.AddHook(withoutValues{})
	logrus.AddHook(withoutExit{})
	// The database outlives ctx: it is closed after the last request.
	open, closeDatabase := context.WithCancel(context.WithoutCancel(ctx))
	defer func() {
		if err != nil {
			closeDatabase()
		}
	}()
	backend, err := k.open(open, &k.wait)
	if err != nil {
		return err
	}
	if err := backend.Start(open); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(k.socket), 0o711); err != nil {
		return err
	}
	if err := os.Remove(k.socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove the socket of a previous run: %w", err)
	}
	listener, err := (&net.ListenConfig{}).Listen(ctx, "unix", k.socket)
	if err != nil {
		return err
	}
	if err := os.Chmod(k.socket, 0o600); err != nil {
		return errors.Join(err, listener.Close())
	}
	serving := k.server(backend)
	k.wait.Go(func() {
		if err := serving.Serve(listener); err != nil {
			logrus.Errorf("serve %s: %v", k.socket, err)
		}
	})
	k.wait.Go(func() {
		<-ctx.Done()
		// Watches do not end by themselves.
		timer := time.AfterFunc(stopTimeout, serving.Stop)
		defer timer.Stop()
		serving.GracefulStop()
		closeDatabase()
	})
	return nil
}

// answers returns nil if the socket accepts connections.
func (k *kineServer) answers(ctx context.Context) error {
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", k.socket)
	if err != nil {
		return err
	}
	return conn.Close()
}

// stop closes the database, and waits for it until ctx ends.
func (k *kineServer) stop(ctx context.Context) error {
	if k.cancel == nil {
		return nil
	}
	k.cancel()
	done := make(chan struct{})
	go func() { k.wait.Wait(); close(done) }()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("still closing: %w", ctx.Err())
	}
}

// kineVersion is kine's version.
func kineVersion() string {
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, dep := range info.Deps {
			if dep.Path == "github.com/k3s-io/kine" {
				return "kine " + dep.Version
			}
		}
	}
	return "kine"
}

// server is kine's server, except that failed writes and compactions return errors, and that writes are serialized.
func (k *kineServer) server(backend kine.Backend) *grpc.Server {
	server := grpc.NewServer(
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: embed.DefaultGRPCKeepAliveMinTime}),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: embed.DefaultGRPCKeepAliveInterval, Timeout: embed.DefaultGRPCKeepAliveTimeout}),
		grpc.MaxConcurrentStreams(embed.DefaultMaxConcurrentStreams),
		grpc.MaxRecvMsgSize(int(embed.DefaultMaxRequestBytes)+requestOverhead),
		grpc.MaxSendMsgSize(mostSent),
		grpc.ChainUnaryInterceptor(k.failedWrites, oneWriteAtATime(), k.failedCompactions),
	)
	// Report the version of the linked etcd client to the API server.
	kine.New(backend, "unix", notifyInterval, etcd.Version).Register(server)
	return server
}

// oneWriteAtATime keeps revisions from going back. kine records the newest revision after the commit (Append in its
// pkg/logstructured/sqllog/sql.go), so a later write could be overwritten by an earlier one: a read after an
// acknowledged write would then return older data. SQLite has one writer anyway; of several servers on one database, each has its turn. (Deletions by kine itself, when a lease expires,
// are not covered.)
func oneWriteAtATime() grpc.UnaryServerInterceptor {
	turn := make(chan struct{}, 1)
	return func(ctx context.Context, request any, _ *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
		switch request.(type) {
		case *pb.TxnRequest, *pb.PutRequest, *pb.DeleteRangeRequest:
		default:
			return handle(ctx, request)
		}
		select {
		case turn <- struct{}{}:
		case <-ctx.Done():
			return nil, status.FromContextError(ctx.Err()).Err()
		}
		defer func() { <-turn }()
		return handle(ctx, request)
	}
}

// failedWrites returns an error where kine takes a failed write for a conflict ("we assume it's a UNIQUE constraint error"
// in its logstructured.go). The API server retries after a conflict, at once and forever: on a full disk each update
// and each deletion would keep it busy, and keep it from stopping.
func (k *kineServer) failedWrites(ctx context.Context, request any, _ *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
	answer, err := handle(ctx, request)
	if err != nil && strings.Contains(err.Error(), "database or disk is full") {
		return nil, rpctypes.ErrGRPCNoSpace
	}
	txn, isTxn := request.(*pb.TxnRequest)
	response, answered := answer.(*pb.TxnResponse)
	if err != nil || !isTxn || !answered || !noConflict(txn, response) {
		return answer, err
	}
	if k.writable() != nil {
		return nil, rpctypes.ErrGRPCNoSpace
	}
	return nil, status.Error(codes.Internal, "the datastore could not write: see the server's log")
}

// noConflict reports whether a transaction failed although the key is at the expected revision.
func noConflict(txn *pb.TxnRequest, answer *pb.TxnResponse) bool {
	if answer.Succeeded || len(txn.Compare) != 1 {
		return false
	}
	asked := txn.Compare[0]
	if asked.Target != pb.Compare_MOD || asked.Result != pb.Compare_EQUAL || asked.GetModRevision() == 0 {
		return false
	}
	for _, op := range answer.Responses {
		for _, kv := range op.GetResponseRange().GetKvs() {
			if string(kv.Key) == string(asked.Key) && kv.ModRevision == asked.GetModRevision() {
				return true
			}
		}
	}
	return false
}

// withoutValues removes stored values from log entries. kine logs a failed write with its data, including Secrets
// ("error in txn %s: %v" in its pkg/server/kv.go).
type withoutValues struct{}

// Levels implements logrus.Hook.
func (withoutValues) Levels() []logrus.Level { return logrus.AllLevels }

// Fire implements logrus.Hook.
func (withoutValues) Fire(e *logrus.Entry) error {
	for _, request := range []string{"txn", "put"} {
		if strings.HasPrefix(e.Message, "error in "+request+" ") {
			// The error follows the request's last separator, or a later one.
			e.Message = "error in " + request + e.Message[strings.LastIndex(e.Message, ": "):]
		}
	}
	return nil
}

// withoutExit keeps a failed compaction from ending the process: kine logs it as fatal (MustCommit in its
// pkg/drivers/generic/tx.go), and a full disk would stop the cluster. It panics instead, for failedCompactions to recover.
type withoutExit struct{}

// notCommitted is the panic value of withoutExit: kine's log message.
type notCommitted string

// Levels implements logrus.Hook.
func (withoutExit) Levels() []logrus.Level { return []logrus.Level{logrus.FatalLevel} }

// Fire implements logrus.Hook.
func (withoutExit) Fire(e *logrus.Entry) error {
	if strings.HasPrefix(e.Message, "Transaction commit failed") {
		panic(notCommitted(e.Message))
	}
	return nil
}

// lastCompaction returns when the last compaction ended without an error; zero if there was none.
func (k *kineServer) lastCompaction() time.Time {
	if at := k.compacted.Load(); at != nil {
		return *at
	}
	return time.Time{}
}

// failedCompactions returns the panic of withoutExit as an error. Only compactions use this commit, and kine compacts only on request.
func (k *kineServer) failedCompactions(ctx context.Context, request any, _ *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (answer any, err error) {
	defer func() {
		switch thrown := recover().(type) {
		case nil:
		case notCommitted:
			answer, err = nil, status.Error(codes.Internal, string(thrown))
		default:
			panic(thrown)
		}
	}()
	answer, err = handle(ctx, request)
	if _, ok := request.(*pb.CompactionRequest); ok && err == nil {
		now := time.Now()
		k.compacted.Store(&now)
	}
	return answer, err
}
