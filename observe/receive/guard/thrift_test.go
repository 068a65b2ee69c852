package guard

import (
	"bytes"
	"encoding/binary"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestThrift(t *testing.T) {
	number := func(n uint32) []byte { return binary.BigEndian.AppendUint32(nil, n) }
	join := func(parts ...[]byte) []byte { return bytes.Join(parts, nil) }
	refusal := func(message []byte, l Limits) error { _, err := Thrift(message, l); return err }

	// A list of two structs, of which one has a text, and values of all the other types.
	good := join(
		[]byte{15, 0, 1, 12}, number(2), []byte{11, 0, 1}, number(1), []byte{'x', 0}, []byte{0},
		[]byte{2, 0, 2, 1}, []byte{3, 0, 3, 1}, []byte{6, 0, 4, 0, 1}, []byte{8, 0, 5, 0, 0, 0, 1}, []byte{10, 0, 6, 0, 0, 0, 0, 0, 0, 0, 1}, []byte{4, 0, 7, 0, 0, 0, 0, 0, 0, 0, 1},
		[]byte{16, 0, 8}, make([]byte, 16), []byte{13, 0, 9, 11, 8}, number(1), number(1), []byte{'k', 0, 0, 0, 1}, []byte{14, 0, 10, 3}, number(2), []byte{1, 2}, []byte{0},
	)
	memory, err := Thrift(good, OTLP)
	require.NoError(t, err)
	require.Equal(t, 3*perStruct+(2+2+2)*perElement, memory)
	require.NoError(t, refusal(good, Limits{Depth: 4, Memory: memory}))
	require.ErrorContains(t, refusal(good, Limits{Depth: 3, Memory: memory}), "too deep")
	require.ErrorContains(t, refusal(good, Limits{Depth: 4, Memory: memory - 1}), "too many elements")
	for n := range good {
		require.ErrorIs(t, refusal(good[:n], OTLP), ErrRefused, "cut at %d", n)
	}
	for what, bad := range map[string][]byte{
		"more than there is":       join([]byte{15, 0, 1, 3}, number(1<<20), []byte{1}),
		"a negative length":        join([]byte{11, 0, 1}, number(1<<31), []byte{1}),
		"structs in structs":       bytes.Repeat([]byte{12, 0, 1}, 1<<20),
		"sets in sets":             append([]byte{14, 0, 1}, bytes.Repeat(join([]byte{14}, number(1)), 1<<18)...),
		"structs without anything": join([]byte{15, 0, 1, 12}, number(1<<20), make([]byte, 1<<20+1)),
		"a type that is none":      {1, 0, 1},
		"elements that are none":   join([]byte{15, 0, 1, 0}, number(1), []byte{0, 0}),
	} {
		require.ErrorIs(t, refusal(bad, OTLP), ErrRefused, what)
	}
}
