package dialect

import (
	"cmp"
	"slices"

	"google.golang.org/protobuf/encoding/protowire"
)

// edits are what becomes of a message in wire format. They are gathered first and made at once, so that a message is copied
// once, however deep in it something changes.
type edits struct {
	in    []byte
	made  []change
	grown int // bytes
	// scratch holds what changes put.
	scratch []byte
}

// change puts bytes in the place of some at an offset.
type change struct {
	at, skip int
	put      []byte
}

func (e *edits) change(at, skip int, put []byte) {
	e.made = append(e.made, change{at, skip, put})
	e.grown += len(put) - skip
}

// length is a field whose value is being edited: its length stands before it and is known afterwards.
type length struct{ made, grown int }

// open begins to edit the value of a field.
func (e *edits) open() length {
	l := length{len(e.made), e.grown}
	e.made = append(e.made, change{})
	return l
}

// close ends it: the value is in[from:to], and its length stands at `at`.
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

// discard forgets what was edited since open.
func (e *edits) discard(l length) { e.made, e.grown = e.made[:l.made], l.grown }

// out is the edited message. Without changes it is the message itself.
func (e *edits) out() (out []byte, changed bool) {
	if len(e.made) == 0 {
		return e.in, false
	}
	inOrder := func(a, b change) int { return cmp.Compare(a.at, b.at) }
	if !slices.IsSortedFunc(e.made, inOrder) {
		slices.SortStableFunc(e.made, inOrder) // what was put at one place stays in the order in which it was put
	}
	out = make([]byte, 0, len(e.in)+e.grown)
	done := 0 // what was read
	for _, c := range e.made {
		if c.at > done {
			out = append(out, e.in[done:c.at]...)
		}
		out = append(out, c.put...)
		done = max(done, c.at+c.skip)
	}
	return append(out, e.in[done:]...), true
}

// reset forgets everything but the memory.
func (e *edits) reset() {
	clear(e.made) // of what they put
	e.in, e.made, e.grown, e.scratch = nil, e.made[:0], 0, e.scratch[:0]
}
