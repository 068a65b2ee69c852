package page

import (
	"encoding/json"
	"flag"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"testing"

	"github.com/stretchr/testify/require"

	"polymesh.dev/polymesh/observe/rowstore"
)

func TestMain(m *testing.M) {
	flag.Parse()
	if err := rowstore.LimitMemory(32 << 20); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// get answers a request as JSON, and decodes it.
func get[T any](t *testing.T, h http.Handler, path string) T {
	t.Helper()
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
	require.Equal(t, http.StatusOK, w.Code, "%s: %s", path, w.Body.String())
	var v T
	require.NoError(t, json.Unmarshal(w.Body.Bytes(), &v))
	return v
}

func TestAfternoon(t *testing.T) {
	s := newStores(t)
	s.afternoon(t)
	h := s.page(t)
	for _, path := range []string{"overview", "graph", "edge?from-ns=polyglot-services&from=node-service&to-ns=polyglot-services&to=rust-service", "request/" + firstRequest, "traces", "workloads", "workloads/polyglot-services/node-service", "rollouts?window=1d", "rollouts/polyglot-services/java-service?window=1d", "events", "nodes", "marks?window=2h", "extent"} {
		v := get[any](t, h, "/api/polymesh/v1/"+path)
		b, _ := json.MarshalIndent(v, "", " ")
		t.Logf("%s\n%.6000s", path, b)
	}
}
