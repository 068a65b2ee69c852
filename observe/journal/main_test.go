package journal

import (
	"flag"
	"fmt"
	"os"
	"testing"

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
