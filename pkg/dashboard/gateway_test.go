//go:build integration

package dashboard

import (
	"bufio"
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"polymesh.dev/polymesh/pkg/controlplane/controlplanetest"
)

// From elsewhere the API server decides who may see the store, and passes on nothing but reading.
func TestGateway(t *testing.T) {
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	socket := filepath.Join(t.TempDir(), "s")
	kubeconfig := controlplanetest.StartWith(t, log, map[string]http.Handler{Path: Gateway(socket, log)})
	client, ctx := controlplanetest.Client(t, kubeconfig), t.Context()
	admin, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	as := func(user string) Options {
		config := rest.CopyConfig(admin)
		config.Impersonate = rest.ImpersonationConfig{UserName: user}
		return Options{Remote: true, Cluster: func(context.Context) (*rest.Config, error) { return config, nil }}
	}
	if _, err := open(ctx, as("")); err == nil || !strings.Contains(err.Error(), "does not run on this server") {
		t.Errorf("without a store: %v", err)
	}
	serveStore(t, socket, secretText)

	if _, err := open(ctx, as("alice")); err == nil || !strings.Contains(err.Error(), "--clusterrole="+Role) {
		t.Errorf("a user without permission: %v", err)
	}
	roles := client.RbacV1()
	if _, err := roles.ClusterRoles().Create(ctx, &rbacv1.ClusterRole{
		ObjectMeta: metav1.ObjectMeta{Name: "see"}, Rules: []rbacv1.PolicyRule{{NonResourceURLs: []string{Path + "*"}, Verbs: []string{"get"}}},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := roles.ClusterRoleBindings().Create(ctx, &rbacv1.ClusterRoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: "see"}, RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: "see"},
		Subjects: []rbacv1.Subject{{APIGroup: rbacv1.GroupName, Kind: rbacv1.UserKind, Name: "alice"}},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	controlplanetest.Eventually(t, "a user with permission", func() error {
		s, err := open(ctx, as("alice"))
		if err == nil {
			s.close()
		}
		return err
	})
	d := startOn(t, as("alice"))
	cookie := d.login(t)
	if got := text(t, d.do(t, http.MethodGet, "/", "", cookie)); got != secretText {
		t.Errorf("%q", got)
	}
	got := text(t, d.do(t, http.MethodGet, "/headers?q=%7B%7D", "", cookie, "Impersonate-User: evil", "X-Polymesh-User: evil", "X-Remote-User: evil"))
	if !strings.Contains(got, userHeader+": alice") || strings.Contains(got, "evil") || strings.Contains(got, "Cookie") || !strings.Contains(got, "URL: /headers?q=%7B%7D\r\n") {
		t.Errorf("the store gets\n%s", got)
	}

	// A live tail gets through all of them.
	conn, err := net.Dial("tcp", "127.0.0.1:"+d.port)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprintf(conn, "GET /tail HTTP/1.1\r\nHost: 127.0.0.1:%s\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nOrigin: %s\r\n%s\r\n\r\n", d.port, d.base, cookie)
	in := bufio.NewReader(conn)
	if resp, err := http.ReadResponse(in, nil); err != nil || resp.StatusCode != http.StatusSwitchingProtocols {
		t.Fatalf("%v, %v", resp, err)
	}
	fmt.Fprintln(conn, "a line")
	if line, err := in.ReadString('\n'); err != nil || line != "a line\n" {
		t.Errorf("%q, %v", line, err)
	}

	// Not for browsers, not for writing, and not for strangers.
	transport, err := rest.TransportFor(admin)
	if err != nil {
		t.Fatal(err)
	}
	send := func(method, path string, headers ...string) int {
		t.Helper()
		r, err := http.NewRequest(method, admin.Host+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		for _, h := range headers {
			name, value, _ := strings.Cut(h, ": ")
			r.Header.Set(name, value)
		}
		resp, err := transport.RoundTrip(r)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		return resp.StatusCode
	}
	for what, tc := range map[string]struct {
		status int
		method string
		header string
	}{
		"reading":          {http.StatusOK, http.MethodGet, "Accept: */*"},
		"writing":          {http.StatusMethodNotAllowed, http.MethodPost, "Accept: */*"},
		"deleting":         {http.StatusMethodNotAllowed, http.MethodDelete, "Accept: */*"},
		"a page's request": {http.StatusForbidden, http.MethodGet, "Origin: https://evil.example"},
		"a browser":        {http.StatusForbidden, http.MethodGet, "Sec-Fetch-Site: none"},
	} {
		if got := send(tc.method, Path+"api", tc.header); got != tc.status {
			t.Errorf("%s: %d", what, got)
		}
	}
	anonymous, err := rest.TransportFor(rest.AnonymousClientConfig(admin))
	if err != nil {
		t.Fatal(err)
	}
	transport = anonymous
	if got := send(http.MethodGet, Path); got != http.StatusForbidden && got != http.StatusUnauthorized {
		t.Errorf("a stranger: %d", got)
	}
}
