// Package rowstore keeps rows of fields on disk for a bounded time in a bounded space: VictoriaLogs' storage, opened for one kind of rows.
//
// It owns the directory, the way from memory to disk (what kill -9 may take), the limits (bytes, free space, age, size of a row, number of
// field names) and the translation between rows and the library's blocks. It knows nothing of what the rows mean: logstore keeps log lines
// in one of these, tracestore keeps spans in another.
//
// main calls LimitMemory once, before the first Open.
package rowstore

import (
	"errors"
	"fmt"
	"time"
)

// Field is one named value of a row.
type Field struct{ Name, Value string }

// Row is what is stored. The line of a log entry is the field MessageField.
type Row struct {
	// Time orders the rows. Appended rows need one; rows of a query that counts have none (the zero time).
	Time time.Time
	// Stream identifies the source of the row. Rows of one stream are stored together, so there must be few streams: a pod's name belongs here, a request's id does not.
	Stream []Field
	// Fields are everything else. Empty values are not stored.
	Fields []Field
	// Foreign means that a client has chosen the names of the fields, see MaxForeignNames. It is not set in rows of a query.
	Foreign bool
}

// MessageField is the name of the field that holds a line of text.
const MessageField = "_msg"

// Limits on one row. The library would drop what exceeds its own ones with a warning that quotes the whole row.
const (
	MaxFields     = 256
	MaxNameBytes  = 128
	MaxValueBytes = 1 << 20
	MaxRowBytes   = 1<<20 + 128<<10
	// MaxNames and MaxStreamNames are how many different field names a store and one of its streams take in a day, which is the day when they come.
	// Later names go into RestField together, as JSON. Each name of a store is kept with each part; each name of a stream is a column with
	// a place for every row of a block, 16 bytes in memory while the block is made, and a block of 2,000 names is cut short. Rows that are
	// Foreign share MaxForeignNames instead, so that they take no names from the others. MessageField and Options.Names are not counted.
	MaxNames        = 1024
	MaxForeignNames = 512
	MaxStreamNames  = 128
	// RestField holds the fields beyond the limit on names, and those with a name that the row already has.
	RestField = "_rest"
)

// Options say where a store is and what it may take.
type Options struct {
	// Dir belongs to the store alone. It is made, 0700, when it is missing.
	Dir string
	// Retention is how long rows are kept, a week when zero, at least a day: whole days go.
	Retention time.Duration
	// MaxBytes is what the directory may hold. The oldest days go first, then the oldest part of the day itself.
	MaxBytes int64
	// MinFreeBytes is what the disk must have left, else Append refuses with ErrReadOnly. The library ends the process when a write fails,
	// so less than 32 MiB is taken as 32 MiB.
	MinFreeBytes int64
	// FlushInterval is how much time kill -9 may take back, 5 s when zero, at least 4 s.
	FlushInterval time.Duration
	// ReadOnly opens what is on disk now and nothing later, also while another process writes to it. Nothing in Dir is changed.
	ReadOnly bool
	// Temp is where a store that was opened ReadOnly has a folder of links until Close; the system's folder for temporary files when empty.
	Temp string
	// Names are fields that never go into RestField, beside MessageField: those by which rows are found and read.
	Names []string
	// OnRemoved, if set, is called with what was removed because of the limit on bytes, or why that failed. It must not call the store's Close.
	OnRemoved func(Removed)
}

// Removed says which rows were deleted to stay within MaxBytes.
type Removed struct {
	// Until is the newest row that is gone; older ones may be left where rows came late.
	Until time.Time
	// Bytes is what the store held before.
	Bytes int64
	// Err is why removing failed.
	Err error
}

// Stats is the store as it is now.
type Stats struct {
	Rows       int64 // stored and not yet dropped
	Bytes      int64 // on disk
	Partitions int   // days
	Streams    int64 // made since Open
	Oldest     time.Time
	Newest     time.Time
	Short      bool  // the disk has less than MinFreeBytes left
	ReadOnly   bool  // that, or the store was opened so
	Rejected   int64 // rows that Append refused since Open
	Folded     int64 // fields that went into RestField since Open
}

var (
	// ErrReadOnly is returned by Append while the disk is short of space, and always by a store that was opened ReadOnly.
	ErrReadOnly = errors.New("the store takes no rows")
	// ErrClosed is returned after Close.
	ErrClosed = errors.New("the store is closed")
)

// RejectedError is returned by Append when some of the rows cannot be kept. The others are stored; appending the same rows again does not help.
type RejectedError struct {
	Rows   int    // how many were refused
	Reason string // why the first one was
}

func (e *RejectedError) Error() string {
	return fmt.Sprintf("%d rows were not stored, the first because %s", e.Rows, e.Reason)
}
