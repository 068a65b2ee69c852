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
	"runtime"
	"syscall"

	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"polymesh.dev/polymesh/observe/config"
	"polymesh.dev/polymesh/observe/rowstore"
	"polymesh.dev/polymesh/observe/server"
)

// version is set by the build.
var version = "dev"

// Limits for Go's runtime and VictoriaMetrics' caches, so that the process stays below the memory of the cgroup in which the server puts it. The
// environment overrides those of the runtime.
//
// VictoriaLogs merges as many parts at a time as there are processors, and keeps a compressor of 16 MiB for each of them.
const (
	processors = 2
	gcPercent  = 50
	cacheLimit = 32 << 20
)

func main() {
	if err := run(os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "polymesh-observe:", err)
		os.Exit(1)
	}
}

// limitRuntime executes the program again with the runtime's limits in the environment, so that they apply before anything else runs: libraries
// divide their work by the number of processors before main begins. It returns if the limits are set.
func limitRuntime(o *config.Options) error {
	environment := os.Environ()
	for _, limit := range []struct {
		name  string
		value int64
	}{
		{"GOMAXPROCS", int64(min(processors, runtime.NumCPU()))}, {"GOGC", gcPercent}, {"GOMEMLIMIT", o.HeapLimit()},
	} {
		if os.Getenv(limit.name) == "" {
			environment = append(environment, fmt.Sprintf("%s=%d", limit.name, limit.value))
		}
	}
	if len(environment) == len(os.Environ()) {
		return nil
	}
	program, err := os.Executable()
	if err == nil {
		err = unix.Exec(program, os.Args, environment)
	}
	return fmt.Errorf("start it again with limits on its memory: %w", err)
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
	if err := limitRuntime(o); err != nil {
		return err
	}
	// Only root may access what it creates, except the sockets for pods.
	unix.Umask(0o077)
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
