package dashboard

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"k8s.io/client-go/rest"

	"polymesh.dev/polymesh/pkg/observe"
	"polymesh.dev/polymesh/pkg/payload"
)

const (
	// askTimeout is for a store that runs.
	askTimeout = 10 * time.Second
	// openTimeout is for one that opens its files first.
	openTimeout = 2 * time.Minute
	openPoll    = 50 * time.Millisecond
	// endTimeout is how long our own store may take to end.
	endTimeout = 5 * time.Second
)

// store is where the data comes from.
type store struct {
	base      *url.URL // its path ends in a slash
	transport http.RoundTripper
	user      string // sent as userHeader; empty where the API server knows it
	what      string // for people
	close     func()
}

// proxy forwards requests to the store.
func (s *store) proxy() http.Handler {
	p := &httputil.ReverseProxy{
		Transport: s.transport,
		Rewrite: func(p *httputil.ProxyRequest) {
			p.Out.URL.Scheme, p.Out.URL.Host = s.base.Scheme, s.base.Host
			p.Out.URL.Path = s.base.Path + strings.TrimPrefix(p.In.URL.Path, "/")
			p.Out.URL.RawPath = ""
			p.Out.Host = s.base.Host
			stripped(p.Out.Header)
			for name := range p.Out.Header {
				if strings.HasPrefix(name, "Sec-Fetch-") {
					delete(p.Out.Header, name)
				}
			}
			if s.user != "" {
				p.Out.Header.Set(userHeader, url.QueryEscape(s.user))
			}
		},
		ModifyResponse: func(r *http.Response) error {
			cleaned(r.Header)
			harden(r.Header)
			return nil
		},
		FlushInterval: -1,
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, err error) {
			harden(w.Header())
			http.Error(w, "the store does not answer: "+err.Error(), http.StatusBadGateway)
		},
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if readOnly(w, r) {
			clear(w.Header()) // ReverseProxy adds the store's to what is there
			p.ServeHTTP(w, r)
		}
	})
}

// ask requests the store's status, so that a command does not open what does not work.
func (s *store) ask(ctx context.Context) (status int, text string, err error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	u := *s.base
	u.Path += strings.TrimPrefix(statusPath, "/")
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return 0, "", err
	}
	if s.user != "" {
		r.Header.Set(userHeader, url.QueryEscape(s.user))
	}
	resp, err := s.transport.RoundTrip(r)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 1000))
	return resp.StatusCode, strings.TrimSpace(string(body)), err
}

// errNoStore means that a data dir has none.
var errNoStore = errors.New("there is no store")

// open returns the store that o names.
func open(ctx context.Context, o Options) (*store, error) {
	if o.Remote {
		return remote(ctx, o)
	}
	s, err := local(ctx, o)
	if err == nil || o.Local || ctx.Err() != nil || !errors.Is(err, errNoStore) && !errors.Is(err, fs.ErrPermission) {
		return s, err
	}
	s, errRemote := remote(ctx, o)
	if errRemote != nil {
		return nil, fmt.Errorf("%w; and by the API server: %w", err, errRemote)
	}
	return s, nil
}

// local returns the store of this machine: the one that runs, or its files.
func local(ctx context.Context, o Options) (*store, error) {
	s := socketStore(o.DataDir.ObserveSocket(), "the store of this machine")
	status, text, err := s.ask(ctx)
	switch {
	case err == nil && status == http.StatusOK:
		return s, nil
	case err == nil:
		return nil, fmt.Errorf("the store responds with status %d: %s", status, text)
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("the store of this machine is root's: run this with sudo, or with --kubeconfig: %w", fs.ErrPermission)
	case !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.ECONNREFUSED):
		return nil, fmt.Errorf("the store of this machine does not answer: %w", err)
	}
	dir := o.DataDir.Observe()
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w in %s", errNoStore, o.DataDir)
	} else if err != nil {
		return nil, fmt.Errorf("read the store's files: %w", err)
	}
	return files(ctx, o, dir)
}

func socketStore(socket, what string) *store {
	return &store{base: &url.URL{Scheme: "http", Host: "polymesh-observe", Path: "/"}, transport: unixTransport(socket), user: localUser(), what: what, close: func() {}}
}

// localUser is who runs the command, for the store's log.
func localUser() string {
	id := fmt.Sprint(os.Getuid())
	if sudo := os.Getenv("SUDO_UID"); sudo != "" && os.Geteuid() == 0 {
		id = sudo
	}
	if u, err := user.LookupId(id); err == nil {
		return u.Username
	}
	return "uid " + id
}

// files starts the store's program on files that no one writes.
func files(ctx context.Context, o Options, dir string) (*store, error) {
	program, err := o.Program()
	if err != nil {
		return nil, err
	}
	temp, err := os.MkdirTemp("", "polymesh-dashboard-")
	if err != nil {
		return nil, fmt.Errorf("create a folder for the socket: %w", err)
	}
	socket := filepath.Join(temp, "observe.sock")
	s := socketStore(socket, "the files in "+dir+", which no store writes at this time")
	cmd := exec.Command(program, "--read-only", "--data-dir="+dir, "--socket="+socket)
	said := &tail{}
	cmd.Stderr = said
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	cmd.WaitDelay = time.Second
	started, ended := make(chan error, 1), make(chan struct{})
	go func() {
		defer close(ended)
		// The kernel sends Pdeathsig when the thread that created the process exits.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait()
		}
	}()
	s.close = sync.OnceFunc(func() {
		if cmd.Process != nil {
			_ = cmd.Process.Signal(syscall.SIGTERM)
			select {
			case <-ended:
			case <-time.After(endTimeout):
				_ = cmd.Process.Kill()
				<-ended
			}
		}
		os.RemoveAll(temp)
	})
	if err := <-started; err != nil {
		s.close()
		return nil, fmt.Errorf("start the store's program on %s: %w", dir, err)
	}
	limit := time.NewTimer(openTimeout)
	defer limit.Stop()
	for {
		if status, _, err := s.ask(ctx); err == nil && status == http.StatusOK {
			return s, nil
		}
		select {
		case <-ctx.Done():
			s.close()
			return nil, context.Cause(ctx)
		case <-ended:
			s.close()
			return nil, fmt.Errorf("the store's program ended: %s", said)
		case <-limit.C:
			s.close()
			return nil, fmt.Errorf("the store's program has not opened %s within %s: %s", dir, openTimeout, said)
		case <-time.After(openPoll):
		}
	}
}

// tail keeps the end of what a program writes.
type tail struct {
	mu   sync.Mutex
	text []byte
}

func (t *tail) Write(p []byte) (int, error) {
	const most = 2000
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.text = append(t.text, p...); len(t.text) > most {
		t.text = append([]byte(nil), t.text[len(t.text)-most:]...)
	}
	return len(p), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	lines := strings.Split(strings.TrimSpace(string(t.text)), "\n")
	return lines[len(lines)-1]
}

// remote returns the store of a cluster, by its API server.
func remote(ctx context.Context, o Options) (*store, error) {
	config, err := o.Cluster(ctx)
	if err != nil {
		return nil, err
	}
	config = rest.CopyConfig(config)
	// WebSocket needs HTTP/1.1.
	config.NextProtos = []string{"http/1.1"}
	transport, err := rest.TransportFor(config)
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", config.Host, err)
	}
	base, _, err := rest.DefaultServerUrlFor(config)
	if err != nil {
		return nil, fmt.Errorf("the address %q of the API server: %w", config.Host, err)
	}
	base.Path = strings.TrimSuffix(base.Path, "/") + Path
	s := &store{base: base, transport: transport, what: "the store of the cluster at " + config.Host, close: func() {}}
	status, text, err := s.ask(ctx)
	switch {
	case err != nil:
		return nil, fmt.Errorf("the cluster at %s does not answer: %w", config.Host, err)
	case status == http.StatusOK:
		return s, nil
	case status == http.StatusUnauthorized:
		return nil, fmt.Errorf("the cluster at %s does not know the user of the kubeconfig", config.Host)
	case status == http.StatusForbidden:
		return nil, fmt.Errorf("the user of the kubeconfig may not see the store of %s: an administrator can allow it with `kubectl create clusterrolebinding NAME --clusterrole=%s --user=USER`", config.Host, Role)
	case status == http.StatusNotFound:
		return nil, fmt.Errorf("the cluster at %s has no store: its servers run with --disable observe", config.Host)
	}
	return nil, fmt.Errorf("the store of the cluster at %s responds with status %d: %s", config.Host, status, text)
}

// ShippedProgram returns the store's program, which it unpacks if only the main program was.
func ShippedProgram() (string, error) {
	dir := payload.Dir(os.Getenv(payload.EnvDir))
	path := dir.Bin(observe.Program)
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}
	file, err := payload.Shipped()
	if err != nil {
		return "", fmt.Errorf("find the store's program: %w", err)
	}
	p, err := payload.Open(file)
	if err != nil {
		return "", err
	}
	defer p.Close()
	if err := p.Unpack(dir, []string{"bin/" + observe.Program}); err != nil {
		return "", err
	}
	return path, nil
}
