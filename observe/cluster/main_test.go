package cluster

import (
	"flag"
	"testing"

	"polymesh.dev/polymesh/observe/rowstore/rowstoretest"
)

var update = flag.Bool("update", false, "write the golden files")

func TestMain(m *testing.M) { rowstoretest.Main(m) }
