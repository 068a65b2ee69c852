package podlogs

import "time"

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
