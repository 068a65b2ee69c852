package command

import (
	"flag"
	"io"
	stdlog "log"
	"os"

	"github.com/go-logr/logr"
	"github.com/go-logr/stdr"
	"go.opentelemetry.io/otel"
	"go.uber.org/zap"
	"google.golang.org/grpc/grpclog"
	"k8s.io/klog/v2"
)

// restoreLogging undoes what init functions of linked packages do to logs that are not theirs, so that each program in this
// file logs as upstream's own binary of it does. Istio's package log, when it is only linked, sends klog, Go's log and zap to
// standard output in Istio's format (istio.io/istio/pkg/log, Configure), raises what klog lets through (klogVerboseFlag there),
// and its package monitoring does the same to OpenTelemetry. gRPC's log belongs to whoever's init comes last: the API server's
// storage (k8s.io/apiserver/pkg/storage/etcd3), which sends it to klog, or containerd's ctr, which drops it. docs/understand/architecture.md lists the rest of the kind.
func restoreLogging() {
	klog.ClearLogger()
	klogFlags := flag.NewFlagSet("klog", flag.ContinueOnError)
	klog.InitFlags(klogFlags)
	for name, value := range map[string]string{"legacy_stderr_threshold_behavior": "true", "stderrthreshold": "ERROR"} {
		if f := klogFlags.Lookup(name); f != nil {
			_ = f.Value.Set(value) // klog's own defaults
		}
	}
	stdlog.SetOutput(os.Stderr)
	stdlog.SetFlags(stdlog.LstdFlags)
	stdlog.SetPrefix("")
	zap.ReplaceGlobals(zap.NewNop())
	otel.SetLogger(stdr.New(stdlog.New(os.Stderr, "", stdlog.LstdFlags|stdlog.Lshortfile)))
}

// restoreGRPC gives gRPC the log that it has by default: errors.
func restoreGRPC() {
	grpclog.SetLoggerV2(grpclog.NewLoggerV2(io.Discard, io.Discard, os.Stderr))
}

// silenceGRPC drops gRPC's log, as containerd's ctr does.
func silenceGRPC() {
	grpclog.SetLoggerV2(grpclog.NewLoggerV2(io.Discard, io.Discard, io.Discard))
}

// silenceKlog drops what client-go logs of its own, for commands whose output is for people: an error that matters comes
// back to them as an error.
func silenceKlog() { klog.SetLogger(logr.Discard()) }
