package datastore

import (
	"fmt"
	"testing"

	"polymesh.dev/polymesh/pkg/config"
)

// The size of the database is known while it is used, and the last compaction.
func TestUsage(t *testing.T) {
	d := newDatastore(t, config.SyncFull)
	client := start(t, d)
	const key = "/registry/leases/a"
	revision := int64(0)
	for i := range 3 * compactMinRetain {
		revision = put(t, client, key, fmt.Sprint(i), revision)
	}
	before, err := d.Usage(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if before.Rows < 3*compactMinRetain || before.Size == 0 || before.Revision != revision || !before.LastCompaction.IsZero() {
		t.Errorf("before a compaction: %+v, at revision %d", before, revision)
	}
	compact(t, client, revision-compactMinRetain)
	after, err := d.Usage(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if after.Rows >= before.Rows || after.Compacted != revision-compactMinRetain || after.LastCompaction.IsZero() {
		t.Errorf("after a compaction: %+v, was %+v", after, before)
	}
}
