package main

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	testpb "google.golang.org/grpc/interop/grpc_testing"
)

// headers collects every -H of a command line.
type headers http.Header

func (h headers) String() string { return "" }

func (h headers) Set(line string) error {
	name, value, ok := strings.Cut(line, ":")
	if !ok {
		return fmt.Errorf("%q is not \"Name: value\"", line)
	}
	http.Header(h).Add(name, strings.TrimSpace(value))
	return nil
}

// summary is what `get -n` prints: how often each answer came, and from which version and pod.
type summary struct {
	Status   map[int]int    `json:"status"`
	Versions map[string]int `json:"versions"`
	Pods     map[string]int `json:"pods"`
	Errors   map[string]int `json:"errors"`
	// Traced counts the requests that were marked as traced for the server, in W3C's way.
	Traced int `json:"traced"`

	mu sync.Mutex
}

func (s *summary) add(status int, answer string, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil {
		s.Errors[err.Error()]++
		return
	}
	s.Status[status]++
	var said reply
	if json.Unmarshal([]byte(answer), &said) == nil {
		s.Versions[said.Version]++
		s.Pods[said.Pod]++
		if strings.HasSuffix(http.Header(said.Headers).Get("traceparent"), "-01") {
			s.Traced++
		}
	}
}

// failures are the answers that are missing or that are 400 and above.
func (s *summary) failures() int {
	failed := 0
	for _, count := range s.Errors {
		failed += count
	}
	for status, count := range s.Status {
		if status >= http.StatusBadRequest {
			failed += count
		}
	}
	return failed
}

// get sends a request and prints the answer's body; with -n it sends many, -c of them at once, and prints a summary.
// It fails where an answer is missing or is 400 and above.
func get(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("get", flag.ContinueOnError)
	header := headers{}
	flags.Var(header, "H", "header, \"Name: value\"; may be repeated")
	method := flags.String("X", http.MethodGet, "method")
	body := flags.String("d", "", "body")
	n := flags.Int("n", 1, "how many requests")
	concurrent := flags.Int("c", 1, "how many of them at once, each on a connection of its own")
	perSecond := flags.Float64("r", 0, "how many of them in a second at most, 0 for any number")
	keep := flags.Bool("k", true, "keep connections")
	timeout := flags.Duration("timeout", 10*time.Second, "for each request")
	cert := flags.String("cert", "", "certificate to show to an https server, whose own is not checked")
	key := flags.String("key", "", "the certificate's key")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() != 1 {
		return fmt.Errorf("get: one URL is needed, got %q", flags.Args())
	}
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.Proxy = nil
	transport.DisableKeepAlives = !*keep
	if *cert != "" {
		pair, err := tls.LoadX509KeyPair(*cert, *key)
		if err != nil {
			return fmt.Errorf("get: %w", err)
		}
		// A mesh certificate names no host.
		transport.TLSClientConfig = &tls.Config{Certificates: []tls.Certificate{pair}, InsecureSkipVerify: true}
	}
	transport.MaxIdleConns, transport.MaxIdleConnsPerHost = *concurrent, *concurrent
	client := &http.Client{Transport: transport, Timeout: *timeout}
	url := flags.Arg(0)

	if *n == 1 {
		status, answer, err := send(ctx, client, *method, url, *body, http.Header(header))
		fmt.Print(answer)
		if err == nil && status >= http.StatusBadRequest {
			err = fmt.Errorf("status %d", status)
		}
		return err
	}
	seen := summary{Status: map[int]int{}, Versions: map[string]int{}, Pods: map[string]int{}, Errors: map[string]int{}}
	pace := rate.NewLimiter(rate.Inf, 0)
	if *perSecond > 0 {
		pace = rate.NewLimiter(rate.Limit(*perSecond), 1)
	}
	var workers sync.WaitGroup
	var sent atomic.Int64
	for range *concurrent {
		workers.Go(func() {
			for sent.Add(1) <= int64(*n) && pace.Wait(ctx) == nil {
				seen.add(send(ctx, client, *method, url, *body, http.Header(header)))
			}
		})
	}
	workers.Wait()
	if err := json.NewEncoder(os.Stdout).Encode(&seen); err != nil {
		return err
	}
	if failed := seen.failures(); failed > 0 {
		return fmt.Errorf("%d of %d requests failed", failed, *n)
	}
	return nil
}

func send(ctx context.Context, client *http.Client, method, url, body string, header http.Header) (int, string, error) {
	request, err := http.NewRequestWithContext(ctx, method, url, strings.NewReader(body))
	if err != nil {
		return 0, "", err
	}
	request.Header = header.Clone()
	request.Host = header.Get("Host")
	response, err := client.Do(request)
	if err != nil {
		return 0, "", err
	}
	defer response.Body.Close()
	answer, err := io.ReadAll(response.Body)
	return response.StatusCode, string(answer), err
}

// callGRPC prints what the server saw of a gRPC call.
func callGRPC(ctx context.Context, args []string) error {
	if len(args) != 1 {
		return fmt.Errorf("grpc: one ADDRESS is needed, got %q", args)
	}
	connection, err := grpc.NewClient("dns:///"+args[0], grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return fmt.Errorf("grpc: %w", err)
	}
	defer connection.Close()
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	response, err := testpb.NewTestServiceClient(connection).UnaryCall(ctx, &testpb.SimpleRequest{})
	if err != nil {
		return fmt.Errorf("grpc: call %s: %w", args[0], err)
	}
	fmt.Println(string(response.GetPayload().GetBody()))
	return nil
}

// callTCP sends TEXT and prints what comes back. With -hold the connection then stays open until the standard input ends.
func callTCP(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("tcp", flag.ContinueOnError)
	hold := flags.Bool("hold", false, "keep the connection open until the standard input ends")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if args = flags.Args(); len(args) != 2 {
		return fmt.Errorf("tcp: ADDRESS and TEXT are needed, got %q", args)
	}
	dialer := net.Dialer{Timeout: 10 * time.Second}
	connection, err := dialer.DialContext(ctx, "tcp", args[0])
	if err != nil {
		return fmt.Errorf("tcp: %w", err)
	}
	defer connection.Close()
	if err := connection.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return fmt.Errorf("tcp: %w", err)
	}
	if _, err := io.WriteString(connection, args[1]); err != nil {
		return fmt.Errorf("tcp: write to %s: %w", args[0], err)
	}
	answer := make([]byte, len(args[1]))
	if _, err := io.ReadFull(connection, answer); err != nil {
		return fmt.Errorf("tcp: read from %s: %w", args[0], err)
	}
	fmt.Println(string(answer))
	if *hold {
		_, err := io.Copy(io.Discard, os.Stdin)
		return err
	}
	return nil
}
