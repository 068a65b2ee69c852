package podlogs

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"polymesh.dev/polymesh/observe/logstore"
	"polymesh.dev/polymesh/observe/rowstore"
	"polymesh.dev/polymesh/observe/rowstore/rowstoretest"
)

// childEnv names the directory in which a test's child process reads logs until it is killed.
const childEnv = "PODLOGS_TEST_CHILD"

func TestMain(m *testing.M) {
	rowstoretest.LimitMemory()
	if dir := os.Getenv(childEnv); dir != "" {
		fmt.Fprintln(os.Stderr, readForever(dir))
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// readForever is the child.
func readForever(dir string) error {
	store, err := logstore.Open(logstore.Options{Store: rowstore.Options{Dir: filepath.Join(dir, "logs")}, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		return err
	}
	return New(options(dir, store)).Run(context.Background())
}

func options(dir string, store *logstore.Store) Options {
	return Options{Root: filepath.Join(dir, "pods"), State: filepath.Join(dir, "places"), Node: "node-1", Store: store, LinesPerSecond: 100_000, Log: slog.New(slog.DiscardHandler)}
}
