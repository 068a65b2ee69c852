package rowstore

import (
	"fmt"
	"os"
	"testing"
)

func TestMain(m *testing.M) {
	if err := LimitMemory(32 << 20); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}
