package receive

import (
	"bytes"
	"compress/gzip"
	"compress/zlib"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"

	"github.com/klauspost/compress/zstd"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"polymesh.dev/polymesh/observe/receive/guard"
)

// receive reads a request's body, waits for a slot, and unpacks it. Both sizes are limited to MaxMessage. Until release, the request
// has its slot.
func (r *Receiver) receive(w http.ResponseWriter, req *http.Request) (message []byte, release func(), err error) {
	raw, release, err := r.arrive(w, req, MaxMessage)
	if err != nil {
		return nil, nil, err
	}
	unpacked, err := unpack(bytes.NewReader(raw), req.Header.Get("Content-Encoding"))
	if err != nil {
		release()
		return nil, nil, err
	}
	defer unpacked.Close()
	var text bytes.Buffer
	switch _, err = text.ReadFrom(io.LimitReader(unpacked, MaxMessage+1)); {
	case err != nil:
		err = refused(fmt.Errorf("reading the request: %w", err))
	case text.Len() > MaxMessage:
		err = errTooLong(MaxMessage)
	default:
		return text.Bytes(), release, nil
	}
	release()
	return nil, nil, err
}

func errTooLong(most int64) error {
	return status.Errorf(codes.ResourceExhausted, "the request has more than %d bytes; send it in parts", most)
}

// arrive reads a request's body as it comes, and waits for a slot after that: a slow client does not keep others out. All arriving bodies
// share a limit.
func (r *Receiver) arrive(w http.ResponseWriter, req *http.Request, most int64) (raw []byte, release func(), err error) {
	raw, arrived, err := guard.Arrive(w, req, r.arriving, most, readTime)
	var long *http.MaxBytesError
	switch {
	case err == nil:
		var free func()
		if free, err = r.slot(req.Context()); err == nil {
			return raw, func() { free(); arrived() }, nil
		}
	case errors.As(err, &long):
		err = errTooLong(most)
	case errors.Is(err, os.ErrDeadlineExceeded):
		err = status.Error(codes.DeadlineExceeded, "the request took too long to arrive")
	case errors.Is(err, guard.ErrBusy):
		err = errBusy
	case !errors.Is(err, errBusy):
		err = refused(fmt.Errorf("reading the request: %w", err))
	}
	arrived()
	return nil, nil, err
}

// measured is receive for a message that is measured before it is decoded. It reserves the memory for that until release.
func (r *Receiver) measured(w http.ResponseWriter, req *http.Request, measure func([]byte, guard.Limits) (int, error)) (message []byte, release func(), err error) {
	message, received, err := r.receive(w, req)
	if err != nil {
		return nil, nil, err
	}
	memory, err := measure(message, guard.OTLP)
	if err != nil {
		received()
		return nil, nil, refused(err)
	}
	free, err := r.room(req.Context(), memory+2*len(message))
	if err != nil {
		received()
		return nil, nil, err
	}
	return message, func() { free(); received() }, nil
}

// unpack decodes a content encoding.
func unpack(r io.Reader, encoding string) (io.ReadCloser, error) {
	switch strings.ToLower(encoding) {
	case "", "identity", "none":
		return io.NopCloser(r), nil
	case "gzip":
		z, err := gzip.NewReader(r)
		if err != nil {
			return nil, refused(fmt.Errorf("unpacking the request: %w", err))
		}
		return z, nil
	case "deflate", "zlib":
		z, err := zlib.NewReader(r)
		if err != nil {
			return nil, refused(fmt.Errorf("unpacking the request: %w", err))
		}
		return z, nil
	case "zstd":
		z, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(MaxMessage), zstd.WithDecoderMaxMemory(MaxMessage))
		if err != nil {
			return nil, refused(fmt.Errorf("unpacking the request: %w", err))
		}
		return z.IOReadCloser(), nil
	}
	return nil, status.Errorf(codes.Unimplemented, "the content encoding %.20q is not gzip, zstd, deflate or identity", encoding)
}
