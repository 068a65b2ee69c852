package podlogs

import "time"

const (
	// clockSlack is by how much lines that were written together may come in another order: a pod's containers are read one after the other.
	clockSlack = 2 * time.Second
	// lineBytes is how many bytes of lines are kept for each line that may be: 1 MB a second for 2,000.
	lineBytes = 512
)

// limit allows so many lines a second, and lineBytes for each of them.
type limit struct{ lines, bytes bucket }

func (l *limit) allow(at time.Time, size, perSecond int) bool {
	if !l.lines.has(at, perSecond) || !l.bytes.has(at, perSecond*lineBytes) {
		return false
	}
	l.lines.tokens--
	l.bytes.tokens -= float64(size)
	return true
}

// bucket fills with so many tokens a second, up to two seconds' worth. Its clock is the lines' own: what is read late was not written too fast.
type bucket struct {
	tokens float64
	last   time.Time
}

// has says whether there is a token. More than one may be taken then, even more than there are: a line is kept as a whole.
func (b *bucket) has(at time.Time, perSecond int) bool {
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
	return b.tokens >= 1
}
