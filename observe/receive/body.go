package receive

import (
	"bytes"
	"compress/gzip"
	"compress/zlib"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"github.com/klauspost/compress/zstd"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// body reads a request's body, unpacks it, and is content with no more than MaxMessage of either.
func body(w http.ResponseWriter, req *http.Request) ([]byte, error) {
	// Not every server can set it. Those that cannot have a deadline of their own.
	_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(readTime))
	raw := http.MaxBytesReader(w, req.Body, MaxMessage)
	unpacked, err := unpack(raw, req.Header.Get("Content-Encoding"))
	if err != nil {
		return nil, err
	}
	defer unpacked.Close()
	var text bytes.Buffer
	if n := req.ContentLength; n > 0 && n <= MaxMessage {
		text.Grow(int(n) + bytes.MinRead) // which it also needs to see the end
	}
	_, err = text.ReadFrom(io.LimitReader(unpacked, MaxMessage+1))
	var long *http.MaxBytesError
	switch {
	case errors.As(err, &long), err == nil && text.Len() > MaxMessage:
		return nil, status.Errorf(codes.ResourceExhausted, "the request has more than %d bytes; send it in parts", MaxMessage)
	case err != nil:
		return nil, refused(fmt.Errorf("reading the request: %w", err))
	}
	return text.Bytes(), nil
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
