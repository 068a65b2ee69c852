package rowstore

import (
	"testing"

	"github.com/VictoriaMetrics/VictoriaMetrics/lib/memory"
	"github.com/stretchr/testify/require"
)

func TestLimitMemory(t *testing.T) {
	require.Equal(t, 32<<20, memory.Allowed(), "as TestMain has set it")
}
