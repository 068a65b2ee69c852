package logstore

import (
	"cmp"
	"container/heap"
	"context"
	"fmt"
	"slices"
	"time"

	"polymesh.dev/polymesh/observe/rowstore"
)

const (
	// selectBytes is how much memory one Select may use to sort.
	selectBytes = 8 << 20
	// firstWindow is the span of time that is read first, where the order begins; widen is the factor by which the next one is longer
	// if it had few lines.
	firstWindow = time.Minute
	widen       = 4
)

// Select calls each for every selected line, in the order of time, until it returns false. Lines of the same time are ordered by labels and text.
//
// The storage returns rows in no order, so this reads one span of time after the other and sorts each: as many lines as requested, and at most
// 8 MiB of them. The remaining lines are read again in the next span.
func (s *Store) Select(ctx context.Context, sel Selector, each func(Entry) bool) error {
	c, err := compile(sel)
	if err != nil {
		return err
	}
	start, end := s.within(sel.Start, sel.End)
	left := sel.Limit // zero stays zero: all
	window := firstWindow
	for start.Before(end) && (sel.Limit == 0 || left > 0) {
		from, to := start, end
		if sel.Newest {
			from = later(start, end.Add(-window))
		} else {
			to = earlier(end, start.Add(window))
		}
		top := &top{newest: sel.Newest, limit: left}
		if err := s.rows.QueryWhere(ctx, c.logsql, from, to, top.want, func(row rowstore.Row) bool {
			top.add(entryOf(row))
			return true
		}); err != nil {
			return fmt.Errorf("reading logs: %w", err)
		}
		entries := top.sorted()
		if top.cut && len(entries) == 0 {
			// More lines than fit into memory have the same time, so they cannot be sorted.
			n, more, err := s.selectAt(ctx, c, top.cutAt, left, each)
			if err != nil || !more {
				return err
			}
			if sel.Limit > 0 {
				left -= n
			}
		}
		for _, e := range entries {
			if !each(e) {
				return nil
			}
			if sel.Limit > 0 {
				left--
			}
		}
		// The next span begins where this one ended, or where it was cut.
		next := to
		if sel.Newest {
			next = from
		}
		switch {
		case top.cut && len(entries) == 0:
			next = top.cutAt
			if !sel.Newest {
				next = next.Add(1)
			}
			window = firstWindow
		case top.cut:
			next = top.cutAt
			if sel.Newest {
				next = next.Add(1)
			}
			window = max(time.Nanosecond, next.Sub(start))
			if sel.Newest {
				window = max(time.Nanosecond, end.Sub(next))
			}
		case top.bytes < selectBytes/(2*widen):
			window *= widen
		}
		if sel.Newest {
			end = next
		} else {
			start = next
		}
	}
	return nil
}

// Each calls each for every selected line, in any order and without a limit, until it returns false.
func (s *Store) Each(ctx context.Context, sel Selector, each func(Entry) bool) error {
	c, err := compile(sel)
	if err != nil {
		return err
	}
	err = s.rows.Query(ctx, c.logsql, sel.Start, sel.End, func(row rowstore.Row) bool { return each(entryOf(row)) })
	if err != nil {
		return fmt.Errorf("reading logs: %w", err)
	}
	return nil
}

// selectAt returns the lines of one nanosecond in any order.
func (s *Store) selectAt(ctx context.Context, c compiled, at time.Time, limit int, each func(Entry) bool) (n int, more bool, err error) {
	more = true
	err = s.rows.Query(ctx, c.logsql, at, at.Add(1), func(row rowstore.Row) bool {
		n++
		more = each(entryOf(row))
		return more && (limit == 0 || n < limit)
	})
	if err != nil {
		return n, false, fmt.Errorf("reading logs: %w", err)
	}
	return n, more, nil
}

// within narrows a span of time to where there are lines.
func (s *Store) within(start, end time.Time) (time.Time, time.Time) {
	st := s.rows.Stats()
	newest := later(time.Now(), st.Newest).Add(time.Second)
	if end.IsZero() || end.After(newest) {
		end = newest
	}
	if !st.Oldest.IsZero() && start.Before(st.Oldest) {
		start = st.Oldest
	}
	if st.Rows == 0 {
		start = end
	}
	return start, end
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

// top keeps the first entries in an order: as many as limit (zero for all) and selectBytes allow. It is a heap with the last one on top.
type top struct {
	newest  bool
	limit   int
	entries []Entry
	bytes   int
	// cut is set when selectBytes did not suffice: then entries at and beyond cutAt are missing.
	cut   bool
	cutAt time.Time
}

// before is the requested order.
func (t *top) before(a, b *Entry) int {
	if c := a.Time.Compare(b.Time); c != 0 {
		if t.newest {
			return -c
		}
		return c
	}
	return cmp.Or(compareLabels(a.Labels, b.Labels), cmp.Compare(a.Line, b.Line))
}

func compareLabels(a, b []Field) int {
	return slices.CompareFunc(a, b, func(x, y Field) int {
		return cmp.Or(cmp.Compare(x.Name, y.Name), cmp.Compare(x.Value, y.Value))
	})
}

func (t *top) beyond(at time.Time) bool {
	if t.newest {
		return !at.After(t.cutAt)
	}
	return !at.Before(t.cutAt)
}

// want reports whether an entry of that time can be among the first ones.
func (t *top) want(at time.Time) bool {
	if t.cut && t.beyond(at) {
		return false
	}
	if t.limit > 0 && len(t.entries) >= t.limit {
		c := at.Compare(t.entries[0].Time)
		if t.newest {
			c = -c
		}
		return c <= 0
	}
	return true
}

func (t *top) add(e Entry) {
	heap.Push(t, e)
	for t.limit > 0 && len(t.entries) > t.limit {
		heap.Pop(t)
	}
	for t.bytes > selectBytes {
		t.cutAt, t.cut = heap.Pop(t).(Entry).Time, true
		// All entries of the same time are removed, too, so that the rest is complete up to there.
		for len(t.entries) > 0 && t.beyond(t.entries[0].Time) {
			heap.Pop(t)
		}
	}
}

func (t *top) sorted() []Entry {
	slices.SortFunc(t.entries, func(a, b Entry) int { return t.before(&a, &b) })
	return t.entries
}

func (t *top) Len() int           { return len(t.entries) }
func (t *top) Less(i, j int) bool { return t.before(&t.entries[i], &t.entries[j]) > 0 }
func (t *top) Swap(i, j int)      { t.entries[i], t.entries[j] = t.entries[j], t.entries[i] }
func (t *top) Push(x any) {
	e := x.(Entry)
	t.bytes += e.size()
	t.entries = append(t.entries, e)
}

func (t *top) Pop() any {
	last := len(t.entries) - 1
	e := t.entries[last]
	t.entries[last] = Entry{}
	t.entries = t.entries[:last]
	t.bytes -= e.size()
	return e
}

// size returns about the memory of an entry.
func (e *Entry) size() int {
	n := 200 + len(e.Line)
	for _, m := range e.Metadata {
		n += 32 + len(m.Name) + len(m.Value)
	}
	return n
}
