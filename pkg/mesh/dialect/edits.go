package dialect

import (
	"cmp"
	"slices"

	"google.golang.org/protobuf/encoding/protowire"
)

// edits are pending changes to a message in wire format. They are collected first and applied in one pass, so that a message is
// copied once, however deep the changes are.
type edits struct {
	in    []byte
	made  []change
	grown int // bytes
	// scratch is the buffer for replacement bytes.
	scratch []byte
}

// change replaces skip bytes at an offset.
type change struct {
	at, skip int
	put      []byte
}

func (e *edits) change(at, skip int, put []byte) {
	e.made = append(e.made, change{at, skip, put})
	e.grown += len(put) - skip
}

// length is a field whose value is being edited. Its length prefix precedes it but is known only afterwards.
type length struct{ made, grown int }

// open starts editing the value of a field.
func (e *edits) open() length {
	l := length{len(e.made), e.grown}
	e.made = append(e.made, change{})
	return l
}

// close ends the edit: the value is in[from:to], and its length prefix starts at `at`.
func (e *edits) close(l length, at, from, to int) {
	if len(e.made) == l.made+1 {
		e.made = e.made[:l.made]
		return
	}
	begin := len(e.scratch)
	e.scratch = protowire.AppendVarint(e.scratch, uint64(to-from+e.grown-l.grown))
	put := e.scratch[begin:len(e.scratch):len(e.scratch)]
	e.made[l.made] = change{at, from - at, put}
	e.grown += len(put) - (from - at)
}

// discard drops the edits made since open.
func (e *edits) discard(l length) { e.made, e.grown = e.made[:l.made], l.grown }

// out returns the edited message. Without changes it is the input itself.
func (e *edits) out() (out []byte, changed bool) {
	if len(e.made) == 0 {
		return e.in, false
	}
	inOrder := func(a, b change) int { return cmp.Compare(a.at, b.at) }
	if !slices.IsSortedFunc(e.made, inOrder) {
		slices.SortStableFunc(e.made, inOrder) // stable: edits at the same offset stay in order
	}
	out = make([]byte, 0, len(e.in)+e.grown)
	done := 0 // offset up to which the input is copied
	for _, c := range e.made {
		if c.at > done {
			out = append(out, e.in[done:c.at]...)
		}
		out = append(out, c.put...)
		done = max(done, c.at+c.skip)
	}
	return append(out, e.in[done:]...), true
}

// reset drops everything but the allocated memory.
func (e *edits) reset() {
	clear(e.made) // drop references to replacement bytes
	e.in, e.made, e.grown, e.scratch = nil, e.made[:0], 0, e.scratch[:0]
}
