package dashboard

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"k8s.io/client-go/rest"

	"polymesh.dev/polymesh/pkg/layout"
)

// socketDir returns a data dir with a folder for its sockets.
func socketDir(t *testing.T) layout.DataDir {
	t.Helper()
	dir := layout.DataDir(t.TempDir())
	if err := os.MkdirAll(dir.Run(), 0o700); err != nil {
		t.Skip("cannot create the folder of sockets: ", err)
	}
	t.Cleanup(func() { os.RemoveAll(dir.Run()) })
	return dir
}

// storeHandler answers like a store: with its status, its text, what it was sent, and an echo on a WebSocket.
func storeHandler(text string) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+statusPath, func(http.ResponseWriter, *http.Request) {})
	mux.HandleFunc("GET /headers", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Set-Cookie", "a=b")
		w.Header().Set("Access-Control-Allow-Origin", "*")
		w.Header().Set("Content-Security-Policy", "default-src 'self'")
		_ = r.Header.Write(w)
		fmt.Fprintf(w, "URL: %s\r\n", r.URL)
	})
	mux.HandleFunc("GET /tail", func(w http.ResponseWriter, r *http.Request) {
		conn, rw, err := http.NewResponseController(w).Hijack()
		if err != nil {
			panic(err)
		}
		defer conn.Close()
		fmt.Fprintf(rw, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: %s\r\n\r\n", r.Header.Get("Upgrade"))
		rw.Flush()
		_, _ = io.Copy(conn, rw)
	})
	mux.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, text) })
	return mux
}

func serveStore(t *testing.T, socket, text string) {
	t.Helper()
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: storeHandler(text)}
	go func() { _ = server.Serve(l) }()
	t.Cleanup(func() { server.Close() })
}

// storeProgram is the store's program on files.
func storeProgram(args []string) {
	values := map[string]string{}
	for _, a := range args {
		name, value, _ := strings.Cut(a, "=")
		values[name] = value
	}
	text, err := os.ReadFile(filepath.Join(values["--data-dir"], "text"))
	if _, readOnly := values["--read-only"]; err != nil || !readOnly {
		fmt.Fprintf(os.Stderr, "first line\ncannot open the files: %v\n", err)
		os.Exit(1)
	}
	l, err := net.Listen("unix", values["--socket"])
	if err != nil {
		panic(err)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	go func() { _ = http.Serve(l, storeHandler(string(text))) }()
	<-ctx.Done()
	if err := os.WriteFile(os.Getenv("POLYMESH_TEST_ENDED"), nil, 0o600); err != nil {
		panic(err)
	}
}

func TestWhatTheStoreGets(t *testing.T) {
	d := started(t)
	cookie := d.login(t)
	r := d.do(t, http.MethodGet, "/headers?q=%7B%7D&a=b", "", cookie, "Authorization: Bearer x", "X-Polymesh-User: evil", "X-Forwarded-For: 1.2.3.4", "X-Remote-User: evil",
		"Origin: "+d.base, "Sec-Fetch-Site: same-origin", "Accept-Encoding: br")
	got := text(t, r)
	for _, no := range []string{"Cookie", "Authorization", "evil", "1.2.3.4", "Origin", "Sec-Fetch"} {
		if strings.Contains(got, no) {
			t.Errorf("the store gets %s:\n%s", no, got)
		}
	}
	for _, yes := range []string{userHeader + ": ", "Accept-Encoding: br", "URL: /headers?q=%7B%7D&a=b"} {
		if !strings.Contains(got, yes) {
			t.Errorf("the store does not get %s:\n%s", yes, got)
		}
	}
	if len(r.Cookies()) > 0 || r.Header.Get("Access-Control-Allow-Origin") != "" {
		t.Errorf("headers of the store that let others in: %v", r.Header)
	}
	if csp := r.Header.Values("Content-Security-Policy"); len(csp) != 1 || csp[0] != "default-src 'self'" || r.Header.Get("X-Content-Type-Options") != "nosniff" {
		t.Errorf("headers %v", r.Header)
	}
}

func TestWebSocket(t *testing.T) {
	d := started(t)
	cookie := d.login(t)
	upgrade := func(protocol string) (net.Conn, *bufio.Reader, int) {
		t.Helper()
		conn, err := net.Dial("tcp", "127.0.0.1:"+d.port)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		fmt.Fprintf(conn, "GET /tail HTTP/1.1\r\nHost: 127.0.0.1:%s\r\nConnection: Upgrade\r\nUpgrade: %s\r\nOrigin: %s\r\n%s\r\n\r\n", d.port, protocol, d.base, cookie)
		in := bufio.NewReader(conn)
		resp, err := http.ReadResponse(in, nil)
		if err != nil {
			t.Fatal(err)
		}
		return conn, in, resp.StatusCode
	}
	conn, in, status := upgrade("websocket")
	if status != http.StatusSwitchingProtocols {
		t.Fatalf("status %d", status)
	}
	fmt.Fprintln(conn, "a line")
	if line, err := in.ReadString('\n'); err != nil || line != "a line\n" {
		t.Errorf("%q, %v", line, err)
	}
	if _, _, status := upgrade("h2c"); status != http.StatusBadRequest {
		t.Errorf("another protocol: %d", status)
	}
}

// Without a store that runs, its files are opened, by its own program, which ends with the command.
func TestFiles(t *testing.T) {
	dir := socketDir(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	o := Options{DataDir: dir, Local: true, Program: func() (string, error) { return self, nil }}
	if _, err := open(t.Context(), o); !errors.Is(err, errNoStore) {
		t.Errorf("an empty data dir: %v", err)
	}
	if err := os.MkdirAll(dir.Observe(), 0o700); err != nil {
		t.Fatal(err)
	}
	ended := filepath.Join(t.TempDir(), "ended")
	t.Setenv(roleVar, "store")
	t.Setenv("POLYMESH_TEST_ENDED", ended)
	if _, err := open(t.Context(), o); err == nil || !strings.Contains(err.Error(), "cannot open the files") {
		t.Errorf("damaged files: %v", err)
	}
	if err := os.WriteFile(dir.Observe("text"), []byte("yesterday"), 0o600); err != nil {
		t.Fatal(err)
	}
	d := startOn(t, o)
	if got := text(t, d.do(t, http.MethodGet, "/", "", d.login(t))); got != "yesterday" {
		t.Errorf("%q", got)
	}
	if err := d.stop(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(ended); err != nil {
		t.Errorf("the program was not ended: %v", err)
	}
}

// Where this machine has none, it is the cluster's; where a data dir is named, it is that one's.
func TestWhichStore(t *testing.T) {
	dir := socketDir(t)
	asked := 0
	o := Options{DataDir: dir, Cluster: func(context.Context) (*rest.Config, error) { asked++; return nil, errors.New("no cluster") }}
	if _, err := open(t.Context(), o); !errors.Is(err, errNoStore) || !strings.Contains(err.Error(), "no cluster") || asked != 1 {
		t.Errorf("%v, asked %d times", err, asked)
	}
	o.Local = true
	if _, err := open(t.Context(), o); !errors.Is(err, errNoStore) || asked != 1 {
		t.Errorf("%v, asked %d times", err, asked)
	}
	serveStore(t, dir.ObserveSocket(), "x")
	o.Local, o.Remote = false, true
	if _, err := open(t.Context(), o); err == nil || asked != 2 {
		t.Errorf("%v, asked %d times", err, asked)
	}
}
