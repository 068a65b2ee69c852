// Package logstoretest opens stores for tests.
package logstoretest

import (
	"log/slog"
	"testing"

	"github.com/stretchr/testify/require"

	"polymesh.dev/polymesh/observe/logstore"
	"polymesh.dev/polymesh/observe/rowstore"
)

// Open opens a store that is closed when the test ends.
func Open(t testing.TB, o rowstore.Options) *logstore.Store {
	t.Helper()
	s, err := logstore.Open(logstore.Options{Store: o, Log: slog.New(slog.DiscardHandler)})
	require.NoError(t, err)
	t.Cleanup(func() { _ = s.Close() })
	return s
}
