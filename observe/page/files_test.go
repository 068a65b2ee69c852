package page

import (
	"compress/gzip"
	"io"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// TestFiles is about the built page; without a build only about the text that says so.
func TestFiles(t *testing.T) {
	h := newStores(t).page(t)
	ask := func(path, encoding string) *httptest.ResponseRecorder {
		r := httptest.NewRequest(http.MethodGet, path, nil)
		r.Header.Set("Accept-Encoding", encoding)
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		return w
	}
	plain := ask("/graph", "")
	require.Equal(t, http.StatusOK, plain.Code)
	require.Equal(t, "text/html; charset=utf-8", plain.Header().Get("Content-Type"))
	for _, path := range []string{"/app.js", "/index.html", "/dist/app.js", "/.gitignore", "/nothing"} {
		require.Equal(t, http.StatusNotFound, ask(path, "gzip").Code, path)
	}
	// A browser gets a page with a way back.
	r := httptest.NewRequest(http.MethodGet, "/nonsense", nil)
	r.Header.Set("Accept", "text/html,application/xhtml+xml;q=0.9,*/*;q=0.8")
	mistyped := httptest.NewRecorder()
	h.ServeHTTP(mistyped, r)
	require.Equal(t, http.StatusNotFound, mistyped.Code)
	require.Equal(t, "text/html; charset=utf-8", mistyped.Header().Get("Content-Type"))
	require.Contains(t, mistyped.Body.String(), `<a href="/">`)
	if strings.Contains(plain.Body.String(), "not built") {
		t.Skip("the page is not built: node build.mjs in observe/web")
	}
	require.NotRegexp(t, `<script(>| [^>]*>[^<])|style="| on[a-z]+=`, plain.Body.String(), "nothing that the policy rejects")
	scripts := regexp.MustCompile(`/app-[0-9a-f]{12}\.(?:js|css)`).FindAllString(plain.Body.String(), -1)
	require.Len(t, scripts, 2)
	total := ask("/", "gzip").Body.Len()
	for _, path := range scripts {
		identity, packed, smaller := ask(path, ""), ask(path, "deflate, gzip;q=0.5"), ask(path, "gzip, br")
		require.Empty(t, identity.Header().Get("Content-Encoding"))
		require.Equal(t, "gzip", packed.Header().Get("Content-Encoding"))
		require.Equal(t, "br", smaller.Header().Get("Content-Encoding"))
		require.Empty(t, ask(path, "br;q=0, gzip; q=0").Header().Get("Content-Encoding"))
		require.Contains(t, packed.Header().Get("Cache-Control"), "immutable")
		total += packed.Body.Len()
		unpack, err := gzip.NewReader(packed.Body)
		require.NoError(t, err)
		data, err := io.ReadAll(unpack)
		require.NoError(t, err)
		require.Equal(t, identity.Body.String(), string(data))
	}
	require.Less(t, total, 150_000, "the page is too large")
}
