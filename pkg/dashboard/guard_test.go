package dashboard

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"k8s.io/client-go/rest"
)

// The test binary itself is the store's program, and another user's client.
const roleVar = "POLYMESH_TEST_ROLE"

func TestMain(m *testing.M) {
	switch os.Getenv(roleVar) {
	case "store":
		storeProgram(os.Args[1:])
	case "client":
		// URL, then headers NAME: VALUE; a POST of the last argument, where it is no header.
		if err := client(os.Args[1], os.Args[2:]); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
	default:
		os.Exit(m.Run())
	}
}

func client(url string, args []string) error {
	method, body, header := http.MethodGet, "", http.Header{}
	for _, a := range args {
		if name, value, ok := strings.Cut(a, ": "); ok {
			header.Set(name, value)
		} else {
			method, body = http.MethodPost, a
		}
	}
	r, err := http.NewRequest(method, url, strings.NewReader(body))
	if err != nil {
		return err
	}
	r.Header = header
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	fmt.Println(resp.StatusCode, string(text))
	return err
}

// running is a dashboard on a port.
type running struct {
	base, token, port string
	stop              func() error
}

// startOn runs the command on a data dir, and returns when it has printed its address.
func startOn(t *testing.T, o Options) *running {
	t.Helper()
	in, out := io.Pipe()
	o.Out, o.Log, o.Address = out, io.Discard, netip.MustParseAddr("127.0.0.1")
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() {
		err := Run(ctx, o)
		out.CloseWithError(io.EOF)
		ended <- err
	}()
	stop := func() error { cancel(); err := <-ended; ended <- err; return err }
	t.Cleanup(func() {
		if err := stop(); err != nil {
			t.Error(err)
		}
	})
	line, err := bufio.NewReader(in).ReadString('\n')
	if err != nil {
		t.Fatal(stop())
	}
	base, token, ok := strings.Cut(strings.TrimSpace(line), "/#t=")
	if !ok || len(token) < 43 {
		t.Fatalf("the address is %q", line)
	}
	return &running{base, token, base[strings.LastIndex(base, ":")+1:], stop}
}

// do sends a request, with a host of its own if it has the header Host.
func (d *running) do(t *testing.T, method, path, body string, headers ...string) *http.Response {
	t.Helper()
	r, err := http.NewRequest(method, d.base+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	for _, h := range headers {
		name, value, _ := strings.Cut(h, ": ")
		if name == "Host" {
			r.Host = value
			continue
		}
		r.Header.Set(name, value)
	}
	resp, err := http.DefaultTransport.RoundTrip(r)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { resp.Body.Close() })
	return resp
}

func text(t *testing.T, r *http.Response) string {
	t.Helper()
	b, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// login uses the token, and returns the cookie as a header.
func (d *running) login(t *testing.T) string {
	t.Helper()
	r := d.do(t, http.MethodPost, sessionPath, d.token)
	if r.StatusCode != http.StatusNoContent || len(r.Cookies()) != 1 {
		t.Fatalf("status %d: %s", r.StatusCode, text(t, r))
	}
	c := r.Cookies()[0]
	if !c.HttpOnly || c.SameSite != http.SameSiteStrictMode || c.Path != "/" || c.Name != "polymesh-dashboard-"+d.port {
		t.Errorf("cookie %+v", c)
	}
	return "Cookie: " + c.Name + "=" + c.Value
}

const secretText = "what only the user may see"

// started is a dashboard in front of a store on a socket.
func started(t *testing.T) *running {
	t.Helper()
	dir := socketDir(t)
	serveStore(t, dir.ObserveSocket(), secretText)
	return startOn(t, Options{DataDir: dir, Local: true, Cluster: func(context.Context) (*rest.Config, error) { return nil, fmt.Errorf("no cluster") }})
}

func TestToken(t *testing.T) {
	d := started(t)
	// Without it there is a page that uses it, and nothing of the store.
	r := d.do(t, http.MethodGet, "/graph?ns=shop", "")
	if page := text(t, r); r.StatusCode != http.StatusUnauthorized || strings.Contains(page, secretText) || !strings.Contains(page, scriptPath) {
		t.Errorf("%d: %s", r.StatusCode, page)
	}
	if csp := r.Header.Get("Content-Security-Policy"); !strings.Contains(csp, "default-src 'none'") || !strings.Contains(csp, "frame-ancestors 'none'") {
		t.Errorf("policy %q", csp)
	}
	if r := d.do(t, http.MethodGet, scriptPath, ""); r.StatusCode != http.StatusOK || !strings.Contains(r.Header.Get("Content-Type"), "javascript") {
		t.Errorf("the script: %d, %s", r.StatusCode, r.Header.Get("Content-Type"))
	}
	for _, wrong := range []string{"", "x", strings.Repeat("A", 43), d.token + "A", d.token[1:], strings.Repeat("A", 1<<20)} {
		if r := d.do(t, http.MethodPost, sessionPath, wrong); r.StatusCode < 400 || len(r.Cookies()) > 0 {
			t.Errorf("a wrong token: %d", r.StatusCode)
		}
	}
	cookie := d.login(t)
	if r := d.do(t, http.MethodGet, "/", "", cookie); r.StatusCode != http.StatusOK || text(t, r) != secretText {
		t.Errorf("with the cookie: %d", r.StatusCode)
	}
	// It works once.
	if r := d.do(t, http.MethodPost, sessionPath, d.token); r.StatusCode != http.StatusForbidden || len(r.Cookies()) > 0 {
		t.Errorf("a replay: %d", r.StatusCode)
	}
	for _, c := range []string{"Cookie: polymesh-dashboard-" + d.port + "=", "Cookie: polymesh-dashboard-1=" + strings.SplitN(cookie, "=", 2)[1], cookie + "A"} {
		if r := d.do(t, http.MethodGet, "/", "", c); r.StatusCode != http.StatusUnauthorized {
			t.Errorf("%s: %d", c, r.StatusCode)
		}
	}
	if err := d.stop(); err != nil {
		t.Error(err)
	}
	if _, err := net.Dial("tcp", "127.0.0.1:"+d.port); err == nil {
		t.Error("the port is open after the end")
	}
}

// What a browser sends for other pages gets nothing, also with the cookie.
func TestOtherPages(t *testing.T) {
	d := started(t)
	cookie := d.login(t)
	for what, headers := range map[string][]string{
		"a name that leads here (DNS rebinding)": {"Host: evil.example:" + d.port},
		"the same without a port":                {"Host: evil.example"},
		"a name like ours":                       {"Host: localhost.evil.example:" + d.port},
		"another address":                        {"Host: 192.0.2.1:" + d.port},
		"no name":                                {"Host: :" + d.port},
		"another page's request":                 {"Origin: https://evil.example"},
		"a page of another local port":           {"Origin: http://127.0.0.1:1", "Sec-Fetch-Site: same-site"},
		"localhost is another origin":            {"Origin: http://localhost:" + d.port},
		"a sandboxed page":                       {"Origin: null"},
		"an image in another page":               {"Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: no-cors", "Sec-Fetch-Dest: image"},
		"a frame in another page":                {"Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: navigate", "Sec-Fetch-Dest: iframe"},
		"a script of another local port":         {"Sec-Fetch-Site: same-site", "Sec-Fetch-Mode: cors", "Sec-Fetch-Dest: empty"},
	} {
		r := d.do(t, http.MethodGet, "/", "", append(headers, cookie)...)
		if got := text(t, r); r.StatusCode != http.StatusForbidden || strings.Contains(got, secretText) {
			t.Errorf("%s: %d %q", what, r.StatusCode, got)
		}
		if r.Header.Get("Access-Control-Allow-Origin") != "" {
			t.Errorf("%s: CORS", what)
		}
	}
	// A link on another page gets the door, which requests the page again.
	link := []string{"Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: navigate", "Sec-Fetch-Dest: document", cookie}
	if got := text(t, d.do(t, http.MethodGet, "/graph", "", link...)); strings.Contains(got, secretText) || !strings.Contains(got, scriptPath) {
		t.Errorf("a link: %q", got)
	}
	for what, headers := range map[string][]string{
		"the page's own request": {"Origin: " + d.base, "Sec-Fetch-Site: same-origin"},
		"typed by the user":      {"Sec-Fetch-Site: none", "Sec-Fetch-Mode: navigate", "Sec-Fetch-Dest: document"},
		"by its name":            {"Host: localhost:" + d.port, "Origin: http://localhost:" + d.port},
		"through an SSH tunnel":  {"Host: 127.0.0.1:9999", "Origin: http://127.0.0.1:9999", "Sec-Fetch-Site: same-origin"},
	} {
		if r := d.do(t, http.MethodGet, "/", "", append(headers, cookie)...); r.StatusCode != http.StatusOK {
			t.Errorf("%s: %d", what, r.StatusCode)
		}
	}
	// Another page cannot use the token either.
	if r := d.do(t, http.MethodPost, sessionPath, d.token, "Origin: http://127.0.0.1:1"); r.StatusCode != http.StatusForbidden {
		t.Errorf("the token from another page: %d", r.StatusCode)
	}
}

func TestReadOnly(t *testing.T) {
	d := started(t)
	cookie := d.login(t)
	for _, method := range []string{http.MethodPost, http.MethodPut, http.MethodPatch, http.MethodDelete, http.MethodOptions, http.MethodConnect, http.MethodTrace} {
		if method == http.MethodConnect {
			continue // of proxies
		}
		if r := d.do(t, method, "/loki/api/v1/push", "x", cookie); r.StatusCode != http.StatusMethodNotAllowed {
			t.Errorf("%s: %d", method, r.StatusCode)
		}
	}
}

// Another user of the machine has neither the token nor, with it, the cookie's user.
func TestOtherUser(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	d := started(t)
	cookie := d.login(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	// The folder of the test binary is root's.
	binary, err := os.ReadFile(self)
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("/tmp", "dashboard-client-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	file := dir + "/client"
	if err := os.WriteFile(file, binary, 0o755); err != nil {
		t.Fatal(err)
	}
	as := func(uid uint32, args ...string) string {
		t.Helper()
		cmd := exec.Command(file, args...)
		cmd.Dir = "/"
		cmd.Env = []string{roleVar + "=client"}
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		return string(out)
	}
	const nobody = 65534
	if got := as(nobody, d.base+"/", cookie); !strings.HasPrefix(got, "401 ") || strings.Contains(got, secretText) {
		t.Errorf("a stolen cookie: %s", got)
	}
	if got := as(0, d.base+"/", cookie); !strings.HasPrefix(got, "200 ") || !strings.Contains(got, secretText) {
		t.Errorf("the user's own: %s", got)
	}
	if got := as(nobody, d.base+sessionPath, d.token); !strings.HasPrefix(got, "403 ") {
		t.Errorf("a used token: %s", got)
	}
	// The dashboard of a user who is not root: no one else's connection counts, even with the token.
	g := newGuard(http.NotFoundHandler(), 1, nobody)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: g, ConnContext: withConn}
	go func() { _ = server.Serve(l) }()
	t.Cleanup(func() { server.Close() })
	if got := as(1, "http://"+l.Addr().String()+sessionPath, g.token); !strings.HasPrefix(got, "403 ") || !strings.Contains(got, "another user") {
		t.Errorf("a stolen token: %s", got)
	}
	if got := as(nobody, "http://"+l.Addr().String()+sessionPath, g.token); !strings.HasPrefix(got, "204 ") {
		t.Errorf("its user: %s", got)
	}
}

// A packet that comes from elsewhere, as from a pod by a rule that leads to the loopback.
func TestPod(t *testing.T) {
	for remote, want := range map[string]bool{
		"10.42.0.7:4000": false, "192.0.2.1:4000": false, "[2001:db8::1]:4000": false, "[::ffff:10.42.0.7]:4000": false, "@": false,
		"127.0.0.1:4000": true, "[::1]:4000": true,
	} {
		r := &http.Request{RemoteAddr: remote, Host: "127.0.0.1:1", Header: http.Header{}}
		if got := foreign(r) == ""; got != want {
			t.Errorf("%s: %t", remote, got)
		}
	}
}

func TestPeer(t *testing.T) {
	for _, address := range []string{"127.0.0.1:0", "[::1]:0"} {
		l, err := net.Listen("tcp", address)
		if err != nil {
			t.Logf("%s: %v", address, err)
			continue
		}
		defer l.Close()
		out, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		in, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		local, remote := in.LocalAddr().(*net.TCPAddr).AddrPort(), in.RemoteAddr().(*net.TCPAddr).AddrPort()
		if uid, err := peerOf(local, remote); err != nil || uid != os.Getuid() {
			t.Errorf("%s: %d, %v", address, uid, err)
		}
		if _, err := peerOf(local, netip.AddrPortFrom(remote.Addr(), 1)); err == nil {
			t.Error("a connection that there is not has a user")
		}
		// One that is closed is no one's: the kernel reports user 0 for it.
		out.Close()
		if uid, err := peerOf(local, remote); err == nil {
			t.Errorf("%s: a closed connection is user %d's", address, uid)
		}
		in.Close()
	}
	lines := bufio.NewScanner(bytes.NewReader([]byte("  sl  local_address rem_address\n\n 1: x y\n 2: 0100007F:0050 zz 01 0 0 0 0 0 7\n 3: 01:1 01:1 1 1 1 1 0 0 5\n")))
	if _, ok := findPeer(lines, netip.MustParseAddrPort("127.0.0.1:1"), netip.MustParseAddrPort("127.0.0.1:80")); ok {
		t.Error("found in nonsense")
	}
}
