package imagepolicy

import (
	"crypto/tls"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"polymesh.dev/polymesh/pkg/certificate"
)

// peerVar is an address to which this binary, as another process, connects.
const peerVar = "POLYMESH_TEST_PEER"

func TestMain(m *testing.M) {
	if address := os.Getenv(peerVar); address != "" {
		// The error of the server's side comes with the first byte (TLS 1.3).
		conn, err := tls.Dial("tcp", address, &tls.Config{InsecureSkipVerify: true})
		if err == nil {
			_, err = conn.Read(make([]byte, 1))
		}
		os.Stdout.WriteString(err.Error())
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// Another process of this machine, even of the same user, is not answered; this one is.
func TestOnlyTheOwnProcessIsAnswered(t *testing.T) {
	dir, ip := t.TempDir(), netip.MustParseAddr("127.0.0.1")
	if _, err := certificate.Ensure(certificate.Options{Dir: dir, NodeName: "n", NodeIP: ip, ServiceIP: ip, ClusterDomain: "cluster.local", Now: time.Now()}); err != nil {
		t.Fatal(err)
	}
	p := New(Options{Certificates: certificate.Store(dir), Log: slog.New(slog.DiscardHandler)})
	address, err := p.serve()
	if err != nil {
		t.Fatal(err)
	}
	defer p.server.Close()
	conn, err := tls.Dial("tcp", address, &tls.Config{InsecureSkipVerify: true})
	if err != nil {
		t.Fatalf("this process: %v", err)
	}
	defer conn.Close()
	if _, err := conn.Write([]byte("GET / HTTP/1.0\r\n\r\n")); err != nil {
		t.Fatal(err)
	}
	answer := make([]byte, 8)
	if _, err := conn.Read(answer); err != nil || string(answer) != "HTTP/1.0" {
		t.Errorf("this process: %q, %v", answer, err)
	}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), peerVar+"="+address)
	out, err := cmd.Output()
	if err != nil || !strings.Contains(string(out), "remote error: tls: internal error") {
		t.Errorf("another process: %q, %v", out, err)
	}
}
