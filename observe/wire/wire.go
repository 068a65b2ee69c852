// Package wire defines the format in which a node's collector sends lines and samples to the store of another machine.
//
// A push is a Header, one line of JSON, and then chunks, one after the other. A chunk is a frame with a checksum around compressed lines of JSON,
// each a Record. Collectors keep chunks in the same format on disk (package push), and the store decodes them (package ingest). It is a format of
// our own because Loki's and Prometheus' cannot ensure that each line is stored exactly once: chunks are numbered without a
// gap within a generation, which is one run of a collector.
//
// The input comes from another machine: each size is bounded before memory is allocated for it.
package wire

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"
)

// Version is the version of the format.
const Version = 1

// Limits.
const (
	// MaxHeader is the longest Header, including the newline.
	MaxHeader = 4 << 10
	// MaxRaw is the largest size of a chunk's records: more than the longest line with each byte escaped to six in JSON.
	MaxRaw = 2 << 20
	// MaxValues is the largest number of values in a chunk's records, see Values: short ones take ten times their size in memory.
	MaxValues = 64 << 10
	// MaxBody is the largest push, and MaxChunk its largest chunk.
	MaxBody  = 4 << 20
	MaxChunk = MaxBody - MaxHeader - frameHeader
	// MaxGeneration is the longest name of a generation.
	MaxGeneration = 64
)

// Header is a push's first line.
type Header struct {
	Version int `json:"version"`
	// Generation is a random name, new with each run of the collector.
	Generation string `json:"generation"`
	// First is the number of the first chunk. The first one of a generation is 1.
	First uint64 `json:"first"`
	// Oldest is the number of the oldest chunk of the generation that the collector still has.
	Oldest uint64 `json:"oldest"`
	// Behind is the age of the first chunk in milliseconds, and Dropped the number of lines and samples that the collector has lost since its buffer was created.
	Behind  int64 `json:"behind"`
	Dropped int64 `json:"dropped"`
}

// Answer is the store's answer to a push.
type Answer struct {
	// Position is the number of the generation's last chunk that the store has, and Durable of the last one whose lines are on its disk. The
	// collector continues after Position and keeps the chunks after Durable. Of samples, a power failure of the store's machine takes those of the last
	// half minute, also the store's own: Prometheus leaves it to the kernel when its log of writes goes to the disk.
	Position uint64 `json:"position"`
	Durable  uint64 `json:"durable"`
	// Missing means that chunks between Position and the push are missing: the collector sends those that it still has.
	Missing bool `json:"missing,omitempty"`
}

// Record is one line of a chunk.
type Record struct {
	Lines   *Lines   `json:"lines,omitempty"`
	Samples *Samples `json:"samples,omitempty"`
}

// Lines are lines of one stream, which share their metadata.
type Lines struct {
	Labels   map[string]string `json:"labels"`
	Metadata map[string]string `json:"meta,omitempty"`
	// Times are in nanoseconds since 1970, one for each text.
	Times []int64  `json:"times"`
	Texts []string `json:"texts"`
}

// Samples were read at one time, in milliseconds since 1970.
type Samples struct {
	Time   int64    `json:"time"`
	Values []Sample `json:"values"`
}

// Sample is the value of one series.
type Sample struct {
	Name   string            `json:"name"`
	Labels map[string]string `json:"labels,omitempty"`
	Value  float64           `json:"value"`
}

// ErrMalformed means that a push is malformed.
var ErrMalformed = errors.New("this is not a push of a collector")

// AppendHeader appends a header to a body.
func AppendHeader(body []byte, h Header) ([]byte, error) {
	text, err := json.Marshal(h)
	if err != nil {
		return nil, err
	}
	return append(append(body, text...), '\n'), nil
}

// CutHeader returns the header of a push and its chunks.
func CutHeader(body []byte) (h Header, chunks []byte, err error) {
	end := bytes.IndexByte(body[:min(len(body), MaxHeader)], '\n')
	if end < 0 {
		return h, nil, fmt.Errorf("%w: it has no header", ErrMalformed)
	}
	if err := json.Unmarshal(body[:end], &h); err != nil {
		return h, nil, fmt.Errorf("%w: its header: %w", ErrMalformed, err)
	}
	switch {
	case h.Version != Version:
		return h, nil, fmt.Errorf("%w: it has version %d, and this is %d: use the same version of Polymesh on all machines", ErrMalformed, h.Version, Version)
	case h.Generation == "" || len(h.Generation) > MaxGeneration || h.First == 0 || h.Oldest == 0 || h.Oldest > h.First:
		return h, nil, fmt.Errorf("%w: its header has no meaning", ErrMalformed)
	}
	return h, body[end+1:], nil
}

// Values estimates the number of values in records: each has a comma, a bracket or a brace before it, outside of strings. A line has two.
func Values(records []byte) (n int) {
	for i := 0; i < len(records); i++ {
		switch records[i] {
		case ',', '[', '{':
			n++
		case '"':
			for i++; i < len(records) && records[i] != '"'; i++ {
				if records[i] == '\\' {
					i++
				}
			}
		}
	}
	return n
}

// Encoder makes chunks. It is not safe for concurrent use.
type Encoder struct {
	zstd *zstd.Encoder
}

// NewEncoder returns an encoder that takes little memory.
func NewEncoder() (*Encoder, error) {
	z, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(1), zstd.WithLowerEncoderMem(true), zstd.WithWindowSize(256<<10), zstd.WithEncoderCRC(false))
	if err != nil {
		return nil, fmt.Errorf("set up the compression: %w", err)
	}
	return &Encoder{z}, nil
}

// Chunk appends the frame of a chunk with these records, each a line of JSON.
func (e *Encoder) Chunk(frames []byte, info Info, records []byte) []byte {
	return appendFrame(frames, info, e.zstd.EncodeAll(records, nil))
}

// Decoder reads chunks. It is not safe for concurrent use.
type Decoder struct {
	zstd *zstd.Decoder
	raw  []byte
}

// NewDecoder returns a decoder that uses no more memory than a chunk may need.
func NewDecoder() (*Decoder, error) {
	z, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(MaxRaw), zstd.WithDecoderLowmem(true))
	if err != nil {
		return nil, fmt.Errorf("set up the decompression: %w", err)
	}
	return &Decoder{zstd: z}, nil
}

// Close releases the memory.
func (d *Decoder) Close() { d.zstd.Close() }

// Records calls each for every record of a chunk, until it returns an error. raw is the size of the records.
func (d *Decoder) Records(chunk []byte, each func(Record) error) (raw int, err error) {
	d.raw, err = d.zstd.DecodeAll(chunk, d.raw[:0])
	raw = len(d.raw)
	if err != nil {
		return raw, fmt.Errorf("%w: a chunk cannot be decompressed: %w", ErrMalformed, err)
	}
	if raw > MaxRaw {
		return raw, fmt.Errorf("%w: a chunk is larger than %d bytes", ErrMalformed, MaxRaw)
	}
	if n := Values(d.raw); n > MaxValues {
		return raw, fmt.Errorf("%w: a chunk has %d values, more than %d", ErrMalformed, n, MaxValues)
	}
	in := json.NewDecoder(bytes.NewReader(d.raw))
	for {
		var r Record
		switch err := in.Decode(&r); {
		case errors.Is(err, io.EOF):
			return raw, nil
		case err != nil:
			return raw, fmt.Errorf("%w: a record cannot be read: %w", ErrMalformed, err)
		}
		if err := each(r); err != nil {
			return raw, err
		}
	}
}
