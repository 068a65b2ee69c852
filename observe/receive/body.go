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
	"time"

	"github.com/klauspost/compress/zstd"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// receive reads a request's body, waits for a slot, and unpacks it. It is content with no more than MaxMessage of either. Until release, the request
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

// arrive reads a request's body as it comes, and waits for a slot after that: a client that sends little keeps nobody out. All bodies that arrive have
// a room together.
func (r *Receiver) arrive(w http.ResponseWriter, req *http.Request, most int64) (raw []byte, release func(), err error) {
	// Not every server can set it. Those that cannot have a deadline of their own.
	control := http.NewResponseController(w)
	_ = control.SetReadDeadline(time.Now().Add(readTime))
	raw, arrived, err := r.read(http.MaxBytesReader(w, req.Body, most))
	var long *http.MaxBytesError
	switch {
	case err == nil:
		_ = control.SetReadDeadline(time.Time{})
		var free func()
		if free, err = r.slot(req.Context()); err == nil {
			return raw, func() { free(); arrived() }, nil
		}
	case errors.As(err, &long):
		err = errTooLong(most)
	case errors.Is(err, os.ErrDeadlineExceeded):
		err = status.Error(codes.DeadlineExceeded, "the request took too long to arrive")
	case !errors.Is(err, errBusy):
		err = refused(fmt.Errorf("reading the request: %w", err))
	}
	arrived()
	return nil, nil, err
}

// read reads all that comes, and takes room for each part of it.
func (r *Receiver) read(from io.Reader) (raw []byte, release func(), err error) {
	var taken int64
	release = func() { r.arriving.Release(taken) }
	var text bytes.Buffer
	part := make([]byte, 4<<10)
	for {
		n, err := from.Read(part)
		if !r.arriving.TryAcquire(int64(n)) {
			return nil, release, errBusy
		}
		taken += int64(n)
		text.Write(part[:n])
		switch {
		case err == io.EOF:
			return text.Bytes(), release, nil
		case err != nil:
			return nil, release, err
		}
	}
}

// unpack undoes a content encoding.
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
