package cluster

import (
	"flag"
	"fmt"
	"os"
	"testing"

	"polymesh.dev/polymesh/observe/rowstore"
)

var update = flag.Bool("update", false, "write the golden files")

func TestMain(m *testing.M) {
	flag.Parse()
	if err := rowstore.LimitMemory(32 << 20); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}
