package podlogs

import (
	"context"
	"fmt"
	"hash/fnv"
	"io"
	"strconv"
	"strings"
	"time"

	"polymesh.dev/polymesh/observe/logstore"
)

// recall holds the lines of a container that an earlier run has stored after the places that it saved, usually those of a few seconds.
type recall struct {
	from  time.Time
	lines map[uint64]struct{}
}

// maxRecall bounds the lines that are looked up. If the saved places were lost, it may be too small, and lines are stored twice.
const maxRecall = 100_000

// fresh leaves out the entries that an earlier run has stored.
func (t *Tailer) fresh(ctx context.Context, p *pod, c *container, entries []logstore.Entry) ([]logstore.Entry, error) {
	old := time.Time{}
	for i := range entries {
		if at := entries[i].Time; at.Before(t.started) && (old.IsZero() || at.Before(old)) {
			old = at
		}
	}
	if old.IsZero() {
		c.recall = nil
		return entries, nil
	}
	if c.recall == nil || old.Before(c.recall.from) {
		r := &recall{from: old, lines: map[uint64]struct{}{}}
		sel := logstore.Selector{
			Matchers: []logstore.Matcher{
				{Name: "job", Value: Job}, {Name: "namespace", Value: p.namespace}, {Name: "pod", Value: p.name}, {Name: "container", Value: c.name},
			},
			Metadata: []logstore.Matcher{{Name: MetaUID, Value: p.uid}},
			Start:    old,
			End:      t.started,
		}
		err := t.opts.Store.Each(ctx, sel, func(e logstore.Entry) bool {
			r.lines[lineHash(&e)] = struct{}{}
			return len(r.lines) < maxRecall
		})
		if err != nil {
			return nil, fmt.Errorf("looking for lines that are stored already: %w", err)
		}
		c.recall = r
	}
	if len(c.recall.lines) == 0 {
		return entries, nil
	}
	kept := entries[:0]
	for i := range entries {
		if _, ok := c.recall.lines[lineHash(&entries[i])]; !ok {
			kept = append(kept, entries[i])
		}
	}
	return kept, nil
}

// lineHash is the same for a line in a file and in the store.
func lineHash(e *logstore.Entry) uint64 {
	h := fnv.New64a()
	_, _ = io.WriteString(h, strconv.FormatInt(e.Time.UnixNano(), 36)+logstore.Value(e.Labels, "stream")+"\n")
	_, _ = io.WriteString(h, strings.ToValidUTF8(e.Line, "\uFFFD"))
	return h.Sum64()
}
