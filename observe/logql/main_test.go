package logql

import (
	"log/slog"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"polymesh.dev/polymesh/observe/logstore"
	"polymesh.dev/polymesh/observe/logstore/logstoretest"
	"polymesh.dev/polymesh/observe/rowstore"
	"polymesh.dev/polymesh/observe/rowstore/rowstoretest"
)

func TestMain(m *testing.M) { rowstoretest.Main(m) }

// testStart is when the lines of tests begin: in the past, as the store takes nothing from the future, and at a whole minute.
var testStart = time.Now().Add(-3 * time.Hour).Truncate(time.Minute)

// newEngine makes an engine with a real store that has these entries.
func newEngine(t *testing.T, limits Limits, entries []logstore.Entry) *Engine {
	t.Helper()
	store := logstoretest.Open(t, rowstore.Options{Dir: t.TempDir()})
	if len(entries) > 0 {
		require.NoError(t, store.Append(entries))
	}
	return New(store, limits, slog.New(slog.DiscardHandler))
}

// fields makes labels of pairs.
func fields(pairs ...string) []logstore.Field {
	var f []logstore.Field
	for i := 0; i < len(pairs); i += 2 {
		f = append(f, logstore.Field{Name: pairs[i], Value: pairs[i+1]})
	}
	return f
}

// entryOf makes an entry of a line, with labels that many queries name.
func entryOf(line string) logstore.Entry {
	return logstore.Entry{Time: testStart, Line: line, Labels: fields("a", "b", "job", "x"), Metadata: fields("trace_id", "0123")}
}
