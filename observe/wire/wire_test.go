package wire

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
	"github.com/stretchr/testify/require"
)

func chunk(t *testing.T, number uint64, records string) []byte {
	t.Helper()
	e, err := NewEncoder()
	require.NoError(t, err)
	return e.Chunk(nil, Info{Number: number, Time: 1700000000000, Count: 2}, []byte(records))
}

func TestRoundTrip(t *testing.T) {
	want := []Record{
		{Lines: &Lines{Labels: map[string]string{"job": "pods"}, Metadata: map[string]string{"uid": "u"}, Times: []int64{1, 1<<63 - 1}, Texts: []string{"a\n\x00\"", ""}}},
		{Samples: &Samples{Time: 5, Values: []Sample{{Name: "n", Labels: map[string]string{"a": "b"}, Value: -1.5e300}}}},
	}
	var text strings.Builder
	for _, r := range want {
		line, err := json.Marshal(r)
		require.NoError(t, err)
		text.Write(append(line, '\n'))
	}
	h := Header{Version: Version, Generation: "g", First: 7, Oldest: 3, Behind: 2, Dropped: 1}
	body, err := AppendHeader(nil, h)
	require.NoError(t, err)
	body = append(body, chunk(t, 7, text.String())...)
	body = append(body, chunk(t, 8, "")...)

	got, frames, err := CutHeader(body)
	require.NoError(t, err)
	require.Equal(t, h, got)
	info, first, frames, err := CutFrame(frames)
	require.NoError(t, err)
	require.Equal(t, Info{7, 1700000000000, 2}, info)
	d, err := NewDecoder()
	require.NoError(t, err)
	defer d.Close()
	var records []Record
	raw, err := d.Records(first, func(r Record) error { records = append(records, r); return nil })
	require.NoError(t, err)
	require.Equal(t, text.Len(), raw)
	require.Equal(t, want, records)
	info, second, frames, err := CutFrame(frames)
	require.NoError(t, err)
	require.Equal(t, uint64(8), info.Number)
	require.Empty(t, frames)
	raw, err = d.Records(second, func(Record) error { return errors.New("there is none") })
	require.NoError(t, err)
	require.Zero(t, raw)
}

// Every change of a byte, and every cut, is noticed.
func TestDamage(t *testing.T) {
	whole := chunk(t, 1, strings.Repeat(`{"lines":null}`, 10))
	for i := range whole {
		damaged := append([]byte(nil), whole...)
		damaged[i] ^= 0x20
		_, _, _, err := CutFrame(damaged)
		require.ErrorIs(t, err, ErrMalformed, "byte %d", i)
		_, _, _, err = CutFrame(whole[:i])
		require.ErrorIs(t, err, ErrMalformed, "cut at %d", i)
	}
}

func TestHostile(t *testing.T) {
	for header, want := range map[string]string{
		"":    "no header",
		"{}":  "no header",
		"x\n": "its header",
		`{"version":2,"generation":"g","first":1,"oldest":1}` + "\n":                                  "version 2, and this is 1",
		`{"version":1,"generation":"","first":1,"oldest":1}` + "\n":                                   "no meaning",
		`{"version":1,"generation":"` + strings.Repeat("g", 65) + `","first":1,"oldest":1}` + "\n":    "no meaning",
		`{"version":1,"generation":"g","first":0,"oldest":0}` + "\n":                                  "no meaning",
		`{"version":1,"generation":"g","first":1,"oldest":2}` + "\n":                                  "no meaning",
		`{"version":1,"generation":"g","first":-1,"oldest":1}` + "\n":                                 "its header",
		strings.Repeat(" ", MaxHeader) + `{"version":1,"generation":"g","first":1,"oldest":1}` + "\n": "no header",
	} {
		_, _, err := CutHeader([]byte(header))
		require.ErrorIs(t, err, ErrMalformed, header)
		require.ErrorContains(t, err, want, header)
	}
	d, err := NewDecoder()
	require.NoError(t, err)
	defer d.Close()
	never := func(Record) error { return errors.New("a record") }
	z, err := zstd.NewWriter(nil)
	require.NoError(t, err)
	for what, text := range map[string][]byte{
		"no compression":       []byte("{}"),
		"a bomb":               z.EncodeAll(make([]byte, 1<<30), nil),
		"a little too large":   z.EncodeAll(make([]byte, MaxRaw+1), nil),
		"no JSON":              z.EncodeAll([]byte("text"), nil),
		"other JSON":           z.EncodeAll([]byte("[1]"), nil),
		"a number too large":   z.EncodeAll([]byte(`{"samples":{"time":1e99}}`), nil),
		"a deep tree":          z.EncodeAll([]byte(`{"x":`+strings.Repeat("[", 1<<20)), nil),
		"many empty lines":     z.EncodeAll([]byte(`{"lines":{"texts":[`+strings.Repeat(`"",`, MaxValues)+`""]}}`), nil),
		"many empty samples":   z.EncodeAll([]byte(`{"samples":{"values":[`+strings.Repeat(`{"labels":{"":""}},`, MaxValues/3)+`{}]}}`), nil),
		"many records":         z.EncodeAll([]byte(strings.Repeat(`{}`, MaxValues+1)), nil),
		"a value of no number": z.EncodeAll([]byte(`{"samples":{"values":[{"value":"NaN"}]}}`), nil),
	} {
		_, err := d.Records(text, never)
		require.ErrorIs(t, err, ErrMalformed, what)
		require.LessOrEqual(t, cap(d.raw), 2*MaxRaw, what)
	}
}

// What is in a string is no value, however it looks.
func TestValues(t *testing.T) {
	for text, want := range map[string]int{
		"":                           0,
		`{"a":1}`:                    1,
		`{"a":[1,2,3],"b":"c"}`:      5,
		`["a,b[{","\\",{},"\",[",1]`: 6,
		`"\\\",","`:                  1,
		`"a,`:                        0,
		`"a\`:                        0,
	} {
		require.Equal(t, want, Values([]byte(text)), text)
	}
	r := Record{Lines: &Lines{Labels: map[string]string{"job": "pods"}, Times: make([]int64, 1000), Texts: make([]string, 1000)}}
	text, err := json.Marshal(r)
	require.NoError(t, err)
	require.InDelta(t, 2000, Values(text), 10)
}
