package tracestore

import (
	"log/slog"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"polymesh.dev/polymesh/observe/rowstore"
	"polymesh.dev/polymesh/observe/rowstore/rowstoretest"
)

func TestMain(m *testing.M) { rowstoretest.Main(m) }

// open opens a store without a limit on spans, in a directory of the test's own.
func open(t *testing.T) *Store {
	t.Helper()
	return openIn(t, t.TempDir())
}

func openIn(t *testing.T, dir string) *Store {
	t.Helper()
	s, err := Open(Options{Dir: dir, Retention: 7 * 24 * time.Hour, MaxBytes: 1 << 30, SpansPerSecond: -1, Log: slog.New(slog.DiscardHandler)})
	require.NoError(t, err)
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func appendAll(t *testing.T, s *Store, spans ...Span) {
	t.Helper()
	r, err := s.Append(spans)
	require.NoError(t, err)
	require.Equal(t, Result{Stored: len(spans)}, r)
}

// settle waits until all that was appended can be seen. What comes fast is not at once.
func settle(t *testing.T, s *Store) {
	t.Helper()
	require.Eventually(t, func() bool {
		var seen int64
		err := s.rows.Query(t.Context(), spans+" | stats count() n", time.Time{}, time.Time{}, func(r rowstore.Row) bool {
			seen, _ = strconv.ParseInt(r.Fields[0].Value, 10, 64)
			return true
		})
		return err == nil && seen == s.Stats().Stored
	}, time.Minute, 50*time.Millisecond)
}
