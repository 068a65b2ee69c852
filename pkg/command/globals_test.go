package command

import (
	"bytes"
	"flag"
	"fmt"
	"io"
	stdlog "log"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/sirupsen/logrus"
	"github.com/spf13/pflag"
	"go.opentelemetry.io/otel"
	"google.golang.org/grpc"
	"google.golang.org/grpc/grpclog"
	"k8s.io/klog/v2"
)

// This package links everything that the program links, so its tests start with the same globals as the program.
func TestGlobalsOfLinkedPackages(t *testing.T) {
	if os.Getenv("LOG_AS") != "" {
		return // child process of the other test
	}
	if log := klog.Background().GetSink(); log == nil {
		t.Error("klog has a foreign logger")
	}
	restoreLogging()
	if stdlog.Writer() != os.Stderr || stdlog.Flags() != stdlog.LstdFlags || stdlog.Prefix() != "" {
		t.Errorf("Go's log: %v, %d, %q", stdlog.Writer(), stdlog.Flags(), stdlog.Prefix())
	}
	// By name: under `go test -json` the testing package has its own os.Stderr.
	out, _ := logrus.StandardLogger().Out.(*os.File)
	if out == nil || out.Name() != "/dev/stderr" || logrus.GetLevel() != logrus.InfoLevel || len(logrus.StandardLogger().Hooks) > 0 {
		t.Errorf("logrus: %v, %v, hooks %v", logrus.StandardLogger().Out, logrus.GetLevel(), logrus.StandardLogger().Hooks)
	}
	if grpc.EnableTracing {
		t.Error("gRPC tracing is on, which costs memory for each call")
	}
	if want := runtime.NumCPU(); os.Getenv("GOMAXPROCS") == "" && runtime.GOMAXPROCS(0) > want {
		t.Errorf("GOMAXPROCS is %d on %d processors", runtime.GOMAXPROCS(0), want)
	}
	if tracer, meter := fmt.Sprintf("%T", otel.GetTracerProvider()), fmt.Sprintf("%T", otel.GetMeterProvider()); tracer != "*global.tracerProvider" || meter != "noop.MeterProvider" {
		t.Errorf("OpenTelemetry sends traces by %s, metrics by %s", tracer, meter)
	}
	// All programs have the entries in these lists: docs/understand/architecture.md explains why they are harmless. New
	// entries must be reviewed.
	flag.VisitAll(func(f *flag.Flag) {
		if !strings.HasPrefix(f.Name, "test.") && !slices.Contains(cadvisorFlags, f.Name) {
			t.Errorf("flag.CommandLine has --%s", f.Name)
		}
	})
	pflag.VisitAll(func(f *pflag.Flag) {
		if f.Name != "version" {
			t.Errorf("pflag.CommandLine has --%s", f.Name)
		}
	})
	known := []string{"GET /debug/pprof/", "GET /debug/vars", "/debug/requests", "/debug/events"}
	for _, path := range []string{"/", "/debug/pprof/", "/debug/vars", "/debug/requests", "/debug/events", "/metrics", "/healthz", "/configz"} {
		r, err := http.NewRequest(http.MethodGet, path, nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, pattern := http.DefaultServeMux.Handler(r); pattern != "" && !slices.Contains(known, pattern) {
			t.Errorf("http.DefaultServeMux serves %s", pattern)
		}
	}
	for _, s := range []os.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGPIPE} {
		if signal.Ignored(s) {
			t.Errorf("%v is ignored", s)
		}
	}
	stacks := make([]byte, 1<<20)
	stacks = stacks[:runtime.Stack(stacks, true)]
	for _, g := range strings.Split(string(stacks), "\n\n") {
		if _, by, ok := strings.Cut(g, "created by "); ok && !strings.HasPrefix(by, "testing.") {
			t.Logf("goroutine of %s", strings.SplitN(by, "\n", 2)[0]) // such as klog's flush: they end with the process
		}
	}
}

// cadvisorFlags are the flags of the kubelet's cAdvisor, added by its init functions.
var cadvisorFlags = strings.Fields(`allow_dynamic_housekeeping application_metrics_count_limit boot_id_file container_hints containerd
	containerd-namespace containerd_env_metadata_whitelist crio_client_timeout disable_root_cgroup_stats docker_only enable_load_reader
	event_storage_age_limit event_storage_event_limit global_housekeeping_interval housekeeping_interval log_cadvisor_usage
	machine_id_file max_housekeeping_interval referenced_reset_interval storage_driver_buffer_duration storage_driver_db
	storage_driver_host storage_driver_password storage_driver_secure storage_driver_table storage_driver_user
	update_machine_info_interval`)

// Every program but istioctl logs to standard error in klog's format, also with --v=6.
func TestKlogGoesToStandardError(t *testing.T) {
	if os.Getenv("LOG_AS") == "child" {
		restoreGRPC()
		restoreLogging()
		klogFlags := flag.NewFlagSet("", flag.ContinueOnError)
		klog.InitFlags(klogFlags)
		if err := klogFlags.Set("v", "6"); err != nil {
			t.Fatal(err)
		}
		klog.Warning("a warning")
		klog.V(6).Info("at six")
		stdlog.Print("of Go")
		grpclog.Error("of gRPC")
		silenceGRPC()
		grpclog.Error("of ctr's gRPC")
		klog.Flush()
		return
	}
	cmd := exec.Command(os.Args[0], "-test.run=^TestKlogGoesToStandardError$")
	cmd.Env = append(os.Environ(), "LOG_AS=child")
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, io.MultiWriter(&errOut)
	if err := cmd.Run(); err != nil {
		t.Fatalf("%v: %s", err, &errOut)
	}
	lines := strings.Split(errOut.String(), "\n")
	for i, want := range []string{"W", "I", "20", "20"} {
		if len(lines) <= i || !strings.HasPrefix(lines[i], want) {
			t.Fatalf("standard error is %q", lines)
		}
	}
	if !strings.Contains(errOut.String(), "of gRPC") || strings.Contains(errOut.String(), "of ctr's gRPC") {
		t.Errorf("standard error is %q", lines)
	}
	if strings.Contains(out.String(), "a warning") || strings.Contains(out.String(), "of Go") {
		t.Errorf("standard output is %q", &out)
	}
}
