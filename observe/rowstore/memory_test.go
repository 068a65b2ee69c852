package rowstore

import (
	"os"
	"runtime"
	"testing"

	"github.com/VictoriaMetrics/VictoriaMetrics/lib/memory"
	"github.com/stretchr/testify/require"
)

func TestLimitMemory(t *testing.T) {
	require.Equal(t, 32<<20, memory.Allowed(), "as TestMain has set it")
	if os.Getenv("GOMAXPROCS") != "" {
		t.Skip("the environment says how many processors to use")
	}
	before := runtime.GOMAXPROCS(8)
	defer runtime.GOMAXPROCS(before)
	require.NoError(t, LimitMemory(32<<20))
	require.Equal(t, maxProcs, runtime.GOMAXPROCS(0))
}
