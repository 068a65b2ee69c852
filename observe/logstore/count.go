package logstore

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"polymesh.dev/polymesh/observe/rowstore"
)

// Counted is the number of lines, and of their bytes, of a stream or a group of streams in one step of time.
type Counted struct {
	// Time is when the step begins; without steps it is zero.
	Time   time.Time
	Labels []Field // sorted; those of the stream, or of the names that were asked for and have a value
	Lines  int64
	Bytes  int64
}

// Grouping says how Count groups lines.
type Grouping struct {
	// Step divides the time into steps of this length; one begins at Origin. Zero counts everything together.
	Step   time.Duration
	Origin time.Time
	// By are the labels by which lines are counted; nil counts each stream, an empty list all of them together.
	By []string
}

// Count counts the selected lines (without the selector's limit and order), in the storage, which need not decompress most lines.
// The results come in no order.
func (s *Store) Count(ctx context.Context, sel Selector, group Grouping, each func(Counted) bool) error {
	c, err := compile(sel)
	if err != nil {
		return err
	}
	var by []string
	if group.Step > 0 {
		// The storage adds the offset to a time before it computes the step.
		step := group.Step.Nanoseconds()
		offset := step - group.Origin.UnixNano()%step
		by = append(by, fmt.Sprintf("_time:%dns offset %dns", step, offset))
	}
	if group.By == nil {
		by = append(by, "_stream")
	}
	for _, name := range group.By {
		if !ValidName(name) {
			return fmt.Errorf("%.40q is not a valid label name", name)
		}
		by = append(by, rowstore.FieldName(name))
	}
	query := fmt.Sprintf("%s | stats by (%s) count() %s, sum_len(%s) %s", c.logsql, strings.Join(by, ", "),
		rowstore.FieldName(linesField), rowstore.FieldName(rowstore.MessageField), rowstore.FieldName(bytesField))
	var failed error
	err = s.rows.Query(ctx, query, sel.Start, sel.End, func(row rowstore.Row) bool {
		out := Counted{Time: row.Time, Labels: row.Stream}
		for _, f := range row.Fields {
			var err error
			switch f.Name {
			case linesField:
				out.Lines, err = strconv.ParseInt(f.Value, 10, 64)
			case bytesField:
				out.Bytes, err = strconv.ParseInt(f.Value, 10, 64)
			default:
				out.Labels = append(out.Labels, f)
			}
			if err != nil {
				failed = fmt.Errorf("reading a count: %w", err)
				return false
			}
		}
		if out.Lines == 0 { // the storage's answer when there is nothing to count
			return true
		}
		slices.SortFunc(out.Labels, func(a, b Field) int { return strings.Compare(a.Name, b.Name) })
		return each(out)
	})
	if err == nil {
		err = failed
	}
	if err != nil {
		return fmt.Errorf("counting logs: %w", err)
	}
	return nil
}

// The names of the results cannot be labels'.
const (
	linesField = "lines.count"
	bytesField = "bytes.count"
)
