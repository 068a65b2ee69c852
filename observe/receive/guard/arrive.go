package guard

import (
	"bytes"
	"errors"
	"io"
	"net/http"
	"time"

	"golang.org/x/sync/semaphore"
)

// ErrBusy means that the arriving bodies have reached their common limit.
var ErrBusy = errors.New("too many requests arrive at the same time")

// arriveBy is how many bytes are read at a time.
const arriveBy = 4 << 10

// Arrive reads a request's body of at most so many bytes. It only reserves memory for what has arrived, so that a slow client does not keep
// others out. The error is ErrBusy, an http.MaxBytesError or the body's. The memory is reserved until release, which is also set after an error.
func Arrive(w http.ResponseWriter, req *http.Request, room *semaphore.Weighted, most int64, within time.Duration) (raw []byte, release func(), err error) {
	// Servers that cannot set it have a deadline of their own.
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
