package guard

import (
	"bytes"
	"errors"
	"io"
	"net/http"
	"time"

	"golang.org/x/sync/semaphore"
)

// ErrBusy means that the bodies that arrive at this time fill their room.
var ErrBusy = errors.New("too many requests arrive at the same time")

// arriveBy is how many bytes are read at a time.
const arriveBy = 4 << 10

// Arrive reads a request's body of at most so many bytes, as it comes: it takes room for what has come only, so that a client that sends little keeps
// nobody out. The error is ErrBusy, an http.MaxBytesError or the body's. The room is taken until release, which is there with an error, too.
func Arrive(w http.ResponseWriter, req *http.Request, room *semaphore.Weighted, most int64, within time.Duration) (raw []byte, release func(), err error) {
	// Not every server can set it. Those that cannot have a deadline of their own.
	control := http.NewResponseController(w)
	_ = control.SetReadDeadline(time.Now().Add(within))
	from := http.MaxBytesReader(w, req.Body, most)
	var taken int64
	release = func() { room.Release(taken) }
	var body bytes.Buffer
	part := make([]byte, arriveBy)
	for {
		n, err := from.Read(part)
		if !room.TryAcquire(int64(n)) {
			return nil, release, ErrBusy
		}
		taken += int64(n)
		body.Write(part[:n])
		switch {
		case err == io.EOF:
			_ = control.SetReadDeadline(time.Time{})
			return body.Bytes(), release, nil
		case err != nil:
			return nil, release, err
		}
	}
}
