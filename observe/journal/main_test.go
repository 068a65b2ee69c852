package journal

import (
	"testing"

	"polymesh.dev/polymesh/observe/rowstore/rowstoretest"
)

func TestMain(m *testing.M) { rowstoretest.Main(m) }
