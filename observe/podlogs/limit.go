package podlogs

import "time"

// clockSlack is by how much lines that were written together may come in another order: a pod's containers are read one after the other.
const clockSlack = 2 * time.Second

// bucket allows so many lines a second, with a burst of two seconds' worth. Its clock is the lines' own: what is read late was not written too fast.
type bucket struct {
	tokens float64
	last   time.Time
}

func (b *bucket) allow(at time.Time, perSecond int) bool {
	full := 2 * float64(perSecond)
	if b.last.IsZero() {
		b.tokens, b.last = full, at
	}
	// The clock was ahead, and is right again: what is written now would count for nothing until it is there.
	if b.last.Sub(at) > clockSlack {
		b.last = at
	}
	if d := at.Sub(b.last); d > 0 {
		b.tokens = min(full, b.tokens+d.Seconds()*float64(perSecond))
		b.last = at
	}
	if b.tokens < 1 {
		return false
	}
	b.tokens--
	return true
}
