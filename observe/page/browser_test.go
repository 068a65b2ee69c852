package page

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"polymesh.dev/polymesh/observe/logstore"
)

// TestServe serves the made-up afternoon to people who work on the page: PAGE_LISTEN=127.0.0.1:8099 go test -run TestServe -timeout 0 ./page
func TestServe(t *testing.T) {
	address := os.Getenv("PAGE_LISTEN")
	if address == "" {
		t.Skip("PAGE_LISTEN is not set")
	}
	s := newStores(t)
	s.afternoon(t)
	listener, err := net.Listen("tcp", address)
	require.NoError(t, err)
	t.Logf("http://%s", listener.Addr())
	go s.talk(t.Context())
	require.NoError(t, http.Serve(listener, s.page(t)))
}

// TestBrowser opens every view of the built page in a browser: observe/web/test/browser.mjs has the checks. It needs Chromium, Node.js, the page's
// packages (npm ci --ignore-scripts) and the built page (node build.mjs).
func TestBrowser(t *testing.T) {
	if testing.Short() {
		t.Skip("runs for minutes, and TestPolyglot of the end-to-end tests opens the page of a cluster")
	}
	web, err := filepath.Abs("../web")
	require.NoError(t, err)
	chromium := "/usr/bin/chromium"
	for _, needed := range []string{chromium, filepath.Join(web, "node_modules"), "dist/index.html.gz"} {
		if _, err := os.Stat(needed); err != nil {
			t.Skipf("%s is missing", needed)
		}
	}
	s := newStores(t)
	s.afternoon(t)
	server := httptest.NewServer(s.page(t))
	defer server.Close()
	go s.talk(t.Context())
	cmd := exec.CommandContext(t.Context(), "node", "test/browser.mjs", server.URL, chromium)
	cmd.Dir = web
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
	t.Logf("%s", out)
}

// talk writes a line now and then, for who follows a log. Its time is later than what queries ask for.
func (s *stores) talk(ctx context.Context) {
	for i := 0; ; i++ {
		select {
		case <-ctx.Done():
			return
		case <-time.After(300 * time.Millisecond):
		}
		at := fixtureNow.Add(time.Hour + time.Duration(i)*time.Millisecond)
		_ = s.logs.Append([]logstore.Entry{{Time: at, Labels: fields("job", "pods", "namespace", "talk", "workload", "talker", "pod", "talker-0"), Line: fmt.Sprintf("line %d", i)}}) // the store may be closed
	}
}
