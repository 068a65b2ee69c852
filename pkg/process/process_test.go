package process

import (
	"bytes"
	"flag"
	"os"
	"os/exec"
	"strings"
	"testing"

	"google.golang.org/grpc/grpclog"
	"k8s.io/klog/v2"
)

// gRPC's messages appear in the server's log, in klog's format. The log is global, so the test runs in its own process.
func TestGRPCLogsToKlog(t *testing.T) {
	if os.Getenv("LOG_AS") == "child" {
		klogFlags := flag.NewFlagSet("", flag.ContinueOnError)
		klog.InitFlags(klogFlags)
		klog.ClearLogger()
		grpcToKlog()
		grpclog.Warning("of the server's gRPC")
		klog.Flush()
		return
	}
	cmd := exec.Command(os.Args[0], "-test.run=^TestGRPCLogsToKlog$")
	cmd.Env = append(os.Environ(), "LOG_AS=child")
	var errOut bytes.Buffer
	cmd.Stderr = &errOut
	if err := cmd.Run(); err != nil {
		t.Fatalf("%v: %s", err, &errOut)
	}
	if !strings.HasPrefix(errOut.String(), "W") || !strings.Contains(errOut.String(), "of the server's gRPC") {
		t.Errorf("standard error is %q", &errOut)
	}
}
