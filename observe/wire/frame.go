package wire

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
)

// Info is the metadata in a chunk's frame.
type Info struct {
	// Number is the chunk's number within its generation.
	Number uint64
	// Time is when it was made, in milliseconds since 1970.
	Time int64
	// Count is how many lines and samples it has.
	Count uint32
}

// A frame is: magic, length of the chunk, checksum of all that follows (CRC-32C), number, time, count, chunk. Numbers are little-endian.
const (
	magic       = 0x50434d31 // "1MCP"
	frameHeader = 4 + 4 + 4 + 8 + 8 + 4
	checked     = 12 // offset of the part that the checksum covers
)

func appendFrame(frames []byte, info Info, chunk []byte) []byte {
	begin := len(frames)
	frames = binary.LittleEndian.AppendUint32(frames, magic)
	frames = binary.LittleEndian.AppendUint32(frames, uint32(len(chunk)))
	frames = binary.LittleEndian.AppendUint32(frames, 0)
	frames = binary.LittleEndian.AppendUint64(frames, info.Number)
	frames = binary.LittleEndian.AppendUint64(frames, uint64(info.Time))
	frames = binary.LittleEndian.AppendUint32(frames, info.Count)
	frames = append(frames, chunk...)
	frame := frames[begin:]
	binary.LittleEndian.PutUint32(frame[8:], crc32.Checksum(frame[checked:], crc32.MakeTable(crc32.Castagnoli)))
	return frames
}

// CutFrame returns the first chunk and the remaining ones. An error means that it is incomplete or damaged.
func CutFrame(frames []byte) (info Info, chunk, rest []byte, err error) {
	if len(frames) < frameHeader || binary.LittleEndian.Uint32(frames) != magic {
		return info, nil, nil, fmt.Errorf("%w: a chunk has no beginning", ErrMalformed)
	}
	size := binary.LittleEndian.Uint32(frames[4:])
	if size > MaxChunk || int(size) > len(frames)-frameHeader {
		return info, nil, nil, fmt.Errorf("%w: a chunk has no end", ErrMalformed)
	}
	end := frameHeader + int(size)
	if binary.LittleEndian.Uint32(frames[8:]) != crc32.Checksum(frames[checked:end], crc32.MakeTable(crc32.Castagnoli)) {
		return info, nil, nil, fmt.Errorf("%w: a chunk is damaged", ErrMalformed)
	}
	info = Info{
		Number: binary.LittleEndian.Uint64(frames[12:]), Time: int64(binary.LittleEndian.Uint64(frames[20:])), Count: binary.LittleEndian.Uint32(frames[28:]),
	}
	return info, frames[frameHeader:end], frames[end:], nil
}
