package certificate

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"k8s.io/client-go/tools/clientcmd"
)

var birth = time.Date(2030, time.March, 1, 12, 0, 0, 0, time.UTC)

func options(t *testing.T) Options {
	return Options{
		Dir: filepath.Join(t.TempDir(), "tls"), NodeName: "node-1", NodeIP: netip.MustParseAddr("192.0.2.10"),
		SANs: []string{"API.example.com", "198.51.100.1", "node-1"}, ServiceIP: netip.MustParseAddr("10.43.0.1"),
		ClusterDomain: "cluster.local", Observe: true, Now: birth,
	}
}

func ensure(t *testing.T, o Options) []string {
	t.Helper()
	written, err := Ensure(o)
	if err != nil {
		t.Fatal(err)
	}
	return written
}

// all lists the certificates that authorities sign.
func all(o Options) (names []string) {
	for _, l := range leaves(o) {
		names = append(names, l.name)
	}
	return names
}

// files reads the whole folder.
func files(t *testing.T, dir string) map[string]string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	have := map[string]string{}
	for _, e := range entries {
		text, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		have[e.Name()] = string(text)
	}
	return have
}

func load(t *testing.T, s Store, name string) *x509.Certificate {
	t.Helper()
	pair, err := tls.LoadX509KeyPair(s.Cert(name), s.Key(name))
	if err != nil {
		t.Fatal(err)
	}
	return pair.Leaf
}

// verify checks every certificate as its readers do: only its own authority, use and names are accepted.
func verify(t *testing.T, o Options, at time.Time) {
	t.Helper()
	s := Store(o.Dir)
	for _, l := range leaves(o) {
		c := load(t, s, l.name)
		for _, authority := range authorityNames() {
			pool := x509.NewCertPool()
			pool.AddCert(load(t, s, authority))
			_, err := c.Verify(x509.VerifyOptions{Roots: pool, CurrentTime: at, KeyUsages: []x509.ExtKeyUsage{l.usage}})
			if (err == nil) != (authority == l.authority) {
				t.Errorf("%s by %s: %v", l.name, authority, err)
			}
		}
		for _, host := range l.hosts {
			if err := c.VerifyHostname(host); err != nil {
				t.Error(err)
			}
		}
	}
}

func TestFirstCertificates(t *testing.T) {
	o := options(t)
	if written := ensure(t, o); !slices.Equal(written, all(o)) {
		t.Errorf("written: %q", written)
	}
	verify(t, o, birth)
	s := Store(o.Dir)
	for name, text := range files(t, o.Dir) {
		info, err := os.Stat(filepath.Join(o.Dir, name))
		if err != nil {
			t.Fatal(err)
		}
		want := os.FileMode(0o644)
		if strings.Contains(text, "PRIVATE KEY") {
			want = 0o600
		}
		if info.Mode().Perm() != want {
			t.Errorf("%s has mode %v, want %v", name, info.Mode(), want)
		}
	}
	if info, err := os.Stat(o.Dir); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("the folder has mode %v", info.Mode())
	}
	// The identities of RBAC's bootstrap policy and of the node authorizer.
	for name, want := range map[string]string{
		Admin: "O=system:masters CN=system:admin", Kubelet: "O=system:nodes CN=system:node:node-1", KubeProxy: "O= CN=system:kube-proxy",
		ControllerManager: "O= CN=system:kube-controller-manager", Scheduler: "O= CN=system:kube-scheduler", FrontProxy: "O= CN=system:auth-proxy",
		ImagePolicy: "O= CN=system:polymesh:image-policy", LoadBalancer: "O= CN=system:polymesh:servicelb", Observe: "O= CN=system:polymesh:observe", APIServerKubelet: "O= CN=kube-apiserver-kubelet-client",
	} {
		c := load(t, s, name)
		if got := fmt.Sprintf("O=%s CN=%s", strings.Join(c.Subject.Organization, ","), c.Subject.CommonName); got != want {
			t.Errorf("%s is %s, want %s", name, got, want)
		}
	}
	api := load(t, s, APIServer)
	for _, host := range []string{"kubernetes.default.svc.cluster.local", "localhost", "127.0.0.1", "::1", "10.43.0.1", "node-1", "192.0.2.10", "api.example.com", "198.51.100.1"} {
		if err := api.VerifyHostname(host); err != nil {
			t.Error(err)
		}
	}
}

func TestSecondCallKeepsEverything(t *testing.T) {
	o := options(t)
	ensure(t, o)
	before := files(t, o.Dir)
	for _, at := range []time.Duration{0, 24 * time.Hour, leafLife - renewBefore - time.Minute} {
		o.Now = birth.Add(at)
		if written := ensure(t, o); len(written) > 0 {
			t.Errorf("after %s: written %q", at, written)
		}
	}
	if !maps.Equal(before, files(t, o.Dir)) {
		t.Error("files have changed")
	}
}

// The identity of the store goes with it, and comes back with a new key.
func TestStoreIsTurnedOff(t *testing.T) {
	o := options(t)
	ensure(t, o)
	before := files(t, o.Dir)
	o.Observe = false
	for range 2 {
		if written := ensure(t, o); len(written) > 0 {
			t.Errorf("written %q", written)
		}
	}
	after := maps.Clone(before)
	delete(after, Observe+".crt")
	delete(after, Observe+".key")
	if !maps.Equal(files(t, o.Dir), after) || len(after) != len(before)-2 {
		t.Error("it is still there, or other files have changed")
	}
	o.Observe = true
	if written := ensure(t, o); !slices.Equal(written, []string{Observe}) {
		t.Errorf("written %q", written)
	}
	if files(t, o.Dir)[Observe+".key"] == before[Observe+".key"] {
		t.Error("it has the old key")
	}
}

// If a certificate in the data dir has an old name, or too many groups, the first start replaces it.
func TestRenewedWhenTheIdentityChanges(t *testing.T) {
	for _, old := range []pkix.Name{
		{CommonName: APIServerKubeletUser, Organization: []string{"system:masters"}},
		{CommonName: "system:polymesh"},
	} {
		o := options(t)
		ensure(t, o)
		s := Store(o.Dir)
		client, err := tls.LoadX509KeyPair(s.Cert(ClientCA), s.Key(ClientCA))
		if err != nil {
			t.Fatal(err)
		}
		if err := issue(s, leaf{APIServerKubelet, ClientCA, old, x509.ExtKeyUsageClientAuth, nil, false}, &client, birth); err != nil {
			t.Fatal(err)
		}
		before := authorities(t, o)
		if written := ensure(t, o); !slices.Equal(written, []string{APIServerKubelet}) {
			t.Errorf("%s: written %q", old, written)
		}
		if c := load(t, s, APIServerKubelet); c.Subject.CommonName != APIServerKubeletUser || len(c.Subject.Organization) > 0 {
			t.Errorf("%s: now %s", old, c.Subject)
		}
		verify(t, o, birth)
		if !maps.Equal(before, authorities(t, o)) {
			t.Errorf("%s: an authority was replaced", old)
		}
	}
}

func authorities(t *testing.T, o Options) map[string]string {
	have := files(t, o.Dir)
	maps.DeleteFunc(have, func(name, _ string) bool { return !strings.Contains(name, "-ca.") && name != "service-account.key" })
	if len(have) != 2*len(authorityNames())+1 {
		t.Fatalf("files of authorities: %q", slices.Sorted(maps.Keys(have)))
	}
	return have
}

func TestRenewedBeforeTheEnd(t *testing.T) {
	o := options(t)
	ensure(t, o)
	before := authorities(t, o)
	// Ten years in steps of the longest expected downtime, up to the expiry of the authorities.
	for o.Now = birth; o.Now.Before(birth.Add(authorityLife - leafLife)); o.Now = o.Now.Add(100 * 24 * time.Hour) {
		ensure(t, o)
		verify(t, o, o.Now)
		verify(t, o, o.Now.Add(renewBefore-time.Hour))
	}
	if !maps.Equal(before, authorities(t, o)) {
		t.Error("an authority or the service-account key was replaced")
	}

	// A certificate never outlives its authority.
	o.Now = birth.Add(authorityLife - 24*time.Hour)
	ensure(t, o)
	verify(t, o, o.Now)
	o.Now = birth.Add(authorityLife + time.Hour)
	if _, err := Ensure(o); err == nil || !strings.Contains(err.Error(), "has expired on 2040-02-27") {
		t.Errorf("after the end: %v", err)
	}
	o.Now = birth.Add(-48 * time.Hour)
	if _, err := Ensure(o); err == nil || !strings.Contains(err.Error(), "but the clock shows 2030-02-27 12:00:00: set the clock") {
		t.Errorf("with a clock that is behind: %v", err)
	}
}

func TestRenewedWhenTheMachineChanges(t *testing.T) {
	for what, c := range map[string]struct {
		change func(*Options)
		want   []string
	}{
		"external":    {func(o *Options) { o.External = netip.MustParseAddr("203.0.113.1") }, []string{KubeletServing}},
		"address":     {func(o *Options) { o.NodeIP = netip.MustParseAddr("192.0.2.11") }, []string{APIServer, KubeletServing, EtcdServing}},
		"name":        {func(o *Options) { o.NodeName = "node-2" }, []string{APIServer, KubeletServing, Kubelet, EtcdServing}},
		"SANs":        {func(o *Options) { o.SANs = nil }, []string{APIServer}},
		"services":    {func(o *Options) { o.ServiceIP = netip.MustParseAddr("10.44.0.1") }, []string{APIServer}},
		"domain":      {func(o *Options) { o.ClusterDomain = "example.local" }, []string{APIServer}},
		"nothing":     {func(*Options) {}, nil},
		"case of SAN": {func(o *Options) { o.SANs[0] = "api.EXAMPLE.com" }, nil},
	} {
		t.Run(what, func(t *testing.T) {
			o := options(t)
			ensure(t, o)
			before := authorities(t, o)
			c.change(&o)
			if written := ensure(t, o); !slices.Equal(written, c.want) {
				t.Errorf("written %q, want %q", written, c.want)
			}
			verify(t, o, birth)
			if !maps.Equal(before, authorities(t, o)) {
				t.Error("an authority was replaced")
			}
		})
	}
}

// A start can be interrupted between any two files. The files are written atomically and one after another, so a crash
// leaves a prefix of the list.
func TestCrashBetweenFiles(t *testing.T) {
	done := options(t)
	ensure(t, done)
	s := Store("")
	order := []string{s.ServiceAccountKey()}
	for _, name := range authorityNames() {
		order = append(order, s.Key(name), s.Cert(name))
	}
	for _, name := range all(done) {
		order = append(order, s.Key(name), s.Cert(name))
	}
	whole := files(t, done.Dir)
	if len(order) != len(whole) {
		t.Fatalf("%d files, expected %d", len(whole), len(order))
	}
	for n := range order {
		o := options(t)
		if err := os.MkdirAll(o.Dir, 0o700); err != nil {
			t.Fatal(err)
		}
		for _, name := range order[:n] {
			if err := os.WriteFile(filepath.Join(o.Dir, name), []byte(whole[name]), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		ensure(t, o)
		verify(t, o, birth)
		for _, name := range order[:n] {
			// A key whose certificate is missing is replaced, except an authority's.
			unfinished := name == order[n-1] && !strings.Contains(name, "-ca.")
			if text, err := os.ReadFile(filepath.Join(o.Dir, name)); err != nil || string(text) != whole[name] && !unfinished {
				t.Errorf("after %d files %s was replaced (%v)", n, name, err)
			}
		}
	}
}

// An interrupted renewal leaves the new key with the old certificate.
func TestCrashInRenewal(t *testing.T) {
	o, other := options(t), options(t)
	ensure(t, o)
	ensure(t, other)
	for _, name := range all(o) {
		text, err := os.ReadFile(Store(other.Dir).Key(name))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(Store(o.Dir).Key(name), text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if written := ensure(t, o); !slices.Equal(written, all(o)) {
		t.Errorf("written %q", written)
	}
	verify(t, o, birth)
}

func TestLostAndForeignAuthorities(t *testing.T) {
	damage := map[string]struct {
		do   func(t *testing.T, o Options)
		want string // part of the error; empty: it is repaired
	}{
		"certificate gone, key there": {func(t *testing.T, o Options) { remove(t, Store(o.Dir).Cert(ServerCA)) }, ""},
		"key gone, certificate there": {func(t *testing.T, o Options) { remove(t, Store(o.Dir).Key(ClientCA)) },
			"certificate authority client-ca: open"},
		"certificate cut": {func(t *testing.T, o Options) { overwrite(t, Store(o.Dir).Cert(ServerCA), "-----BEGIN") }, "restore it from a backup, or `polymesh reset` to start over"},
		"key of another": {func(t *testing.T, o Options) {
			overwrite(t, Store(o.Dir).Key(ServerCA), files(t, o.Dir)["client-ca.key"])
		}, "restore it from a backup"},
		"token key broken": {func(t *testing.T, o Options) { overwrite(t, Store(o.Dir).ServiceAccountKey(), "junk") }, "service-account key: "},
		"certificate that cannot be read": {func(t *testing.T, o Options) {
			remove(t, Store(o.Dir).Cert(ServerCA))
			if err := os.Symlink("server-ca.crt", Store(o.Dir).Cert(ServerCA)); err != nil {
				t.Fatal(err)
			}
		}, "too many levels of symbolic links"},
	}
	for what, c := range damage {
		t.Run(what, func(t *testing.T) {
			o := options(t)
			ensure(t, o)
			c.do(t, o)
			before := snapshot(o.Dir)
			// The next start is a second later, so that a new authority would have a different name.
			o.Now = birth.Add(time.Second)
			_, err := Ensure(o)
			if c.want == "" {
				if err != nil {
					t.Fatal(err)
				}
				verify(t, o, o.Now)
				return
			}
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error is %v, want %q", err, c.want)
			}
			if !maps.Equal(before, snapshot(o.Dir)) {
				t.Error("something was replaced")
			}
		})
	}
}

func snapshot(dir string) map[string]string {
	have := map[string]string{}
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		text, err := os.ReadFile(filepath.Join(dir, e.Name()))
		have[e.Name()] = string(text) + fmt.Sprint(err)
	}
	return have
}

func remove(t *testing.T, path string) {
	t.Helper()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
}

func overwrite(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestKubeconfigs(t *testing.T) {
	o := options(t)
	ensure(t, o)
	s := Store(o.Dir)
	dir := t.TempDir()
	portable := filepath.Join(dir, "etc", "admin.yaml")
	for _, mode := range []os.FileMode{0o600, 0o644, 0o600} {
		if err := s.WritePortableKubeconfig(portable, Admin, "https://127.0.0.1:6443", mode); err != nil {
			t.Fatal(err)
		}
		if info, err := os.Stat(portable); err != nil || info.Mode().Perm() != mode {
			t.Errorf("mode is %v, want %v", info.Mode(), mode)
		}
	}
	text, err := os.ReadFile(portable)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(text, []byte(o.Dir)) {
		t.Error("the portable kubeconfig names files of this machine")
	}
	byFiles := filepath.Join(dir, "scheduler.kubeconfig")
	if err := s.WriteKubeconfig(byFiles, Scheduler, "https://127.0.0.1:6443"); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(byFiles); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode is %v", info.Mode())
	}
	for path, want := range map[string]string{portable: "system:admin", byFiles: "system:kube-scheduler"} {
		if got := asks(t, s, path); got != want {
			t.Errorf("%s makes its user %q, want %q", path, got, want)
		}
	}
}

// asks connects through a kubeconfig to a server with the API server's certificate, and returns the user that the server saw.
func asks(t *testing.T, s Store, kubeconfig string) string {
	t.Helper()
	clients := x509.NewCertPool()
	clients.AddCert(load(t, s, ClientCA))
	own, err := tls.LoadX509KeyPair(s.Cert(APIServer), s.Key(APIServer))
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, r.TLS.PeerCertificates[0].Subject.CommonName)
	}))
	now := func() time.Time { return birth.Add(time.Hour) }
	server.TLS = &tls.Config{Certificates: []tls.Certificate{own}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: clients, Time: now}
	server.StartTLS()
	defer server.Close()

	config, err := clientcmd.LoadFromFile(kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	rest, err := clientcmd.NewDefaultClientConfig(*config, &clientcmd.ConfigOverrides{}).ClientConfig()
	if err != nil {
		t.Fatal(err)
	}
	if err := loadFiles(&rest.CAData, rest.CAFile, &rest.CertData, rest.CertFile, &rest.KeyData, rest.KeyFile); err != nil {
		t.Fatal(err)
	}
	pair, err := tls.X509KeyPair(rest.CertData, rest.KeyData)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(rest.CAData)
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{Certificates: []tls.Certificate{pair}, RootCAs: roots, Time: now}}}
	resp, err := client.Get(server.URL)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var b bytes.Buffer
	if _, err := b.ReadFrom(resp.Body); err != nil {
		t.Fatal(err)
	}
	if host, _, _ := net.SplitHostPort(server.Listener.Addr().String()); host != "127.0.0.1" {
		t.Errorf("the server is at %s", host)
	}
	return b.String()
}

// loadFiles fills data from the file in the corresponding field.
func loadFiles(pairs ...any) error {
	var errs []error
	for i := 0; i+1 < len(pairs); i += 2 {
		data, path := pairs[i].(*[]byte), pairs[i+1].(string)
		if path == "" {
			continue
		}
		var err error
		*data, err = os.ReadFile(path)
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

func TestRenewalPublishes(t *testing.T) {
	o := options(t)
	published := 0
	var broken error
	r := NewRenewal(o, func(s Store) error {
		published++
		if _, err := os.Stat(s.Cert(Admin)); err != nil {
			t.Error(err)
		}
		return broken
	}, slog.New(slog.DiscardHandler))
	if err := r.Ensure(birth); err != nil || published != 1 {
		t.Errorf("%v, published %d times", err, published)
	}
	before := load(t, Store(o.Dir), Admin)
	if err := r.Ensure(birth.Add(leafLife - renewBefore + time.Hour)); err != nil || published != 2 {
		t.Errorf("%v, published %d times", err, published)
	}
	if load(t, Store(o.Dir), Admin).Equal(before) {
		t.Error("the certificate was not renewed")
	}
	broken = errors.New("disk full")
	if err := r.Ensure(birth); !errors.Is(err, broken) {
		t.Errorf("error is %v", err)
	}
}

// A second server signs with the first one's authorities, and never mixes them with others.
func TestExportedAuthorities(t *testing.T) {
	one, two := options(t), options(t)
	ensure(t, one)
	authorities, err := EnsureAuthorities(Store(one.Dir), birth)
	if err != nil {
		t.Fatal(err)
	}
	exported, err := authorities.Export()
	if err != nil {
		t.Fatal(err)
	}
	two.NodeName, two.NodeIP = "node-2", netip.MustParseAddr("192.0.2.11")
	for range 2 {
		if err := Import(Store(two.Dir), exported); err != nil {
			t.Fatal(err)
		}
	}
	ensure(t, two)
	verify(t, two, birth)
	for name, text := range exported {
		path := filepath.Join(two.Dir, name)
		if have, err := os.ReadFile(path); err != nil || !bytes.Equal(have, text) {
			t.Errorf("%s is another one (%v)", name, err)
		}
		info, err := os.Stat(path)
		if err != nil || strings.HasSuffix(name, ".key") && info.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %v (%v)", name, info.Mode(), err)
		}
	}
	// The kubelets of both are trusted by either API server.
	pool := x509.NewCertPool()
	pool.AddCert(load(t, Store(one.Dir), KubeletCA))
	if _, err := load(t, Store(two.Dir), KubeletServing).Verify(x509.VerifyOptions{Roots: pool, CurrentTime: birth}); err != nil {
		t.Error(err)
	}

	other := options(t)
	ensure(t, other)
	before := files(t, other.Dir)
	if err := Import(Store(other.Dir), exported); err == nil || !strings.Contains(err.Error(), "it belongs to another cluster") {
		t.Errorf("another cluster's store: %v", err)
	}
	if !maps.Equal(before, files(t, other.Dir)) {
		t.Error("another cluster's store was changed")
	}
	for name := range exported {
		torn := maps.Clone(exported)
		delete(torn, name)
		empty := Store(filepath.Join(t.TempDir(), "tls"))
		if err := Import(empty, torn); err == nil {
			t.Errorf("without %s it is imported", name)
		}
		if _, err := os.Stat(string(empty)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("without %s something is written", name)
		}
	}
}

func TestExpiries(t *testing.T) {
	o := options(t)
	if got, err := Expiries(Store(o.Dir)); len(got) > 0 || err != nil {
		t.Errorf("of an empty store: %v, %v", got, err)
	}
	ensure(t, o)
	got, err := Expiries(Store(o.Dir))
	if err != nil {
		t.Fatal(err)
	}
	authorities := 0
	for i, e := range got {
		if e.Authority {
			authorities++
		}
		if want := load(t, Store(o.Dir), e.Name).NotAfter; !e.Expires.Equal(want) || i > 0 && e.Expires.Before(got[i-1].Expires) {
			t.Errorf("%s: %s, want %s", e.Name, e.Expires, want)
		}
	}
	if len(got) != len(all(o))+len(authorityNames()) || authorities != len(authorityNames()) || got[0].Authority {
		t.Errorf("got %+v", got)
	}
}
