package podlogs

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"polymesh.dev/polymesh/observe/logstore"
	"polymesh.dev/polymesh/observe/rowstore"
)

const (
	// live is how old a line may be to count for its pod's limit; older ones are read after the fact and count for their container.
	live = 30 * time.Second
	// reportPeriod is how often a container's dropped lines are reported in its own log.
	reportPeriod = 10 * time.Second
	// Lines without an end wait in memory. If they take too much of it, they are split into shorter pieces.
	maxHeld   = 4 << 20
	shortLine = 16 << 10
)

// errMoved means that the file was renamed: the next scan finds its new name.
var errMoved = errors.New("the file has another name now")

// open opens a file by its current name, if it is still the same file.
func (t *Tailer) open(p *pod, c *container, f *file) error {
	opened, st, err := openFile(t.root, path.Join(p.dir, c.name, f.name()))
	if err != nil {
		return err
	}
	if idOf(&st) != f.id {
		_ = opened.Close()
		return errMoved
	}
	f.file = opened
	f.rewind()
	return nil
}

func idOf(st *unix.Stat_t) fileID { return fileID{dev: uint64(st.Dev), inode: st.Ino} }

// read stores the new lines of a file. full means that there are more.
func (t *Tailer) read(ctx context.Context, p *pod, c *container, f *file, now time.Time) (full bool, err error) {
	if !t.findWorkload(p, c, now) {
		return false, nil
	}
	if f.file == nil {
		if f.removed || t.openFiles >= maxOpen {
			return false, nil
		}
		err := t.open(p, c, f)
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, errMoved) {
			c.seen = dirSeen{}
			return false, nil
		}
		if err != nil {
			t.setProblem(fmt.Sprintf("a log of %s/%s cannot be opened: %v", p.namespace, p.name, err))
			return false, nil
		}
	}
	limit, backlog := p.limit, c.backlog
	chunk, err := f.next(t.buffer)
	if err != nil {
		t.setProblem(fmt.Sprintf("a log of %s/%s cannot be read: %v", p.namespace, p.name, err))
		f.finish()
		t.dirty = true
		return false, nil
	}
	var (
		entries   []logstore.Entry
		malformed int64
		last      bool
	)
	switch {
	case len(chunk) > 0:
		f.quiet = time.Time{}
		longest := logstore.MaxLineBytes
		if t.held > maxHeld {
			longest = shortLine
		}
		t.held -= f.held()
		entries, malformed = f.parse(chunk, longest)
		t.held += f.held()
	case f.ended(now):
		entries, last = f.leftover(), true
	default:
		return false, nil
	}
	entries, dropped := t.keep(p, c, f, entries, now)
	if len(entries) > 0 {
		entries, err = t.fresh(ctx, p, c, entries)
	}
	if err == nil {
		err = t.store(entries)
	}
	if err != nil {
		// The lines are read again when the store takes them.
		f.rewind()
		p.limit, c.backlog = limit, backlog
		return false, err
	}
	c.dropped += dropped
	if malformed+dropped > 0 {
		t.count(func(n *numbers) { n.malformed += malformed; n.dropped += dropped })
	}
	if f.place != f.parsed {
		f.place, t.dirty = f.parsed, true
	}
	if last {
		f.finish()
		t.dirty = true
	}
	return len(chunk) == len(t.buffer), nil
}

// keep sets the labels and metadata of lines, and drops lines above the limit.
func (t *Tailer) keep(p *pod, c *container, f *file, entries []logstore.Entry, now time.Time) (kept []logstore.Entry, dropped int64) {
	kept = entries[:0]
	metadata := []logstore.Field{{Name: MetaUID, Value: p.uid}, {Name: MetaRestart, Value: strconv.Itoa(f.restart)}}
	labels := map[string][]logstore.Field{}
	for _, e := range entries {
		limit := &p.limit
		if now.Sub(e.Time) > live {
			limit = &c.backlog
		}
		if !limit.allow(e.Time, len(e.Line), t.opts.LinesPerSecond) {
			dropped++
			continue
		}
		stream := logstore.Value(e.Labels, "stream")
		if labels[stream] == nil {
			labels[stream] = t.labels(p, c, stream)
		}
		e.Labels, e.Metadata = labels[stream], metadata
		kept = append(kept, e)
	}
	return kept, dropped
}

func (t *Tailer) labels(p *pod, c *container, stream string) []logstore.Field {
	return []logstore.Field{
		{Name: "container", Value: c.name},
		{Name: "job", Value: Job},
		{Name: "namespace", Value: p.namespace},
		{Name: "node", Value: t.opts.Node},
		{Name: "pod", Value: p.name},
		{Name: "stream", Value: stream},
		{Name: "workload", Value: c.workload},
	}
}

// store appends lines to the store. Lines that the store rejects are counted and left out.
func (t *Tailer) store(entries []logstore.Entry) error {
	if len(entries) == 0 {
		return nil
	}
	stored := int64(len(entries))
	err := t.opts.Store.Append(entries)
	var refused *rowstore.RejectedError
	if errors.As(err, &refused) {
		stored -= int64(refused.Rows)
		t.count(func(n *numbers) { n.refused += int64(refused.Rows) })
		err = nil
	}
	if err == nil {
		t.count(func(n *numbers) { n.lines += stored })
	}
	return err
}

// reportDropped writes a line into the container's log that says how many of its lines were dropped.
func (t *Tailer) reportDropped(p *pod, c *container, now time.Time) error {
	if c.dropped == 0 || now.Sub(c.reported) < reportPeriod {
		return nil
	}
	e := logstore.Entry{
		Time:   now,
		Labels: t.labels(p, c, StreamPolymesh),
		Line: fmt.Sprintf("%d lines of this container were dropped: its pod wrote more than %d lines or %d bytes a second",
			c.dropped, t.opts.LinesPerSecond, t.opts.LinesPerSecond*lineBytes),
		Metadata: []logstore.Field{
			{Name: MetaUID, Value: p.uid},
			{Name: MetaDropped, Value: strconv.FormatInt(c.dropped, 10)},
		},
	}
	if err := t.store([]logstore.Entry{e}); err != nil {
		return err
	}
	c.dropped, c.reported = 0, now
	return nil
}
