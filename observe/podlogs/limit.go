package podlogs

import "time"

const (
	// clockSlack is how far out of order lines may arrive: a pod's containers are read one after the other.
	clockSlack = 2 * time.Second
	// lineBytes is how many bytes are allowed for each allowed line: 1 MB a second for 2,000 lines.
	lineBytes = 512
)

// limit allows a number of lines per second, and lineBytes for each of them.
type limit struct{ lines, bytes bucket }

func (l *limit) allow(at time.Time, size, perSecond int) bool {
	if !l.lines.has(at, perSecond) || !l.bytes.has(at, perSecond*lineBytes) {
		return false
	}
	l.lines.tokens--
	l.bytes.tokens -= float64(size)
	return true
}

// bucket is a token bucket for two seconds' worth of tokens. Its clock is the lines' own, so that reading late does not count as writing fast.
type bucket struct {
	tokens float64
	last   time.Time
}

// has reports whether there is a token. The bucket may then go below zero: a line is kept as a whole.
func (b *bucket) has(at time.Time, perSecond int) bool {
	full := 2 * float64(perSecond)
	if b.last.IsZero() {
		b.tokens, b.last = full, at
	}
	// The clock was set back: without this, no tokens would be added until it reaches the old time again.
	if b.last.Sub(at) > clockSlack {
		b.last = at
	}
	if d := at.Sub(b.last); d > 0 {
		b.tokens = min(full, b.tokens+d.Seconds()*float64(perSecond))
		b.last = at
	}
	return b.tokens >= 1
}
