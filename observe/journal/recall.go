package journal

import (
	"context"
	"fmt"
	"strings"
	"time"

	"polymesh.dev/polymesh/observe/logstore"
)

// recall holds the lines of a file that an earlier run has stored after the place that it saved, usually those of a few seconds.
type recall struct{ lines map[string]int }

// maxRecall bounds what is looked up.
const maxRecall = 20_000

// fresh leaves out the entries that an earlier run has stored. It queries the store once, for the first lines after the start.
func (j *Journal) fresh(ctx context.Context, f *file, entries []logstore.Entry) ([]logstore.Entry, error) {
	if len(entries) == 0 {
		return entries, nil
	}
	if f.recall == nil {
		r := &recall{lines: map[string]int{}}
		sel := logstore.Selector{
			Matchers: []logstore.Matcher{{Name: "job", Value: JobPolymesh}, {Name: "container", Value: f.Name}, {Name: "node", Value: j.opts.Node}},
			Start:    entries[0].Time.Add(-time.Second),
			End:      j.started,
		}
		n := 0
		err := j.opts.Store.Each(ctx, sel, func(e logstore.Entry) bool {
			r.lines[e.Line]++
			n++
			return n < maxRecall
		})
		if err != nil {
			return nil, fmt.Errorf("looking for lines that are stored already: %w", err)
		}
		f.recall = r
	}
	if len(f.recall.lines) == 0 {
		return entries, nil
	}
	kept := entries[:0]
	for _, e := range entries {
		text := strings.ToValidUTF8(e.Line, "\uFFFD")
		if f.recall.lines[text] > 0 && e.Time.Before(j.started) {
			if f.recall.lines[text]--; f.recall.lines[text] == 0 {
				delete(f.recall.lines, text)
			}
			continue
		}
		kept = append(kept, e)
	}
	return kept, nil
}

// known reports whether the kernel's line from about that time is already stored.
func (j *Journal) known(ctx context.Context, e logstore.Entry) (bool, error) {
	found := false
	err := j.opts.Store.Each(ctx, logstore.Selector{
		Matchers: []logstore.Matcher{{Name: "job", Value: JobKernel}, {Name: "node", Value: j.opts.Node}},
		Filters:  []logstore.Filter{{Text: e.Line}},
		Start:    e.Time.Add(-5 * time.Second),
		End:      e.Time.Add(5 * time.Second),
	}, func(stored logstore.Entry) bool {
		found = found || stored.Line == e.Line
		return !found
	})
	if err != nil {
		return false, fmt.Errorf("looking for lines that are stored already: %w", err)
	}
	return found, nil
}
