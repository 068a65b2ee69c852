//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/time/rate"
	"k8s.io/client-go/util/cert"
)

// The gateway serves the certificate of a Secret, and a new one in the Secret replaces it while requests come: each of
// them on a separate connection, which checks the certificate.
func TestTrafficGateway(t *testing.T) {
	const (
		host   = "shop.gateway.test"
		secret = "shop-gateway-test"
	)
	s := newScenario(t, "gateway")
	certificates := make([]gatewayCertificate, 4)
	trusted := x509.NewCertPool()
	for i := range certificates {
		certificates[i] = newGatewayCertificate(t, host)
		trusted.AppendCertsFromPEM(certificates[i].chain)
	}
	t.Cleanup(func() {
		if _, err := s.KubectlErr("delete", "secret", secret, "-n", "istio-system", "--ignore-not-found"); err != nil {
			t.Error(err)
		}
	})
	install := func(c gatewayCertificate) {
		t.Helper()
		s.Apply(t, s.Kubectl(t, "create", "secret", "tls", secret, "-n", "istio-system",
			"--cert", c.chainFile, "--key", c.keyFile, "--dry-run=client", "-o", "yaml"))
	}
	install(certificates[0])
	s.apply("gateway.yaml")

	s.Eventually(t, time.Minute, func() (bool, string) {
		status, text, err := ask(s.HTTP(false), s.Node, http.MethodGet, host, "/over/http", nil)
		return err == nil && status == http.StatusOK, fmt.Sprintf("http: status %d %s %v", status, text, err)
	})
	address := net.JoinHostPort(s.Address(), "443")
	client := &http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		TLSClientConfig:   &tls.Config{RootCAs: trusted},
		DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return s.DialOutside(ctx, network, address)
		},
	}}
	// served sends one request and returns the certificate that the gateway has shown.
	served := func() ([]byte, error) {
		response, err := client.Get("https://" + host + "/over/https")
		if err != nil {
			return nil, err
		}
		defer response.Body.Close()
		text, err := io.ReadAll(response.Body)
		if err != nil {
			return nil, err
		}
		if r, err := parseReply(string(text)); err != nil || response.StatusCode != http.StatusOK || r.Path != "/over/https" {
			return nil, fmt.Errorf("status %s, %s", response.Status, text)
		}
		return response.TLS.PeerCertificates[0].Raw, nil
	}
	waitServed := func(c gatewayCertificate) {
		t.Helper()
		s.Eventually(t, 2*time.Minute, func() (bool, string) {
			have, err := served()
			return err == nil && bytes.Equal(have, c.leaf), fmt.Sprintf("the certificate of the Secret is not served yet (%v)", err)
		})
	}
	waitServed(certificates[0])

	ctx, stop := context.WithCancel(t.Context())
	var (
		workers sync.WaitGroup
		mu      sync.Mutex
		sent    int
		lost    []error
	)
	const atOnce = 4
	pace := rate.NewLimiter(60, atOnce) // a handshake takes both sides some work
	for range atOnce {
		workers.Go(func() {
			for pace.Wait(ctx) == nil {
				_, err := served()
				mu.Lock()
				if sent++; err != nil {
					lost = append(lost, err)
				}
				mu.Unlock()
			}
		})
	}
	end := func() {
		stop()
		workers.Wait()
	}
	t.Cleanup(end)
	for _, c := range certificates[1:] {
		install(c)
		waitServed(c)
	}
	end()
	t.Logf("%d of %d requests lost", len(lost), sent)
	if len(lost) > 0 || sent == 0 {
		t.Errorf("%d of %d requests lost while the certificate was replaced, the first ones: %v", len(lost), sent, lost[:min(5, len(lost))])
	}
	// No thread of the gateway continues with an older one.
	last := certificates[len(certificates)-1]
	for range 20 {
		if have, err := served(); err != nil || !bytes.Equal(have, last.leaf) {
			t.Fatalf("in the end the gateway serves another certificate than the last one (%v)", err)
		}
	}
}

// gatewayCertificate is a certificate with its key, and its own CA after it in the chain.
type gatewayCertificate struct {
	chain, leaf        []byte
	chainFile, keyFile string
}

func newGatewayCertificate(t *testing.T, host string) gatewayCertificate {
	t.Helper()
	chain, key, err := cert.GenerateSelfSignedCertKey(host, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	first, _ := pem.Decode(chain)
	dir := t.TempDir()
	c := gatewayCertificate{chain: chain, leaf: first.Bytes, chainFile: filepath.Join(dir, "tls.crt"), keyFile: filepath.Join(dir, "tls.key")}
	for file, content := range map[string][]byte{c.chainFile: chain, c.keyFile: key} {
		if err := os.WriteFile(file, content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return c
}

// One VirtualService routes by path and by header, with timeouts and retries.
func TestTrafficRoutes(t *testing.T) {
	s := newScenario(t, "routes")
	s.apply("routes.yaml")
	client := s.HTTP(false)
	get := func(path string, header http.Header) (int, echoReply, error) {
		request, err := http.NewRequest(http.MethodGet, "http://"+s.Address()+path, nil)
		if err != nil {
			return 0, echoReply{}, err
		}
		request.Host, request.Header = "api.routes.test", header
		response, err := client.Do(request)
		if err != nil {
			return 0, echoReply{}, err
		}
		defer response.Body.Close()
		text, err := io.ReadAll(response.Body)
		if err != nil {
			return response.StatusCode, echoReply{}, err
		}
		// The gateway's own response is not from echo.
		r, _ := parseReply(string(text))
		return response.StatusCode, r, nil
	}
	// want waits for an answer: the gateway may not know a route yet, and its first call to a pod may take long.
	want := func(path string, header http.Header, right func(status int, r echoReply) bool) {
		t.Helper()
		s.Eventually(t, time.Minute, func() (bool, string) {
			status, r, err := get(path, header)
			return err == nil && right(status, r), fmt.Sprintf("%s %v: status %d %+v %v", path, header, status, r, err)
		})
	}

	// By prefix.
	want("/orders/1", nil, func(status int, r echoReply) bool { return status == 200 && r.Version == "v1" && r.Path == "/orders/1" })
	want("/catalog/1", nil, func(status int, r echoReply) bool { return status == 200 && r.Version == "" && r.Path == "/catalog/1" })
	want("/other", nil, func(status int, _ echoReply) bool { return status == 404 })

	// By header.
	tester := http.Header{"X-User": {"tester"}}
	want("/orders/1", tester, func(status int, r echoReply) bool { return status == 200 && r.Version == "v2" })
	want("/orders/1", http.Header{"X-User": {"other"}}, func(status int, r echoReply) bool { return status == 200 && r.Version == "v1" })
	// The header decides on this path only.
	want("/catalog/1", tester, func(status int, r echoReply) bool { return status == 200 && r.Version == "" })

	// The timeout.
	want("/orders/limited", nil, func(status int, r echoReply) bool { return status == 200 && r.Version == "v1" })
	if status, r, err := get("/orders/limited?delay=20s", nil); err != nil || status != http.StatusGatewayTimeout {
		t.Errorf("an answer after 20 s on a route of 2 s: status %d %+v %v, want 504", status, r, err)
	}
	// Without the limit the same server's late answer arrives.
	if status, r, err := get("/orders/unlimited?delay=3s", nil); err != nil || status != http.StatusOK {
		t.Errorf("an answer after 3 s on a route without limit: status %d %+v %v, want 200", status, r, err)
	}

	// Retries.
	want("/orders/retried", nil, func(status int, _ echoReply) bool { return status == 200 })
	for _, try := range []struct {
		query           string
		status, attempt int
	}{
		{"status=503&first=2&id=twice", 200, 3},
		// The server would answer this one too, but after the time of one try.
		{"delay=20s&first=1&id=late", 200, 2},
		// One try and three retries are all; the server knows how often it was asked.
		{"status=503&first=100&id=always", 503, 4},
	} {
		status, r, err := get("/orders/retried?"+try.query, nil)
		if err != nil || status != try.status || r.Attempt != try.attempt {
			t.Errorf("%s: status %d at attempt %d, %v, want %d at attempt %d", try.query, status, r.Attempt, err, try.status, try.attempt)
		}
	}
	if status, r, err := get("/orders/1?status=503&first=1&id=once", nil); err != nil || status != 503 || r.Attempt != 1 {
		t.Errorf("a route without retries of 5xx: status %d at attempt %d, %v, want 503 at attempt 1", status, r.Attempt, err)
	}
}
