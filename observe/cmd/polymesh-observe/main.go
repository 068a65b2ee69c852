// polymesh-observe stores and serves the metrics, logs and traces of a cluster. `polymesh server` starts it (pkg/observe in the main
// module); it continues when the server ends, and when the cluster is down.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"

	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"polymesh.dev/polymesh/observe/config"
	"polymesh.dev/polymesh/observe/rowstore"
	"polymesh.dev/polymesh/observe/server"
)

// version is set by the build.
var version = "dev"

// What Go's runtime and VictoriaMetrics' caches may take, so that all of it stays below the 150 MB of the cgroup in which the server
// puts this process. GOGC and GOMEMLIMIT in the environment override the first two.
const (
	gcPercent   = 50
	memoryLimit = 110 << 20
	cacheLimit  = 32 << 20
)

func main() {
	if err := run(os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "polymesh-observe:", err)
		os.Exit(1)
	}
}

func run(args []string, out io.Writer) error {
	o, err := config.Parse(args, out)
	switch {
	case errors.Is(err, pflag.ErrHelp):
		return nil
	case err != nil:
		return err
	case o.Version:
		_, err := fmt.Fprintln(out, version)
		return err
	}
	// Nothing that it creates is for others, except the sockets for pods.
	unix.Umask(0o077)
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(gcPercent)
	}
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(memoryLimit)
	}
	if err := rowstore.LimitMemory(cacheLimit); err != nil {
		return err
	}
	var sink io.Writer = os.Stderr
	if o.Log != "" {
		if sink, err = openLog(o.Log); err != nil {
			return err
		}
	}
	level := slog.LevelInfo
	if o.Debug {
		level = slog.LevelDebug
	}
	log := slog.New(slog.NewTextHandler(sink, &slog.HandlerOptions{Level: level}))
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	// A second signal does not wait.
	context.AfterFunc(ctx, stop)
	if o.PushTo != "" {
		return server.Collect(ctx, o, version, log)
	}
	return server.Run(ctx, o, version, log)
}
