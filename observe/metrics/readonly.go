package metrics

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/oklog/ulid/v2"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/prometheus/config"
	"github.com/prometheus/prometheus/promql/parser"
	"github.com/prometheus/prometheus/storage"
	"github.com/prometheus/prometheus/tsdb"

	"polymesh.dev/polymesh/observe/scrapeconfig"
)

// OpenReadOnly opens the metrics of a store, running or not, without changing a file in its folder. The log of
// the last hours, which the storage repairs while reading, is copied to a folder in tmp; Close removes it.
//
// The result only answers queries. It has no targets and no rules, and accepts no samples.
func OpenReadOnly(ctx context.Context, dir, tmp string, log *slog.Logger) (_ *Metrics, err error) {
	if _, err := os.Stat(dir); err != nil {
		return nil, fmt.Errorf("open the metrics in %s: %w", dir, err)
	}
	work, err := os.MkdirTemp(tmp, "metrics-")
	if err != nil {
		return nil, fmt.Errorf("make a folder for a copy of the last hours: %w", err)
	}
	base, err := config.Load("", slog.New(slog.DiscardHandler))
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(work))
	}
	m := &Metrics{
		// Who reads files has the machine's memory.
		opts: Options{Dir: dir, MaxSeries: 10 * scrapeconfig.DefaultSeries}, log: log, registry: prometheus.NewRegistry(), born: time.Now(), dbStats: tsdb.NewDBStats(),
		parser: parser.NewParser(parser.Options{}),
	}
	m.current.set(base, nil)
	files := &files{}
	m.release = func() error { return errors.Join(files.close(), os.RemoveAll(work)) }
	defer func() {
		if err != nil {
			err = errors.Join(err, m.Close())
		}
	}()

	for _, part := range []string{"wal", "wbl", "chunks_head"} {
		if err := copyFolder(ctx, filepath.Join(dir, part), filepath.Join(work, part)); err != nil {
			return nil, fmt.Errorf("copy the last hours of metrics: %w", err)
		}
	}
	// The copy is neither compacted into blocks nor truncated.
	o := tsdbOptions(Options{})
	o.RetentionDuration, o.MinBlockDuration, o.MaxBlockDuration, o.StaleSeriesCompactionThreshold = 0, math.MaxInt64/4, math.MaxInt64/4, 0
	if m.db, err = tsdb.Open(work, log.With("part", "tsdb"), nil, o, m.dbStats); err != nil {
		return nil, fmt.Errorf("open the copy of the last hours of metrics: %w", err)
	}
	if err := files.open(dir, log); err != nil {
		return nil, err
	}
	files.head = m.db
	m.queryable, m.blocks = files, files.metas
	m.engine = m.newEngine(seats{make(slots, maxQueries), make(slots, maxPrivileged)}, queryTimeout, nil)
	m.handlers = m.newHandlers()
	return m, nil
}

// copyFolder copies the files of a folder, except those that a running store removes meanwhile.
func copyFolder(ctx context.Context, from, to string) error {
	entries, err := os.ReadDir(from)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := os.Mkdir(to, 0o700); err != nil {
		return err
	}
	for _, e := range entries {
		source, target := filepath.Join(from, e.Name()), filepath.Join(to, e.Name())
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case strings.HasSuffix(e.Name(), ".tmp"):
		case e.IsDir(): // a checkpoint
			err = copyFolder(ctx, source, target)
		case e.Type().IsRegular():
			err = copyFile(source, target)
		}
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return nil
}

func copyFile(from, to string) error {
	r, err := os.Open(from)
	if err != nil {
		return err
	}
	defer r.Close()
	w, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(w, r)
	return errors.Join(err, w.Close())
}

// files are the blocks of a folder, and the copy of the newer samples.
type files struct {
	blocks []*tsdb.Block
	head   *tsdb.DB
}

// open opens the blocks, except damaged or partly deleted ones.
func (f *files) open(dir string, log *slog.Logger) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	parents := map[ulid.ULID]bool{}
	for _, e := range entries {
		if _, err := ulid.ParseStrict(e.Name()); err != nil {
			continue
		}
		b, err := tsdb.OpenBlock(log, filepath.Join(dir, e.Name()), nil, nil)
		if err != nil {
			log.Warn("a block of metrics is left out", "block", e.Name(), "error", err)
			continue
		}
		f.blocks = append(f.blocks, b)
		meta := b.Meta()
		for _, p := range meta.Compaction.Parents {
			parents[p.ULID] = true
		}
	}
	// A killed store may have left the blocks that it had just compacted into a larger one.
	kept := f.blocks[:0]
	for _, b := range f.blocks {
		if parents[b.Meta().ULID] {
			if err := b.Close(); err != nil {
				return err
			}
			continue
		}
		kept = append(kept, b)
	}
	f.blocks = kept
	return nil
}

func (f *files) metas() []tsdb.BlockMeta {
	metas := []tsdb.BlockMeta{}
	for _, b := range f.blocks {
		metas = append(metas, b.Meta())
	}
	return metas
}

func (f *files) close() error {
	var errs []error
	for _, b := range f.blocks {
		errs = append(errs, b.Close())
	}
	return errors.Join(errs...)
}

// Querier implements storage.Queryable.
func (f *files) Querier(mint, maxt int64) (storage.Querier, error) {
	q, err := f.head.Querier(mint, maxt)
	if err != nil {
		return nil, err
	}
	all := []storage.Querier{q}
	for _, b := range f.blocks {
		if !b.OverlapsClosedInterval(mint, maxt) {
			continue
		}
		q, err := tsdb.NewBlockQuerier(b, mint, maxt)
		if err != nil {
			for _, q := range all {
				err = errors.Join(err, q.Close())
			}
			return nil, err
		}
		all = append(all, q)
	}
	return storage.NewMergeQuerier(all, nil, storage.ChainedSeriesMerge), nil
}

// ChunkQuerier implements storage.ChunkQueryable.
func (f *files) ChunkQuerier(mint, maxt int64) (storage.ChunkQuerier, error) {
	q, err := f.head.ChunkQuerier(mint, maxt)
	if err != nil {
		return nil, err
	}
	all := []storage.ChunkQuerier{q}
	for _, b := range f.blocks {
		if !b.OverlapsClosedInterval(mint, maxt) {
			continue
		}
		q, err := tsdb.NewBlockChunkQuerier(b, mint, maxt)
		if err != nil {
			for _, q := range all {
				err = errors.Join(err, q.Close())
			}
			return nil, err
		}
		all = append(all, q)
	}
	return storage.NewMergeChunkQuerier(all, nil, storage.NewCompactingChunkSeriesMerger(storage.ChainedSeriesMerge)), nil
}
