package datastore

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"polymesh.dev/polymesh/pkg/config"
)

// Usage is how large the database of kine is: its table has all revisions since the last compaction.
type Usage struct {
	Rows int64
	// Size is in bytes: of SQLite's files, or of the table with its indexes in a database server.
	Size int64
	// Revision is the newest, Compacted that of the last compaction.
	Revision, Compacted int64
	// LastCompaction is the time of the last compaction by this server; zero if there was none since its start.
	LastCompaction time.Time
}

// usageQuery reads kine's table (pkg/drivers/generic). The row of compact_rev_key has the compacted revision in prev_revision.
const usageQuery = `SELECT COUNT(*), COALESCE(MAX(id), 0), COALESCE((SELECT MAX(prev_revision) FROM kine WHERE name = 'compact_rev_key'), 0) FROM kine`

func usage(ctx context.Context, db *sql.DB) (u Usage, err error) {
	if err := db.QueryRowContext(ctx, usageQuery).Scan(&u.Rows, &u.Revision, &u.Compacted); err != nil {
		return Usage{}, fmt.Errorf("count the rows of the datastore: %w", err)
	}
	return u, nil
}

// Usage returns the size of the database, which a server may use meanwhile.
func (d *Datastore) Usage(ctx context.Context) (Usage, error) {
	db, err := openFile(d.file(), "ro")
	if err != nil {
		return Usage{}, err
	}
	defer db.Close()
	u, err := usage(ctx, db)
	if err != nil {
		return Usage{}, err
	}
	for _, suffix := range []string{"", "-wal"} {
		info, err := os.Stat(d.file() + suffix)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return Usage{}, err
		}
		u.Size += info.Size()
	}
	u.LastCompaction = d.kine.lastCompaction()
	return u, nil
}

// Usage returns the size of the table.
func (s *SQL) Usage(ctx context.Context) (Usage, error) {
	connector, err := s.connector()
	if err != nil {
		return Usage{}, err
	}
	db := sql.OpenDB(connector)
	defer db.Close()
	u, err := usage(ctx, db)
	if err != nil {
		return Usage{}, err
	}
	size := `SELECT pg_total_relation_size('kine')`
	if s.opts.Database.Kind == config.MySQL {
		size = `SELECT data_length + index_length FROM information_schema.tables WHERE table_schema = DATABASE() AND table_name = 'kine'`
	}
	if err := db.QueryRowContext(ctx, size).Scan(&u.Size); err != nil {
		return Usage{}, fmt.Errorf("read the size of the datastore: %w", err)
	}
	u.LastCompaction = s.kine.lastCompaction()
	return u, nil
}
