// Package rowstoretest is for the tests of packages that store rows.
package rowstoretest

import (
	"flag"
	"fmt"
	"os"
	"testing"

	"polymesh.dev/polymesh/observe/rowstore"
)

// Main is a TestMain.
func Main(m *testing.M) {
	LimitMemory()
	os.Exit(m.Run())
}

// LimitMemory bounds the memory of the stores of a test's process, as rowstore requires.
func LimitMemory() {
	flag.Parse() // the storage's flags are the process's
	if err := rowstore.LimitMemory(32 << 20); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
