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

// restoreLogging undoes what init functions of linked packages do to global loggers, so that each program in this file
// logs like upstream's own binary. Istio's package log, when it is only linked, redirects klog, Go's log and zap to
// standard output in Istio's format (istio.io/istio/pkg/log, Configure), and raises klog's threshold (klogVerboseFlag
// there); its package monitoring does the same to OpenTelemetry. gRPC's logger is set by the last init: that of the API
// server's storage (k8s.io/apiserver/pkg/storage/etcd3), which sends it to klog, or containerd's ctr, which drops it.
// docs/understand/architecture.md lists other such globals.
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

// restoreGRPC sets gRPC's default logger: errors.
func restoreGRPC() {
	grpclog.SetLoggerV2(grpclog.NewLoggerV2(io.Discard, io.Discard, os.Stderr))
}

// silenceGRPC drops gRPC's log, like containerd's ctr.
func silenceGRPC() {
	grpclog.SetLoggerV2(grpclog.NewLoggerV2(io.Discard, io.Discard, io.Discard))
}

// silenceKlog drops client-go's own log, for commands whose output is for people: relevant errors are also
// returned to them.
func silenceKlog() { klog.SetLogger(logr.Discard()) }
