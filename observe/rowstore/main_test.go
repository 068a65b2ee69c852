package rowstore

import (
	"flag"
	"fmt"
	"os"
	"testing"
)

// childEnv names the directory in which a test's child process writes until it is killed.
const childEnv = "ROWSTORE_TEST_CHILD"

func TestMain(m *testing.M) {
	flag.Parse()
	if err := LimitMemory(32 << 20); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	if dir := os.Getenv(childEnv); dir != "" {
		if err := writeForever(dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
		os.Exit(1)
	}
	os.Exit(m.Run())
}
