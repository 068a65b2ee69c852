package server

import (
	"context"
	"testing"
	"time"

	"polymesh.dev/polymesh/pkg/status"
)

// A request that goes away leaves nothing wrong for those after it.
func TestFindingsOutliveTheirRequest(t *testing.T) {
	asked := 0
	f := &findings{overview: func(ctx context.Context) *status.Cluster {
		asked++
		if end, ok := ctx.Deadline(); !ok || time.Until(end) > overviewTime {
			t.Error("it may take forever")
		}
		if err := ctx.Err(); err != nil {
			return &status.Cluster{Problem: err.Error()}
		}
		return &status.Cluster{Warnings: []string{"a certificate expires"}}
	}}
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	for _, ctx := range []context.Context{gone, t.Context()} {
		if got := f.ofCluster(ctx); len(got) != 1 || got[0].Message != "a certificate expires" {
			t.Errorf("it finds %+v", got)
		}
	}
	if asked != 1 {
		t.Errorf("asked %d times", asked)
	}
}
